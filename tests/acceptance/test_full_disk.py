"""The disk of a node is full: what its owner sees, what apps get, and that all goes on by itself when there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.bucket import restored_rows
from support.node import Load, MakeNode, Node, serving, unprotected, wait_for
from support.seaweed import SeaweedServer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(420)]

DISK_MB = 900


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(filler: Path) -> None:
    """Until there is no room for another page."""
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def assert_said_or_nothing_new(node: Node, load: Load) -> None:
    """What fills the last page decides who is stopped: capturing, and then status says why, or the app, and then nothing new is at risk."""
    failed = len(load.bad)
    protection, reason = wait_for(
        lambda: next(
            (
                p
                for p in [node.protection()["guestbook.db"]]
                if p[0].startswith("NOT PROTECTED") or len(load.bad) > failed
            ),
            None,
        ),
        40,
        "the disk is full for somebody",
    )
    assert "No space left" in reason or not protection.startswith("NOT PROTECTED")


def test_a_full_disk_is_a_clear_state_and_everything_goes_on_when_there_is_room(
    make_node: MakeNode, base_archive: Path, seaweed: SeaweedServer, prefix: str, tmp_path: Path
) -> None:
    node = make_node()
    with small_disk(node.data, DISK_MB):
        try:
            serving(node, base_archive)
            assert node.deploy().returncode == 0
            with Load(node) as load:
                wait_for(lambda: len(load.ok) > 50, 20, "rows")
                fill(node.data / "filler")
                assert_said_or_nothing_new(node, load)
                assert f"the disk of {node.data} has less than" in node.done("status")
                refused = node.deploy()
                assert refused.returncode == 1
                assert "make room" in refused.stderr
                wait_for(lambda: load.bad, 20, "the app meets the end of the disk")
                assert node.request("GET", "/health")[0] == 200
                assert node.process is not None
                assert node.process.poll() is None
                restored_rows(seaweed.url(prefix), seaweed, tmp_path / "meanwhile.db")
                node.kill()
                node.start()
                assert_said_or_nothing_new(node, load)
                (node.data / "filler").unlink()
                acknowledged = len(load.ok)
                wait_for(lambda: len(load.ok) > acknowledged + 50, 30, "the app writes again")
                wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 90, "protected again")
            assert {each for each in load.bad if "database or disk is full" not in each} == set()
            load.assert_nothing_lost()
            assert node.json("status")["troubles"] == []
            assert node.deploy().returncode == 0
            written = node.check()["rows"]
            assert node.stop() == 0, node.tail()
            assert restored_rows(seaweed.url(prefix), seaweed, tmp_path / "back.db") == written
        finally:
            node.end()


def test_a_full_disk_of_the_replicator_is_not_noticed_by_apps(
    make_node: MakeNode, base_archive: Path, seaweed: SeaweedServer, prefix: str, tmp_path: Path
) -> None:
    node = make_node()
    node.setup()
    with small_disk(node.data / "replicator", 4):
        try:
            node.start()
            node.podman("load", "--input", str(base_archive))
            assert node.deploy().returncode == 0
            with Load(node) as load:
                wait_for(lambda: len(load.ok) > 50, 20, "rows")
                fill(node.data / "replicator" / "filler")
                assert "No space left" in unprotected(node)
                (node.data / "replicator" / "filler").unlink()
                wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 90, "protected again")
            assert load.bad == []
            load.assert_nothing_lost()
            written = node.check()["rows"]
            assert node.stop() == 0, node.tail()
            assert restored_rows(seaweed.url(prefix), seaweed, tmp_path / "back.db") == written
        finally:
            node.end()
