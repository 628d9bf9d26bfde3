"""One database under replication: captures it, ships it, and says in words how it is.

Owns the order of the two and what happens when one of them cannot go on. Never waits: ``step`` does what can be done now and says when
it wants to be called again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from replicator import origin
from replicator.capture import GROUP_BYTES, Capture, CaptureFigures, CaptureSettings, NeedsTimeline
from replicator.database import identify
from replicator.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseMissing,
    NotADatabase,
    ReplicatorError,
    SyncTimeout,
)
from replicator.pace import Allowance, Budget, Pace
from replicator.replica import Replica
from replicator.scheduler import Crew
from replicator.ship import PROVE_EVERY_S, Diverged, Shipper, arrived
from replicator.spool import Spool
from replicator.store import ObjectStore
from replicator.store.measure import HOUR_S, MeasuredStore, Meter
from replicator.trials import TrialRecord, Trials
from replicator.upkeep import Upkeep, UpkeepSettings
from replicator.values import Position

log = logging.getLogger(__name__)

RETRY_S = 1.0
MAX_RETRY_S = 15.0
CATCHING_UP_AFTER_S = 5.0
LOOK_S = 2.0
"""While commits wait in the WAL for longer than this, it is looked at so often how much they are."""


class Protection(StrEnum):
    """The words for how safe a database is, for people."""

    PROTECTED = "protected"
    CATCHING_UP = "catching up"
    NOT_PROTECTED = "NOT PROTECTED"


@dataclass(frozen=True)
class DatabaseStatus:
    """How one database is.

    lag_s: age of the oldest commit that is known and not durable; when there is none, how long the last one took.
    trial: what the last trial restore showed, None when there was none.
    reason: why it is not protected, '' when it is. durable: everything up to there is in the store. durable_ms: time of its last commit.
    upkeep_problem: why its replica is not compacted and thinned at present, '' when it is.
    barrier_s: the longest write barrier. checkpoints, checkpoints_s, barriers_s: how many there were, and what they took in all.
    puts_minute, puts_hour: writes to the store in the last minute and hour. usd_per_month: what as many cost in S3; None for a folder.
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
    upkeep_problem: str = ""
    checkpoints: int = 0
    checkpoints_s: float = 0.0
    barriers_s: float = 0.0
    puts_minute: int = 0
    puts_hour: int = 0
    usd_per_month: float | None = None
    trial: TrialRecord | None = None

    @property
    def words(self) -> str:
        if self.protection is Protection.PROTECTED:
            return f"protected (lag {self.lag_s:.1f} s)"
        return self.protection.value


@dataclass(frozen=True)
class WorkerSettings:
    """interval_s: an endless stream of commits ships about once in this time. spool_limit_bytes: beyond it capturing pauses.
    allowance: of segments, for all databases that are added together with it; None for no limit.
    prove_every_s: as long as something is shipped, the store is asked this often whether the replica is still there.
    trial_every_s: the replica is restored for a trial this often; 0 for never."""

    capture: CaptureSettings = CaptureSettings()
    interval_s: float = 1.0
    burst: int = 100
    spool_limit_bytes: int = 1024 * 1024 * 1024
    prove_every_s: float = PROVE_EVERY_S
    upkeep: UpkeepSettings = UpkeepSettings()
    allowance: Allowance | None = None
    trial_every_s: float = 0.0


class DatabaseWorker:
    """``step`` by one thread at a time; everything else from any thread."""

    def __init__(
        self,
        path: Path,
        store: ObjectStore,
        state_directory: Path,
        uploads: Crew,
        settings: WorkerSettings,
        wake: Callable[[DatabaseWorker], None],
        wake_upkeep: Callable[[Upkeep, float], None],
        *,
        writer: str,
        now_ms: Callable[[], int],
        epoch: Callable[[], int] = lambda: 0,
        register: Callable[[], object] = lambda: None,
        within: Path | None = None,
        budget: Budget | None = None,
    ) -> None:
        """epoch: of the lease that allows a new timeline, 0 without one; raises LeaseLost while there must be none.

        register: called before each new timeline, to enter the database where others look for it. Raises DatabaseError.
        within: a folder that the database must be in, with no symbolic link on the way.
        budget: of segments, shared with other databases.
        """
        self.path = path
        self._meter = Meter()
        self.store: ObjectStore = MeasuredStore(store, self._meter)
        self.trial_every_s = settings.trial_every_s
        self._budget = budget
        self._settings = settings
        self._writer = writer
        self._now_ms = now_ms
        self._epoch = epoch
        self._register = register
        self._within = within
        self._spool = Spool(state_directory, now_ms=now_ms)
        self.trials = Trials(state_directory, store.url)
        self._capture = Capture(path, self._spool, settings.capture, now_ms=now_ms, within=within)
        self._pace = Pace(settings.interval_s, settings.burst, time.monotonic)
        self._changed = threading.Condition()
        self.upkeep = Upkeep(self.store, settings.upkeep, self._shipped_timeline, wake_upkeep, now_ms=now_ms)
        self._shipper = Shipper(
            self._spool,
            self.store,
            uploads,
            self._on_upload,
            self.upkeep.arrived,
            now_ms=now_ms,
            prove_every_s=settings.prove_every_s,
        )
        self._wake = wake
        self._begun: origin.Origin | None = None
        self._problem: Exception | None = None
        self._problem_since = 0.0
        self._spool_full = False
        self._retry_s = RETRY_S
        self._not_before = 0.0
        self._quiet_until = 0.0
        self._put_off_at: float | None = None  # since when pace or budget have commits wait in the WAL, if for long
        self._steps_begun = 0
        self._stepping = False
        self._captured_step = 0  # the last step that captured everything there was
        self._captured_for = 0  # the timeline that it captured for
        self._wanted_step = 0  # the step that somebody waits for, so that it must not be put off
        self._closed = False
        self._forgets = False

    # -- the loop's body -----------------------------------------------------------------------------------------------

    def step(self) -> float | None:
        """Capture and ship what can be. Seconds until the next call, None to wait for ``wake``."""
        with self._changed:
            if self._closed:
                return None
            self._stepping = True
            self._steps_begun += 1
        try:
            return _sooner(self._capture_in_turn(self._steps_begun), self._ship())
        finally:
            with self._changed:
                self._stepping = False
                if self._closed:
                    self._close()
                self._changed.notify_all()

    def touched(self) -> None:
        """A file event. It costs nothing while a step is due soon anyway."""
        if time.monotonic() >= self._quiet_until:
            self._wake(self)

    def _capture_in_turn(self, step: int) -> float | None:
        """Capture, unless the pace or a failure says later. Seconds until then."""
        now = time.monotonic()
        self._quiet_until = 0.0  # what puts this step off sets it anew, and sees to another
        pause_s = self._not_before - now
        if pause_s > 0:
            self._quiet_until = now + pause_s
            return pause_s
        try:
            pause_s = 0.0 if self._captured_step < self._wanted_step else self._turn_s()
            if pause_s > 0:
                self._quiet_until = now + pause_s
                return pause_s
            self._capture.load()
            if self._shipper.diverged is None and self._is_spool_full():
                return None  # the uploads wake it
            wait_s = self._capture_some()
        except (DatabaseMissing, NotADatabase) as error:
            self._note_problem(error)
            return None  # what changes that is an event
        except (ReplicatorError, OSError) as error:
            return self._back_off(error)
        except Exception as error:  # what nobody foresaw must show in the status, too
            log.exception("%s: a step failed in a way that nobody foresaw; it is tried again", self.path)
            return self._back_off(DatabaseError(f"{self.path}: internal error, see the log: {error!r}"))
        self._retry_s = RETRY_S
        self._put_off_at = None
        with self._changed:
            self._note_problem(None)
            self._captured_step = step
            self._captured_for = self._capture.timeline.number if self._capture.timeline else 0
        return wait_s

    def _turn_s(self) -> float:
        """Seconds for which pace and budget put capturing off, while it has something to capture and not more than fills a segment."""
        pause_s = max(self._pace.wait_s(), self._budget.wait_s() if self._budget else 0.0)
        if pause_s <= LOOK_S:
            return pause_s
        if not 0 < self._capture.pending_bytes() < GROUP_BYTES:
            return 0.0
        if self._put_off_at is None:
            self._put_off_at = time.monotonic()
        return LOOK_S

    def _back_off(self, error: Exception) -> float:
        self._note_problem(error)
        wait_s = self._retry_s
        self._retry_s = min(self._retry_s * 2, MAX_RETRY_S)
        self._not_before = self._quiet_until = time.monotonic() + wait_s
        self._let_go_if_hopeless()
        return wait_s

    def _is_spool_full(self) -> bool:
        """Beyond its limit capturing pauses, until half of it is free: each return to the database costs a comparison."""
        limit = self._settings.spool_limit_bytes
        if self._spool.waiting_bytes() <= (limit // 2 if self._spool_full else limit):
            self._spool_full = False
            return False
        self._spool_full = True
        self._capture.let_go()
        self._note_problem(DatabaseError(f"{self.path}: over {_size(limit)} wait for the store; capturing pauses"))
        return True

    def _capture_some(self) -> float | None:
        before = self._capture.position
        if self._shipper.diverged is not None:
            self._check_present(self._shipper.diverged)
            self._begin_timeline(NeedsTimeline(str(self._shipper.diverged), None))
        try:
            wait_s = self._capture.step()
        except NeedsTimeline as need:
            self._begin_timeline(need)
            wait_s = self._capture.step()
        self._begun = None
        if self._capture.position != before:
            self._pace.spend()
            if self._budget:
                self._budget.spend()
        return wait_s

    def _check_present(self, diverged: Diverged) -> None:
        """What waits is thrown away only as long as the database still has it. Raises DatabaseMissing."""
        try:
            identify(self.path, self._within)
        except DatabaseMissing:
            if self._spool.waiting():
                log.warning("%s is gone, and its last commits cannot be shipped: %s", self.path, diverged)
            self._capture.give_up()
            raise

    def _begin_timeline(self, need: NeedsTimeline) -> None:
        """A record that was written for a try that failed locally is used by the next one."""
        if self._begun is None or self._begun.known is not need.known:
            epoch = self._epoch()
            self._register()
            self._spool.begin_fork()
            self._begun = origin.new_timeline(
                Replica(self.store),
                need.known,
                writer=self._writer,
                reason=need.reason,
                now_ms=self._now_ms(),
                epoch=epoch,
                arrived_txid=arrived(self._spool.waiting(), need.known.txid) if need.known else 0,
            )
        begun = self._begun
        self._capture.begin_timeline(begun.timeline, begun.txid, begun.known, keep_waiting=begun.known is not None)
        self._shipper.begin_timeline(begun.timeline)
        self._begun = None
        verb = "begins" if need.known is None else "goes on as"
        log.info("%s %s timeline %d: %s", self.path, verb, begun.timeline.number, need.reason)

    def _ship(self) -> float | None:
        reached = self._capture.reached
        if reached is None or self._closed:
            return None
        return self._shipper.kick(*reached)

    def _let_go_if_hopeless(self) -> None:
        """While nothing can be captured, the WAL must not grow without end."""
        if self._capture.wal_outgrows():
            log.warning("%s: its WAL may start anew, as nothing can be captured", self.path)
            self._capture.let_go()

    def _note_problem(self, problem: Exception | None) -> None:
        if problem is not None and str(problem) != str(self._problem):
            level = logging.INFO if isinstance(problem, DatabaseMissing) else logging.WARNING
            log.log(level, "%s", problem)
        if problem is None and self._problem is not None:
            log.info("%s goes on", self.path)
        if self._problem is None:
            self._problem_since = time.monotonic()
        self._problem = problem

    def _on_upload(self) -> None:
        """In an uploading thread: what waits goes on at once; what needs the step is left to it."""
        with self._changed:
            self._changed.notify_all()
        if self._shipper.problem or self._shipper.diverged or self._spool_full:
            self._wake(self)
        else:
            self._ship()

    # -- for other threads ---------------------------------------------------------------------------------------------

    def sync(self, timeout_s: float) -> Position:
        """Wait until everything that was committed before the call is durable, and return that position.

        Raises SyncTimeout; DatabaseMissing or NotADatabase when there is no database, once what was captured of it is durable.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            step = self._ask_for_step()
            self._wake(self)
            with self._changed:
                missing = self._wait_captured(step, deadline, timeout_s)
                target = self._capture.position
                if target is not None and not self._wait_durable(target, deadline, timeout_s):
                    continue  # it goes on as another timeline; what was captured for that one counts
            if missing is not None:
                raise missing
            if target is not None:
                return target

    def _ask_for_step(self) -> int:
        """A step that begins after now; neither the pace nor a failure before the call puts it off."""
        with self._changed:
            self._wanted_step = self._steps_begun + 1
            self._not_before = 0.0
            return self._wanted_step

    def _wait_captured(self, step: int, deadline: float, timeout_s: float) -> Exception | None:
        def is_missing() -> bool:
            return self._steps_begun >= step and not self._stepping and _is_absence(self._problem)

        left_s = max(0.0, deadline - time.monotonic())
        self._changed.wait_for(lambda: self._captured_step >= step or is_missing() or self._closed, left_s)
        if self._captured_step < step and not is_missing():
            raise SyncTimeout(f"{self.path} could not be captured within {timeout_s:g} s{self._because()}")
        return self._problem if is_missing() else None

    def _wait_durable(self, target: Position, deadline: float, timeout_s: float) -> bool:
        """False when another timeline has begun meanwhile."""

        def left_behind() -> bool:
            # At another place the number of a timeline may be the same; on one timeline the position never goes back.
            captured = self._capture.position
            return captured is not None and (captured.timeline != target.timeline or captured < target)

        def done() -> bool:
            durable = self._durable()
            return left_behind() or (durable is not None and durable >= target)

        if not self._changed.wait_for(done, max(0.0, deadline - time.monotonic())):
            raise SyncTimeout(f"{self.path} is not durable after {timeout_s:g} s{self._because()}")
        return not left_behind()

    def status(self) -> DatabaseStatus:
        captured = self._capture.position
        waiting = self._spool.waiting()
        figures = self._capture.figures
        protection, reason = self._protection()
        return DatabaseStatus(
            path=self.path,
            url=self.store.url,
            protection=protection,
            reason=reason,
            lag_s=self._lag_s(),
            captured=captured,
            durable=self._durable(),
            durable_ms=self._durable_ms(),
            waiting_segments=len(waiting),
            waiting_bytes=sum(ref.size_bytes for ref in waiting),
            wal_bytes=figures.wal_bytes,
            page_size=figures.page_size,
            page_count=figures.page_count,
            checkpoint_blocked=figures.checkpoint_blocked,
            barrier_s=figures.barrier_s,
            upkeep_problem=str(self.upkeep.problem or ""),
            checkpoints=figures.checkpoints,
            checkpoints_s=figures.checkpoints_s,
            barriers_s=figures.barriers_s,
            puts_minute=self._meter.puts.within(60),
            puts_hour=self._meter.puts.within(HOUR_S),
            usd_per_month=self._meter.puts.usd_per_month() if self.store.url.startswith("s3:") else None,
            trial=self.trials.record,
        )

    @property
    def safe_position(self) -> Position | None:
        """Up to which everything is in the store; None while something is wrong or on its way."""
        return self._durable() if self._shipping_state()[0] is Protection.PROTECTED else None

    def distrust(self, reason: str) -> None:
        """The replica does not give what was shipped: a new timeline begins with a snapshot."""
        self._shipper.distrust(reason)
        self._wake(self)

    @property
    def figures(self) -> CaptureFigures:
        """What happened on the live side since the start."""
        return self._capture.figures

    @property
    def is_finished(self) -> bool:
        """Whether the database is gone, and everything that was captured of it is in the store."""
        return isinstance(self._problem, DatabaseMissing) and not self._spool.waiting() and self._shipper.idle

    @property
    def is_unreadable(self) -> bool:
        """Whether the database itself, and neither a lock nor the store, kept the last step from capturing it."""
        return isinstance(self._problem, DatabaseError) and not isinstance(self._problem, DatabaseBusy)

    def close(self, *, forget: bool = False) -> None:
        """Let go of everything; what waits stays in the spool for the next start. At the end of the step, if one runs now.

        forget: remove the local state too, if the database is gone for good (``is_finished``).
        """
        with self._changed:
            self._forgets = forget
            if not self._closed and not self._stepping:
                self._close()
            self._closed = True

    def _close(self) -> None:
        try:
            if self._forgets and self.is_finished:
                self._capture.let_go()
                self.trials.remove()
                self._spool.remove()
            else:
                self._capture.close()
        except (ReplicatorError, OSError) as error:
            log.warning("%s: its local state could not be brought up to date: %s", self.path, error)
        finally:
            self._spool.close()

    def _durable(self) -> Position | None:
        captured = self._capture.position
        return self._shipper.durable(captured) if captured else None

    def _shipped_timeline(self) -> int | None:
        """The timeline that is written here, once the store has what it begins with."""
        durable = self._durable()
        return None if durable is None or any(ref.is_snapshot for ref in self._spool.waiting()) else durable.timeline

    def _durable_ms(self) -> int:
        if not self._spool.waiting():
            return self._capture.last_commit_ms
        return self._shipper.durable_commit_ms or self._spool.waiting_commit_ms()

    def _lag_s(self) -> float:
        put_off_at = self._put_off_at
        put_off_s = 0.0 if put_off_at is None else time.monotonic() - put_off_at
        return max(self._spool.waiting_s(), put_off_s) or self._shipper.lag_s

    def _protection(self) -> tuple[Protection, str]:
        found = self._shipping_state()
        trial = self.trials.record
        if trial is not None and trial.is_source and found[0] is Protection.PROTECTED:
            return Protection.NOT_PROTECTED, f"the database itself is damaged: {trial.problem}"
        return found

    def _shipping_state(self) -> tuple[Protection, str]:
        held_up = (
            isinstance(self._problem, DatabaseBusy)
            and self._captured_step > 0
            and time.monotonic() - self._problem_since < CATCHING_UP_AFTER_S
        )  # by a lock of an application, as a rule, which passes in a moment
        problem = (None if held_up else self._problem) or self._shipper.problem or self._shipper.diverged
        if problem is not None:
            return Protection.NOT_PROTECTED, str(problem)
        if held_up:
            return Protection.CATCHING_UP, str(self._problem)
        timeline, waiting = self._capture.timeline, self._spool.waiting()
        if timeline is None or self._captured_for != timeline.number:
            return Protection.CATCHING_UP, "the database is read and compared"
        if any(ref.is_snapshot for ref in waiting):
            return Protection.CATCHING_UP, "a snapshot waits for upload"
        if self._durable() is None:
            return Protection.CATCHING_UP, "the replica is looked at"
        if waiting and self._lag_s() > CATCHING_UP_AFTER_S:
            return Protection.CATCHING_UP, f"{len(waiting)} segments wait for upload"
        return Protection.PROTECTED, ""

    def _because(self) -> str:
        reason = self._protection()[1]
        return f": {reason}" if reason else ""


def _is_absence(problem: Exception | None) -> bool:
    return isinstance(problem, (DatabaseMissing, NotADatabase))


def _size(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes} bytes"


def _sooner(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)
