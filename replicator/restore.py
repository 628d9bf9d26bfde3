"""Restore: a position of a replica becomes a new database file, verified, or nothing becomes of it.

Owns the fetching of pages and the proof of the finished file. Which segments are taken is planned elsewhere, and the file has its name
from elsewhere; nothing is given one that was not verified to the last page.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

import apsw
import numpy as np
from numpy.typing import NDArray

from replicator.errors import IntegrityCheckFailed, ReplicatorError, StateMismatch
from replicator.layout import SegmentRef
from replicator.new_database import NewDatabase, check_space, check_target, kept_database, new_database
from replicator.pagehash import StateHashes, hash_pages, page_hash
from replicator.partial import Partial
from replicator.replica import Replica, open_segment
from replicator.restore_plan import (
    NEWEST,
    IntegrityCheck,
    RestoreOptions,
    RestorePlan,
    blaming,
    check_link,
    check_options,
    with_fallback,
)
from replicator.segment import Group, ReadAt, SegmentReader
from replicator.store import ObjectStore
from replicator.values import Position

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""(bytes done, bytes in all), of the segments as they are stored. Called from the thread that restores."""

PRAGMAS = {"quick": "quick_check", "full": "integrity_check"}

_WHOLE_BYTES = 1 << 20  # a segment up to this size is fetched by one request
_FETCH_BYTES = 2 << 20  # of a larger one, neighbouring groups up to this size are
_READ_BACK_BYTES = 4 << 20


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
    options: RestoreOptions = NEWEST,
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
    file = NewDatabase(fd, Path(f"/proc/self/fd/{fd}"), Partial(fd))
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


# -- the file ----------------------------------------------------------------------------------------------------------


@contextmanager
def _file_for(target: Path, options: RestoreOptions) -> Iterator[NewDatabase]:
    if options.resume:
        with kept_database(target, options.mode, options.owner) as file:
            yield file
    else:
        with new_database(target, options.mode, options.owner) as (fd, path):
            yield NewDatabase(fd, path, Partial(fd))


def _fill(
    replica: Replica,
    plan: RestorePlan,
    file: NewDatabase,
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
        file: NewDatabase,
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
