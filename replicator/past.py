"""The past as SQL: connections to a database as it was at a position of a replica, without a restore.

Owns the VFS through which SQLite reads pages out of the store. It writes nothing, neither to the store nor to a disk.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import apsw

from replicator.errors import PastIsReadOnly, QueryFailed
from replicator.past_pages import CACHE_BYTES, Fetched, PastPages
from replicator.restore_plan import RestoreOptions
from replicator.store import ObjectStore
from replicator.values import Position

_VFS_NAME = "replicator-past"
_VERSION_FIELDS = (18, 19)  # of the database header: 2 means that the file may have a WAL beside it, 1 that it has none
_WAL, _NO_WAL = 2, 1
_STEPS = 1_000_000  # of SQLite's machine: some hundredths of a second

Value = None | int | float | str | bytes
"""What SQLite keeps in a column."""


def open_past(store: ObjectStore, options: RestoreOptions | None = None, *, cache_bytes: int = CACHE_BYTES) -> Past:
    """The database as it was at a position of the replica in ``store``; close it, or use it in a ``with``.

    options: which position, as for ``restore``, the newest if none are given; of the others, parallelism is that of the
    requests.
    cache_bytes: for pages in memory. Reads the ends of the segments, no page yet.
    Raises RestoreError and its subclasses, FormatError, StoreError, UsageError.
    """
    return Past(PastPages(store, options or RestoreOptions(), cache_bytes=cache_bytes))


class Past:
    """One position. Its connections share what was fetched; each is for one thread at a time, the Past for all."""

    def __init__(self, pages: PastPages) -> None:
        self.pages = pages
        self._name = _vfs().add(pages)

    @property
    def position(self) -> Position:
        return self.pages.plan.position

    @property
    def reached_ms(self) -> int:
        """Time of the last commit in it, UTC milliseconds since 1970."""
        return self.pages.plan.reached_ms

    @property
    def fetched(self) -> Fetched:
        """What has been asked of the store, from the plan on."""
        return self.pages.fetched

    @property
    def uri(self) -> str:
        """For ATTACH, in a connection to this position or another."""
        return _uri(self._name)

    def connect(self) -> apsw.Connection:
        """A connection that only reads. Tables of its own (``CREATE TEMP TABLE``) live in memory.

        What goes wrong with the store or its objects is raised as itself out of any statement (StoreError, FormatError,
        ChainBroken), what goes wrong in SQLite as apsw.Error; ``explained`` makes one line of the latter.
        """
        connection = apsw.Connection(self.uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        connection.execute("PRAGMA temp_store = memory")
        connection.set_progress_handler(_go_on, _STEPS)
        connection.authorizer = _allowed
        return connection

    def close(self) -> None:
        """Close its connections first: they read nothing after it."""
        _vfs().remove(self._name)
        self.pages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- statements --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The names of the columns in the rows that follow; a new statement gives rows from here on."""

    names: tuple[str, ...]


def run(connection: apsw.Connection, sql: str) -> Iterator[Columns | tuple[Value, ...]]:
    """Run one or several statements, in order: for each that gives columns these, then its rows as they come.

    Raises QueryFailed with what SQLite says, PastIsReadOnly, and what reading the store raises.
    """
    begun: deque[Columns] = deque()
    cursor = connection.cursor()

    def begin(cursor: apsw.Cursor, statement: str, bindings: object) -> bool:
        if names := tuple(name for name, _ in cursor.get_description()):
            begun.append(Columns(names))
        return True

    cursor.exec_trace = begin
    rows: Iterator[tuple[Value, ...]] = cursor
    with explained():
        cursor.execute(sql)
        while True:
            row = next(rows, None)
            while begun:
                yield begun.popleft()
            if row is None:
                return
            yield row


@contextmanager
def explained() -> Iterator[None]:
    """An error of SQLite becomes one of ours. Raises QueryFailed, PastIsReadOnly."""
    try:
        yield
    except (apsw.ReadOnlyError, apsw.AuthError, apsw.CantOpenError) as error:
        raise PastIsReadOnly(
            f"the past can only be read, and no file opened beside it ({error}); restore it to a file to write there"
        ) from error
    except apsw.Error as error:
        raise QueryFailed(f"SQLite cannot do that: {error}") from error
    except UnicodeDecodeError as error:
        raise QueryFailed(
            "a text in the result is not valid UTF-8; select CAST(column AS BLOB) to see its bytes"
        ) from error


def _go_on() -> bool:
    """Called by SQLite in the midst of long work, so that Python gets to raise KeyboardInterrupt."""
    return False


def _allowed(operation: int, name: str | None, value: str | None, *_: str | None) -> int:
    """The authorizer: no file but other images of the past; VACUUM INTO attaches one too, and large sorts stay in memory."""
    other_file = operation == apsw.SQLITE_ATTACH and not (name and _vfs().knows(name))
    temporary_file = operation == apsw.SQLITE_PRAGMA and (name or "").lower() == "temp_store" and value is not None
    return apsw.SQLITE_DENY if other_file or temporary_file else apsw.SQLITE_OK


# -- files -------------------------------------------------------------------------------------------------------------


def _uri(name: str) -> str:
    return f"file:{name}?vfs={_VFS_NAME}&immutable=1&mode=ro"


class _Vfs(apsw.VFS):
    """Gives SQLite the open images as files, by the names that it made for them, and no other file."""

    def __init__(self) -> None:
        super().__init__(_VFS_NAME, "")
        self._images: dict[str, PastPages] = {}

    def add(self, pages: PastPages) -> str:
        name = f"/{pages.plan.position}-{secrets.token_hex(8)}"
        self._images[name] = pages
        return name

    def remove(self, name: str) -> None:
        self._images.pop(name, None)

    def knows(self, uri: str) -> bool:
        return any(uri == _uri(name) for name in list(self._images))

    def xOpen(  # type: ignore[override]  # SQLite takes whatever has the methods
        self, name: apsw.URIFilename | str | None, flags: list[int]
    ) -> _File:
        pages = self._images.get(name.filename()) if isinstance(name, apsw.URIFilename) else None
        if pages is None:
            raise apsw.CantOpenError("the file is not an image of the past")
        return _File(pages)

    def xFullPathname(self, name: str) -> str:
        return name

    def xAccess(self, path: str, flags: int) -> bool:
        return False

    def xDelete(self, path: str, sync: bool) -> None:
        raise apsw.ReadOnlyError("an image of the past")


class _File:
    """An image as SQLite sees it: immutable, and without a WAL, whatever it was at its source."""

    def __init__(self, pages: PastPages) -> None:
        self._pages = pages

    def xRead(self, length: int, offset: int) -> bytes:
        data = self._pages.read(offset, length)
        return _without_wal(data, offset) if offset <= _VERSION_FIELDS[-1] else data

    def xFileSize(self) -> int:
        return self._pages.plan.size_bytes

    def xDeviceCharacteristics(self) -> int:
        return int(apsw.SQLITE_IOCAP_IMMUTABLE)

    def xSectorSize(self) -> int:
        return self._pages.page_size

    def xFileControl(self, operation: int, pointer: int) -> bool:
        return False

    def xCheckReservedLock(self) -> bool:
        return False

    def xLock(self, level: int) -> None:
        pass

    def xUnlock(self, level: int) -> None:
        pass

    def xClose(self) -> None:
        pass


def _without_wal(data: bytes, offset: int) -> bytes:
    """Source: sqlite.org/fileformat2.html, section 1.3.3."""
    patched = bytearray(data)
    for place in _VERSION_FIELDS:
        at = place - offset
        if 0 <= at < len(patched) and patched[at] == _WAL:
            patched[at] = _NO_WAL
    return bytes(patched)


_registered: _Vfs | None = None
_registering = threading.Lock()


def _vfs() -> _Vfs:
    """The one of the process, registered with SQLite at its first use."""
    global _registered
    with _registering:
        if _registered is None:
            _registered = _Vfs()
        return _registered
