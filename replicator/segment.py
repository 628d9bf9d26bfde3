"""The native segment: header and pages to bytes, and back. Pure, over the caller's ``write`` and ``read_at``.

Owns docs/format.md, section 3, and what section 6 says of segments. Never talks to a store, never opens a file, never
decides which pages belong into a segment.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Protocol, overload

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from replicator.errors import SegmentDamaged, SegmentVersionUnknown
from replicator.pagehash import lock_page, page_hash
from replicator.values import MAX_TIMELINE, MAX_TXID

VERSION = 1
HEADER_SIZE = 160
TRAILER_SIZE = 72
DEFAULT_LEVEL = 3
DEFAULT_TAIL = 64 * 1024
MAX_PAGE_COUNT = 0xFFFFFFFE
MAX_TIME_MS = 253402300799999

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> exactly those bytes, or fewer at the end of the segment. Called by whichever thread reads."""

_MAGIC = b"\x89RSEG\r\n\x1a"
_END_MAGIC = _MAGIC[::-1]
_HEADER = struct.Struct("<8sHHI16sIIIIQQQQQQQQIIIIQ16s")
_TRAILER = struct.Struct("<QQIIIIHHIQQ")
_DIGEST = struct.Struct("<Q")
_SNAPSHOT, _SOURCE, _SOURCE_BIG_ENDIAN = 1, 2, 4
_KNOWN_FLAGS = _SNAPSHOT | _SOURCE | _SOURCE_BIG_ENDIAN
_GROUP_BYTES = 256 * 1024
_MAX_GROUP_BYTES = 1024 * 1024
_PAGE_SIZES = frozenset(1 << n for n in range(9, 17))
_HEX = frozenset("0123456789abcdef")
_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_CHECKSUM_BYTES, _LENGTH_BYTES, _RUN_BYTES = 8, 4, 8


class Writable(Protocol):
    """Where a segment goes: a file opened for writing in binary, or the like. ``write`` takes all it is given."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class Source:
    """Where in the writer's WAL a segment ends: the file, the salts of its header, the checksum at ``offset``.

    device, inode: of the WAL file. offset: the byte after the last frame that is in the segment. big_endian: byte order
    of the checksums.
    """

    device: int
    inode: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int
    offset: int
    big_endian: bool

    def __post_init__(self) -> None:
        wide = (self.device, self.inode, self.offset)
        narrow = (self.salt1, self.salt2, self.checksum1, self.checksum2)
        _valid(
            all(0 <= n <= _U64 for n in wide) and all(0 <= n <= _U32 for n in narrow), "a source field is out of range"
        )


@dataclass(frozen=True)
class SegmentHeader:
    """What a segment says of itself; it takes ``database`` on ``timeline`` from txid ``first - 1`` to ``last``.

    database: 32 lower-case hex digits. page_count, pages_before: size of the database after and before, in pages.
    Times are UTC milliseconds since 1970. state_before, state_after: state checksums. In a snapshot ``first == last``
    and what was before is 0. Raises ValueError for values that no segment can have.
    Source: docs/format.md, sections 3.1 and 3.2.
    """

    database: str
    timeline: int
    first: int
    last: int
    snapshot: bool
    page_size: int
    page_count: int
    pages_before: int
    first_commit_ms: int
    last_commit_ms: int
    state_before: int
    state_after: int
    source: Source | None = None

    def __post_init__(self) -> None:
        _valid(len(self.database) == 32 and set(self.database) <= _HEX, "the database id is not 32 hex digits")
        _valid(1 <= self.timeline <= MAX_TIMELINE, f"timeline {self.timeline} is out of range")
        _valid(1 <= self.first <= self.last <= MAX_TXID, f"txids {self.first} to {self.last} are not a range")
        _valid(not self.snapshot or self.first == self.last, "a snapshot has more than one txid")
        _valid(self.page_size in _PAGE_SIZES, f"page size {self.page_size} is not one of SQLite's")
        _valid(0 <= self.page_count <= MAX_PAGE_COUNT, f"page count {self.page_count} is out of range")
        _valid(0 <= self.pages_before <= MAX_PAGE_COUNT, f"page count {self.pages_before} before is out of range")
        _valid(not self.snapshot or self.pages_before == 0, "a snapshot has pages before it")
        _valid(0 <= self.first_commit_ms <= MAX_TIME_MS, "the time of the first commit is out of range")
        _valid(0 <= self.last_commit_ms <= MAX_TIME_MS, "the time of the last commit is out of range")
        _valid(0 <= self.state_before <= (_U64 if self.pages_before else 0), "the state before is out of range")
        _valid(0 <= self.state_after <= (_U64 if self.page_count else 0), "the state after is out of range")

    @property
    def flags(self) -> int:
        flags = _SNAPSHOT if self.snapshot else 0
        if self.source is not None:
            flags |= _SOURCE | (_SOURCE_BIG_ENDIAN if self.source.big_endian else 0)
        return flags

    def encode(self) -> bytes:
        """HEADER_SIZE bytes."""
        s = self.source or Source(0, 0, 0, 0, 0, 0, 0, False)
        state = (self.state_before, self.state_after)
        times = (self.first_commit_ms, self.last_commit_ms)
        counts = (self.page_count, self.pages_before, 0)
        source = (s.device, s.inode, s.salt1, s.salt2, s.checksum1, s.checksum2, s.offset)
        start = (_MAGIC, VERSION, self.flags, self.page_size, bytes.fromhex(self.database), self.timeline)
        body = _HEADER.pack(*start, *counts, self.first, self.last, *times, *state, *source, bytes(16))
        return body + _DIGEST.pack(_xxh3(body))

    @classmethod
    def decode(cls, data: bytes, name: str = "segment") -> SegmentHeader:
        """The header in exactly HEADER_SIZE bytes; name: of the segment, for messages.

        Raises SegmentDamaged, and SegmentVersionUnknown for an intact header of a later version.
        """
        _require(len(data) == HEADER_SIZE, name, f"its header has {len(data)} bytes instead of {HEADER_SIZE}")
        body = data[: _HEADER.size]
        magic, version, flags, page_size, database, timeline, *rest = _HEADER.unpack(body)
        page_count, pages_before, reserved, first, last, first_ms, last_ms, before, after, *source, unused = rest
        _require(magic == _MAGIC, name, "it does not begin like a segment")
        _require(_DIGEST.unpack(data[_HEADER.size :])[0] == _xxh3(body), name, "its header does not have its checksum")
        _check_version(version, flags, name)
        _require(not reserved and not any(unused), name, "reserved bytes of its header are in use")
        has_source, big_endian = bool(flags & _SOURCE), bool(flags & _SOURCE_BIG_ENDIAN)
        _require(has_source or not (any(source) or big_endian), name, "it has a source without the flag that says so")
        try:
            return cls(
                database=database.hex(),
                timeline=timeline,
                first=first,
                last=last,
                snapshot=bool(flags & _SNAPSHOT),
                page_size=page_size,
                page_count=page_count,
                pages_before=pages_before,
                first_commit_ms=first_ms,
                last_commit_ms=last_ms,
                state_before=before,
                state_after=after,
                source=Source(*(*source, big_endian)) if has_source else None,
            )
        except ValueError as error:
            raise _damaged(name, str(error)) from None


def read_header(data: bytes) -> SegmentHeader:
    """The header at the start of ``data``, which is a segment or at least its first HEADER_SIZE bytes.

    Raises SegmentDamaged, SegmentVersionUnknown.
    """
    return SegmentHeader.decode(bytes(data[:HEADER_SIZE]))


@dataclass(frozen=True, eq=False)
class Group:
    """Pages that are compressed together. number: from 0. offset, length: of its bytes in the segment; page_nos: ascending."""

    number: int
    offset: int
    length: int
    checksum: int
    page_nos: NDArray[np.uint32]


class SegmentWriter:
    """Writes one segment, group by group; holds one group and 8 bytes a run of page numbers in memory.

    What it wrote is a segment only after ``finish``; without it, it cannot be opened. Bad arguments are ValueErrors.
    """

    def __init__(self, out: Writable, header: SegmentHeader, *, level: int = DEFAULT_LEVEL) -> None:
        """level: of zstd, 1 (fast) to 22 (small)."""
        self._out = out
        self._header = header
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        self._pages_per_group = _GROUP_BYTES // header.page_size
        self._lock_page = lock_page(header.page_size)
        self._buffer = bytearray()
        self._last_page_no = 0
        self._pages = self._new_pages = 0
        self._checksums, self._lengths, self._runs = array("Q"), array("I"), array("I")
        self._finished = False
        encoded = header.encode()
        self._header_checksum = _DIGEST.unpack(encoded[-_DIGEST.size :])[0]
        self._out.write(encoded)
        self._written = len(encoded)

    def add(self, page_no: int, data: bytes | bytearray | memoryview) -> None:
        """Append a page; page numbers must ascend, and leave out the lock page. ``data`` is copied."""
        _valid(not self._finished, "the segment is finished")
        _valid(len(data) == self._header.page_size, f"page {page_no} has {len(data)} bytes")
        _valid(
            self._last_page_no < page_no <= self._header.page_count, f"page {page_no} is out of order or out of range"
        )
        _valid(page_no != self._lock_page, f"page {page_no} is the lock page, which no segment holds")
        if self._runs and page_no == self._last_page_no + 1:
            self._runs[-1] += 1
        else:
            self._runs.extend((page_no - self._last_page_no - 1, 1))
        self._last_page_no = page_no
        self._pages += 1
        self._new_pages += page_no > self._header.pages_before
        self._buffer += data
        if len(self._buffer) == self._pages_per_group * self._header.page_size:
            self._flush()

    def takes_group(self, pages: int) -> bool:
        """Whether ``add_group`` can be called now for a group of so many pages: it must be full, and begin where a group begins."""
        return not self._buffer and pages == self._pages_per_group

    def add_group(self, page_nos: NDArray[np.uint32], frame: bytes) -> None:
        """Append a whole group as it is in another segment of the same page size; ``frame``: its bytes, which were checked."""
        _valid(
            not self._finished and self.takes_group(len(page_nos)), "a group can be taken only between groups, if full"
        )
        fits = self._last_page_no < page_nos[0] and page_nos[-1] <= self._header.page_count
        _valid(fits, f"the group of page {page_nos[0]} is out of order or out of range")
        breaks = np.flatnonzero(np.diff(page_nos) != 1) + 1
        for stretch in np.split(page_nos, breaks):
            first, count = int(stretch[0]), len(stretch)
            if self._runs and first == self._last_page_no + 1:
                self._runs[-1] += count
            else:
                self._runs.extend((first - self._last_page_no - 1, count))
            self._last_page_no = first + count - 1
        self._pages += len(page_nos)
        self._new_pages += int(np.count_nonzero(page_nos > self._header.pages_before))
        self._append(frame)

    def finish(self) -> int:
        """Write what is left; returns the size of the segment in bytes. The caller closes or syncs ``out``.

        Raises ValueError when a page is missing that a snapshot, or a segment that grows the database, has to hold.
        """
        _valid(not self._finished, "the segment is finished")
        h = self._header
        missing = _new_pages(h.page_size, h.pages_before, h.page_count) - self._new_pages
        _valid(not missing, f"{missing} of the pages {h.pages_before + 1} to {h.page_count} were not added")
        self._finished = True
        if self._buffer:
            self._flush()
        parts = ((self._checksums, "<u8"), (self._lengths, "<u4"), (self._runs, "<u4"))
        index = b"".join(np.array(part).astype(kind).tobytes() for part, kind in parts)
        trailer = _Trailer(
            index_offset=self._written,
            index_length=len(index),
            pages=self._pages,
            pages_per_group=self._pages_per_group,
            page_size=h.page_size,
            page_count=h.page_count,
            version=VERSION,
            flags=h.flags,
            pages_before=h.pages_before,
            index_checksum=_xxh3(index),
            header_checksum=self._header_checksum,
        )
        self._write(index + trailer.encode())
        return self._written

    def _flush(self) -> None:
        frame = self._compressor.compress(self._buffer)
        self._buffer.clear()
        self._append(frame)

    def _append(self, frame: bytes) -> None:
        self._checksums.append(_xxh3(frame))
        self._lengths.append(len(frame))
        self._write(frame)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._written += len(data)


class ReadAhead:
    """A ``ReadAt`` for who goes through a segment from its begin to its end: what follows comes with what was asked for.

    size: of the segment. ahead_bytes: how much is asked of ``read_at`` at once, and kept. For one thread.
    """

    def __init__(self, read_at: ReadAt, size: int, ahead_bytes: int) -> None:
        self._read_at = read_at
        self._size = size
        self._ahead_bytes = ahead_bytes
        self._offset, self._data = 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        begin = offset - self._offset
        if begin < 0 or begin + length > len(self._data):
            self._data = b""
            self._data = self._read_at(offset, max(length, min(self._ahead_bytes, self._size - offset)))
            self._offset, begin = offset, 0
        return self._data[begin : begin + length]


class SegmentReader:
    """Reads one segment, in order or at random; whatever it returns has been checked.

    Every method raises SegmentDamaged for bytes that are not as they were written, or SegmentVersionUnknown. May be
    used by several threads at once when ``read_at`` may.
    """

    def __init__(self, read_at: ReadAt, size: int, *, tail: int = DEFAULT_TAIL, name: str = "segment") -> None:
        """Reads and checks trailer and index, in one read of the last ``tail`` bytes when they lie in it.

        size: of the segment in bytes. name: of the segment, for messages, such as its key. What lies in the tail is
        never read again.
        """
        _require(size >= HEADER_SIZE + TRAILER_SIZE, name, f"{size} bytes are too few")
        self.name = name
        self.size = size
        self._read_at = read_at
        self._header: SegmentHeader | None = None
        self._tail_offset, self._tail = size, b""
        start = max(0, size - max(tail, TRAILER_SIZE))
        self._tail = self.read(start, size - start)
        self._tail_offset = start
        self._trailer = _Trailer.decode(self.read(size - TRAILER_SIZE, TRAILER_SIZE), size, name)
        index = self.read(self._trailer.index_offset, self._trailer.index_length)
        self._index = _Index(index, self._trailer, name)
        self.groups: Sequence[Group] = _Groups(self._index)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "segment") -> SegmentReader:
        """A whole segment in memory."""
        return cls(lambda offset, length: data[offset : offset + length], len(data), tail=len(data), name=name)

    @property
    def header(self) -> SegmentHeader:
        """Read at first use, unless it was in the tail."""
        if self._header is None:
            data = self.read(0, HEADER_SIZE)
            header = SegmentHeader.decode(data, self.name)
            t = self._trailer
            repeated = (t.page_size, t.page_count, t.pages_before, t.flags, t.header_checksum)
            own = (header.page_size, header.page_count, header.pages_before, header.flags)
            same = repeated == (*own, _DIGEST.unpack(data[-_DIGEST.size :])[0])
            _require(same, self.name, "its header and trailer belong to different segments")
            self._header = header
        return self._header

    @property
    def page_size(self) -> int:
        return self._trailer.page_size

    @property
    def pages_per_group(self) -> int:
        return self._trailer.pages_per_group

    def rank_after(self, page_no: int) -> int:
        """How many of its pages have a number up to ``page_no``: the rank of the next one, counted from 0."""
        return self._index.rank_after(page_no)

    def page_nos(self, first_rank: int = 0, end_rank: int | None = None) -> NDArray[np.uint32]:
        """Numbers of its pages with these ranks, ascending; without ranks of all."""
        return self._index.page_nos(first_rank, self._trailer.pages if end_rank is None else end_rank)

    def pages(self) -> Iterator[tuple[int, memoryview]]:
        """All pages, ascending: (page_no, content). Reads and checks group by group."""
        for group in self.groups:
            yield from self.group_pages(group)

    def group_pages(self, group: Group) -> list[tuple[int, memoryview]]:
        """The pages of one group, in one read."""
        return self.decode_group(group, self.read(group.offset, group.length))

    def decode_group(self, group: Group, data: bytes | memoryview) -> list[tuple[int, memoryview]]:
        """The pages of one group out of its bytes, for a caller that fetches several groups with one request."""
        where = f"its group at byte {group.offset}"
        self._check_group(group, data)
        view = memoryview(_decompress(data, len(group.page_nos) * self.page_size, self.name, where))
        size = self.page_size
        return [(page_no, view[i * size : (i + 1) * size]) for i, page_no in enumerate(group.page_nos.tolist())]

    def group_bytes(self, group: Group) -> bytes:
        """The bytes of a group as they are stored, with the right checksum."""
        data = self.read(group.offset, group.length)
        self._check_group(group, data)
        return data

    def _check_group(self, group: Group, data: bytes | memoryview) -> None:
        intact = len(data) == group.length and _xxh3(data) == group.checksum
        _require(intact, self.name, f"its group at byte {group.offset} does not have its checksum")

    def group_of(self, page_no: int) -> Group | None:
        """The group that holds a page, for a caller that caches groups; None when the segment does not hold it."""
        rank = self._index.rank(page_no)
        return None if rank is None else self.groups[rank // self._trailer.pages_per_group]

    def page(self, page_no: int) -> bytes | None:
        """The content of one page, in one read; None when the segment does not hold it."""
        rank = self._index.rank(page_no)
        if rank is None:
            return None
        number, place = divmod(rank, self._trailer.pages_per_group)
        return bytes(self.group_pages(self.groups[number])[place][1])

    def verify(self, check: Callable[[], None] = lambda: None) -> None:
        """Read everything once and check it; of a snapshot also that its pages have the state checksum that it claims.

        check: called before each group; what it raises ends the reading.
        That every page is there that has to be (new ones; all of a snapshot) is checked whenever a segment is opened.
        """
        header = self.header
        state = 0
        for group in self.groups:
            check()
            pages = self.group_pages(group)
            if header.snapshot:
                state = reduce(xor, (page_hash(page_no, data) for page_no, data in pages), state)
        same = not header.snapshot or state == header.state_after
        _require(same, self.name, "its pages do not have the state checksum that it claims")

    def read(self, offset: int, length: int) -> bytes:
        """Bytes as they are stored, such as those of several groups. Offset and length must lie in the segment."""
        if offset >= self._tail_offset:
            begin = offset - self._tail_offset
            return self._tail[begin : begin + length]
        data = self._read_at(offset, length)
        _require(len(data) == length, self.name, f"it ends at byte {offset + len(data)} instead of {self.size}")
        return data


@dataclass(frozen=True)
class _Trailer:
    """Source: docs/format.md, section 3.5."""

    index_offset: int
    index_length: int
    pages: int
    pages_per_group: int
    page_size: int
    page_count: int
    version: int
    flags: int
    pages_before: int
    index_checksum: int
    header_checksum: int

    def encode(self) -> bytes:
        sizes = (
            self.index_offset,
            self.index_length,
            self.pages,
            self.pages_per_group,
            self.page_size,
            self.page_count,
        )
        checksums = (self.index_checksum, self.header_checksum)
        body = _TRAILER.pack(*sizes, self.version, self.flags, self.pages_before, *checksums)
        return body + _DIGEST.pack(_xxh3(body)) + _END_MAGIC

    @classmethod
    def decode(cls, data: bytes, size: int, name: str) -> _Trailer:
        """size: of the whole segment. Afterwards every offset and length in it lies in the segment."""
        body, checksum, magic = data[: _TRAILER.size], data[_TRAILER.size : -len(_END_MAGIC)], data[-len(_END_MAGIC) :]
        _require(magic == _END_MAGIC, name, "it does not end like a segment, so it is cut off or something else")
        _require(_DIGEST.pack(_xxh3(body)) == checksum, name, "its trailer does not have its checksum")
        t = cls(*_TRAILER.unpack(body))
        _check_version(t.version, t.flags, name)
        _require(t.page_size in _PAGE_SIZES, name, f"it claims a page size of {t.page_size}")
        most = _MAX_GROUP_BYTES // t.page_size
        _require(1 <= t.pages_per_group <= most, name, f"it claims {t.pages_per_group} pages in a group")
        fits = t.index_offset >= HEADER_SIZE and t.index_offset + t.index_length + TRAILER_SIZE == size
        _require(fits, name, "its parts do not add up to its size")
        _require(t.pages <= t.page_count <= MAX_PAGE_COUNT, name, f"it claims {t.pages} of {t.page_count} pages")
        _require(t.index_length >= 12 * t.groups, name, f"its index is too short for {t.groups} groups")
        return t

    @property
    def groups(self) -> int:
        return -(-self.pages // self.pages_per_group)


class _Index:
    """Which pages a segment holds, and where. Source: docs/format.md, section 3.4.

    A page's rank is its place in the ascending order of all pages, from 0.
    """

    def __init__(self, data: bytes, trailer: _Trailer, name: str) -> None:
        """Everything allocated here is in proportion to ``data``. Raises SegmentDamaged."""
        _require(_xxh3(data) == trailer.index_checksum, name, "its index does not have its checksum")
        self.trailer = trailer
        lengths_at = _CHECKSUM_BYTES * trailer.groups
        runs_at = lengths_at + _LENGTH_BYTES * trailer.groups
        self.checksums = np.frombuffer(data[:lengths_at], dtype="<u8")
        self.lengths = np.frombuffer(data[lengths_at:runs_at], dtype="<u4")
        self._place_groups(name)
        _require((len(data) - runs_at) % _RUN_BYTES == 0, name, "its index ends within a run of pages")
        self._place_pages(np.frombuffer(data[runs_at:], dtype="<u4").astype(np.uint64), name)

    def _place_groups(self, name: str) -> None:
        """Groups lie one after the other from the end of the header to the index."""
        t = self.trailer
        full = t.pages_per_group * t.page_size
        longest = full + full // 256 + 64
        fits = bool(np.all(self.lengths <= longest))
        _require(fits, name, "a group in its index is longer than any can be")
        ends = np.cumsum(self.lengths, dtype=np.uint64) + np.uint64(HEADER_SIZE)
        self.offsets = ends - self.lengths
        end = int(ends[-1]) if t.groups else HEADER_SIZE
        _require(end == t.index_offset, name, "the groups in its index do not reach from header to index")

    def _place_pages(self, runs: NDArray[np.uint64], name: str) -> None:
        """Runs are (gap, count); in 64 bits nothing can overflow."""
        t = self.trailer
        gaps, self._counts = runs[0::2], runs[1::2]
        _require(bool(np.all(self._counts > 0) and np.all(gaps[1:] > 0)), name, "a run of pages in its index is empty")
        ends = np.cumsum(self._counts, dtype=np.uint64)
        self._ranks = ends - self._counts
        self._firsts = np.cumsum(gaps, dtype=np.uint64) + self._ranks + np.uint64(1)
        total = int(ends[-1]) if len(ends) else 0
        _require(total == t.pages, name, f"its index holds {total} pages instead of {t.pages}")
        last = int(self._firsts[-1] + self._counts[-1]) - 1 if len(ends) else 0
        _require(last <= t.page_count, name, f"it holds page {last} of a database of {t.page_count} pages")
        _require(self.rank(lock_page(t.page_size)) is None, name, "it holds the lock page")
        missing = _new_pages(t.page_size, t.pages_before, t.page_count) - (t.pages - self.rank_after(t.pages_before))
        _require(not missing, name, f"{missing} of the pages {t.pages_before + 1} to {t.page_count} are not in it")

    def rank(self, page_no: int) -> int | None:
        """None when the page is not in the segment."""
        if not 1 <= page_no <= self.trailer.page_count:
            return None
        after = self.rank_after(page_no)
        return after - 1 if after > self.rank_after(page_no - 1) else None

    def page_nos(self, first_rank: int, end_rank: int) -> NDArray[np.uint32]:
        ranks = np.arange(first_rank, end_rank, dtype=np.uint64)
        run = np.searchsorted(self._ranks, ranks, side="right") - 1
        return (self._firsts[run] + (ranks - self._ranks[run])).astype(np.uint32)

    def rank_after(self, page_no: int) -> int:
        """How many pages of the segment have a number up to ``page_no``."""
        run = int(np.searchsorted(self._firsts, np.uint64(page_no), side="right")) - 1
        if run < 0:
            return 0
        return int(self._ranks[run]) + min(page_no - int(self._firsts[run]) + 1, int(self._counts[run]))


class _Groups(Sequence[Group]):
    """The groups of an index, made when asked for: a large snapshot has hundreds of thousands."""

    def __init__(self, index: _Index) -> None:
        self._index = index

    def __len__(self) -> int:
        return self._index.trailer.groups

    @overload
    def __getitem__(self, i: int) -> Group: ...
    @overload
    def __getitem__(self, i: slice) -> list[Group]: ...
    def __getitem__(self, i: int | slice) -> Group | list[Group]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        number = range(len(self))[i]
        index, per_group = self._index, self._index.trailer.pages_per_group
        return Group(
            number=number,
            offset=int(index.offsets[number]),
            length=int(index.lengths[number]),
            checksum=int(index.checksums[number]),
            page_nos=index.page_nos(number * per_group, min((number + 1) * per_group, index.trailer.pages)),
        )


def _decompress(frame: bytes | memoryview, size: int, name: str, where: str) -> bytes:
    """Exactly ``size`` bytes out of one zstd frame; what it claims is compared before anything is allocated for it."""
    try:
        claims = zstandard.get_frame_parameters(frame)
        fits = claims.content_size == size and claims.window_size <= _MAX_GROUP_BYTES and claims.dict_id == 0
        _require(fits, name, f"{where} does not claim to be one frame of {size} bytes")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged(name, f"{where} cannot be decompressed ({error})") from error
    _require(len(data) == size, name, f"{where} decompresses to {len(data)} bytes instead of {size}")
    return data


def _new_pages(page_size: int, pages_before: int, page_count: int) -> int:
    """How many pages a segment must hold since the database did not have them before; all of them for a snapshot."""
    return max(0, page_count - pages_before) - (pages_before < lock_page(page_size) <= page_count)


def _check_version(version: int, flags: int, name: str) -> None:
    """Source: docs/format.md, section 6. Only for bytes whose checksum is right."""
    _require(version > 0, name, "it claims version 0, which does not exist")
    if version > VERSION or flags & ~_KNOWN_FLAGS:
        raise SegmentVersionUnknown(
            f"{name} has format version {version} and flags {flags:#x}, this release reads up to version {VERSION} "
            f"and flags {_KNOWN_FLAGS:#x}; install a newer release"
        )


def _xxh3(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _damaged(name: str, what: str) -> SegmentDamaged:
    return SegmentDamaged(f"{name} is damaged: {what}; fetch it again, or restore to an earlier position")


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise _damaged(name, what)


def _valid(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
