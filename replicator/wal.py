"""SQLite's write-ahead log: bytes -> committed transactions, every frame verified. Pure.

Owns the WAL format (sqlite.org/fileformat2.html, section 4). Never opens a file, never returns part of a transaction.

The checksum runs over pairs of 32-bit words: ``s0 += x0 + s1; s1 += x1 + s0``, modulo 2^32. It is linear: n words
``w`` add ``sum(F(j) * w[n-1-j])`` to s0 and ``sum(F(j+1) * w[n-1-j])`` to s1, where F are the Fibonacci numbers, on top
of what the state before them grows to. So a frame is two dot products with constant vectors, and each frame can be
checked from the checksum stored in its predecessor: all are right up to the first that does not agree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from replicator.errors import WalHeaderDamaged

HEADER_SIZE = 32
FRAME_HEADER_SIZE = 24

_MAGIC_LITTLE, _MAGIC_BIG = 0x377F0682, 0x377F0683
_VERSION = 3007000
_MIN_PAGE_SIZE, _MAX_PAGE_SIZE = 512, 65536
_MASK = 0xFFFFFFFF

# Frames are checked in blocks that stay in the processor's cache between the two dot products.
_BLOCK_BYTES = 1024 * 1024

# Columns of a frame header, as 32-bit words; always big-endian, whatever the order of the checksum's words.
_PAGE_NO, _PAGE_COUNT, _SALT1, _SALT2, _CHECKSUM1 = range(5)
_HEADER_WORDS = FRAME_HEADER_SIZE // 4

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in one WAL, right after a commit frame or the header: enough to continue, and to prove continuity.

    offset: byte in the file. checksum1, checksum2: cumulative up to there, as stored in the frame or header before it.
    """

    offset: int
    page_size: int
    big_endian: bool
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int

    @property
    def frame_size(self) -> int:
        return FRAME_HEADER_SIZE + self.page_size


@dataclass(frozen=True, slots=True)
class WalHeader:
    """The first 32 bytes of a WAL. big_endian: order of the words that the checksum runs over."""

    big_endian: bool
    page_size: int
    checkpoint_seq: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int

    @property
    def frame_size(self) -> int:
        return FRAME_HEADER_SIZE + self.page_size

    def cursor(self) -> Cursor:
        """Where the first frame begins."""
        return Cursor(
            HEADER_SIZE, self.page_size, self.big_endian, self.salt1, self.salt2, self.checksum1, self.checksum2
        )


@dataclass(frozen=True, slots=True, eq=False)
class Transaction:
    """One commit.

    page_count: size of the database in pages after it. end: the place after its commit frame.
    page_nos: ascending, each once, none above page_count. offsets: byte in the WAL where the data of that page begins,
    ``end.page_size`` bytes, the last image in this transaction. Both have the same length, which may be 0.
    """

    page_count: int
    end: Cursor
    page_nos: U32
    offsets: I64


class Stop(StrEnum):
    """Why scanning stopped."""

    END = "end"  # no whole frame is left
    SALT = "salt"  # the next frame belongs to another generation of the WAL, or is being rewritten
    CHECKSUM = "checksum"  # the next frame does not follow from the one before it
    PAGE_ZERO = "page zero"  # the next frame is for page 0, which does not exist


def parse_header(data: bytes | memoryview) -> WalHeader:
    """The header of a WAL.

    data: the file from its first byte on, at least 32 bytes.
    Raises WalHeaderDamaged for any header that SQLite would not accept either.
    Source: sqlite.org/fileformat2.html, section 4.1.
    """
    if len(data) < HEADER_SIZE:
        raise _damaged(f"is cut short: {len(data)} of {HEADER_SIZE} bytes")
    magic, version, page_size, sequence, *salts_and_sums = struct.unpack_from(">8I", data)
    if magic not in (_MAGIC_LITTLE, _MAGIC_BIG):
        raise _damaged(f"begins with {magic:#010x}, which is not a WAL's magic number")
    if version != _VERSION:
        raise _damaged(f"has format version {version}, only {_VERSION} is known")
    if not _MIN_PAGE_SIZE <= page_size <= _MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise _damaged(f"has page size {page_size}, which is not a power of two from 512 to 65536")
    header = WalHeader(magic == _MAGIC_BIG, page_size, sequence, *salts_and_sums)
    if header_checksum(bytes(data[:24]), header.big_endian) != (header.checksum1, header.checksum2):
        raise _damaged("does not have the checksum that it states")
    return header


def encode_header(page_size: int, salt1: int, salt2: int, big_endian: bool) -> tuple[bytes, Cursor]:
    """The first HEADER_SIZE bytes of a new WAL, and the place after them. big_endian: byte order of the checksums."""
    words = (_MAGIC_BIG if big_endian else _MAGIC_LITTLE, _VERSION, page_size, 0, salt1, salt2)
    body = struct.pack(">6I", *words)
    checksum = header_checksum(body, big_endian)
    return body + struct.pack(">2I", *checksum), Cursor(HEADER_SIZE, page_size, big_endian, salt1, salt2, *checksum)


def encode_frames(at: Cursor, pages: Sequence[tuple[int, bytes | memoryview]], page_count: int) -> tuple[bytes, Cursor]:
    """Frames of these pages (number, content), in this order, and the place after them.

    page_count: size of the database after the last of them, which commits then; 0 when others are to follow.
    """
    count = len(pages)
    frames = np.zeros((count, at.frame_size), np.uint8)
    headers = np.zeros((count, _HEADER_WORDS), ">u4")
    headers[:, _PAGE_NO] = [page_no for page_no, _ in pages]
    headers[-1, _PAGE_COUNT] = page_count
    headers[:, _SALT1], headers[:, _SALT2] = at.salt1, at.salt2
    frames[:, :FRAME_HEADER_SIZE] = headers.view(np.uint8).reshape(count, FRAME_HEADER_SIZE)
    for row, (_, data) in zip(frames, pages, strict=True):
        row[FRAME_HEADER_SIZE:] = np.frombuffer(data, np.uint8)
    law = _law(at.page_size)
    words = frames.view(">u4" if at.big_endian else "<u4").astype(np.uint32, copy=False)
    (a, b), (c, d) = law.growth.tolist()
    s0, s1 = at.checksum1, at.checksum2
    for number, (more0, more1) in enumerate(
        zip((words @ law.weights1).tolist(), (words @ law.weights2).tolist(), strict=True)
    ):
        s0, s1 = (s0 * a + s1 * c + more0) & _MASK, (s0 * b + s1 * d + more1) & _MASK
        headers[number, _CHECKSUM1:] = s0, s1
    frames[:, :FRAME_HEADER_SIZE] = headers.view(np.uint8).reshape(count, FRAME_HEADER_SIZE)
    end = Cursor(at.offset + count * at.frame_size, at.page_size, at.big_endian, at.salt1, at.salt2, s0, s1)
    return frames.tobytes(), end


def last_image(transactions: Sequence[Transaction]) -> tuple[U32, I64]:
    """The last image of each page over consecutive transactions of one WAL, as the state after the last of them has it.

    Returns page numbers, ascending, and the offset in the WAL of the data of each, without pages above the last
    page_count. A page that was cut off and came back without being written has its old image, as SQLite reads it too.
    """
    if not transactions:
        return np.empty(0, np.uint32), np.empty(0, np.int64)
    page_nos = np.concatenate([t.page_nos for t in transactions])
    offsets = np.concatenate([t.offsets for t in transactions])
    kept, positions = _last_of_each(page_nos, transactions[-1].page_count)
    return kept, offsets[positions]


class Scanner:
    """Takes the consecutive frames of one WAL, in pieces of any size. Stateful but pure; for one thread.

    Frames after the last commit are pending: of each, only the page number is kept (4 bytes), so that a transaction may
    be larger than what is fed at once. When scanning stops early (``stopped`` is not END), ``offset`` stays at the
    frame that was refused, and the next feed looks at that place again, since it may have been overwritten meanwhile.

    Pending frames are not committed, and SQLite may write others over them: after a rollback, or in place when it
    spills a page twice. That never gives a wrong transaction, because the checksum of a commit frame covers all frames
    before it and would not follow from what is pending. It can make the scanner wait where nothing will come:
    ``still_there`` and ``overtaken`` tell; then go on with a new ``Scanner(scanner.cursor)``.

    The bytes alone cannot tell a commit that SQLite took back because its fsync failed. Whoever must exclude that feeds
    no more than the frames that SQLite itself counts as committed.
    """

    def __init__(self, at: Cursor) -> None:
        self._cursor = at
        self._checksum = (at.checksum1, at.checksum2)
        self._last_header = struct.pack(">4I", at.salt1, at.salt2, at.checksum1, at.checksum2)
        self._pending = bytearray()
        self._stopped = Stop.END

    @property
    def cursor(self) -> Cursor:
        """After the last commit."""
        return self._cursor

    @property
    def offset(self) -> int:
        """The byte of the WAL where the next feed must start."""
        return self._cursor.offset + self.pending_frames * self._cursor.frame_size

    @property
    def pending_frames(self) -> int:
        """Valid frames after the last commit."""
        return len(self._pending) // 4

    @property
    def stopped(self) -> Stop:
        """Why the last feed stopped."""
        return self._stopped

    def feed(self, frames: bytes | memoryview) -> list[Transaction]:
        """Transactions that these frames complete, in commit order.

        frames: bytes of the WAL from ``offset`` on; a ragged last frame is ignored, feed it again from ``offset``.
        """
        done: list[Transaction] = []
        self._stopped = Stop.END
        for block in _blocks(frames, self._cursor.frame_size):
            headers, self._stopped = _verify(block, self._cursor, self._checksum)
            if len(headers):
                done += self._take(headers)
            if self._stopped is not Stop.END:
                break
        return done

    def still_there(self, last_frame_header: bytes) -> bool:
        """Whether the frame that was taken last is still at its place.

        last_frame_header: the 24 bytes found now at ``offset - frame_size``. Nothing precedes offset 32: always True.
        False proves that what is pending (or, with nothing pending, the WAL as known) is gone. True proves that no
        commit has gone past this frame on another path; one that ended before it, over the first of the pending
        frames, is what ``overtaken`` tells.
        """
        if self.offset == HEADER_SIZE:
            return True
        return len(last_frame_header) == FRAME_HEADER_SIZE and last_frame_header.endswith(self._last_header)

    def overtaken(self, committed_frames: int) -> bool:
        """Whether a commit lies past ``cursor`` that was not found, since it was written over pending frames.

        committed_frames: of this generation of the WAL by SQLite's own account (``nLog`` of a checkpoint in mode NOOP),
        asked for before the bytes were read that went into the last feed, up to the end of the file.
        """
        return HEADER_SIZE + committed_frames * self._cursor.frame_size > self._cursor.offset

    def _take(self, headers: U32) -> list[Transaction]:
        done = []
        start = 0
        for commit in np.flatnonzero(headers[:, _PAGE_COUNT]).tolist():
            self._pending += headers[start : commit + 1, _PAGE_NO].tobytes()
            done.append(self._commit(headers[commit]))
            start = commit + 1
        self._pending += headers[start:, _PAGE_NO].tobytes()
        last = headers[-1]
        self._checksum = (int(last[_CHECKSUM1]), int(last[_CHECKSUM1 + 1]))
        self._last_header = last.astype(">u4").tobytes()
        return done

    def _commit(self, header: U32) -> Transaction:
        before = self._cursor
        _, page_count, salt1, salt2, checksum1, checksum2 = header.tolist()
        page_nos, positions = _last_of_each(np.frombuffer(self._pending, np.uint32), page_count)
        offsets = before.offset + FRAME_HEADER_SIZE + positions * before.frame_size
        end = Cursor(self.offset, before.page_size, before.big_endian, salt1, salt2, checksum1, checksum2)
        self._cursor = end
        self._pending = bytearray()
        return Transaction(page_count, end, page_nos, offsets)


def _damaged(what: str) -> WalHeaderDamaged:
    return WalHeaderDamaged(
        f"the WAL's header {what}; SQLite ignores such a WAL, open the database once to start it anew"
    )


def header_checksum(data: bytes, big_endian: bool) -> tuple[int, int]:
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    s0 = s1 = 0
    for x0, x1 in zip(words[::2], words[1::2], strict=True):
        s0 = (s0 + x0 + s1) & _MASK
        s1 = (s1 + x1 + s0) & _MASK
    return s0, s1


def _blocks(frames: bytes | memoryview, frame_size: int) -> Iterator[U32]:
    """The whole frames as rows of big-endian words, some at a time, without a copy."""
    count = len(frames) // frame_size
    rows = np.frombuffer(frames, ">u4", count * frame_size // 4).reshape(count, frame_size // 4)
    step = max(1, _BLOCK_BYTES // frame_size)
    for start in range(0, count, step):
        yield rows[start : start + step]


def _verify(block: U32, at: Cursor, checksum: tuple[int, int]) -> tuple[U32, Stop]:
    """Headers (native words, one row a frame) of the valid frames that the block begins with, and why no more.

    checksum: cumulative before the block. In SQLite's order: a frame with another salt or page 0 is not summed.
    """
    headers = block[:, :_HEADER_WORDS].astype(np.uint32)
    same_salt = _leading((headers[:, _SALT1] == at.salt1) & (headers[:, _SALT2] == at.salt2))
    candidates = _leading(headers[:same_salt, _PAGE_NO] != 0)
    stored = headers[:candidates, _CHECKSUM1:]
    expected = _expected_checksums(block[:candidates], stored, at, checksum)
    valid = _leading((stored == expected).all(axis=1))
    if valid < candidates:
        return headers[:valid], Stop.CHECKSUM
    if candidates < same_salt:
        return headers[:valid], Stop.PAGE_ZERO
    return headers[:valid], Stop.SALT if same_salt < len(block) else Stop.END


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many are true before the first false one."""
    return len(flags) if flags.all() else int(flags.argmin())


def _expected_checksums(block: U32, stored: U32, at: Cursor, checksum: tuple[int, int]) -> U32:
    """What each frame's checksum is, if the one stored in the frame before it is right."""
    law = _law(at.page_size)
    before = np.empty((len(block), 2), np.uint32)
    before[:1] = checksum
    before[1:] = stored[:-1]
    words = block.view(">u4" if at.big_endian else "<u4").astype(np.uint32, copy=False)
    expected = before @ law.growth
    # einsum, not a matrix product: for integers its loop is the one that the compiler turns into vector instructions.
    expected[:, 0] += np.einsum("ij,j->i", words, law.weights1)
    expected[:, 1] += np.einsum("ij,j->i", words, law.weights2)
    return expected


@dataclass(frozen=True, slots=True, eq=False)
class _Law:
    """Constants of one page size: (s0, s1) before a frame, times growth, plus the words of the whole frame dot weights,
    is (s0, s1) after it. The weights of the words that the checksum leaves out, salts and checksum, are 0."""

    growth: U32
    weights1: U32
    weights2: U32


@lru_cache(maxsize=8)
def _law(page_size: int) -> _Law:
    data_words = page_size // 4
    fibonacci = [0, 1]
    while len(fibonacci) < data_words + 4:
        fibonacci.append((fibonacci[-1] + fibonacci[-2]) & _MASK)
    f = np.array(fibonacci, np.uint32)
    n = data_words + 2
    growth = np.array([[f[n - 1], f[n]], [f[n], f[n + 1]]], np.uint32)
    return _Law(growth, _frame_weights(f[:n]), _frame_weights(f[1 : n + 1]))


def _frame_weights(weights: U32) -> U32:
    """weights: for the words that are summed, last word first."""
    left_out = np.zeros(_HEADER_WORDS - 2, np.uint32)
    return np.concatenate([weights[::-1][:2], left_out, weights[::-1][2:]])


def _last_of_each(page_nos: U32, page_count: int) -> tuple[U32, I64]:
    """Page numbers up to page_count, ascending, each once, and the last position where each stands."""
    keys = (page_nos.astype(np.uint64) << np.uint64(32)) | np.arange(len(page_nos), dtype=np.uint64)
    keys.sort()
    pages = (keys >> np.uint64(32)).astype(np.uint32)
    kept = pages <= page_count
    kept[:-1] &= pages[1:] != pages[:-1]
    return pages[kept], (keys[kept] & np.uint64(_MASK)).astype(np.int64)
