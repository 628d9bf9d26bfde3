"""One database under replication: captures it, ships it, and says in words how it is.

Owns the order of the two and what happens when one of them cannot go on. Never waits: ``step`` does what can be done now and says when
it wants to be called again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from replicator import origin
from replicator.capture import Capture, CaptureSettings, NeedsTimeline
from replicator.errors import DatabaseError, DatabaseMissing, ReplicatorError, StoreError, SyncTimeout
from replicator.pace import Pace
from replicator.replica import Replica
from replicator.ship import Shipper
from replicator.spool import Spool
from replicator.store import ObjectStore
from replicator.values import Position

log = logging.getLogger(__name__)

RETRY_S = 1.0
MAX_RETRY_S = 60.0
CATCHING_UP_AFTER_S = 5.0


class Protection(StrEnum):
    """The words for how safe a database is, for people."""

    PROTECTED = "protected"
    CATCHING_UP = "catching up"
    NOT_PROTECTED = "NOT PROTECTED"


@dataclass(frozen=True)
class DatabaseStatus:
    """How one database is.

    lag_s: age of the oldest commit that is captured but not durable; when there is none, how long the last one took.
    reason: why it is not protected, '' when it is. durable: everything up to there is in the store. durable_ms: time of its last commit.
    """

    path: Path
    url: str
    protection: Protection
    reason: str
    lag_s: float
    captured: Position | None
    durable: Position | None
    durable_ms: int
    waiting_segments: int
    waiting_bytes: int
    wal_bytes: int
    page_size: int
    page_count: int
    checkpoint_blocked: bool
    barrier_s: float

    @property
    def words(self) -> str:
        if self.protection is Protection.PROTECTED:
            return f"protected (lag {self.lag_s:.1f} s)"
        return self.protection.value


@dataclass(frozen=True)
class WorkerSettings:
    """interval_s: an endless stream of commits ships about once in this time. spool_limit_bytes: beyond it capturing pauses."""

    capture: CaptureSettings = CaptureSettings()
    interval_s: float = 1.0
    burst: int = 10
    spool_limit_bytes: int = 1024 * 1024 * 1024


class DatabaseWorker:
    """``step`` by one thread at a time; everything else from any thread."""

    def __init__(
        self,
        path: Path,
        store: ObjectStore,
        state_directory: Path,
        uploads: Executor,
        settings: WorkerSettings,
        wake: Callable[[DatabaseWorker], None],
        *,
        writer: str,
        now_ms: Callable[[], int],
    ) -> None:
        self.path = path
        self._store = store
        self._settings = settings
        self._writer = writer
        self._now_ms = now_ms
        self._spool = Spool(state_directory)
        self._capture = Capture(path, self._spool, settings.capture, now_ms=now_ms)
        self._pace = Pace(settings.interval_s, settings.burst, time.monotonic)
        self._changed = threading.Condition()
        self._shipper = Shipper(self._spool, store, uploads, self._on_upload)
        self._wake = wake
        self._problem: ReplicatorError | OSError | None = None
        self._retry_s = RETRY_S
        self._steps_begun = 0
        self._steps_done = 0
        self._urgent = False
        self._closed = False

    # -- the loop's body -----------------------------------------------------------------------------------------------

    def step(self) -> float | None:
        """Capture and ship what can be. Seconds until the next call, None to wait for ``wake``."""
        with self._changed:
            self._steps_begun += 1
            step, self._urgent, urgent = self._steps_begun, False, self._urgent
        if self._closed:
            return None
        try:
            wait_s = self._capture_some(urgent)
            self._note_problem(None)
        except (ReplicatorError, OSError) as error:
            self._note_problem(error)
            wait_s = self._retry_s
            self._retry_s = min(self._retry_s * 2, MAX_RETRY_S)
            self._let_go_if_hopeless()
        else:
            self._retry_s = RETRY_S
        finally:
            with self._changed:
                self._steps_done = step
                self._changed.notify_all()
        return _sooner(wait_s, self._ship())

    def _capture_some(self, urgent: bool) -> float | None:
        if self._spool.waiting_bytes() > self._settings.spool_limit_bytes:
            self._capture.let_go()
            raise DatabaseError(
                f"{self.path}: {self._settings.spool_limit_bytes >> 20} MiB wait for the store; capturing pauses"
            )
        pause_s = self._pace.wait_s()
        if pause_s > 0 and not urgent:
            return pause_s
        before = self._capture.position
        if self._shipper.diverged is not None:
            self._begin_timeline(NeedsTimeline(str(self._shipper.diverged), None))
        try:
            wait_s = self._capture.step()
        except NeedsTimeline as need:
            self._begin_timeline(need)
            wait_s = self._capture.step()
        if self._capture.position != before:
            self._pace.spend()
        return wait_s

    def _begin_timeline(self, need: NeedsTimeline) -> None:
        begun = origin.new_timeline(
            Replica(self._store), need.known, writer=self._writer, reason=need.reason, now_ms=self._now_ms()
        )
        self._capture.begin_timeline(begun.timeline, begun.txid, begun.known, keep_waiting=begun.known is not None)
        self._shipper.begin_timeline()
        log.info("%s goes on as timeline %d: %s", self.path, begun.timeline.number, need.reason)

    def _ship(self) -> float | None:
        timeline = self._capture.timeline
        return self._shipper.kick(timeline) if timeline else None

    def _let_go_if_hopeless(self) -> None:
        """While nothing can be captured, the WAL must not grow without end."""
        if self._capture.wal_outgrows():
            log.warning("%s: its WAL may start anew, as nothing can be captured", self.path)
            self._capture.let_go()

    def _note_problem(self, problem: ReplicatorError | OSError | None) -> None:
        if problem is not None and str(problem) != str(self._problem):
            level = logging.INFO if isinstance(problem, DatabaseMissing) else logging.WARNING
            log.log(level, "%s", problem)
        if problem is None and self._problem is not None:
            log.info("%s goes on", self.path)
        self._problem = problem

    def _on_upload(self) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._shipper.problem is not None or self._shipper.diverged is not None or self._spool.waiting():
            self._wake(self)

    # -- for other threads ---------------------------------------------------------------------------------------------

    def sync(self, timeout_s: float) -> Position:
        """Wait until everything that was committed before the call is durable, and return that position. Raises SyncTimeout."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            wanted = self._steps_begun + 1
            self._urgent = True
        self._wake(self)
        with self._changed:
            if not self._changed.wait_for(lambda: self._steps_done >= wanted and not self._problem, timeout_s):
                raise SyncTimeout(f"{self.path} could not be captured within {timeout_s:g} s{self._because()}")
            target = self._capture.position
            if target is None:
                raise SyncTimeout(f"{self.path} has no timeline yet{self._because()}")
            if not self._changed.wait_for(lambda: self._durable() >= target, max(0.0, deadline - time.monotonic())):
                raise SyncTimeout(f"{self.path} is not durable after {timeout_s:g} s{self._because()}")
        return target

    def status(self) -> DatabaseStatus:
        captured = self._capture.position
        waiting = self._spool.waiting()
        figures = self._capture.figures
        protection, reason = self._protection()
        return DatabaseStatus(
            path=self.path,
            url=self._store.url,
            protection=protection,
            reason=reason,
            lag_s=self._lag_s(),
            captured=captured,
            durable=self._durable() if captured else None,
            durable_ms=self._durable_ms(),
            waiting_segments=len(waiting),
            waiting_bytes=sum(ref.size_bytes for ref in waiting),
            wal_bytes=figures.wal_bytes,
            page_size=figures.page_size,
            page_count=figures.page_count,
            checkpoint_blocked=figures.checkpoint_blocked,
            barrier_s=figures.barrier_s,
        )

    def close(self) -> None:
        """Not while ``step`` runs. What waits stays in the spool for the next start."""
        self._closed = True
        self._capture.close()
        self._spool.close()

    def _durable(self) -> Position:
        captured = self._capture.position
        if captured is None:
            return Position(0, 0)
        return Position(captured.timeline, self._shipper.durable_txid(captured.txid))

    def _durable_ms(self) -> int:
        return self._shipper.durable_commit_ms if self._spool.waiting() else self._capture.last_commit_ms

    def _lag_s(self) -> float:
        if not self._spool.waiting():
            return self._shipper.lag_s
        since_ms = self._shipper.durable_commit_ms or self._capture.last_commit_ms
        return max(0.0, (self._now_ms() - since_ms) / 1000)

    def _protection(self) -> tuple[Protection, str]:
        problem = self._problem or self._shipper.problem or self._shipper.diverged
        if problem is not None:
            return Protection.NOT_PROTECTED, str(problem)
        if self._capture.position is None:
            return Protection.CATCHING_UP, "first snapshot"
        if self._spool.waiting() and self._lag_s() > CATCHING_UP_AFTER_S:
            return Protection.CATCHING_UP, f"{len(self._spool.waiting())} segments wait for upload"
        return Protection.PROTECTED, ""

    def _because(self) -> str:
        reason = self._protection()[1]
        return f": {reason}" if reason else ""


def _sooner(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)
