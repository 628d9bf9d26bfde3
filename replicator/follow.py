"""``restore --follow``: a copy that is kept up to date with its replica, while others read it.

Owns the copy's folder ``.NAME-following`` (which positions the copy may hold, a lock) and what to fetch next. Every state that readers see
is one that was committed at the source: its checksum is verified before the transaction that makes it is committed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import apsw
import msgspec
import numpy as np

from replicator import chain, durable, failpoints, locks
from replicator.database import FileIdentity
from replicator.errors import (
    DatabaseBusy,
    DatabaseError,
    FormatError,
    NothingToRestore,
    ObjectMissing,
    ReplicatorError,
    RestoreError,
    StateMismatch,
    TargetExists,
    UsageError,
)
from replicator.followed import WRITE_VERSION_AT, FollowedCopy, Pages, WrittenByOthers
from replicator.layout import SegmentRef
from replicator.pagehash import StateHashes, lock_page, page_hash
from replicator.replica import Replica
from replicator.restore import RestoreReport, plan_restore, restore
from replicator.restore_plan import RestoreOptions
from replicator.segment import SegmentReader
from replicator.store import ObjectStore
from replicator.values import Position, format_time

log = logging.getLogger(__name__)

LIST_EVERY_S = 10.0
"""Between two listings of the replica: so late a new timeline is seen, or that the next segment was merged into another."""
MAX_RETRY_S = 30.0
MAX_STEP_SEGMENTS = 100
WAL_VERSIONS = b"\x02\x02"


class Mark(msgspec.Struct, frozen=True):
    """A state of the source that the copy may hold. versions: bytes 18 and 19 of its page 1, which in the copy say "WAL"."""

    timeline: int
    txid: int
    checksum: str
    versions: str
    commit_ms: int


class State(msgspec.Struct, frozen=True):
    """marks: the copy holds one of them. device, inode: of the copy."""

    device: int
    inode: int
    marks: tuple[Mark, ...]
    version: int = 1


@dataclass(frozen=True)
class Followed:
    """How the copy is after a step. changed: by it. lag_s: age of the oldest commit that is known not to be in it; after a change, of
    its last commit; else 0."""

    position: Position
    commit_ms: int
    changed: bool
    lag_s: float


class Follower:
    """``open``, then ``step`` again and again, ``close``; by one thread."""

    def __init__(
        self,
        store: ObjectStore,
        target: Path,
        options: RestoreOptions,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        list_every_s: float = LIST_EVERY_S,
    ) -> None:
        if options.position is not None or options.txid is not None or options.at_ms is not None:
            raise UsageError("a copy that follows is always at the newest position; leave out --txid and --timestamp")
        self._store = store
        self._target = target
        self._options = replace(options, position=None, resume=False)
        self._replica = Replica(store)
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._list_every_s = list_every_s
        self._listed_at: float | None = None
        self._folder = target.with_name(f".{target.name}-following")
        self._lock = -1
        self._copy: FollowedCopy | None = None
        self._mark: Mark | None = None  # None when what the copy holds is not known
        self._hashes = StateHashes()
        self._first_page = b""

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> Position | None:
        """Restore the copy if it is not there, else prove what it holds. Its position, None when all of it is to be compared.

        Raises TargetExists for a file that is none of ours, RestoreError, StoreError, FormatError, DatabaseError.
        """
        if not self._target.parent.is_dir():
            raise RestoreError(f"the directory {self._target.parent} does not exist; create it first")
        durable.make_dirs(self._folder)
        self._take_lock()
        for left in self._folder.glob(".*restoring-*"):
            left.unlink()
        state = self._load()
        if not os.path.lexists(self._target):
            failpoints.reach("before-followed-restore")
            restore(
                self._store,
                self._target,
                replace(self._options, resume=True),
                on_progress=on_progress,
                before_publish=self._before_publish,
            )
            failpoints.reach("after-followed-restore")
            state = self._load()
        found = self._target.lstat()
        if state is None or (state.device, state.inode) != (found.st_dev, found.st_ino):
            raise TargetExists(
                f"{self._target} exists and is no copy that follows; move it away, or follow to another path"
            )
        self._open_copy(state.marks)
        return self._position

    def close(self) -> None:
        self._close_copy()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def step(self) -> Followed:
        """Apply what is new in the replica. Raises DatabaseError when the copy cannot be written now, StoreError,
        RestoreError, FormatError."""
        before = self._mark
        refs = self._next_segments()
        if refs is None:
            self._start_over()
        else:
            try:
                for ref in refs:
                    self._apply(ref)
            except ObjectMissing:  # merged into another since it was seen
                self._listed_at = None
            except (FormatError, StateMismatch, WrittenByOthers) as error:
                log.warning("%s cannot go on with this segment, and is compared as a whole: %s", self._target, error)
                self._start_over()
        mark = self._mark
        assert mark is not None
        changed = mark != before
        lag_s = max(0.0, (self._now_ms() - mark.commit_ms) / 1000) if changed else 0.0
        return Followed(Position(mark.timeline, mark.txid), mark.commit_ms, changed, lag_s)

    # -- what is next --------------------------------------------------------------------------------------------------

    def _next_segments(self) -> list[SegmentRef] | None:
        """What leads on from the copy's state; None when nothing does, and it must be compared.

        Asks for one key, and now and then for all.
        """
        position = self._position
        if position is None:
            return None
        ahead = self._shipped_after(position)
        if ahead:
            return ahead
        now = self._monotonic()
        if self._listed_at is not None and now - self._listed_at < self._list_every_s:
            return []
        timelines, segments = self._replica.timelines(), self._replica.segments()
        newest = chain.newest(timelines, segments, self._options.timeline)
        self._listed_at = now
        if newest == position:
            return []
        found = chain.between(timelines, segments, position, newest)
        return None if found is None else list(found)

    def _shipped_after(self, position: Position) -> list[SegmentRef]:
        found: list[SegmentRef] = []
        txid = position.txid + 1
        while len(found) < MAX_STEP_SEGMENTS:
            ref = SegmentRef(position.timeline, 0, txid, txid)
            try:
                found.append(replace(ref, size_bytes=self._store.head(ref.key).size_bytes))
            except ObjectMissing:
                break
            txid += 1
        return found

    @property
    def _position(self) -> Position | None:
        return None if self._mark is None else Position(self._mark.timeline, self._mark.txid)

    # -- one segment ---------------------------------------------------------------------------------------------------

    def _apply(self, ref: SegmentRef) -> None:
        """One transaction. Pages that the copy has already, as after a kill, are written once more."""
        reader = self._replica.reader(ref)
        header = reader.header
        copy = self._open()
        if header.page_count == 0 or header.page_size != copy.page_size:
            raise StateMismatch(f"{ref.key} has pages of {header.page_size} bytes, the copy of {copy.page_size}")
        verified = _Verified(reader, self._hashes.copy(), self._first_page)
        mark = Mark(
            ref.timeline,
            ref.last,
            f"{header.state_after:016x}",
            verified.versions_of_first().hex(),
            header.last_commit_ms,
        )
        self._put(verified.pages(), header.page_count, mark)
        self._hashes, self._first_page = verified.hashes, verified.first_page

    def _put(self, pages: Pages, page_count: int, mark: Mark) -> None:
        """Whatever happens on the way, the copy then holds the state of one of two marks."""
        copy = self._open()
        held = (self._mark,) if self._mark is not None else ()
        self._save(State(copy.identity.device, copy.identity.inode, (*held, mark)))
        try:
            copy.put(pages, page_count)
        except DatabaseBusy:
            raise
        except DatabaseError:  # whether it got there is not known
            self._mark = None
            raise
        self._mark = mark

    # -- all of it -----------------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        """Restore the newest position beside the copy, and put into it what differs. For a new timeline that left ours behind, a copy that
        somebody has written, another page size."""
        copy = self._open()
        if plan_restore(self._store, self._options).page_size != copy.page_size:
            self._close_for_all()
        try:
            report = restore(self._store, self._scratch, replace(self._options, integrity_check="none"))
            if report.page_count == 0:
                raise NothingToRestore(
                    f"{report.position} is an empty file; the copy stays as it is until there is a database"
                )
            with self._scratch.open("rb") as file:
                first = file.read(report.page_size)
                if report.page_size != copy.page_size:
                    self._replace_all(report, first, copy.identity)
                    return
                self._take_stock(())
                self._put(
                    _differing(file.fileno(), report, self._hashes, first), report.page_count, _mark_of(report, first)
                )
            self._hashes, self._first_page = report.hashes.copy(), first
            log.info("%s was compared as a whole, and holds %s now", self._target, report.position)
        finally:
            self._scratch.unlink(missing_ok=True)
        self._listed_at = None

    def _close_for_all(self) -> None:
        """Before a download that would be in vain: raises DatabaseBusy as long as another program has the copy open."""
        self._close_copy()
        with _alone(self._target):
            pass

    def _replace_all(self, report: RestoreReport, first: bytes, identity: FileIdentity) -> None:
        """A page size changes with the file as a whole, which SQLite does only when nobody else has it open."""
        mark = _mark_of(report, first)
        self._save(State(identity.device, identity.inode, (mark,)))
        self._close_copy()
        with _alone(self._target) as connection:
            _copy_over(connection, self._scratch)
        self._open_copy(())
        self._put(iter([(1, _as_wal(first))]), report.page_count, mark)
        self._take_stock((mark,))
        log.info("%s has pages of %d bytes now, and holds %s", self._target, report.page_size, report.position)

    def _close_copy(self) -> None:
        self._mark = None
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    # -- the copy, and what is known of it -----------------------------------------------------------------------------

    def _open(self) -> FollowedCopy:
        if self._copy is None:
            self._open_copy(())
        assert self._copy is not None
        return self._copy

    def _open_copy(self, marks: tuple[Mark, ...]) -> None:
        with _translated(self._target):
            connection = apsw.Connection(str(self._target), flags=apsw.SQLITE_OPEN_READWRITE)
            try:
                connection.execute("PRAGMA journal_mode=wal").fetchall()  # which it left when all of it was replaced
            finally:
                connection.close()
        self._copy = FollowedCopy(self._target)
        self._take_stock(marks)

    def _take_stock(self, marks: tuple[Mark, ...]) -> None:
        """Read all of the copy, and find which of these states it holds, if any."""
        copy = self._open()
        self._hashes, self._first_page = copy.hashes(), copy.first_page()
        self._mark = None
        for mark in reversed(marks):
            page = _with_versions(self._first_page, bytes.fromhex(mark.versions))
            self._hashes.set(1, page_hash(1, page))
            if f"{self._hashes.checksum:016x}" == mark.checksum:
                self._mark, self._first_page = mark, page
                return
        self._hashes.set(1, page_hash(1, self._first_page))
        if marks:
            log.warning("%s is not as it was left, and is compared as a whole", self._target)

    def _before_publish(self, fd: int, report: RestoreReport) -> None:
        """The new copy is one with a WAL, and known as ours, before it gets its name."""
        if report.page_count == 0:
            raise NothingToRestore(
                f"{report.position} is an empty file, which nobody can follow; wait until there is a database"
            )
        first = os.pread(fd, report.page_size, 0)
        os.pwrite(fd, WAL_VERSIONS, WRITE_VERSION_AT)
        status = os.fstat(fd)
        self._save(State(status.st_dev, status.st_ino, (_mark_of(report, first),)))

    @property
    def _scratch(self) -> Path:
        return self._folder / ".newest.restoring-scratch"  # by this name no replicator takes it for a database

    def _save(self, state: State) -> None:
        durable.write_file(self._folder / "state", msgspec.json.encode(state))

    def _load(self) -> State | None:
        try:
            return msgspec.json.decode((self._folder / "state").read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise RestoreError(
                f"{self._folder}/state is damaged or of another release: {error}; remove the folder and the copy"
            ) from error

    def _take_lock(self) -> None:
        descriptor = locks.take(self._folder / "lock")
        if descriptor is None:
            raise RestoreError(f"another process follows to {self._target}; end that one, or follow to another path")
        self._lock = descriptor


class _Verified:
    """The pages of a segment on top of a state, whose checksum is what the segment says when the last of them has been given."""

    def __init__(self, reader: SegmentReader, hashes: StateHashes, first_page: bytes) -> None:
        self.hashes = hashes
        self.first_page = first_page
        self._reader = reader
        first = reader.page(1)
        if first is not None:
            self.first_page = first

    def versions_of_first(self) -> bytes:
        return self.first_page[WRITE_VERSION_AT : WRITE_VERSION_AT + 2]

    def pages(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """Page 1 is always among them, so that a mere change of size is a transaction too.

        Raises StateMismatch, FormatError, StoreError.
        """
        header = self._reader.header
        self.hashes.resize(header.page_count)
        self.hashes.set(1, page_hash(1, self.first_page))
        yield 1, _as_wal(self.first_page)
        for page_no, data in self._reader.pages():
            if page_no > 1:
                self.hashes.set(page_no, page_hash(page_no, data))
                yield page_no, data
        if self.hashes.checksum != header.state_after:
            raise StateMismatch(
                f"{self._reader.name} leads to the state checksum {self.hashes.checksum:016x}, its source had {header.state_after:016x}"
            )


def _differing(fd: int, report: RestoreReport, known: StateHashes, first: bytes) -> Iterator[tuple[int, bytes]]:
    """Page 1, and the pages of the restored file that are not what is known."""
    yield 1, _as_wal(first)
    differs = np.ones(report.page_count, dtype=np.bool_)
    common = min(report.page_count, known.page_count)
    differs[:common] = report.hashes.hashes[:common] != known.hashes[:common]
    for page_no in (np.flatnonzero(differs) + 1).tolist():
        if page_no not in (1, lock_page(report.page_size)):
            yield page_no, os.pread(fd, report.page_size, (page_no - 1) * report.page_size)


def _mark_of(report: RestoreReport, first: bytes) -> Mark:
    versions = first[WRITE_VERSION_AT : WRITE_VERSION_AT + 2].hex()
    position = report.position
    return Mark(position.timeline, position.txid, f"{report.state_checksum:016x}", versions, report.reached_ms)


def _as_wal(page: bytes) -> bytes:
    return _with_versions(page, WAL_VERSIONS)


def _with_versions(page: bytes, versions: bytes) -> bytes:
    return page[:WRITE_VERSION_AT] + versions + page[WRITE_VERSION_AT + 2 :]


@contextmanager
def _alone(target: Path) -> Iterator[apsw.Connection]:
    """A connection beside which no other has the database open, and which has left the WAL mode. Raises DatabaseBusy."""
    with _translated(target):
        connection = apsw.Connection(str(target), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            if connection.execute("PRAGMA journal_mode=delete").get != "delete":
                raise apsw.BusyError("it stays in WAL mode")
            yield connection
        finally:
            connection.close()


def _copy_over(connection: apsw.Connection, source: Path) -> None:
    """SQLite's own backup, into the same file."""
    name = f"file:{quote(str(source))}?immutable=1"
    origin = apsw.Connection(name, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    try:
        with connection.backup("main", origin, "main") as backup:
            while not backup.done:
                backup.step(-1)
    finally:
        origin.close()


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.BusyError, apsw.LockedError) as error:
        raise DatabaseBusy(
            f"the source of {target} has another page size now, which the copy can get when no program has it open; "
            "until they close it, they see the state before"
        ) from error
    except apsw.Error as error:
        raise DatabaseError(f"{target}: {error}") from error


def follow(
    follower: Follower, interval_s: float, wait: Callable[[float], bool], tell: Callable[[Followed], None]
) -> None:
    """Step until ``wait`` (seconds) says to end. tell: called after each step. What goes wrong meanwhile is said once, and tried again."""
    retry_s, problem = interval_s, ""
    while True:
        try:
            found = follower.step()
        except (TargetExists, UsageError):
            raise
        except (ReplicatorError, OSError) as error:
            if str(error) != problem:
                problem = str(error)
                log.warning("%s", error)
            pause_s = retry_s
            retry_s = min(retry_s * 2, MAX_RETRY_S)
        else:
            if problem:
                log.warning("following goes on")
            retry_s, problem, pause_s = interval_s, "", 0.0 if found.changed else interval_s
            tell(found)
        if wait(pause_s):
            return


def words(found: Followed, target: Path) -> str:
    return f"{target} is at {found.position}, last commit {format_time(found.commit_ms)}, {found.lag_s:.1f} s after it"
