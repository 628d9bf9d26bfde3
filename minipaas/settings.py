"""Settings of one node: DATA/node.toml, DATA/credentials, and every time-out and limit of the platform.

Owns the names of files below the data directory and how they are read and written. Never talks to anything.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from minipaas.errors import BadRequest, NotFound
from minipaas.model import check_domain
from replicator import write_file

DEFAULT_DATA_DIR = Path("/var/lib/minipaas")
DEFAULT_RUN_DIR = Path("/run/minipaas")
LOCK = "serve.lock"
LOST = "lost"
RECOVERING = "recovering.json"
LEASE_TTL_S = 60.0
EVERY_HOST = frozenset({"0.0.0.0", "::"})
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True)
class Limits:
    """Every time-out and bound in one place; names carry the unit."""

    sweep_s: float = 10.0
    hold_s: float = 60.0
    drain_s: float = 10.0
    swap_sync_s: float = 10.0
    healthy_within_s: float = 45.0
    health_poll_s: float = 0.1
    deploy_wait_s: float = 300.0
    turn_wait_s: float = 1800.0
    restart_wait_s: float = 50.0
    stop_sync_s: float = 10.0
    stop_workers_s: float = 5.0
    max_backoff_s: float = 60.0
    steady_after_s: float = 300.0
    keep_destroyed_s: float = 7 * 86400.0
    upload_bytes: int = 4 << 30
    unpacked_bytes: int = 8 << 30
    unpacked_files: int = 200_000
    upload_keep_s: float = 3600.0
    connections: int = 512
    request_within_s: float = 15.0
    body_silence_s: float = 60.0
    followers: int = 8
    changes: int = 8
    waiting_changes: int = 3
    api_threads: int = 32
    log_tail: int = 10
    engine_images: int = 3
    low_disk_bytes: int = 64 << 20


@dataclass(frozen=True)
class Credentials:
    """Of the bucket. Neither half prints."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What node.toml says. bucket: a store URL without credentials. http_listen, api_listen: HOST:PORT.

    engine: URL of a container engine's API, '' to find one. domain: apps answer to <app>.<domain>.
    sync_interval_s: the least time between two shipments of one busy database. lease_ttl_s: a node that was silent for so long
    may be taken over; a third of it is the time between two requests that say that it is alive.
    """

    data_dir: Path
    run_dir: Path = DEFAULT_RUN_DIR
    node_id: str
    node: str
    region: str
    bucket: str
    http_listen: str = "0.0.0.0:80"
    api_listen: str = "127.0.0.1:7070"
    domain: str = "localhost"
    engine: str = ""
    sync_interval_s: float = 1.0
    lease_ttl_s: float = LEASE_TTL_S

    @property
    def state_path(self) -> Path:
        return self.data_dir / "state.db"

    @property
    def key_path(self) -> Path:
        return self.data_dir / "node.key"

    @property
    def volumes_dir(self) -> Path:
        return self.data_dir / "volumes"

    @property
    def uploads_dir(self) -> Path:
        return self.data_dir / "uploads"

    @property
    def lock_path(self) -> Path:
        return self.data_dir / LOCK

    @property
    def lost_path(self) -> Path:
        """There once another node has taken this one's fleet; says so."""
        return self.data_dir / LOST

    def volume_dir(self, app: str, name: str) -> Path:
        return self.volumes_dir / app / name


def settings_path(data_dir: Path) -> Path:
    return data_dir / "node.toml"


def credentials_path(data_dir: Path) -> Path:
    return data_dir / "credentials"


def read_settings(data_dir: Path) -> Settings:
    """Raises NotFound when there is no node.toml, which is written last; BadRequest when it is wrong."""
    path = settings_path(data_dir)
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if (data_dir / RECOVERING).exists():
            raise NotFound(f"{data_dir} is half recovered; give the same minipaas recover again, it goes on") from None
        raise NotFound(f"{data_dir} is not the data directory of a node; make it one with: minipaas setup") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: {error}") from error
    try:
        settings = msgspec.convert({**values, "data_dir": str(data_dir)}, Settings, dec_hook=_to_path)
        check_listens(http_listen=settings.http_listen, api_listen=settings.api_listen)
        check_domain(settings.domain)
    except (msgspec.ValidationError, BadRequest) as error:
        raise BadRequest(f"{path}: {error}") from error
    return settings


def write_settings(settings: Settings) -> None:
    values = msgspec.to_builtins(settings, enc_hook=str)
    del values["data_dir"]
    lines = ["# Written by minipaas setup. Restart minipaas serve after a change."]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    write_private(settings_path(settings.data_dir), "\n".join(lines) + "\n")


def _to_path(kind: type, value: object) -> Path:
    """Paths are text in the file."""
    if kind is not Path or not isinstance(value, str):
        raise TypeError(f"expected a path, got {value!r}")
    return Path(value)


def read_credentials(data_dir: Path, environ: Mapping[str, str]) -> Credentials | None:
    """From MINIPAAS_ACCESS_KEY and MINIPAAS_SECRET_KEY, else AWS_…, else DATA/credentials; None when nowhere.

    None with temporary keys in AWS_… as well: those are for boto3, and not worth being kept. Raises BadRequest when only half of
    a pair is there.
    """
    for access_name, secret_name in (
        ("MINIPAAS_ACCESS_KEY", "MINIPAAS_SECRET_KEY"),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ):
        access, secret = environ.get(access_name), environ.get(secret_name)
        if access and secret:
            temporary = access_name.startswith("AWS_") and environ.get("AWS_SESSION_TOKEN")
            return None if temporary else Credentials(access, secret)
        if access or secret:
            raise BadRequest(f"of {access_name} and {secret_name} only one is set; set both, or neither")
    path = credentials_path(data_dir)
    try:
        values = tomllib.loads(path.read_text())
        return Credentials(values["access_key"], values["secret_key"])
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise BadRequest(f"{path}: expected access_key and secret_key, as minipaas setup writes them") from error


def write_credentials(data_dir: Path, credentials: Credentials) -> None:
    text = f"access_key = {json.dumps(credentials.access_key)}\nsecret_key = {json.dumps(credentials.secret_key)}\n"
    write_private(credentials_path(data_dir), text)


def write_private(path: Path, text: str) -> None:
    """Durably, as a whole, and with mode 0600 from the first byte. Any number may write the same file at once: the last one counts."""
    write_file(path, text.encode())


def listen_address(text: str, what: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[V6]:PORT``. Raises BadRequest."""
    host, _, port = text.rpartition(":")
    if not _HOST.fullmatch(host) or not (port.isascii() and port.isdecimal()):
        raise BadRequest(f"{what} {text!r} is not an address; write HOST:PORT, such as 127.0.0.1:7070")
    if len(port) > 5 or int(port) > 65535:
        raise BadRequest(f"{what} {text!r}: there is no port {port}; choose one from 1 to 65535")
    return host.strip("[]"), int(port)


def check_listens(**listens: str) -> None:
    """By name: addresses, no two of which are the same port of this host. Raises BadRequest."""
    known: list[tuple[str, str, int]] = []
    for what, text in listens.items():
        host, port = listen_address(text, what)
        for other, other_host, other_port in known:
            if port == other_port != 0 and (host == other_host or {host, other_host} & EVERY_HOST):
                raise BadRequest(
                    f"{other} and {what} are the same port, {port}, of this host; choose another for one of them"
                )
        known.append((what, host, port))
