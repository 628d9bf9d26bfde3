"""What the platform tells about itself: values for CLI, API and pages, made of desired state and facts.

Owns the words and the JSON shapes. Pure, but for reading the state and facts it is given. Times are UTC milliseconds since 1970.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from minipaas.edge import Route
from minipaas.engine import Container
from minipaas.facts import Facts
from minipaas.model import Event, Machine, Release, Volume
from minipaas.protection import DatabaseState
from minipaas.state import DesiredApp
from minipaas.workload import container_name, runs


class MachineView(msgspec.Struct, frozen=True, kw_only=True):
    """state: starting, started, stopped or failed. words: why it is not well, '' when it is."""

    id: str
    release: int
    group: str
    node: str
    state: str
    address: str
    started_ms: int | None
    words: str


class VolumeView(msgspec.Struct, frozen=True, kw_only=True):
    """state: creating, created, restoring or pending_destroy. words: how far a restore is."""

    id: str
    app: str
    name: str
    node: str
    state: str
    directory: str
    created_ms: int
    purge_after_ms: int | None
    words: str
    databases: list[DatabaseView]


class DatabaseView(msgspec.Struct, frozen=True, kw_only=True):
    """words: protected (lag 0.2 s), catching up, or NOT PROTECTED with its reason.

    path: of a file; of a directory for a volume whose databases nobody knows yet, or any more.
    """

    volume: str
    app: str
    path: str
    words: str
    reason: str
    lag_s: float
    durable: str
    durable_ms: int | None
    size_bytes: int


class ReleaseView(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    status: str
    image: str
    image_digest: str
    created_ms: int
    message: str


class AppView(msgspec.Struct, frozen=True, kw_only=True):
    """state: deployed, deploying, suspended (crashed, waiting to be started again), failed, created or destroyed. release: that is live."""

    name: str
    state: str
    words: str
    release: int | None
    url: str
    hosts: list[str]
    created_ms: int
    destroyed_ms: int | None
    purge_after_ms: int | None
    machines: list[MachineView]
    volumes: list[VolumeView]
    last_release: ReleaseView | None


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """troubles: what does not work now, in words; durable: every database is protected."""

    id: str
    name: str
    region: str
    engine: str
    edge: str
    fleet: str
    bucket: str
    troubles: list[str]
    durable: bool
    databases: list[DatabaseView]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a live page shows."""

    node: NodeView
    apps: list[AppView]
    events: list[Event]


def machine_view(machine: Machine, container: Container | None, facts: Facts) -> MachineView:
    words = facts.words(machine.id)
    return MachineView(
        id=machine.id,
        release=machine.release,
        group=machine.group,
        node=machine.node,
        state=_machine_state(machine, container, facts),
        address=container.address if container else "",
        started_ms=container.started_ms if container else None,
        words=words,
    )


def _machine_state(machine: Machine, container: Container | None, facts: Facts) -> str:
    if container is not None and runs(container, machine):
        if container.id in facts.healthy():
            return "started"
        return "failed" if facts.words(machine.id) else "starting"
    if facts.words(machine.id):
        return "failed"
    return "starting" if machine.desired == "started" else "stopped"


def volume_view(volume: Volume, directory: str, databases: Sequence[DatabaseView], facts: Facts) -> VolumeView:
    return VolumeView(
        id=volume.id,
        app=volume.app,
        name=volume.name,
        node=volume.node,
        state="pending_destroy" if volume.destroyed_ms is not None else volume.state,
        directory=directory,
        created_ms=volume.created_ms,
        purge_after_ms=volume.purge_after_ms,
        words=facts.words(volume.id),
        databases=[each for each in databases if each.volume == volume.id],
    )


def database_view(database: DatabaseState, volumes: Mapping[str, Volume]) -> DatabaseView:
    volume = volumes.get(database.volume_id)
    return DatabaseView(
        volume=database.volume_id,
        app=volume.app if volume else "",
        path=_printable(str(database.path)),
        words=database.words,
        reason=database.reason,
        lag_s=database.lag_s,
        durable=f"{database.timeline}:{database.durable_txid}" if database.timeline else "",
        durable_ms=database.durable_ms,
        size_bytes=database.size_bytes,
    )


def _printable(text: str) -> str:
    """The bytes of a file's name need not be valid UTF-8."""
    return os.fsencode(text).decode(errors="backslashreplace")


def volume_at_risk(volume: Volume, directory: str, missing: str, facts: Facts) -> DatabaseView | None:
    """What stands for the databases of a volume while nobody knows of them; None for one that is watched.

    missing: why it is not in its directory.
    """
    if volume.destroyed_ms is not None or (volume.id in facts.watched() and not missing):
        return None
    trouble = facts.trouble(volume.app)
    bad = (f"the volume is missing: {missing}" if missing else "") or (trouble.words if trouble else "")
    restoring = facts.words(volume.id) or "the volume is being restored from the bucket"
    busy = restoring if volume.state == "restoring" else "the volume is not watched yet"
    return DatabaseView(
        volume=volume.id,
        app=volume.app,
        path=directory,
        words="NOT PROTECTED" if bad else "catching up",
        reason=bad or busy,
        lag_s=0.0,
        durable="",
        durable_ms=None,
        size_bytes=0,
    )


def release_view(release: Release) -> ReleaseView:
    return ReleaseView(
        number=release.number,
        status=release.status,
        image=release.image,
        image_digest=release.image_digest,
        created_ms=release.created_ms,
        message=release.message,
    )


def app_view(
    desired: DesiredApp,
    last: Release | None,
    hosts: Sequence[str],
    http_port: int,
    volumes: Sequence[VolumeView],
    route: Route | None,
    facts: Facts,
) -> AppView:
    machines = [machine_view(machine, facts.container(container_name(machine)), facts) for machine in desired.machines]
    trouble = facts.trouble(desired.app.name)
    state = _app_state(desired, last, machines)
    words = trouble.words if trouble else next((each.words for each in machines if each.words), "")
    if not words and route is not None and route.held:
        words = "requests wait for the swap"
    suffix = "" if http_port == 80 else f":{http_port}"
    return AppView(
        name=desired.app.name,
        state=state,
        words=words,
        release=desired.live.number if desired.live else None,
        url=f"http://{hosts[0]}{suffix}/" if hosts else "",
        hosts=list(hosts),
        created_ms=desired.app.created_ms,
        destroyed_ms=desired.app.destroyed_ms,
        purge_after_ms=desired.app.purge_after_ms,
        machines=machines,
        volumes=list(volumes),
        last_release=release_view(last) if last else None,
    )


def _app_state(desired: DesiredApp, last: Release | None, machines: Sequence[MachineView]) -> str:
    if desired.app.destroyed_ms is not None:
        return "destroyed"
    if desired.candidate is not None:
        return "deploying"
    if desired.live is None:
        return "failed" if last is not None else "created"
    return "deployed" if all(machine.state != "failed" for machine in machines) else "suspended"
