"""The disk of a node is full: what its owner sees, what apps get, and that all goes on by itself when there is room."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MakeNode, serving
from support.bucket import restored_rows
from support.node import Load, Node, wait_for
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
    """Not a byte is left."""
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        chunk = bytes(1 << 20)
        while True:
            chunk = chunk[: file.write(chunk)] if len(chunk) == 1 << 20 else chunk
            if not chunk:
                break
    with pytest.raises(OSError), filler.open("ab", buffering=0) as file:
        while file.write(bytes(512)) == 512:
            pass
        raise OSError


def unprotected(node: Node) -> tuple[str, str]:
    return wait_for(
        lambda: next((p for p in [node.protection()["guestbook.db"]] if p[0].startswith("NOT PROTECTED")), None),
        40, f"status says so: {node.protection()}",
    )  # fmt: skip


def test_a_full_disk_is_a_clear_state_and_everything_goes_on_when_there_is_room(
    make_node: MakeNode, base_archive: Path, root: Path, seaweed: SeaweedServer, prefix: str, tmp_path: Path
) -> None:
    node = make_node()
    with small_disk(node.data, DISK_MB):
        try:
            serving(node, base_archive)
            assert node.deploy().returncode == 0
            with Load(node) as load:
                wait_for(lambda: len(load.ok) > 50, 20, "rows")
                fill(node.data / "filler")
                wait_for(lambda: load.bad, 20, "the app meets the end of the disk")
                words, reason = unprotected(node)
                print(words, reason)
                print(node.done("status"))
                print(node.done("status", "guestbook"))
                assert node.request("GET", "/health")[0] == 200
                refused = node.deploy()
                print(refused)
                assert node.process is not None
                assert node.process.poll() is None
                print(restored_rows(seaweed.url(prefix), seaweed, tmp_path / "meanwhile.db"))
                (node.data / "filler").unlink()
                acknowledged = len(load.ok)
                wait_for(lambda: len(load.ok) > acknowledged + 50, 30, "the app writes again")
                wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 90, "protected again")
            print(set(load.bad))
            load.assert_nothing_lost()
            written = node.check()["rows"]
            assert node.deploy().returncode == 0
            assert node.stop() == 0, node.tail()
            assert restored_rows(seaweed.url(prefix), seaweed, tmp_path / "back.db") == written
        finally:
            print(node.tail())
            node.end()
