"""Container engines: the two protocols that the platform needs of one, and the values they exchange.

Owns the interface. Adapters: ``docker_api`` (the only package that imports ``docker``; for Docker and Podman), ``fake``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Mount:
    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class ContainerSpec:
    """What to run. command: replaces the image's CMD; ENTRYPOINT stays. memory_mb, cpus: None for no limit."""

    name: str
    image: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    command: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    memory_mb: int | None = None
    cpus: float | None = None
    stop_signal: str = "SIGINT"
    stop_timeout_s: int = 5


@dataclass(frozen=True)
class Container:
    """What there is. state: created, running, exited. address: its IP address on the platform's network, '' when not running."""

    id: str
    name: str
    image: str
    labels: Mapping[str, str]
    state: str
    address: str = ""
    exit_code: int | None = None
    oom_killed: bool = False
    started_ms: int | None = None


@dataclass(frozen=True)
class LogLine:
    """stream: stdout or stderr. at_ms: when the engine received it, UTC milliseconds since 1970."""

    at_ms: int
    stream: str
    text: str


def nobody_leaves() -> bool:
    """For those who read a log to its end."""
    return False


class Containers(Protocol):
    """Containers of this platform; others on the same engine are never seen nor touched (label ``minipaas.node``)."""

    def list(self) -> Sequence[Container]: ...

    def run(self, spec: ContainerSpec) -> Container:
        """Create and start. Raises ImageMissing, EngineError. A container of the same name that is not running is replaced."""
        ...

    def stop(self, name: str) -> None:
        """Send its stop signal, wait its stop time-out, kill. No error when it is gone or stopped already."""
        ...

    def remove(self, name: str) -> None:
        """Kill and remove. No error when it is gone."""
        ...

    def logs(
        self, name: str, *, tail: int | None = None, follow: bool = False, gone: Callable[[], bool] = nobody_leaves
    ) -> Iterator[LogLine]:
        """follow: goes on until the container ends, or ``gone()``, which is noticed within two seconds though nothing is printed."""
        ...

    def exec(self, name: str, command: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        """Exit code and combined output of a command run inside."""
        ...


class Images(Protocol):
    def exists(self, reference: str) -> bool: ...

    def build(
        self,
        context: Path,
        *,
        tag: str,
        containerfile: str,
        args: Mapping[str, str],
        target: str | None,
        on_line: Callable[[str], None],
    ) -> str:
        """Build the directory ``context``; the engine's image id. Raises BuildFailed with the last lines."""
        ...

    def pull(self, reference: str, *, tag: str, on_line: Callable[[str], None]) -> str:
        """From its registry; when that cannot be asked, the image of this name that the engine has. Raises ImageMissing."""
        ...

    def load(self, archive: Path, *, tag: str) -> str:
        """Load a tarball: docker-archive or OCI layout, plain, gzip or zstd. Raises ImageRefused with the reason."""
        ...

    def save(self, reference: str) -> Iterator[bytes]:
        """The image as a docker-archive tar stream with uncompressed layers."""
        ...

    def remove(self, reference: str) -> None: ...


class Engine(Protocol):
    @property
    def containers(self) -> Containers: ...

    @property
    def images(self) -> Images: ...

    def describe(self) -> str:
        """One line for people: which engine, version, where it listens."""
        ...

    def close(self) -> None: ...
