"""Finding the databases of a folder: what is one, what looks like one and cannot be replicated, and what cannot be looked at.

Owns the memory of what was looked at, so that a file that has not changed is not opened again. Never replicates anything.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from replicator.database import begins_as_database
from replicator.errors import DatabaseError, DatabaseMissing, DatabaseNotReplicable
from replicator.watch import Folder, companion_of

SUFFIXES = frozenset({".db", ".db3", ".sqlite", ".sqlite3", ".sqlitedb", ".s3db", ".sl3"})
"""A file that is called so and is no database is shown, since its owner may take it for replicated."""

_SETTLED_NS = 2_000_000_000
"""A file that changed in the last moment may change again without another time of change; it is not remembered."""
_IDENTITY = struct.Struct("=QQQqq")


@dataclass(frozen=True)
class Found:
    """A database, or what looks like one. problem: why it cannot be replicated, '' when that can be tried."""

    path: Path
    problem: str = ""


class Finder:
    """Looks for the databases of one folder, from any thread. What was found to be none, and has not changed, is not opened again.

    now_ns: wall clock, as files have their times by it. is_database: looks into a file.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        is_database: Callable[[Path], bool] = begins_as_database,
    ) -> None:
        self.folder = folder
        self._now_ns, self._is_database = now_ns, is_database
        self._ordinary: set[bytes] = set()

    def look(self, below: Path, known: Container[Path]) -> list[Found]:
        """What is in the folder, or in the part of it that is below a path, but for what is known."""
        if not self.folder.reaches(below) or is_linked(below, self.folder.path):
            return []
        ordinary: set[bytes] = set()
        found = list(self._walk(str(below), known, ordinary))
        self._ordinary = ordinary if below == self.folder.path else self._ordinary | ordinary
        return found

    def look_at(self, path: Path, known: Container[Path]) -> Found | None:
        """One file. None when it is known, when it is no database, and when the folder does not take such a file."""
        if path in known or not self.folder.takes(path) or is_linked(path, self.folder.path):
            return None
        has_wal = os.path.lexists(f"{os.fspath(path)}-wal")
        ordinary: set[bytes] = set()
        found = self._judge(path, has_wal, known, ordinary)
        self._ordinary |= ordinary
        return found

    def _walk(self, top: str, known: Container[Path], ordinary: set[bytes]) -> Iterator[Found]:
        folders = [top]
        while folders:
            here = folders.pop()
            try:
                with os.scandir(here) as listing:
                    entries = list(listing)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                yield Found(
                    Path(here), f"{here} cannot be listed, so that databases in it are not found: {error.strerror}"
                )
                continue
            names = {entry.name for entry in entries}
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if self.folder.enters(entry.name):
                        folders.append(entry.path)
                elif self.folder.takes_name(entry.name) and not self._is_settled(entry, names, ordinary):
                    path = Path(entry.path)
                    found = None if path in known else self._judge(path, f"{entry.name}-wal" in names, known, ordinary)
                    if found is not None:
                        yield found

    def _is_settled(self, entry: os.DirEntry[str], names: Container[str], ordinary: set[bytes]) -> bool:
        """Whether it was seen to be no database, has not changed, and does not look like one."""
        try:
            identity = _identity(entry.stat(follow_symlinks=False))
        except OSError:
            return False
        if identity not in self._ordinary:
            return False
        ordinary.add(identity)
        return f"{entry.name}-wal" not in names and Path(entry.name).suffix.lower() not in SUFFIXES

    def _judge(self, path: Path, has_wal: bool, known: Container[Path], ordinary: set[bytes]) -> Found | None:
        """ordinary: is given what need not be opened again."""
        owner = companion_of(path)
        if owner is not None and (owner in known or (path.name.endswith("-shm") and os.path.lexists(owner))):
            return None  # the index of a live database must not be opened: closing it would drop locks
        looks = has_wal or path.suffix.lower() in SUFFIXES
        try:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                return self._judge_link(path)
            if not stat.S_ISREG(status.st_mode):
                return None
            identity = _identity(status)
            if identity not in self._ordinary:
                if self._is_database(path):
                    return Found(path, _name_problem(path, owner))
                if self._now_ns() - status.st_ctime_ns < _SETTLED_NS:
                    identity = b""
        except (FileNotFoundError, NotADirectoryError, DatabaseMissing):
            return None
        except DatabaseNotReplicable as error:
            return Found(path, str(error))
        except (DatabaseError, OSError) as error:
            return Found(path, f"{path} cannot be looked at: {error}") if looks else None
        if identity:
            ordinary.add(identity)
        if looks and (status.st_size or has_wal):
            return Found(
                path, f"{path} is not an SQLite database (or is encrypted as a whole), so it is not replicated"
            )
        return None

    def _judge_link(self, path: Path) -> Found | None:
        """A link to what is found by its own name is nothing of its own; SQLite follows it, too."""
        try:
            target = path.resolve()
            if self.folder.takes(target) or not target.is_file() or not self._is_database(target):
                return None
        except (DatabaseError, OSError, RuntimeError):  # it leads nowhere, or in a circle
            return None
        return Found(
            path, f"{path} is a symbolic link to {target}, which is not in the folder; move the database itself here"
        )


def is_linked(path: Path, folder: Path) -> bool:
    """Whether a folder on the way from ``folder`` to ``path`` is a symbolic link: what is behind it is nothing of the folder."""
    return any(parent.is_symlink() for parent in path.parents if parent != folder and parent.is_relative_to(folder))


def _name_problem(path: Path, owner: Path | None) -> str:
    if owner is not None and os.path.lexists(owner):
        return (
            f"{path} is a database with the name that SQLite gives to a file of {owner}, and would overwrite; rename it"
        )
    return ""


def _identity(status: os.stat_result) -> bytes:
    """Which file it is and when it changed; compact, as there may be many of them."""
    return _IDENTITY.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
