"""What the replicator keeps on the local disk for one database: the state it captured last, and segments that wait for upload.

Owns the folder ``<state>``: ``lock``; ``base``, the hash of every page at some txid; ``forking``, there while a new timeline is being
begun; ``spool/``, the only upload queue; ``kept/``, segments that were shipped but that are younger than the base, so that base + kept +
spool give the captured state after a crash; ``.aside-TIME/``, segments that will not be shipped any more, for a person. Never reads a
database.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import msgspec
import xxhash

from replicator import durable, failpoints, locks
from replicator.database import FileStamp
from replicator.errors import (
    DatabaseError,
    DatabaseNotReplicable,
    FormatError,
    LocalStateDamaged,
    LocalStateUnwritable,
    SegmentDamaged,
    SegmentVersionUnknown,
)
from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.pagehash import StateHashes, page_hash
from replicator.segment import HEADER_SIZE, SegmentHeader, SegmentReader, SegmentWriter, Source, read_header
from replicator.values import Timeline

log = logging.getLogger(__name__)

ASIDE_PREFIX = ".aside-"
_MAGIC = b"RPBASE1\n"
_CHECKSUM_BYTES = 8
_KEPT_FLOOR_BYTES = 4 * 1024 * 1024
_KEPT_SEGMENTS = 256
_FORKING = "forking"


class Base(msgspec.Struct, frozen=True):
    """Where the captured state begins: a position, and where in the WAL it was. The page hashes follow it in the file.

    restored: the position is one that a restore put at the path; what is written from there on is another timeline.
    file: the database file when it was last known to belong to the position and the WAL; None when that was not seen.
    whole: that file alone is the state at the position; nothing of it is in the WAL only.
    """

    timeline: Timeline
    txid: int
    page_size: int
    last_commit_ms: int
    source: Source | None
    restored: bool = False
    file: FileStamp | None = None
    whole: bool = False


@dataclass
class Captured:
    """The newest state that was captured: what the next segment builds on. page_size 0: nothing was captured yet."""

    timeline: Timeline
    txid: int
    page_size: int
    last_commit_ms: int
    source: Source | None
    restored: bool
    hashes: StateHashes
    file: FileStamp | None = None
    whole: bool = False

    def base(self) -> Base:
        return Base(
            self.timeline,
            self.txid,
            self.page_size,
            self.last_commit_ms,
            self.source,
            self.restored,
            self.file,
            self.whole,
        )


@dataclass(frozen=True)
class _Wait:
    """For a segment in the spool. since: its first commit, in monotonic time. commit_ms: the same on the wall clock, 0 if unknown."""

    since: float
    commit_ms: int


class Spool:
    """One database's folder. The capturing thread appends, the uploads mark as shipped; both may run at once."""

    def __init__(self, directory: Path, *, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        """Takes the folder for this process. now_ms: tells how old is what waits there already.

        Raises DatabaseNotReplicable when another replicator has it, DatabaseError when it cannot be made or read.
        """
        self.directory = directory
        self.base: Base | None = None  # as it is on the disk
        self._waiting = directory / "spool"
        self._kept = directory / "kept"
        self._guard = threading.Lock()
        self._lock = -1
        try:
            for folder in (self._waiting, self._kept):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = self._take_lock()
            for unfinished in (*self._waiting.glob("*.tmp"), *directory.glob(f"{durable.TEMPORARY_PREFIX}*")):
                unfinished.unlink()
            self._kept_refs = _refs(self._kept)
            self._waits = {ref: _waits_since(self.path(ref), now_ms()) for ref in _refs(self._waiting)}
        except OSError as error:
            self.close()
            raise DatabaseError(
                f"{directory} cannot hold the local state: {error.strerror}; it must be writable"
            ) from error

    def close(self) -> None:
        """An upload that is still under way does not count any more: its segment waits for the next who takes the folder."""
        with self._guard:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def remove(self) -> None:
        """The last thing, when the database is gone and nothing waits: of the folder only what was set aside stays. Raises OSError."""
        self.discard()
        with suppress(FileNotFoundError):
            for folder in (self._waiting, self._kept):
                folder.rmdir()
            (self.directory / "lock").unlink()
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
        self.close()

    # -- the captured state --------------------------------------------------------------------------------------------

    def load(self) -> Captured | None:
        """The captured state, put together from the base and the segments after it. None when there never was one.

        Raises LocalStateDamaged when it cannot be put together; ``discard`` then, and a new timeline begins.
        """
        try:
            data = (self.directory / "base").read_bytes()
        except FileNotFoundError:
            return None
        captured = _decode_base(data, self.directory)
        self.base = captured.base()
        for ref in sorted([*self._kept_refs, *self._waits], key=lambda ref: ref.last):
            if ref.timeline == captured.timeline.number and ref.last > captured.txid:
                self._apply(captured, ref)
        return captured

    def save_base(self, captured: Captured) -> None:
        """Make the captured state the base; shipped segments up to there are not needed any more. Raises LocalStateUnwritable."""
        failpoints.reach("before-base-write")
        with _writing(self.directory / "base"):
            durable.write_file(self.directory / "base", _encode_base(captured))
        failpoints.reach("after-base-write")
        self.base = captured.base()
        with self._guard:
            for ref in [ref for ref in self._kept_refs if ref.last <= captured.txid]:
                (self._kept / ref.file_name).unlink(missing_ok=True)
                self._kept_refs.remove(ref)

    # -- a timeline that is being begun --------------------------------------------------------------------------------

    @property
    def forking(self) -> bool:
        """Whether the record of a new timeline may be in the store: the one before it must not go on then."""
        return (self.directory / _FORKING).exists()

    def begin_fork(self) -> None:
        """Before the record is written. Raises OSError."""
        if not self.forking:
            durable.write_file(self.directory / _FORKING, b"")

    def end_fork(self) -> None:
        """The base is of the new timeline now."""
        (self.directory / _FORKING).unlink(missing_ok=True)

    def base_is_due(self, captured: Captured) -> bool:
        """Whether the segments after the base outweigh it, so that a new one is worth its writing."""
        base_txid = self.base.txid if self.base else 0
        with self._guard:
            after = [ref for ref in (*self._kept_refs, *self._waits) if ref.last > base_txid]
            superfluous = len(self._kept_refs) > _KEPT_SEGMENTS
        after_bytes = sum(ref.size_bytes for ref in after)
        heavy = after_bytes > max(_KEPT_FLOOR_BYTES, 8 * captured.hashes.page_count)
        return superfluous or len(after) > _KEPT_SEGMENTS or heavy

    def discard(self) -> None:
        """Forget all of it: the database starts a new timeline with a snapshot. What was not shipped yet is still in the database."""
        self.base = None
        with self._guard:
            (self.directory / "base").unlink(missing_ok=True)
            durable.fsync_dir(self.directory)
            for folder in (self._waiting, self._kept):
                for file in folder.iterdir():
                    file.unlink(missing_ok=True)
            self._waits.clear()
            self._kept_refs.clear()

    def set_aside(self) -> Path | None:
        """Move what waits into a folder of its own, whose path is returned; None when nothing waits. Nobody else has these commits.

        The newest goes first: interrupted, it leaves a shorter queue, and not one with a hole in it.
        """
        with self._guard:
            refs = list(self._waits)
            if not refs:
                return None
            aside = self._new_aside()
            for ref in reversed(refs):
                durable.replace(self.path(ref), aside / ref.file_name)
                del self._waits[ref]
        size_bytes = sum(ref.size_bytes for ref in refs)
        log.warning("%d segments (%d bytes) that never reached the store are kept in %s", len(refs), size_bytes, aside)
        return aside

    # -- segments ------------------------------------------------------------------------------------------------------

    def append(self, header: SegmentHeader, write_pages: Callable[[SegmentWriter], None]) -> SegmentRef:
        """One more segment, durable when this returns. Whatever ``write_pages`` raises leaves nothing behind.

        Raises LocalStateUnwritable.
        """
        level = SNAPSHOT_LEVEL if header.snapshot else 0
        ref = SegmentRef(header.timeline, level, header.first, header.last)
        failpoints.reach("before-spool-write")
        unfinished = self._waiting / f"{ref.file_name}.tmp"
        try:
            with _writing(unfinished):
                with unfinished.open("wb") as file:
                    writer = SegmentWriter(file, header)
                    write_pages(writer)
                    size_bytes = writer.finish()
                    file.flush()
                    os.fsync(file.fileno())
                durable.replace(unfinished, self._waiting / ref.file_name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        ref = replace(ref, size_bytes=size_bytes)
        with self._guard:
            self._waits[ref] = _Wait(time.monotonic(), header.first_commit_ms)
        failpoints.reach("after-spool-write")
        return ref

    def waiting(self) -> list[SegmentRef]:
        """Segments that are not in the store yet, in order."""
        with self._guard:
            return list(self._waits)

    def path(self, ref: SegmentRef) -> Path:
        """The file of a waiting segment."""
        return self._waiting / ref.file_name

    def mark_shipped(self, ref: SegmentRef) -> bool:
        """It is in the store. False when it does not wait here any more: it was discarded meanwhile, or the spool closed."""
        with self._guard:
            if self._lock < 0 or ref not in self._waits:
                return False
            (self._waiting / ref.file_name).rename(self._kept / ref.file_name)
            del self._waits[ref]
            self._kept_refs.append(ref)
        failpoints.reach("after-upload-recorded")
        return True

    def waiting_bytes(self) -> int:
        with self._guard:
            return sum(ref.size_bytes for ref in self._waits)

    def waiting_s(self) -> float:
        """For how long the oldest segment has waited; 0 when none does."""
        with self._guard:
            oldest = next(iter(self._waits.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.since

    def waiting_commit_ms(self) -> int:
        """Time of the first commit that waits, so that all before it are in the store; 0 when there is none, or nothing before it."""
        with self._guard:
            ref, wait = next(iter(self._waits.items()), (None, None))
        return 0 if ref is None or wait is None or ref.is_snapshot else wait.commit_ms

    # -- inside --------------------------------------------------------------------------------------------------------

    def _new_aside(self) -> Path:
        """A folder that nothing was set aside in before. Raises OSError."""
        name = f"{ASIDE_PREFIX}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        names = (self.directory / (f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        durable.make_dirs(aside)
        return aside

    def _take_lock(self) -> int:
        descriptor = locks.take(self.directory / "lock")
        if descriptor is None:
            raise DatabaseNotReplicable(
                f"{self.directory} is in use by another replicator; two must not replicate one database"
            )
        return descriptor

    def _apply(self, captured: Captured, ref: SegmentRef) -> None:
        path = self._waiting / ref.file_name
        if not path.exists():
            path = self._kept / ref.file_name
        try:
            with path.open("rb") as file:
                reader = SegmentReader(_read_at(file), path.stat().st_size)
                header = reader.header
                if header.timeline != captured.timeline.number or ref.first != captured.txid + 1:
                    raise LocalStateDamaged(f"{path} does not follow transaction {captured.txid}")
                captured.hashes.resize(0 if header.snapshot else header.page_count)
                captured.hashes.resize(header.page_count)
                for page_no, page in reader.pages():
                    captured.hashes.set(page_no, page_hash(page_no, page))
        except (SegmentDamaged, SegmentVersionUnknown, OSError) as error:
            raise LocalStateDamaged(f"{path}: {error}") from error
        if captured.hashes.checksum != header.state_after:
            raise LocalStateDamaged(f"{path} does not give the state that it states")
        captured.txid, captured.page_size = header.last, header.page_size
        captured.last_commit_ms, captured.source = header.last_commit_ms, header.source
        captured.whole = False


def holds_segments(directory: Path) -> bool:
    """Whether something waits in the local state there."""
    return any((directory / "spool").glob("*.seg"))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The system's words for a full disk do not say which."""
    try:
        yield
    except OSError as error:
        what = error.strerror or repr(error)
        raise LocalStateUnwritable(
            f"{path} cannot be written: {what}; make room there, or mend what is wrong"
        ) from error


def _refs(folder: Path) -> list[SegmentRef]:
    """The segments in a folder, in order."""
    refs = (SegmentRef.from_file_name(file.name, file.stat().st_size) for file in folder.iterdir())
    return sorted((ref for ref in refs if ref), key=lambda ref: (ref.last, ref.timeline))


def _waits_since(path: Path, now_ms: int) -> _Wait:
    """Of a segment that was there at the start. One that is damaged, which its upload will find, counts as new."""
    try:
        with path.open("rb") as file:
            commit_ms = read_header(file.read(HEADER_SIZE)).first_commit_ms
    except FormatError:
        return _Wait(time.monotonic(), 0)
    return _Wait(time.monotonic() - max(0, now_ms - commit_ms) / 1000, commit_ms)


def _read_at(file: BinaryIO) -> Callable[[int, int], bytes]:
    descriptor = file.fileno()
    return lambda offset, length: os.pread(descriptor, length, offset)


def _encode_base(captured: Captured) -> bytes:
    head = msgspec.json.encode(captured.base())
    body = _MAGIC + len(head).to_bytes(4, "little") + head + captured.hashes.to_bytes()
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little")


def _decode_base(data: bytes, directory: Path) -> Captured:
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if not body.startswith(_MAGIC) or xxhash.xxh3_64_intdigest(body) != int.from_bytes(checksum, "little"):
        raise LocalStateDamaged(f"{directory / 'base'} is damaged")
    head_length = int.from_bytes(body[8:12], "little")
    try:
        base = msgspec.json.decode(body[12 : 12 + head_length], type=Base)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LocalStateDamaged(f"{directory / 'base'} was written by another release: {error}") from error
    hashes = StateHashes.from_bytes(body[12 + head_length :])
    return Captured(
        base.timeline,
        base.txid,
        base.page_size,
        base.last_commit_ms,
        base.source,
        base.restored,
        hashes,
        base.file,
        base.whole,
    )
