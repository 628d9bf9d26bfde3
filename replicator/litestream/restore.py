"""Restore from a replica that Litestream made: 0.5 (files of LTX) or 0.3 (snapshots and WAL), whichever reaches farther.

Owns the order in which objects become pages. The file until it has its name is that of ``replicator.restore``: never overwritten,
never left when something is wrong. Never writes to the replica.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from replicator import wal
from replicator.errors import (
    ChainBroken,
    FormatError,
    IntegrityCheckFailed,
    LtxDamaged,
    NothingToRestore,
    ObjectMissing,
    UsageError,
    WalHeaderDamaged,
)
from replicator.litestream import chain, generations
from replicator.litestream import replica as ltx_replica
from replicator.litestream.chain import LtxRef, txid_text
from replicator.litestream.generations import OldChain, OldRef
from replicator.ltx import LtxReader
from replicator.new_database import check_space, check_target, new_database
from replicator.pagehash import lock_page
from replicator.restore import PRAGMAS, OnProgress, integrity_complaints
from replicator.restore_plan import RestoreOptions
from replicator.store import ObjectStore
from replicator.values import format_time

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PIECE_BYTES = 2 << 20
_SQLITE_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True)
class LitestreamPlan:
    """What a restore would do. version: of Litestream's replicas, "0.5" or "0.3".

    position: as that version writes it. reached_ms: of the last transaction in it. keys: of the objects, in the order of their use.
    size_bytes: of the database, None when only the restore will tell.
    """

    version: str
    position: str
    reached_ms: int
    keys: tuple[str, ...]
    download_bytes: int
    size_bytes: int | None
    source: tuple[LtxRef, ...] | OldChain


@dataclass(frozen=True)
class LitestreamReport:
    """What a restore did. size_bytes: of the database; downloaded_bytes: of ``objects`` objects."""

    version: str
    position: str
    reached_ms: int
    size_bytes: int
    objects: int
    downloaded_bytes: int
    took_s: float


def plan_restore(store: ObjectStore, options: RestoreOptions) -> LitestreamPlan:
    """What ``restore`` would do now. Of replicas of both versions at one place, that which reaches the later moment.

    Raises NothingToRestore, ChainBroken, LtxDamaged, StoreError, UsageError.
    """
    return _with_fallback(store, options, lambda plan: plan)


def restore(
    store: ObjectStore, target: Path, options: RestoreOptions, *, on_progress: OnProgress | None = None
) -> LitestreamReport:
    """Write the state that Litestream's replica in ``store`` holds to the new file ``target``, durably.

    Exactly the transaction, or the last one at the moment, that is asked for: a missing file is an error, never an older state. Checksums
    of all files are verified before the database gets its name. A 0.5 file that is damaged, or vanishes meanwhile, is passed over
    with a warning when others lead to the same transaction. Raises TargetExists before anything is downloaded, RestoreError and
    its other subclasses, FormatError, StoreError.
    """
    started = time.monotonic()
    check_target(target)

    def attempt(plan: LitestreamPlan) -> LitestreamReport:
        return _write(store, target, plan, options, started, on_progress or (lambda done, total: None))

    return _with_fallback(store, options, attempt)


def moment(store: ObjectStore, at_ms: int | None = None) -> int | None:
    """The last moment that the replica knows of, at or before ``at_ms``; None when it holds nothing. Plans nothing."""
    files, old = ltx_replica.list_files(store), generations.list_objects(store)
    moments = [ref.time_ms for ref in old if at_ms is None or ref.time_ms <= at_ms]
    try:
        moments.append(ltx_replica.time_of(store, files, _target(store, files, at_ms)))
    except NothingToRestore:
        pass
    return max(moments, default=None)


# -- which objects -----------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    def __init__(self, key: str, error: FormatError | ObjectMissing) -> None:
        super().__init__(str(error))
        self.key = key
        self.error = error


@contextmanager
def _blaming(key: str) -> Iterator[None]:
    try:
        yield
    except (FormatError, ObjectMissing) as error:
        raise _Unusable(key, error) from error


def _with_fallback(store: ObjectStore, options: RestoreOptions, act: Callable[[LitestreamPlan], _T]) -> _T:
    """``act`` on the plan, and when a file in it proves unusable, on one without that file, for the same transaction."""
    wish = _resolve(store, options)
    unusable: dict[str, FormatError | ObjectMissing] = {}
    while True:
        try:
            return act(_plan_old(wish) if isinstance(wish, OldChain) else _plan_files(store, wish, unusable))
        except _Unusable as failed:
            if isinstance(wish, OldChain):
                raise failed.error from None
            unusable[failed.key] = failed.error
            log.warning("the restore looks for a way around a file: %s", failed.error)
        except (ChainBroken, NothingToRestore) as broken:
            if not unusable:
                raise
            first = next(iter(unusable.values()))
            raise type(first)(f"{first}; without it, {broken}") from first


def _resolve(store: ObjectStore, options: RestoreOptions) -> int | OldChain:
    """The transaction of a 0.5 replica, or the objects of a 0.3 replica."""
    if options.timeline is not None or options.position is not None:
        raise UsageError("a replica of Litestream has no timelines; name a transaction by its 16 hex digits, or a time")
    if options.txid is not None and options.at_ms is not None:
        raise UsageError("a restore has one target; give a txid or a time, not both")
    files, old = ltx_replica.list_files(store), generations.list_objects(store)
    if options.txid is not None:
        if old and not files:
            raise UsageError("this replica is by Litestream 0.3, which numbers no transactions; name a time")
        return options.txid
    if not old:
        return _target(store, files, options.at_ms)
    if not files:
        return generations.plan(old, options.at_ms)
    return _later(store, files, old, options.at_ms)


def _later(store: ObjectStore, files: list[LtxRef], old: list[OldRef], at_ms: int | None) -> int | OldChain:
    """An upgrade of Litestream leaves the old replica beside the new one: two parts of one history."""
    try:
        target = _target(store, files, at_ms)
    except NothingToRestore:
        return generations.plan(old, at_ms)
    reached_ms = ltx_replica.time_of(store, files, target)
    if any(reached_ms < ref.time_ms <= (ref.time_ms if at_ms is None else at_ms) for ref in old):
        return generations.plan(old, at_ms)
    return target


def _target(store: ObjectStore, files: list[LtxRef], at_ms: int | None) -> int:
    if at_ms is not None:
        return ltx_replica.txid_at(store, files, at_ms)
    if not files:
        raise NothingToRestore(f"there is no replica of Litestream at {store.url}; check the URL")
    return max(ref.last for ref in files)


def _plan_files(store: ObjectStore, target: int, unusable: Container[str]) -> LitestreamPlan:
    files = [ref for ref in ltx_replica.list_files(store) if ref.key not in unusable]
    found = chain.plan(files, target)
    headers = []
    for ref in files:
        if ref.last == target:
            with _blaming(ref.key):
                headers.append(ltx_replica.read_header(store, ref))
    return LitestreamPlan(
        version="0.5",
        position=txid_text(target),
        reached_ms=min(header.time_ms for header in headers),
        keys=tuple(ref.key for ref in found),
        download_bytes=sum(ref.size_bytes for ref in found),
        size_bytes=headers[0].page_size * headers[0].page_count,
        source=found,
    )


def _plan_old(found: OldChain) -> LitestreamPlan:
    objects = found.objects
    return LitestreamPlan(
        version="0.3",
        position=objects[-1].position,
        reached_ms=objects[-1].time_ms,
        keys=tuple(ref.key for ref in objects),
        download_bytes=sum(ref.size_bytes for ref in objects),
        size_bytes=None,
        source=found,
    )


# -- the file ----------------------------------------------------------------------------------------------------------


def _write(
    store: ObjectStore,
    target: Path,
    plan: LitestreamPlan,
    options: RestoreOptions,
    started: float,
    on_progress: OnProgress,
) -> LitestreamReport:
    check_space(target.parent, plan.size_bytes or plan.download_bytes)
    with new_database(target, options.mode, options.owner) as (fd, temporary):
        download = _Download(store, plan, options.parallelism, on_progress)
        try:
            if isinstance(plan.source, OldChain):
                _apply_generation(plan.source, download, fd, target.parent)
            else:
                _apply_files(plan.source, download, fd)
        finally:
            download.stop()
        size_bytes = os.fstat(fd).st_size
        complaints = integrity_complaints(temporary, options.integrity_check, plan.position) if size_bytes else []
        if complaints:
            raise IntegrityCheckFailed(
                f"{plan.position} was restored as Litestream's replica has it, but {PRAGMAS[options.integrity_check]} finds: "
                f"{'; '.join(complaints)}; restore an earlier moment, or leave the check out to get the file as it is"
            )
    took_s = time.monotonic() - started
    return LitestreamReport(
        plan.version, plan.position, plan.reached_ms, size_bytes, len(plan.keys), download.done_bytes, took_s
    )


class _Download:
    """The objects of a plan in pieces, fetched ahead of their use by several threads, in order."""

    def __init__(self, store: ObjectStore, plan: LitestreamPlan, parallelism: int, on_progress: OnProgress) -> None:
        self.done_bytes = 0
        self._store = store
        self._total_bytes = plan.download_bytes
        self._on_progress = on_progress
        self._pool = ThreadPoolExecutor(parallelism, "restore")
        self._ahead = 2 * parallelism
        refs: Sequence[LtxRef | OldRef] = plan.source.objects if isinstance(plan.source, OldChain) else plan.source
        self._wanted = ((ref, offset) for ref in refs for offset in range(0, ref.size_bytes, _PIECE_BYTES))
        self._running: deque[Future[bytes]] = deque()

    def chunks(self, ref: LtxRef | OldRef) -> Iterator[bytes]:
        """The whole of the next object of the plan, which is this one."""
        for _ in range(0, ref.size_bytes, _PIECE_BYTES):
            while len(self._running) < self._ahead and (wanted := next(self._wanted, None)) is not None:
                self._running.append(self._pool.submit(self._fetch, *wanted))
            data = self._running.popleft().result()
            self.done_bytes += len(data)
            self._on_progress(self.done_bytes, self._total_bytes)
            yield data

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, ref: LtxRef | OldRef, offset: int) -> bytes:
        return self._store.get(ref.key, offset=offset, length=_PIECE_BYTES)


class _Pages:
    """Pages into a file, neighbours with one write."""

    def __init__(self, fd: int, page_size: int) -> None:
        self._fd = fd
        self._page_size = page_size
        self._start = 0
        self._held: list[bytes] = []

    def write(self, page_no: int, data: bytes) -> None:
        if page_no != self._start + len(self._held) or len(self._held) * self._page_size >= _PIECE_BYTES:
            self.flush()
            self._start = page_no
        self._held.append(data)

    def flush(self) -> None:
        left = memoryview(b"".join(self._held))
        offset = (self._start - 1) * self._page_size
        while left:
            written = os.pwrite(self._fd, left, offset)
            left, offset = left[written:], offset + written
        self._held = []


# -- 0.5 ---------------------------------------------------------------------------------------------------------------


def _apply_files(refs: Sequence[LtxRef], download: _Download, fd: int) -> None:
    """From the oldest to the newest, each over the ones before, so that every file is read to its checksum.

    A file has to hold every page by which the database grows in it. Litestream 0.5.11 is known to have lost such pages under a
    concurrent checkpoint (its pull request 1323). Where the database had been larger once, Litestream then restores what the page
    held before.
    """
    page_size, page_count = 0, 0
    for ref in refs:
        with _blaming(ref.key):
            reader = LtxReader(download.chunks(ref), ref.key)
            ltx_replica.check_identity(ref, reader.header)
            if page_size and reader.header.page_size != page_size:
                raise ChainBroken(
                    f"{ref.key} has pages of {reader.header.page_size} bytes, the files before it {page_size}: the page size was "
                    f"changed; restore up to {txid_text(ref.first - 1)}"
                )
            page_size = reader.header.page_size
            _apply_file(reader, page_count, fd)
            page_count = reader.header.page_count


def _apply_file(reader: LtxReader, pages_before: int, fd: int) -> None:
    header, new_pages = reader.header, 0
    pages = _Pages(fd, header.page_size)
    for page_no, data in reader.pages():
        pages.write(page_no, data)
        new_pages += page_no > pages_before
    pages.flush()
    os.ftruncate(fd, header.page_count * header.page_size)
    expected = max(0, header.page_count - pages_before)
    expected -= pages_before < lock_page(header.page_size) <= header.page_count
    if new_pages != expected:
        raise ChainBroken(
            f"{reader.name} lacks {expected - new_pages} of the pages {pages_before + 1} to {header.page_count}, by which the "
            f"database grew; restore up to {txid_text(header.first - 1)}"
        )


# -- 0.3 ---------------------------------------------------------------------------------------------------------------


def _apply_generation(found: OldChain, download: _Download, fd: int, folder: Path) -> None:
    page_size = _apply_snapshot(found.snapshot, download, fd)
    for number, pieces in enumerate(found.wals, 1):
        with tempfile.TemporaryFile(dir=folder) as file:
            _fetch_wal(pieces, download, file)
            _apply_wal(pieces, file, page_size, fd, is_last=number == len(found.wals))


def _apply_snapshot(ref: OldRef, download: _Download, fd: int) -> int:
    """The page size."""
    offset = 0
    with _blaming(ref.key):
        for piece in generations.decompressed(download.chunks(ref), ref.key):
            _write_all(fd, piece, offset)
            offset += len(piece)
        head = os.pread(fd, 100, 0)
        page_size = int.from_bytes(head[16:18], "big")
        page_size = 65536 if page_size == 1 else page_size
        if not head.startswith(_SQLITE_MAGIC) or page_size < 512 or offset % page_size:
            raise LtxDamaged(
                f"{ref.key} is damaged: it does not hold a whole SQLite database; restore an earlier moment"
            )
    return page_size


def _fetch_wal(pieces: Sequence[OldRef], download: _Download, file: BinaryIO) -> None:
    """One WAL out of its pieces. Raises ChainBroken when one of them is missing."""
    offset = 0
    for ref in pieces:
        if ref.offset != offset:
            raise ChainBroken(
                f"{ref.generation} cannot be restored: of WAL {ref.index:08x}, bytes {offset:08x} to {ref.offset:08x} are "
                f"missing; restore an earlier moment than {format_time(ref.time_ms)}"
            )
        with _blaming(ref.key):
            for data in generations.decompressed(download.chunks(ref), ref.key):
                file.write(data)
                offset += len(data)
    file.flush()


def _apply_wal(pieces: Sequence[OldRef], file: BinaryIO, page_size: int, fd: int, *, is_last: bool) -> None:
    name = pieces[0].key
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        header = wal.parse_header(os.pread(file.fileno(), wal.HEADER_SIZE, 0))
    except WalHeaderDamaged as error:
        raise LtxDamaged(f"{name} is damaged: {error}") from error
    if header.page_size != page_size:
        raise ChainBroken(f"{name} has pages of {header.page_size} bytes, the snapshot before it {page_size}")
    scanner, page_count = wal.Scanner(header.cursor()), 0
    at_once = max(1, _PIECE_BYTES // header.frame_size) * header.frame_size
    while scanner.stopped is wal.Stop.END and (frames := os.pread(file.fileno(), at_once, scanner.offset)):
        start = scanner.offset
        for transaction in scanner.feed(frames):
            _apply_transaction(transaction, file, page_size, fd)
            page_count = transaction.page_count
        if scanner.offset == start:
            break
    if scanner.offset != size_bytes or (scanner.pending_frames and not is_last):
        raise LtxDamaged(
            f"WAL {pieces[0].position} is damaged at byte {scanner.offset} of {size_bytes}; restore to an earlier moment"
        )
    if page_count:
        os.ftruncate(fd, page_count * page_size)


def _apply_transaction(transaction: wal.Transaction, file: BinaryIO, page_size: int, fd: int) -> None:
    pages = _Pages(fd, page_size)
    for page_no, offset in zip(transaction.page_nos.tolist(), transaction.offsets.tolist(), strict=True):
        pages.write(page_no, os.pread(file.fileno(), page_size, offset))
    pages.flush()


def _write_all(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written
