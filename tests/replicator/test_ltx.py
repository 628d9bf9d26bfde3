"""LTX files: those that released Litestreams wrote, those that are written here, and those that are damaged."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import LtxDamaged
from replicator.ltx import LtxHeader, LtxReader, LtxWriter
from replicator.pagehash import lock_page

GOLDEN = Path(__file__).parent / "golden"
BLOCKS, FRAMES = GOLDEN / "litestream-0.5.17" / "ltx", GOLDEN / "litestream-0.5.5" / "ltx"
FILES = sorted([*BLOCKS.rglob("*.ltx"), *FRAMES.rglob("*.ltx")])


def read(data: bytes, piece: int = 1 << 20) -> tuple[LtxHeader, dict[int, bytes]]:
    reader = LtxReader(data[at : at + piece] for at in range(0, len(data), piece))
    return reader.header, dict(reader.pages())


def write(header: LtxHeader, pages: dict[int, bytes]) -> bytes:
    out = io.BytesIO()
    writer = LtxWriter(out, header)
    for page_no, data in pages.items():
        writer.add(page_no, data)
    assert writer.finish() == len(out.getvalue())
    return out.getvalue()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(GOLDEN)))
def test_a_file_of_a_released_litestream_is_read(path: Path) -> None:
    header, pages = read(path.read_bytes())
    assert path.stem == f"{header.first:016x}-{header.last:016x}"
    assert pages
    assert all(len(data) == header.page_size == 512 for data in pages.values())


def test_both_encodings_of_pages_are_among_the_golden_files() -> None:
    assert {path.read_bytes()[104:106] for path in BLOCKS.rglob("*.ltx")} == {b"\0\1"}
    assert {path.read_bytes()[104:106] for path in FRAMES.rglob("*.ltx")} == {b"\0\0"}


@pytest.mark.parametrize("folder", [BLOCKS, FRAMES], ids=["blocks", "frames"])
def test_a_cut_is_damage_wherever_it_is(folder: Path) -> None:
    data = (folder / "0/0000000000000002-0000000000000002.ltx").read_bytes()
    for length in range(len(data)):
        with pytest.raises(LtxDamaged):
            read(data[:length])
    with pytest.raises(LtxDamaged, match="follow after its end"):
        read(data + b"\0")


@pytest.mark.parametrize("folder", [BLOCKS, FRAMES], ids=["blocks", "frames"])
def test_a_flipped_bit_is_damage_or_changes_nothing(folder: Path) -> None:
    data = (folder / "0/0000000000000002-0000000000000002.ltx").read_bytes()
    whole = read(data)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(damaged)) == whole
        except LtxDamaged:
            continue


@pytest.mark.parametrize("piece", [1, 7, 100, 513])
def test_a_file_may_come_in_pieces_of_any_size(piece: int) -> None:
    for folder in (BLOCKS, FRAMES):
        data = (folder / "0/0000000000000003-0000000000000003.ltx").read_bytes()
        assert read(data, piece) == read(data)


@given(
    page_size=st.sampled_from([512, 4096, 65536]),
    contents=st.dictionaries(st.integers(1, 300), st.binary(max_size=40), max_size=5),
    first=st.integers(2, 2**40),
    more=st.integers(0, 9),
    time_ms=st.integers(0, 253402300799999),
)
def test_what_is_written_is_read_again(
    page_size: int, contents: dict[int, bytes], first: int, more: int, time_ms: int
) -> None:
    header = LtxHeader(page_size, 300, first, first + more, time_ms, wal_offset=32)
    pages = {page_no: (contents[page_no] * page_size + bytes(page_size))[:page_size] for page_no in sorted(contents)}
    assert read(write(header, pages)) == (header, pages)


def test_a_snapshot_leaves_out_no_page() -> None:
    header = LtxHeader(512, 3, 1, 9, 0)
    with pytest.raises(ValueError, match="page 2 was left out"):
        write(header, {1: bytes(512), 3: bytes(512)})
    with pytest.raises(ValueError, match="page 3 was left out"):
        write(header, {1: bytes(512), 2: bytes(512)})


def test_the_lock_page_is_in_no_file() -> None:
    lock = lock_page(65536)
    header = LtxHeader(65536, lock + 1, 2, 2, 0)
    with pytest.raises(ValueError, match="lock page"):
        write(header, {lock: bytes(65536)})
    assert list(read(write(header, {lock - 1: bytes(65536), lock + 1: bytes(65536)}))[1]) == [lock - 1, lock + 1]
