"""Docker and Podman over the Docker Engine API: the real containers and images.

The only package that imports ``docker``. Owns the translation of specs, answers and failures; touches only containers with this node's
label ``minipaas.node``, and never decides what should run.
Source: docs.docker.com/reference/api/engine/version/v1.41; Podman 4.3 and later serve the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minipaas.engine.docker_api.connection import Connection, translated
from minipaas.engine.docker_api.containers import DockerContainers
from minipaas.engine.docker_api.images import DockerImages


class DockerEngine:
    """The protocol Engine.

    url: unix:///…, tcp://… or ssh://…. node: the node's id, the value of the label on all it makes. scratch: a folder for big
    temporary files. revive: starts the engine again, when it is ours to start. Raises EngineUnavailable.
    """

    def __init__(self, url: str, *, node: str, scratch: Path, revive: Callable[[], None] | None = None) -> None:
        self._connection = Connection(url)
        self._containers = DockerContainers(self._connection, node, revive)
        self._images = DockerImages(self._connection, node, scratch)

    @property
    def containers(self) -> DockerContainers:
        return self._containers

    @property
    def images(self) -> DockerImages:
        return self._images

    @property
    def is_rootless(self) -> bool:
        """Containers of a rootless engine have addresses that the host cannot reach."""
        with translated("ask the container engine what it is"):
            info = self._connection.api.info()
        return bool(info.get("Rootless")) or "name=rootless" in (info.get("SecurityOptions") or ())

    def describe(self) -> str:
        kind = "Podman" if self._connection.is_podman else "Docker"
        return f"{kind} {self._connection.version.get('Version', '?')} at {self._connection.url}"

    def close(self) -> None:
        self._connection.api.close()
