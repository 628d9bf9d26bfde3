"""What one release runs, in the platform's own terms: the step from a manifest to a container. Pure.

Owns labels and names of containers, the environment of apps and host names. Never asks an engine, a clock or a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minipaas.engine import Container, ContainerSpec, Mount
from minipaas.errors import BadRequest
from minipaas.health import Probe
from minipaas.manifest import Check, Manifest
from minipaas.model import Machine, Node, Release, Volume

LABEL_NODE = "minipaas.node"
LABEL_APP = "minipaas.app"
LABEL_RELEASE = "minipaas.release"
LABEL_MACHINE = "minipaas.machine"
LABEL_RESTARTS = "minipaas.restarts"
LABEL_VOLUMES = "minipaas.volume"

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_OURS = ("FLY_", "MINIPAAS_")
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(frozen=True)
class Workload:
    """A release that can be run. port: None when it serves nothing. mounts: (volume name, directory in the container).

    probes: all must pass before requests come; empty when it serves nothing and has no check.
    wait_s: how long it may take to become healthy, None for the usual time.
    """

    app: str
    release: int
    image: str
    image_digest: str
    port: int | None
    hosts: tuple[str, ...]
    mounts: tuple[tuple[str, str], ...] = ()
    probes: tuple[Probe, ...] = ()
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    primary_region: str = ""
    stop_signal: str = "SIGINT"
    stop_timeout_s: int = 5
    wait_s: float | None = None
    created_ms: int = 0


def workload_of(release: Release, domain: str) -> Workload:
    """Raises ManifestError when the configuration was written by a release of minipaas that this one does not understand."""
    manifest = Manifest.from_json(release.config)
    return Workload(
        app=release.app,
        release=release.number,
        image=release.image,
        image_digest=release.image_digest,
        port=manifest.http_service.internal_port if manifest.http_service else None,
        hosts=(default_host(release.app, domain),),
        mounts=tuple((mount.source, mount.destination) for mount in manifest.mounts),
        probes=_probes(manifest),
        env=tuple(sorted(manifest.env.items())),
        primary_region=manifest.primary_region or "",
        stop_signal=manifest.kill_signal,
        stop_timeout_s=math.ceil(manifest.kill_timeout_s),
        wait_s=manifest.deploy.wait_timeout_s,
        created_ms=release.created_ms,
    )


def _probes(manifest: Manifest) -> tuple[Probe, ...]:
    """Of the checks that were asked for; without any, a connection to the port."""
    service = manifest.http_service
    checks = (*(service.checks if service else ()), *manifest.checks)
    if checks:
        return tuple(_probe(check) for check in checks)
    return (Probe("tcp", service.internal_port),) if service else ()


def _probe(check: Check) -> Probe:
    return Probe(
        kind=check.type,
        port=check.port,
        path=check.path,
        method=check.method,
        timeout_s=check.timeout_s,
        grace_s=check.grace_period_s,
        headers=tuple(sorted(check.headers.items())),
    )


def default_host(app: str, domain: str) -> str:
    return f"{app}.{domain}"


def check_variable(name: str) -> str:
    """The name itself, if a user may set it. Raises BadRequest."""
    if not _VARIABLE.fullmatch(name):
        raise BadRequest(f"{name!r} is not a name for a variable: use letters, digits and _, not starting with a digit")
    if name.startswith(_OURS):
        raise BadRequest(f"{name} begins with {' or '.join(_OURS)}, which minipaas sets itself; choose another name")
    return name


def container_name(machine: Machine) -> str:
    return f"minipaas-{machine.app}-{machine.id}"


def volume_ids(container: Container) -> frozenset[str]:
    return frozenset(filter(None, container.labels.get(LABEL_VOLUMES, "").split(",")))


def runs(container: Container, machine: Machine) -> bool:
    """It is the running container of the machine, made since the last restart that was asked for."""
    return (
        container.state == "running"
        and container.labels.get(LABEL_MACHINE) == machine.id
        and container.labels.get(LABEL_RESTARTS) == str(machine.restarts)
    )


def environment(workload: Workload, machine: Machine, node: Node, secrets: Mapping[str, str]) -> dict[str, str]:
    """Variables of a machine: [env], then secrets, then ours; the later wins."""
    ours = {
        "FLY_APP_NAME": workload.app,
        "FLY_REGION": node.region,
        "FLY_MACHINE_ID": machine.id,
        "FLY_ALLOC_ID": machine.id,
        "FLY_MACHINE_VERSION": _version(workload),
        "FLY_IMAGE_REF": f"{workload.image}@{workload.image_digest}",
        "FLY_PROCESS_GROUP": machine.group,
        "PRIMARY_REGION": workload.primary_region or node.region,
        "MINIPAAS_APP": workload.app,
        "MINIPAAS_RELEASE": f"v{workload.release}",
        "MINIPAAS_REGION": node.region,
        "MINIPAAS_NODE": node.name,
        "MINIPAAS_MACHINE": machine.id,
    }
    if workload.port is not None:
        ours["PORT"] = str(workload.port)
    for name, destination in workload.mounts:
        ours[f"MINIPAAS_VOLUME_{re.sub('[^A-Z0-9]', '_', name.upper())}"] = destination
    return {**dict(workload.env), **secrets, **ours}


def container_spec(
    workload: Workload,
    machine: Machine,
    node: Node,
    volumes: Sequence[Volume],
    directories: Mapping[str, Path],
    secrets: Mapping[str, str],
) -> ContainerSpec:
    """directories: of the volumes, by volume id."""
    by_name = {volume.name: volume for volume in volumes}
    return ContainerSpec(
        name=container_name(machine),
        image=workload.image,
        env=environment(workload, machine, node, secrets),
        labels={
            LABEL_NODE: node.id,
            LABEL_APP: workload.app,
            LABEL_RELEASE: str(workload.release),
            LABEL_MACHINE: machine.id,
            LABEL_RESTARTS: str(machine.restarts),
            LABEL_VOLUMES: ",".join(sorted(volume.id for volume in volumes)),
        },
        mounts=tuple(Mount(directories[by_name[name].id], destination) for name, destination in workload.mounts),
        stop_signal=workload.stop_signal,
        stop_timeout_s=workload.stop_timeout_s,
    )


def _version(workload: Workload) -> str:
    """A ULID, as fly's: 48 bits of time, then 80 that are the same for the same release."""
    seed = int.from_bytes(f"{workload.app:>64}"[-64:].encode(), "big") * 1_000_003 + workload.release
    value = (workload.created_ms << 80) | (seed % (1 << 80))
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5))
