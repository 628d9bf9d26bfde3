"""Which segments a restore takes, and the way around one that cannot be used.

Owns what may be asked for, and how often the replica is listed again. Never reads a page, and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from replicator import chain
from replicator.errors import (
    ChainBroken,
    FormatError,
    NothingToRestore,
    ObjectMissing,
    ReplicatorError,
    SegmentDamaged,
    UsageError,
)
from replicator.layout import SegmentRef
from replicator.replica import Replica
from replicator.segment import SegmentReader
from replicator.values import Position, Timeline

log = logging.getLogger(__name__)

IntegrityCheck = Literal["none", "quick", "full"]

MAX_LISTINGS = 10
"""So often a restore lists the replica, when objects that were listed are gone."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class RestoreOptions:
    """What to restore, and how. At most one of position, txid and at_ms; with none of them, the newest position.

    txid, at_ms: on ``timeline`` or its ancestors before it left them; on the newest timeline if none is named. at_ms:
    UTC milliseconds since 1970, the last commit at or before it. parallelism: downloads at once. mode: of the restored
    file; 0600 if none is given, since a database may hold secrets. owner: its user and group; if this process may not give
    it to them, it stays with the process's own, and nobody else may read it. resume: what is there when the store fails or
    the process is killed stays, and the next restore to the same target that says so goes on with it.
    """

    position: Position | None = None
    txid: int | None = None
    timeline: int | None = None
    at_ms: int | None = None
    parallelism: int = 8
    integrity_check: IntegrityCheck = "quick"
    mode: int | None = None
    owner: tuple[int, int] | None = None
    resume: bool = False


NEWEST = RestoreOptions()


@dataclass(frozen=True)
class RestorePlan:
    """What a restore would do. reached_ms: time of the last commit in it. segments: in the order of their txids.

    download_bytes: of the segments, an upper bound of what is fetched. size_bytes, state_checksum: of the database that
    they give; database: its id.
    """

    position: Position
    reached_ms: int
    segments: tuple[SegmentRef, ...]
    download_bytes: int
    page_size: int
    page_count: int
    size_bytes: int
    state_checksum: int
    database: str


class Unusable(Exception):
    """A segment cannot be used; another plan may do without it. Raised in ``blaming``, handled by ``with_fallback``."""

    def __init__(self, ref: SegmentRef, error: ReplicatorError) -> None:
        super().__init__(str(error))
        self.ref = ref
        self.error = error


@contextmanager
def blaming(ref: SegmentRef) -> Iterator[None]:
    """What goes wrong inside is a fault of this segment."""
    try:
        yield
    except (FormatError, ObjectMissing, ChainBroken) as error:
        raise Unusable(ref, error) from error


def with_fallback(
    replica: Replica,
    options: RestoreOptions,
    act: Callable[[RestorePlan], _T],
    unusable: dict[str, ReplicatorError] | None = None,
) -> _T:
    """``act`` on the plan, and when a segment in it proves unusable, on one without that segment.

    The target stays what was asked for: a segment that cannot be used never makes it an earlier one. An object that
    was listed and is gone (a merge or retention did that) is reason to list again, a few times: while many are merged, the next
    may be gone as well. unusable: keys of segments that are not to be used and why; those that are found are added.
    """
    unusable = {} if unusable is None else unusable
    listings = 1
    while True:
        try:
            return act(_resolve(replica, options, unusable))
        except Unusable as failed:
            if isinstance(failed.error, ObjectMissing):
                if listings == MAX_LISTINGS:
                    raise failed.error from None
                listings += 1
            unusable[failed.ref.key] = failed.error
            log.warning("looking for a way around a segment: %s", failed.error)
        except ObjectMissing as error:
            if listings == MAX_LISTINGS:
                raise
            listings += 1
            log.warning("the replica changed meanwhile, it is listed again: %s", error)
        except (ChainBroken, NothingToRestore) as broken:
            if not unusable:
                raise
            first = next(iter(unusable.values()))
            raise type(first)(f"{first}; without it, {broken}") from first


def _resolve(replica: Replica, options: RestoreOptions, unusable: dict[str, ReplicatorError]) -> RestorePlan:
    timelines, segments = replica.timelines(), replica.segments()
    target = _target(replica, timelines, segments, options)
    found = chain.plan(timelines, [ref for ref in segments if ref.key not in unusable], target)
    last = found.segments[-1]
    with blaming(last):
        header = replica.header(last)
        record = timelines.get(last.timeline)
        if record is not None and record.database != header.database:
            raise SegmentDamaged(f"{last.key} is damaged: it belongs to another database; it was copied to this place")
    return RestorePlan(
        position=Position(last.timeline, last.last),
        reached_ms=header.last_commit_ms,
        segments=found.segments,
        download_bytes=found.size_bytes,
        page_size=header.page_size,
        page_count=header.page_count,
        size_bytes=header.page_size * header.page_count,
        state_checksum=header.state_after,
        database=header.database,
    )


def _target(
    replica: Replica, timelines: dict[int, Timeline], segments: list[SegmentRef], options: RestoreOptions
) -> Position:
    if options.position is not None:
        return options.position
    if options.at_ms is not None:
        return replica.find_position(timelines, segments, options.at_ms, options.timeline)[0]
    if options.txid is not None:
        timeline = options.timeline
        return Position(chain.newest(timelines, segments).timeline if timeline is None else timeline, options.txid)
    newest = chain.newest(timelines, segments, options.timeline)
    stranded = sum(ref.timeline >= newest.timeline and ref.last > newest.txid for ref in segments)
    if stranded:
        log.warning("%d segments after %s do not follow from it and are left out; see the history", stranded, newest)
    return newest


def check_options(options: RestoreOptions) -> None:
    if sum(wish is not None for wish in (options.position, options.txid, options.at_ms)) > 1:
        raise UsageError("a restore has one target; give a position, a txid or a time, not several of them")
    if options.position is not None and options.timeline is not None:
        raise UsageError("a position names its timeline; leave out the timeline")
    if options.parallelism < 1:
        raise UsageError(f"parallelism is {options.parallelism}; it must be 1 or more")


def check_link(reader: SegmentReader, newer: SegmentReader | None) -> None:
    """Raises ChainBroken unless the newer segment follows from this one. Source: docs/format.md, section 4."""
    if newer is None:
        return
    header, after = reader.header, newer.header
    if header.database != after.database or header.page_size != after.page_size:
        raise ChainBroken(f"{newer.name} does not follow from {reader.name}: another database or page size")
    # A segment that begins inside the range of the one before says nothing about the state in between.
    adjoining = after.first == header.last + 1
    if adjoining and (header.state_after, header.page_count) != (after.state_before, after.pages_before):
        raise ChainBroken(
            f"{newer.name} does not follow from {reader.name}: it was made for {after.pages_before} pages with state "
            f"{after.state_before:016x}, not {header.page_count} pages with state {header.state_after:016x}"
        )
