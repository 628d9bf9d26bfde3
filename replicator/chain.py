"""Which segments give a position, and which positions a replica can give. Pure: keys in, keys out, never any I/O.

Owns the choice of segments. It sees keys and timeline records; headers and checksums are the restore's to verify.

A timeline with parent p and fork_txid f continues p's state at f: its increments begin at f + 1, its snapshots lie at f
or later. So the history of a position is one line of txids, of which each timeline on the way up owns a part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from replicator.errors import ChainBroken, NothingToRestore
from replicator.layout import SegmentRef
from replicator.values import Position, Timeline


@dataclass(frozen=True)
class Plan:
    """segments: in the order of their txids; the first is a snapshot, the last ends exactly at ``target.txid``."""

    target: Position
    segments: tuple[SegmentRef, ...]

    @property
    def size_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.segments)


@dataclass(frozen=True, order=True)
class TxidRange:
    """An unbroken chain: both ends can be restored, and in between every position at which a segment ends."""

    first: int
    last: int


def plan(timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], target: Position) -> Plan:
    """The segments to apply, in this order, to get exactly the state at ``target``.

    The newest snapshot at or before the target is the base; from there always the segment that reaches farthest.
    That finds a chain whenever there is one: a segment may be applied anywhere inside its range, so if ``target`` can
    be reached from some position, it can be reached from every position between that and ``target``.
    Takes O(n log n) for n segments. Raises ChainBroken naming what is missing and the nearest position before it
    that can be restored, and NothingToRestore when there is nothing at or before the target.
    """
    known = list(segments)
    path = _path(timelines, target)
    usable = _usable(timelines, known, path)
    base = max((ref for ref in usable if ref.is_snapshot), key=lambda ref: (ref.last, ref.timeline), default=None)
    if base is None:
        raise _no_base(timelines, known, usable, path)
    increments = [ref for ref in usable if not ref.is_snapshot]
    chain = [base, *_farthest_first(increments, base.last, target.txid)]
    if chain[-1].last != target.txid:
        raise _gap(known, increments, chain[-1].last, path)
    return Plan(target, tuple(chain))


def restorable(timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef]) -> dict[int, tuple[TxidRange, ...]]:
    """Per timeline, what it can restore of its own part (that of its ancestors is listed with them), ascending.

    Every timeline with a record or a segment is there, those that can restore nothing with no range.
    """
    return {number: _ranges(refs) for number, refs in _stops(timelines, segments).items()}


def stops(
    timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], timeline: int
) -> tuple[tuple[SegmentRef, ...], ...]:
    """Every position on the path of ``timeline`` that can be restored, each as a segment that ends there.

    One tuple for each timeline on the path, ``timeline`` itself first, then its ancestors up to where each was left;
    ascending txids in each. Several segments may end at one position.
    """
    own = _stops(timelines, segments)
    newest_txid = max((ref.last for ref in own.get(timeline, ())), default=_fork_of(timelines, timeline))
    return tuple(
        tuple(ref for ref in own.get(part.timeline, ()) if ref.last <= part.txid)
        for part in _path(timelines, Position(timeline, newest_txid))
    )


def newest(timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], timeline: int | None = None) -> Position:
    """The default target: the last restorable position in the history of the newest timeline, or of ``timeline``.

    The newest was begun under the highest epoch; of those, it has the highest number. One that has nothing of its own yet is
    where it left its parent, or as near before as the parent can give: its writer may be lost before the parent's end was shipped.
    One without segments and descent counts for nothing. Raises NothingToRestore, and ChainBroken when segments are there but no
    snapshot that they follow from.
    """
    own = _stops(timelines, known := list(segments))
    with_segments = {ref.timeline for ref in known}
    for number in _newest_first(timelines, own) if timeline is None else [timeline]:
        if own.get(number):
            return Position(number, own[number][-1].last)
        fork = Position(number, _fork_of(timelines, number))
        for part in _path(timelines, fork)[1:]:
            if reached := [ref.last for ref in own.get(part.timeline, ()) if ref.last <= part.txid]:
                return fork if reached[-1] == fork.txid else Position(part.timeline, reached[-1])
        if number in with_segments and any(own.values()):
            raise ChainBroken(
                f"timeline {number} cannot be restored: it has segments but no snapshot before them; "
                f"{_alternatives(own, number)}"
            )
    if timeline is not None:
        raise NothingToRestore(f"timeline {timeline} holds nothing to restore; {_alternatives(own, timeline)}")
    if with_segments:
        raise NothingToRestore("the replica holds segments, but no snapshot that they follow from has ever arrived")
    raise NothingToRestore("the replica holds no segment; check the URL, or let the first snapshot be shipped")


def _newest_first(timelines: Mapping[int, Timeline], numbers: Iterable[int]) -> list[int]:
    """By epoch, then by number. One whose record is missing counts as begun under the epoch of those before it."""
    ages: list[tuple[int, int]] = []
    for number in sorted(numbers):
        before = max(ages, default=(0, 0))[0]
        ages.append((timelines[number].epoch if number in timelines else before, number))
    return [number for _, number in sorted(ages, reverse=True)]


# -- the line of txids that leads to a target --------------------------------------------------------------------------


def _fork_of(timelines: Mapping[int, Timeline], number: int) -> int:
    """The txid after which the timeline's own part begins."""
    record = timelines.get(number)
    return 0 if record is None or record.parent is None or record.fork_txid is None else record.fork_txid


def _path(timelines: Mapping[int, Timeline], target: Position) -> list[Position]:
    """The target, then for each ancestor the last of its positions that belongs to the target's history."""
    path = [target]
    record = timelines.get(target.timeline)
    # A parent has a lower number; a record that says otherwise is wrong and must not lead into a loop.
    while record is not None and record.parent is not None and record.parent < record.number:
        path.append(Position(record.parent, min(path[-1].txid, _fork_of(timelines, record.number))))
        record = timelines.get(record.parent)
    return path


def _belongs(timelines: Mapping[int, Timeline], ref: SegmentRef) -> bool:
    """Whether the key makes sense on its timeline."""
    fork = _fork_of(timelines, ref.timeline)
    return ref.first == ref.last >= fork if ref.is_snapshot else fork < ref.first <= ref.last


def _usable(
    timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], path: Sequence[Position]
) -> list[SegmentRef]:
    limits = {part.timeline: part.txid for part in path}
    return [ref for ref in segments if ref.last <= limits.get(ref.timeline, -1) and _belongs(timelines, ref)]


def _farthest_first(increments: Iterable[SegmentRef], start: int, limit: int) -> list[SegmentRef]:
    """The chain from ``start`` towards ``limit``; it ends early where nothing follows."""
    chain: list[SegmentRef] = []
    best: SegmentRef | None = None
    reached = start
    for ref in [*sorted(increments, key=lambda ref: ref.first), None]:
        while best is not None and best.last > reached and (ref is None or ref.first > reached + 1):
            chain.append(best)
            reached = best.last
        if ref is None or ref.first > reached + 1 or reached == limit:
            break
        best = ref if best is None else max(best, ref, key=lambda one: (one.last, one.level, one.first))
    return chain


# -- what can be restored at all ---------------------------------------------------------------------------------------


def _stops(timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef]) -> dict[int, list[SegmentRef]]:
    """Per timeline, its own segments at whose end the database can be restored, by ascending ``last``."""
    own: dict[int, list[SegmentRef]] = {number: [] for number in timelines}
    for ref in segments:
        if _belongs(timelines, ref):
            own.setdefault(ref.timeline, []).append(ref)
    reached: dict[int, list[SegmentRef]] = {}
    for number in sorted(own):
        reached[number] = _reached(own[number], _start(timelines, reached, number))
    return reached


def _start(timelines: Mapping[int, Timeline], reached: Mapping[int, Sequence[SegmentRef]], number: int) -> int | None:
    """The fork point of a timeline, if an ancestor can restore it."""
    fork = _fork_of(timelines, number)
    for part in _path(timelines, Position(number, fork))[1:]:
        refs = reached.get(part.timeline, ())
        at = bisect_left(refs, fork, key=lambda ref: ref.last)
        if part.txid == fork and at < len(refs) and refs[at].last == fork:
            return fork
    return None


def _reached(own: Iterable[SegmentRef], start: int | None) -> list[SegmentRef]:
    reached: list[SegmentRef] = []
    before = start  # the last restorable position before the end of the segment that is looked at
    for ref in sorted(own, key=lambda ref: (ref.last, ref.level, ref.first)):
        if reached and reached[-1].last < ref.last:
            before = reached[-1].last
        if ref.is_snapshot or (before is not None and ref.first - 1 <= before < ref.last):
            reached.append(ref)
    return reached


def _ranges(refs: Sequence[SegmentRef]) -> tuple[TxidRange, ...]:
    txids = sorted({ref.last for ref in refs})
    bridges = [0] * (len(txids) + 1)  # differences of: how many segments lead from txids[i] past txids[i + 1]
    for ref in refs:
        if not ref.is_snapshot:
            bridges[bisect_left(txids, ref.first - 1)] += 1
            bridges[bisect_left(txids, ref.last)] -= 1
    ranges: list[TxidRange] = []
    open_bridges = 0
    for i, txid in enumerate(txids):
        ranges.append(TxidRange(ranges.pop().first if open_bridges else txid, txid))
        open_bridges += bridges[i]
    return tuple(ranges)


# -- words for what is missing -----------------------------------------------------------------------------------------


def _owner(path: Sequence[Position], txid: int) -> int:
    """The timeline on the path that a txid belongs to."""
    return next(part.timeline for part in reversed(path) if part.txid >= txid)


def _gap(
    known: Iterable[SegmentRef], increments: Iterable[SegmentRef], reached: int, path: Sequence[Position]
) -> ChainBroken:
    target = path[0]
    resumes = target.txid  # from here on there is a chain to the target
    for ref in sorted(increments, key=lambda ref: ref.last, reverse=True):
        if ref.last < resumes:
            break
        resumes = min(resumes, ref.first - 1)
    owner = _owner(path, reached + 1)
    nearest = Position(_owner(path, reached), reached)
    if any(not ref.is_snapshot and ref.timeline == owner and ref.first <= resumes < ref.last for ref in known):
        missing = f"transactions {reached + 1} to {resumes} of timeline {owner} have been merged into a longer segment"
    elif reached + 1 == resumes:
        missing = f"transaction {resumes} of timeline {owner} is missing"
    else:
        missing = f"transactions {reached + 1} to {resumes} of timeline {owner} are missing"
    return ChainBroken(f"{target} cannot be restored: {missing}; the nearest position before that can be is {nearest}")


def _no_base(
    timelines: Mapping[int, Timeline],
    known: Sequence[SegmentRef],
    usable: Sequence[SegmentRef],
    path: Sequence[Position],
) -> ChainBroken | NothingToRestore:
    target = path[0]
    if not known:
        return NothingToRestore("the replica holds no segment; check the URL, or let the first snapshot be shipped")
    offer = _alternatives(_stops(timelines, known), target.timeline)
    root = path[-1].timeline
    if len(path) > 1 and root not in timelines and all(ref.timeline != root for ref in known):
        return ChainBroken(f"{target} cannot be restored: timeline {root}, which it descends from, is missing; {offer}")
    if usable:
        first = min(ref.first for ref in usable)
        return ChainBroken(
            f"{target} cannot be restored: no snapshot at or before it, the segments on its path begin with "
            f"transaction {first} of timeline {_owner(path, first)}; {offer}"
        )
    return NothingToRestore(f"the replica holds nothing at or before {target}; {offer}")


def _alternatives(own: Mapping[int, Sequence[SegmentRef]], timeline: int) -> str:
    """The first position that can be restored, of this timeline if it has one."""
    refs = own.get(timeline) or next(filter(None, own.values()), None)
    if not refs:
        return "there is no position that can be restored"
    return f"the first position that can be restored is {Position(refs[0].timeline, refs[0].last)}"
