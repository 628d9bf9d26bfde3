"""An empty machine and the bucket -> the whole platform.

Owns the order of recovery and its refusals. It restores the state database and gives everything in it to this node; then the reconciler of
``minipaas serve`` does the rest, volume by volume and app by app, as it does every day. It can be interrupted anywhere and run again.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from minipaas import access, backups, sealing
from minipaas.data_directory import data_lock
from minipaas.errors import FleetHeld, NodeNotEmpty, WrongRecoveryKey
from minipaas.fleet import FleetRecord, fleet_lease, read_fleet
from minipaas.model import Node, check_domain, check_name
from minipaas.sealing import Identity
from minipaas.settings import (
    LEASE_TTL_S,
    LOCK,
    LOST,
    RECOVERING,
    Credentials,
    Settings,
    check_listens,
    settings_path,
    write_credentials,
    write_private,
    write_settings,
)
from minipaas.state import State
from replicator import LeaseHeld, ObjectStore, fsync_dir

log = logging.getLogger(__name__)


class Marker(msgspec.Struct, frozen=True):
    """Says that a data directory is half recovered, of which fleet, and as which node: so that it can go on."""

    fleet: str
    node_id: str


@dataclass(frozen=True)
class Recovery:
    """What the owner asks for. bucket: URL without credentials. take_over: do not wait to see whether the old node is alive."""

    data_dir: Path
    run_dir: Path
    bucket: str
    node: str
    region: str
    http_listen: str
    api_listen: str
    recovery_key: str = field(repr=False)
    credentials: Credentials | None = field(repr=False)
    engine: str = ""
    domain: str = ""
    take_over: bool = False


def recover(request: Recovery, say: Callable[[str], None], *, now_ms: Callable[[], int]) -> Settings:
    """Make this machine a node of the fleet that the bucket holds, with all that was on the lost one; ``serve`` it then.

    Raises before anything is written: NotFound (no fleet in the bucket), WrongRecoveryKey, NodeNotEmpty, FleetHeld (a node that is
    alive holds the bucket), AlreadyRunning (another recovery of this directory). Raises later what a store or a disk does; run it
    again then.
    """
    check_name(request.node, "a node")
    check_name(request.region, "a region")
    if request.domain:
        check_domain(request.domain)
    check_listens(http_listen=request.http_listen, api_listen=request.api_listen)
    fleet = _find_fleet(request, say)
    bucket = backups.open_bucket(request.bucket, request.credentials)
    owner = _check_key(request.recovery_key, fleet)
    marker = _check_directory(request.data_dir, fleet)
    _take(bucket, marker.node_id, request, say)
    settings = _settings(request, marker, fleet)
    _make_directory(request.data_dir)
    with data_lock(settings):
        _check_directory(request.data_dir, fleet)  # another recovery may have ended meanwhile
        node = _begin(request, marker)
        backups.restore_state(bucket, settings, say)
        _adopt(settings, owner, node, request, say, now_ms)
        write_settings(settings)  # last: from here on it is a node
        _remove_marker(request.data_dir)
    return settings


def _find_fleet(request: Recovery, say: Callable[[str], None]) -> FleetRecord:
    bucket = backups.open_bucket(request.bucket, request.credentials, backups.PROBE_PATIENCE_S)
    say(f"reaching {bucket.url}")
    with backups.reaching(bucket, keys_given=request.credentials is not None):
        return read_fleet(bucket)


def _check_key(recovery_key: str, fleet: FleetRecord) -> Identity:
    owner = Identity.parse(recovery_key)
    if owner.recipient != fleet.recovery_recipient:
        raise WrongRecoveryKey(
            f"this recovery key is not that of the fleet in the bucket, which is {fleet.recovery_recipient}; nothing was changed"
        )
    return owner


def _check_directory(data_dir: Path, fleet: FleetRecord) -> Marker:
    """The marker of an interrupted recovery, or a new one for an empty directory."""
    if (data_dir / LOST).exists():
        raise NodeNotEmpty(
            f"{data_dir} holds what a node that lost its fleet had not shipped; keep it, and name another --data"
        )
    if settings_path(data_dir).exists():
        _remove_marker(data_dir)  # a power cut can have brought it back
        raise NodeNotEmpty(
            f"{data_dir} is the directory of a node already; go on with: minipaas serve --data {data_dir}"
        )
    marker = _read_marker(data_dir / RECOVERING)
    if marker is None:
        if data_dir.exists() and any(each.name != LOCK for each in data_dir.iterdir()):
            raise NodeNotEmpty(f"{data_dir} is not empty; recovery never overwrites: empty it, or name another --data")
        return Marker(fleet.id, secrets.token_hex(8))
    if marker.fleet != fleet.id:
        raise NodeNotEmpty(f"{data_dir} holds a half-done recovery of another fleet; empty it, or name another --data")
    return marker


def _read_marker(path: Path) -> Marker | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Marker)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise NodeNotEmpty(f"{path} is damaged; empty {path.parent} and recover again") from error


def _remove_marker(data_dir: Path) -> None:
    (data_dir / RECOVERING).unlink(missing_ok=True)
    fsync_dir(data_dir)


def _take(bucket: ObjectStore, node_id: str, request: Recovery, say: Callable[[str], None]) -> None:
    lease = fleet_lease(bucket, node_id, request.node, LEASE_TTL_S)
    try:
        lease.acquire(
            take_over=request.take_over,
            on_wait=lambda held: say(
                f"{held.label} holds the bucket; watching for {held.ttl_s:.0f} s whether it is alive (--takeover if you know it is gone)"
            ),
        )
    except LeaseHeld as held:
        raise FleetHeld(f"{held}; stop it first, or say --takeover if you know that it is gone") from held


def _make_directory(data_dir: Path) -> None:
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    data_dir.chmod(0o700)


def _begin(request: Recovery, marker: Marker) -> Identity:
    """The first things that are written, and this node's own key."""
    _forget_half_done(request.data_dir)
    write_private(request.data_dir / RECOVERING, msgspec.json.encode(marker).decode())
    if request.credentials is not None:
        write_credentials(request.data_dir, request.credentials)
    key_path = request.data_dir / "node.key"
    return sealing.read_node_identity(key_path) if key_path.exists() else sealing.create_node_identity(key_path)


def _forget_half_done(data_dir: Path) -> None:
    """The state that an interrupted try restored may be old by now; it is restored again."""
    for file in data_dir.glob("state.db*"):
        file.unlink()
    shutil.rmtree(data_dir / "replicator" / "state", ignore_errors=True)


def _settings(request: Recovery, marker: Marker, fleet: FleetRecord) -> Settings:
    return Settings(
        data_dir=request.data_dir,
        run_dir=request.run_dir,
        node_id=marker.node_id,
        node=request.node,
        region=request.region,
        bucket=request.bucket,
        http_listen=request.http_listen,
        api_listen=request.api_listen,
        domain=request.domain or fleet.domain,
        engine=request.engine,
        sync_interval_s=fleet.sync_interval_s,
    )


def _adopt(
    settings: Settings,
    owner: Identity,
    identity: Identity,
    request: Recovery,
    say: Callable[[str], None],
    now_ms: Callable[[], int],
) -> None:
    """Give all that the lost nodes had to this one, and open its secrets to this node's key. Again and again, if need be."""
    state = State(settings.state_path, now_ms)
    try:
        node = Node(
            id=settings.node_id,
            name=settings.node,
            region=settings.region,
            recipient=identity.recipient,
            joined_ms=now_ms(),
        )
        lost = [other for other in state.nodes() if other.id != node.id]
        sealer = sealing.Sealer(identity, owner.recipient)
        if lost:
            count = state.reseal(lambda sealed: sealer.seal(sealing.unseal(sealed, owner)))
            for other in lost:
                state.move_everything(other.id, node)
                say(f"what node {other.name} ({other.region}) had belongs to {node.name} ({node.region}) now")
            say(f"{count} secrets opened with the recovery key and sealed to this node")
        state.put_node(node)
        access.issue_local_token(state, settings.data_dir, now_ms(), node.name)
    finally:
        state.close()
    _remove_leftovers(settings.data_dir)


def _remove_leftovers(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "uploads", ignore_errors=True)
