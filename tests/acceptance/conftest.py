"""Real nodes for the tests of the whole. Each test has a folder and a prefix in the bucket of its own, and leaves nothing."""

from __future__ import annotations

import fcntl
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node import REPOSITORY, MakeNode, Node, serving
from support.seaweed import SeaweedServer

from images.make_base import make_base


@pytest.fixture(scope="session")
def base_archive() -> Path:
    """The base image that guestbook is built on; made once, then kept in the repository's cache."""
    cache = REPOSITORY / ".cache"
    cache.mkdir(exist_ok=True)
    archive = cache / "debian-python-bookworm.tar"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return archive if archive.exists() else make_base(archive)


@pytest.fixture
def root() -> Iterator[Path]:
    """Short, since sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def prefix() -> str:
    return f"fleet-{secrets.token_hex(4)}"


@pytest.fixture
def make_node(root: Path, seaweed: SeaweedServer, prefix: str) -> Iterator[MakeNode]:
    """Makes nodes of one fleet; the first is ``a``."""
    nodes: list[Node] = []

    def make(name: str = "a", region: str = "ams", bucket: str = "") -> Node:
        node = Node(root, name, region, bucket or seaweed.url(prefix), (seaweed.access_key, seaweed.secret_key))
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.end()


@pytest.fixture
def node(make_node: MakeNode, base_archive: Path) -> Node:
    """A node that serves, with the base image in its engine."""
    return serving(make_node(), base_archive)


@pytest.fixture(scope="module")
def shared_node(seaweed: SeaweedServer, base_archive: Path) -> Iterator[Node]:
    """A node that serves, for tests that leave it as they found it but for apps of their own names."""
    root = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    url = seaweed.url(f"fleet-{secrets.token_hex(4)}")
    node = Node(root, "a", "ams", url, (seaweed.access_key, seaweed.secret_key))
    try:
        yield serving(node, base_archive)
    finally:
        node.end()
        shutil.rmtree(root, ignore_errors=True)
