"""A replica of our own, written out as one that Litestream 0.5 restores and goes on with. Run again, it continues.

A transaction keeps its number, and every position that can be restored becomes one that Litestream can restore. Owns the plan, the
conversion and the note of what was exported. Never deletes, never writes to the source, never over what another wrote.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import msgspec

from replicator import chain
from replicator.errors import ChainBroken, FormatError, ObjectMissing, PreconditionFailed, SegmentDamaged, UsageError
from replicator.layout import SegmentRef
from replicator.litestream.chain import SNAPSHOT_LEVEL, LtxRef, key_of, restorable, txid_text
from replicator.litestream.replica import list_files
from replicator.ltx import LtxHeader, LtxReader, LtxWriter
from replicator.pagehash import page_hash
from replicator.replica import Replica
from replicator.segment import SegmentHeader
from replicator.store import ObjectStore
from replicator.values import Position, Timeline

NOTE_KEY = "replicator-export.json"
NOTE_VERSION = 1

_EMPTY_WAL_OFFSET = 32
"""Where a WAL without a frame ends. Litestream, when it goes on from such a file, finds other salts there and takes a snapshot."""
_CHUNK_BYTES = 1 << 20


class _Note(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What an export has written, or was about to: up to ``until`` on the history of ``timeline``."""

    version: int
    database: str
    timeline: int
    until: int


@dataclass(frozen=True)
class Step:
    """One segment of the source, and the file that it becomes."""

    source: SegmentRef
    level: int
    first: int
    last: int


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write, in this order. reached: the newest position of the source.

    begins: the last transaction that is at the destination already; 0 when nothing is.
    """

    reached: Position
    begins: int
    steps: tuple[Step, ...]
    size_bytes: int


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote. first_moment_ms: of the first file that it wrote, None when there was nothing to write."""

    reached: Position
    begins: int
    files: int
    size_bytes: int
    first_moment_ms: int | None


def plan_export(source: ObjectStore, destination: ObjectStore, from_ms: int | None = None) -> ExportPlan:
    """What ``export`` would write now.

    from_ms: the first export begins with the newest snapshot that was taken at or before it, so that every moment from then on can be
    restored; with the newest snapshot if none is given. Raises UsageError when something else is at the destination,
    NothingToRestore, ChainBroken, FormatError, StoreError.
    """
    return _Export(source, destination, from_ms).plan


def export(
    source: ObjectStore, destination: ObjectStore, from_ms: int | None = None, *, parallelism: int = 8
) -> ExportReport:
    """Write what the source has and the destination has not. An export that was interrupted is continued by the next.

    Raises what ``plan_export`` raises.
    """
    return _Export(source, destination, from_ms).run(parallelism)


class _Export:
    """One run: the source and the destination as they are now."""

    def __init__(self, source: ObjectStore, destination: ObjectStore, from_ms: int | None) -> None:
        self._replica = Replica(source)
        self._destination = destination
        self._in_bucket = destination.url.startswith("s3://")
        timelines, segments = self._replica.timelines(), self._replica.segments()
        reached = chain.newest(timelines, segments)
        self._database = self._database_of(timelines, reached, segments)
        self._note, self._note_etag = _read_note(destination)
        present = list_files(destination)
        begins = self._begins(timelines, reached, present)
        stops = [ref for part in reversed(chain.stops(timelines, segments, reached.timeline)) for ref in part]
        steps = _steps(stops, begins, reached.txid, self._base(stops, from_ms))
        self.plan = ExportPlan(reached, begins, steps, sum(step.source.size_bytes for step in steps))

    def run(self, parallelism: int) -> ExportReport:
        plan = self.plan
        if not plan.steps:
            return ExportReport(plan.reached, plan.begins, 0, 0, None)
        self._write_note()
        size_bytes = 0
        with tempfile.TemporaryDirectory(prefix="export-") as folder, ThreadPoolExecutor(parallelism, "export") as pool:
            uploads: deque[Future[int]] = deque()
            before: SegmentHeader | None = None
            try:
                for step, header, file in self._converted(pool, Path(folder), parallelism):
                    _check_link(before, header, step)
                    before = header
                    uploads.append(pool.submit(self._upload, step, header, file))
                    # Nothing is of use without the snapshot, so that it is there first.
                    while uploads and (len(uploads) > parallelism or step.level == SNAPSHOT_LEVEL):
                        size_bytes += uploads.popleft().result()
                size_bytes += sum(upload.result() for upload in uploads)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        first = self._replica.header(plan.steps[0].source).last_commit_ms
        return ExportReport(plan.reached, plan.begins, len(plan.steps), size_bytes, first)

    # -- plan ----------------------------------------------------------------------------------------------------------

    def _database_of(self, timelines: Mapping[int, Timeline], at: Position, segments: Sequence[SegmentRef]) -> str:
        record = timelines.get(at.timeline)
        if record is not None:
            return record.database
        return self._replica.header(next(ref for ref in segments if ref.timeline == at.timeline)).database

    def _begins(self, timelines: Mapping[int, Timeline], reached: Position, present: Sequence[LtxRef]) -> int:
        """The transaction up to which the destination holds this history without a gap."""
        if not present:
            return 0
        url, note = self._destination.url, self._note
        newest = max(ref.last for ref in present)
        if note is None:
            raise UsageError(f"{url} holds a replica of Litestream that is no export; export to an empty place")
        if note.database != self._database:
            raise UsageError(f"{url} holds the export of another database; export to an empty place")
        if newest > note.until:
            raise UsageError(
                f"{url} holds transaction {txid_text(newest)}, the export reached {txid_text(note.until)}: Litestream goes on "
                "there; export to an empty place"
            )
        shared = _shared(timelines, reached, note.timeline)
        if newest > shared:
            raise UsageError(
                f"{url} holds transactions up to {newest} of timeline {note.timeline}, which the newest timeline "
                f"{reached.timeline} shares up to {shared} only; export to an empty place"
            )
        return max(restorable(present), default=0)

    def _base(self, stops: Sequence[SegmentRef], from_ms: int | None) -> SegmentRef:
        """Stops begin with a snapshot, or nothing could be restored."""
        snapshots = [ref for ref in stops if ref.is_snapshot]
        if from_ms is None:
            return snapshots[-1]
        early = [ref for ref in snapshots if self._replica.header(ref).last_commit_ms <= from_ms]
        return early[-1] if early else snapshots[0]

    # -- execution -----------------------------------------------------------------------------------------------------

    def _write_note(self) -> None:
        """Before the files, so that an interrupted export knows them for its own."""
        reached = self.plan.reached
        note = _Note(NOTE_VERSION, self._database, reached.timeline, reached.txid)
        if note != self._note:
            body, etag = msgspec.json.encode(note), self._note_etag
            self._destination.put(NOTE_KEY, body, if_none_match=etag is None, if_match=etag)

    def _converted(
        self, pool: ThreadPoolExecutor, folder: Path, ahead: int
    ) -> Iterator[tuple[Step, SegmentHeader, Path]]:
        waiting: deque[tuple[Step, Path, Future[SegmentHeader]]] = deque()
        for number, step in enumerate(self.plan.steps):
            file = folder / str(number)
            waiting.append((step, file, pool.submit(self._convert, step, file)))
            if len(waiting) > ahead:
                done, path, future = waiting.popleft()
                yield done, future.result(), path
        for done, path, future in waiting:
            yield done, future.result(), path

    def _convert(self, step: Step, file: Path) -> SegmentHeader:
        reader = self._replica.reader(step.source)
        header, state = reader.header, 0
        with file.open("wb") as out:
            writer = LtxWriter(out, _ltx_header(step, header))
            for page_no, data in reader.pages():
                writer.add(page_no, data)
                state ^= page_hash(page_no, data) if header.snapshot else 0
            writer.finish()
        if header.snapshot and state != header.state_after:
            raise SegmentDamaged(f"{reader.name} is damaged: its pages do not have the state checksum that it claims")
        return header

    def _upload(self, step: Step, header: SegmentHeader, file: Path) -> int:
        key = key_of(step.level, step.first, step.last, in_bucket=self._in_bucket)
        try:
            info = self._destination.put(key, file, if_none_match=True, time_ms=header.last_commit_ms)
        except PreconditionFailed as error:
            if not _same(self._destination, key, file):
                raise UsageError(
                    f"{self._destination.url}/{key} holds something else than the export; export to an empty place"
                ) from error
            return 0
        finally:
            file.unlink()
        return info.size_bytes


def _steps(stops: Sequence[SegmentRef], begins: int, end: int, base: SegmentRef) -> tuple[Step, ...]:
    """From ``begins`` (or with the base, if nothing is there) always to the nearest position, so that none is left out.

    stops: all that can be restored, each with the segments that end there, ascending. Where segments have been deleted since
    the last export, a snapshot leads on.
    """
    steps: list[Step] = []
    at = begins
    if not at:
        steps.append(Step(base, SNAPSHOT_LEVEL, 1, base.last))
        at = base.last
    for ref in sorted(stops, key=lambda ref: (ref.last, ref.is_snapshot, ref.level)):
        if ref.last <= at or not (ref.is_snapshot or ref.first <= at + 1):
            continue
        if ref.is_snapshot:
            steps.append(Step(ref, SNAPSHOT_LEVEL, 1, ref.last))
        elif ref.first == ref.last:
            steps.append(Step(ref, 0, ref.first, ref.last))
        else:
            steps.append(Step(ref, max(1, ref.level), ref.first, ref.last))
        at = ref.last
    if steps and steps[-1].level:
        # Litestream takes the last file of level 0 for the position of a replica, and would go on from there. More pages
        # than the transaction changed do no harm.
        steps.append(Step(steps[-1].source, 0, end, end))
    return tuple(steps)


def _shared(timelines: Mapping[int, Timeline], reached: Position, number: int) -> int:
    """The last txid of timeline ``number`` that belongs to the history of a position; 0 when none does."""
    at = reached
    while at.timeline != number:
        record = timelines.get(at.timeline)
        if record is None or record.parent is None or record.fork_txid is None or record.parent >= record.number:
            return 0
        at = Position(record.parent, min(at.txid, record.fork_txid))
    return at.txid


def _ltx_header(step: Step, header: SegmentHeader) -> LtxHeader:
    return LtxHeader(
        page_size=header.page_size,
        page_count=header.page_count,
        first=step.first,
        last=step.last,
        time_ms=header.last_commit_ms,
        wal_offset=0 if step.level else _EMPTY_WAL_OFFSET,
    )


def _check_link(before: SegmentHeader | None, after: SegmentHeader, step: Step) -> None:
    """Source: docs/format.md, section 4."""
    if before is None or after.snapshot or after.first != before.last + 1:
        return
    if (before.state_after, before.page_count, before.page_size) != (
        after.state_before,
        after.pages_before,
        after.page_size,
    ):
        raise ChainBroken(
            f"{step.source.key} does not follow from the segment before it; nothing after it was exported"
        )


def _read_note(destination: ObjectStore) -> tuple[_Note | None, str | None]:
    """The note and its etag."""
    try:
        etag = destination.head(NOTE_KEY).etag
        note = msgspec.json.decode(destination.get(NOTE_KEY), type=_Note)
    except ObjectMissing:
        return None, None
    except msgspec.DecodeError as error:
        raise FormatError(f"{destination.url}/{NOTE_KEY} is damaged: {error}; export to an empty place") from error
    if note.version != NOTE_VERSION:
        raise FormatError(f"{destination.url}/{NOTE_KEY} has version {note.version}; use a newer release")
    return note, etag


def _same(store: ObjectStore, key: str, file: Path) -> bool:
    """Whether an object holds the same header and pages as a file; they may be compressed otherwise."""
    size_bytes = store.head(key).size_bytes
    there = LtxReader(
        (store.get(key, offset=at, length=_CHUNK_BYTES) for at in range(0, size_bytes, _CHUNK_BYTES)), key
    )
    with file.open("rb") as chunks:
        here = LtxReader(iter(partial(chunks.read, _CHUNK_BYTES), b""), key)
        return here.header == there.header and all(a == b for a, b in zip_longest(here.pages(), there.pages()))
