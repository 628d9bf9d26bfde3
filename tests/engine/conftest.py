"""A real engine for the tests: Podman with storage of its own in a temporary folder, taken down to the last mount."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_tars import busybox_layer, docker_archive

from minipaas.engine import Engine
from minipaas.engine.docker_api import DockerEngine
from minipaas.engine.fake import FakeEngine
from minipaas.engine.podman_service import PodmanService

BUSYBOX_TAG = "localhost/test/busybox:1"


@pytest.fixture(scope="session")
def podman_service() -> Iterator[PodmanService]:
    with tempfile.TemporaryDirectory(prefix="mp-") as folder:
        service = PodmanService(Path(folder) / "data", Path(folder) / "run")
        try:
            service.start()
            yield service
        finally:
            service.wipe()


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "busybox.tar"
    path.write_bytes(docker_archive([busybox_layer()], BUSYBOX_TAG))
    return path


@pytest.fixture(scope="session")
def podman_engine(podman_service: PodmanService, busybox_tar: Path) -> Iterator[DockerEngine]:
    node = secrets.token_hex(8)
    scratch = Path(tempfile.mkdtemp(prefix="mp-scratch-"))
    engine = DockerEngine(podman_service.url, node=node, scratch=scratch, revive=podman_service.start)
    try:
        engine.images.load(busybox_tar, tag=BUSYBOX_TAG)
        yield engine
    finally:
        engine.close()
        shutil.rmtree(scratch, ignore_errors=True)
        subprocess.run(["ip", "link", "delete", f"mp-{node[:8]}"], capture_output=True, check=False)


@pytest.fixture
def podman(podman_engine: DockerEngine) -> Iterator[DockerEngine]:
    """The real engine; containers of a test go with it."""
    yield podman_engine
    for each in podman_engine.containers.list():
        podman_engine.containers.remove(each.name)


@pytest.fixture(params=["fake", pytest.param("podman", marks=pytest.mark.real)])
def engine(request: pytest.FixtureRequest, busybox_tar: Path) -> Engine:
    """Each engine that must keep the contract, with the image BUSYBOX_TAG."""
    if request.param == "podman":
        real: DockerEngine = request.getfixturevalue("podman")
        return real
    fake = FakeEngine()
    fake.images.load(busybox_tar, tag=BUSYBOX_TAG)
    return fake


@pytest.fixture
def busybox() -> str:
    return BUSYBOX_TAG
