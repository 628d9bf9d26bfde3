"""The pages of a database as it was at a position of a replica, fetched from the store when they are asked for.

Owns which segment has the image of each page, what is fetched ahead and what stays in memory. It writes nothing, and
knows nothing of SQL.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from replicator.errors import ChainBroken, ReplicatorError, StateMismatch, UsageError
from replicator.layout import SegmentRef
from replicator.pagehash import lock_page
from replicator.replica import Replica, open_segment
from replicator.restore_plan import (
    RestoreOptions,
    RestorePlan,
    Unusable,
    blaming,
    check_link,
    check_options,
    with_fallback,
)
from replicator.segment import DEFAULT_TAIL, Group, SegmentReader
from replicator.store import ObjectStore
from replicator.store.measure import MeasuredStore, Meter

log = logging.getLogger(__name__)

Pages = dict[int, memoryview]

CACHE_BYTES = 64 << 20
_SMALLEST_TAIL = 4096
_TAILS_BYTES = 1 << 20  # all increments' tails together, as long as they are not very many
_AHEAD_BYTES = 8 << 20  # of pages that a scan will come to, at most
_CHUNK_BYTES = 2 << 20  # of them, those that are fetched by one request
_STREAMS = 16  # scans that are told apart: a query may walk several tables and indexes at once


@dataclass(frozen=True)
class Fetched:
    """What was asked of the store: requests of any kind, and bytes of objects that came."""

    requests: int
    size_bytes: int


class PastPages:
    """The database at one position, page by page; each group of pages that is fetched is checked against its checksum.

    A segment that proves damaged, or that is gone because others were made of it, is gone around when others lead to the
    same position: what a position holds never changes. May be used by several threads at once.
    """

    def __init__(
        self,
        store: ObjectStore,
        options: RestoreOptions,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Reads the end of every segment of the plan, where its index is.

        options: which position, as for ``restore``, and how many requests at once. cache_bytes: for pages in memory.
        Raises RestoreError and its subclasses, FormatError, StoreError, UsageError.
        """
        check_options(options)
        self._meter = Meter()
        self._store = MeasuredStore(store, self._meter)
        self.replica = Replica(self._store)
        self._options = options
        self._cache_bytes = cache_bytes
        self._unusable: dict[str, ReplicatorError] = {}
        self._replanning = threading.Lock()
        self._pool = ThreadPoolExecutor(options.parallelism, "past")
        self._closed = False
        self._twin: PastPages | None = None
        self._not_shared: Set[int] = frozenset()
        try:
            self._segments = with_fallback(self.replica, options, self._open, self._unusable)
        except BaseException:
            self.close()
            raise
        self.plan: RestorePlan = self._segments.plan

    @property
    def page_size(self) -> int:
        return self.plan.page_size

    @property
    def page_count(self) -> int:
        return self.plan.page_count

    @property
    def fetched(self) -> Fetched:
        """Up to now."""
        totals = self._meter.snapshot()
        return Fetched(sum(t.requests for t in totals), sum(t.received_bytes for t in totals))

    def page(self, page_no: int) -> memoryview:
        """One page of 1 to page_count, page_size bytes. Raises FormatError, ChainBroken, StoreError, UsageError."""
        twin = self._twin
        if twin is not None and page_no <= twin.page_count and page_no not in self._not_shared:
            return twin._own_page(page_no)
        return self._own_page(page_no)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the database file; fewer at its end. Raises what ``page`` raises."""
        size = self.page_size
        end = min(offset + length, self.page_count * size)
        parts: list[memoryview] = []
        while offset < end:
            page_no, start = offset // size + 1, offset % size
            parts.append(self.page(page_no)[start : start + end - offset])
            offset += len(parts[-1])
        return b"".join(parts)

    def share(self, twin: PastPages | None, except_for: Set[int] = frozenset()) -> None:
        """Take all pages but these from another position at which they are the same, to fetch and keep them once; None ends it."""
        self._not_shared, self._twin = except_for, twin

    def prefetch(self, page_nos: Iterable[int]) -> None:
        """Begin to fetch pages that are asked for soon, several at once; no more than the cache holds."""
        try:
            self._segments.prefetch(n for n in page_nos if n <= self.page_count and n != lock_page(self.page_size))
        except Unusable:
            return  # whoever asks for the page finds out

    def open_segments(self, refs: Iterable[SegmentRef]) -> list[SegmentReader]:
        """Readers of segments of this replica, in the order given; those of the plan are open already.

        Raises FormatError, StoreError.
        """
        known = {reader.name: reader for reader in self._segments.readers}
        wanted = list(refs)
        tail_bytes = _tail_bytes(len(wanted))

        def reader(ref: SegmentRef) -> SegmentReader:
            return known.get(ref.key) or self._open_one(ref, tail_bytes)

        return list(self._pool.map(reader, wanted))

    def is_same(self, other: PastPages, page_nos: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """For each page, whether both take it from the same segment; if not, it may be the same or not."""
        numbers: dict[str, int] = {}
        own = self._segments.sources_of(page_nos, numbers)
        return np.equal(own, other._segments.sources_of(page_nos, numbers), dtype=np.bool_)

    def close(self) -> None:
        """Pages are not given any more; what is under way ends first."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _own_page(self, page_no: int) -> memoryview:
        if page_no == lock_page(self.page_size):
            return memoryview(bytes(self.page_size))
        while True:
            if self._closed:
                raise UsageError(f"{self.plan.position} was closed and is read no more; open it again")
            segments = self._segments
            try:
                return segments.page(page_no)
            except Unusable as failed:
                self._go_around(segments, failed)

    def _open(self, plan: RestorePlan) -> _Segments:
        newest_first = plan.segments[::-1]
        tail_bytes = _tail_bytes(len(newest_first) - 1)

        def opened(ref: SegmentRef) -> SegmentReader:
            with blaming(ref):
                return self._open_one(ref, DEFAULT_TAIL if ref.is_snapshot else tail_bytes)

        readers = list(self._pool.map(opened, newest_first))
        newer: SegmentReader | None = None
        for ref, reader in zip(newest_first, readers, strict=True):
            with blaming(ref):
                check_link(reader, newer)
            newer = reader
        return _Segments(plan, newest_first, readers, self._pool, self._cache_bytes)

    def _open_one(self, ref: SegmentRef, tail_bytes: int) -> SegmentReader:
        size_bytes = ref.size_bytes or self._store.head(ref.key).size_bytes
        return open_segment(ref, partial(self._get, ref.key), size_bytes, tail_bytes=tail_bytes)

    def _get(self, key: str, offset: int, length: int) -> bytes:
        return self._store.get(key, offset=offset, length=length)

    def _go_around(self, segments: _Segments, failed: Unusable) -> None:
        """Take other segments that lead to the same position. Raises the cause when there are none."""
        with self._replanning:
            if self._segments is not segments:
                return  # another thread did
            log.warning("looking for a way around a segment: %s", failed.error)
            self._unusable[failed.ref.key] = failed.error
            pinned = replace(self._options, position=self.plan.position, txid=None, timeline=None, at_ms=None)
            found = with_fallback(self.replica, pinned, self._open, self._unusable)
            if found.plan.state_checksum != self.plan.state_checksum:
                raise StateMismatch(
                    f"the segments that are left lead to {self.plan.position} with another state; restore another position"
                )
            self._segments = found


def _tail_bytes(segments: int) -> int:
    return max(_SMALLEST_TAIL, min(DEFAULT_TAIL, _TAILS_BYTES // max(1, segments)))


@dataclass
class _Stream:
    """A scan that goes on through a segment: the group it is at, the first not asked for, how many it may be ahead."""

    segment: int
    at: int
    edge: int
    steps: int = 0
    window: int = 0


class _Segments:
    """The opened segments of one plan, newest first, and those of their groups that are in memory."""

    def __init__(
        self,
        plan: RestorePlan,
        refs: Sequence[SegmentRef],
        readers: Sequence[SegmentReader],
        pool: ThreadPoolExecutor,
        cache_bytes: int,
    ) -> None:
        self.plan = plan
        self.readers = readers
        self._refs = refs
        self._pool = pool
        self._cache_bytes = cache_bytes
        self._place_changed_pages()
        self._latest: Pages = {}
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[int, int], tuple[Future[Pages], int]] = OrderedDict()
        self._held_bytes = 0
        self._streams: deque[_Stream] = deque(maxlen=_STREAMS)

    def page(self, page_no: int) -> memoryview:
        """Raises Unusable, StoreError."""
        page = self._latest.get(page_no)
        if page is None:
            pages = self._group(*self._place(page_no))
            self._latest, page = pages, pages[page_no]
        return page

    def sources_of(self, page_nos: NDArray[np.uint32], numbers: dict[str, int]) -> NDArray[np.int64]:
        """For each page, the number of the segment that has it. numbers: of segments by name; new ones are added."""
        known = [numbers.setdefault(reader.name, len(numbers)) for reader in self.readers]
        return np.array(known, dtype=np.int64)[self._owners_of(page_nos)]

    # -- which segment -------------------------------------------------------------------------------------------------

    def _place_changed_pages(self) -> None:
        """Each page is taken from the newest segment that has it, unless the database ended before it since then.

        What no increment holds is the snapshot's, which is the last of them.
        """
        self._limit = self.plan.page_count
        found: list[NDArray[np.uint32]] = []
        for reader in self.readers[:-1]:
            self._limit = min(self._limit, reader.header.page_count)
            page_nos = reader.page_nos()
            found.append(page_nos[page_nos <= self._limit])
        self._limit = min(self._limit, self.readers[-1].header.page_count)
        numbers = np.repeat(np.arange(len(found), dtype=np.uint32), [len(page_nos) for page_nos in found])
        together = np.concatenate(found) if found else np.zeros(0, dtype=np.uint32)
        self._changed, first = np.unique(together, return_index=True)
        self._owners = numbers[first]

    def _owners_of(self, page_nos: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Numbers of segments."""
        owners = np.full(len(page_nos), len(self.readers) - 1, dtype=np.uint32)
        if len(self._changed):
            places = np.minimum(np.searchsorted(self._changed, page_nos), len(self._changed) - 1)
            owners = np.where(self._changed[places] == page_nos, self._owners[places], owners)
        return owners

    def _place(self, page_no: int) -> tuple[int, Group]:
        place = int(np.searchsorted(self._changed, page_no))
        changed = place < len(self._changed) and self._changed[place] == page_no
        segment = int(self._owners[place]) if changed else len(self.readers) - 1
        with blaming(self._refs[segment]):
            group = self.readers[segment].group_of(page_no) if changed or page_no <= self._limit else None
            if group is None:
                raise ChainBroken(f"page {page_no} of {self.plan.position} is in none of the segments that lead there")
        return segment, group

    # -- what is in memory ---------------------------------------------------------------------------------------------

    def _group(self, segment: int, group: Group) -> Pages:
        """Those pages of the group that are this segment's to give."""
        key = (segment, group.number)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            else:
                self._start(segment, [group])
            future, _ = self._groups[key]
            self._read_ahead(segment, group.number)
        return future.result()

    def _start(self, segment: int, groups: Sequence[Group]) -> None:
        """Fetch neighbouring groups by one request. The oldest make room; who waits for one of those still gets it."""
        futures: list[Future[Pages]] = [Future() for _ in groups]
        for group, future in zip(groups, futures, strict=True):
            size_bytes = len(group.page_nos) * self.plan.page_size
            self._groups[segment, group.number] = (future, size_bytes)
            self._held_bytes += size_bytes
        while self._held_bytes > self._cache_bytes and len(self._groups) > len(groups):
            self._held_bytes -= self._groups.popitem(last=False)[1][1]
        try:
            self._pool.submit(self._fetch, segment, groups, futures).add_done_callback(
                lambda task: self._abandon(futures) if task.cancelled() else None
            )
        except RuntimeError:  # the pool was shut down
            self._abandon(futures)

    def _abandon(self, futures: Sequence[Future[Pages]]) -> None:
        for future in futures:
            future.set_exception(UsageError(f"{self.plan.position} was closed while it was read; open it again"))

    def _forget(self, key: tuple[int, int], future: Future[Pages]) -> None:
        found = self._groups.get(key)
        if found is not None and found[0] is future:
            self._held_bytes -= self._groups.pop(key)[1]

    def _fetch(self, segment: int, groups: Sequence[Group], futures: Sequence[Future[Pages]]) -> None:
        reader = self.readers[segment]
        try:
            with blaming(self._refs[segment]):
                start = groups[0].offset
                data = memoryview(reader.read(start, groups[-1].offset + groups[-1].length - start))
                for group, future in zip(groups, futures, strict=True):
                    at = group.offset - start
                    mine = self._owners_of(group.page_nos) == segment
                    decoded = reader.decode_group(group, data[at : at + group.length])
                    future.set_result({n: page for (n, page), own in zip(decoded, mine.tolist(), strict=True) if own})
        except Exception as error:
            for group, future in zip(groups, futures, strict=True):
                if not future.done():
                    with self._lock:
                        self._forget((segment, group.number), future)  # who asks later asks the store again
                    future.set_exception(error)

    def prefetch(self, page_nos: Iterable[int]) -> None:
        for page_no in page_nos:
            segment, group = self._place(page_no)
            with self._lock:
                if (segment, group.number) not in self._groups:
                    self._start(segment, [group])

    # -- what is fetched before it is asked for ------------------------------------------------------------------------

    def _read_ahead(self, segment: int, number: int) -> None:
        """A scan that goes on from group to group gets more and more of those that follow; a lookup gets none."""
        stream = self._stream(segment, number)
        if stream.at == number:
            return
        stream.at, stream.edge, stream.steps = number, max(stream.edge, number + 1), stream.steps + 1
        if stream.steps == 1:
            return  # two neighbours alone may be chance
        group_bytes = len(self.readers[segment].groups[0].page_nos) * self.plan.page_size
        most = max(1, min(_AHEAD_BYTES, self._cache_bytes // 4) // group_bytes)
        stream.window = min(max(2, 2 * stream.window), most)
        chunk = max(1, min(stream.window, _CHUNK_BYTES // group_bytes))
        while stream.edge <= number + 1 + stream.window - chunk and stream.edge < len(self.readers[segment].groups):
            end = min(stream.edge + chunk, len(self.readers[segment].groups))
            self._start_wanted(segment, range(stream.edge, end))
            stream.edge = end

    def _stream(self, segment: int, number: int) -> _Stream:
        for stream in self._streams:
            if stream.segment == segment and stream.at <= number <= stream.edge:
                return stream
        stream = _Stream(segment, number, number + 1)
        self._streams.append(stream)
        return stream

    def _start_wanted(self, segment: int, numbers: range) -> None:
        """Fetch those groups that are not in memory and have a page of this segment's to give, stretch by stretch."""
        stretch: list[Group] = []
        for number in numbers:
            group = self.readers[segment].groups[number]
            wanted = (segment, number) not in self._groups and (self._owners_of(group.page_nos) == segment).any()
            if wanted:
                stretch.append(group)
            elif stretch:
                self._start(segment, stretch)
                stretch = []
        if stretch:
            self._start(segment, stretch)
