"""The only opener of live databases: read locks, the write barrier, checkpoints, and raw reads of the file and its WAL.

Owns every connection on a database that an application may be using. POSIX locks belong to the process and the inode: closing any
descriptor of a database drops the locks that SQLite holds on it in the same process, those of an application in this very process
too. So only SQLite itself opens and closes the file, which puts off the closing as long as there are locks; raw bytes are read
through its connections. (The ``-wal`` file carries no locks.) Never writes to the database: a checkpoint moves what is in the WAL
already, and the barrier is a transaction that is rolled back.

How the WAL is held still (SQLite's wal.c: walTryBeginRead, walRestartLog, walCheckpoint):

* A reader whose mark is 1-4 stops a writer from restarting the WAL. A reader on mark 0 (the WAL was wholly backfilled when it began) stops
  every backfill, so that after at most one restart no further one can happen.
* The lock goes hand over hand between two connections: the new read transaction begins before the old one ends. As the caller has
  read the WAL to its end since the old one began, the new one gets mark 0 only if there is nothing in the WAL that the caller
  has not read. So a restart is seen at a known position, always.
"""

from __future__ import annotations

import ctypes
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Protocol

import apsw

from replicator import failpoints, wal
from replicator.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseMissing,
    DatabaseNotReplicable,
    NotADatabase,
    WalHeaderDamaged,
)

SQLITE_MAGIC = b"SQLite format 3\x00"
BUSY_TIMEOUT_MS = 1000
BARRIER_TIMEOUT_MS = 250
DRAINS_BEFORE_BARRIER = 6
SHORT_DRAIN_S = 0.01
FINE_TICK_NS, COARSE_TICK_NS = 20_000_000, 2_000_000_000
"""Times of files move on in ticks: of the kernel's clock, or of whole seconds where the file system keeps no fractions."""

_open_inodes: dict[tuple[int, int], Path] = {}
_open_inodes_guard = threading.Lock()


class Journal(Enum):
    WAL = "wal"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class FileIdentity:
    device: int
    inode: int


class Identified(Protocol):
    """What says which file it is of."""

    @property
    def device(self) -> int: ...

    @property
    def inode(self) -> int: ...


@dataclass(frozen=True)
class Checkpoint:
    """complete: everything was backfilled, so the next commit starts the WAL anew. barrier_s: how long no commit could happen.

    rest: the file as it was under the barrier. When complete, SQLite does not write it again as long as our lock is not passed on.
    """

    complete: bool
    barrier_s: float
    rest: FileStamp


@dataclass(frozen=True)
class FileStamp:
    """Changes whenever the file was written, by whatever program: size, times of change, and SQLite's own change counter.

    mtime_ns: of the content, which ``cp -p`` sets back. ctime_ns: of anything, owner and mode too; no program can set it.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    change_counter: bytes

    def same_content(self, other: FileStamp) -> bool:
        """Whether at most owner, mode or names have changed."""
        return replace(self, ctime_ns=other.ctime_ns) == other

    def is_settled(self, now_ns: int) -> bool:
        """Whether every write after ``now_ns`` changes it: one in the tick of the last change would not."""
        return self.settled_in_s(now_ns) == 0

    def settled_in_s(self, now_ns: int) -> float:
        """Seconds after ``now_ns`` until it is settled, if nobody writes; 0 when it is."""
        tick_ns = FINE_TICK_NS if self.ctime_ns % 1_000_000_000 else COARSE_TICK_NS
        return max(0, self.ctime_ns + tick_ns + 1 - now_ns) / 1_000_000_000


def identify(path: Path, within: Path | None = None) -> FileIdentity:
    """within: a folder that it must be in, with no symbolic link on the way: whoever may write there may make one at any moment.

    Raises DatabaseMissing; DatabaseNotReplicable for a symbolic link, beside which SQLite does not keep its WAL; NotADatabase.
    """
    status = _status(path, within)
    if stat.S_ISLNK(status.st_mode):
        raise DatabaseNotReplicable(f"{path} is a symbolic link; replicate the file that it names: {path.resolve()}")
    if not stat.S_ISREG(status.st_mode):
        raise NotADatabase(f"{path} is not a regular file")
    return FileIdentity(status.st_dev, status.st_ino)


def is_as_left(path: Path, within: Path | None, identity: Identified, stamp: FileStamp) -> bool:
    """Whether the database, closed here, is the file that had this settled stamp, and there is nothing in a WAL. Opens nothing."""
    try:
        status = _status(path, within)
        if (status.st_dev, status.st_ino) != (identity.device, identity.inode):
            return False
        if (status.st_size, status.st_mtime_ns, status.st_ctime_ns) != (
            stamp.size_bytes,
            stamp.mtime_ns,
            stamp.ctime_ns,
        ):
            return False
        return not size_of_wal(path)
    except (DatabaseError, OSError):
        return False


def size_of_wal(path: Path) -> int | None:
    """None when there is none."""
    try:
        return Path(f"{path}-wal").stat().st_size
    except FileNotFoundError:
        return None


def _status(path: Path, within: Path | None = None) -> os.stat_result:
    try:
        return path.lstat() if within is None else _status_within(within, path.relative_to(within))
    except (FileNotFoundError, NotADirectoryError):
        link = "" if within is None else " in the folder (behind a symbolic link is nothing of it)"
        raise DatabaseMissing(f"{path}: there is no such file{link if os.path.lexists(path) else ''}") from None
    except OSError as error:
        raise DatabaseError(f"{path}: {error.strerror}; check the permissions") from error


def _status_within(folder: Path, name: Path) -> os.stat_result:
    """Raises OSError; NotADirectoryError for a link on the way."""
    here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in name.parts[:-1]:
            deeper = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = deeper
        return os.stat(name.name, dir_fd=here, follow_symlinks=False)
    finally:
        os.close(here)


class LiveDatabase:
    """One database that an application may be writing. Used by one thread at a time; ``close`` when done."""

    def __init__(self, path: Path, within: Path | None = None) -> None:
        """Opens it. within: as for ``identify``. Raises DatabaseError and its subclasses; an empty file is NotADatabase."""
        self.path = path
        self.within = within
        self.identity = identify(path, within)
        self._wal_file = -1
        self._connections: list[apsw.Connection] = []
        self._register()
        try:
            self._check_magic()
            with translated(path):
                self._connections = [self._connect(), self._connect()]
                self._holder, self._spare = self._connections
                mode = str(self._holder.execute("PRAGMA journal_mode").get)
                self.page_size = int(self._holder.execute("PRAGMA page_size").get)
            self.journal = Journal.WAL if mode == "wal" else Journal.ROLLBACK
            if not self.still_at_path():
                raise DatabaseBusy(f"{path} was replaced while it was opened; trying again")
        except BaseException:
            self.close()
            raise

    def close(self, *, checkpoint: bool = True) -> None:
        """Ends everything. SQLite itself checkpoints, as the last connection of a database does, and deletes the WAL by its name.

        So not when somebody has put another WAL there, which is an application's. checkpoint: False to leave file and WAL as they are.
        """
        if not checkpoint or (not self.wal_is_ours() and Path(f"{self.path}-wal").exists()):
            for connection in self._connections:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        for connection in self._connections:
            try:
                connection.close(True)
            except apsw.Error:  # a checkpoint at close that fails leaves the WAL as it is, which is just as good
                connection.close(True)
        self._connections = []
        if self._wal_file >= 0:
            os.close(self._wal_file)
        self._wal_file = -1
        with _open_inodes_guard:
            _open_inodes.pop((self.identity.device, self.identity.inode), None)

    def still_at_path(self) -> bool:
        """Whether the path still names the file that is open here."""
        try:
            return identify(self.path, self.within) == self.identity
        except (DatabaseMissing, DatabaseNotReplicable, NotADatabase):
            return False

    # -- read lock -----------------------------------------------------------------------------------------------------

    @property
    def holds_lock(self) -> bool:
        return bool(self._connections) and self._holder.in_transaction

    def acquire(self) -> None:
        """Begin the first read transaction. From here on the WAL holds still, or, without a WAL, nobody commits. Raises DatabaseBusy."""
        with translated(self.path):
            _begin_read(self._holder)
            self.page_size = int(
                self._holder.execute("PRAGMA page_size").get
            )  # VACUUM changes it, where there is no WAL
        if self.journal is Journal.WAL and self._wal_file < 0:
            self._wal_file = self._open_wal()

    def release(self) -> None:
        """End the read transaction; what happens to the WAL from here on is not known."""
        with translated(self.path):
            _end(self._holder)

    def pass_lock(self) -> None:
        """Begin a new read transaction at the newest commit, then end the old one.

        Only when the WAL was read to its end since the last ``acquire`` or ``pass_lock``; see the head of this file.
        """
        with translated(self.path):
            _begin_read(self._spare)
            _end(self._holder)
        self._holder, self._spare = self._spare, self._holder

    def checkpoint(self, drain: Callable[[], None]) -> Checkpoint:
        """Backfill the whole WAL, so that the next commit starts it anew at a position that is known.

        drain: reads the WAL to its end and keeps what is in it; called without the barrier and again under it. No commit of an
        application can happen under the barrier, which is held for the last few frames only. Raises DatabaseBusy when an application
        holds the write lock for longer than BARRIER_TIMEOUT_MS; nothing is lost then.
        """
        drain()
        self.pass_lock()
        _until_short(drain)
        # When an application is at it, it does the bulk; in mode FULL it may have waited for the lock that was just passed on.
        with suppress(DatabaseBusy), translated(self.path):
            self._spare.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        failpoints.reach("before-checkpoint")
        with self._barrier() as since:
            drain()
            self.pass_lock()
            with translated(self.path):
                frames, backfilled = self._spare.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            failpoints.reach("under-barrier")
            self.pass_lock()
            rest = self.stamp()
        held_s = time.monotonic() - since
        failpoints.reach("after-checkpoint")
        return Checkpoint(complete=frames == backfilled, barrier_s=held_s, rest=rest)

    def truncate_wal(self) -> bool:
        """After a complete checkpoint: cut the WAL to nothing, if no commit has come and nobody reads. True when that was done.

        For a database that no application has open. As long as we hold it, SQLite does not delete its WAL when the application goes;
        whoever then put another file in its place would have the frames of the old one applied to it.
        """
        self._spare.set_busy_timeout(0)  # while it waits for readers, no commit can happen
        try:
            with translated(self.path):
                self._spare.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except DatabaseBusy:
            return False
        finally:
            self._spare.set_busy_timeout(BUSY_TIMEOUT_MS)
        return True

    def is_alone(self) -> bool:
        """Whether nobody else has it open. For choices of cost, not of safety.

        Not another process, as far as the kernel's list of locks tells: in WAL mode a connection holds a shared lock on the file as long as
        it lives. Nor this one, whose locks cannot be told from ours.
        """
        if any(_opens(connection, self._holder.filename) for connection in _others(self._connections)):
            return False
        inode = f":{self.identity.inode}"
        try:
            lines = Path("/proc/locks").read_text().splitlines()
        except OSError:
            return False
        holders = (line.split() for line in lines if inode in line)
        return not any(words[-3].endswith(inode) and words[-4] != str(os.getpid()) for words in holders)

    @contextmanager
    def _barrier(self) -> Iterator[float]:
        with translated(self.path):
            if len(self._connections) == 2:
                self._connections.append(self._connect())
            barrier = self._connections[2]
            barrier.set_busy_timeout(BARRIER_TIMEOUT_MS)
            barrier.execute("BEGIN IMMEDIATE")
        try:
            yield time.monotonic()
        finally:
            barrier.execute("ROLLBACK")

    # -- raw reads -----------------------------------------------------------------------------------------------------

    def wal_size(self) -> int:
        return os.fstat(self._wal_file).st_size if self._wal_file >= 0 else 0

    def read_wal(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes of the WAL from ``offset``; fewer at its end."""
        return _read(self._wal_file, offset, length, self.path) if self._wal_file >= 0 else b""

    def wal_header(self) -> wal.WalHeader | None:
        """The WAL's header; None while nothing was written to it."""
        data = self.read_wal(0, wal.HEADER_SIZE)
        if len(data) < wal.HEADER_SIZE:
            return None
        try:
            return wal.parse_header(data)
        except WalHeaderDamaged:
            # A header is being written at this moment, or was torn by a crash; SQLite ignores such a WAL.
            return None

    def has_wal(self) -> bool:
        """Whether there is a WAL at its path; after a ``close``, if somebody else has the database open."""
        return size_of_wal(self.path) is not None

    def wal_is_ours(self) -> bool:
        """Whether the path of the WAL still names the file that is open here; SQLite never replaces it while a connection is open."""
        if self._wal_file < 0:
            return True
        try:
            at_path = Path(f"{self.path}-wal").stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(self._wal_file)
        return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)

    def wal_mtime_ms(self) -> int:
        """When the WAL was written last, UTC milliseconds since 1970."""
        return os.fstat(self._wal_file).st_mtime_ns // 1_000_000

    def wal_progress(self) -> tuple[int, int]:
        """(committed frames, those of them that are in the database file already) of this generation of the WAL; (0, 0) without one."""
        if self.journal is Journal.ROLLBACK:
            return 0, 0
        with translated(self.path):
            frames, backfilled = self._spare.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        return max(0, frames), max(0, backfilled)

    def committed_frames(self) -> int:
        """Frames of committed transactions in this generation of the WAL, by SQLite's own account; 0 without a WAL."""
        return self.wal_progress()[0]

    def in_wal_mode(self) -> bool:
        """Asked again, since an application can switch while no read lock is held."""
        with translated(self.path):
            return str(self._holder.execute("PRAGMA journal_mode").get) == "wal"

    def committed_page_count(self) -> int:
        """The size of the database in pages, as the read transaction sees it."""
        with translated(self.path):
            return int(self._holder.execute("PRAGMA page_count").get)

    def read_pages(self, first_page_no: int, count: int) -> bytes:
        """``count`` pages of the database file; beyond its end they are zeros, as SQLite has it."""
        return self._read_file((first_page_no - 1) * self.page_size, count * self.page_size)

    def stamp(self) -> FileStamp:
        """Raises DatabaseMissing."""
        status = _status(self.path)
        return FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, self._read_file(24, 4))

    def settled_stamp(self) -> FileStamp | None:
        """None when the file changed so lately that one more write might not show. Raises DatabaseMissing."""
        stamp = self.stamp()
        return stamp if stamp.is_settled(time.time_ns()) else None

    def _read_file(self, offset: int, length: int) -> bytes:
        """Bytes of the database file; zeros beyond its end."""
        with translated(self.path):
            _, data = self._holder.read("main", 0, offset, length)
        return bytes(data)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        key = (self.identity.device, self.identity.inode)
        with _open_inodes_guard:
            other = _open_inodes.get(key)
            if other is not None:
                raise DatabaseNotReplicable(
                    f"{self.path} is the same file as {other}, which is replicated already; drop one"
                )
            _open_inodes[key] = self.path

    def _check_magic(self) -> None:
        try:
            head = _first_bytes(self.path)
        except apsw.Error as error:
            raise DatabaseError(f"{self.path} cannot be opened: {error}; check the permissions") from error
        except UnicodeError:
            raise DatabaseNotReplicable(f"{self.path!r}: its name is not valid UTF-8, which SQLite needs") from None
        if head != SQLITE_MAGIC:
            what = "is empty" if not head else "is not an SQLite database (or is encrypted as a whole)"
            raise NotADatabase(f"{self.path} {what}")

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.wal_autocheckpoint(0)
        try:
            self._check_opened(connection, apsw.SQLITE_FCNTL_FILE_POINTER, self.identity)
            connection.execute("PRAGMA journal_mode").fetchall()  # a connection learns of the WAL by its first read
            self._check_opened(connection, apsw.SQLITE_FCNTL_JOURNAL_POINTER, None)
        except BaseException:
            connection.close(True)
            raise
        return connection

    def _check_opened(self, connection: apsw.Connection, which: int, identity: FileIdentity | None) -> None:
        """What SQLite has open must be what is in the folder: a link that was there for a moment led to anybody's database.

        identity: None for the WAL that is at its path now.
        """
        descriptor = _descriptor(connection, which) if self.within else None
        if descriptor is None:  # there need be no WAL
            return
        opened = os.fstat(descriptor)
        expected = identity or identify(self.path.with_name(f"{self.path.name}-wal"), self.within)
        if FileIdentity(opened.st_dev, opened.st_ino) != expected:
            raise DatabaseBusy(f"{self.path} was replaced while it was opened; trying again")

    def _open_wal(self) -> int:
        """The file that SQLite itself has open, whatever its path leads to by now."""
        descriptor = _descriptor(self._holder, apsw.SQLITE_FCNTL_JOURNAL_POINTER)
        if descriptor is None:
            raise DatabaseNotReplicable(f"{self.path}-wal is not open in SQLite; its WAL cannot be read")
        try:
            return os.dup(descriptor)
        except OSError as error:
            raise DatabaseError(f"{self.path}-wal cannot be read: {error.strerror}") from error


def _descriptor(connection: apsw.Connection, which: int) -> int | None:
    """The descriptor of the database or of the WAL that a connection has open; None while there is no WAL.

    Source: struct unixFile of SQLite's os_unix.c begins with three pointers and the descriptor.
    """
    file = ctypes.c_void_p()
    connection.file_control("main", which, ctypes.addressof(file))
    methods = ctypes.cast(file, ctypes.POINTER(ctypes.c_void_p)).contents if file else None
    if not methods:  # not opened
        return None
    assert file.value is not None
    at = file.value + 3 * ctypes.sizeof(ctypes.c_void_p)
    return ctypes.c_int.from_address(at).value


def begins_as_database(path: Path) -> bool:
    """Whether a file begins as an SQLite database does. Drops no lock of this process.

    Raises what ``identify`` does; DatabaseNotReplicable for a name that SQLite cannot use; DatabaseError when it cannot be read.
    """
    identify(path)
    try:
        return _first_bytes(path) == SQLITE_MAGIC
    except apsw.Error as error:
        identify(path)
        raise DatabaseError(f"{path} cannot be opened: {error}; check the permissions") from error
    except UnicodeError:
        if _plain_first_bytes(path) == SQLITE_MAGIC:
            raise DatabaseNotReplicable(f"{path}: its name is not valid UTF-8, which SQLite needs; rename it") from None
        return False


def _plain_first_bytes(path: Path) -> bytes:
    """Of a file that SQLite cannot name. By another name it may be open here, and then it is left alone."""
    with _open_inodes_guard:
        identity = identify(path)
        if (identity.device, identity.inode) in _open_inodes:
            return b""
        try:
            with path.open("rb") as file:
                return file.read(len(SQLITE_MAGIC))
        except OSError as error:
            raise DatabaseError(f"{path} cannot be opened: {error.strerror}; check the permissions") from error


def _first_bytes(path: Path) -> bytes:
    """Through SQLite's own layer, since closing a descriptor of our own would drop the locks that SQLite holds on the file."""
    file = apsw.VFSFile("", str(path), [apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READONLY, 0])
    try:
        return bytes(file.xRead(len(SQLITE_MAGIC), 0))
    finally:
        file.xClose()


def _others(ours: list[apsw.Connection]) -> Iterator[apsw.Connection]:
    """The connections of this process that are not among these."""
    known = set(map(id, ours))
    return (connection for connection in apsw.connections() if id(connection) not in known)


def _opens(connection: apsw.Connection, file_name: str) -> bool:
    try:
        return connection.filename == file_name
    except apsw.Error:  # closed meanwhile, by the thread that uses it
        return False


def _until_short(drain: Callable[[], None]) -> None:
    """What came during one takes the next, so that little is left for the one under the barrier."""
    for _ in range(DRAINS_BEFORE_BARRIER):
        began = time.monotonic()
        drain()
        if time.monotonic() - began < SHORT_DRAIN_S:
            return


def _begin_read(connection: apsw.Connection) -> None:
    if connection.in_transaction:
        return
    connection.execute("BEGIN")
    try:
        connection.execute("PRAGMA schema_version").fetchall()
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _end(connection: apsw.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _read(descriptor: int, offset: int, length: int, path: Path) -> bytes:
    try:
        data = os.pread(descriptor, length, offset)
        while 0 < len(data) < length:
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data
    except OSError as error:
        raise DatabaseError(f"{path}: {error.strerror} while reading at byte {offset}; check the disk") from error


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """apsw's exceptions as ours."""
    try:
        yield
    except (apsw.BusyError, apsw.LockedError) as error:
        raise DatabaseBusy(
            f"{path} is locked by another program (a long transaction, or PRAGMA locking_mode=EXCLUSIVE, beside which nobody "
            "can read it); trying again"
        ) from error
    except apsw.NotADBError as error:
        raise NotADatabase(f"{path} is not an SQLite database (or is encrypted as a whole)") from error
    except apsw.CantOpenError as error:
        raise DatabaseError(
            f"{path} cannot be opened: {error}; check the permissions of the file and its folder"
        ) from error
    except apsw.Error as error:
        raise DatabaseError(f"{path}: {error}") from error
