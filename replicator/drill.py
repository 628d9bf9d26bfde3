"""Trial restores of a running replicator: one database at a time, at the lowest priority, when its time has come.

Owns the thread and the choice of the next. What a trial finds is told to the database's worker, which shows it and heals the replica.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol

from replicator import durable, proof
from replicator.errors import FormatError, ReplicatorError, StateMismatch
from replicator.proof import Verdict
from replicator.restore_plan import RestoreOptions
from replicator.store import ObjectStore
from replicator.trials import TrialRecord, Trials
from replicator.values import Position, format_time

log = logging.getLogger(__name__)

NICE = 15
DOWNLOADS_AT_ONCE = 2
RESERVE_BYTES = 512 << 20
"""A trial leaves so much of the disk free; else it makes no file, and SQLite's own check is left out."""
NOT_YET_S = 60.0
"""Until a database is looked at again whose replica is not up to date, or whose store is away."""
LONGEST_WAIT_S = 3600.0


class Tried(Protocol):
    """A database as the trials see it."""

    store: ObjectStore
    trials: Trials
    trial_every_s: float

    @property
    def safe_position(self) -> Position | None:
        """Up to which everything is in the store; None while something is wrong or on its way."""
        ...

    def distrust(self, reason: str) -> None:
        """The replica does not give what it should: begin a new timeline with a snapshot."""
        ...


class _Stopped(Exception):
    pass


class Drill:
    """``start`` after the first database that wants trials; ``step`` is what its thread does."""

    def __init__(self, databases: Callable[[], Iterable[Tried]], *, now_ms: Callable[[], int]) -> None:
        self._databases = databases
        self._now_ms = now_ms
        self._not_before: weakref.WeakKeyDictionary[Tried, float] = weakref.WeakKeyDictionary()  # in monotonic time
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Also wakes it, when there is another database."""
        with self._guard:
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run, name="drill", daemon=True)
                self._thread.start()
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """A trial under way ends soon; SQLite's check of a large database is not waited for, and its file goes at the next start."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def step(self) -> float:
        """Try the database that is due, if any is. Seconds until the next is."""
        waits = {database: self._due_in_s(database) for database in self._databases() if database.trial_every_s > 0}
        if not waits:
            return LONGEST_WAIT_S
        database = min(waits, key=lambda each: waits[each])
        if waits[database] > 0:
            return min(waits[database], LONGEST_WAIT_S)
        position = database.safe_position
        if position is None:
            self._put_off(database)
        else:
            self._try(database, position)
        return 0.0

    def _run(self) -> None:
        with suppress(OSError):  # the threads that it starts for a trial inherit it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._stopping.is_set():
            try:
                wait_s = self.step()
            except _Stopped:
                return
            except Exception:  # the drill's loop: without it, no trial would ever come again
                log.exception("a trial restore failed in a way that nobody foresaw; the next comes later")
                wait_s = NOT_YET_S
            self._wake.wait(wait_s)
            self._wake.clear()

    def _due_in_s(self, database: Tried) -> float:
        record = database.trials.record
        due_s = 0.0
        if record is not None and not record.problem:
            since_s = (self._now_ms() - record.tried_ms) / 1000
            due_s = database.trial_every_s - since_s if since_s >= 0 else 0.0  # a clock that was set back
        elif record is not None and record.is_source:
            due_s = database.trial_every_s - (self._now_ms() - record.tried_ms) / 1000
        return max(due_s, self._not_before.get(database, 0.0) - time.monotonic())

    def _put_off(self, database: Tried) -> None:
        self._not_before[database] = time.monotonic() + min(NOT_YET_S, database.trial_every_s)

    # -- one trial -----------------------------------------------------------------------------------------------------

    def _try(self, database: Tried, position: Position) -> None:
        known = database.trials.record or TrialRecord()
        try:
            verdict = self._tried(database, position)
        except proof.DAMAGE as error:
            self._found_damage(database, known, str(error))
            return
        except (ReplicatorError, OSError) as error:
            log.warning("%s: its trial restore is put off: %s", database.store.url, error)
            self._put_off(database)
            return
        finally:
            database.trials.clean()
        report, now_ms = verdict.report, self._now_ms()
        assert report is not None
        if verdict.integrity:
            log.error("%s: the database itself is damaged: %s", database.store.url, verdict.integrity)
        else:
            log.info("%s is proved up to %s, %s", database.store.url, report.position, format_time(report.reached_ms))
        record = TrialRecord(
            position=str(report.position),
            commit_ms=report.reached_ms,
            proved_ms=now_ms,
            tried_ms=now_ms,
            problem=verdict.integrity,
            is_source=bool(verdict.integrity),
            unchecked=verdict.unchecked,
        )
        self._note(database, record)

    def _tried(self, database: Tried, position: Position) -> Verdict:
        """What looks like damage is looked at twice, as a merge or somebody's clean-up may have been under way."""
        try:
            return self._trial(database, position)
        except proof.DAMAGE as error:
            log.warning("%s: a trial restore failed, and is tried once more: %s", database.store.url, error)
        return self._trial(database, position)

    def _trial(self, database: Tried, position: Position) -> Verdict:
        def on_progress(done: int, total: int) -> None:
            if self._stopping.is_set():
                raise _Stopped

        durable.make_dirs(database.trials.scratch)
        options = RestoreOptions(timeline=position.timeline, parallelism=DOWNLOADS_AT_ONCE, integrity_check="full")
        verdict = proof.trial(
            database.store, database.trials.scratch, options, on_progress=on_progress, reserve_bytes=RESERVE_BYTES
        )
        report = verdict.report
        if report is None or report.position < position:
            reached = report.position if report else None
            raise StateMismatch(f"everything up to {position} was shipped, and only {reached} can be restored")
        return verdict

    def _found_damage(self, database: Tried, known: TrialRecord, problem: str) -> None:
        if self._stopping.is_set():
            return
        log.error(
            "NOT PROTECTED: %s does not give what was shipped: %s; a new timeline begins with a snapshot",
            database.store.url,
            problem,
        )
        database.distrust(f"a trial restore failed: {problem}")
        self._note(
            database,
            TrialRecord(known.position, known.commit_ms, known.proved_ms, tried_ms=self._now_ms(), problem=problem),
        )
        self._put_off(database)  # then the new base is proved

    def _note(self, database: Tried, record: TrialRecord) -> None:
        try:
            database.trials.note(record)
        except (OSError, FormatError) as error:
            log.warning("%s: the result of a trial restore could not be kept: %s", database.store.url, error)
