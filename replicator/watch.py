"""File events that wake a database: which folders are watched, and which files in them are of interest.

Owns the watchdog observer. Never opens a file. Events may be missed (a full queue, a watch limit): the service's slow sweep catches that,
and what is not watched is known here by name.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver, ObservedWatch
from watchdog.observers.inotify import InotifyEmitter
from watchdog.observers.inotify_c import (
    DEFAULT_EVENT_BUFFER_SIZE,
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)

from replicator.errors import ConfigError

log = logging.getLogger(__name__)

# watchdog says this, at length, whenever a folder and one in it are made in quick succession; it means nothing.
warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
# And this, as an error, whenever a watch ends.
logging.getLogger("watchdog.observers.inotify").addFilter(
    lambda record: "thread is inactive" not in record.getMessage()
)

COMPANIONS = ("-wal", "-shm", "-journal")
STATE_SUFFIX = "-replicator"
"""A database's own state folder is ``.<name>-replicator`` beside it, unless it is told otherwise."""
RESTORING = ".*.restoring-*"
"""Files of a restore that runs or was killed; see new_database.py."""

_FILE_EVENTS = [FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileDeletedEvent, FileClosedEvent]
_TREE_EVENTS = [*_FILE_EVENTS, DirCreatedEvent, DirMovedEvent, DirDeletedEvent]
_HINTS = {
    errno.ENOSPC: "the limit of watches is reached; raise fs.inotify.max_user_watches",
    errno.EMFILE: "the limit of watchers is reached; raise fs.inotify.max_user_instances",
    errno.ENOMEM: "the kernel has no memory for it",
}
"""Refusals that may end by themselves or by an act of the owner; what they concern is looked at by the sweep only, meanwhile."""

CALM_S = 0.01
"""Between two reads of the kernel's queue. An application that commits all the time makes an event for every write; those that are
alike and wait together are one, so that a storm costs what a hundred events a second cost. What comes after a pause is read at once."""


@dataclass(frozen=True)
class Folder:
    """A folder in which every database is replicated. pattern: of file names, as a shell's."""

    path: Path
    pattern: str = "*"
    recursive: bool = True

    def takes(self, path: Path) -> bool:
        """Whether a file of this name would be looked at."""
        return path.is_relative_to(self.path) and self.takes_name(path.name) and self.reaches(path.parent)

    def takes_name(self, name: str) -> bool:
        is_of_a_restore = name.startswith(".") and fnmatch.fnmatchcase(name, RESTORING)
        return not is_of_a_restore and (self.pattern == "*" or fnmatch.fnmatchcase(name, self.pattern))

    def enters(self, name: str) -> bool:
        """Whether folders of this name in it are looked into."""
        return self.recursive and not _is_state(name)

    def reaches(self, folder: Path) -> bool:
        """Whether files in a folder are of interest."""
        if not folder.is_relative_to(self.path):
            return False
        return all(self.enters(part) for part in folder.relative_to(self.path).parts)


def _is_state(name: str) -> bool:
    return name.startswith(".") and name.endswith(STATE_SUFFIX)


def companion_of(path: Path) -> Path | None:
    """The database whose WAL, index or journal a file of this name would be; None for another name."""
    for suffix in COMPANIONS:
        if path.name.endswith(suffix) and path.name != suffix:
            return path.with_name(path.name.removesuffix(suffix))
    return None


@dataclass
class _Scheduled:
    """One folder under watch. users: how many databases and folders of ours need it. identity: which folder it was.

    watch: None, and no identity, while the kernel refuses it.
    """

    watch: ObservedWatch | None
    handler: FileSystemEventHandler
    users: int
    identity: _Identity | None


_Key = tuple[Path, Folder | None]
_Identity = tuple[int, int]


class CalmInotify(InotifyFD):
    """watchdog's reader of the kernel's queue, at its own pace instead of the writers'. Remembers what the kernel refused to watch.

    on_lost: called when the kernel's queue ran over, or a file system was unmounted, so that events were or will be lost.
    unmounted: folders whose watches ended so; the same file system, mounted again, has the same folders.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_at = 0.0
        self.refused: dict[Path, str] = {}
        self.unmounted: set[Path] = set()
        self._folders: dict[WatchDescriptor, Path] = {}
        self.on_lost: Callable[[], None] = lambda: None

    def add_callback(self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId) -> WatchDescriptor:
        folder = Path(os.fsdecode(path))
        try:
            added = self._ask_kernel(path, mask, callback, id_)
        except OSError as error:  # of folders in a watched one, watchdog says nothing to anybody
            if error.errno in _HINTS:
                self.refused[folder] = _HINTS[error.errno]
            raise
        self.refused.pop(folder, None)
        self.unmounted.discard(folder)
        self._folders[added] = folder
        return added

    def _ask_kernel(self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId) -> WatchDescriptor:
        return super().add_callback(path, mask, callback, id_)

    def handle_event(self, event: InotifyEvent) -> None:
        is_unmount = bool(event.mask & InotifyConstants.IN_UNMOUNT)
        if is_unmount and event.wd in self._folders:
            self.unmounted.add(self._folders[event.wd])
        if event.is_ignored:
            self._folders.pop(event.wd, None)
        super().handle_event(event)
        if event.is_queue_overflow or is_unmount:
            self.on_lost()

    def read_events(self, *, event_buffer_size: int = DEFAULT_EVENT_BUFFER_SIZE) -> list[InotifyEvent]:
        time.sleep(max(0.0, self._read_at + CALM_S - time.monotonic()))
        events = super().read_events(event_buffer_size=event_buffer_size)
        self._read_at = time.monotonic()
        alike: set[tuple[int, bytes]] = set()
        kept = []
        for event in events:
            if not event.is_modify or (event.wd, event.name) not in alike:
                kept.append(event)
            if event.is_modify:
                alike.add((event.wd, event.name))
        return kept


class Watch:
    """Calls back from the observer's thread; the callbacks must be quick."""

    def __init__(
        self,
        touched: Callable[[Path, bool], None],
        appeared: Callable[[Folder, Path], None],
        lost: Callable[[], None] = lambda: None,
        inotify: Callable[[], CalmInotify] = CalmInotify,
    ) -> None:
        """touched: with the path of a file that changed, and whether it was there and is gone.
        appeared: a folder below a watched one is new, or is gone. lost: events were.
        Raises ConfigError when the kernel gives no watcher.
        """
        self._touched = touched
        self._appeared = appeared
        try:
            self._inotify = inotify()
        except OSError as error:
            why = _HINTS.get(error.errno or 0, error.strerror)
            raise ConfigError(f"files cannot be watched: {why}") from error
        self._inotify.on_lost = lost
        self._observer = BaseObserver(InotifyEmitter, inotify_fd=self._inotify)
        self._guard = threading.Lock()
        self._watches: dict[_Key, _Scheduled] = {}

    def start(self) -> None:
        self._inotify.start()
        self._observer.start()

    def unwatched(self, folder: Path) -> str:
        """Why changes in a folder are seen by the sweep only; '' when they are seen at once."""
        if not (self._inotify.is_alive() and self._observer.is_alive()):
            return "files are not watched any more; restart it"
        for refused, why in list(self._inotify.refused.items()):
            if folder.is_relative_to(refused):
                return f"{refused} cannot be watched: {why}"
        return ""

    def stop(self) -> None:
        for thread in (self._observer, self._inotify):
            thread.stop()
            if thread.is_alive():
                thread.join()

    def add_file(self, path: Path) -> None:
        """Watch one database. Raises ConfigError when its folder is missing; ``unwatched`` says when the kernel refuses it for now."""
        self._add((path.parent, None))

    def remove_file(self, path: Path) -> None:
        self._remove((path.parent, None))

    def add_folder(self, folder: Folder) -> None:
        """Raises ConfigError when it is missing; ``unwatched`` says when the kernel refuses it for now."""
        self._add((folder.path, folder))

    def remove_folder(self, folder: Folder) -> None:
        self._remove((folder.path, folder))

    def renew(self) -> None:
        """Watch again what was deleted and made anew, since the kernel watches folders, not paths; and what it refused."""
        with self._guard:
            self._forget_gone()
            for key, known in self._watches.items():
                identity = _identity(key[0])
                if identity is not None and (identity != known.identity or self._has_gaps(key)):
                    known.identity = (
                        None  # until it is watched again; one that cannot be must not keep the others from it
                    )
                    if known.watch is not None:
                        with suppress(KeyError):
                            self._observer.unschedule(known.watch)
                    try:
                        renewed = self._schedule(key)
                    except ConfigError as error:
                        log.warning("%s", error)
                        continue
                    known.watch, known.handler, known.identity = renewed.watch, renewed.handler, renewed.identity

    def _forget_gone(self) -> None:
        for refused in list(self._inotify.refused):
            if not refused.is_dir():
                self._inotify.refused.pop(refused, None)
        for unmounted in list(self._inotify.unmounted):
            if not unmounted.is_dir():
                self._inotify.unmounted.discard(unmounted)

    def _has_gaps(self, key: _Key) -> bool:
        """Whether it, or a folder in it, is not watched (any more)."""
        path, folder = key
        unmounted = list(self._inotify.unmounted)
        if folder is None:
            return path in unmounted
        return any(folder.reaches(gap) for gap in [*self._inotify.refused, *unmounted])

    def _add(self, key: _Key) -> None:
        with self._guard:
            known = self._watches.get(key)
            if known is not None:
                known.users += 1
            else:
                self._watches[key] = self._schedule(key)

    def _schedule(self, key: _Key) -> _Scheduled:
        path, folder = key
        handler = _Handler(self._touched, self._appeared, folder)
        events = _TREE_EVENTS if folder else _FILE_EVENTS
        recursive = folder is not None and folder.recursive
        identity = _identity(path)
        try:
            watch = self._observer.schedule(handler, str(path), recursive=recursive, event_filter=events)
        except OSError as error:
            if error.errno not in _HINTS:
                raise ConfigError(f"{path} cannot be watched: {error.strerror}") from error
            log.warning("%s cannot be watched: %s", path, _HINTS[error.errno])
            return _Scheduled(None, handler, 1, None)
        return _Scheduled(watch, handler, 1, identity)

    def _remove(self, key: _Key) -> None:
        with self._guard:
            known = self._watches.get(key)
            if known is None:
                return
            known.users -= 1
            if known.users:
                return
            del self._watches[key]
            if known.watch is None:
                return
            others = any(other.watch == known.watch for other in self._watches.values())
            if others:  # a folder and a database in it may share one
                self._observer.remove_handler_for_watch(known.handler, known.watch)
            else:
                self._observer.unschedule(known.watch)


def _identity(path: Path) -> _Identity | None:
    """Device and inode; None when it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Handler(FileSystemEventHandler):
    def __init__(
        self, touched: Callable[[Path, bool], None], appeared: Callable[[Folder, Path], None], folder: Folder | None
    ) -> None:
        self._touched = touched
        self._appeared = appeared
        self._folder = folder

    def dispatch(self, event: FileSystemEvent) -> None:
        if event.is_directory:
            if self._folder is not None:
                self._appeared(self._folder, Path(os.fsdecode(event.dest_path or event.src_path)))
            return
        is_gone = isinstance(event, (FileDeletedEvent, FileMovedEvent))
        for name, gone in ((event.src_path, is_gone), (event.dest_path, False)):
            if name:
                self._touched(Path(os.fsdecode(name)), gone)
