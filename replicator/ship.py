"""Takes the segments in a spool to the store, several at a time; knows up to where everything has arrived.

Owns the durable position. Never changes a segment, never deletes an object. Whether an object that is there already is the same one is
checked byte by byte: two writers that share a timeline by accident find out here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from replicator import chain, failpoints
from replicator.envelope import refuse_sealed
from replicator.errors import (
    BucketMissing,
    ChainBroken,
    FormatError,
    NothingToRestore,
    ObjectMissing,
    PreconditionFailed,
    ReplicatorError,
    SealDamaged,
    StoreDenied,
    StoreError,
)
from replicator.layout import SegmentRef, timeline_key
from replicator.replica import Replica, decode_timeline
from replicator.scheduler import Crew
from replicator.segment import HEADER_SIZE, SegmentHeader, read_header
from replicator.spool import Spool
from replicator.store import ObjectStore
from replicator.values import Position, Timeline, format_time

log = logging.getLogger(__name__)

UPLOADS_AT_ONCE = 4
PROVE_EVERY_S = 300.0
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 10.0
_COMPARE_BYTES = 4 * 1024 * 1024


class Diverged(ReplicatorError):
    """The store holds another segment, or another timeline, where ours belongs: this writer must take a new timeline."""


class Shipper:
    """The uploads of one database. Thread-safe; ``kick`` after each new segment."""

    def __init__(
        self,
        spool: Spool,
        store: ObjectStore,
        pool: Crew,
        changed: Callable[[], None],
        arrived: Callable[[SegmentRef, SegmentHeader], None],
        *,
        now_ms: Callable[[], int],
        prove_every_s: float = PROVE_EVERY_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """changed: called whenever a segment has arrived or failed; arrived: with each that has. From an uploading thread.

        prove_every_s: so long a replica that was there counts as being there. Then the next upload asks once more.
        """
        self._spool = spool
        self._store = store
        self._pool = pool
        self._changed = changed
        self._arrived = arrived
        self._now_ms = now_ms
        self._prove_every_s = prove_every_s
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._proof = threading.Lock()
        self._in_flight: set[SegmentRef] = set()
        self._proving = False
        self._timeline: Timeline | None = None  # the one that was begun last, in this process
        self._era = 0  # what was begun for a timeline before this one says nothing of it
        self._arrived_ms: dict[int, int] = {}  # commit times by txid, of what arrived before something older
        self._proven: int | None = None
        self._proven_at = 0.0
        self._retry_s = FIRST_RETRY_S
        self._not_before = 0.0
        self.problem: StoreError | None = None
        self.diverged: Diverged | None = None
        self.durable_commit_ms = 0
        self.lag_s = 0.0

    def kick(self, timeline: Timeline, captured_txid: int) -> float | None:
        """Start what can be started. Seconds until it is worth calling again after a failure, else None."""
        with self._guard:
            if self.diverged is not None or self._timeline not in (None, timeline):
                return None  # whoever begins a timeline kicks for it
            wait_s = self._not_before - self._monotonic()
            if wait_s > 0:
                return wait_s
            waiting = self._spool.waiting()
            arrived_txid = arrived(waiting, captured_txid)
            if not waiting and self._proven != timeline.number and not self._proving:
                self._proving = True
                self._pool.submit(self._prove, timeline, arrived_txid, self._era)
            for ref in waiting:
                if len(self._in_flight) >= UPLOADS_AT_ONCE:
                    break
                if ref not in self._in_flight:
                    self._in_flight.add(ref)
                    self._pool.submit(self._upload, ref, timeline, arrived_txid, self._era)
                if ref.is_snapshot:
                    break  # what follows is worth nothing without it, and would hide what can be restored
            return None

    def durable(self, captured: Position) -> Position | None:
        """Everything up to there is in the store; None while it is not known whether the store has this timeline at all."""
        if self._proven != captured.timeline:
            return None
        waiting = self._spool.waiting()
        return Position(captured.timeline, waiting[0].first - 1) if waiting else captured

    def begin_timeline(self, timeline: Timeline) -> None:
        """Whose record was just written. Forget what is known of the one before."""
        with self._guard:
            self._era += 1
            self._timeline = timeline
            self.diverged = None
            self._proven = timeline.number
            self._proven_at = self._monotonic()

    def distrust(self, reason: str) -> None:
        """The store does not give what was shipped: this writer must take a new timeline."""
        with self._guard:
            if self.diverged is None:
                self.diverged = Diverged(reason)

    @property
    def idle(self) -> bool:
        with self._guard:
            return not self._in_flight

    # -- in the pool ---------------------------------------------------------------------------------------------------

    def _upload(self, ref: SegmentRef, timeline: Timeline, arrived_txid: int, era: int) -> None:
        try:
            self._try(lambda: self._take_to_store(ref, timeline, arrived_txid), era)
        finally:
            with self._guard:
                self._in_flight.discard(ref)
            self._changed()

    def _prove(self, timeline: Timeline, arrived_txid: int, era: int) -> None:
        """With nothing to upload, the store is asked all the same, once: somebody may have emptied it."""
        try:
            if self._try(lambda: self._prove_timeline(timeline, arrived_txid), era):
                self._unblocked()
        finally:
            self._proving = False
            self._changed()

    def _try(self, work: Callable[[], None], era: int) -> bool:
        try:
            work()
            return True
        except Diverged as diverged:
            with self._guard:
                if era == self._era and self.diverged is None:
                    self.diverged = diverged
                    log.warning("%s", diverged)
        except StoreError as error:
            self._failed(error)
        except OSError as error:
            self._failed(StoreError(f"a segment cannot be read for its upload: {error}"))
        except Exception as error:  # the loop of an upload: what nobody foresaw must not end in silence, nor run hot
            log.exception("an upload failed in a way that nobody foresaw; it is tried again")
            self._failed(StoreError(f"an upload failed: {error!r}"))
        return False

    def _take_to_store(self, ref: SegmentRef, timeline: Timeline, arrived_txid: int) -> None:
        path = self._spool.path(ref)
        self._prove_timeline(timeline, arrived_txid)
        try:
            header = read_header(_head(path))
        except (FormatError, FileNotFoundError) as error:
            # The database still has all of it, so a new timeline heals this.
            raise Diverged(f"{path} is damaged or gone: {error}") from error
        failpoints.reach("before-upload")
        self._put(ref, path)
        failpoints.reach("after-upload")
        if self._spool.mark_shipped(ref):
            self._succeeded(header.last_commit_ms, ref)
            self._arrived(ref, header)

    def _prove_timeline(self, timeline: Timeline, arrived_txid: int) -> None:
        """The store has the record that this writer made and, once per timeline and process, a chain up to what has arrived there.

        Somebody may have emptied it, or deleted a part, and what is shipped after that restores nothing.
        """
        with self._proof:
            at, is_new = self._monotonic(), self._proven != timeline.number
            if not is_new and at - self._proven_at < self._prove_every_s:
                return
            self._prove_record(timeline)
            if is_new:
                self._prove_chain(timeline, arrived_txid)
            self._proven, self._proven_at = timeline.number, at

    def _prove_record(self, timeline: Timeline) -> None:
        key = timeline_key(timeline.number)
        try:
            body = self._store.get(key)
            refuse_sealed(body, f"{self._store.url}/{key}")
            record = decode_timeline(body)
        except ObjectMissing:
            raise Diverged(
                f"{self._store.url} has no timeline {timeline.number}; was it emptied, or is it another one?"
            ) from None
        except FormatError as error:
            raise Diverged(f"{self._store.url}: timeline {timeline.number} cannot be read: {error}") from error
        if record != timeline:
            raise Diverged(f"{self._store.url}: timeline {timeline.number} belongs to {record.writer}")

    def _prove_chain(self, timeline: Timeline, arrived_txid: int) -> None:
        if arrived_txid == 0:
            return
        replica = Replica(self._store)
        try:
            reached = chain.newest(replica.timelines(), replica.segments(), timeline.number).txid
        except (NothingToRestore, ChainBroken, FormatError) as error:
            raise Diverged(f"{self._store.url} has lost what was shipped: {error}") from error
        if reached < arrived_txid:
            raise Diverged(
                f"{self._store.url} has lost what was shipped: transactions after {reached} of timeline {timeline.number} are missing"
            )

    def _put(self, ref: SegmentRef, path: Path) -> None:
        try:
            self._store.put(ref.key, path, if_none_match=True)
        except PreconditionFailed:
            if not self._is_the_same(ref, path):
                raise Diverged(
                    f"{self._store.url} holds another {ref.key}; another writer has this timeline too"
                ) from None

    def _is_the_same(self, ref: SegmentRef, path: Path) -> bool:
        try:
            return self._has_content_of(ref, path)
        except SealDamaged:
            return False

    def _has_content_of(self, ref: SegmentRef, path: Path) -> bool:
        if self._store.head(ref.key).size_bytes != path.stat().st_size:
            return False
        with path.open("rb") as file:
            offset = 0
            while ours := file.read(_COMPARE_BYTES):
                if self._store.get(ref.key, offset=offset, length=len(ours)) != ours:
                    return False
                offset += len(ours)
        return True

    def _succeeded(self, commit_ms: int, ref: SegmentRef) -> None:
        waiting = self._spool.waiting()
        with self._guard:
            self._arrived_ms[ref.last] = commit_ms
            gapless = [txid for txid in self._arrived_ms if not waiting or txid < waiting[0].first]
            self.durable_commit_ms = max(self.durable_commit_ms, *(self._arrived_ms.pop(txid) for txid in gapless), 0)
            self.lag_s = max(0.0, (self._now_ms() - commit_ms) / 1000)
        self._unblocked()
        log.debug("shipped %s to %s, last commit %s", ref.key, self._store.url, format_time(commit_ms))

    def _unblocked(self) -> None:
        with self._guard:
            if self.problem is not None:
                log.info("uploads to %s go on", self._store.url)
            self.problem = None
            self._retry_s = FIRST_RETRY_S
            self._not_before = 0.0

    def _failed(self, error: StoreError) -> None:
        """Back off, once for all uploads that fail together. What a person must mend is an error in the log, also after an outage."""
        with self._guard:
            if type(self.problem) is not type(error):
                needs_person = isinstance(error, (StoreDenied, BucketMissing))
                log.log(logging.ERROR if needs_person else logging.WARNING, "uploads stand still: %s", error)
            self.problem = error
            if self._monotonic() >= self._not_before:
                self._not_before = self._monotonic() + self._retry_s
                self._retry_s = min(self._retry_s * 2, MAX_RETRY_S)


def arrived(waiting: Sequence[SegmentRef], captured_txid: int) -> int:
    """Up to here the store must have everything; 0 when it need have nothing, since a snapshot is the next to come."""
    if not waiting:
        return captured_txid
    return 0 if waiting[0].is_snapshot else waiting[0].first - 1


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_SIZE)
