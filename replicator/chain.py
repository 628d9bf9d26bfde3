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


def between(
    timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], start: Position, end: Position
) -> tuple[SegmentRef, ...] | None:
    """Increments that lead from ``start`` to ``end``, in the order of their txids: no other page changed in between.

    The first may begin before ``start``. None when ``start`` is not in the history of ``end``, or when some are missing.
    """
    path = _path(timelines, end)
    if not any(part.timeline == start.timeline and start.txid <= part.txid for part in path):
        return None
    increments = [ref for ref in _usable(timelines, segments, path) if not ref.is_snapshot]
    found = _farthest_first(increments, start.txid, end.txid)
    reached = found[-1].last if found else start.txid
    return tuple(found) if reached == end.txid else None


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


def newer_than(timelines: Mapping[int, Timeline], number: int) -> list[Timeline]:
    """The timelines that were begun after ``number``, in the sense of ``newest``: any of them means that it was left."""
    order = _newest_first(timelines, timelines)
    return [timelines[n] for n in order[: order.index(number)]] if number in timelines else list(timelines.values())


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


# -- what may be deleted -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What must stay restorable on the path of ``timeline``, from the state at ``txid`` to its end.

    From ``fine_txid`` on that is every position at which a segment ends now; before it, every position at which a segment of the
    highest level ends. 0 for everything.
    """

    timeline: int
    txid: int
    fine_txid: int


def deletable(
    timelines: Mapping[int, Timeline], segments: Iterable[SegmentRef], promises: Iterable[Promise]
) -> dict[SegmentRef, frozenset[SegmentRef]]:
    """The segments that no promise needs, each with those that replace it and must be known to be whole before it is deleted.

    A segment is needed on a path unless a longer one of its level or a higher one covers it, and the finest positions are not
    promised there, or unless it lies before the snapshot with which the path begins. What crosses a fork covers nothing for
    the child. Segments that nothing can be restored with yet, but that belong to a promised path, are kept; so are those of
    timelines whose record is missing.
    """
    known = list(segments)
    replaced: dict[SegmentRef, set[SegmentRef]] = {
        ref: set() for ref in known if ref.timeline in timelines and _belongs(timelines, ref)
    }
    for promise in promises:
        for ref, by in _replaced(timelines, known, promise).items():
            if ref in replaced:
                if by is None:
                    del replaced[ref]
                else:
                    replaced[ref].add(by)
    return {ref: frozenset(by) for ref, by in replaced.items()}


def _replaced(
    timelines: Mapping[int, Timeline], known: Sequence[SegmentRef], promise: Promise
) -> dict[SegmentRef, SegmentRef | None]:
    """Of each segment on the promised path, what replaces it there; None when it is needed."""
    own_end = max((ref.last for ref in known if ref.timeline == promise.timeline), default=0)
    end = Position(promise.timeline, max(own_end, _fork_of(timelines, promise.timeline)))
    usable = _usable(timelines, known, _path(timelines, end))
    found: dict[SegmentRef, SegmentRef | None] = dict.fromkeys(usable)
    by_timeline: dict[int, list[SegmentRef]] = {}
    for ref in usable:
        if not ref.is_snapshot:
            by_timeline.setdefault(ref.timeline, []).append(ref)
    for increments in by_timeline.values():
        found.update(_covered(increments, promise.fine_txid))
    kept = [ref for ref, by in found.items() if by is None]
    base = _base(timelines, kept, end, promise.txid)
    if base is not None:
        found.update({ref: base for ref in usable if ref.last <= base.last and ref != base})
    return found


def _base(timelines: Mapping[int, Timeline], kept: Sequence[SegmentRef], end: Position, txid: int) -> SegmentRef | None:
    """The snapshot from which the last position at or before ``txid`` that can be restored with ``kept`` is reached."""
    reached = [ref.last for part in stops(timelines, kept, end.timeline) for ref in part if ref.last <= txid]
    snapshots = (ref for ref in kept if ref.is_snapshot and reached and ref.last <= max(reached))
    return max(snapshots, key=lambda ref: (ref.last, ref.timeline), default=None)


def _covered(increments: Sequence[SegmentRef], fine_txid: int) -> dict[SegmentRef, SegmentRef]:
    """Of the increments of one timeline those that can go, each with the longest that covers it.

    Where the finest positions are promised, a merged segment goes only if shorter ones that stay lead through its whole range.
    """
    longest = _longest_first_covers(increments)
    gone: dict[SegmentRef, SegmentRef] = {}
    stay_at: dict[int, list[SegmentRef]] = {}  # by their first txid, of lower levels than the one that is looked at
    for level in sorted({ref.level for ref in increments}):
        staying: list[SegmentRef] = []
        for ref in (ref for ref in increments if ref.level == level):
            cover = longest.get(ref)
            if cover is not None and (cover.last <= fine_txid or _leads_through(stay_at, ref)):
                gone[ref] = cover
            else:
                staying.append(ref)
        for ref in staying:
            stay_at.setdefault(ref.first, []).append(ref)
    return gone


def _longest_first_covers(increments: Sequence[SegmentRef]) -> dict[SegmentRef, SegmentRef]:
    """For each that is covered, one that covers it and is itself covered by none.

    Those that are covered by none, in the order of where they begin, end in that order as well: so it is enough to look at the
    last that begins at or before a segment, for each level on its own.
    """
    covers: dict[SegmentRef, SegmentRef] = {}
    front: dict[int, SegmentRef] = {}  # per level, the one that reaches farthest of those that begin at or before
    for ref in sorted(increments, key=lambda ref: (ref.first, -ref.last, -ref.level)):
        candidates = [one for level, one in front.items() if level >= ref.level and one.last >= ref.last]
        if candidates:
            covers[ref] = max(candidates, key=lambda one: (one.level, one.last))
        if ref.level not in front or ref.last > front[ref.level].last:
            front[ref.level] = ref
    return {ref: _last_cover(covers, ref) for ref in covers}


def _last_cover(covers: Mapping[SegmentRef, SegmentRef], ref: SegmentRef) -> SegmentRef:
    while ref in covers:
        ref = covers[ref]
    return ref


def _leads_through(stay_at: Mapping[int, Sequence[SegmentRef]], ref: SegmentRef) -> bool:
    """Whether segments that adjoin take the database from the begin of ``ref`` to its end."""
    at = ref.first
    while at <= ref.last:
        fitting = [one for one in stay_at.get(at, ()) if one.last <= ref.last]
        if not fitting:
            return False
        at = min(one.last for one in fitting) + 1
    return True


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
