"""The replicator as a library: which databases, where to, and how they are.

Owns the workers and the threads they share. Entry point for the command line and for programs that embed it; never parses a file.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from replicator import catalogue
from replicator.descriptors import shortage
from replicator.discovery import Finder, Found, is_linked
from replicator.drill import Drill
from replicator.errors import (
    DatabaseError,
    DatabaseMissing,
    DatabaseNotReplicable,
    FormatError,
    NotADatabase,
    ReplicatorError,
    StoreError,
    SyncTimeout,
)
from replicator.pace import Budget
from replicator.scheduler import Crew, Scheduler
from replicator.spool import holds_segments
from replicator.store import ObjectStore
from replicator.upkeep import Upkeep
from replicator.values import Position
from replicator.watch import STATE_SUFFIX, CalmInotify, Folder, Watch, companion_of
from replicator.worker import DatabaseStatus, DatabaseWorker, Protection, WorkerSettings

log = logging.getLogger(__name__)

SWEEP_S = 60.0
CAPTURE_THREADS = 4
UPLOAD_THREADS = 16
UPKEEP_THREADS = 1
CLOSE_S = 10.0
STOP_THREADS = 32
LAST_STEP_S = 1.0
"""A step or an upload that runs when the time for a stop is over gets this much more to end."""
LOOK_PAUSE_S = 0.05
"""Between two looks at what appeared or went, so that a storm of events costs little."""
UNREADABLE_S = 0.5
"""What cannot be read is tried once more when somebody waits for it; it must not use up the time of the others, or of an application that
is held meanwhile."""
LINGER_S = 0.5
"""A database that is gone is kept in mind until its last commits are in the store; this long between two looks."""


@dataclass(frozen=True)
class NotDurable:
    """What a stop could not bring to the store in time; it is in the spool, and goes on at the next start."""

    path: Path
    reason: str


@dataclass
class _Watched:
    """A folder under replication. state: None for beside each database. budget: of all its databases.

    checked: that its entries are as ours will be.
    """

    folder: Folder
    store: ObjectStore
    state: Path | None
    settings: WorkerSettings
    finder: Finder
    budget: Budget | None
    checked: bool = False


@dataclass(frozen=True)
class _Refused:
    """What was found in a folder and is not replicated: where its replica would be, and why there is none."""

    folder: Path
    url: str
    reason: str


@dataclass
class _Replicated:
    """A database under replication. found_in: None when it was named. entry: what its entry in the catalogue is known to say."""

    worker: DatabaseWorker
    found_in: _Watched | None
    entry: catalogue.Entry | None = None


class Replicator:
    """Replicates databases until it is stopped. Every method may be called from any thread.

    sweep_s: how often everything is looked at without an event. writer: names this writer in the records of its timelines.
    epoch: of the lease under which it writes, 0 without one; raises LeaseLost while no timeline may be begun.
    inotify: how the kernel is asked for file events. Raises ConfigError when it gives none.
    """

    def __init__(
        self,
        *,
        sweep_s: float = SWEEP_S,
        writer: str | None = None,
        epoch: Callable[[], int] = lambda: 0,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        inotify: Callable[[], CalmInotify] = CalmInotify,
    ) -> None:
        self._sweep_s = sweep_s
        self._writer = writer or f"{socket.gethostname()}:{os.getpid()}"
        self._epoch = epoch
        self._now_ms = now_ms
        self._guard = threading.RLock()
        self._databases: dict[Path, _Replicated] = {}
        self._refused: dict[Path, _Refused] = {}
        self._folders: dict[Path, _Watched] = {}
        self._uploads = Crew(UPLOAD_THREADS, "upload")
        self._scheduler: Scheduler[DatabaseWorker] = Scheduler(CAPTURE_THREADS, "capture")
        self._upkeeps: Scheduler[Upkeep] = Scheduler(UPKEEP_THREADS, "upkeep")
        self._watch = Watch(self._touched, self._appeared, self._lost, inotify)
        self._sweeper = threading.Thread(target=self._sweep_forever, name="sweep", daemon=True)
        self._stopping = threading.Event()
        self._look = threading.Event()
        self._sweep_now = threading.Event()
        self._look_guard = threading.Lock()
        self._to_look_at: set[Path] = set()
        self._renewal = threading.Lock()
        self._drill = Drill(self._tried, now_ms=now_ms)

    def start(self) -> None:
        self._watch.start()
        self._sweeper.start()

    # -- what is replicated --------------------------------------------------------------------------------------------

    def add(
        self, path: Path, store: ObjectStore, *, state: Path | None = None, settings: WorkerSettings | None = None
    ) -> None:
        """Replicate one database, which may not exist yet. store: its replica. state: folder for the local state of this database.

        Raises DatabaseNotReplicable when another replicator has it, ConfigError when its folder is missing.
        """
        self._add(path.absolute(), store, state, settings or WorkerSettings(), found_in=None, register=lambda: None)

    def add_folder(
        self, folder: Folder, store: ObjectStore, *, state: Path | None = None, settings: WorkerSettings | None = None
    ) -> None:
        """Replicate every database in a folder, those that appear later too. store: each gets a place of its own in it.

        state: folder below which each database's state goes; None for beside it. Raises ConfigError when it is missing.
        """
        folder = replace(folder, path=folder.path.absolute())
        with self._guard:
            if folder.path in self._folders:
                return
            settings = settings or WorkerSettings()
            watched = _Watched(folder, store, state, settings, Finder(folder), _budget(settings))
            self._watch.add_folder(folder)
            self._folders[folder.path] = watched
        self._discover(watched, folder.path)
        for database in _gone_with_a_tail(watched):
            log.warning("%s is gone; its last commits, which were not shipped yet, go to the store now", database)
            self._adopt(watched, database)
            self._look_at(database)

    def remove(self, path: Path, timeout_s: float = CLOSE_S) -> None:
        """Stop replicating a database. What is in the store stays there, what waits stays in the spool."""
        self._remove(path.absolute(), timeout_s, forget=False)

    def remove_folder(self, path: Path, timeout_s: float = CLOSE_S) -> None:
        """Stop replicating a folder: the databases that were found in it, not those that were named one by one."""
        path = path.absolute()
        with self._guard:
            watched = self._folders.pop(path, None)
            if watched is None:
                return
            self._watch.remove_folder(watched.folder)
            found = [known for known, it in self._databases.items() if it.found_in is watched]
            self._refused = {known: why for known, why in self._refused.items() if why.folder != path}
        for database in found:
            self.remove(database, timeout_s)

    def _remove(self, path: Path, timeout_s: float, *, forget: bool) -> None:
        with self._guard:
            replicated = self._databases.pop(path, None)
            if replicated is None:
                return
            if replicated.found_in is None:
                self._watch.remove_file(replicated.worker.path)
        self._close(replicated.worker, timeout_s, forget=forget)

    def _add(
        self,
        path: Path,
        store: ObjectStore,
        state: Path | None,
        settings: WorkerSettings,
        *,
        found_in: _Watched | None,
        register: Callable[[], object],
    ) -> bool:
        """False when it is replicated already, or not any more: its folder may have been dropped since it was found."""
        with self._guard:
            if path in self._databases or self._stopping.is_set() or not self._is_watched(found_in):
                return False
            worker = DatabaseWorker(
                path,
                store,
                state or default_state(path),
                self._uploads,
                settings,
                self._scheduler.wake,
                self._upkeeps.wake,
                writer=self._writer,
                epoch=self._epoch,
                now_ms=self._now_ms,
                register=register,
                within=found_in.folder.path if found_in else None,
                budget=found_in.budget if found_in else _budget(settings),
            )
            try:
                if found_in is None:
                    self._watch.add_file(path)
            except ReplicatorError:
                worker.close()
                raise
            self._databases[path] = _Replicated(worker, found_in)
        self._scheduler.wake(worker)
        self._upkeeps.wake(worker.upkeep, settings.upkeep.survey_s)
        if settings.trial_every_s > 0:
            self._drill.start()
        return True

    def _is_watched(self, folder: _Watched | None) -> bool:
        return folder is None or self._folders.get(folder.folder.path) is folder

    def is_alive(self, within_s: float = CLOSE_S) -> bool:
        """Whether its threads run, and none holds the others up. For a watchdog."""
        if not self._guard.acquire(timeout=within_s):
            return False
        self._guard.release()
        return self._sweeper.is_alive() and self._scheduler.is_alive(within_s)

    # -- how it is -----------------------------------------------------------------------------------------------------

    def status(self) -> list[DatabaseStatus]:
        """Of every database, of what looks like one and cannot be replicated, and of folders that are not watched."""
        with self._guard:
            workers = [replicated.worker for replicated in self._databases.values()]
            refused = [
                unprotected(path, why.url, why.reason)
                for path, why in self._refused.items()
                if path not in self._databases
            ]
            folders = list(self._folders.values())
        seen = [self._as_watched(worker.status(), worker.path.parent) for worker in workers]
        for watched in folders:
            why = self._watch.unwatched(watched.folder.path)
            if why and not any(status.path.is_relative_to(watched.folder.path) for status in [*seen, *refused]):
                refused.append(unprotected(watched.folder.path, watched.store.url, why))
        return sorted([*seen, *refused], key=lambda status: status.path)

    def _as_watched(self, status: DatabaseStatus, folder: Path) -> DatabaseStatus:
        """Of a database whose changes are not seen, nobody knows how safe it is."""
        why = self._watch.unwatched(folder)
        if not why or status.protection is Protection.NOT_PROTECTED:
            return status
        reason = f"{why}; meanwhile it is looked at every {self._sweep_s:g} s"
        return replace(status, protection=Protection.NOT_PROTECTED, reason=reason)

    def sync(self, path: Path, timeout_s: float) -> Position:
        """Wait until everything committed to the database before the call is durable.

        Raises SyncTimeout; DatabaseNotReplicable for one that was found and is refused; DatabaseMissing, also when it is not replicated
        here; NotADatabase.
        """
        with self._guard:
            replicated = self._databases.get(path.absolute())
            refused = self._refused.get(path.absolute())
        if replicated is None and refused is not None:
            raise DatabaseNotReplicable(refused.reason)
        if replicated is None:
            raise DatabaseMissing(f"{path} is not replicated here; `replicator status` lists what is")
        return replicated.worker.sync(timeout_s)

    def sync_folder(self, path: Path, timeout_s: float) -> None:
        """The same for every database in a folder, those that appeared just now too."""
        path = path.absolute()
        with self._guard:
            watched = self._folders.get(path)
        if watched is None:
            raise DatabaseMissing(f"{path} is not a folder that is replicated here")
        deadline = time.monotonic() + timeout_s
        self._discover(watched, path)
        with self._guard:
            refused = [why.reason for why in self._refused.values() if why.folder == path]
            inside = [it.worker for known, it in self._databases.items() if known.is_relative_to(path)]
        problems: list[ReplicatorError] = [SyncTimeout(why) for why in refused]
        # One that cannot be shipped keeps no other from it.
        for worker in sorted(inside, key=lambda worker: worker.is_unreadable):
            try:
                worker.sync(_patience_s(worker, deadline))
            except (DatabaseError, SyncTimeout) as error:
                if worker.path.exists() and not is_linked(worker.path, path):
                    problems.append(error)
        if problems:
            raise problems[0]

    # -- stopping ------------------------------------------------------------------------------------------------------

    def stop(self, timeout_s: float = 10.0) -> list[NotDurable]:
        """Ship the last commits, within the time that is given; then let go of everything. Returns what did not get there."""
        deadline = time.monotonic() + timeout_s
        self._stopping.set()
        self._look.set()
        self._watch.stop()
        self._drill.stop(LAST_STEP_S)
        with self._guard:
            workers = [replicated.worker for replicated in self._databases.values()]
        for worker in workers:
            worker.upkeep.stop()
        with ThreadPoolExecutor(min(STOP_THREADS, len(workers) + 1), thread_name_prefix="stop") as pool:
            late = [found for found in pool.map(lambda worker: _last_sync(worker, deadline), workers) if found]
            list(pool.map(lambda worker: self._close(worker, max(LAST_STEP_S, deadline - time.monotonic())), workers))
        self._scheduler.stop(LAST_STEP_S)
        self._uploads.stop(LAST_STEP_S)
        self._upkeeps.stop(LAST_STEP_S)
        if self._sweeper.is_alive():
            self._sweeper.join(max(LAST_STEP_S, deadline - time.monotonic()))
        with self._guard:
            self._databases.clear()
            self._folders.clear()
            self._refused.clear()
        return late

    def _tried(self) -> list[DatabaseWorker]:
        with self._guard:
            return [replicated.worker for replicated in self._databases.values()]

    def _close(self, worker: DatabaseWorker, timeout_s: float, *, forget: bool = False) -> None:
        worker.upkeep.stop()
        if not self._upkeeps.forget(worker.upkeep, LAST_STEP_S):
            log.info("%s: a request of the upkeep of its replica is still under way; nothing follows it", worker.path)
        if not self._scheduler.forget(worker, timeout_s):
            log.warning("%s: its step did not end in time; it is let go of when it does", worker.path)
        worker.close(forget=forget)

    # -- finding -------------------------------------------------------------------------------------------------------

    def _touched(self, file: Path, gone: bool) -> None:
        """A file event. A known database is woken; what may be a new one, or is gone, is looked at by the sweeper."""
        path = file if file in self._databases else companion_of(file) or file
        replicated = self._databases.get(path)
        if replicated is not None:
            replicated.worker.touched()
        if gone or replicated is None:
            folders = [watched.folder for watched in list(self._folders.values())]
            for each in {path, file}:
                if any(folder.takes(each) for folder in folders):
                    self._look_at(each)

    def _appeared(self, _: Folder, path: Path) -> None:
        self._look_at(path)

    def _lost(self) -> None:
        self._sweep_now.set()
        self._look.set()

    def _look_at(self, path: Path) -> None:
        with self._look_guard:
            self._to_look_at.add(path)
        self._look.set()

    def _sweep_forever(self) -> None:
        sweep_at = time.monotonic() + self._sweep_s
        lingering: set[Path] = set()
        while not self._stopping.is_set():
            until_sweep_s = max(0.0, sweep_at - time.monotonic())
            self._look.wait(min(LINGER_S, until_sweep_s) if lingering else until_sweep_s)
            self._look.clear()
            if self._stopping.is_set():
                return
            with self._look_guard:
                paths, self._to_look_at = self._to_look_at | lingering, set()
            try:
                if time.monotonic() >= sweep_at or self._sweep_now.is_set():
                    self._sweep_now.clear()
                    sweep_at = time.monotonic() + self._sweep_s
                    paths |= self._sweep()
                lingering = {path for path in paths if self._examine(path)}
            except Exception:  # the sweeper's loop: without it, nothing that events miss would ever be found
                log.exception("a look at the folders failed in a way that nobody foresaw; the next sweep looks again")
            self._stopping.wait(LOOK_PAUSE_S)

    def _sweep(self) -> set[Path]:
        """Look for what events may have missed. Returns what may be gone."""
        try:
            self._watch.renew()
        except ReplicatorError as error:
            log.warning("%s", error)
        with self._guard:
            folders = list(self._folders.values())
            databases = dict(self._databases)
        for watched in folders:
            self._discover(watched, watched.folder.path)
        for replicated in databases.values():
            self._scheduler.wake(replicated.worker)
        if words := shortage(len(databases)):
            log.warning("%s", words)
        self._uploads.submit(self._renew_entries, databases)
        return set(databases)

    def _renew_entries(self, databases: dict[Path, _Replicated]) -> None:
        """In an uploading thread: the catalogue says of each file of a folder who owns it now. The store is asked only after a change."""
        if not self._renewal.acquire(blocking=False):
            return  # the one before still waits for the store
        try:
            self._renew_each(databases)
        finally:
            self._renewal.release()

    def _renew_each(self, databases: dict[Path, _Replicated]) -> None:
        for path, replicated in databases.items():
            watched = replicated.found_in
            if watched is None or self._stopping.is_set():
                continue
            try:
                entry = catalogue.entry_of(watched.folder.path, path)
                if entry != replicated.entry:
                    catalogue.renew(watched.store, entry)
                    replicated.entry = entry
            except OSError:
                continue  # it is gone
            except StoreError as error:
                log.debug("%s: its owner and mode wait for the next sweep: %s", path, error)
                return

    def _examine(self, path: Path) -> bool:
        """Take up what is new at a path, or below it; drop what is gone. True when it must be looked at again."""
        if path.is_dir() and not path.is_symlink():
            for watched in list(self._folders.values()):
                self._discover(watched, path)
            return False
        is_there = self._is_there(path)
        if is_there and path not in self._databases:
            self._examine_file(path)
        if is_there and not path.is_symlink():
            return False
        with self._guard:
            if not is_there:
                self._refused.pop(path, None)
            found = {
                known: it
                for known, it in self._databases.items()
                if it.found_in and (path in known.parents or (known == path and not is_there))
            }
        for known, replicated in found.items():
            if replicated.worker.is_finished:
                log.info("%s is gone; it is not replicated any more, its replica stays", known)
                self._remove(known, CLOSE_S, forget=True)
                if self._is_there(known):  # made anew at this moment
                    self._look_at(known)
            else:
                self._scheduler.wake(replicated.worker)
        return any(known in self._databases for known in found)

    def _is_there(self, path: Path) -> bool:
        """What is behind a link in a folder is nothing of the folder."""
        replicated = self._databases.get(path)
        if replicated is not None and replicated.found_in is None:
            return os.path.lexists(path)
        folders = [watched.folder.path for watched in list(self._folders.values())]
        return os.path.lexists(path) and not any(is_linked(path, folder) for folder in folders)

    def _examine_file(self, path: Path) -> None:
        with self._guard:
            self._refused.pop(path, None)
        for watched in list(self._folders.values()):
            found = watched.finder.look_at(path, self._databases)
            if found is not None:
                self._take_up(watched, found)
                return

    def _discover(self, watched: _Watched, below: Path) -> None:
        found = watched.finder.look(below, self._databases)
        for each in found:
            self._take_up(watched, each)
        seen = {each.path for each in found}
        with self._guard:
            for path, why in list(self._refused.items()):
                if why.folder == watched.folder.path and path.is_relative_to(below) and path not in seen:
                    del self._refused[path]

    def _take_up(self, watched: _Watched, found: Found) -> None:
        if found.problem:
            self._refuse(watched, found.path, found.problem)
        else:
            self._adopt(watched, found.path)

    def _refuse(self, watched: _Watched, path: Path, reason: str) -> None:
        name = path.relative_to(watched.folder.path)
        reason = os.fsencode(reason).decode(errors="backslashreplace")  # it is told to people, and may name the file
        refused = _Refused(watched.folder.path, catalogue.replica_of(watched.store, name).url, reason)
        with self._guard:
            if not self._is_watched(watched):
                return
            is_news = self._refused.get(path) != refused
            self._refused[path] = refused
        if is_news:
            log.warning("NOT PROTECTED: %s", reason)

    def _adopt(self, watched: _Watched, path: Path) -> None:
        if path in self._databases:
            return
        name = path.relative_to(watched.folder.path)
        replica = catalogue.replica_of(watched.store, name)
        state = watched.state / catalogue.encode(name) if watched.state else None
        try:
            is_new = self._add(
                path,
                replica,
                state,
                watched.settings,
                found_in=watched,
                register=lambda: _register(watched, path),
            )
        except (ReplicatorError, OSError) as error:
            self._refuse(watched, path, f"{path} is not replicated yet: {error}")
        else:
            with self._guard:
                self._refused.pop(path, None)
            if is_new:
                log.info("found %s", path)


def _register(watched: _Watched, path: Path) -> None:
    if not watched.checked:
        catalogue.check_encryption(watched.store)
        watched.checked = True
    catalogue.register(watched.store, watched.folder.path, path)


def _budget(settings: WorkerSettings) -> Budget | None:
    return Budget(settings.allowance, time.monotonic) if settings.allowance else None


def _gone_with_a_tail(watched: _Watched) -> Iterator[Path]:
    """Databases that were in the folder, and of which something waits in a local state that an earlier process left."""
    for path, state in _local_states(watched):
        if watched.folder.takes(path) and not os.path.lexists(path) and holds_segments(state):
            yield path


def _local_states(watched: _Watched) -> Iterator[tuple[Path, Path]]:
    """Each with the path of its database."""
    folder = watched.folder
    if watched.state is None:
        pattern = f".*{STATE_SUFFIX}"
        for state in folder.path.rglob(pattern) if folder.recursive else folder.path.glob(pattern):
            yield state.with_name(state.name[1 : -len(STATE_SUFFIX)]), state
    elif watched.state.is_dir():
        for state in watched.state.iterdir():
            with suppress(FormatError):  # somebody else's
                yield folder.path / catalogue.decode(state.name), state


def unprotected(path: Path, url: str, reason: str) -> DatabaseStatus:
    """Of what should be replicated and is not."""
    return DatabaseStatus(
        path=path,
        url=url,
        protection=Protection.NOT_PROTECTED,
        reason=reason,
        lag_s=0.0,
        captured=None,
        durable=None,
        durable_ms=0,
        waiting_segments=0,
        waiting_bytes=0,
        wal_bytes=0,
        page_size=0,
        page_count=0,
        checkpoint_blocked=False,
        barrier_s=0.0,
    )


def default_state(path: Path) -> Path:
    """Where the local state of a database goes when nothing else is said: beside it."""
    return path.with_name(f".{path.name}{STATE_SUFFIX}")


def _patience_s(worker: DatabaseWorker, deadline: float) -> float:
    left_s = max(0.0, deadline - time.monotonic())
    return min(left_s, UNREADABLE_S) if worker.is_unreadable else left_s


def _last_sync(worker: DatabaseWorker, deadline: float) -> NotDurable | None:
    try:
        worker.sync(max(0.1, _patience_s(worker, deadline)))
    except (DatabaseMissing, NotADatabase):
        return None
    except SyncTimeout as error:
        return NotDurable(worker.path, str(error))
    return None
