"""Proof that a replica can be restored: a trial restore of its newest position, and what is left when that fails.

Owns the scratch file of the trial, which it removes. Never writes to the store or to a live database, and decides nothing about healing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from replicator import chain
from replicator.database import LiveDatabase
from replicator.errors import (
    ChainBroken,
    FormatError,
    IntegrityCheckFailed,
    NoRoom,
    NothingToRestore,
    ObjectMissing,
    ReplicatorError,
    StateMismatch,
)
from replicator.image import Image
from replicator.layout import SegmentRef
from replicator.new_database import check_space
from replicator.pagehash import StateHashes
from replicator.replica import Replica
from replicator.restore import OnProgress, RestoreReport, plan_restore, restore, restore_nowhere
from replicator.restore_plan import RestoreOptions, check_link
from replicator.segment import SegmentReader
from replicator.store import ObjectStore
from replicator.values import Position

DAMAGE = (FormatError, ChainBroken, StateMismatch, NothingToRestore, ObjectMissing)
"""What says that the replica does not give what it should, and not that the store is away."""

SCRATCH = "trial.db"
MAX_TRIALS = 20
MAX_HEADERS = 200


@dataclass(frozen=True)
class Verdict:
    """report: of the trial that succeeded, None when none did. problem: why what was asked for cannot be restored, '' if it can.

    integrity: what SQLite found wrong, '' when nothing; unchecked: why it was not asked. damaged: what is wrong with each segment
    that was found to be, by key.
    """

    report: RestoreReport | None
    problem: str = ""
    integrity: str = ""
    unchecked: str = ""
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def is_whole(self) -> bool:
        return not (self.problem or self.integrity or self.damaged)


def verify(
    store: ObjectStore,
    folder: Path,
    options: RestoreOptions,
    *,
    every_segment: bool = False,
    on_progress: OnProgress | None = None,
) -> Verdict:
    """Restore the position to a scratch file in ``folder``, with SQLite's own check. If it cannot be, the newest that can.

    When the folder has no room for it, every page is fetched and counted in the state checksum without a file, and SQLite is not asked.
    every_segment: read all that the replica holds, for other positions. Raises StoreError; ReplicatorError for a folder that is not there.
    """
    unusable: dict[str, ReplicatorError] = {}
    wish, problem = options, ""
    for _ in range(MAX_TRIALS):
        try:
            verdict = trial(store, folder, wish, unusable=unusable, on_progress=on_progress)
        except DAMAGE as error:
            problem = problem or str(error)
            earlier = _earlier(store, wish, unusable, error)
            if earlier is None:
                verdict = Verdict(None)
                break
            wish = replace(options, position=earlier, txid=None, at_ms=None, timeline=None)
            continue
        break
    else:
        verdict = Verdict(None)
    if every_segment:
        unusable |= damaged_segments(store, options.parallelism)
    damaged = {key: error for key, error in unusable.items() if problem or not isinstance(error, ObjectMissing)}
    return replace(verdict, problem=problem, damaged=tuple((key, str(error)) for key, error in sorted(damaged.items())))


def trial(
    store: ObjectStore,
    folder: Path,
    options: RestoreOptions,
    *,
    unusable: dict[str, ReplicatorError] | None = None,
    on_progress: OnProgress | None = None,
    reserve_bytes: int = 0,
) -> Verdict:
    """One restore to a scratch file in ``folder``; without a file if that would leave less than ``reserve_bytes`` free there.

    Raises what DAMAGE names when the position cannot be restored, StoreError.
    """
    unusable = {} if unusable is None else unusable
    scratch = folder / SCRATCH
    plan = plan_restore(store, options)
    pinned = replace(options, position=plan.position, txid=None, at_ms=None, timeline=None)
    try:
        check_space(folder, plan.size_bytes + reserve_bytes)
        report = restore(store, scratch, pinned, on_progress=on_progress, unusable=unusable)
    except IntegrityCheckFailed as error:
        return Verdict(restore_nowhere(store, pinned, unusable=unusable), integrity=str(error))
    except NoRoom as error:
        return Verdict(restore_nowhere(store, pinned, unusable=unusable), unchecked=str(error))
    finally:
        scratch.unlink(missing_ok=True)
    unchecked = "" if options.integrity_check != "none" else "it was not asked for"
    return Verdict(report, unchecked=unchecked)


def _earlier(
    store: ObjectStore, failed: RestoreOptions, unusable: dict[str, ReplicatorError], error: ReplicatorError
) -> Position | None:
    """The newest position before what failed that may be restorable by what is left."""
    replica = Replica(store)
    try:
        timelines = replica.timelines()
        segments = replica.segments()
        if failed.position is not None:
            at = failed.position
            for ref in segments:
                if (ref.timeline, ref.last) == (at.timeline, at.txid):
                    unusable.setdefault(ref.key, error)
        left = [ref for ref in segments if ref.key not in unusable]
        found = chain.newest(timelines, left, failed.timeline)
    except DAMAGE:
        return None
    return None if found == failed.position else found


# -- all of the history ------------------------------------------------------------------------------------------------


def damaged_segments(store: ObjectStore, parallelism: int) -> dict[str, ReplicatorError]:
    """Reads every segment of a replica to its last byte. What is wrong with those that are damaged, or do not follow, by key."""
    replica = Replica(store)
    damaged: dict[str, ReplicatorError] = {}

    def look(ref: SegmentRef) -> SegmentReader | None:
        try:
            reader = replica.reader(ref)
            reader.verify()
        except ObjectMissing:
            return None  # merged meanwhile
        except FormatError as error:
            damaged[ref.key] = error
            return None
        return reader

    refs = sorted(replica.segments(), key=lambda ref: (ref.timeline, ref.last, ref.level))
    with ThreadPoolExecutor(parallelism, "verify") as pool:
        readers = [reader for reader in pool.map(look, refs) if reader is not None]
    for reader, newer in itertools.pairwise(readers):
        header, after = reader.header, newer.header
        if header.timeline == after.timeline and not after.snapshot:
            try:
                check_link(reader, newer)
            except ChainBroken as error:
                damaged[newer.name] = error
    return damaged


# -- the live database -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    """A live database at one moment. position: where the replica has exactly this state; None when it was not found there."""

    hashes: StateHashes
    position: Position | None


def look_at_live(path: Path, store: ObjectStore, tries: int = 5, pause: Callable[[], object] = lambda: None) -> Live:
    """The state of a database now, and the position of the replica that has it. Looks again while it is written meanwhile.

    pause: called between two tries. Raises DatabaseError, StoreError, FormatError.
    """
    found = Live(_live_hashes(path), None)
    for attempt in range(tries):
        if attempt:
            pause()
            found = Live(_live_hashes(path), None)
        position = _position_of(Replica(store), found.hashes)
        if position is not None:
            return replace(found, position=position)
    return found


def _live_hashes(path: Path) -> StateHashes:
    database = LiveDatabase(path)
    try:
        database.acquire()
        return Image.newest(database).state_hashes()
    finally:
        database.close(checkpoint=False)


def _position_of(replica: Replica, hashes: StateHashes) -> Position | None:
    newest = sorted(_newest_stops(replica), key=lambda ref: ref.last, reverse=True)[:MAX_HEADERS]
    for ref in newest:
        header = replica.header(ref)
        if (header.state_after, header.page_count) == (hashes.checksum, hashes.page_count):
            return Position(ref.timeline, ref.last)
    return None


def _newest_stops(replica: Replica) -> Sequence[SegmentRef]:
    timelines, segments = replica.timelines(), replica.segments()
    newest = chain.newest(timelines, segments)
    return [ref for part in chain.stops(timelines, segments, newest.timeline) for ref in part]


def differing_pages(one: StateHashes, other: StateHashes) -> int:
    common = min(one.page_count, other.page_count)
    return int((one.hashes[:common] != other.hashes[:common]).sum()) + abs(one.page_count - other.page_count)
