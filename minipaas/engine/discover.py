"""Which container engine this node uses: one that is named, one that answers, or our own Podman.

Owns the order of the search, and the file that remembers what was found. Never starts Docker, nor a Podman service other than the node's
own, and never goes from one engine to another by itself: that would start every app a second time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from minipaas.engine import Engine
from minipaas.engine.docker_api import DockerEngine
from minipaas.engine.podman_service import PodmanService, answers
from minipaas.errors import EngineError, EngineMissing, EngineUnavailable
from minipaas.settings import write_private

DOCKER_SOCKET = Path("/var/run/docker.sock")
PODMAN_SOCKET = Path("/run/podman/podman.sock")
_INSTALL = (
    "no container engine was found: install one, on Debian or Ubuntu with: apt install podman runc netavark nftables iptables "
    "(or Docker), then try again"
)


_OWN = "podman"
"""What is remembered for the node's own Podman; other engines have a URL."""


def connect(*, data_dir: Path, run_dir: Path, node: str, engine_url: str | None = None) -> Engine:
    """The engine of a node, ready to use.

    engine_url, if it is given; else the one that this node used last; else, in this order: DOCKER_HOST; the node's own Podman when it
    has run containers there before; a Docker socket that answers; a Podman socket that answers; our own Podman service.
    MINIPAAS_ENGINE (docker or podman) leaves out the other. What comes of it is remembered. node: the node's id.
    Raises EngineMissing, EngineUnavailable, EngineError.
    """
    memory = data_dir / "engine.choice"
    remembered = _read(memory)
    chosen = engine_url or remembered or _search(data_dir, run_dir)
    if not engine_url and remembered:
        _check_unchanged(remembered, memory)
    try:
        engine = _open(chosen, data_dir, run_dir, node)
    except EngineUnavailable as error:
        if engine_url or not remembered:
            raise
        raise EngineUnavailable(
            f"this node runs its apps on {remembered}, which is away: {error}; start it again; {_ways_out(memory)}"
        ) from error
    if chosen != remembered:
        data_dir.mkdir(parents=True, exist_ok=True)
        write_private(memory, chosen + "\n")
    return engine


def _read(memory: Path) -> str:
    return memory.read_text().strip() if memory.exists() else ""


def _ways_out(memory: Path) -> str:
    return f"to use another one, name it with `engine` in node.toml, or remove {memory} to have one searched for"


def _check_unchanged(remembered: str, memory: Path) -> None:
    """The environment does not move a node from one engine to another. Raises EngineError."""
    wanted, host = _wanted(os.environ), os.environ.get("DOCKER_HOST", "")
    contradicts = {
        "DOCKER_HOST": host not in ("", remembered),
        "MINIPAAS_ENGINE": (wanted, remembered) in (("docker", _OWN), ("podman", f"unix://{DOCKER_SOCKET}")),
    }
    for name in (name for name, is_so in contradicts.items() if is_so):
        raise EngineError(
            f"{name} is {os.environ[name]}, but this node runs its apps on {remembered}: unset it; {_ways_out(memory)}"
        )


def _search(data_dir: Path, run_dir: Path) -> str:
    """What there is, as a URL or _OWN."""
    if named := os.environ.get("DOCKER_HOST"):
        return named
    wanted = _wanted(os.environ)
    own = PodmanService(data_dir, run_dir)
    if not (own.has_storage and wanted != "docker"):
        for path in _sockets(wanted, os.environ):
            if answers(path):
                return f"unix://{path}"
    if wanted == "docker":
        raise EngineMissing(
            f"MINIPAAS_ENGINE is docker, but nothing answers at {DOCKER_SOCKET}: start Docker or unset it"
        )
    return _OWN


def _open(chosen: str, data_dir: Path, run_dir: Path, node: str) -> DockerEngine:
    scratch = data_dir / "scratch"
    if chosen != _OWN:
        return _not_rootless(DockerEngine(chosen, node=node, scratch=scratch))
    own = PodmanService(data_dir, run_dir)
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
