"""Which container engine this node uses: one that is named, one that answers, or our own Podman.

Owns the order of the search. Never starts Docker, nor a Podman service other than the node's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from minipaas.engine import Engine
from minipaas.engine.docker_api import DockerEngine
from minipaas.engine.podman_service import PodmanService, answers
from minipaas.errors import EngineError, EngineMissing

DOCKER_SOCKET = Path("/var/run/docker.sock")
PODMAN_SOCKET = Path("/run/podman/podman.sock")
_INSTALL = (
    "no container engine was found: install one, on Debian or Ubuntu with: apt install podman runc netavark nftables iptables "
    "(or Docker), then try again"
)


def connect(*, data_dir: Path, run_dir: Path, node: str, engine_url: str | None = None) -> Engine:
    """The engine of a node, ready to use.

    In this order: ``engine_url`` or DOCKER_HOST; the node's own Podman when it has run containers there before; a Docker
    socket that answers; a Podman socket that answers; our own Podman service. MINIPAAS_ENGINE (docker or podman) leaves
    out the other. node: the node's id. Raises EngineMissing, EngineUnavailable, EngineError.
    """
    scratch = data_dir / "scratch"
    named = engine_url or os.environ.get("DOCKER_HOST")
    if named:
        return _not_rootless(DockerEngine(named, node=node, scratch=scratch))
    wanted = _wanted(os.environ)
    own = PodmanService(data_dir, run_dir)
    if not (own.has_storage and wanted != "docker"):
        for path in _sockets(wanted, os.environ):
            if answers(path):
                return _not_rootless(DockerEngine(f"unix://{path}", node=node, scratch=scratch))
    if wanted == "docker":
        raise EngineMissing(
            f"MINIPAAS_ENGINE is docker, but nothing answers at {DOCKER_SOCKET}: start Docker or unset it"
        )
    if not own.is_installed:
        raise EngineMissing(_INSTALL)
    own.start()
    return DockerEngine(own.url, node=node, scratch=scratch, revive=own.start)


def _wanted(environment: Mapping[str, str]) -> str:
    wanted = environment.get("MINIPAAS_ENGINE", "")
    if wanted not in ("", "docker", "podman"):
        raise EngineError(f"MINIPAAS_ENGINE is {wanted!r}; it can be docker or podman")
    return wanted


def _sockets(wanted: str, environment: Mapping[str, str]) -> Iterator[Path]:
    if wanted != "podman":
        yield DOCKER_SOCKET
    if wanted != "docker":
        yield PODMAN_SOCKET
        if runtime_dir := environment.get("XDG_RUNTIME_DIR"):
            yield Path(runtime_dir) / "podman" / "podman.sock"


def _not_rootless(engine: DockerEngine) -> DockerEngine:
    if engine.is_rootless:
        where = engine.describe()
        engine.close()
        raise EngineError(
            f"{where} is rootless, and its containers cannot be reached from the host; use one that runs as root"
        )
    return engine
