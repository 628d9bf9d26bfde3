"""One node of real parts: Podman runs the apps, Caddy routes to them, the whole of ``serve`` in between."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
from platform_support import OWNER, FakeBackups, until

from minipaas.edge.caddy import CaddyEdge
from minipaas.engine.archive import machine_architecture
from minipaas.engine.fake import FakeEngine, FakeImage
from minipaas.engine.podman_service import PodmanService
from minipaas.errors import DeployFailed
from minipaas.serve import Server, Wiring
from minipaas.service import DeployRequest
from minipaas.settings import Limits, Settings
from minipaas.setup import SetupRequest, setup
from minipaas.sources import Source
from replicator.store.memory import MemoryStore

pytestmark = [pytest.mark.real, pytest.mark.slow]

MANIFEST = """
app = "hello"
kill_signal = "SIGKILL"
[env]
GREETING = "hello"
[http_service]
internal_port = 8080
[[http_service.checks]]
path = "/index.html"
[[mounts]]
source = "data"
destination = "/data"
"""
SERVE = 'echo "$GREETING $MINIPAAS_RELEASE" > /data/index.html; exec httpd -f -p 8080 -h /data'


def image_archive(command: str) -> bytes:
    """A docker-archive of busybox that runs a shell command."""
    layer = BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add("/bin/busybox", arcname="bin/busybox")
        for name in ("sh", "httpd", "cat", "sleep"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    config = {
        "architecture": machine_architecture(),
        "os": "linux",
        "config": {"Cmd": ["/bin/sh", "-c", command], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    images = FakeEngine().images
    images.put("localhost/made:1", FakeImage(json.dumps(config).encode(), (layer.getvalue(),)))
    return b"".join(images.save("localhost/made:1"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RealNode:
    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.podman = PodmanService(folder / "engine", folder / "run")
        request = SetupRequest(
            data_dir=folder / "data", run_dir=folder / "run", bucket="memory://", node="a", region="ams",
            http_listen=f"127.0.0.1:{self.port}", api_listen="127.0.0.1:0", engine=self.podman.url,
        )  # fmt: skip
        self.settings: Settings = setup(request, MemoryStore(), 1000).settings
        self.backups = FakeBackups()
        self.wiring = Wiring(backups=lambda settings, epoch: self.backups, limits=Limits(healthy_within_s=5.0))
        self.server = Server(self.settings, self.wiring)

    def deploy(self, command: str) -> None:
        upload = self.server.platform.begin_upload(OWNER)
        self.server.platform.write_upload(OWNER, upload, 0, image_archive(command))
        self.server.platform.deploy(OWNER, "hello", DeployRequest(Source(kind="archive", upload=upload), MANIFEST))

    def get(self) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/index.html", headers={"Host": "hello.localhost"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def restart_serve(self) -> None:
        self.server.stop()
        self.server = Server(self.settings, self.wiring)
        self.server.start()

    def end(self) -> None:
        for container in self.server.world.engine.containers.list():
            self.server.world.engine.containers.remove(container.name)
        self.server.stop()
        CaddyEdge(self.settings.data_dir / "edge", self.settings.run_dir, ("127.0.0.1", self.port)).stop()


@pytest.fixture
def node() -> Iterator[RealNode]:
    with tempfile.TemporaryDirectory(prefix="mp-") as folder:
        node = RealNode(Path(folder))
        try:
            node.podman.start()
            node.server.start()
            try:
                yield node
            finally:
                node.end()
        finally:
            node.podman.wipe()


class Visitor:
    """Asks again and again, from two threads; answers: every status that came."""

    def __init__(self, node: RealNode) -> None:
        self._node, self._leave = node, threading.Event()
        self.answers: list[int | str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self) -> None:
        while not self._leave.wait(0.01):
            try:
                self.answers.append(self._node.get()[0])
            except OSError as error:
                self.answers.append(repr(error))

    def __enter__(self) -> Visitor:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join(60)


def test_releases_are_swapped_while_visitors_see_no_error(node: RealNode) -> None:
    node.deploy(SERVE)
    assert node.get() == (200, "hello v1\n")
    with Visitor(node) as visitor:
        until(lambda: len(visitor.answers) > 20)
        node.deploy(SERVE)
        node.server.platform.restart(OWNER, "hello")
        before = len(visitor.answers)
        until(lambda: len(visitor.answers) > before + 20)
    assert set(visitor.answers) == {200}
    assert node.get() == (200, "hello v2\n")

    with pytest.raises(DeployFailed, match=r"exited with 3 after \d+\.\d s\n  no database") as failure:
        node.deploy("echo no database; exit 3")
    assert "v2 goes on serving" in str(failure.value)
    until(lambda: node.get() == (200, "hello v2\n"), 20)

    with pytest.raises(DeployFailed, match="listens on 127.0.0.1:8080 only"):
        node.deploy("exec httpd -f -p 127.0.0.1:8080 -h /data")
    until(lambda: node.get() == (200, "hello v2\n"), 20)

    with Visitor(node) as visitor:
        until(lambda: len(visitor.answers) > 10)
        node.restart_serve()
        before = len(visitor.answers)
        until(lambda: len(visitor.answers) > before + 20)
    assert set(visitor.answers) == {200}
    (volume,) = node.server.platform.volumes(OWNER)
    assert msgspec.to_builtins(volume)["state"] == "created"
