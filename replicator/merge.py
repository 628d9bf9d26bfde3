"""Several segments become one: the increments of a stretch, or a snapshot and what follows it. Pure, over segment readers.

Owns which page of which segment goes into the result, and the header of the result. Never decides what is merged, never opens or
stores anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from replicator.errors import ChainBroken, StateMismatch
from replicator.pagehash import page_hash
from replicator.segment import Group, SegmentHeader, SegmentReader, SegmentWriter

_WINDOW_PAGES = 1 << 16
_CHUNK_BYTES = 1 << 18


def merged_header(headers: Sequence[SegmentHeader]) -> SegmentHeader:
    """Of the segment that does what these do one after the other, the oldest first.

    When the first is a snapshot, so is the result, at the position of the last and on its timeline; the others may then be of
    descendants. Raises ChainBroken when one does not follow from the one before it. Source: docs/format.md, section 4.
    """
    first, last = headers[0], headers[-1]
    for before, after in pairwise(headers):
        _check_link(before, after, same_timeline=not first.snapshot)
    if first.snapshot:
        return replace(
            last,
            first=last.last,
            snapshot=True,
            pages_before=0,
            state_before=0,
            first_commit_ms=last.last_commit_ms,
            source=None,
        )
    return replace(
        last,
        first=first.first,
        pages_before=first.pages_before,
        state_before=first.state_before,
        first_commit_ms=first.first_commit_ms,
        source=None,
    )


def merge(segments: Sequence[SegmentReader], check: Callable[[], None] = lambda: None) -> Iterator[bytes]:
    """The bytes of the one segment, in pieces; the oldest of ``segments`` first.

    Of each page the newest image is taken, pages beyond the final size are left out. Of a snapshot the state checksum is computed
    anew, of increments it is that of the last, which follows from those of all. check: called again and again; what it raises ends
    the merge. In memory are the indexes, what the readers keep, and one group of each segment.
    Raises ChainBroken, SegmentDamaged, and StateMismatch before the last piece, without which the result cannot be opened.
    """
    header = merged_header([segment.header for segment in segments])
    out = _Pieces()
    writer = SegmentWriter(out, header)
    inputs = _inputs(segments)
    state = 0
    for stretch in _stretches(inputs, header.page_count):
        check()
        for part in inputs[stretch.owner].parts(stretch.first_rank, stretch.end_rank):
            state ^= _copy(part, writer, hashed=header.snapshot)
            yield from out.whole(_CHUNK_BYTES)
    if header.snapshot and state != header.state_after:
        raise StateMismatch(
            f"the snapshot of {header.timeline}:{header.last} would have the state checksum {state:016x} instead of "
            f"{header.state_after:016x}; it was not stored, nothing was deleted"
        )
    _finish(writer, header)
    yield from out.whole(1)


def _finish(writer: SegmentWriter, header: SegmentHeader) -> None:
    try:
        writer.finish()
    except ValueError as error:
        raise ChainBroken(f"{header.timeline}:{header.first}-{header.last} cannot be merged: {error}") from error


def _check_link(before: SegmentHeader, after: SegmentHeader, *, same_timeline: bool) -> None:
    """Increments must adjoin. After a snapshot one may begin inside the one before it; the pages then prove the result."""
    between = f"{after.timeline}:{after.first}-{after.last} does not follow from {before.timeline}:{before.last}"
    if (before.database, before.page_size) != (after.database, after.page_size):
        raise ChainBroken(f"{between}: another database or page size")
    adjoins = after.first == before.last + 1
    follows = adjoins if same_timeline else after.first <= before.last + 1 <= after.last
    if after.snapshot or not follows or (same_timeline and before.timeline != after.timeline):
        raise ChainBroken(f"{between}: transactions between them are missing")
    if adjoins and (before.state_after, before.page_count) != (after.state_before, after.pages_before):
        raise ChainBroken(
            f"{between}: it was made for {after.pages_before} pages with state {after.state_before:016x}, not "
            f"{before.page_count} pages with state {before.state_after:016x}"
        )


class _Pieces:
    """What a writer wrote, until it is taken."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes, /) -> None:
        self._written += data

    def whole(self, least_bytes: int) -> Iterator[bytes]:
        if len(self._written) >= least_bytes:
            yield bytes(self._written)
            self._written.clear()


# -- which page of which segment ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Pages of one group: those with index begin to end - 1 in it."""

    input: _Input
    group: Group
    begin: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.begin == len(self.group.page_nos)


class _Input:
    """A segment to merge. limit: its pages beyond that number were dropped later."""

    def __init__(self, reader: SegmentReader, limit: int) -> None:
        self.reader = reader
        self.limit = limit
        self._decoded: tuple[int, list[tuple[int, memoryview]]] = (-1, [])

    def parts(self, first_rank: int, end_rank: int) -> Iterator[_Part]:
        per_group = self.reader.pages_per_group
        while first_rank < end_rank:
            number, begin = divmod(first_rank, per_group)
            end = min(per_group, begin + end_rank - first_rank)
            yield _Part(self, self.reader.groups[number], begin, end)
            first_rank += end - begin

    def decoded(self, group: Group) -> list[tuple[int, memoryview]]:
        """Keeps the last one, whose pages may be asked for one after the other."""
        if self._decoded[0] != group.offset:
            self._decoded = (-1, [])
            self._decoded = (group.offset, self.reader.group_pages(group))
        return self._decoded[1]


def _inputs(segments: Sequence[SegmentReader]) -> list[_Input]:
    inputs: list[_Input] = []
    limit = segments[-1].header.page_count
    for reader in reversed(segments):
        limit = min(limit, reader.header.page_count)
        inputs.append(_Input(reader, limit))
    return inputs[::-1]


@dataclass(frozen=True)
class _Stretch:
    """Pages that follow each other in the result, all from one input, where they follow each other as well."""

    owner: int
    first_rank: int
    end_rank: int


def _stretches(inputs: Sequence[_Input], page_count: int) -> Iterator[_Stretch]:
    """In the order of page numbers, found in windows of so many numbers at a time."""
    for before in range(0, page_count, _WINDOW_PAGES):
        owners = np.full(min(_WINDOW_PAGES, page_count - before), -1, dtype=np.int32)
        ranks = [one.reader.rank_after(min(before, one.limit)) for one in inputs]
        for number, one in enumerate(inputs):
            end = one.reader.rank_after(min(before + len(owners), one.limit))
            if end > ranks[number]:
                owners[one.reader.page_nos(ranks[number], end) - (before + 1)] = number
        yield from _stretches_of(owners, before, inputs)


def _stretches_of(owners: NDArray[np.int32], before: int, inputs: Sequence[_Input]) -> Iterator[_Stretch]:
    places = np.flatnonzero(owners >= 0)
    if not len(places):
        return
    changes = np.flatnonzero(np.diff(owners[places])) + 1
    for stretch in np.split(places, changes):
        owner = int(owners[stretch[0]])
        first_rank = inputs[owner].reader.rank_after(before + int(stretch[0]))
        yield _Stretch(owner, first_rank, first_rank + len(stretch))


def _copy(part: _Part, writer: SegmentWriter, *, hashed: bool) -> int:
    """Append the pages; returns the XOR of their hashes, if wanted. A group that stays as it is is not compressed anew."""
    reader, group = part.input.reader, part.group
    if part.is_whole and writer.takes_group(len(group.page_nos)):
        frame = reader.group_bytes(group)
        writer.add_group(group.page_nos, frame)
        return _hash(reader.decode_group(group, frame)) if hashed else 0
    pages = part.input.decoded(group)[part.begin : part.end]
    for page_no, data in pages:
        writer.add(page_no, data)
    return _hash(pages) if hashed else 0


def _hash(pages: Sequence[tuple[int, memoryview]]) -> int:
    state = 0
    for page_no, data in pages:
        state ^= page_hash(page_no, data)
    return state
