"""Turns what applications commit to one database into segments in its spool.

Owns the captured state, the place in the WAL up to which it reaches, and the proof that the two belong together. Never talks to a store.

Continuity is proven, never inferred. Either the read lock was held since the last captured frame, or the file is the same, the WAL has
the same salts, and the cumulative checksum of the last captured frame is found at its place; or the file alone was the captured state, and
nobody has written it since, so that all of the WAL comes after. In every other case the whole
database is compared, page by page, with the hashes of what was captured, and the pages that differ become one segment.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replicator.database import FileStamp, Journal, LiveDatabase, identify, is_as_left, size_of_wal
from replicator.errors import DatabaseBusy, DatabaseError, DatabaseMissing, LocalStateDamaged
from replicator.image import Image, read_transactions
from replicator.pagehash import StateHashes, lock_page, page_hash
from replicator.segment import SegmentHeader, SegmentWriter, Source
from replicator.spool import Captured, Spool
from replicator.values import Position, Timeline
from replicator.wal import FRAME_HEADER_SIZE, HEADER_SIZE, U32, Cursor, Scanner, Transaction, WalHeader, last_image

log = logging.getLogger(__name__)

GROUP_BYTES = 64 * 1024 * 1024
"""A segment ends at the first commit after so many bytes of WAL, so that catching up comes in pieces that can be shipped."""

REBASE_TRIES = 3
FIRST_CHECKPOINT_RETRY_S = 0.05
MAX_CHECKPOINT_RETRY_S = 60.0
MAX_BUSY_RETRY_S = 1.0
FIRST_LET_BY_S = 0.01
LAST_LET_BY_S = 0.3
FIRST_COMPANY_S, MAX_COMPANY_S = 1.0, 60.0
"""So long a database counts as open elsewhere after an end of ours did not end its WAL, though nobody was seen."""
AWAKE_FOR_EACH_COMPARED = 600
"""A database that was written and closed again while it rested is compared; it does not rest again for so many times as long."""
_NO_FILE = Source(0, 0, 0, 0, 0, 0, 0, False)
"""Of a captured state whose file is gone: no file is inode 0, so what comes later is another one, even if it gets the old number."""


class ContinuityLost(Exception):
    """The captured state cannot be proven to be the one before what is in the WAL now. Handled here, by comparing."""


class NeedsTimeline(Exception):
    """What is at the path does not go on from the captured state in one unbroken history: ``begin_timeline`` must come first.

    known: the captured state from which it forks; None when nothing is known locally, so that it must begin with a snapshot.
    """

    def __init__(self, reason: str, known: Captured | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.known = known


@dataclass(frozen=True, eq=False)
class Change:
    """What differs from the captured state: these pages, with these hashes, and the size of the database."""

    page_nos: U32
    hashes: NDArray[np.uint64]
    page_count: int


@dataclass(frozen=True)
class CaptureSettings:
    """checkpoint_pages: of WAL after which it is backfilled and started anew. wal_limit_bytes: when nothing can be captured, the WAL
    may grow to this before the read lock is let go. idle_checkpoint_s: without a commit for so long, the WAL is backfilled too."""

    checkpoint_pages: int = 1000
    wal_limit_bytes: int = 512 * 1024 * 1024
    idle_checkpoint_s: float = 60.0


@dataclass
class CaptureFigures:
    """What status shows of the live side.

    checkpoints, checkpoints_s, barriers_s: how many there were, and the seconds that they and their barriers took in all.
    barrier_s: the longest barrier.
    """

    wal_bytes: int = 0
    page_size: int = 0
    page_count: int = 0
    checkpoints: int = 0
    checkpoints_s: float = 0.0
    barriers_s: float = 0.0
    barrier_s: float = 0.0
    rebases: int = 0
    checkpoint_blocked: bool = False


class Capture:
    """One database. Used by one thread at a time. ``step`` opens it when it is not open."""

    def __init__(
        self,
        path: Path,
        spool: Spool,
        settings: CaptureSettings,
        *,
        now_ms: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
        within: Path | None = None,
    ) -> None:
        """within: a folder that the database must be in, with no symbolic link on the way."""
        self.path = path
        self._within = within
        self.figures = CaptureFigures()
        self._spool = spool
        self._settings = settings
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._captured: Captured | None = None
        self._loaded = False
        self._database: LiveDatabase | None = None
        self._was_there = False
        self._scanner: Scanner | None = None
        self._continuous = False  # the scanner goes on from the captured state, under the lock that is held now
        self._confirmed: Cursor | None = None  # up to here SQLite itself counts as committed what was captured
        self._stamp: FileStamp | None = None
        self._resting: FileStamp | None = None  # the file as it is while our lock lets no checkpoint write it
        self._changed_at = monotonic()
        self._next_checkpoint_at = 0.0
        self._retry_s = FIRST_CHECKPOINT_RETRY_S
        self._backfilled: Cursor | None = None
        self._progress = (0, 0)
        self._let_by_s = FIRST_LET_BY_S
        self._no_rest_before = 0.0
        self._in_company_until = 0.0
        self._company_s = FIRST_COMPANY_S

    @property
    def position(self) -> Position | None:
        """The newest captured position; None before the first timeline."""
        captured = self._captured
        return Position(captured.timeline.number, captured.txid) if captured else None

    @property
    def reached(self) -> tuple[Timeline, int] | None:
        """Timeline and txid of the newest captured position, which belong together whatever another thread does meanwhile."""
        captured = self._captured
        return (captured.timeline, captured.txid) if captured else None

    @property
    def last_commit_ms(self) -> int:
        captured = self._captured
        return captured.last_commit_ms if captured else 0

    @property
    def timeline(self) -> Timeline | None:
        captured = self._captured
        return captured.timeline if captured else None

    def begin_timeline(self, timeline: Timeline, txid: int, known: Captured | None, *, keep_waiting: bool) -> None:
        """Go on as ``timeline`` after ``txid``.

        known: the state there, when it is known; None to begin with a snapshot. keep_waiting: whether what waits for upload leads there.
        """
        self._continuous = False
        if self._database is not None and self._database.holds_lock:
            self._database.release()
        self._stamp = None
        if not keep_waiting:
            # Nothing is captured from here on: what is thrown away must not count as durable, whatever fails below.
            self._captured, self._loaded = None, True
            self._spool.discard()
        captured = Captured(
            timeline=timeline,
            txid=txid,
            page_size=known.page_size if known else 0,
            last_commit_ms=known.last_commit_ms if known else 0,
            source=None,
            restored=False,
            hashes=known.hashes if known else StateHashes(),
        )
        self._spool.save_base(captured)
        self._spool.end_fork()
        self._captured = captured
        self._loaded = True

    def give_up(self) -> None:
        """Forget what was captured, as nothing of it can be shipped any more; what waits is set aside. Raises OSError."""
        self._spool.set_aside()
        self._captured, self._loaded = None, True
        self._spool.discard()

    def step(self) -> float | None:
        """Capture what is new. Returns seconds until it wants to be called again, None to wait for a change.

        Raises DatabaseError when the database cannot be captured now, NeedsTimeline when it must be given one first, and
        LocalStateUnwritable or OSError when the spool cannot be written.
        """
        if self._rests():
            return None
        database = self._open()
        if database.journal is Journal.ROLLBACK:
            return self._compare_if_changed(database)
        before = self._state.txid
        self._check_resting(database)
        if not self._continuous:
            self._begin(database)
        self._drain()
        let_by_s = self._let_by(database)
        wait_s = self._checkpoint_if_due(database, captured=self._state.txid != before)
        self._note_figures(database)
        if self._spool.base_is_due(self._state):
            self._note_file()
            self._spool.save_base(self._state)
        return _soonest(let_by_s, wait_s, self._rest_if_abandoned(database))

    def pending_bytes(self) -> int:
        """About how much is committed and not captured yet: of the WAL, or 1 for a change without one; 0 while that is not known."""
        database = self._database
        if database is None:
            return self._pending_since_closed()
        if database.journal is Journal.ROLLBACK:
            return int(database.stamp() != self._stamp)
        frames = database.committed_frames()
        end = HEADER_SIZE + frames * (FRAME_HEADER_SIZE + database.page_size) if frames else 0
        captured = self._scanner.cursor.offset if self._scanner else 0
        return end - captured if end >= captured else end  # when it is less than what is captured, it began anew

    def _pending_since_closed(self) -> int:
        """Of the file that was let go of when it was all that was captured; a look at it opens nothing."""
        left = self._left()
        if left is None or is_as_left(self.path, self._within, *left):
            return 0
        try:
            found = identify(self.path, self._within)
            is_another = (found.device, found.inode) != (left[0].device, left[0].inode)
            return 0 if is_another else max(1, size_of_wal(self.path) or 0)
        except (DatabaseError, OSError):  # capturing says what is wrong
            return 0

    def wal_outgrows(self) -> bool:
        """Whether the WAL has grown beyond what may wait for a capture that does not come."""
        return self._database is not None and self._database.wal_size() > self._settings.wal_limit_bytes

    def let_go(self) -> None:
        """Close the database and its read lock. The next step compares, unless the WAL proves continuity."""
        try:
            self._note_file()
        finally:
            if self._database is not None:
                self._database.close()
            self._database = self._scanner = self._stamp = self._resting = None
            self._continuous = False

    def close(self) -> None:
        """The last thing. An up-to-date base makes the next start quick."""
        try:
            self._note_file()
            if self._captured is not None and self._captured.base() != self._spool.base:
                self._spool.save_base(self._captured)
        finally:
            self.let_go()

    # -- opening, and continuity ---------------------------------------------------------------------------------------

    @property
    def _state(self) -> Captured:
        assert self._captured is not None, "step() opens first, and that needs a timeline"
        return self._captured

    def _load(self) -> Captured | None:
        try:
            return self._spool.load()
        except LocalStateDamaged as error:
            log.warning("local state is damaged; a new timeline begins: %s", error)
            self.give_up()
            return None

    def load(self) -> None:
        """Read the local state, once; ``step`` does it too."""
        if not self._loaded:
            self._captured = self._load()
            self._loaded = True

    def _open(self) -> LiveDatabase:
        self.load()
        database = self._database
        if database is not None and not (database.still_at_path() and database.wal_is_ours()):
            self._leave_behind(database)
        try:
            identity = identify(self.path, self._within)
        except DatabaseMissing:
            self._note_gone()
            raise
        captured = self._captured
        if captured is None:
            raise NeedsTimeline("first sight", None)
        if captured.restored:
            raise NeedsTimeline("restored", captured)
        if self._spool.forking:
            raise NeedsTimeline("the one that was begun last was never used", captured)
        source = captured.source
        if source is not None and (source.device, source.inode) != (identity.device, identity.inode):
            raise NeedsTimeline("the file was replaced by another", captured)
        if self._database is None:
            self._database = LiveDatabase(self.path, self._within)
            self._was_there = True
        return self._database

    def _rests(self) -> bool:
        """Whether the database is closed, and as it was when all that was captured was in the file: there is nothing to open it for."""
        self.load()
        left = self._left()
        return left is not None and is_as_left(self.path, self._within, *left)

    def _left(self) -> tuple[Source, FileStamp] | None:
        """Which file is closed here, and how it was when it alone was the captured state; None when that is not so."""
        captured = self._captured
        if self._database is not None or captured is None or captured.restored or self._spool.forking:
            return None
        source, stamp = captured.source, captured.file
        return (source, stamp) if captured.whole and source is not None and stamp is not None else None

    def _leave_behind(self, database: LiveDatabase) -> None:
        """The path names another file now, or none, or the WAL was deleted. What it still holds is captured before it is closed.

        Without a WAL that is not possible: to lock the old file, SQLite would look for a journal by name, and find that of the new one.
        """
        replaced = not database.still_at_path()
        try:
            if self._continuous:
                self._drain()
        except DatabaseError as error:
            log.warning("the last commits of a file that is gone could not be captured: %s", error)
        self.let_go()
        if replaced:
            self._note_gone()

    def _note_gone(self) -> None:
        """The file that was open here before is not at the path any more."""
        captured = self._captured
        if captured is None and self._spool.waiting():
            self.give_up()  # of a base that was being discarded; nobody else has these commits now
        if self._was_there and captured is not None and captured.source != _NO_FILE:
            self._captured = dataclasses.replace(captured, source=_NO_FILE, whole=False)
            self._spool.save_base(self._captured)

    def _begin(self, database: LiveDatabase) -> None:
        """Take the read lock, and prove that file and WAL go on from the captured state; else compare.

        The WAL proves nothing of the file: a copy over it in place leaves the WAL as it is. So the file, too, must be the one that was
        left. When somebody's checkpoint has written it meanwhile, that costs a comparison and nothing else.
        """
        was_held, was_whole = database.holds_lock, self._state.whole
        database.acquire()
        if not was_held and self._state.file != database.stamp():
            self._forget_place(database)
        try:
            self._continuous = self._go_on(database)
        except ContinuityLost as lost:
            log.info("%s: %s", self.path, lost)
        if self._continuous:
            return
        began = self._monotonic()
        self._rebase(database, "what was written since the last time is not known")
        if was_whole:
            ended = self._monotonic()
            self._no_rest_before = ended + AWAKE_FOR_EACH_COMPARED * (ended - began)

    def _go_on(self, database: LiveDatabase) -> bool:
        """Whether the captured state goes on with what is in the WAL, which is captured then: from the place that is known, or from its
        start, if the file alone is the captured state."""
        header, cursor = database.wal_header(), _cursor(self._state.source, database.page_size)
        if cursor is not None and _holds(database, cursor):
            self._scanner = Scanner(cursor)
        elif self._state.whole and (header is None or cursor is None or not _same_generation(header, cursor)):
            self._scanner = Scanner(header.cursor()) if header else None
        else:
            return False
        self._confirmed = None
        self._capture_wal(database)
        return self._scanner is None or _is_current(database, self._scanner.cursor)

    def _drain(self) -> None:
        """Capture everything that is committed now. Whatever it raises, continuity is proven anew afterwards.

        Since then the scanner may have gone past what could not be kept.
        """
        assert self._database is not None
        self._continuous = False
        try:
            self._follow_restart(self._database)
            self._capture_wal(self._database)
            if self._follow_restart(self._database):
                self._capture_wal(self._database)
            self._continuous = True
        except ContinuityLost as lost:
            self._rebase(self._database, str(lost))

    def _check_resting(self, database: LiveDatabase) -> None:
        """Behind a complete checkpoint nothing but a program that goes past SQLite (``cp`` over it) writes the file.

        What SQLite has read of it is worth nothing then: it is opened again, and compared. Raises DatabaseBusy.
        """
        if self._resting is None or self._resting.same_content(database.stamp()):
            return
        self._continuous = False
        self.let_go()
        self._forget_place(database)
        self._spool.save_base(self._state)
        raise DatabaseBusy(f"{self.path} was written by a program other than SQLite; it is opened again and compared")

    def _forget_place(self, database: LiveDatabase) -> None:
        """Only a comparison leads on from the captured state, however often it takes until one succeeds."""
        nowhere = dataclasses.replace(_NO_FILE, device=database.identity.device, inode=database.identity.inode)
        self._captured = dataclasses.replace(self._state, source=nowhere, whole=False)

    def _note_file(self) -> None:
        """Keep in mind how the file is while it and the WAL, which stand still together, belong to the captured state."""
        database = self._database
        if database is not None and self._continuous and database.still_at_path():
            stamp = database.settled_stamp()
            if stamp and self._resting and not self._resting.same_content(stamp):
                stamp = None  # written past SQLite; the next who looks compares
            whole = stamp is not None and self._is_whole(database)
            self._captured = dataclasses.replace(self._state, file=stamp, whole=whole)

    def _is_whole(self, database: LiveDatabase) -> bool:
        """Whether the file alone is the captured state: all of the WAL is captured, and moved into the file.

        Under the lock that is held that stays so: it is at the last of these commits, and lets no later one be moved.
        """
        frames, backfilled = database.wal_progress()
        cursor = self._scanner.cursor if self._scanner else None
        if frames != backfilled or cursor is None:
            return frames == backfilled == 0
        return HEADER_SIZE + frames * cursor.frame_size == cursor.offset and _is_current(database, cursor)

    def _follow_restart(self, database: LiveDatabase) -> bool:
        """If the WAL began anew, go on at its start: the lock lets that happen only when all before it is captured.

        Raises ContinuityLost when it may have left out what was captured: a commit that SQLite took back, since its fsync failed.
        """
        scanner, header = self._scanner, database.wal_header()
        if header is None:
            if scanner is None or database.wal_size():
                return False
        elif scanner is not None and _same_generation(header, scanner.cursor):
            return False
        if self._is_unconfirmed():
            raise ContinuityLost("the WAL began anew behind a commit that was not seen to succeed")
        self._scanner = Scanner(header.cursor()) if header else None
        return True

    def _capture_wal(self, database: LiveDatabase) -> None:
        """Make segments of all that is between the cursor and the end of the WAL."""
        scanner = self._scanner
        if scanner is None:
            return
        if scanner.pending_frames:
            committed_frames = database.committed_frames()
            if scanner.overtaken(committed_frames) or not _last_frame_is_there(database, scanner):
                scanner = self._scanner = Scanner(scanner.cursor)
        if not scanner.pending_frames and not _last_frame_is_there(database, scanner):
            raise ContinuityLost("the WAL was written over behind the captured place")
        group: list[Transaction] = []
        group_bytes = 0
        # Up to where it ends now: with an application that never pauses, the end would never be reached.
        for transaction in read_transactions(database, scanner, database.wal_size()):
            group.append(transaction)
            group_bytes += len(transaction.page_nos) * database.page_size
            if group_bytes >= GROUP_BYTES:
                self._keep(database, group)
                group, group_bytes = [], 0
        if group:
            self._keep(database, group)
        if scanner.cursor != self._confirmed and _is_confirmed(database, scanner.cursor):
            self._confirmed = scanner.cursor

    def _is_unconfirmed(self) -> bool:
        """Whether something was captured that SQLite does not count as committed (yet)."""
        cursor = self._scanner.cursor if self._scanner else None
        return cursor is not None and cursor.offset > HEADER_SIZE and cursor != self._confirmed

    # -- segments ------------------------------------------------------------------------------------------------------

    def _keep(self, database: LiveDatabase, group: list[Transaction]) -> None:
        """One segment of these transactions."""
        page_nos, offsets = last_image(group)
        image = Image(database, group[-1].page_count, page_nos, offsets, group[-1].end)
        # What was cut off on the way and came back counts as new: a checkpoint may have cut the file too.
        lowest = min(self._state.hashes.page_count, *(transaction.page_count for transaction in group))
        grown = np.arange(lowest + 1, image.page_count + 1, dtype=np.uint32)
        unwritten = np.setdiff1d(grown, page_nos, assume_unique=True)
        if len(unwritten):
            image = image.completed(unwritten)
            page_nos = np.union1d(page_nos, unwritten)
        written_ms = min(self._now_ms(), database.wal_mtime_ms())
        self._append(image, self._changed_of(image, page_nos), written_ms)

    def _rebase(self, database: LiveDatabase, reason: str) -> None:
        """Compare the whole database with the captured state, and make what differs one segment."""
        self._continuous = False
        for _ in range(REBASE_TRIES):
            self._scanner = None
            image, before = Image.newest(database), self._state.hashes.page_count
            try:
                change = self._compare(image)
                self._append(image, change, self._now_ms())
            except ContinuityLost:  # the WAL began anew meanwhile, which happens once at most under one lock
                continue
            self._captured = dataclasses.replace(self._state, source=_source(image))
            self._scanner = Scanner(image.cursor) if image.cursor else None
            self._confirmed = image.cursor
            self._continuous = True
            self.figures.rebases += 1
            if before:
                log.info(
                    "%s: %s; compared: %d of %d pages differ",
                    self.path,
                    reason,
                    len(change.page_nos),
                    change.page_count,
                )
            else:
                log.info("%s: first copy of all %d pages", self.path, change.page_count)
            return
        raise DatabaseBusy(
            f"{self.path} changes while it is compared, in spite of a read lock; is it on a network file system?"
        )

    def _compare_if_changed(self, database: LiveDatabase) -> float | None:
        """The capture of a database without a WAL: under a shared lock, in which nobody commits, compare all of it."""
        if database.stamp() == self._stamp:
            return None
        database.acquire()
        try:
            has_wal = database.in_wal_mode()
            if not has_wal:
                stamp = database.stamp()
                image = Image.newest(database)
                self._append(image, self._compare(image), self._now_ms())
                self._stamp = stamp
        finally:
            database.release()
        if has_wal:  # switched to it just now; opened again, it is another kind of database
            self.let_go()
            return self.step()
        if self._spool.base_is_due(self._state):
            self._spool.save_base(self._state)
        self._note_figures(database)
        return None

    def _compare(self, image: Image) -> Change:
        known = self._known(image).hashes.hashes
        page_nos, hashes = [np.empty(0, np.uint32)], [np.empty(0, np.uint64)]
        for first, found in image.hashes():
            before = known[first - 1 : first - 1 + len(found)]
            differs = np.ones(len(found), dtype=np.bool_)
            differs[: len(before)] = found[: len(before)] != before
            at = np.flatnonzero(differs)
            page_nos.append((at + first).astype(np.uint32))
            hashes.append(found[at])
        return _change(image, np.concatenate(page_nos), np.concatenate(hashes))

    def _changed_of(self, image: Image, page_nos: U32) -> Change:
        """Of the pages that were written, those whose content is not what it was."""
        hashes = np.fromiter((page_hash(n, image.page(n)) for n in page_nos.tolist()), np.uint64, len(page_nos))
        known = self._known(image).hashes.hashes
        differs = np.ones(len(page_nos), dtype=np.bool_)
        old = page_nos <= len(known)
        differs[old] = hashes[old] != known[page_nos[old] - 1]
        return _change(image, page_nos[differs], hashes[differs])

    def _known(self, image: Image) -> Captured:
        """The captured state; an empty one when pages of another size cannot be compared with it."""
        state = self._state
        if state.page_size in (0, image.database.page_size):
            return state
        return dataclasses.replace(state, hashes=StateHashes())

    def _append(self, image: Image, change: Change, commit_ms: int) -> None:
        """Spool the change as one segment; then it is the captured state. Raises ContinuityLost when it was not one image."""
        state = self._state
        known = self._known(image)
        if image.cursor is not None and not _is_current(image.database, image.cursor):
            raise ContinuityLost("the WAL began anew while it was read")
        if not len(change.page_nos) and change.page_count == known.hashes.page_count:
            return
        commit_ms = max(commit_ms, state.last_commit_ms)
        snapshot = known.hashes.page_count == 0
        header = SegmentHeader(
            database=state.timeline.database,
            timeline=state.timeline.number,
            first=state.txid + 1,
            last=state.txid + 1,
            snapshot=snapshot,
            page_size=image.database.page_size,
            page_count=change.page_count,
            pages_before=known.hashes.page_count,
            first_commit_ms=commit_ms,
            last_commit_ms=commit_ms,
            state_before=known.hashes.checksum,
            state_after=_checksum_after(known.hashes, change),
            source=_source(image),
        )

        def write_pages(writer: SegmentWriter) -> None:
            for page_no, expected in zip(change.page_nos.tolist(), change.hashes.tolist(), strict=True):
                page = image.page(page_no)
                if page_hash(page_no, page) != expected:
                    raise ContinuityLost(f"page {page_no} changed while it was read")
                writer.add(page_no, page)
            if image.cursor is not None and not _is_current(image.database, image.cursor):
                raise ContinuityLost("the WAL began anew while it was read")

        self._spool.append(header, write_pages)
        known.hashes.resize(change.page_count)
        known.hashes.set_many(change.page_nos, change.hashes)
        self._captured = dataclasses.replace(
            known,
            txid=header.last,
            page_size=header.page_size,
            last_commit_ms=commit_ms,
            source=header.source,
            whole=False,
        )
        self._changed_at = self._monotonic()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _let_by(self, database: LiveDatabase) -> float | None:
        """Move the read lock to the newest commit, so that no checkpoint of the application waits for one of long ago.

        A checkpoint in mode RESTART or TRUNCATE that runs now waits for readers, and keeps everybody from writing meanwhile. It is past
        this one when the lock is passed once more after it has moved everything into the file, which no event tells. So for a moment
        after something happened it is looked at again. Returns seconds until then, None when that is over.
        """
        progress = database.wal_progress()
        database.pass_lock()
        frames, backfilled = database.wal_progress()
        if frames != backfilled:
            self._resting = None  # the lock is at a later commit, up to which a checkpoint may write
        frames, backfilled = progress
        if progress != self._progress:
            self._let_by_s = FIRST_LET_BY_S
        elif frames == backfilled:
            return (
                None  # passed on after the last one was moved, the lock is one that stops nothing but the next backfill
            )
        self._progress = progress
        wait_s = self._let_by_s
        self._let_by_s *= 2
        return wait_s if wait_s <= LAST_LET_BY_S else None

    def _checkpoint_if_due(self, database: LiveDatabase, *, captured: bool) -> float | None:
        """Seconds until the next look, None when there is nothing in the WAL to wait for. captured: whether this step found a commit."""
        cursor = self._scanner.cursor if self._scanner else None
        if cursor is None or cursor.offset == HEADER_SIZE:
            return None
        now = self._monotonic()
        pages = (cursor.offset - _backfilled_offset(self._backfilled, cursor)) // cursor.frame_size
        is_abandoned = now >= self._next_checkpoint_at and not captured and self._is_abandoned(database)
        if pages == 0 and not is_abandoned:
            return None
        is_due = pages >= self._settings.checkpoint_pages or is_abandoned
        due_at = max(self._changed_at + (0 if is_due else self._settings.idle_checkpoint_s), self._next_checkpoint_at)
        if now < due_at:
            return due_at - now
        self._resting = None
        wait_s = self._checkpoint(database)
        if is_abandoned and not self.figures.checkpoint_blocked and database.truncate_wal():
            self._drain()
        return wait_s

    def _checkpoint(self, database: LiveDatabase) -> float | None:
        began = self._monotonic()
        try:
            result = database.checkpoint(self._drain)
        except DatabaseBusy as busy:
            log.debug("checkpoint put off: %s", busy)
            result = None
        if result is not None:
            if self._is_unconfirmed():
                self._rebase(database, "SQLite took back a commit, since it could not make it durable")
            self.figures.checkpoints += 1
            self.figures.checkpoints_s += self._monotonic() - began
            self.figures.barriers_s += result.barrier_s
            self.figures.barrier_s = max(self.figures.barrier_s, result.barrier_s)
        self.figures.checkpoint_blocked = result is None or not result.complete
        if self.figures.checkpoint_blocked:
            longest_s = MAX_CHECKPOINT_RETRY_S if result else MAX_BUSY_RETRY_S
            self._retry_s = min(self._retry_s * 2, longest_s)
            self._next_checkpoint_at = self._monotonic() + self._retry_s
            return self._retry_s
        self._resting = result.rest if result else None
        self._retry_s = FIRST_CHECKPOINT_RETRY_S
        self._backfilled = self._scanner.cursor if self._scanner else None
        return None

    def _is_abandoned(self, database: LiveDatabase) -> bool:
        return self._monotonic() >= self._in_company_until and database.is_alone()

    def _rest_if_abandoned(self, database: LiveDatabase) -> float | None:
        """Close a database that no application has open, once the file alone is the captured state. Seconds until that is worth a try.

        Then SQLite deletes the WAL and its index. If they stayed, and somebody put another file in place of the database, SQLite
        would take them for the new one's.
        """
        if not self._is_whole(database) or not self._is_abandoned(database):
            return None
        now, settled_s = self._monotonic(), database.stamp().settled_in_s(time.time_ns())
        wait_s = max(settled_s, self._no_rest_before - now)
        if wait_s > 0:
            return wait_s
        self.let_go()
        if database.has_wal():  # somebody is there whom the kernel does not show us
            self._in_company_until = now + self._company_s
            self._company_s = min(self._company_s * 2, MAX_COMPANY_S)
        else:
            self._company_s = FIRST_COMPANY_S
        self.figures.wal_bytes = 0
        return None

    def _note_figures(self, database: LiveDatabase) -> None:
        self.figures.wal_bytes = database.wal_size()
        self.figures.page_size = database.page_size
        self.figures.page_count = self._state.hashes.page_count


def _soonest(*waits_s: float | None) -> float | None:
    return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)


def _change(image: Image, page_nos: U32, hashes: NDArray[np.uint64]) -> Change:
    stored = page_nos != lock_page(image.database.page_size)
    return Change(page_nos[stored], hashes[stored], image.page_count)


def _checksum_after(hashes: StateHashes, change: Change) -> int:
    """The state checksum that the change leads to, without changing anything."""
    known = hashes.hashes
    replaced = change.page_nos[change.page_nos <= len(known)]
    parts = (known[replaced - 1], known[change.page_count :], change.hashes)
    return hashes.checksum ^ int(np.bitwise_xor.reduce(np.concatenate(parts)))


def _source(image: Image) -> Source:
    """Where in the writer's WAL this is; with no WAL only which file it was."""
    identity, cursor = image.database.identity, image.cursor
    if cursor is None:
        return Source(identity.device, identity.inode, 0, 0, 0, 0, 0, False)
    return Source(
        identity.device,
        identity.inode,
        cursor.salt1,
        cursor.salt2,
        cursor.checksum1,
        cursor.checksum2,
        cursor.offset,
        cursor.big_endian,
    )


def _cursor(source: Source | None, page_size: int) -> Cursor | None:
    if source is None or source.offset < HEADER_SIZE:
        return None
    return Cursor(
        source.offset, page_size, source.big_endian, source.salt1, source.salt2, source.checksum1, source.checksum2
    )


def _same_generation(header: WalHeader, cursor: Cursor) -> bool:
    return (header.salt1, header.salt2) == (cursor.salt1, cursor.salt2)


def _backfilled_offset(backfilled: Cursor | None, cursor: Cursor) -> int:
    """Up to where the WAL that the cursor is in is in the database file already."""
    if backfilled is None or (backfilled.salt1, backfilled.salt2) != (cursor.salt1, cursor.salt2):
        return HEADER_SIZE
    return backfilled.offset


def _is_confirmed(database: LiveDatabase, cursor: Cursor) -> bool:
    """Whether SQLite itself counts everything before the cursor as committed."""
    committed_frames = database.committed_frames()
    return HEADER_SIZE + committed_frames * cursor.frame_size >= cursor.offset and _is_current(database, cursor)


def _is_current(database: LiveDatabase, cursor: Cursor) -> bool:
    header = database.wal_header()
    return header is not None and _same_generation(header, cursor)


def _last_frame_is_there(database: LiveDatabase, scanner: Scanner) -> bool:
    at = scanner.offset - scanner.cursor.frame_size
    return scanner.still_there(database.read_wal(at, FRAME_HEADER_SIZE) if at > 0 else b"")


def _holds(database: LiveDatabase, cursor: Cursor) -> bool:
    """Whether the WAL is of the same generation, and has the frame that the cursor is behind, with all that led to it."""
    if not _is_current(database, cursor):
        return False
    if cursor.offset == HEADER_SIZE:
        return True
    return _last_frame_is_there(database, Scanner(cursor))
