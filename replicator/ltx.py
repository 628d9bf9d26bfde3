"""An LTX file, as Litestream 0.5 keeps it: header and pages to bytes, and back. Pure, over the caller's chunks and ``write``.

Owns the bytes of one file. Never talks to a store, never decides which pages belong into a file or which files make a
database. Source: github.com/superfly/ltx, README; compared with the files of Litestream 0.5.5, 0.5.15 and 0.5.17.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import lz4.block
import lz4.frame
from fastcrc import crc64

from replicator.errors import LtxDamaged
from replicator.pagehash import lock_page
from replicator.segment import MAX_TIME_MS, Writable

HEADER_SIZE = 100

_MAGIC = b"LTX1"
_NO_CHECKSUM = 2  # the file carries no checksum of the database; Litestream writes and restores only such files
_HEADER = struct.Struct(">4sIIIQQQQqQIIQ20s")
_PAGE = struct.Struct(">IH")
_LENGTH = struct.Struct(">I")
_SIZED = 1
_U64 = struct.Struct(">Q")
_CHECKSUM_FLAG = 1 << 63
_PAGE_SIZES = frozenset(1 << n for n in range(9, 17))
_MAX_TXID = (1 << 63) - 1
_FRAME_SLACK_BYTES = 64  # what an LTX page costs as an LZ4 frame beyond its block: headers, end mark, checksum


@dataclass(frozen=True)
class LtxHeader:
    """What a file says of itself: it takes a database from txid ``first - 1`` to ``last``; from nothing if first is 1.

    page_count: of the database afterwards. time_ms: UTC milliseconds since 1970 of its last transaction. wal_*, salt*: where
    in the writer's WAL it was; for the writer, 0 in files that were merged. Raises ValueError for values that no file can have.
    """

    page_size: int
    page_count: int
    first: int
    last: int
    time_ms: int
    wal_offset: int = 0
    wal_size: int = 0
    salt1: int = 0
    salt2: int = 0
    node: int = 0

    def __post_init__(self) -> None:
        _valid(self.page_size in _PAGE_SIZES, f"page size {self.page_size} is not one of SQLite's")
        _valid(0 <= self.page_count < 1 << 32, f"page count {self.page_count} is out of range")
        _valid(1 <= self.first <= self.last <= _MAX_TXID, f"txids {self.first:x} to {self.last:x} are not a range")
        _valid(0 <= self.time_ms <= MAX_TIME_MS, f"time {self.time_ms} is out of range")
        _valid(self.wal_offset >= 0, f"the WAL offset {self.wal_offset} is out of range")
        placed = self.wal_size or self.salt1 or self.salt2
        _valid(bool(self.wal_offset) or not placed, "it has a place in a WAL without an offset")

    @property
    def is_snapshot(self) -> bool:
        """It holds the whole database and needs no predecessor."""
        return self.first == 1

    def encode(self) -> bytes:
        """HEADER_SIZE bytes."""
        sizes = (_NO_CHECKSUM, self.page_size, self.page_count)
        wal = (self.wal_offset, self.wal_size, self.salt1, self.salt2)
        return _HEADER.pack(_MAGIC, *sizes, self.first, self.last, self.time_ms, 0, *wal, self.node, bytes(20))

    @classmethod
    def decode(cls, data: bytes, name: str = "LTX file") -> LtxHeader:
        """The header in the first HEADER_SIZE bytes; name: of the file, for messages. Raises LtxDamaged.

        Its checksum comes at the end of the file: what a header says is proven only when all pages were read.
        """
        _require(len(data) >= HEADER_SIZE, name, f"it ends at byte {len(data)}, within its header")
        fields = _HEADER.unpack_from(data)
        magic, flags, page_size, page_count, first, last, time_ms, before, offset, size, salt1, salt2, node, unused = (
            fields
        )
        _require(magic == _MAGIC, name, "it does not begin like an LTX file")
        _require(flags == _NO_CHECKSUM, name, f"it has flags {flags:#x}, and Litestream writes {_NO_CHECKSUM:#x}")
        _require(before == 0 and not any(unused), name, "reserved bytes of its header are in use")
        try:
            return cls(page_size, page_count, first, last, time_ms, offset, size, salt1, salt2, node)
        except ValueError as error:
            raise _damaged(name, str(error)) from None


class LtxReader:
    """Reads one file from its first byte to its last, in bounded memory beside 10 bytes a page.

    Every method raises LtxDamaged for bytes that are not as they were written.
    """

    def __init__(self, chunks: Iterable[bytes], name: str = "LTX file") -> None:
        """chunks: the whole file, in pieces of any size, taken as they are needed. Reads the header."""
        self.name = name
        self._input = _Input(chunks, name)
        head = self._input.take(HEADER_SIZE)
        self.header = LtxHeader.decode(head, name)
        self._crc: int = crc64.go_iso(head)
        self._index = bytearray()

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """All pages, ascending: (page_no, content). They are proven only when the iteration has ended without an error.

        Then the checksum of the whole file was right, and nothing follows it.
        """
        last = 0
        while (page := self._page(last)) is not None:
            last = page[0]
            yield page
        expected = _following(self.header, last)
        complete = not self.header.is_snapshot or expected > self.header.page_count
        _require(complete, self.name, f"it claims a whole database and ends before page {expected}")
        self._finish()

    def _page(self, last: int) -> tuple[int, bytes] | None:
        """The next page; None at the mark that ends them."""
        offset = self._input.offset
        head = self._input.take(_PAGE.size)
        page_no, flags = _PAGE.unpack(head)
        if page_no == 0:
            _require(flags == 0, self.name, "the mark after its pages has flags")
            self._crc = crc64.go_iso(head, self._crc)
            return None
        self._check_page_no(page_no, last)
        if flags == _SIZED:
            length = self._input.take(_LENGTH.size)
            self._crc = crc64.go_iso(head + length, self._crc)
            data = self._block(page_no, _LENGTH.unpack(length)[0])
        else:
            _require(flags == 0, self.name, f"page {page_no} has flags {flags:#x}")
            self._crc = crc64.go_iso(head, self._crc)
            data = self._frame(page_no)
        self._crc = crc64.go_iso(data, self._crc)
        self._index += _entry(page_no, offset, self._input.offset - offset)
        return page_no, data

    def _check_page_no(self, page_no: int, last: int) -> None:
        header = self.header
        if header.is_snapshot:
            in_order = page_no == _following(header, last)
        else:
            in_order = last < page_no and page_no != lock_page(header.page_size)
        _require(in_order, self.name, f"page {page_no} follows page {last}")
        _require(page_no <= header.page_count, self.name, f"it holds page {page_no} of {header.page_count}")

    def _block(self, page_no: int, length: int) -> bytes:
        size = self.header.page_size
        _require(0 < length <= size + size // 255 + 16, self.name, f"page {page_no} claims {length} bytes")
        block = self._input.take(length)
        try:
            data: bytes = lz4.block.decompress(block, uncompressed_size=size)
        except lz4.block.LZ4BlockError as error:
            raise _damaged(self.name, f"page {page_no} cannot be decompressed ({error})") from error
        _require(len(data) == size, self.name, f"page {page_no} has {len(data)} bytes instead of {size}")
        return data

    def _frame(self, page_no: int) -> bytes:
        """How long the frame is, only the frame says."""
        size = self.header.page_size
        window = self._input.peek(size + size // 255 + _FRAME_SLACK_BYTES)
        decompressor = lz4.frame.LZ4FrameDecompressor()
        try:
            data: bytes = decompressor.decompress(window, max_length=size + 1)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self.name, f"page {page_no} cannot be decompressed ({error})") from error
        whole = decompressor.eof and len(data) == size
        _require(whole, self.name, f"page {page_no} is not one frame of {size} bytes")
        self._input.take(len(window) - len(decompressor.unused_data or b""))
        return data

    def _finish(self) -> None:
        index = bytes(self._index) + b"\0"
        index += _U64.pack(len(index))
        _require(self._input.take(len(index)) == index, self.name, "its index does not tell where its pages are")
        post_apply = self._input.take(_U64.size)
        _require(not any(post_apply), self.name, "it has a checksum of the database, and says that it has none")
        checksum = _CHECKSUM_FLAG | crc64.go_iso(index + post_apply, self._crc)
        _require(self._input.take(_U64.size) == _U64.pack(checksum), self.name, "it does not have its checksum")
        _require(not self._input.peek(1), self.name, "bytes follow after its end")


class LtxWriter:
    """Writes one file, page by page. What it wrote is a file only after ``finish``. Bad arguments are ValueErrors."""

    def __init__(self, out: Writable, header: LtxHeader) -> None:
        self._out = out
        self._header = header
        self._last = 0
        self._index = bytearray()
        encoded = header.encode()
        self._crc: int = crc64.go_iso(encoded)
        self._out.write(encoded)
        self._written = len(encoded)

    def add(self, page_no: int, data: bytes | memoryview) -> None:
        """Append a page; page numbers must ascend, leave out the lock page, and in a snapshot leave out nothing else."""
        header = self._header
        _valid(len(data) == header.page_size, f"page {page_no} has {len(data)} bytes")
        _valid(self._last < page_no <= header.page_count, f"page {page_no} is out of order or out of range")
        _valid(page_no != lock_page(header.page_size), f"page {page_no} is the lock page, which no file holds")
        expected = _following(header, self._last)
        _valid(not header.is_snapshot or page_no == expected, f"page {expected} was left out of a snapshot")
        block = lz4.block.compress(data, store_size=False)
        head = _PAGE.pack(page_no, _SIZED) + _LENGTH.pack(len(block))
        self._crc = crc64.go_iso(data, crc64.go_iso(head, self._crc))
        self._index += _entry(page_no, self._written, len(head) + len(block))
        self._write(head + block)
        self._last = page_no

    def finish(self) -> int:
        """Write what is left; returns the size of the file in bytes. The caller closes or syncs ``out``."""
        expected = _following(self._header, self._last)
        complete = not self._header.is_snapshot or expected > self._header.page_count
        _valid(complete, f"page {expected} was left out of a snapshot")
        index = bytes(self._index) + b"\0"
        rest = _PAGE.pack(0, 0) + index + _U64.pack(len(index)) + _U64.pack(0)
        checksum = _CHECKSUM_FLAG | crc64.go_iso(rest, self._crc)
        self._write(rest + _U64.pack(checksum))
        return self._written

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._written += len(data)


class _Input:
    """Bytes out of chunks. offset: of the next byte in the file."""

    def __init__(self, chunks: Iterable[bytes], name: str) -> None:
        self._chunks = iter(chunks)
        self._name = name
        self._held = b""
        self._at = 0
        self.offset = 0

    def take(self, length: int) -> bytes:
        """Exactly that many. Raises LtxDamaged at the end of the file."""
        found = self.peek(length)
        ends_at = self.offset + len(found)
        _require(len(found) == length, self._name, f"it ends at byte {ends_at}, before it is complete")
        self._at += length
        self.offset += length
        return found

    def peek(self, length: int) -> bytes:
        """That many, or all that are left, without taking them."""
        if len(self._held) - self._at < length:
            parts = [self._held[self._at :]]
            missing = length - len(parts[0])
            while missing > 0 and (chunk := next(self._chunks, None)) is not None:
                parts.append(chunk)
                missing -= len(chunk)
            self._held, self._at = b"".join(parts), 0
        return self._held[self._at : self._at + length]


def _following(header: LtxHeader, page_no: int) -> int:
    """The page after a page, in a file that leaves out none but the lock page."""
    return page_no + 1 + (page_no + 1 == lock_page(header.page_size))


def _entry(page_no: int, offset: int, length: int) -> bytes:
    return _uvarint(page_no) + _uvarint(offset) + _uvarint(length)


def _uvarint(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _damaged(name: str, what: str) -> LtxDamaged:
    return LtxDamaged(f"{name} is damaged: {what}; fetch it again, or restore to an earlier moment")


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise _damaged(name, what)


def _valid(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
