"""Restore: a position of a replica becomes a new database file, verified, or nothing becomes of it.

Owns the file until it has its name. It never overwrites a file, and never leaves one that was not verified to the last
page.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

import apsw
import numpy as np
from numpy.typing import NDArray

from replicator import chain
from replicator.durable import fsync_dir
from replicator.errors import (
    ChainBroken,
    FormatError,
    IntegrityCheckFailed,
    NoRoom,
    NothingToRestore,
    ObjectMissing,
    ReplicatorError,
    RestoreError,
    SegmentDamaged,
    StateMismatch,
    StoreError,
    TargetExists,
    UsageError,
)
from replicator.layout import SegmentRef
from replicator.pagehash import StateHashes, hash_pages, page_hash
from replicator.partial import JOURNAL_SUFFIX, Partial, take_journal
from replicator.replica import Replica, open_segment
from replicator.segment import Group, ReadAt, SegmentReader
from replicator.store import ObjectStore
from replicator.values import Position, Timeline, format_size

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""(bytes done, bytes in all), of the segments as they are stored. Called from the thread that restores."""

IntegrityCheck = Literal["none", "quick", "full"]
PRAGMAS = {"quick": "quick_check", "full": "integrity_check"}

MAX_LISTINGS = 10
"""So often a restore lists the replica, when objects that were listed are gone."""

_T = TypeVar("_T")

_WHOLE_BYTES = 1 << 20  # a segment up to this size is fetched by one request
_FETCH_BYTES = 2 << 20  # of a larger one, neighbouring groups up to this size are
_READ_BACK_BYTES = 4 << 20
_SIDE_FILES = ("", "-wal", "-journal", "-shm")


@dataclass(frozen=True)
class RestoreOptions:
    """What to restore, and how. At most one of position, txid and at_ms; with none of them, the newest position.

    txid, at_ms: on ``timeline`` or its ancestors before it left them; on the newest timeline if none is named. at_ms:
    UTC milliseconds since 1970, the last commit at or before it. parallelism: downloads at once. mode: of the restored
    file; 0600 if none is given, since a database may hold secrets. owner: its user and group; if this process may not give
    it to them, it stays with the process's own, and nobody else may read it. resume: what is there when the store fails or
    the process is killed stays, and the next restore to the same target that says so goes on with it.
    """

    position: Position | None = None
    txid: int | None = None
    timeline: int | None = None
    at_ms: int | None = None
    parallelism: int = 8
    integrity_check: IntegrityCheck = "quick"
    mode: int | None = None
    owner: tuple[int, int] | None = None
    resume: bool = False


@dataclass(frozen=True)
class RestorePlan:
    """What a restore would do. reached_ms: time of the last commit in it. segments: in the order of their txids.

    download_bytes: of the segments, an upper bound of what is fetched. size_bytes, state_checksum: of the database that
    they give; database: its id.
    """

    position: Position
    reached_ms: int
    segments: tuple[SegmentRef, ...]
    download_bytes: int
    page_size: int
    page_count: int
    size_bytes: int
    state_checksum: int
    database: str


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did. hashes: of every page, for a writer that goes on from here.

    size_bytes: of the database. downloaded_bytes: of segments.
    """

    position: Position
    reached_ms: int
    page_size: int
    page_count: int
    size_bytes: int
    state_checksum: int
    hashes: StateHashes = field(repr=False, compare=False)
    took_s: float
    downloaded_bytes: int
    segments: int


def plan_restore(store: ObjectStore, options: RestoreOptions) -> RestorePlan:
    """What ``restore`` would do now. Raises NothingToRestore, ChainBroken, SegmentDamaged, StoreError, UsageError."""
    check_options(options)
    return with_fallback(Replica(store), options, lambda plan: plan)


def restore(
    store: ObjectStore,
    target: Path,
    options: RestoreOptions = RestoreOptions(),
    *,
    on_progress: OnProgress | None = None,
    before_publish: Callable[[int, RestoreReport], None] = lambda fd, report: None,
    unusable: dict[str, ReplicatorError] | None = None,
) -> RestoreReport:
    """Write the state at a position of the replica in ``store`` to the new file ``target``, durably.

    It is equal, page for page, to what was committed at the source: chain, checksums of the segments and the state
    checksum of the finished file are verified before the file gets its name. Otherwise nothing is left at the target.
    A segment that is damaged, or vanishes meanwhile, is passed over with a warning when others lead to the position; what
    was downloaded before is not downloaded again.
    before_publish: called with the descriptor of the finished file before it gets its name. unusable: as for ``with_fallback``.
    Raises TargetExists before anything is downloaded, RestoreError and its other subclasses, FormatError, StoreError.
    """
    started = time.monotonic()
    check_options(options)
    check_target(target)
    replica = Replica(store)
    with _file_for(target, options) as file:

        def attempt(plan: RestorePlan) -> RestoreReport:
            return _fill(replica, plan, file, options, started, on_progress or (lambda done, total: None))

        report = with_fallback(replica, options, attempt, unusable)
        before_publish(file.fd, report)
    return report


def restore_nowhere(
    store: ObjectStore, options: RestoreOptions, *, unusable: dict[str, ReplicatorError] | None = None
) -> RestoreReport:
    """Fetch and verify what ``restore`` would, without a file: every page counts in the state checksum, and is let go.

    SQLite's own check is left out. Raises what ``restore`` raises of the replica.
    """
    started = time.monotonic()
    check_options(options)
    replica = Replica(store)
    fd = os.memfd_create("replicator", os.MFD_CLOEXEC)  # stays as empty as it is; only its size changes
    file = _File(fd, Path(f"/proc/self/fd/{fd}"), Partial(fd))
    tally = _Tally()

    def attempt(plan: RestorePlan) -> RestoreReport:
        file.partial.prepare(plan.database, plan.page_size, plan.page_count)
        tally.hashes.resize(plan.page_count)
        assembly = _Assembly(store, plan, file, options.parallelism, lambda done, total: None, tally.take)
        assembly.run()
        _check_state(plan, tally.hashes)
        return _report(plan, tally.hashes, assembly, started)

    try:
        return with_fallback(replica, options, attempt, unusable)
    finally:
        os.close(fd)


class _Tally:
    """Hashes of pages that come in any order, from several threads."""

    def __init__(self) -> None:
        self.hashes = StateHashes()
        self._guard = threading.Lock()

    def take(self, pages: list[tuple[int, memoryview]]) -> None:
        found = np.fromiter((page_hash(page_no, data) for page_no, data in pages), np.uint64, len(pages))
        page_nos = np.fromiter((page_no for page_no, _ in pages), np.uint32, len(pages))
        with self._guard:
            self.hashes.set_many(page_nos, found)


# -- which segments ----------------------------------------------------------------------------------------------------


class Unusable(Exception):
    """A segment cannot be used; another plan may do without it. Raised in ``blaming``, handled by ``with_fallback``."""

    def __init__(self, ref: SegmentRef, error: ReplicatorError) -> None:
        super().__init__(str(error))
        self.ref = ref
        self.error = error


@contextmanager
def blaming(ref: SegmentRef) -> Iterator[None]:
    """What goes wrong inside is a fault of this segment."""
    try:
        yield
    except (FormatError, ObjectMissing, ChainBroken) as error:
        raise Unusable(ref, error) from error


def with_fallback(
    replica: Replica,
    options: RestoreOptions,
    act: Callable[[RestorePlan], _T],
    unusable: dict[str, ReplicatorError] | None = None,
) -> _T:
    """``act`` on the plan, and when a segment in it proves unusable, on one without that segment.

    The target stays what was asked for: a segment that cannot be used never makes it an earlier one. An object that
    was listed and is gone (a merge or retention did that) is reason to list again, a few times: while many are merged, the next
    may be gone as well. unusable: keys of segments that are not to be used and why; those that are found are added.
    """
    unusable = {} if unusable is None else unusable
    listings = 1
    while True:
        try:
            return act(_resolve(replica, options, unusable))
        except Unusable as failed:
            if isinstance(failed.error, ObjectMissing):
                if listings == MAX_LISTINGS:
                    raise failed.error from None
                listings += 1
            unusable[failed.ref.key] = failed.error
            log.warning("looking for a way around a segment: %s", failed.error)
        except ObjectMissing as error:
            if listings == MAX_LISTINGS:
                raise
            listings += 1
            log.warning("the replica changed meanwhile, it is listed again: %s", error)
        except (ChainBroken, NothingToRestore) as broken:
            if not unusable:
                raise
            first = next(iter(unusable.values()))
            raise type(first)(f"{first}; without it, {broken}") from first


def _resolve(replica: Replica, options: RestoreOptions, unusable: dict[str, ReplicatorError]) -> RestorePlan:
    timelines, segments = replica.timelines(), replica.segments()
    target = _target(replica, timelines, segments, options)
    found = chain.plan(timelines, [ref for ref in segments if ref.key not in unusable], target)
    last = found.segments[-1]
    with blaming(last):
        header = replica.header(last)
        record = timelines.get(last.timeline)
        if record is not None and record.database != header.database:
            raise SegmentDamaged(f"{last.key} is damaged: it belongs to another database; it was copied to this place")
    return RestorePlan(
        position=Position(last.timeline, last.last),
        reached_ms=header.last_commit_ms,
        segments=found.segments,
        download_bytes=found.size_bytes,
        page_size=header.page_size,
        page_count=header.page_count,
        size_bytes=header.page_size * header.page_count,
        state_checksum=header.state_after,
        database=header.database,
    )


def _target(
    replica: Replica, timelines: dict[int, Timeline], segments: list[SegmentRef], options: RestoreOptions
) -> Position:
    if options.position is not None:
        return options.position
    if options.at_ms is not None:
        return replica.find_position(timelines, segments, options.at_ms, options.timeline)[0]
    if options.txid is not None:
        timeline = options.timeline
        return Position(chain.newest(timelines, segments).timeline if timeline is None else timeline, options.txid)
    newest = chain.newest(timelines, segments, options.timeline)
    stranded = sum(ref.timeline >= newest.timeline and ref.last > newest.txid for ref in segments)
    if stranded:
        log.warning("%d segments after %s do not follow from it and are left out; see the history", stranded, newest)
    return newest


def check_options(options: RestoreOptions) -> None:
    if sum(wish is not None for wish in (options.position, options.txid, options.at_ms)) > 1:
        raise UsageError("a restore has one target; give a position, a txid or a time, not several of them")
    if options.position is not None and options.timeline is not None:
        raise UsageError("a position names its timeline; leave out the timeline")
    if options.parallelism < 1:
        raise UsageError(f"parallelism is {options.parallelism}; it must be 1 or more")


# -- the file ----------------------------------------------------------------------------------------------------------


def check_target(target: Path) -> None:
    """Raises TargetExists when something is there or beside it, RestoreError when its folder is not there.

    Mentions what other restores to it have left behind.
    """
    _check_free(target)
    _mention_leftovers(target)


def _check_free(target: Path) -> None:
    if not target.parent.is_dir():
        raise RestoreError(f"the directory {target.parent} does not exist; create it first")
    for suffix in _SIDE_FILES:
        there = target.with_name(target.name + suffix)
        if os.path.lexists(there):
            raise TargetExists(f"{there} exists; move it away, or restore to another path")


def _temporary_prefix(target: Path) -> str:
    return f".{target.name[:200]}.restoring-"


def _kept_file(target: Path) -> Path:
    """What a restore that may be resumed writes, until it has its name; its journal is beside it."""
    return target.with_name(f"{_temporary_prefix(target)}partial")


def _journal_of(kept: Path) -> Path:
    return kept.with_name(kept.name + JOURNAL_SUFFIX)


def _mention_leftovers(target: Path) -> None:
    prefix, kept = _temporary_prefix(target), _kept_file(target)
    ours = {kept.name, _journal_of(kept).name}
    left = sorted(
        path.name for path in target.parent.iterdir() if path.name.startswith(prefix) and path.name not in ours
    )
    if left:
        log.warning(
            "files of other restores that run or were killed are in %s: %s; remove those that no process writes",
            target.parent,
            ", ".join(left),
        )


def check_space(folder: Path, needed_bytes: int, there_bytes: int = 0) -> None:
    """there_bytes: what of it is on the disk already. Raises NoRoom."""
    found = os.statvfs(folder)
    available_bytes = found.f_bavail * found.f_frsize
    if needed_bytes - there_bytes > available_bytes:
        raise NoRoom(
            f"the restored database needs {format_size(needed_bytes)} in {folder}, where {format_size(available_bytes)} are free; "
            "make room, or restore to another file system"
        )


@dataclass(frozen=True)
class _File:
    """What becomes the restored database."""

    fd: int
    path: Path
    partial: Partial


@contextmanager
def _file_for(target: Path, options: RestoreOptions) -> Iterator[_File]:
    if options.resume:
        with _kept_database(target, options) as file:
            yield file
    else:
        with new_database(target, options.mode, options.owner) as (fd, path):
            yield _File(fd, path, Partial(fd))


@contextmanager
def _kept_database(target: Path, options: RestoreOptions) -> Iterator[_File]:
    """As ``new_database``; but when the store fails, the disk is full or somebody interrupts, what is there is left for the next."""
    path = _kept_file(target)
    journal = _journal_of(path)
    is_begun = False
    try:
        journal_fd = take_journal(journal)
        try:
            with _given_name(target, path, options.mode, options.owner) as fd:
                partial = Partial(fd, journal_fd)
                if partial.is_inherited:
                    log.warning("going on with what an interrupted restore left in %s", path)
                try:
                    yield _File(fd, path, partial)
                finally:
                    is_begun = partial.is_begun
        except BaseException as error:
            is_for_now = isinstance(error, (StoreError, NoRoom)) and not isinstance(error, FormatError)
            is_final = isinstance(error, ReplicatorError) and not is_for_now
            if is_final or not is_begun:
                _remove(path, journal)
            else:
                log.warning(
                    "what was downloaded is kept in %s; the same restore goes on from there, or remove it", path
                )
            raise
        finally:
            if not path.exists():
                _remove(journal)
            os.close(journal_fd)
    except OSError as error:
        raise _unwritable(target, error) from error


@contextmanager
def new_database(target: Path, mode: int | None, owner: tuple[int, int] | None = None) -> Iterator[tuple[int, Path]]:
    """Descriptor and path of an empty file that is given the name ``target``, durably, when the block ends without an error.

    Otherwise nothing is left of it. Raises TargetExists, and RestoreError for any OSError.
    """
    temporary = target.with_name(_temporary_prefix(target) + secrets.token_hex(8))
    try:
        with _given_name(target, temporary, mode, owner, os.O_EXCL) as fd:
            yield fd, temporary
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        _remove(temporary)


@contextmanager
def _given_name(
    target: Path, temporary: Path, mode: int | None, owner: tuple[int, int] | None, flags: int = 0
) -> Iterator[int]:
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        yield fd
        _give_to(fd, target, 0o600 if mode is None else mode, owner)
        os.fsync(fd)
    finally:
        os.close(fd)
    _publish(temporary, target)


def _give_to(fd: int, target: Path, mode: int, owner: tuple[int, int] | None) -> None:
    """Rights that were meant for another owner's group are not given to this process's."""
    found = os.fstat(fd)
    if owner is not None and owner != (found.st_uid, found.st_gid):
        try:
            os.fchown(fd, *owner)
        except PermissionError:
            log.warning(
                "%s cannot be given to %d:%d, which owned it, by this user; only its owner may read it", target, *owner
            )
            mode &= 0o700
    os.fchmod(fd, mode)


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()


def _unwritable(target: Path, error: OSError) -> RestoreError:
    return RestoreError(f"{target} cannot be written: {error.strerror or error}")


def _fill(
    replica: Replica,
    plan: RestorePlan,
    file: _File,
    options: RestoreOptions,
    started: float,
    on_progress: OnProgress,
) -> RestoreReport:
    check_space(file.path.parent, plan.size_bytes, os.fstat(file.fd).st_blocks * 512)
    file.partial.prepare(plan.database, plan.page_size, plan.page_count)
    assembly = _Assembly(replica.store, plan, file, options.parallelism, on_progress)
    assembly.run()
    try:
        hashes = _read_back(file.fd, plan, options.parallelism)
    except StateMismatch as mismatch:
        if not file.partial.is_inherited:
            raise
        log.warning(
            "what an interrupted restore left in %s is not as it was written, and is downloaded anew: %s",
            file.path,
            mismatch,
        )
        file.partial.forget()
        return _fill(replica, plan, file, options, started, on_progress)
    _check_integrity(file.path, plan, options.integrity_check)
    return _report(plan, hashes, assembly, started)


def _report(plan: RestorePlan, hashes: StateHashes, assembly: _Assembly, started: float) -> RestoreReport:
    return RestoreReport(
        position=plan.position,
        reached_ms=plan.reached_ms,
        page_size=plan.page_size,
        page_count=plan.page_count,
        size_bytes=plan.size_bytes,
        state_checksum=hashes.checksum,
        hashes=hashes,
        took_s=time.monotonic() - started,
        downloaded_bytes=assembly.downloaded_bytes,
        segments=len(plan.segments),
    )


def _read_back(fd: int, plan: RestorePlan, parallelism: int) -> StateHashes:
    """The page hashes of the finished file. Raises StateMismatch unless they make the state that was recorded."""
    size_bytes = os.fstat(fd).st_size
    if size_bytes != plan.size_bytes:
        raise StateMismatch(f"the restored file has {size_bytes} bytes instead of {plan.size_bytes}")
    hashes = StateHashes(plan.page_count)
    page_size = plan.page_size

    def hash_at(offset: int) -> tuple[int, NDArray[np.uint64]]:
        first_page_no = offset // page_size + 1
        data = os.pread(fd, min(_READ_BACK_BYTES, size_bytes - offset), offset)
        return first_page_no, hash_pages(first_page_no, data, page_size)

    with ThreadPoolExecutor(parallelism, "read-back") as pool:
        for first_page_no, found in pool.map(hash_at, range(0, size_bytes, _READ_BACK_BYTES)):
            hashes.set_range(first_page_no, found)
    _check_state(plan, hashes)
    return hashes


def _check_state(plan: RestorePlan, hashes: StateHashes) -> None:
    if hashes.checksum != plan.state_checksum:
        raise StateMismatch(
            f"the pages of {plan.position} have the state checksum {hashes.checksum:016x}, the source had "
            f"{plan.state_checksum:016x}; the result was thrown away, restore another position"
        )


def _check_integrity(path: Path, plan: RestorePlan, check: IntegrityCheck) -> None:
    if plan.page_count == 0:
        return
    complaints = integrity_complaints(path, check, str(plan.position))
    if complaints:
        raise IntegrityCheckFailed(
            f"{plan.position} was restored as it was at its source, but {PRAGMAS[check]} finds: {'; '.join(complaints)}; "
            "restore an earlier position, or leave the check out to get the file as it is"
        )


def integrity_complaints(path: Path, check: IntegrityCheck, what: str) -> list[str]:
    """What SQLite finds wrong with a new file. what: it is, for a warning when SQLite cannot check it here.

    The file has no WAL beside it and nobody else has it open, hence ``immutable``.
    """
    if check == "none":
        return []
    pragma = PRAGMAS[check]
    try:
        connection = apsw.Connection(
            f"file:{quote(str(path.absolute()))}?immutable=1", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        )
        try:
            complaints = [str(row[0]) for row in connection.execute(f"PRAGMA {pragma}(10)")]
        finally:
            connection.close()
    except (apsw.CorruptError, apsw.NotADBError) as error:
        complaints = [str(error)]
    except apsw.SQLError as error:
        # The schema needs a collation or function that only the app has. The checksums have proven the pages already.
        log.warning("SQLite cannot run %s on %s here and the check is left out: %s", pragma, what, error)
        return []
    return [] if complaints == ["ok"] else complaints


def _publish(temporary: Path, target: Path) -> None:
    """Give the file its name, durably, unless something took the name meanwhile."""
    _check_free(target)
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise TargetExists(f"{target} was created by somebody else during the restore; it was left as it is") from None
    except OSError:
        _publish_without_links(temporary, target)
    else:
        temporary.unlink()
    fsync_dir(target.parent)


def _publish_without_links(temporary: Path, target: Path) -> None:
    """For file systems that have no hard links: reserve the name, then rename over it."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise TargetExists(f"{target} was created by somebody else during the restore; it was left as it is") from None
    try:
        temporary.replace(target)
    except OSError:
        target.unlink()
        raise


# -- the pages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    ref: SegmentRef
    reader: SegmentReader
    read_at: ReadAt


@dataclass(frozen=True)
class _Fetch:
    """Neighbouring groups to fetch by one request of ``length`` bytes, each with the pages wanted of it (None: all)."""

    opened: _Opened
    parts: tuple[tuple[Group, frozenset[int] | None], ...]
    length: int


def _slice(whole: bytes, offset: int, length: int) -> bytes:
    return whole[offset : offset + length]


class _Assembly:
    """Puts the pages of a plan into a file of the right size, in which those that no segment has are 0.

    The segments are taken from the newest to the oldest, and each page from the first that has it, so nothing is
    written twice and superseded groups are not fetched. The calling thread decides who writes which page; the threads of
    the pool fetch, check, decompress and write, in any order. In memory are at most 4 * parallelism small segments and
    ``parallelism`` fetches of larger ones.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: RestorePlan,
        file: _File,
        parallelism: int,
        on_progress: OnProgress,
        take: Callable[[list[tuple[int, memoryview]]], None] | None = None,
    ) -> None:
        """take: gets the pages in place of the file; from several threads."""
        self.downloaded_bytes = 0
        self._take_pages = take or self._write
        self._store = store
        self._plan = plan
        self._fd = file.fd
        self._partial = file.partial
        self._parallelism = parallelism
        self._on_progress = on_progress
        self._taken = np.zeros(plan.page_count + 1, dtype=np.bool_)
        self._limit = (
            plan.page_count
        )  # the smallest size of the database from here to the target: beyond it all is gone
        self._running: deque[Future[int]] = deque()
        self._done_bytes = 0
        self._counter_lock = threading.Lock()

    def run(self) -> None:
        """Raises Unusable, StoreError, OSError; then nothing of it still runs."""
        pool = ThreadPoolExecutor(self._parallelism, "restore")
        try:
            newer: SegmentReader | None = None
            for opened in self._opened(pool):
                with blaming(opened.ref):
                    check_link(opened.reader, newer)
                newer = opened.reader
                self._limit = min(self._limit, newer.header.page_count)
                self._start(pool, opened)
            while self._running:
                self._finish_one()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _opened(self, pool: ThreadPoolExecutor) -> Iterator[_Opened]:
        """Newest first, opened ahead of their use."""
        waiting = deque(reversed(self._plan.segments))
        opening: deque[Future[_Opened]] = deque()
        while waiting or opening:
            while waiting and len(opening) < 2 * self._parallelism:
                opening.append(pool.submit(self._open, waiting.popleft()))
            yield opening.popleft().result()

    def _open(self, ref: SegmentRef) -> _Opened:
        with blaming(ref):
            size_bytes = ref.size_bytes or self._store.head(ref.key).size_bytes
            if size_bytes > _WHOLE_BYTES or self._partial.has_of(ref):
                read_at = partial(self._get, ref)
            else:
                whole = self._get(ref, 0, size_bytes)
                read_at = partial(_slice, whole)
            return _Opened(ref, open_segment(ref, read_at, size_bytes), read_at)

    def _get(self, ref: SegmentRef, offset: int, length: int) -> bytes:
        data = self._store.get(ref.key, offset=offset, length=length)
        with self._counter_lock:
            self.downloaded_bytes += len(data)
        return data

    def _start(self, pool: ThreadPoolExecutor, opened: _Opened) -> None:
        fetched_bytes = 0
        for fetch in self._fetches(opened):
            fetched_bytes += fetch.length
            while len(self._running) >= 2 * self._parallelism:
                self._finish_one()
            self._running.append(pool.submit(self._apply, fetch))
        self._progress(opened.reader.size - fetched_bytes)

    def _fetches(self, opened: _Opened) -> Iterator[_Fetch]:
        parts: list[tuple[Group, frozenset[int] | None]] = []
        length = 0
        for group in opened.reader.groups:
            pages = self._partial.missing(opened.ref, self._take(group.page_nos))
            complete = len(pages) == len(group.page_nos)
            if parts and (not len(pages) or length + group.length > _FETCH_BYTES):
                yield _Fetch(opened, tuple(parts), length)
                parts, length = [], 0
            if len(pages):
                parts.append((group, None if complete else frozenset(pages.tolist())))
                length += group.length
        if parts:
            yield _Fetch(opened, tuple(parts), length)

    def _take(self, page_nos: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Those pages that no newer segment has, which are this segment's now."""
        pages = page_nos[page_nos <= self._limit]
        pages = pages[~self._taken[pages]]
        self._taken[pages] = True
        return pages

    def _apply(self, fetch: _Fetch) -> int:
        with blaming(fetch.opened.ref):
            start = fetch.parts[0][0].offset
            data = memoryview(fetch.opened.read_at(start, fetch.length))
            for group, wanted in fetch.parts:
                at = group.offset - start
                pages = fetch.opened.reader.decode_group(group, data[at : at + group.length])
                pages = [page for page in pages if wanted is None or page[0] in wanted]
                self._take_pages(pages)
                self._partial.wrote(fetch.opened.ref, np.fromiter((page[0] for page in pages), np.uint32, len(pages)))
        return fetch.length

    def _write(self, pages: list[tuple[int, memoryview]]) -> None:
        """One write for each stretch of neighbouring pages."""
        start = 0
        for i in range(1, len(pages) + 1):
            if i == len(pages) or pages[i][0] != pages[i - 1][0] + 1:
                stretch = memoryview(b"".join(data for _, data in pages[start:i]))
                offset = (pages[start][0] - 1) * self._plan.page_size
                while stretch:
                    written = os.pwrite(self._fd, stretch, offset)
                    stretch, offset = stretch[written:], offset + written
                start = i

    def _finish_one(self) -> None:
        self._progress(self._running.popleft().result())

    def _progress(self, more_bytes: int) -> None:
        self._done_bytes += more_bytes
        self._on_progress(self._done_bytes, self._plan.download_bytes)


def check_link(reader: SegmentReader, newer: SegmentReader | None) -> None:
    """Raises ChainBroken unless the newer segment follows from this one. Source: docs/format.md, section 4."""
    if newer is None:
        return
    header, after = reader.header, newer.header
    if header.database != after.database or header.page_size != after.page_size:
        raise ChainBroken(f"{newer.name} does not follow from {reader.name}: another database or page size")
    # A segment that begins inside the range of the one before says nothing about the state in between.
    adjoining = after.first == header.last + 1
    if adjoining and (header.state_after, header.page_count) != (after.state_before, after.pages_before):
        raise ChainBroken(
            f"{newer.name} does not follow from {reader.name}: it was made for {after.pages_before} pages with state "
            f"{after.state_before:016x}, not {header.page_count} pages with state {header.state_after:016x}"
        )
