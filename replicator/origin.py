"""Where a timeline comes from: gives a writer its own, with its parent and the position where it forks.

Owns the choice of the number and the parent. Two writers never get the same number, since the record is written conditionally.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replicator import chain
from replicator.errors import ChainBroken, LeaseLost, NothingToRestore
from replicator.layout import SegmentRef
from replicator.replica import Replica
from replicator.spool import Captured
from replicator.values import Position, Timeline


@dataclass(frozen=True, eq=False)
class Origin:
    """timeline: the new one. txid: it goes on after this. known: the state there, None when it must begin with a snapshot."""

    timeline: Timeline
    txid: int
    known: Captured | None


def new_timeline(
    replica: Replica,
    known: Captured | None,
    *,
    writer: str,
    reason: str,
    now_ms: int,
    epoch: int = 0,
    arrived_txid: int = 0,
) -> Origin:
    """Write the record of a new timeline. Raises StoreError, and LeaseLost when a later lease has written here.

    known: the state that the database forks from, when it is of this replica and can still be restored; else the new timeline
    begins with a snapshot, and its parent is the newest that there is. epoch: of the lease that allows it; 0 without one, and then
    the newest's is taken over, so that what is written from here on is the newest. arrived_txid: up to here the replica must have what
    leads to the known state, the rest is still to come; 0 when it need have nothing.
    """
    parent: int | None
    fork_txid: int | None
    while True:
        timelines, segments = replica.timelines(), replica.segments()
        newest_epoch = max((each.epoch for each in timelines.values()), default=0)
        if 0 < epoch < newest_epoch:
            raise LeaseLost(
                f"{replica.store.url} has timelines of lease {newest_epoch}, this writer's is {epoch}: another has taken over"
            )
        number = max((*timelines, *(ref.timeline for ref in segments)), default=0) + 1
        if known is not None and timelines.get(known.timeline.number) == known.timeline:
            parent, fork_txid = known.timeline.number, known.txid
        else:
            known = None
            parent, fork_txid = _newest(timelines, segments)
        timeline = Timeline(
            number=number,
            database=next(iter(timelines.values())).database if timelines else secrets.token_hex(16),
            parent=parent,
            fork_txid=fork_txid,
            created_ms=now_ms,
            writer=writer,
            reason=reason,
            epoch=max(epoch, newest_epoch),
        )
        if replica.write_timeline(timeline):
            # Listed anew after the record was written: from then on nobody deletes what leads to its fork.
            if known is not None and not _leads_to(
                timelines, replica.segments(), Position(known.timeline.number, arrived_txid)
            ):
                known = None
            return Origin(timeline, fork_txid or 0, known)


def _leads_to(timelines: Mapping[int, Timeline], segments: Sequence[SegmentRef], position: Position) -> bool:
    if position.txid == 0:
        return True
    try:
        chain.plan(timelines, segments, position)
    except (NothingToRestore, ChainBroken):
        return False  # the window of the replica has left it behind
    return True


def _newest(timelines: Mapping[int, Timeline], segments: Sequence[SegmentRef]) -> tuple[int | None, int | None]:
    """The newest position as (timeline, txid); (None, None) when nothing can be restored, or only of a timeline whose record is lost."""
    try:
        position = chain.newest(timelines, segments)
    except (NothingToRestore, ChainBroken):
        return None, None
    return (position.timeline, position.txid) if position.timeline in timelines else (None, None)
