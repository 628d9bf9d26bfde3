"""File events that wake a database, and finding databases in folders.

Owns the watchdog observer. Never opens a database but to look whether it is one (database.is_database_file). Events may be missed (a full
queue, a watch limit): the service's slow sweep catches that.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

from replicator.database import is_database_file
from replicator.errors import ConfigError

log = logging.getLogger(__name__)

COMPANIONS = ("-wal", "-shm", "-journal")
STATE_SUFFIX = "-replicator"
"""A database's own state folder is ``.<name>-replicator`` beside it, unless it is told otherwise."""

_FILE_EVENTS = [FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileDeletedEvent, FileClosedEvent]
_TREE_EVENTS = [*_FILE_EVENTS, DirCreatedEvent, DirMovedEvent]


@dataclass(frozen=True)
class Folder:
    """A folder in which every database is replicated. pattern: of file names, as a shell's."""

    path: Path
    pattern: str = "*"
    recursive: bool = True

    def databases(self) -> Iterator[Path]:
        """The databases that are in it now."""
        for here, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if self.recursive and not _is_state(name)]
            for name in files:
                path = Path(here, name)
                if self.takes(path) and is_database_file(path):
                    yield path

    def takes(self, path: Path) -> bool:
        """Whether a file there would be looked at."""
        if not path.is_relative_to(self.path) or path.name.endswith(COMPANIONS) or path.is_symlink():
            return False
        within = path.relative_to(self.path).parts
        if any(_is_state(part) for part in within) or (len(within) > 1 and not self.recursive):
            return False
        return fnmatch.fnmatchcase(path.name, self.pattern)


def _is_state(name: str) -> bool:
    return name.startswith(".") and name.endswith(STATE_SUFFIX)


def database_of(path: Path) -> Path:
    """The database that a file belongs to: itself, or the one whose WAL, index or journal it is."""
    for suffix in COMPANIONS:
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix))
    return path


class Watch:
    """Calls back from the observer's thread; the callbacks must be quick."""

    def __init__(self, touched: Callable[[Path], None], appeared: Callable[[Folder], None]) -> None:
        """touched: with the path of a database (or what may become one) whose files changed. appeared: a folder below a watched one is new."""
        self._touched = touched
        self._appeared = appeared
        self._observer: BaseObserver = Observer()
        self._guard = threading.Lock()
        self._watches: dict[Path, tuple[ObservedWatch, int]] = {}

    def start(self) -> None:
        self._observer.start()

    def stop(self) -> None:
        self._observer.stop()
        if self._observer.is_alive():
            self._observer.join()

    def add_file(self, path: Path) -> None:
        """Watch one database. Raises ConfigError when its folder is missing or cannot be watched."""
        self._add(path.parent, recursive=False, folder=None)

    def remove_file(self, path: Path) -> None:
        self._remove(path.parent)

    def add_folder(self, folder: Folder) -> None:
        self._add(folder.path, recursive=folder.recursive, folder=folder)

    def remove_folder(self, folder: Folder) -> None:
        self._remove(folder.path)

    def _add(self, path: Path, *, recursive: bool, folder: Folder | None) -> None:
        with self._guard:
            known = self._watches.get(path)
            if known is not None:
                self._watches[path] = (known[0], known[1] + 1)
                return
            handler = _Handler(self._touched, self._appeared, folder)
            events = _TREE_EVENTS if folder else _FILE_EVENTS
            try:
                watch = self._observer.schedule(handler, str(path), recursive=recursive, event_filter=events)
            except OSError as error:
                hint = "; raise fs.inotify.max_user_watches" if error.errno == 28 else ""
                raise ConfigError(f"{path} cannot be watched: {error.strerror}{hint}") from error
            self._watches[path] = (watch, 1)

    def _remove(self, path: Path) -> None:
        with self._guard:
            watch, count = self._watches.pop(path, (None, 0))
            if watch is None:
                return
            if count > 1:
                self._watches[path] = (watch, count - 1)
            else:
                self._observer.unschedule(watch)


class _Handler(FileSystemEventHandler):
    def __init__(
        self, touched: Callable[[Path], None], appeared: Callable[[Folder], None], folder: Folder | None
    ) -> None:
        self._touched = touched
        self._appeared = appeared
        self._folder = folder

    def dispatch(self, event: FileSystemEvent) -> None:
        if event.is_directory:
            if self._folder is not None:
                self._appeared(self._folder)
            return
        for name in (event.src_path, event.dest_path):
            if name:
                self._touched(database_of(Path(os.fsdecode(name))))
