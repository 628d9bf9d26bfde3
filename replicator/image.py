"""One committed state of a live database, page by page: what is in the WAL up to a cursor, and the file for the rest.

Owns the rule which of the two holds a page. Never opens anything, and holds true only while the read lock under which it was made is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replicator.database import LiveDatabase
from replicator.errors import DatabaseError
from replicator.pagehash import StateHashes, hash_pages, page_hash
from replicator.wal import HEADER_SIZE, I64, U32, Cursor, Scanner, Transaction, last_image

CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Image:
    """A state of a database.

    page_nos, offsets: the pages that are in the WAL and not in the file yet, ascending, and where in it; all others are in the file.
    cursor: the place in the WAL that the state belongs to; None without a WAL.
    """

    database: LiveDatabase
    page_count: int
    page_nos: U32
    offsets: I64
    cursor: Cursor | None

    @classmethod
    def newest(cls, database: LiveDatabase) -> Image:
        """The newest committed state, read from the start of the WAL up to where SQLite itself counts it. Under a read lock.

        Raises DatabaseError when the WAL does not hold what SQLite counts in it.
        """
        while True:
            header = database.wal_header()
            committed_frames, backfilled_frames = database.wal_progress()
            if header is None:
                if committed_frames:
                    raise _wal_damaged(database, 0)
                none = last_image([])
                return cls(database, database.committed_page_count(), *none, None)
            scanner = Scanner(header.cursor())
            end = HEADER_SIZE + committed_frames * header.frame_size
            transactions = list(read_transactions(database, scanner, end))
            if database.wal_header() != header:
                continue  # it began anew between the two questions; that happens once at most under one lock
            if scanner.cursor.offset != end:
                raise _wal_damaged(database, scanner.offset)
            page_count = transactions[-1].page_count if transactions else database.committed_page_count()
            page_nos, offsets = last_image(transactions)
            # SQLite reads from the file what was backfilled, too. It is the same, unless somebody copied another file over it in place.
            only_here = offsets >= HEADER_SIZE + backfilled_frames * header.frame_size
            return cls(database, page_count, page_nos[only_here], offsets[only_here], scanner.cursor)

    def page(self, page_no: int) -> bytes:
        at = int(np.searchsorted(self.page_nos, page_no))
        if at < len(self.page_nos) and self.page_nos[at] == page_no:
            return self.database.read_wal(int(self.offsets[at]), self.database.page_size)
        return self.database.read_pages(page_no, 1)

    def completed(self, page_nos: U32) -> Image:
        """The same with pages that no frame of the newest commits holds, since SQLite does not write unused ones when it grows.

        What such a page holds is what an older frame of this WAL holds, else what the file holds.
        """
        whole = Image.newest(self.database)
        older = np.isin(whole.page_nos, page_nos)
        numbers = np.concatenate([self.page_nos, whole.page_nos[older]])
        offsets = np.concatenate([self.offsets, whole.offsets[older]])
        order = np.argsort(numbers)
        return Image(self.database, self.page_count, numbers[order], offsets[order], self.cursor)

    def hashes(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Page hashes of the whole database in order, as (first page number, hashes), a few MiB of pages at a time."""
        page_size = self.database.page_size
        step = max(1, CHUNK_BYTES // page_size)
        for first in range(1, self.page_count + 1, step):
            count = min(step, self.page_count - first + 1)
            hashes = hash_pages(first, self.database.read_pages(first, count), page_size)
            low, high = np.searchsorted(self.page_nos, (first, first + count))
            for page_no in self.page_nos[low:high].tolist():
                hashes[page_no - first] = page_hash(page_no, self.page(page_no))
            yield first, hashes

    def state_hashes(self) -> StateHashes:
        """Page hashes of the whole database, all of which is read."""
        state = StateHashes(self.page_count)
        for first_page_no, hashes in self.hashes():
            state.set_range(first_page_no, hashes)
        return state


def read_transactions(database: LiveDatabase, scanner: Scanner, end: int | None = None) -> Iterator[Transaction]:
    """What the scanner finds from its place to the byte ``end`` of the WAL, or to where its frames end, read in pieces."""
    while True:
        before = scanner.offset
        length = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - before)
        if length <= 0:
            return
        chunk = database.read_wal(before, length)
        yield from scanner.feed(chunk)
        if scanner.offset == before or len(chunk) < CHUNK_BYTES:
            return


def _wal_damaged(database: LiveDatabase, offset: int) -> DatabaseError:
    return DatabaseError(
        f"{database.path}-wal is damaged at byte {offset}, where SQLite counts a commit; check the disk and the database"
    )
