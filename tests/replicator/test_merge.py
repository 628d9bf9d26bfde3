"""Claims about merging segments: the result does what they do one after the other, and holds nothing else."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import ChainBroken, SegmentDamaged, StateMismatch
from replicator.merge import merge, merged_header
from replicator.pagehash import lock_page, page_hash
from replicator.segment import SegmentHeader, SegmentReader, SegmentWriter, Source

Pages = dict[int, bytes]
DATABASE = "00112233445566778899aabbccddeeff"
WAL = Source(1, 2, 3, 4, 5, 6, 7, False)


def state_of(pages: Mapping[int, bytes]) -> int:
    state = 0
    for page_no, data in pages.items():
        state ^= page_hash(page_no, data)
    return state


def written(header: SegmentHeader, pages: Mapping[int, bytes]) -> SegmentReader:
    out = io.BytesIO()
    writer = SegmentWriter(out, header)
    for page_no in sorted(pages):
        writer.add(page_no, pages[page_no])
    writer.finish()
    return SegmentReader.from_bytes(out.getvalue(), name=f"{header.first}-{header.last}")


def header_of(txid: int, page_size: int, before: Pages, after: Pages, *, snapshot: bool = False) -> SegmentHeader:
    return SegmentHeader(
        database=DATABASE,
        timeline=3,
        first=txid,
        last=txid,
        snapshot=snapshot,
        page_size=page_size,
        page_count=max(after, default=0),
        pages_before=0 if snapshot else max(before, default=0),
        first_commit_ms=txid * 1000,
        last_commit_ms=txid * 1000,
        state_before=0 if snapshot else state_of(before),
        state_after=state_of(after),
        source=WAL,
    )


def increment(txid: int, page_size: int, before: Pages, after: Pages) -> SegmentReader:
    changed = {n: data for n, data in after.items() if before.get(n) != data}
    return written(header_of(txid, page_size, before, after), changed)


def snapshot(txid: int, page_size: int, state: Pages) -> SegmentReader:
    return written(header_of(txid, page_size, {}, state, snapshot=True), state)


def merged(segments: Sequence[SegmentReader], check: Callable[[], None] = lambda: None) -> SegmentReader:
    reader = SegmentReader.from_bytes(b"".join(merge(segments, check)), name="merged")
    reader.verify()
    return reader


def applied(before: Pages, segment: SegmentReader) -> Pages:
    after = {n: data for n, data in before.items() if n <= segment.header.page_count}
    return after | {n: bytes(data) for n, data in segment.pages()}


def page(page_size: int, text: str) -> bytes:
    return text.encode().ljust(page_size, b".")


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Pages]]:
    """States one after the other, of a database that grows, shrinks to nothing and is changed."""
    page_size = draw(st.sampled_from([512, 65536]))
    states: list[Pages] = [{}]
    for txid in range(1, draw(st.integers(2, 7))):
        count = draw(st.integers(0, 14))
        changed = draw(st.sets(st.integers(1, 14)))
        state = {n: states[-1].get(n, page(page_size, f"{n} new {txid}")) for n in range(1, count + 1)}
        states.append(state | {n: page(page_size, f"{n} at {txid}") for n in changed if n <= count})
    return page_size, states


@settings(max_examples=120, deadline=None)
@given(histories(), st.data())
def test_merged_increments_lead_from_the_state_before_the_first_to_that_after_the_last(
    history: tuple[int, list[Pages]], data: st.DataObject
) -> None:
    page_size, states = history
    first = data.draw(st.integers(1, len(states) - 1))
    last = data.draw(st.integers(first, len(states) - 1))
    parts = [increment(n, page_size, states[n - 1], states[n]) for n in range(first, last + 1)]
    found = merged(parts)
    assert applied(states[first - 1], found) == states[last]
    assert found.header == replace(
        parts[-1].header,
        first=first,
        pages_before=parts[0].header.pages_before,
        state_before=parts[0].header.state_before,
        first_commit_ms=first * 1000,
        source=None,
    )
    middle = data.draw(st.integers(1, len(parts)))
    halves = [merged(half) for half in (parts[:middle], parts[middle:]) if half]
    assert [*merged(halves).pages()] == [*found.pages()]


@settings(max_examples=120, deadline=None)
@given(histories(), st.data())
def test_a_snapshot_and_what_follows_give_the_snapshot_of_the_last_state(
    history: tuple[int, list[Pages]], data: st.DataObject
) -> None:
    page_size, states = history
    first = data.draw(st.integers(1, len(states) - 1))
    parts = [increment(n, page_size, states[n - 1], states[n]) for n in range(first + 1, len(states))]
    found = merged([snapshot(first, page_size, states[first]), *parts])
    last = len(states) - 1
    assert {n: bytes(data) for n, data in found.pages()} == states[last]
    assert found.header == replace(snapshot(last, page_size, states[last]).header, source=None)


def test_groups_that_no_newer_page_falls_into_are_taken_as_they_are() -> None:
    size, per_group = 65536, 4
    old = {n: page(size, f"{n}") for n in range(1, 31)}
    new = old | {6: page(size, "6 anew"), 31: page(size, "31")}
    base = snapshot(1, size, old)
    found = merged([base, increment(2, size, old, new)])
    same = [n for n in range(7) if found.groups[n].checksum == base.groups[n].checksum]
    assert same == [0, 2, 3, 4, 5, 6] and base.pages_per_group == per_group
    assert {n: bytes(data) for n, data in found.pages()} == new


@pytest.mark.parametrize("page_size", [512, 65536])
def test_the_lock_page_is_in_no_merged_segment(page_size: int) -> None:
    lock = lock_page(page_size)
    numbers = [n for n in range(lock - 3, lock + 4) if n != lock]
    grown = replace(
        header_of(8, page_size, {}, {}),
        pages_before=lock - 4,
        page_count=lock + 3,
        state_before=5,
        state_after=6,
    )
    changed = replace(grown, first=9, last=9, pages_before=lock + 3, state_before=6, state_after=7)
    first = written(grown, {n: page(page_size, f"{n}") for n in numbers})
    second = written(changed, {n: page(page_size, f"{n} anew") for n in (lock - 1, lock + 1)})
    found = merged([first, second])
    assert [n for n, _ in found.pages()] == numbers
    assert found.page(lock + 1) == page(page_size, f"{lock + 1} anew")


def test_segments_that_do_not_follow_from_each_other_are_not_merged() -> None:
    states: list[Pages] = [{}, {1: page(512, "a")}, {1: page(512, "b")}, {1: page(512, "c")}]
    one, two, three = (increment(n, 512, states[n - 1], states[n]) for n in (1, 2, 3))
    with pytest.raises(ChainBroken, match="3:3-3 does not follow from 3:1: transactions between"):
        merged([one, three])
    with pytest.raises(ChainBroken, match="with state"):
        merged([one, increment(2, 512, states[2], states[3])])
    with pytest.raises(ChainBroken, match="another database or page size"):
        merged([two, written(replace(three.header, page_size=1024), {1: page(1024, "c")})])
    with pytest.raises(ChainBroken):
        merged_header([replace(two.header, timeline=2), three.header])
    with pytest.raises(ChainBroken):
        merged_header([one.header, snapshot(2, 512, states[2]).header])


def test_a_snapshot_that_would_not_have_the_state_of_its_source_is_never_finished() -> None:
    states: list[Pages] = [{}, {1: page(512, "a"), 2: page(512, "x")}, {1: page(512, "b"), 2: page(512, "y")}]
    lacking = written(header_of(2, 512, states[1], states[2]), {1: states[2][1]})
    pieces = []
    with pytest.raises(StateMismatch, match="nothing was deleted"):
        pieces += merge([snapshot(1, 512, states[1]), lacking])
    with pytest.raises(SegmentDamaged):
        SegmentReader.from_bytes(b"".join(pieces))


def test_a_damaged_input_is_noticed() -> None:
    state = {n: page(512, f"{n}") for n in range(1, 9)}
    whole = b"".join(merge([snapshot(1, 512, state)]))
    flipped = bytearray(whole)
    flipped[165] ^= 1
    with pytest.raises(SegmentDamaged):
        merged([SegmentReader.from_bytes(bytes(flipped)), increment(2, 512, state, state | {1: page(512, "b")})])


def test_a_merge_can_be_ended_at_any_time() -> None:
    class Ended(Exception):
        pass

    def end() -> None:
        raise Ended

    with pytest.raises(Ended):
        merged([snapshot(1, 512, {1: page(512, "a")})], end)


def test_memory_does_not_grow_with_the_size_of_the_database() -> None:
    size, count = 65536, 1200
    header = replace(header_of(1, size, {}, {}, snapshot=True), page_count=count)
    contents = [page(size, f"{n % 7}") for n in range(7)]
    state = state_of({n: contents[n % 7] for n in range(1, count + 1)})
    base = written(replace(header, state_after=state), {n: contents[n % 7] for n in range(1, count + 1)})
    change = {n: page(size, f"{n} anew") for n in range(1, count + 1, 9)}
    after = state
    for n, data in change.items():
        after ^= page_hash(n, data) ^ page_hash(n, contents[n % 7])
    newer = written(
        replace(
            header_of(2, size, {}, {}), pages_before=count, page_count=count, state_before=state, state_after=after
        ),
        change,
    )
    tracemalloc.start()
    for _ in merge([base, newer]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, f"{peak} bytes for a database of {size * count}"
