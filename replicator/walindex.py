"""SQLite's wal-index, the ``-shm`` file: its header, and the tables that say which frame of the WAL has a page. Pure.

Owns that format (sqlite.org/walformat.html, section 2, and wal.c: walIndexWriteHdr, walIndexAppend). Never opens a file, takes no lock:
whoever writes what is made here holds SQLite's write lock. Integers are in the host's byte order, as the file is never moved.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from replicator.errors import FormatError
from replicator.wal import FRAME_HEADER_SIZE, HEADER_SIZE, Cursor, header_checksum

BLOCK_BYTES = 32768
COPY_BYTES = 48
HEADER_BYTES = 2 * COPY_BYTES
BIG_ENDIAN = sys.byteorder == "big"

_VERSION = 3007000
_COPY = struct.Struct("=IIIBBHIIII8s")
_CHECKSUM = struct.Struct("=II")
_FIRST_BLOCK_SKIPS = 136  # bytes of the first block that are headers and not page numbers
_FRAMES = 4096  # of a block
_FIRST_FRAMES = _FRAMES - _FIRST_BLOCK_SKIPS // 4
_HASH_AT = 4 * _FRAMES
_SLOTS = 8192


@dataclass(frozen=True)
class IndexHeader:
    """change: grows with every commit. frames: of committed transactions in the WAL; page_count: pages of the database then.

    page_size may be 0 while there is no frame. salts: as they are in the WAL's header. checksum1, checksum2: cumulative, of the last frame.
    """

    change: int
    big_endian: bool
    page_size: int
    frames: int
    page_count: int
    checksum1: int
    checksum2: int
    salts: bytes

    @classmethod
    def decode(cls, data: bytes) -> IndexHeader:
        """data: the first HEADER_BYTES of the file. Raises FormatError for what SQLite would recover, or another version of it."""
        first, second = data[:COPY_BYTES], data[COPY_BYTES:HEADER_BYTES]
        if len(second) < COPY_BYTES or first != second:
            raise FormatError("the wal-index is being written, or was left in the middle of that; SQLite recovers it")
        version, _, change, is_ready, big_endian, size, frames, page_count, sum1, sum2, salts = _COPY.unpack_from(first)
        body = first[: _COPY.size]
        if not is_ready or _CHECKSUM.unpack_from(first, _COPY.size) != header_checksum(body, BIG_ENDIAN):
            raise FormatError("the wal-index does not have its checksum; SQLite recovers it")
        if version != _VERSION:
            raise FormatError(f"the wal-index has version {version}, only {_VERSION} is known")
        page_size = (size & 0xFE00) + ((size & 1) << 16)
        return cls(change, bool(big_endian), page_size, frames, page_count, sum1, sum2, salts)

    def encode(self) -> bytes:
        """One of the two equal copies. The second is written first, so that a reader takes neither until both are."""
        size = (self.page_size & 0xFF00) | (self.page_size >> 16)
        counts = (self.frames, self.page_count, self.checksum1, self.checksum2)
        body = _COPY.pack(_VERSION, 0, self.change, 1, self.big_endian, size, *counts, self.salts)
        return body + _CHECKSUM.pack(*header_checksum(body, BIG_ENDIAN))

    def cursor(self, page_size: int) -> Cursor:
        """The place in the WAL after the last frame."""
        offset = HEADER_SIZE + self.frames * (FRAME_HEADER_SIZE + page_size)
        salt1, salt2 = struct.unpack(">2I", self.salts)
        return Cursor(offset, page_size, self.big_endian, salt1, salt2, self.checksum1, self.checksum2)


@dataclass(frozen=True)
class Stretch:
    """Frames of one block: its number, how many frames before them it knows, and the page of each of these."""

    block: int
    known: int
    page_nos: Sequence[int]


def stretches(frames: int, page_nos: Sequence[int]) -> Iterator[Stretch]:
    """The blocks in which pages are entered whose frames follow the first ``frames`` of the WAL."""
    done = 0
    while done < len(page_nos):
        place = frames + done + _FRAMES - _FIRST_FRAMES
        block, known = divmod(place, _FRAMES)
        if block == 0:
            known -= _FRAMES - _FIRST_FRAMES
        room = (_FIRST_FRAMES if block == 0 else _FRAMES) - known
        yield Stretch(block, known, page_nos[done : done + room])
        done += room


def entered(block: bytes, stretch: Stretch) -> bytes:
    """The block with these frames in it, and none after them. What is known of the frames before them stays where it is."""
    skips = _FIRST_BLOCK_SKIPS // 4 if stretch.block == 0 else 0
    numbers = memoryview(bytearray(block[:_HASH_AT])).cast("I")
    slots = memoryview(bytearray(block[_HASH_AT:BLOCK_BYTES])).cast("H")
    for slot in range(_SLOTS):
        if slots[slot] > stretch.known:
            slots[slot] = 0
    for place in range(skips + stretch.known, _FRAMES):
        numbers[place] = 0
    for index, page_no in enumerate(stretch.page_nos, stretch.known + 1):
        slot = (page_no * 383) % _SLOTS
        while slots[slot]:
            slot = (slot + 1) % _SLOTS
        slots[slot] = index
        numbers[skips + index - 1] = page_no
    return bytes(numbers.cast("B")) + bytes(slots.cast("B"))
