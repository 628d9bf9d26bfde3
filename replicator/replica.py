"""One replica in a store, as a reader sees it: timeline records, segments, and which position a moment in time is.

Owns the JSON form of a timeline record (docs/format.md, section 2.2), both directions. It writes nothing but that
record, and deletes nothing.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from replicator import chain, layout
from replicator.envelope import refuse_sealed
from replicator.errors import (
    FormatError,
    NothingToRestore,
    ObjectMissing,
    PreconditionFailed,
    SegmentDamaged,
    SegmentVersionUnknown,
)
from replicator.layout import SegmentRef
from replicator.segment import (
    DEFAULT_TAIL,
    HEADER_SIZE,
    MAX_TIME_MS,
    ReadAhead,
    ReadAt,
    SegmentHeader,
    SegmentReader,
)
from replicator.store import ObjectStore
from replicator.values import MAX_EPOCH, MAX_TIMELINE, MAX_TXID, Position, Timeline, format_time

log = logging.getLogger(__name__)

RECORD_VERSION = 1
_RECORDS_AT_ONCE = 8


class _Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    version: int
    number: int
    database: str
    parent: int | None
    fork_txid: int | None
    created_ms: int
    writer: str
    reason: str
    epoch: int


class _AnyRecord(msgspec.Struct):
    """What every version of the record has."""

    version: int


def encode_timeline(timeline: Timeline) -> bytes:
    """Source: docs/format.md, section 2.2. Raises FormatError for a timeline that no reader would accept."""
    record = _Record(
        RECORD_VERSION,
        timeline.number,
        timeline.database,
        timeline.parent,
        timeline.fork_txid,
        timeline.created_ms,
        timeline.writer,
        timeline.reason,
        timeline.epoch,
    )
    _check_record(record)
    return msgspec.json.encode(record)


def decode_timeline(body: bytes) -> Timeline:
    """Source: docs/format.md, section 2.2. Raises FormatError, or SegmentVersionUnknown if a newer release wrote it."""
    try:
        version = msgspec.json.decode(body, type=_AnyRecord).version
        if version > RECORD_VERSION:
            raise SegmentVersionUnknown(
                f"the timeline record has version {version}, this release reads up to {RECORD_VERSION}; use a newer one"
            )
        record = msgspec.json.decode(body, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"the timeline record is damaged: {error}") from error
    _check_record(record)
    return Timeline(
        number=record.number,
        database=record.database,
        parent=record.parent,
        fork_txid=record.fork_txid,
        created_ms=record.created_ms,
        writer=record.writer,
        reason=record.reason,
        epoch=record.epoch,
    )


def _check_record(record: _Record) -> None:
    descent = (record.parent is None) == (record.fork_txid is None)
    if record.parent is not None and record.fork_txid is not None:
        descent = 1 <= record.parent < record.number and 0 <= record.fork_txid <= MAX_TXID
    rules = {
        "version": record.version == RECORD_VERSION,
        "number": 1 <= record.number <= MAX_TIMELINE,
        "database": re.fullmatch("[0-9a-f]{32}", record.database) is not None,
        "parent and fork_txid": descent,
        "created_ms": 0 <= record.created_ms <= MAX_TIME_MS,
        "epoch": 0 <= record.epoch <= MAX_EPOCH,
    }
    for field, kept in rules.items():
        if not kept:
            raise FormatError(f"the record of timeline {record.number} is damaged: {field} has an impossible value")


class Replica:
    """A view of one replica that asks the store for as little as possible. May be used by several threads at once.

    Records and headers are immutable and are read once; what is there (``segments``, ``timelines``) is asked each time.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._timelines: dict[int, Timeline] = {}
        self._headers: dict[SegmentRef, SegmentHeader] = {}

    def timelines(self) -> dict[int, Timeline]:
        """All of them by number, ascending. Raises FormatError when a record is damaged or contradicts another."""
        listed = (layout.timeline_of_key(info.key) for info in self.store.list(layout.TIMELINES))
        numbers = [number for number in listed if number is not None]
        unread = [number for number in numbers if number not in self._timelines]
        if unread:
            with ThreadPoolExecutor(min(_RECORDS_AT_ONCE, len(unread)), "timelines") as pool:
                self._timelines.update({t.number: t for t in pool.map(self._read_timeline, unread) if t is not None})
        found = {number: self._timelines[number] for number in numbers if number in self._timelines}
        _check_same_database(found)
        return found

    def write_timeline(self, timeline: Timeline) -> bool:
        """Store the record of a new timeline; False when another writer has taken its number."""
        try:
            self.store.put(layout.timeline_key(timeline.number), encode_timeline(timeline), if_none_match=True)
        except PreconditionFailed:
            return False
        return True

    def segments(self, timeline: int | None = None) -> list[SegmentRef]:
        """Those of one timeline, or all, in key order. Keys that are not those of segments are ignored."""
        prefix = layout.SEGMENTS if timeline is None else layout.segments_of(timeline)
        listed = (SegmentRef.from_key(info.key, info.size_bytes) for info in self.store.list(prefix))
        return [ref for ref in listed if ref is not None]

    def header(self, ref: SegmentRef) -> SegmentHeader:
        """One small request the first time. Raises ObjectMissing, and FormatError naming the key."""
        header = self._headers.get(ref)
        if header is None:
            header = self._headers[ref] = parse_header(ref, self.store.get(ref.key, offset=0, length=HEADER_SIZE))
        return header

    def reader(self, ref: SegmentRef) -> SegmentReader:
        """Reads by ranged requests, only what is asked of it. Raises ObjectMissing, and FormatError naming the key."""
        size_bytes = ref.size_bytes or self.store.head(ref.key).size_bytes
        return open_segment(
            ref, lambda offset, length: self.store.get(ref.key, offset=offset, length=length), size_bytes
        )

    def sequential_reader(self, ref: SegmentRef, ahead_bytes: int) -> SegmentReader:
        """For who reads all of it in order, by requests of about ``ahead_bytes``, which are kept in memory. For one thread.

        Raises ObjectMissing, and FormatError naming the key.
        """
        size_bytes = ref.size_bytes or self.store.head(ref.key).size_bytes
        ahead = ReadAhead(
            lambda offset, length: self.store.get(ref.key, offset=offset, length=length), size_bytes, ahead_bytes
        )
        if size_bytes <= ahead_bytes:
            ahead(0, size_bytes)
        return open_segment(ref, ahead, size_bytes)

    def remember_header(self, ref: SegmentRef, header: SegmentHeader) -> None:
        """Of a segment that was just stored, so that it need not be asked for."""
        self._headers[ref] = header

    def forget_headers(self, gone: Container[SegmentRef]) -> None:
        """Do not keep in memory what was read of these any longer."""
        for ref in [ref for ref in self._headers if ref in gone]:
            del self._headers[ref]

    def moment_after(self, position: Position, timeline: int | None = None) -> int | None:
        """Time of the first commit after the position that can be restored, on the newest timeline or the one named.

        UTC milliseconds since 1970; None when there is none. Raises StoreError, FormatError, RestoreError.
        """
        timelines, segments = self.timelines(), self.segments()
        if timeline is None:
            timeline = chain.newest(timelines, segments).timeline
        for part in reversed(chain.stops(timelines, segments, timeline)):
            for ref in part:
                if ref.last > position.txid:
                    return self.header(ref).last_commit_ms
        return None

    def find_position(
        self,
        timelines: Mapping[int, Timeline],
        segments: Sequence[SegmentRef],
        at_ms: int,
        timeline: int | None = None,
    ) -> tuple[Position, int]:
        """Of what was listed, the last position whose last commit is not after ``at_ms``, and the time of that commit.

        On the newest timeline if none is named, or on its ancestors before it left them. A moment after the last
        commit gives the last. Asks for O(log n) headers of n segments, and relies on commit times that never go back
        along a timeline. Raises NothingToRestore, telling the first moment, when all commits are later, and
        SegmentDamaged when a damaged segment leaves it open which position it is.
        """
        if timeline is None:
            timeline = chain.newest(timelines, segments).timeline
        path = [part for part in chain.stops(timelines, segments, timeline) if part]
        for part in path:
            found = self._last_until(part, at_ms)
            if found is not None:
                return Position(found.timeline, found.last), self.header(found).last_commit_ms
        if not path:
            raise NothingToRestore(f"timeline {timeline} holds nothing to restore; see the history of the replica")
        first_ms = self.header(path[-1][0]).last_commit_ms
        raise NothingToRestore(
            f"the replica holds nothing at or before {format_time(at_ms)}; its first moment is {format_time(first_ms)}"
        )

    def _read_timeline(self, number: int) -> Timeline | None:
        key = layout.timeline_key(number)
        try:
            body = self.store.get(key)
            refuse_sealed(body, f"{self.store.url}/{key}")
            timeline = decode_timeline(body)
        except ObjectMissing:
            return None  # deleted since it was listed
        except FormatError as error:
            raise type(error)(f"{key}: {error}") from error
        if timeline.number != number:
            raise FormatError(
                f"{key}: the record is that of timeline {timeline.number}; the object was copied or renamed"
            )
        return timeline

    def _last_until(self, stops: Sequence[SegmentRef], at_ms: int) -> SegmentRef | None:
        """The last of ``stops`` (ascending) with its last commit at or before ``at_ms``.

        A damaged header is passed over, which is harmless as long as it could not have been the answer.
        """
        alive = list(stops)
        damaged: dict[SegmentRef, FormatError] = {}
        while True:
            try:
                count = bisect_right(alive, at_ms, key=lambda ref: self._time_of(ref, damaged))
                break
            except SegmentDamaged:
                alive = [ref for ref in alive if ref not in damaged]
        after = alive[count].last if count < len(alive) else MAX_TXID + 1
        before = alive[count - 1].last if count else 0
        for ref, error in damaged.items():
            if before < ref.last < after:
                raise error
            log.warning("a damaged segment header was passed over: %s", error)
        return alive[count - 1] if count else None

    def _time_of(self, ref: SegmentRef, damaged: dict[SegmentRef, FormatError]) -> int:
        try:
            return self.header(ref).last_commit_ms
        except SegmentDamaged as error:
            damaged[ref] = error
            raise


def parse_header(ref: SegmentRef, head: bytes) -> SegmentHeader:
    """head: the first HEADER_SIZE bytes of the segment that ``ref`` names. Raises FormatError, naming the key."""
    header = SegmentHeader.decode(head, name=ref.key)
    _check_identity(ref, header)
    return header


def open_segment(ref: SegmentRef, read_at: ReadAt, size_bytes: int, *, tail_bytes: int = DEFAULT_TAIL) -> SegmentReader:
    """Raises FormatError, naming the key, when it is damaged or not the segment that ``ref`` names."""
    reader = SegmentReader(read_at, size_bytes, tail=tail_bytes, name=ref.key)
    _check_identity(ref, reader.header)
    return reader


def _check_identity(ref: SegmentRef, header: SegmentHeader) -> None:
    """Source: docs/format.md, section 2.1."""
    if (header.timeline, header.first, header.last, header.snapshot) != (
        ref.timeline,
        ref.first,
        ref.last,
        ref.is_snapshot,
    ):
        raise SegmentDamaged(
            f"{ref.key} is damaged: it holds segment {header.timeline}:{header.first}-{header.last} and not what its "
            "key says; it was copied or renamed"
        )


def _check_same_database(timelines: dict[int, Timeline]) -> None:
    databases = {timeline.database: timeline.number for timeline in timelines.values()}
    if len(databases) > 1:
        numbers = " and ".join(map(str, sorted(databases.values())))
        raise FormatError(f"timelines {numbers} belong to different databases; two replicas were written to one place")
