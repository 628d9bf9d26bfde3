"""Claims about the choice of segments and about what a replica can restore."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.chain import TxidRange, newer_than, newest, plan, restorable, stops
from replicator.errors import ChainBroken, NothingToRestore
from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.values import Position, Timeline


def record(number: int, parent: int | None = None, fork: int | None = None, epoch: int = 0) -> Timeline:
    return Timeline(number, "0" * 32, parent, fork, 0, "test", "test", epoch)


def records(*timelines: Timeline) -> dict[int, Timeline]:
    return {timeline.number: timeline for timeline in timelines}


def snap(timeline: int, txid: int) -> SegmentRef:
    return SegmentRef(timeline, SNAPSHOT_LEVEL, txid, txid)


def seg(timeline: int, first: int, last: int | None = None, level: int = 0) -> SegmentRef:
    return SegmentRef(timeline, level, first, first if last is None else last)


ONE = records(record(1))


def test_a_snapshot_alone_gives_its_own_position() -> None:
    assert plan(ONE, [snap(1, 5)], Position(1, 5)).segments == (snap(1, 5),)


def test_the_newest_snapshot_at_or_before_the_target_is_the_base() -> None:
    segments = [snap(1, 1), seg(1, 2), seg(1, 3), snap(1, 3), seg(1, 4), snap(1, 5), seg(1, 5)]
    assert plan(ONE, segments, Position(1, 4)).segments == (snap(1, 3), seg(1, 4))


def test_the_segment_that_reaches_farthest_is_taken_and_of_equals_the_higher_level() -> None:
    segments = [snap(1, 1), *(seg(1, n) for n in range(2, 10)), seg(1, 2, 5, 1), seg(1, 4, 9, 1), seg(1, 3, 9, 2)]
    assert plan(ONE, segments, Position(1, 9)).segments == (snap(1, 1), seg(1, 2, 5, 1), seg(1, 3, 9, 2))


def test_a_segment_that_goes_beyond_the_target_is_not_used() -> None:
    segments = [snap(1, 1), seg(1, 2), seg(1, 3), seg(1, 2, 3, 1), seg(1, 2, 8, 2)]
    assert plan(ONE, segments, Position(1, 3)).segments == (snap(1, 1), seg(1, 2, 3, 1))


def test_a_target_on_a_child_is_reached_through_the_fork() -> None:
    timelines = records(record(1), record(2, 1, 3), record(3, 2, 5))
    segments = [snap(1, 1), *(seg(1, n) for n in range(2, 9)), seg(2, 4), seg(2, 5), seg(2, 6), seg(3, 6), seg(3, 7)]
    assert plan(timelines, segments, Position(3, 7)).segments == (
        *(snap(1, 1), seg(1, 2), seg(1, 3)),
        *(seg(2, 4), seg(2, 5)),
        *(seg(3, 6), seg(3, 7)),
    )


def test_the_abandoned_tail_of_a_parent_stays_restorable() -> None:
    timelines = records(record(1), record(2, 1, 3))
    segments = [snap(1, 1), *(seg(1, n) for n in range(2, 7)), seg(2, 4)]
    assert plan(timelines, segments, Position(1, 6)).segments[-1] == seg(1, 6)


def test_a_parent_segment_across_the_fork_is_not_used_for_the_child() -> None:
    timelines = records(record(1), record(2, 1, 3))
    with pytest.raises(ChainBroken, match="transactions 2 to 3 of timeline 1"):
        plan(timelines, [snap(1, 1), seg(1, 2, 5, 1), seg(2, 4)], Position(2, 4))


def test_a_child_with_a_snapshot_needs_no_parent() -> None:
    timelines = records(record(2, 1, 100))
    assert plan(timelines, [snap(2, 101), seg(2, 102)], Position(2, 102)).segments == (snap(2, 101), seg(2, 102))


def test_a_txid_before_the_fork_on_a_child_is_the_position_on_the_parent() -> None:
    timelines = records(record(1), record(2, 1, 3))
    assert plan(timelines, [snap(1, 1), seg(1, 2), seg(1, 3), seg(2, 4)], Position(2, 2)).segments[-1] == seg(1, 2)


def test_a_gap_is_named_with_the_nearest_position_before_it() -> None:
    segments = [snap(1, 1), seg(1, 2), seg(1, 3), seg(1, 6), seg(1, 7)]
    with pytest.raises(ChainBroken, match=r"transactions 4 to 5 of timeline 1 are missing; .* is 1:3$"):
        plan(ONE, segments, Position(1, 7))


def test_a_gap_on_the_parent_is_named_as_the_parents() -> None:
    timelines = records(record(1), record(2, 1, 5))
    with pytest.raises(ChainBroken, match=r"2:7 cannot .*transaction 4 of timeline 1 is missing; .* is 1:3$"):
        plan(timelines, [snap(1, 1), seg(1, 2), seg(1, 3), seg(1, 5), seg(2, 6), seg(2, 7)], Position(2, 7))


def test_a_target_after_the_end_is_refused_with_the_end() -> None:
    with pytest.raises(ChainBroken, match=r"transactions 3 to 9 .* is 1:2$"):
        plan(ONE, [snap(1, 1), seg(1, 2)], Position(1, 9))


def test_a_position_inside_a_merged_segment_says_so() -> None:
    with pytest.raises(ChainBroken, match=r"merged into a longer segment; .* is 1:1$"):
        plan(ONE, [snap(1, 1), seg(1, 2, 9, 1)], Position(1, 5))


def test_a_target_before_the_first_snapshot_is_nothing_to_restore() -> None:
    with pytest.raises(NothingToRestore, match="at or before 1:3; the first position .* is 1:5"):
        plan(ONE, [snap(1, 5), seg(1, 6)], Position(1, 3))


def test_increments_without_a_snapshot_are_a_broken_chain() -> None:
    with pytest.raises(ChainBroken, match="no snapshot at or before it"):
        plan(ONE, [seg(1, 2), seg(1, 3)], Position(1, 3))


def test_a_missing_parent_is_named() -> None:
    with pytest.raises(ChainBroken, match="timeline 1, which it descends from, is missing"):
        plan(records(record(2, 1, 5)), [seg(2, 6)], Position(2, 6))


def test_an_empty_replica_is_nothing_to_restore() -> None:
    with pytest.raises(NothingToRestore, match="holds no segment"):
        plan({}, [], Position(1, 1))
    with pytest.raises(NothingToRestore, match="holds no segment"):
        newest({}, [])


def test_a_record_that_descends_from_itself_ends_nowhere_but_in_an_error() -> None:
    with pytest.raises(ChainBroken):
        plan(records(record(2, 2, 1)), [seg(2, 2)], Position(2, 2))


def test_newest_is_the_end_of_the_unbroken_part_of_the_last_timeline() -> None:
    timelines = records(record(1), record(2, 1, 3))
    parents = [snap(1, 1), *(seg(1, n) for n in range(2, 9))]
    assert newest(timelines, [*parents, seg(2, 4), seg(2, 5), seg(2, 7)]) == Position(2, 5)


def test_a_timeline_without_segments_is_at_its_fork() -> None:
    timelines = records(record(1), record(2, 1, 3))
    assert newest(timelines, [snap(1, 1), *(seg(1, n) for n in range(2, 9))]) == Position(2, 3)


def test_a_timeline_whose_parent_was_not_shipped_up_to_the_fork_is_at_the_last_that_was() -> None:
    timelines = records(record(1), record(2, 1, 3), record(3, 2, 6))
    assert newest(timelines, [snap(1, 1), seg(1, 2)]) == Position(1, 2)
    assert newest(timelines, [snap(1, 1), seg(1, 2), seg(2, 4)]) == Position(1, 2)
    assert newest(timelines, [snap(1, 1), seg(1, 2), seg(1, 3), seg(2, 4)]) == Position(2, 4)


def test_the_newest_timeline_is_that_of_the_highest_epoch_whatever_its_number() -> None:
    timelines = records(record(1, epoch=1), record(2, 1, 1, epoch=2), record(3, 1, 1, epoch=1))
    assert newest(timelines, [snap(1, 1), seg(2, 2), seg(3, 2), seg(3, 3)]) == Position(2, 2)


def test_a_timeline_is_left_for_one_of_a_higher_epoch_and_not_for_a_higher_number() -> None:
    timelines = records(record(1, epoch=1), record(2, 1, 1, epoch=2), record(3, 1, 1, epoch=1))
    assert newer_than(timelines, 2) == []
    assert {one.number for one in newer_than(timelines, 3)} == {2}
    assert {one.number for one in newer_than(timelines, 1)} == {2, 3}


def test_a_timeline_whose_record_is_missing_counts_as_of_the_epoch_before_it() -> None:
    assert newest(records(record(1, epoch=5)), [snap(1, 1), snap(2, 4)]) == Position(2, 4)


def test_a_timeline_without_descent_and_segments_does_not_hide_the_one_before() -> None:
    assert newest(records(record(1), record(2)), [snap(1, 1), seg(1, 2)]) == Position(1, 2)


def test_segments_without_any_snapshot_are_nothing_to_restore() -> None:
    with pytest.raises(NothingToRestore, match="no snapshot that they follow from"):
        newest(records(record(1)), [seg(1, 2), seg(1, 3)])


def test_newest_refuses_to_pass_over_a_timeline_whose_snapshot_is_missing() -> None:
    with pytest.raises(ChainBroken, match="timeline 2 cannot be restored"):
        newest(records(record(1), record(2)), [snap(1, 1), seg(2, 7)])


def test_restorable_ranges_break_where_the_chain_does() -> None:
    timelines = records(record(1), record(2, 1, 3), record(3, 1, 5))
    segments = [snap(1, 1), seg(1, 2), seg(1, 3, 4, 1), seg(1, 8), snap(1, 10), seg(1, 11), seg(2, 4), seg(3, 6)]
    assert restorable(timelines, segments) == {1: (TxidRange(1, 4), TxidRange(10, 11)), 2: (), 3: ()}
    assert restorable(timelines, [*segments, seg(1, 3)])[2] == (TxidRange(4, 4),)


def test_a_snapshot_inside_a_merged_segment_does_not_break_the_range() -> None:
    assert restorable(ONE, [snap(1, 1), seg(1, 2, 9, 1), snap(1, 5)]) == {1: (TxidRange(1, 9),)}


def test_stops_follow_the_path_through_the_forks() -> None:
    timelines = records(record(1), record(2, 1, 3))
    segments = [snap(1, 1), *(seg(1, n) for n in range(2, 6)), seg(2, 4)]
    assert stops(timelines, segments, 2) == ((seg(2, 4),), (snap(1, 1), seg(1, 2), seg(1, 3)))


# -- against brute force -----------------------------------------------------------------------------------------------


@st.composite
def replicas(draw: st.DrawFn) -> tuple[dict[int, Timeline], list[SegmentRef]]:
    """Up to three timelines, with gaps, overlaps, merged segments and snapshots anywhere."""
    timelines = {1: record(1)}
    for number in range(2, draw(st.integers(1, 3)) + 1):
        timelines[number] = record(number, draw(st.integers(1, number - 1)), draw(st.integers(1, 8)))
    segments: set[SegmentRef] = set()
    for timeline in timelines.values():
        start = timeline.fork_txid or 0
        for _ in range(draw(st.integers(0, 10))):
            first = draw(st.integers(start + 1, start + 8))
            length = draw(st.sampled_from((1, 1, 1, 2, 3, 5)))
            segments.add(seg(timeline.number, first, first + length - 1, draw(st.integers(0, 2))))
        for txid in draw(st.lists(st.integers(start + 1, start + 9), max_size=2)):
            segments.add(snap(timeline.number, txid))
    return timelines, sorted(segments)


def history(timelines: Mapping[int, Timeline], target: Position) -> dict[int, int]:
    limits = {target.timeline: target.txid}
    current = timelines[target.timeline]
    while current.parent is not None and current.fork_txid is not None:
        limits[current.parent] = min(limits[current.number], current.fork_txid)
        current = timelines[current.parent]
    return limits


def reachable(timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], target: Position) -> set[int]:
    """All txids on the way to the target that some sequence of segments leads to."""
    limits = history(timelines, target)
    usable = [ref for ref in segments if ref.last <= limits.get(ref.timeline, 0)]
    reached = {ref.last for ref in usable if ref.is_snapshot}
    while True:
        more = {ref.last for ref in usable if any(ref.first <= at + 1 and at < ref.last for at in reached)} - reached
        if not more:
            return reached
        reached |= more


@given(replicas(), st.integers(1, 3), st.integers(1, 18))
@settings(max_examples=400, deadline=None)
def test_a_plan_is_valid_and_is_found_whenever_there_is_one(
    replica: tuple[dict[int, Timeline], list[SegmentRef]], number: int, txid: int
) -> None:
    timelines, segments = replica
    target = Position(min(number, max(timelines)), txid)
    expected = reachable(timelines, segments, target)
    try:
        chain = plan(timelines, segments, target).segments
    except (ChainBroken, NothingToRestore) as error:
        assert txid not in expected
        before = max((at for at in expected if at < txid), default=None)
        assert before is None or str(error).endswith(f":{before}")
        return
    limits = history(timelines, target)
    assert chain[0].is_snapshot and not any(ref.is_snapshot for ref in chain[1:])
    assert chain[-1].last == txid
    assert all(ref in segments and ref.last <= limits[ref.timeline] for ref in chain)
    for previous, ref in zip(chain, chain[1:], strict=False):
        assert ref.first <= previous.last + 1 and ref.last > previous.last


@given(replicas())
@settings(max_examples=300, deadline=None)
def test_what_is_called_restorable_has_a_plan_and_nothing_else(
    replica: tuple[dict[int, Timeline], list[SegmentRef]],
) -> None:
    timelines, segments = replica
    ranges = restorable(timelines, segments)
    for number in timelines:
        expected = reachable(timelines, segments, Position(number, 99))
        assert {ref.last for part in stops(timelines, segments, number) for ref in part} == expected
        own = {txid for txid in expected if txid > (timelines[number].fork_txid or 0)}
        ends = {txid for one in ranges[number] for txid in (one.first, one.last)}
        assert ends <= own
        assert all(any(one.first <= txid <= one.last for one in ranges[number]) for txid in own)


def test_a_hundred_thousand_segments_are_planned_at_once() -> None:
    segments = [snap(1, 1), *(seg(1, n) for n in range(2, 100_002))]
    segments += [seg(1, n, n + 9, 1) for n in range(2, 99_000, 10)]
    started = time.process_time()
    assert plan(ONE, segments, Position(1, 100_001)).segments[-1].last == 100_001
    assert restorable(ONE, segments) == {1: (TxidRange(1, 100_001),)}
    assert newest(ONE, segments) == Position(1, 100_001)
    assert time.process_time() - started < 5
