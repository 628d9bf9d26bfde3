"""The fleet as the bucket knows it: its record, written once at setup, and the lease of the node that may write.

Owns ``fleet/fleet.json`` and ``fleet/lease.json`` below the bucket's prefix. Holds no secret: of the recovery key only the public half.
"""

from __future__ import annotations

import contextlib
import threading

import msgspec

from minipaas.errors import BadRequest, Conflict, NotFound
from minipaas.model import Fleet
from minipaas.settings import Settings
from replicator import Lease, ObjectMissing, ObjectStore, PreconditionFailed

RECORD = "fleet/fleet.json"
LEASE = "fleet/lease.json"


class FleetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery must know before it has the state database. id: 32 hex digits. sync_interval_s: see Settings."""

    id: str
    recovery_recipient: str
    domain: str
    sync_interval_s: float
    version: int = 1


def record_of(fleet: Fleet, settings: Settings) -> FleetRecord:
    return FleetRecord(
        id=fleet.id,
        recovery_recipient=fleet.recovery_recipient,
        domain=settings.domain,
        sync_interval_s=settings.sync_interval_s,
    )


def read_fleet(bucket: ObjectStore) -> FleetRecord:
    """Raises NotFound when the bucket holds no fleet, BadRequest when its record is of a newer release, StoreError."""
    try:
        body = bucket.get(RECORD)
    except ObjectMissing:
        raise NotFound(
            f"{bucket.url} holds no fleet; check bucket and prefix, or make a new fleet with: minipaas setup"
        ) from None
    try:
        record = msgspec.json.decode(body, type=FleetRecord)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"{bucket.url}/{RECORD} cannot be read: {error}") from error
    if record.version != 1:
        raise BadRequest(f"{bucket.url} was written by a newer minipaas (version {record.version}); use that")
    return record


def write_fleet(bucket: ObjectStore, record: FleetRecord) -> None:
    """Raises Conflict when the bucket holds a fleet already, StoreError."""
    try:
        bucket.put(RECORD, msgspec.json.encode(record), if_none_match=True)
    except PreconditionFailed:
        raise Conflict(
            f"{bucket.url} holds a fleet already; bring it back with: minipaas recover, or use another prefix"
        ) from None


def keep_fleet(bucket: ObjectStore, record: FleetRecord) -> None:
    """Write it again where somebody has emptied the bucket: without it nothing can be recovered from there. Raises StoreError."""
    with contextlib.suppress(Conflict):
        write_fleet(bucket, record)


def fleet_lease(
    bucket: ObjectStore, node_id: str, node: str, ttl_s: float, stop: threading.Event | None = None
) -> Lease:
    return Lease(bucket, LEASE, holder=node_id, label=f"node {node}", ttl_s=ttl_s, stop=stop)
