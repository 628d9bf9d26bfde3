"""Claims about the native segment format: docs/format.md, sections 3, 5 and 6."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import FormatError, SegmentDamaged, SegmentVersionUnknown
from replicator.pagehash import lock_page, page_hash
from replicator.segment import (
    HEADER_SIZE,
    TRAILER_SIZE,
    ReadAhead,
    SegmentHeader,
    SegmentReader,
    SegmentWriter,
    Source,
    read_header,
)

GOLDEN = Path(__file__).parent / "golden"
PAGE_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
LOCK = lock_page(65536)

INCREMENT = SegmentHeader(
    database="00112233445566778899aabbccddeeff",
    timeline=3,
    first=8,
    last=10,
    snapshot=False,
    page_size=512,
    page_count=9,
    pages_before=9,
    first_commit_ms=1764000001000,
    last_commit_ms=1764000002000,
    state_before=1,
    state_after=2,
    source=Source(1, 2, 3, 4, 5, 6, 7, True),
)


def snapshot_of(page_size: int, page_count: int, state: int) -> SegmentHeader:
    return replace(
        INCREMENT,
        first=10,
        snapshot=True,
        page_size=page_size,
        page_count=page_count,
        pages_before=0,
        state_before=0,
        state_after=state,
        source=None,
    )


def content(page_no: int, size: int) -> bytes:
    """Another one for every page number; every third is all zero, every fifth does not compress."""
    if page_no % 3 == 0:
        return bytes(size)
    return random.Random(page_no).randbytes(size if page_no % 5 == 0 else 64).ljust(size, b"-")


def segment(header: SegmentHeader, page_nos: list[int]) -> bytes:
    out = io.BytesIO()
    writer = SegmentWriter(out, header)
    for page_no in page_nos:
        writer.add(page_no, memoryview(content(page_no, header.page_size)))
    assert writer.finish() == len(out.getvalue())
    return out.getvalue()


def small_snapshot() -> bytes:
    state = 0
    for page_no in range(1, 4):
        state ^= page_hash(page_no, content(page_no, 512))
    return segment(snapshot_of(512, 3, state), [1, 2, 3])


def small_increment() -> bytes:
    return segment(INCREMENT, [2, 3, 7])


def read_all(data: bytes, tail: int = 64 * 1024) -> dict[int, bytes]:
    """Everything that a reader can do, by one that reads the parts one by one when ``tail`` is small."""
    reader = SegmentReader(lambda offset, length: data[offset : offset + length], len(data), tail=tail)
    assert reader.header == read_header(data)
    pages = {page_no: bytes(page) for page_no, page in reader.pages()}
    for page_no, page in pages.items():
        assert reader.page(page_no) == page
    reader.verify()
    return pages


# -- what goes in comes out --------------------------------------------------------------------------------------------


@st.composite
def headers_and_pages(draw: st.DrawFn) -> tuple[SegmentHeader, list[int]]:
    u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
    page_size = draw(st.sampled_from(PAGE_SIZES))
    lock = lock_page(page_size)
    around_the_lock_page = st.integers(lock - 3, lock + 3)
    before = draw(st.one_of(st.integers(0, 1200), around_the_lock_page, st.integers(0, 2**32 - 10)))
    after = draw(st.one_of(st.integers(before, before + 8), st.integers(0, before)))
    snapshot = draw(st.booleans()) and after < 600
    if snapshot:
        before = 0
    new = set(range(before + 1, after + 1))
    most = min(before, after)
    changed = draw(st.sets(st.integers(1, most) | around_the_lock_page.filter(lambda n: n <= most))) if most else set()
    first = draw(st.integers(1, 10**16 - 1))
    header = SegmentHeader(
        database=draw(st.binary(min_size=16, max_size=16)).hex(),
        timeline=draw(st.integers(1, 10**8 - 1)),
        first=first,
        last=first if snapshot else draw(st.integers(first, 10**16 - 1)),
        snapshot=snapshot,
        page_size=page_size,
        page_count=after,
        pages_before=before,
        first_commit_ms=draw(st.integers(0, 253402300799999)),
        last_commit_ms=draw(st.integers(0, 253402300799999)),
        state_before=draw(u64) if before else 0,
        state_after=draw(u64) if after else 0,
        source=draw(st.none() | st.builds(Source, u64, u64, u32, u32, u32, u32, u64, st.booleans())),
    )
    return header, sorted((new | changed) - {lock})


@settings(max_examples=150, deadline=None)
@given(headers_and_pages(), st.sampled_from([0, 200, 64 * 1024]))
def test_reading_gives_exactly_what_was_written(case: tuple[SegmentHeader, list[int]], tail: int) -> None:
    header, page_nos = case
    data = segment(header, page_nos)
    reader = SegmentReader(lambda offset, length: data[offset : offset + length], len(data), tail=tail)
    assert reader.header == read_header(data) == SegmentHeader.decode(header.encode()) == header
    assert [(n, bytes(page)) for n, page in reader.pages()] == [(n, content(n, header.page_size)) for n in page_nos]
    for page_no in page_nos[:3] + page_nos[-3:]:
        assert reader.page(page_no) == content(page_no, header.page_size)


@given(st.sets(st.integers(1, 3000), max_size=1500))
@settings(max_examples=30, deadline=None)
def test_reading_at_random_gives_the_same_as_reading_in_order(page_nos: set[int]) -> None:
    reader = SegmentReader.from_bytes(segment(replace(INCREMENT, page_count=3000, pages_before=3000), sorted(page_nos)))
    in_order = {n: bytes(page) for n, page in reader.pages()}
    of_groups = {n: bytes(page) for group in reversed(reader.groups) for n, page in reader.group_pages(group)}
    assert of_groups == in_order
    for page_no in random.Random(0).sample(range(-1, 3010), 50):
        assert reader.page(page_no) == in_order.get(page_no)


def test_a_segment_that_crosses_the_lock_page_grows_the_database_around_it() -> None:
    header = replace(INCREMENT, page_size=65536, pages_before=LOCK - 2, page_count=LOCK + 2)
    assert list(read_all(segment(header, [1, LOCK - 1, LOCK + 1, LOCK + 2]))) == [1, LOCK - 1, LOCK + 1, LOCK + 2]


def test_a_segment_that_shrinks_the_database_holds_no_page_beyond_its_end() -> None:
    header = replace(INCREMENT, pages_before=500, page_count=4)
    assert list(read_all(segment(header, [1, 4]))) == [1, 4]
    with pytest.raises(ValueError, match="page 5 is out of order or out of range"):
        segment(header, [1, 5])


def test_a_database_without_pages_has_a_snapshot() -> None:
    data = segment(snapshot_of(4096, 0, 0), [])
    assert (read_all(data), len(data)) == ({}, HEADER_SIZE + TRAILER_SIZE)


def test_several_threads_read_the_groups_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.seg"
    path.write_bytes(segment(replace(INCREMENT, page_count=4000, pages_before=0, state_before=0), list(range(1, 4001))))
    found: dict[int, bytes] = {}
    with path.open("rb") as file:
        fd = file.fileno()
        reader = SegmentReader(lambda at, length: os.pread(fd, length, at), path.stat().st_size, tail=0)

        def work(part: int) -> None:
            for group in reader.groups[part::4]:
                found.update((n, bytes(page)) for n, page in reader.group_pages(group))

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert found == {n: bytes(page) for n, page in reader.pages()}


# -- compact, and few requests -----------------------------------------------------------------------------------------


def test_a_segment_of_one_page_costs_less_than_350_bytes_beyond_its_content() -> None:
    data = segment(replace(INCREMENT, page_size=4096), [5])
    assert len(data) < 4096 + 350
    assert len(segment(replace(INCREMENT, page_size=4096), [6])) < 350  # an all-zero page


def test_a_snapshot_costs_12_bytes_of_index_a_group() -> None:
    data = segment(snapshot_of(512, 5120, 1), list(range(1, 5121)))
    groups = SegmentReader.from_bytes(data).groups
    assert len(groups) == 10
    assert len(data) == HEADER_SIZE + sum(group.length for group in groups) + 10 * 12 + 8 + TRAILER_SIZE


def test_any_page_of_a_large_segment_is_two_reads_away_and_the_header_one_more() -> None:
    data = segment(replace(INCREMENT, page_size=4096, page_count=3000, pages_before=3000), list(range(5, 3000, 5)))
    reads: list[tuple[int, int]] = []

    def read_at(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    reader = SegmentReader(read_at, len(data))
    assert reads == [(len(data) - 65536, 65536)]
    assert reader.page(5) == content(5, 4096)
    assert len(reads) == 2
    assert reader.header.page_count == 3000
    assert reads[2:] == [(0, HEADER_SIZE)]
    assert reader.header.page_count == 3000
    assert len(reads) == 3


def test_a_small_segment_is_one_read() -> None:
    data = small_increment()
    reads: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        reads.append(offset)
        return data[offset : offset + length]

    reader = SegmentReader(read_at, len(data))
    reader.verify()
    assert len(list(reader.pages())) == 3
    assert reads == [0]


def test_a_writer_holds_one_group_and_not_the_segment() -> None:
    class Nowhere:
        def write(self, data: bytes, /) -> None:
            pass

    page = bytes(65536)
    writer = SegmentWriter(Nowhere(), snapshot_of(65536, 2000, 1))
    tracemalloc.start()
    for page_no in range(1, 2001):
        writer.add(page_no, page)
    writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 1024 * 1024


# -- mistakes of the caller --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page_no", "size", "match"),
    [(3, 512, "out of order"), (2, 512, "out of order"), (10, 512, "out of range"), (4, 511, "511 bytes")],
)
def test_a_page_that_does_not_belong_is_refused(page_no: int, size: int, match: str) -> None:
    writer = SegmentWriter(io.BytesIO(), INCREMENT)
    writer.add(3, bytes(512))
    with pytest.raises(ValueError, match=match):
        writer.add(page_no, bytes(size))


def test_the_lock_page_is_refused() -> None:
    writer = SegmentWriter(io.BytesIO(), replace(INCREMENT, page_size=65536, page_count=LOCK, pages_before=LOCK))
    with pytest.raises(ValueError, match="lock page"):
        writer.add(LOCK, bytes(65536))


def test_a_segment_that_lacks_a_new_page_cannot_be_finished() -> None:
    writer = SegmentWriter(io.BytesIO(), replace(INCREMENT, pages_before=7))
    writer.add(9, bytes(512))
    with pytest.raises(ValueError, match="1 of the pages 8 to 9 were not added"):
        writer.finish()


def test_nothing_can_be_added_to_a_finished_segment() -> None:
    writer = SegmentWriter(io.BytesIO(), INCREMENT)
    writer.finish()
    with pytest.raises(ValueError, match="finished"):
        writer.add(1, bytes(512))
    with pytest.raises(ValueError, match="finished"):
        writer.finish()


@pytest.mark.parametrize(
    "wrong",
    [
        {"database": "AA" * 16},
        {"database": "aa"},
        {"timeline": 0},
        {"first": 0},
        {"first": 11},
        {"last": 10**16},
        {"snapshot": True},
        {"page_size": 1000},
        {"page_count": 2**32 - 1},
        {"pages_before": 0},
        {"first_commit_ms": -1},
        {"last_commit_ms": 2**48},
        {"state_after": 2**64},
        {"page_count": 0},
    ],
)
def test_a_header_that_no_segment_can_have_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(INCREMENT, **wrong)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_snapshot, small_increment])
@pytest.mark.parametrize("tail", [0, 64 * 1024])
def test_every_truncation_is_noticed(make: Callable[[], bytes], tail: int) -> None:
    data = make()
    assert len(read_all(data, tail)) == 3
    for length in range(len(data)):
        with pytest.raises(SegmentDamaged):
            read_all(data[:length], tail)
        with pytest.raises(SegmentDamaged):
            read_all(data[-length:] if length else b"", tail)


@pytest.mark.parametrize("make", [small_snapshot, small_increment])
@pytest.mark.parametrize("tail", [0, 64 * 1024])
def test_every_flipped_bit_is_noticed(make: Callable[[], bytes], tail: int) -> None:
    data = make()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SegmentDamaged):
            read_all(bytes(flipped), tail)


def test_a_file_that_is_shorter_than_the_store_said_is_noticed() -> None:
    data = small_increment()
    with pytest.raises(SegmentDamaged, match="ends at byte"):
        SegmentReader(lambda offset, length: data[offset : offset + length], len(data) + 1000)


@pytest.mark.parametrize("extra", [b"\0", small_increment(), bytes(TRAILER_SIZE)])
def test_bytes_before_or_after_a_segment_are_noticed(extra: bytes) -> None:
    for data in (extra + small_snapshot(), small_snapshot() + extra):
        with pytest.raises(SegmentDamaged):
            read_all(data)


def test_the_header_of_another_segment_is_noticed() -> None:
    other = segment(replace(INCREMENT, last=11), [2, 3, 7])
    with pytest.raises(SegmentDamaged, match="different segments"):
        read_all(other[:HEADER_SIZE] + small_increment()[HEADER_SIZE:])


def test_a_snapshot_whose_pages_do_not_have_its_state_checksum_fails_to_verify() -> None:
    reader = SegmentReader.from_bytes(segment(snapshot_of(512, 3, 12345), [1, 2, 3]), name="a.seg")
    with pytest.raises(SegmentDamaged, match="^a.seg is damaged: its pages do not have the state checksum"):
        reader.verify()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_damage_is_an_error_and_never_other_data(data: st.DataObject) -> None:
    whole = small_increment()
    start = data.draw(st.integers(0, len(whole) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=24))
    broken = whole[:start] + patch + whole[start + len(patch) :]
    if broken != whole:
        with pytest.raises(SegmentDamaged):
            read_all(broken)


# -- segments that somebody made to do harm: every checksum is right ---------------------------------------------------


def crafted(
    frames: list[bytes],
    runs: list[int],
    header: SegmentHeader = INCREMENT,
    lengths: list[int] | None = None,
    **trailer: int,
) -> bytes:
    """A segment of any parts at all, put together after the document."""
    head = header.encode()
    body = b"".join(frames)
    index = b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(frame)) for frame in frames)
    index += struct.pack(f"<{len(frames)}I", *(lengths or map(len, frames))) + struct.pack(f"<{len(runs)}I", *runs)
    fields = {
        "index_offset": HEADER_SIZE + len(body),
        "index_length": len(index),
        "pages": sum(runs[1::2]),
        "pages_per_group": 256 * 1024 // header.page_size,
        "page_size": header.page_size,
        "page_count": header.page_count,
        "version": 1,
        "flags": 6,
        "pages_before": header.pages_before,
        "index_checksum": xxhash.xxh3_64_intdigest(index),
        "header_checksum": int.from_bytes(head[-8:], "little"),
    }
    end = struct.pack("<QQIIIIHHIQQ", *(fields | trailer).values())
    return (
        head + body + index + end + struct.pack("<Q", xxhash.xxh3_64_intdigest(end)) + b"\x1a\n\r\x47\x45\x53\x52\x89"
    )


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def streamed_frame(data: bytes) -> bytes:
    """Without a content size in its header."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


ONE = frame(bytes(512))
CLAIMS_4_GIB = bytes.fromhex("28b52ffd") + b"\xa0" + struct.pack("<I", 2**32 - 1) + b"\x03\x00\x00\x00"
CLAIMS_EXABYTES = bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 2**62) + b"\x03\x00\x00\x00"
WINDOW_OF_TERABYTES = bytes.fromhex("28b52ffd") + b"\x40\xf8" + struct.pack("<H", 512 - 256) + b"\x01\x00\x00"

BOMBS = {
    "a frame that claims 4 GiB": crafted([CLAIMS_4_GIB], [1, 1]),
    "a frame that claims exabytes": crafted([CLAIMS_EXABYTES], [1, 1]),
    "a frame that wants a window of terabytes": crafted([WINDOW_OF_TERABYTES], [1, 1]),
    "a frame that unpacks to 64 MiB": crafted([frame(bytes(1 << 26))], [1, 1]),
    "a frame that is larger than its pages": crafted([frame(bytes(1024))], [1, 1]),
    "a frame that is smaller than its pages": crafted([frame(bytes(511))], [1, 1]),
    "a frame that does not say how large it is": crafted([streamed_frame(bytes(512))], [1, 1]),
    "two frames in a group": crafted([ONE + ONE], [1, 1]),
    "bytes after a frame": crafted([ONE + b"\0"], [1, 1]),
    "half a frame": crafted([ONE[:-3]], [1, 1]),
    "a skippable frame": crafted([b"\x50\x2a\x4d\x18" + struct.pack("<I", 512) + bytes(512)], [1, 1]),
    "a group that is no frame": crafted([b"x"], [1, 1]),
    "an empty group": crafted([b""], [1, 1]),
    "billions of pages": crafted([ONE], [0, 2**32 - 2], page_count=2**32 - 2, pages_before=0),
    "billions of pages, one in a group": crafted(
        [ONE], [1, 1], pages=2**32 - 2, page_count=2**32 - 2, pages_per_group=1
    ),
    "an endless index": crafted([ONE], [1, 1], index_length=2**64 - 1),
    "an index that starts in the header": crafted([ONE], [1, 1], index_offset=100),
    "an index that starts past the end": crafted([ONE], [1, 1], index_offset=2**64 - 1),
    "groups of gigabytes": crafted([ONE], [1, 1], pages_per_group=2**32 - 1),
    "groups of no page": crafted([ONE], [1, 1], pages_per_group=0),
    "a group longer than its content can be": crafted([ONE + bytes(270_000)], [1, 1]),
    "group lengths that reach past the index": crafted([ONE], [1, 1], lengths=[2**32 - 1]),
    "group lengths that leave a hole": crafted([ONE], [1, 1], lengths=[3]),
    "runs that overflow 32 bits": crafted([ONE], [2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1], pages=1),
    "a run of no page": crafted([ONE], [1, 1, 1, 0]),
    "two runs without a gap": crafted([ONE], [1, 1, 0, 1]),
    "half a run": crafted([ONE], [1, 1, 1]),
    "more pages in the runs than in the trailer": crafted([ONE], [1, 2], pages=1),
    "fewer pages in the runs than in the trailer": crafted([ONE], [1, 1], pages=2),
    "a page beyond the database": crafted([ONE], [9, 1]),
    "the lock page": crafted(
        [frame(bytes(65536))], [LOCK - 1, 1], replace(INCREMENT, page_size=65536, page_count=LOCK, pages_before=LOCK)
    ),
    "a hole in what is new": crafted([ONE], [8, 1], replace(INCREMENT, pages_before=7)),
    "a snapshot with a hole": crafted([ONE], [1, 1], snapshot_of(512, 2, 1), flags=1),
    "an odd page size": crafted([ONE], [1, 1], page_size=513),
    "another page size than the header": crafted([frame(bytes(1024))], [1, 1], page_size=1024),
    "other flags than the header": crafted([ONE], [1, 1], flags=2),
    "another page count than the header": crafted([ONE], [1, 1], page_count=8, pages_before=8),
    "version 0": crafted([ONE], [1, 1], version=0),
}


def test_the_crafted_segment_is_read_when_nothing_is_wrong_with_it() -> None:
    assert read_all(crafted([ONE], [4, 1])) == {5: bytes(512)}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_it_is_refused_without_much_memory(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(SegmentDamaged):
        read_all(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


# -- versions ----------------------------------------------------------------------------------------------------------


def header_with(offset: int, value: bytes) -> bytes:
    """A header with other bytes at ``offset`` and the checksum that goes with them."""
    body = bytearray(INCREMENT.encode()[:-8])
    body[offset : offset + len(value)] = value
    return bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))


@pytest.mark.parametrize(("offset", "value"), [(8, b"\2\0"), (8, b"\0\1"), (10, b"\x08\0"), (10, b"\0\x80")])
def test_an_intact_header_of_a_later_version_or_with_an_unknown_flag_is_not_damage(offset: int, value: bytes) -> None:
    with pytest.raises(SegmentVersionUnknown, match="install a newer release"):
        read_header(header_with(offset, value))


@pytest.mark.parametrize("data", [crafted([ONE], [1, 1], version=2), crafted([ONE], [1, 1], flags=14)])
def test_an_intact_trailer_of_a_later_version_or_with_an_unknown_flag_is_not_damage(data: bytes) -> None:
    with pytest.raises(SegmentVersionUnknown):
        SegmentReader.from_bytes(data)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\x88"),
        (8, b"\0\0"),
        (10, b"\0\0"),
        (10, b"\4\0"),
        (12, b"\1"),
        (32, bytes(4)),
        (44, b"\1"),
        (48, bytes(8)),
        (64, b"\xff" * 8),
        (136, b"\1"),
        (151, b"\1"),
    ],
)
def test_a_header_that_means_nothing_is_damage_though_its_checksum_is_right(offset: int, value: bytes) -> None:
    with pytest.raises(SegmentDamaged):
        read_header(header_with(offset, value))


def golden() -> list[Any]:
    return [
        pytest.param(path.read_bytes(), json.loads(path.with_suffix(".json").read_text()), id=path.stem)
        for path in sorted(GOLDEN.glob("*.seg"))
    ]


def expected_header(expected: dict[str, Any]) -> SegmentHeader:
    source = expected["header"]["source"]
    return SegmentHeader(**{**expected["header"], "source": Source(**source) if source else None})


@pytest.mark.parametrize(("data", "expected"), golden())
def test_a_golden_segment_is_read_as_it_was_when_it_was_written(data: bytes, expected: dict[str, Any]) -> None:
    header = expected_header(expected)
    pages = {int(n): bytes.fromhex(page).ljust(header.page_size, b"\0") for n, page in expected["pages"].items()}
    assert read_header(data) == header
    assert read_all(data) == pages


def test_there_are_golden_segments_of_version_1() -> None:
    names = {path.name for path in GOLDEN.glob("*.seg")}
    assert {"segment-v1-snapshot.seg", "segment-v1-increment.seg"} <= names


def test_the_golden_increment_fits_the_golden_snapshot() -> None:
    snapshot = SegmentReader.from_bytes((GOLDEN / "segment-v1-snapshot.seg").read_bytes())
    increment = SegmentReader.from_bytes((GOLDEN / "segment-v1-increment.seg").read_bytes())
    assert increment.header.state_before == snapshot.header.state_after
    pages = dict(snapshot.pages()) | dict(increment.pages())
    state = 0
    for page_no, page in pages.items():
        state ^= page_hash(page_no, page)
    assert state == increment.header.state_after


@pytest.mark.parametrize(("data", "expected"), golden())
def test_the_document_alone_is_enough_to_read_a_segment(data: bytes, expected: dict[str, Any]) -> None:
    """Written from the tables of docs/format.md, version 1, without the code under test."""

    def u(offset: int, size: int, of: bytes = data) -> int:
        return int.from_bytes(of[offset : offset + size], "little")

    trailer = data[-72:]
    pages, per_group, page_size = u(16, 4, trailer), u(20, 4, trailer), u(24, 4, trailer)
    index = data[u(0, 8, trailer) : -72]
    groups = -(-pages // per_group)
    numbers: list[int] = []
    number = 0
    for run in range(12 * groups, len(index), 8):
        gap, count = u(run, 4, index), u(run + 4, 4, index)
        numbers += range(number + gap + 1, number + gap + count + 1)
        number += gap + count
    content, offset = b"", 160
    for group in range(groups):
        length = u(8 * groups + 4 * group, 4, index)
        content += zstandard.ZstdDecompressor().decompress(data[offset : offset + length])
        offset += length
    found = {str(n): content[i * page_size : (i + 1) * page_size].rstrip(b"\0").hex() for i, n in enumerate(numbers)}
    assert found == expected["pages"]
    header = expected["header"]
    assert (data[16:32].hex(), u(32, 4), u(36, 4), u(40, 4)) == tuple(
        header[name] for name in ("database", "timeline", "page_count", "pages_before")
    )
    assert [u(at, 8) for at in range(48, 96, 8)] == [
        header[name] for name in ("first", "last", "first_commit_ms", "last_commit_ms", "state_before", "state_after")
    ]
    source = header["source"] or dict.fromkeys(Source.__dataclass_fields__, 0)
    assert (u(96, 8), u(104, 8), u(128, 8)) == (source["device"], source["inode"], source["offset"])
    assert [u(at, 4) for at in range(112, 128, 4)] == [source[n] for n in ("salt1", "salt2", "checksum1", "checksum2")]
    assert u(10, 2) == header["snapshot"] + 2 * bool(header["source"]) + 4 * bool(source["big_endian"])
    assert u(152, 8) == xxhash.xxh3_64_intdigest(data[:152]) == u(48, 8, trailer)


def test_every_error_of_a_segment_is_a_format_error_that_names_it() -> None:
    with pytest.raises(FormatError, match="^segments/7.seg is damaged: .*; fetch it again, or restore to an earlier"):
        SegmentReader.from_bytes(small_snapshot()[:-1], name="segments/7.seg")


# -- groups taken from another segment, and reading in order ------------------------------------------------------------


def test_a_group_is_taken_from_another_segment_as_it_is() -> None:
    numbers = [1, 2, 4, 5, 6, 9]
    header = replace(INCREMENT, page_size=65536)
    whole = segment(header, numbers)
    reader = SegmentReader.from_bytes(whole)
    out = io.BytesIO()
    writer = SegmentWriter(out, header)
    first = reader.groups[0]
    assert writer.takes_group(len(first.page_nos))
    writer.add_group(first.page_nos, reader.group_bytes(first))
    for page_no in numbers[4:]:
        writer.add(page_no, content(page_no, 65536))
    writer.finish()
    assert out.getvalue() == whole


def test_a_group_is_taken_only_between_groups_whole_and_in_order() -> None:
    header = replace(INCREMENT, page_size=65536)
    reader = SegmentReader.from_bytes(segment(header, [1, 2, 3, 4, 5]))
    full, rest = reader.groups
    frame = reader.group_bytes(full)
    writer = SegmentWriter(io.BytesIO(), header)
    for group in (rest, full):
        if group is full:
            writer.add(1, content(1, 65536))
        assert not writer.takes_group(len(group.page_nos))
        with pytest.raises(ValueError, match="only between groups"):
            writer.add_group(group.page_nos, frame)
    writer = SegmentWriter(io.BytesIO(), header)
    writer.add_group(full.page_nos, frame)
    with pytest.raises(ValueError, match="out of order"):
        writer.add_group(full.page_nos, frame)
    writer = SegmentWriter(io.BytesIO(), replace(header, page_count=3))
    with pytest.raises(ValueError, match="out of range"):
        writer.add_group(full.page_nos, frame)


def test_a_segment_that_is_read_in_order_takes_few_requests() -> None:
    asked: list[tuple[int, int]] = []
    data = segment(replace(INCREMENT, page_size=65536, page_count=200, pages_before=200), [*range(5, 200, 5)])

    def read_at(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return data[offset : offset + length]

    ahead = ReadAhead(read_at, len(data), 200_000)
    reader = SegmentReader(ahead, len(data), tail=0)
    assert [n for n, _ in reader.pages()] == [*range(5, 200, 5)]
    assert len(reader.groups) == 10
    assert len(asked) <= 3 + len(data) // 200_000 + len(data) // 262_144 + 2
    assert all(offset + length <= len(data) for offset, length in asked)
