"""A copy of a database that others read while pages are put into it: one transaction of whole pages at a time, as SQLite would write it.

Owns the writing of the WAL and the wal-index of such a copy, under SQLite's own write lock; docs/decisions/follow.md says why it is
sound. SQLite itself checkpoints, and every reader is an ordinary connection. Never used on a database that an application writes.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import apsw

from replicator import failpoints
from replicator.database import BUSY_TIMEOUT_MS, Journal, LiveDatabase, translated
from replicator.errors import DatabaseBusy, DatabaseError, DatabaseNotReplicable, FormatError
from replicator.image import Image
from replicator.pagehash import StateHashes
from replicator.wal import Cursor, encode_frames, encode_header
from replicator.walindex import BIG_ENDIAN, BLOCK_BYTES, COPY_BYTES, HEADER_BYTES, IndexHeader, entered, stretches

Pages = Iterable[tuple[int, bytes | memoryview]]

CHECKPOINT_FRAMES = 1000
WRITE_VERSION_AT = 18
"""Byte of page 1 that says with the next whether the database has a WAL (2) or not (1)."""
_CHUNK_BYTES = 1 << 20


class WrittenByOthers(DatabaseError):
    """Another program has written the copy: what it holds is not what was put into it."""


class FollowedCopy(LiveDatabase):
    """Used by one thread. It must be in WAL mode."""

    def __init__(self, path: Path) -> None:
        """Raises what LiveDatabase does; DatabaseNotReplicable when the file is not in WAL mode."""
        self._files: list[int] = []
        self._change = 0  # the wal-index when the last transaction was put, or all of it was read
        super().__init__(path)
        try:
            if self.journal is not Journal.WAL:
                raise DatabaseNotReplicable(f"{path} is not in WAL mode; somebody has changed it, so restore it anew")
            self.acquire()
            self.release()
            # Closed after the connections: to close the wal-index drops the locks that SQLite holds on it in this process.
            self._files = [os.open(f"{path}{suffix}", os.O_RDWR | os.O_CLOEXEC) for suffix in ("-wal", "-shm")]
        except OSError as error:
            self.close()
            raise DatabaseError(f"{path}: {error.strerror}; its WAL cannot be written") from error
        except BaseException:
            self.close()
            raise

    def close(self, *, checkpoint: bool = True) -> None:
        super().close(checkpoint=checkpoint)
        while self._files:
            os.close(self._files.pop())

    def hashes(self) -> StateHashes:
        """Of every page of the newest state, all of which is read. ``put`` builds on exactly this. Raises DatabaseError."""
        self._change = self._header().change
        self.acquire()
        try:
            return Image.newest(self).state_hashes()
        finally:
            self.release()

    def first_page(self) -> bytes:
        self.acquire()
        try:
            return Image.newest(self).page(1)
        finally:
            self.release()

    def put(self, pages: Pages, page_count: int) -> None:
        """After ``hashes``: make these pages, each once, part of the database, which has ``page_count`` pages then.

        One transaction, durable.

        An error that ``pages`` raises leaves the database as it was. Raises DatabaseBusy, DatabaseError; WrittenByOthers.
        """
        try:
            with self._barrier():
                header = self._header()
                if self._change != header.change:
                    raise WrittenByOthers(
                        f"{self.path} was written by another program; only `restore --follow` may do that"
                    )
                begun, cursor = self._begin(header)
                failpoints.reach("before-followed-frames")
                page_nos, end = self._write_frames(cursor, pages, page_count)
                os.fsync(self._files[0])
                failpoints.reach("before-followed-index")
                self._enter(begun, page_nos, end, page_count)
        except OSError as error:
            raise DatabaseError(f"{self.path}-wal cannot be written: {error.strerror}; make room there") from error
        failpoints.reach("after-followed-index")
        self._checkpoint_if_due(begun.frames + len(page_nos))

    @contextmanager
    def _barrier(self) -> Iterator[float]:
        """The write lock, by a connection that is used once.

        When it rolls back it takes the wal-index as it finds it for its own, and would go on with pages from before it.
        """
        with translated(self.path):
            connection = self._connect()
        try:
            with translated(self.path):
                connection.execute("BEGIN IMMEDIATE")
            yield time.monotonic()
        finally:
            connection.close(True)

    # -- the WAL -------------------------------------------------------------------------------------------------------

    def _begin(self, header: IndexHeader) -> tuple[IndexHeader, Cursor]:
        """Where the next frame goes; a WAL without frames gets its header first."""
        if header.frames:
            if header.page_size != self.page_size:
                raise DatabaseError(f"{self.path} has a WAL of pages of {header.page_size} bytes, not {self.page_size}")
            return header, header.cursor(self.page_size)
        salts = header.salts if any(header.salts) else secrets.token_bytes(8)
        salt1, salt2 = int.from_bytes(salts[:4], "big"), int.from_bytes(salts[4:], "big")
        head, cursor = encode_header(self.page_size, salt1, salt2, BIG_ENDIAN)
        _write(self._files[0], head, 0)
        return replace(header, salts=salts, big_endian=BIG_ENDIAN, page_size=self.page_size), cursor

    def _write_frames(self, cursor: Cursor, pages: Pages, page_count: int) -> tuple[list[int], Cursor]:
        """The last frame, which makes all of them count, is written when ``pages`` has come to its end without an error."""
        page_nos: list[int] = []
        held: list[tuple[int, bytes | memoryview]] = []
        for chunk in _chunks(pages, max(1, _CHUNK_BYTES // self.page_size)):
            if held:
                cursor = self._append(cursor, held, 0)
            held = chunk
            page_nos += [page_no for page_no, _ in chunk]
        failpoints.reach("before-followed-commit")
        return page_nos, self._append(cursor, held, page_count)

    def _append(self, cursor: Cursor, pages: list[tuple[int, bytes | memoryview]], page_count: int) -> Cursor:
        data, end = encode_frames(cursor, pages, page_count)
        _write(self._files[0], data, cursor.offset)
        return end

    # -- the wal-index -------------------------------------------------------------------------------------------------

    def _header(self) -> IndexHeader:
        try:
            return IndexHeader.decode(os.pread(self._files[1], HEADER_BYTES, 0))
        except FormatError as error:
            raise DatabaseBusy(f"{self.path}-shm: {error}; trying again") from error

    def _enter(self, header: IndexHeader, page_nos: list[int], end: Cursor, page_count: int) -> None:
        """The tables first, which no reader looks at beyond the frames that its header counts; then the header."""
        index = self._files[1]
        for stretch in stretches(header.frames, page_nos):
            at = stretch.block * BLOCK_BYTES
            if os.fstat(index).st_size < at + BLOCK_BYTES:
                os.ftruncate(index, at + BLOCK_BYTES)
            block = entered(os.pread(index, BLOCK_BYTES, at), stretch)
            skip = 136 if stretch.block == 0 else 0
            _write(index, block[skip:], at + skip)
        done = replace(
            header,
            change=(header.change + 1) & 0xFFFFFFFF,
            frames=header.frames + len(page_nos),
            page_count=page_count,
            checksum1=end.checksum1,
            checksum2=end.checksum2,
        ).encode()
        _write(index, done, COPY_BYTES)
        _write(index, done, 0)
        self._change = (header.change + 1) & 0xFFFFFFFF

    def _checkpoint_if_due(self, frames: int) -> None:
        """Have SQLite move the WAL into the file, and begin it anew if no reader is in it at this moment."""
        if frames < CHECKPOINT_FRAMES:
            return
        try:
            self._spare.set_busy_timeout(0)
            self._spare.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except (apsw.BusyError, apsw.LockedError):
            return
        finally:
            self._spare.set_busy_timeout(BUSY_TIMEOUT_MS)


def _chunks(pages: Pages, size: int) -> Iterator[list[tuple[int, bytes | memoryview]]]:
    chunk: list[tuple[int, bytes | memoryview]] = []
    for page in pages:
        chunk.append(page)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
