"""Keeps one replica small and quick to restore: merges segments, takes snapshots, deletes what the window does not need.

Owns the order in which that is safe: what replaces a segment is stored, read back and verified, then a grace period passes, then
the segment goes. Only for the writer of the newest timeline. Never waits, never touches the database or the spool.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from replicator import chain, failpoints, levels
from replicator.chain import Promise
from replicator.errors import (
    ChainBroken,
    FormatError,
    NothingToRestore,
    PreconditionFailed,
    ReplicatorError,
    SegmentDamaged,
    StateMismatch,
    StoreError,
)
from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.merge import merge, merged_header
from replicator.replica import Replica
from replicator.segment import SegmentHeader, SegmentReader
from replicator.store import ObjectStore, Stream
from replicator.values import MAX_TXID, Position, Timeline

log = logging.getLogger(__name__)

MAX_LEVELS = SNAPSHOT_LEVEL - 1
SETTLE_S = 86400.0
"""An idle replica is looked at this often while something of it will still leave the window."""
FIRST_RETRY_S = 30.0
MAX_RETRY_S = 3600.0
_INPUT_BYTES = 32 << 20  # of all inputs of a merge together
_AHEAD_BYTES = 4 << 20
_MERGES_AT_ONCE = 256
_KEYS_AT_ONCE = 1000


@dataclass(frozen=True)
class UpkeepSettings:
    """levels_s: how often segments are merged into level 1, 2 …; the last is also how often the replica is listed, while it changes.

    snapshot_s: how often a snapshot is taken of what changes. retention_s: the window in which every moment can be restored; None to
    delete nothing. fine_s: the part of it in which every shipped segment is kept. grace_s: what can be deleted stays this long, for
    restores that are under way.
    """

    levels_s: tuple[float, ...] = (300.0, 3600.0)
    snapshot_s: float = 86400.0
    retention_s: float | None = 7 * 86400.0
    fine_s: float = 86400.0
    grace_s: float = 600.0

    @property
    def survey_s(self) -> float:
        return self.levels_s[-1] if self.levels_s else 3600.0


class _Stopped(Exception):
    """The process ends, or the database is not replicated here any more."""


class Upkeep:
    """``step`` by one thread at a time; ``arrived``, ``stop`` and ``problem`` from any."""

    def __init__(
        self,
        store: ObjectStore,
        settings: UpkeepSettings,
        timeline: Callable[[], int | None],
        wake: Callable[[Upkeep, float], None],
        *,
        now_ms: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """timeline: that is written here, once it is known to be in the store. wake: have ``step`` called after so many seconds."""
        self.problem: ReplicatorError | None = None
        self._replica = Replica(store)
        self._settings = settings
        self._timeline = timeline
        self._wake = wake
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._arrived: list[tuple[SegmentRef, SegmentHeader]] = []
        self._own: int | None = None
        self._left: int | None = None  # a timeline that is not the newest any more
        self._open: set[SegmentRef] = set()  # of the own timeline, what is still to be merged
        self._merged_at = [monotonic()] * len(settings.levels_s)
        self._survey_at: float | None = monotonic() + settings.survey_s
        self._surveyed_at = monotonic()
        self._condemned: dict[SegmentRef, float] = {}  # what may be deleted, and since when
        self._proven: set[SegmentRef] = set()  # merged segments that were read back
        self._retry_s = FIRST_RETRY_S
        self._not_before = 0.0
        self._merges_left = 0
        self._trouble: ReplicatorError | None = None  # the first thing that could not be done in this step

    # -- for other threads ---------------------------------------------------------------------------------------------

    def arrived(self, ref: SegmentRef, header: SegmentHeader) -> None:
        """A segment is in the store."""
        with self._guard:
            self._arrived.append((ref, header))
        self._wake(self, self._settings.levels_s[0] if self._settings.levels_s else self._settings.survey_s)

    def stop(self) -> None:
        """End what is under way as soon as that leaves nothing half done; ``step`` does nothing from now on."""
        self._stopping.set()

    # -- the loop's body -----------------------------------------------------------------------------------------------

    def step(self) -> float | None:
        """Do what is due. Seconds until the next call, None to wait for a segment to arrive."""
        if self._stopping.is_set():
            return None
        if self._monotonic() < self._not_before:
            return self._not_before - self._monotonic()
        try:
            wait_s = self._do_what_is_due()
        except _Stopped:
            return None
        except (ReplicatorError, OSError) as error:
            return self._back_off(error if isinstance(error, ReplicatorError) else StoreError(str(error)))
        except Exception as error:  # what nobody foresaw must show in the status, too
            log.exception("the upkeep of %s failed in a way that nobody foresaw; it is tried again", self._url)
            return self._back_off(StoreError(f"internal error, see the log: {error!r}"))
        if self.problem is not None:
            log.info("the upkeep of %s goes on", self._url)
        self.problem, self._retry_s = None, FIRST_RETRY_S
        return wait_s

    def _back_off(self, error: ReplicatorError) -> float:
        if str(error) != str(self.problem):
            log.warning("the upkeep of %s stands still: %s", self._url, error)
        self.problem = error
        wait_s, self._retry_s = self._retry_s, min(self._retry_s * 2, MAX_RETRY_S)
        self._not_before = self._monotonic() + wait_s
        # What is remembered may be what is wrong: the next try looks at everything anew.
        self._survey_at = self._not_before
        return wait_s

    def _do_what_is_due(self) -> float | None:
        own = self._timeline()
        if own is None or own == self._left:
            return None
        now = self._monotonic()
        self._take_arrived(own)
        self._merges_left, self._trouble = _MERGES_AT_ONCE, None
        if self._survey_at is not None and now >= self._survey_at:
            self._survey(own)
        else:
            for level in range(1, len(self._settings.levels_s)):
                if now >= self._due_at(level):
                    self._compact_open(level)
        if self._trouble is not None:
            raise self._trouble
        return self._wait_s()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """What is damaged keeps nothing else from being done; it is raised when the step has done that."""
        try:
            yield
        except (FormatError, ChainBroken, StateMismatch) as error:
            self._trouble = self._trouble or error

    def _take_arrived(self, own: int) -> None:
        with self._guard:
            arrived, self._arrived = self._arrived, []
        if own != self._own:
            self._own, self._open = own, set()
        for ref, header in arrived:
            if ref.timeline == own and not ref.is_snapshot:
                self._open.add(ref)
                self._replica.remember_header(ref, header)
        if arrived:
            self._survey_no_later_than(self._surveyed_at + self._settings.survey_s)

    def _survey_no_later_than(self, moment: float) -> None:
        self._survey_at = moment if self._survey_at is None else min(self._survey_at, moment)

    def _due_at(self, level: int) -> float:
        return self._merged_at[level - 1] + self._settings.levels_s[level - 1]

    def _wait_s(self) -> float | None:
        moments = [] if self._survey_at is None else [self._survey_at]
        for level in range(1, len(self._settings.levels_s)):
            if self._batches(self._open, level, ()):
                moments.append(self._due_at(level))
        return max(0.0, min(moments) - self._monotonic()) if moments else None

    # -- compaction ----------------------------------------------------------------------------------------------------

    def _compact_open(self, level: int) -> None:
        """From what is remembered, without asking the store what it has."""
        self._compact(self._open, level, ())
        self._merged_at[level - 1] = self._monotonic()
        self._open = _without_covered(self._open)

    def _compact(self, increments: set[SegmentRef], level: int, forks: Sequence[int]) -> None:
        """Merge what can be, up to the number of merges for one step; ``increments`` of one timeline, to which the new ones are added."""
        for batch in self._batches(increments, level, forks):
            if self._merges_left == 0:
                return
            self._merges_left -= 1
            with self._going_on():
                increments.add(self._merge(batch, level))

    def _batches(
        self, increments: Iterable[SegmentRef], level: int, forks: Sequence[int]
    ) -> list[tuple[SegmentRef, ...]]:
        return levels.batches(increments, level, forks, self._times, self._settings.levels_s[level - 1] * 1000)

    def _times(self, ref: SegmentRef) -> tuple[int, int]:
        header = self._replica.header(ref)
        return header.first_commit_ms, header.last_commit_ms

    def _merge(self, parts: Sequence[SegmentRef], level: int) -> SegmentRef:
        """Store the merged segment, read it back and verify it."""
        readers = self._readers(parts)
        expected = merged_header([reader.header for reader in readers])
        ref = SegmentRef(expected.timeline, level, expected.first, expected.last)
        opened = [readers]  # for the first attempt; another opens them again

        def chunks() -> Iterator[bytes]:
            return merge(opened.pop() if opened else self._readers(parts), self._check_stop)

        stream = Stream(chunks, sum(part.size_bytes for part in parts))
        del readers
        failpoints.reach("before-merge-upload")
        try:
            size_bytes = self._replica.store.put(ref.key, stream, if_none_match=True).size_bytes
        except PreconditionFailed:  # made before a crash, or an answer that was lost
            size_bytes = self._replica.store.head(ref.key).size_bytes
        failpoints.reach("after-merge-upload")
        ref = SegmentRef(ref.timeline, level, ref.first, ref.last, size_bytes)
        self._prove(ref, expected)
        failpoints.reach("after-merge-verified")
        self._replica.remember_header(ref, expected)
        self._replica.forget_headers(frozenset(parts))
        log.debug("merged %d segments into %s at %s", len(parts), ref.key, self._url)
        return ref

    def _readers(self, parts: Sequence[SegmentRef]) -> list[SegmentReader]:
        ahead_bytes = _share(part.size_bytes for part in parts)
        return [self._replica.sequential_reader(ref, ahead_bytes) for ref in parts]

    def _prove(self, ref: SegmentRef, expected: SegmentHeader | None = None) -> None:
        """Read a merged segment from its begin to its end, once in the life of the process. What was just made and is not right is
        deleted again, since what it was made of is still there."""
        if ref in self._proven:
            return
        self._check_stop()
        try:
            reader = self._replica.sequential_reader(ref, _AHEAD_BYTES)
            reader.verify(self._check_stop)
            if expected is not None and reader.header != expected:
                raise SegmentDamaged(f"{ref.key} is not what was to be stored there")
        except SegmentDamaged:
            if expected is not None:
                self._replica.store.delete([ref.key])
            raise
        self._proven.add(ref)

    def _check_stop(self) -> None:
        if self._stopping.is_set():
            raise _Stopped

    # -- the whole replica ---------------------------------------------------------------------------------------------

    def _survey(self, own: int) -> None:
        """List the replica, merge, take a snapshot, and delete, each if it is due."""
        timelines, segments = self._replica.timelines(), set(self._replica.segments())
        self._survey_at, self._surveyed_at = None, self._monotonic()
        if own not in timelines:
            raise ChainBroken(
                f"{self._url} has no timeline {own} any more; was it emptied? restart to ship all of it anew"
            )
        if chain.newer_than(timelines, own):
            log.info("timeline %d of %s is not the newest; upkeep is left to the writer of that one", own, self._url)
            self._left, self._open = own, set()
            return
        top = len(self._settings.levels_s)
        for number in (own, *(number for number in timelines if number != own)):
            increments = {ref for ref in segments if ref.timeline == number and not ref.is_snapshot}
            forks = [t.fork_txid for t in timelines.values() if t.parent == number and t.fork_txid is not None]
            # Nobody who is not late writes the other timelines, so that their levels need not be gone through one by one.
            for level in range(1, top + 1) if number == own else [top] if top else []:
                self._compact(increments, level, forks)
            segments |= increments
            if number == own:
                self._open = levels.unmerged(increments, top)
        self._merged_at = [self._monotonic()] * top
        if self._merges_left == 0:
            self._survey_at = self._monotonic()  # more is to be merged; other databases have their turn first
            return
        with self._going_on():
            self._snapshot(timelines, segments, own)
        self._thin(timelines, segments, own)

    def _snapshot(self, timelines: Mapping[int, Timeline], segments: set[SegmentRef], own: int) -> None:
        """One snapshot of the newest position, if it is worth it; of a part of the way when there are too many segments for one."""
        newest = chain.newest(timelines, segments, own)
        parts = chain.plan(timelines, segments, newest).segments[: levels.MOST_INPUTS]
        if len(parts) == 1:
            return
        older_ms = self._replica.header(parts[-1]).last_commit_ms - self._replica.header(parts[0]).last_commit_ms
        if levels.snapshot_is_worth_it(parts, older_ms / 1000, self._settings.snapshot_s):
            segments.add(self._merge(parts, SNAPSHOT_LEVEL))

    # -- retention -----------------------------------------------------------------------------------------------------

    def _thin(self, timelines: Mapping[int, Timeline], segments: set[SegmentRef], own: int) -> None:
        """Delete what the promises have not needed for the grace period."""
        if self._settings.retention_s is None:
            return
        now = self._monotonic()
        found = chain.deletable(timelines, segments, self._promises(timelines, segments))
        self._condemned = {ref: self._condemned.get(ref, now) for ref in found}
        ready = {ref for ref, since in self._condemned.items() if now - since >= self._settings.grace_s}
        damaged = self._damaged({by for ref in ready for by in found[ref]})
        ready = {ref for ref in ready if not found[ref] & damaged}
        if ready and self._delete(timelines, segments, ready, own):
            segments -= ready
            self._open -= ready
        self._proven &= segments
        self._replica.forget_headers(_Outside(segments))
        if self._condemned:
            self._survey_no_later_than(now + max(self._settings.survey_s, self._settings.grace_s))
        elif chain.deletable(timelines, segments, [Promise(own, MAX_TXID, MAX_TXID)]):
            self._survey_no_later_than(now + SETTLE_S)

    def _damaged(self, replacements: Iterable[SegmentRef]) -> set[SegmentRef]:
        """Those that cannot be read as they should be: nothing goes on their account."""
        damaged: set[SegmentRef] = set()
        for ref in replacements:
            damaged.add(ref)
            with self._going_on():
                self._prove(ref)
                damaged.remove(ref)
        return damaged

    def _promises(self, timelines: Mapping[int, Timeline], segments: set[SegmentRef]) -> list[Promise]:
        """One for each timeline that was begun or written, or was the newest, at some time in the window."""
        assert self._settings.retention_s is not None
        window_ms = self._now_ms() - round(self._settings.retention_s * 1000)
        fine_ms = self._now_ms() - round(min(self._settings.fine_s, self._settings.retention_s) * 1000)
        listed = sorted(segments, key=lambda ref: ref.key)
        return [
            Promise(
                number,
                self._txid_at(timelines, listed, window_ms, number),
                self._txid_at(timelines, listed, fine_ms, number),
            )
            for number in timelines
            if self._is_in_window(timelines, listed, number, window_ms)
        ]

    def _is_in_window(
        self, timelines: Mapping[int, Timeline], listed: Sequence[SegmentRef], number: int, window_ms: int
    ) -> bool:
        newer = chain.newer_than(timelines, number)
        # One of a late writer is left when it begins, and what leads to its fork stays all the same until it has shipped something.
        left_ms = max(timelines[number].created_ms, min((timeline.created_ms for timeline in newer), default=0))
        if not newer or left_ms >= window_ms:
            return True
        last = max((ref for ref in listed if ref.timeline == number), key=lambda ref: ref.last, default=None)
        return last is not None and self._replica.header(last).last_commit_ms >= window_ms

    def _txid_at(self, timelines: Mapping[int, Timeline], listed: Sequence[SegmentRef], at_ms: int, number: int) -> int:
        try:
            return self._replica.find_position(timelines, listed, at_ms, number)[0].txid
        except NothingToRestore:  # all of it is younger
            return 0

    def _delete(
        self,
        timelines: Mapping[int, Timeline],
        segments: set[SegmentRef],
        ready: set[SegmentRef],
        own: int,
    ) -> bool:
        """False when a timeline was begun meanwhile, which may need what was to go."""
        _check_still_restorable(timelines, segments, ready, own)
        if self._replica.timelines() != timelines:
            self._survey_at = self._monotonic()
            return False
        failpoints.reach("before-delete")
        # Short ones first: an increment goes before the snapshot that it needs.
        keys = [ref.key for ref in sorted(ready, key=lambda ref: (ref.level, -ref.last))]
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            self._check_stop()
            self._replica.store.delete(keys[start : start + _KEYS_AT_ONCE])
        failpoints.reach("after-delete")
        for ref in ready:
            del self._condemned[ref]
        log.info("deleted %d segments of %s that its window does not need", len(keys), self._url)
        return True

    @property
    def _url(self) -> str:
        return self._replica.store.url


def _share(sizes: Iterable[int]) -> int:
    """How much of each input to hold in memory, so that small ones are read at once and large ones in long pieces."""
    left_bytes, share = _INPUT_BYTES, 0
    ascending = sorted(sizes)
    for number, size_bytes in enumerate(ascending):
        share = left_bytes // (len(ascending) - number)
        left_bytes -= min(size_bytes, share)
    return min(share, _AHEAD_BYTES)


def _check_still_restorable(
    timelines: Mapping[int, Timeline], segments: set[SegmentRef], ready: set[SegmentRef], own: int
) -> None:
    """The newest position and its plan survive, whatever the rules say: a last look before something is deleted."""
    newest: Position = chain.newest(timelines, segments, own)
    try:
        chain.plan(timelines, segments - ready, newest)
    except (ChainBroken, NothingToRestore) as error:
        raise ChainBroken(f"nothing was deleted, since {newest} could not be restored afterwards: {error}") from error


def _without_covered(increments: Iterable[SegmentRef]) -> set[SegmentRef]:
    """Those that a merged one stands for are not remembered."""
    known = list(increments)
    merged = [ref for ref in known if ref.level > 0]
    return {
        ref
        for ref in known
        if not any(ref.level < one.level and one.first <= ref.first and ref.last <= one.last for one in merged)
    }


class _Outside:
    """Everything that is not in a set."""

    def __init__(self, inside: set[SegmentRef]) -> None:
        self._inside = inside

    def __contains__(self, ref: object) -> bool:
        return ref not in self._inside
