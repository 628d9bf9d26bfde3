"""Takes the segments in a spool to the store, several at a time; knows up to where everything has arrived.

Owns the durable position. Never changes a segment, never deletes an object. Whether an object that is there already is the same one is
checked byte by byte: two writers that share a timeline by accident find out here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from replicator import failpoints
from replicator.errors import FormatError, ObjectMissing, PreconditionFailed, ReplicatorError, StoreError
from replicator.layout import SegmentRef, timeline_key
from replicator.replica import decode_timeline
from replicator.segment import HEADER_SIZE, read_header
from replicator.spool import Spool
from replicator.store import ObjectStore
from replicator.values import Timeline, format_time

log = logging.getLogger(__name__)

UPLOADS_AT_ONCE = 4
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0
_COMPARE_BYTES = 4 * 1024 * 1024


class Diverged(ReplicatorError):
    """The store holds another segment, or another timeline, where ours belongs: this writer must take a new timeline."""


class Shipper:
    """The uploads of one database. Thread-safe; ``kick`` after each new segment."""

    def __init__(
        self,
        spool: Spool,
        store: ObjectStore,
        pool: Executor,
        changed: Callable[[], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """changed: called whenever a segment has arrived or failed, from an uploading thread."""
        self._spool = spool
        self._store = store
        self._pool = pool
        self._changed = changed
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._in_flight: set[SegmentRef] = set()
        self._proven: int | None = None
        self._retry_s = FIRST_RETRY_S
        self._not_before = 0.0
        self.problem: StoreError | None = None
        self.diverged: Diverged | None = None
        self.durable_commit_ms = 0
        self.lag_s = 0.0
        self.shipped_segments = 0
        self.shipped_bytes = 0

    def kick(self, timeline: Timeline) -> float | None:
        """Start what can be started. Seconds until it is worth calling again after a failure, else None."""
        with self._guard:
            if self.diverged is not None:
                return None
            wait_s = self._not_before - self._monotonic()
            if wait_s > 0:
                return wait_s
            for ref in self._spool.waiting():
                if len(self._in_flight) >= UPLOADS_AT_ONCE:
                    break
                if ref not in self._in_flight:
                    self._in_flight.add(ref)
                    self._pool.submit(self._upload, ref, timeline)
            return None

    def durable_txid(self, captured_txid: int) -> int:
        """Everything up to this txid is in the store."""
        waiting = self._spool.waiting()
        return waiting[0].first - 1 if waiting else captured_txid

    def begin_timeline(self) -> None:
        """Forget what is known of the timeline before."""
        with self._guard:
            self.diverged = None
            self._proven = None

    @property
    def idle(self) -> bool:
        with self._guard:
            return not self._in_flight

    # -- in the pool ---------------------------------------------------------------------------------------------------

    def _upload(self, ref: SegmentRef, timeline: Timeline) -> None:
        path = self._spool.path(ref)
        try:
            self._prove_timeline(timeline)
            header = read_header(_head(path))
            failpoints.reach("before-upload")
            self._put(ref, path)
            failpoints.reach("after-upload")
            self._spool.mark_shipped(ref)
            self._succeeded(header.last_commit_ms, ref)
        except Diverged as diverged:
            self.diverged = diverged
        except StoreError as error:
            self._failed(error)
        except (OSError, FormatError) as error:
            # The spool's own file is damaged or gone. The database still has all of it, so a new timeline heals this.
            self.diverged = Diverged(f"{path}: {error}")
        finally:
            with self._guard:
                self._in_flight.discard(ref)
            self._changed()

    def _prove_timeline(self, timeline: Timeline) -> None:
        """Once per timeline and process: the store's record of it is the one that this writer made."""
        if self._proven == timeline.number:
            return
        try:
            record = decode_timeline(self._store.get(timeline_key(timeline.number)))
        except ObjectMissing:
            raise Diverged(
                f"{self._store.url} has no timeline {timeline.number}; was it emptied, or is it another one?"
            ) from None
        except FormatError as error:
            raise Diverged(f"{self._store.url}: timeline {timeline.number} cannot be read: {error}") from error
        if record != timeline:
            raise Diverged(f"{self._store.url}: timeline {timeline.number} belongs to {record.writer}")
        self._proven = timeline.number

    def _put(self, ref: SegmentRef, path: Path) -> None:
        try:
            self._store.put(ref.key, path, if_none_match=True)
        except PreconditionFailed:
            if not self._is_the_same(ref, path):
                raise Diverged(
                    f"{self._store.url} holds another {ref.key}; another writer has this timeline too"
                ) from None

    def _is_the_same(self, ref: SegmentRef, path: Path) -> bool:
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
        with self._guard:
            self.problem = None
            self._retry_s = FIRST_RETRY_S
            self._not_before = 0.0
            self.durable_commit_ms = max(self.durable_commit_ms, commit_ms)
            self.lag_s = max(0.0, time.time() - commit_ms / 1000)
            self.shipped_segments += 1
            self.shipped_bytes += ref.size_bytes
        log.debug("shipped %s of %s, last commit %s", ref.key, self._store.url, format_time(commit_ms))

    def _failed(self, error: StoreError) -> None:
        with self._guard:
            if self.problem is None:
                log.warning("uploads stand still: %s", error)
            self.problem = error
            self._not_before = self._monotonic() + self._retry_s
            self._retry_s = min(self._retry_s * 2, MAX_RETRY_S)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_SIZE)
