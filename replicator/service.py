"""The replicator as a library: which databases, where to, and how they are.

Owns the workers and the threads they share. Entry point for the command line and for programs that embed it; never parses a file.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from replicator import catalogue
from replicator.errors import DatabaseError, DatabaseMissing, ReplicatorError, StoreError, SyncTimeout
from replicator.scheduler import Scheduler
from replicator.store import ObjectStore
from replicator.values import Position
from replicator.watch import STATE_SUFFIX, Folder, Watch
from replicator.worker import DatabaseStatus, DatabaseWorker, WorkerSettings

log = logging.getLogger(__name__)

SWEEP_S = 60.0
CAPTURE_THREADS = 4
UPLOAD_THREADS = 16
DISCOVER_PAUSE_S = 0.05
"""Between two looks at the folders, so that a storm of events costs little."""


@dataclass(frozen=True)
class NotDurable:
    """What a stop could not bring to the store in time; it is in the spool, and goes on at the next start."""

    path: Path
    reason: str


@dataclass
class _Watched:
    """A folder under replication. state: None for beside each database."""

    folder: Folder
    store: ObjectStore
    state: Path | None
    settings: WorkerSettings


class Replicator:
    """Replicates databases until it is stopped. Every method may be called from any thread.

    sweep_s: how often everything is looked at without an event. writer: names this writer in the records of its timelines.
    """

    def __init__(
        self,
        *,
        sweep_s: float = SWEEP_S,
        writer: str | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._sweep_s = sweep_s
        self._writer = writer or f"{socket.gethostname()}:{os.getpid()}"
        self._now_ms = now_ms
        self._guard = threading.RLock()
        self._workers: dict[Path, DatabaseWorker] = {}
        self._folders: dict[Path, _Watched] = {}
        self._uploads = ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="upload")
        self._scheduler: Scheduler[DatabaseWorker] = Scheduler(CAPTURE_THREADS, "capture")
        self._watch = Watch(self._touched, self._appeared)
        self._sweeper = threading.Thread(target=self._sweep_forever, name="sweep", daemon=True)
        self._stopping = threading.Event()
        self._look = threading.Event()

    def start(self) -> None:
        self._watch.start()
        self._sweeper.start()

    # -- what is replicated --------------------------------------------------------------------------------------------

    def add(
        self, path: Path, store: ObjectStore, *, state: Path | None = None, settings: WorkerSettings | None = None
    ) -> None:
        """Replicate one database, which may not exist yet. store: its replica. state: folder for the local state of this database.

        Raises DatabaseNotReplicable when another replicator has it, ConfigError when its folder cannot be watched.
        """
        path = path.absolute()
        with self._guard:
            if path in self._workers:
                return
            worker = DatabaseWorker(
                path,
                store,
                state or default_state(path),
                self._uploads,
                settings or WorkerSettings(),
                self._scheduler.wake,
                writer=self._writer,
                now_ms=self._now_ms,
            )
            try:
                self._watch.add_file(path)
            except ReplicatorError:
                worker.close()
                raise
            self._workers[path] = worker
        self._scheduler.wake(worker)

    def add_folder(
        self, folder: Folder, store: ObjectStore, *, state: Path | None = None, settings: WorkerSettings | None = None
    ) -> None:
        """Replicate every database in a folder, those that appear later too. store: each gets a place of its own in it.

        state: folder below which each database's state goes; None for beside it.
        """
        with self._guard:
            if folder.path in self._folders:
                return
            watched = _Watched(folder, store, state, settings or WorkerSettings())
            self._watch.add_folder(folder)
            self._folders[folder.path] = watched
        self._discover(watched)

    def remove(self, path: Path, timeout_s: float = 10.0) -> None:
        """Stop replicating a database. What is in the store stays there, what waits stays in the spool."""
        with self._guard:
            worker = self._workers.pop(path.absolute(), None)
            if worker is None:
                return
            self._watch.remove_file(worker.path)
        self._close(worker, timeout_s)

    def remove_folder(self, path: Path, timeout_s: float = 10.0) -> None:
        with self._guard:
            watched = self._folders.pop(path, None)
            if watched is None:
                return
            self._watch.remove_folder(watched.folder)
            inside = [known for known in self._workers if known.is_relative_to(path)]
        for database in inside:
            self.remove(database, timeout_s)

    # -- how it is -----------------------------------------------------------------------------------------------------

    def status(self) -> list[DatabaseStatus]:
        with self._guard:
            workers = list(self._workers.values())
        return [worker.status() for worker in sorted(workers, key=lambda worker: worker.path)]

    def sync(self, path: Path, timeout_s: float) -> Position:
        """Wait until everything committed to the database before the call is durable. Raises SyncTimeout, DatabaseMissing."""
        with self._guard:
            worker = self._workers.get(path.absolute())
        if worker is None:
            raise DatabaseMissing(f"{path} is not replicated here; `replicator status` lists what is")
        return worker.sync(timeout_s)

    def sync_folder(self, path: Path, timeout_s: float) -> None:
        """The same for every database in a folder, those that appeared just now too."""
        with self._guard:
            watched = self._folders.get(path)
        if watched is None:
            raise DatabaseMissing(f"{path} is not a folder that is replicated here")
        self._discover(watched)
        deadline = time.monotonic() + timeout_s
        for database in self._inside(path):
            self.sync(database, max(0.0, deadline - time.monotonic()))

    def _inside(self, path: Path) -> list[Path]:
        with self._guard:
            return [known for known in self._workers if known.is_relative_to(path)]

    # -- stopping ------------------------------------------------------------------------------------------------------

    def stop(self, timeout_s: float = 10.0) -> list[NotDurable]:
        """Ship the last commits, within the time that is given; then let go of everything. Returns what did not get there."""
        deadline = time.monotonic() + timeout_s
        self._stopping.set()
        self._look.set()
        self._watch.stop()
        with self._guard:
            workers = list(self._workers.values())
        with ThreadPoolExecutor(min(32, len(workers) + 1), thread_name_prefix="stop") as pool:
            late = [found for found in pool.map(lambda worker: _last_sync(worker, deadline), workers) if found]
        for worker in workers:
            self._close(worker, max(1.0, deadline - time.monotonic()))
        self._scheduler.stop()
        self._uploads.shutdown(wait=False, cancel_futures=True)
        if self._sweeper.is_alive():
            self._sweeper.join()
        with self._guard:
            self._workers.clear()
            self._folders.clear()
        return late

    def _close(self, worker: DatabaseWorker, timeout_s: float) -> None:
        if self._scheduler.forget(worker, timeout_s):
            worker.close()
        else:
            log.warning("%s: its step did not end in time; it is left to the end of the process", worker.path)

    # -- finding -------------------------------------------------------------------------------------------------------

    def _touched(self, path: Path) -> None:
        """A file event. A known database is woken; what may be a new one, or is gone, is looked at by the sweeper."""
        worker = self._workers.get(path)
        if worker is not None:
            self._scheduler.wake(worker)
        elif any(watched.folder.takes(path) for watched in list(self._folders.values())):
            self._look.set()

    def _appeared(self, _: Folder) -> None:
        self._look.set()

    def _sweep_forever(self) -> None:
        while not self._stopping.is_set():
            looked_for = self._look.wait(self._sweep_s)
            self._look.clear()
            if self._stopping.is_set():
                return
            with self._guard:
                folders = list(self._folders.values())
                workers = [] if looked_for else list(self._workers.values())
            for watched in folders:
                self._discover(watched)
            for worker in workers:
                self._scheduler.wake(worker)
            self._stopping.wait(DISCOVER_PAUSE_S)

    def _discover(self, watched: _Watched) -> None:
        """Take up the databases of a folder that are new, drop those that are gone."""
        for path in watched.folder.databases():
            if path not in self._workers:
                self._adopt(watched, path)
        for path in self._inside(watched.folder.path):
            if not path.exists():
                log.info("%s is gone; it is not replicated any more, its replica stays", path)
                self.remove(path)

    def _adopt(self, watched: _Watched, path: Path) -> None:
        name = path.relative_to(watched.folder.path)
        try:
            replica = catalogue.register(watched.store, watched.folder.path, path)
            state = watched.state / catalogue.encode(name) if watched.state else None
            self.add(path, replica, state=state, settings=watched.settings)
            log.info("found %s", path)
        except (StoreError, DatabaseError, OSError) as error:
            log.warning("%s is not replicated yet: %s", path, error)


def default_state(path: Path) -> Path:
    """Where the local state of a database goes when nothing else is said: beside it."""
    return path.with_name(f".{path.name}{STATE_SUFFIX}")


def _last_sync(worker: DatabaseWorker, deadline: float) -> NotDurable | None:
    try:
        worker.sync(max(0.1, deadline - time.monotonic()))
    except SyncTimeout as error:
        if worker.path.exists():
            return NotDurable(worker.path, str(error))
    return None
