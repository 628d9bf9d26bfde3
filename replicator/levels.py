"""Which segments are merged next, and whether a snapshot is worth its bytes. Pure: keys and sizes in, choices out, never any I/O.

Owns the rules of compaction; what may be deleted afterwards is the chain's to say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from replicator.layout import SegmentRef

MOST_INPUTS = 64
"""Segments that are merged at once: each costs a few hundred KiB of memory."""
_WORTH_SEGMENTS = 24
_TOO_MANY_SEGMENTS = 48
_SMALL_CHANGE = 100


Times = Callable[[SegmentRef], tuple[int, int]]
"""When the first and the last commit of a segment were made, in milliseconds."""


def batches(
    increments: Iterable[SegmentRef],
    level: int,
    forks: Collection[int],
    times: Times,
    span_ms: float,
    most: int = MOST_INPUTS,
) -> list[tuple[SegmentRef, ...]]:
    """What to merge into segments of ``level``: two or more each, that adjoin, of lower levels, after what is at that level already.

    increments: of one timeline. forks: txids at which timelines left it; none is crossed, since the part before it belongs to
    both histories, and what crosses one already is as if it were not there. Where a segment is missing the next batch begins
    after it. The commits of a batch lie within ``span_ms``, so that also of a database that is seldom written hardly a state is
    lost that lasted longer; what is alone in its time stays as it is.
    """
    known = [ref for ref in increments if not any(ref.first <= fork < ref.last for fork in forks)]
    done = max((ref.last for ref in known if ref.level >= level), default=0)
    longest: dict[int, SegmentRef] = {}
    for ref in known:
        if ref.level < level and ref.first > done:
            longest[ref.first] = max(longest.get(ref.first, ref), ref, key=lambda one: (one.last, one.level))
    found = (batch for run in _runs(longest, set(forks)) for batch in _cut(run, times, span_ms, most))
    return [tuple(batch) for batch in found if len(batch) > 1]


def _cut(run: Sequence[SegmentRef], times: Times, span_ms: float, most: int) -> Iterator[list[SegmentRef]]:
    batch: list[SegmentRef] = []
    for ref in run:
        if batch and (len(batch) == most or times(ref)[1] - times(batch[0])[0] > span_ms):
            yield batch
            batch = []
        batch.append(ref)
    yield batch


def _runs(by_first: dict[int, SegmentRef], forks: set[int]) -> Iterator[list[SegmentRef]]:
    firsts = sorted(by_first)
    at = 0
    while at < len(firsts):
        run = [by_first[firsts[at]]]
        while (after := by_first.get(run[-1].last + 1)) is not None and run[-1].last not in forks:
            run.append(after)
        yield run
        at = bisect_left(firsts, run[-1].last + 1)


def unmerged(increments: Iterable[SegmentRef], top_level: int) -> set[SegmentRef]:
    """Of one timeline what ``batches`` still looks at, up to the highest level."""
    known = list(increments)
    last = max((ref for ref in known if ref.level >= top_level), key=lambda ref: ref.last, default=None)
    return {ref for ref in known if last is None or ref.last > last.last or ref == last}


def snapshot_is_worth_it(chain: Sequence[SegmentRef], older_s: float, interval_s: float) -> bool:
    """chain: a snapshot and the increments after it. older_s: how much older its last commit is than that of the last of them.

    It is when they outweigh it, or are too many for a quick restore; after the interval when that is in sight, too. So a large
    database of which little changes is not stored anew every day, and snapshots never cost more than the increments did.
    """
    base, increments = chain[0], chain[1:]
    more_bytes = sum(ref.size_bytes for ref in increments)
    if not increments:
        return False
    if more_bytes >= base.size_bytes or len(increments) >= _TOO_MANY_SEGMENTS:
        return True
    is_some_change = more_bytes * _SMALL_CHANGE >= base.size_bytes or len(increments) >= _WORTH_SEGMENTS
    return older_s >= interval_s and is_some_change
