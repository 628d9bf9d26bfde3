"""``minipaas setup``: an empty directory and a bucket become the first node of a new fleet.

Owns the order of it: everything is checked before anything is written, and the bucket's record of the fleet comes last. Shows the
recovery key once; its private half is stored nowhere.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from minipaas import backups
from minipaas.access import issue_local_token
from minipaas.errors import BadRequest, Conflict, NodeNotEmpty, NotFound
from minipaas.fleet import read_fleet, record_of, write_fleet
from minipaas.model import Fleet, Node, check_domain, check_name
from minipaas.sealing import Identity, create_node_identity
from minipaas.settings import Credentials, Settings, check_listens, write_credentials, write_settings
from minipaas.state import State
from replicator import ObjectStore, PreconditionFailed


@dataclass(frozen=True)
class SetupRequest:
    """What the owner asks for. bucket: URL without credentials. credentials: None when they come from the environment of serve."""

    data_dir: Path
    run_dir: Path
    bucket: str
    node: str
    region: str
    http_listen: str = "0.0.0.0:80"
    api_listen: str = "127.0.0.1:7070"
    domain: str = "localhost"
    engine: str = ""
    sync_interval_s: float = 1.0
    credentials: Credentials | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SetupResult:
    """recovery_key: to be shown once and kept by the owner; it alone opens the secrets in the bucket. token: of the owner."""

    settings: Settings
    fleet: str
    recovery_key: str = field(repr=False)
    token: str = field(repr=False)


def _silent(sentence: str) -> None:
    """For callers who only want the outcome."""


def setup(request: SetupRequest, bucket: ObjectStore, now_ms: int, say: Callable[[str], None] = _silent) -> SetupResult:
    """say: is told what goes on, and what is unwise.

    Raises BadRequest, NodeNotEmpty, Conflict (the bucket holds a fleet), Unavailable; nothing is left behind then.
    """
    check_name(request.node, "a node")
    check_name(request.region, "a region")
    check_domain(request.domain)
    check_listens(http_listen=request.http_listen, api_listen=request.api_listen)
    _check_empty(request.data_dir)
    if warning := disk_warning(request.bucket, request.data_dir):
        say(f"Warning: {warning}")
    say(f"reaching {bucket.url}")
    with backups.reaching(bucket, keys_given=request.credentials is not None):
        _check_bucket(bucket)
        return _write(request, bucket, now_ms)


def disk_warning(bucket: str, data_dir: Path) -> str:
    """Words for a bucket that would be lost together with the node, '' for any other. Raises BadRequest for one within the node."""
    parts = urlsplit(bucket)
    if parts.scheme != "file":
        return ""
    folder = Path(unquote(parts.path)).resolve()
    if folder.is_relative_to(data_dir.resolve()):
        raise BadRequest(
            f"{bucket} is within {data_dir}, which it is to protect; name a folder on another disk, or a bucket"
        )
    if _disk_of(folder) != _disk_of(data_dir.resolve()):
        return ""
    return f"{bucket} is on the disk of {data_dir}: who loses that disk loses both, and nothing brings it back"


def _disk_of(path: Path) -> int:
    return next(each for each in (path, *path.parents) if each.exists()).stat().st_dev


def _check_empty(data_dir: Path) -> None:
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise NodeNotEmpty(
            f"{data_dir} is not an empty directory; name another, or empty it if nothing in it is needed"
        )


def _check_bucket(bucket: ObjectStore) -> None:
    """It can be written, read and deleted, honours conditions, and holds no fleet."""
    try:
        read_fleet(bucket)
    except NotFound:
        pass
    else:
        raise Conflict(
            f"{bucket.url} holds a fleet already; bring it back with: minipaas recover, or use another prefix"
        )
    key, body = f"probe/{secrets.token_hex(8)}", secrets.token_bytes(32)
    first = bucket.put(key, body, if_none_match=True)
    try:
        if bucket.get(key) != body:
            raise BadRequest(f"{bucket.url} gives back other bytes than were written; it cannot keep data safe")
        _check_conditions(bucket, key, first.etag)
    finally:
        bucket.delete([key])


def _check_conditions(bucket: ObjectStore, key: str, etag: str) -> None:
    """As timelines and the lease rely on them. key, etag: of an object that is there."""
    _check_refused(lambda: bucket.put(key, b"other", if_none_match=True), bucket, "If-None-Match")
    try:
        bucket.put(key, secrets.token_bytes(32), if_match=etag)
    except PreconditionFailed:
        raise BadRequest(
            f"{bucket.url} refuses an If-Match that holds, so no node could keep its lease there"
        ) from None
    _check_refused(lambda: bucket.put(key, b"other", if_match=etag), bucket, "If-Match")


def _check_refused(put: Callable[[], object], bucket: ObjectStore, condition: str) -> None:
    try:
        put()
    except PreconditionFailed:
        return
    raise BadRequest(
        f"{bucket.url} ignores {condition}, so two nodes could overwrite each other there; use a store that has conditional writes"
    )


def _write(request: SetupRequest, bucket: ObjectStore, now_ms: int) -> SetupResult:
    was_there = request.data_dir.exists()
    request.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    request.data_dir.chmod(0o700)
    try:
        return _write_node(request, bucket, now_ms)
    except BaseException:
        for path in request.data_dir.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        if not was_there:
            request.data_dir.rmdir()
        raise


def _write_node(request: SetupRequest, bucket: ObjectStore, now_ms: int) -> SetupResult:
    owner = Identity.generate()
    settings = _settings(request)
    fleet = Fleet(id=secrets.token_hex(16), recovery_recipient=owner.recipient)
    node = create_node_identity(settings.key_path)
    if request.credentials is not None:
        write_credentials(settings.data_dir, request.credentials)
    token = _write_state(settings, fleet, node, now_ms)
    write_fleet(
        bucket,
        record_of(fleet, settings),
    )
    write_settings(settings)  # last: without it nothing serves, so that a setup that was killed is seen as one
    return SetupResult(settings, fleet.id, owner.secret, token)


def _settings(request: SetupRequest) -> Settings:
    return Settings(
        data_dir=request.data_dir,
        run_dir=request.run_dir,
        node_id=secrets.token_hex(8),
        node=request.node,
        region=request.region,
        bucket=request.bucket,
        http_listen=request.http_listen,
        api_listen=request.api_listen,
        domain=request.domain,
        engine=request.engine,
        sync_interval_s=request.sync_interval_s,
    )


def _write_state(settings: Settings, fleet: Fleet, node: Identity, now_ms: int) -> str:
    """The owner's token."""
    state = State(settings.state_path, lambda: now_ms)
    try:
        state.set_fleet(fleet)
        state.put_node(
            Node(
                id=settings.node_id,
                name=settings.node,
                region=settings.region,
                recipient=node.recipient,
                joined_ms=now_ms,
            )
        )
        return issue_local_token(state, settings.data_dir, now_ms, settings.node)
    finally:
        state.close()
