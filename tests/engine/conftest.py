"""A real engine for the tests: Podman with storage of its own in a temporary folder, taken down to the last mount."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from image_tars import busybox_layer, docker_archive

from minipaas.engine import Engine
from minipaas.engine.docker_api import DockerEngine
from minipaas.engine.fake import FakeEngine
from minipaas.engine.podman_service import PodmanService
from minipaas.engine.subnet import candidates

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
        remove_lost_namespaces(next(candidates(node, [])))


def remove_lost_namespaces(subnet: IPv4Network) -> None:
    """Podman killed in the middle of a start forgets the network namespace it had made; ours have an address in ``subnet``."""
    for path in Path("/run/netns").glob("netns-*"):
        shown = run_ip("-json", "-netns", path.name, "-4", "address", "show", "scope", "global")
        addresses = [each["local"] for link in json.loads(shown or "[]") for each in link.get("addr_info", ())]
        if any(IPv4Address(each) in subnet for each in addresses) and not run_ip("netns", "pids", path.name):
            run_ip("netns", "delete", path.name)


def run_ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False).stdout.strip()


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
