"""Claims about what is merged and what may be deleted: whatever was promised can be restored after any sequence of both."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator import chain, levels
from replicator.chain import Promise, deletable
from replicator.errors import ChainBroken
from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.levels import snapshot_is_worth_it, unmerged
from replicator.values import Position, Timeline

TOP = 2


def record(number: int, parent: int | None = None, fork: int | None = None) -> Timeline:
    return Timeline(number, "0" * 32, parent, fork, 0, "test", "test")


def snap(timeline: int, txid: int, size_bytes: int = 0) -> SegmentRef:
    return SegmentRef(timeline, SNAPSHOT_LEVEL, txid, txid, size_bytes)


def seg(timeline: int, first: int, last: int | None = None, level: int = 0, size_bytes: int = 0) -> SegmentRef:
    return SegmentRef(timeline, level, first, first if last is None else last, size_bytes)


def batches(
    refs: list[SegmentRef], level: int, forks: Collection[int], most: int = 64, span_ms: float = 1e9
) -> list[tuple[SegmentRef, ...]]:
    """With a commit a second."""
    return levels.batches(refs, level, forks, lambda ref: (ref.first * 1000, ref.last * 1000), span_ms, most)


ONE = {1: record(1)}
FORKED = {1: record(1), 2: record(2, 1, 4)}
EVERYTHING = 0
NOTHING_FINE = 10**9


# -- compaction --------------------------------------------------------------------------------------------------------


def test_what_adjoins_is_merged_after_what_is_merged_already() -> None:
    refs = [seg(1, 2, 5, 1), *(seg(1, n) for n in range(2, 9))]
    assert batches(refs, 1, ()) == [(seg(1, 6), seg(1, 7), seg(1, 8))]


def test_of_what_begins_at_one_place_the_longest_is_taken() -> None:
    refs = [seg(1, 2, 4, 1), *(seg(1, n) for n in range(2, 8))]
    assert batches(refs, 2, ()) == [(seg(1, 2, 4, 1), seg(1, 5), seg(1, 6), seg(1, 7))]


def test_one_segment_alone_stays_as_it_is() -> None:
    assert batches([seg(1, 2)], 1, ()) == []
    assert batches([seg(1, 2), seg(1, 4)], 1, ()) == []


def test_no_batch_crosses_a_fork() -> None:
    refs = [seg(1, n) for n in range(2, 9)]
    assert batches(refs, 1, [4]) == [tuple(refs[:3]), tuple(refs[3:])]
    assert batches([*refs, seg(1, 2, 5, 1)], 1, [4]) == [tuple(refs[:3]), tuple(refs[3:])]
    assert batches([*refs, seg(1, 3, 5, 1)], 2, [4]) == [tuple(refs[:3]), tuple(refs[3:])]


def test_many_segments_are_merged_in_several_batches() -> None:
    refs = [seg(1, n) for n in range(2, 12)]
    assert [len(batch) for batch in batches(refs, 1, (), most=4)] == [4, 4, 2]


def test_a_batch_spans_no_more_time_than_its_level() -> None:
    refs = [seg(1, n) for n in (2, 3, 4, 5, 6, 7)]
    assert batches(refs, 1, (), span_ms=2000) == [tuple(refs[:3]), tuple(refs[3:])]
    assert batches([*refs[:3], seg(1, 5, 90, 1)], 2, (), span_ms=2000) == [tuple(refs[:3])]
    assert batches(refs, 1, (), span_ms=999) == []


def test_where_a_segment_is_missing_the_next_batch_begins_after_it() -> None:
    refs = [seg(1, 2), seg(1, 3), seg(1, 5), seg(1, 6)]
    assert batches(refs, 1, ()) == [(seg(1, 2), seg(1, 3)), (seg(1, 5), seg(1, 6))]


def test_only_what_is_not_at_the_top_yet_is_remembered() -> None:
    refs = [seg(1, 2, 5, 2), seg(1, 2, 3, 1), seg(1, 4), seg(1, 6), seg(1, 7, 9, 1)]
    assert unmerged(refs, 2) == {seg(1, 2, 5, 2), seg(1, 6), seg(1, 7, 9, 1)}


# -- snapshots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("increments", "size_bytes", "older_s", "worth"),
    [
        (0, 0, 1e9, False),  # nothing changed
        (1, 10_000, 0, True),  # as much as the snapshot
        (1, 9_999, 10, False),
        (1, 100, 60, True),  # after the interval a hundredth is enough
        (1, 99, 1e9, False),
        (24, 1, 60, True),  # or so many segments
        (48, 1, 0, True),  # that a restore gets slow
        (47, 1, 0, False),
    ],
)
def test_a_snapshot_is_taken_when_it_is_worth_it(increments: int, size_bytes: int, older_s: float, worth: bool) -> None:
    refs = [snap(1, 1, 10_000), *(seg(1, n, size_bytes=size_bytes) for n in range(2, 2 + increments))]
    assert snapshot_is_worth_it(refs, older_s, 60) is worth


# -- deletion ----------------------------------------------------------------------------------------------------------


def gone(timelines: dict[int, Timeline], segments: list[SegmentRef], *promises: Promise) -> set[SegmentRef]:
    return set(deletable(timelines, segments, promises))


def test_nothing_is_deleted_that_everything_is_promised_of() -> None:
    refs = [snap(1, 1), *(seg(1, n) for n in range(2, 9)), seg(1, 2, 8, 1), snap(1, 8)]
    assert gone(ONE, refs, Promise(1, EVERYTHING, EVERYTHING)) == set()


def test_what_is_merged_goes_where_the_finest_positions_are_not_promised() -> None:
    shipped = [seg(1, n) for n in range(2, 10)]
    refs = [snap(1, 1), *shipped, seg(1, 2, 5, 1), seg(1, 6, 9, 1)]
    assert gone(ONE, refs, Promise(1, EVERYTHING, 7)) == {*shipped[:4]}
    assert deletable(ONE, refs, [Promise(1, 0, 7)])[seg(1, 3)] == {seg(1, 2, 5, 1)}


def test_nothing_stays_at_three_levels() -> None:
    refs = [snap(1, 1), *(seg(1, n) for n in range(2, 6)), seg(1, 2, 3, 1), seg(1, 4, 5, 1), seg(1, 2, 5, 2)]
    assert gone(ONE, refs, Promise(1, 0, 0)) == {seg(1, 2, 3, 1), seg(1, 4, 5, 1)}
    assert gone(ONE, refs, Promise(1, 0, NOTHING_FINE)) == {*refs[1:7]}


def test_a_merged_segment_stays_while_it_is_the_only_way_to_a_fine_position() -> None:
    refs = [snap(1, 1), seg(1, 2, 3, 1), seg(1, 4, 6, 1), seg(1, 2, 6, 2), *(seg(1, n) for n in (4, 5, 6))]
    assert gone(ONE, refs, Promise(1, 0, 5)) == {seg(1, 4, 6, 1)}


def test_what_lies_before_the_snapshot_of_the_window_goes() -> None:
    refs = [snap(1, 1), *(seg(1, n) for n in range(2, 9)), snap(1, 4), snap(1, 7)]
    assert gone(ONE, refs, Promise(1, 6, 6)) == {snap(1, 1), *(seg(1, n) for n in (2, 3, 4))}


def test_the_state_at_the_beginning_of_the_window_can_be_restored_when_it_is_inside_a_merged_segment() -> None:
    refs = [snap(1, 1), seg(1, 2, 3, 1), snap(1, 5), seg(1, 4, 8, 1), seg(1, 4), seg(1, 5)]
    # Position 6 has no segment of its own; the state then is that of 3, once the segments within 4 to 8 are gone.
    assert snap(1, 1) in gone(ONE, refs, Promise(1, 6, NOTHING_FINE))
    refs.remove(snap(1, 5))
    assert gone(ONE, refs, Promise(1, 6, NOTHING_FINE)) == {seg(1, 4), seg(1, 5)}


def test_a_merged_segment_across_a_fork_replaces_nothing_for_the_child() -> None:
    refs = [snap(1, 1), *(seg(1, n) for n in range(2, 8)), seg(1, 2, 7, 1), seg(2, 5)]
    assert gone(FORKED, refs, Promise(2, 0, NOTHING_FINE)) == {seg(1, 2, 7, 1), *(seg(1, n) for n in (5, 6, 7))}
    assert gone(FORKED, refs, Promise(2, 0, NOTHING_FINE), Promise(1, 0, NOTHING_FINE)) == {
        *(seg(1, n) for n in (5, 6, 7))
    }


def test_a_parent_goes_when_the_child_has_a_snapshot_and_the_window_has_passed() -> None:
    refs = [snap(1, 1), *(seg(1, n) for n in range(2, 8)), snap(2, 5), seg(2, 6)]
    assert gone(FORKED, refs, Promise(2, 6, 6)) == {*refs[:7]}
    assert gone(FORKED, refs, Promise(2, 6, 6), Promise(1, 7, 7)) == set()


def test_what_cannot_be_restored_yet_stays_with_its_timeline() -> None:
    refs = [snap(1, 1), seg(1, 2), seg(1, 9), seg(1, 10)]
    assert gone(ONE, refs, Promise(1, 2, NOTHING_FINE)) == set()


def test_a_timeline_without_a_record_is_left_alone() -> None:
    refs = [snap(1, 1), seg(1, 2), snap(7, 3), seg(7, 4)]
    assert gone(ONE, refs, Promise(1, 2, 2)) == set()


def test_a_day_of_segments_is_looked_at_quickly() -> None:
    refs = [snap(1, 1), *(seg(1, n) for n in range(2, 86_402))]
    refs += [seg(1, n, n + 63, 1) for n in range(2, 86_402, 64)]
    refs += [seg(1, n, n + 4095, 2) for n in range(2, 80_000, 4096)]
    started = time.process_time()
    found = deletable(ONE, refs, [Promise(1, 40_000, 50_000)])
    assert time.process_time() - started < 8
    assert 40_000 < len(found) < 60_000


# -- any sequence ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A replica and its clock; every commit, fork and pass takes one tick."""

    now: int = 1
    timelines: dict[int, Timeline] = field(default_factory=lambda: {1: record(1)})
    segments: set[SegmentRef] = field(default_factory=lambda: {snap(1, 1)})
    times: dict[Position, int] = field(default_factory=lambda: {Position(1, 1): 1})

    @property
    def own(self) -> int:
        return max(self.timelines)

    def ship(self, count: int) -> None:
        for _ in range(count):
            self.now += 1
            last = max((ref.last for ref in self.segments if ref.timeline == self.own), default=0)
            txid = max(last, self.timelines[self.own].fork_txid or 0) + 1
            self.segments.add(seg(self.own, txid))
            self.times[Position(self.own, txid)] = self.now

    def fork(self, back: int) -> None:
        stops = self.stops(self.own)
        parent, txid = stops[max(0, len(stops) - 1 - back)]
        self.timelines[self.own + 1] = record(self.own + 1, parent, txid)
        self.times[Position(self.own, txid)] = self.times[Position(parent, txid)]
        self.now += 1

    def compact(self, level: int) -> None:
        for number in self.timelines:
            own = [ref for ref in self.segments if ref.timeline == number and not ref.is_snapshot]
            forks = [t.fork_txid for t in self.timelines.values() if t.parent == number and t.fork_txid]
            for batch in batches(own, level, forks, most=5):
                self.segments.add(seg(number, batch[0].first, batch[-1].last, level))

    def snapshot(self) -> None:
        newest = chain.newest(self.timelines, self.segments, self.own)
        self.segments.add(snap(newest.timeline, newest.txid))

    def stops(self, timeline: int) -> list[tuple[int, int]]:
        """All positions on the path of a timeline that can be restored, oldest first."""
        parts = chain.stops(self.timelines, self.segments, timeline)
        return sorted({(ref.timeline, ref.last) for part in parts for ref in part}, key=lambda stop: (stop[1], stop[0]))

    def at(self, timeline: int, moment: int) -> int:
        return max(
            (txid for number, txid in self.stops(timeline) if self.times[Position(number, txid)] <= moment), default=0
        )

    def thin(self, window: int, fine: int, alive: list[int]) -> None:
        promises = [Promise(n, self.at(n, self.now - window), self.at(n, self.now - fine)) for n in alive]
        promised = {promise: self.promised(promise) for promise in promises}
        self.segments -= set(deletable(self.timelines, self.segments, promises))
        for promise, txids in promised.items():
            assert txids <= {txid for _, txid in self.stops(promise.timeline)}
            for txid in txids:
                chain.plan(self.timelines, self.segments, Position(promise.timeline, txid))

    def promised(self, promise: Promise) -> set[int]:
        """By the plain words of the promise, and by trying every pair."""
        stops = self.stops(promise.timeline)
        newest = stops[-1][1] if stops else 0
        limits = {part.timeline: part.txid for part in chain._path(self.timelines, Position(promise.timeline, newest))}
        usable = [ref for ref in self.segments if ref.last <= limits.get(ref.timeline, -1) and not ref.is_snapshot]
        coarse = [
            (number, txid)
            for number, txid in stops
            if snap(number, txid) in self.segments
            or not any(ref.timeline == number and ref.first <= txid < ref.last for ref in usable)
        ]
        floor = max((txid for _, txid in coarse if txid <= promise.txid), default=0)
        fine = {txid for _, txid in stops if txid >= promise.fine_txid}
        return fine | {txid for _, txid in coarse if txid >= floor}


ACTIONS = st.one_of(
    st.tuples(st.just("ship"), st.integers(1, 9)),
    st.tuples(st.just("compact"), st.integers(1, TOP)),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("fork"), st.integers(0, 12)),
    st.tuples(st.just("thin"), st.integers(0, 25), st.integers(0, 12)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, min_size=4, max_size=24), st.data())
def test_after_any_sequence_what_was_promised_can_be_restored(
    actions: list[tuple[str, int]], data: st.DataObject
) -> None:
    world = World()
    for name, *numbers in actions:
        if name == "ship":
            world.ship(*numbers)
        elif name == "compact":
            world.compact(*numbers)
        elif name == "snapshot":
            world.snapshot()
        elif name == "fork":
            world.fork(*numbers)
        else:
            window, fine = max(numbers), min(numbers)
            others = [n for n in world.timelines if n != world.own]
            alive = data.draw(st.sets(st.sampled_from(others))) if others else set()
            world.thin(window, fine, sorted({world.own, *alive}))
    newest = chain.newest(world.timelines, world.segments, world.own)
    assert chain.plan(world.timelines, world.segments, newest).target == newest


def test_the_oracle_notices_what_is_missing() -> None:
    world = World()
    world.ship(5)
    world.segments -= {seg(1, 3)}
    with pytest.raises(ChainBroken):
        chain.plan(world.timelines, world.segments, Position(1, 5))
