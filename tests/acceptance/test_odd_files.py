"""Files in a volume that look like databases and are none, or cannot be replicated: the app always starts, and status says what is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.node import MakeNode, Node, wait_for

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(420)]

MAGIC = b"SQLite format 3\0"
NOT_PROTECTED = {
    "junk.db": "not an SQLite database",
    "cut.db": "",
    "sealed.db": "encrypted as a whole",
    "caf\\xe9.db": "not valid UTF-8",
    "out.db": "symbolic link",
}


def litter(volume: Path) -> None:
    """Sorted before and after guestbook.db, so that none of them can stand in its way."""
    (volume / "junk.db").write_bytes(MAGIC + os.urandom(8192))
    (volume / "cut.db").write_bytes((volume / "guestbook.db").read_bytes()[:100])
    (volume / "sealed.db").write_bytes(os.urandom(16384))
    (volume / os.fsdecode(b"caf\xe9.db")).write_bytes((volume / "guestbook.db").read_bytes())
    (volume / "out.db").symlink_to(volume.parent.parent.parent / "state.db")


def sign(node: Node, message: str) -> None:
    status, body = node.request("POST", "/", json.dumps({"name": "a", "message": message}).encode())
    assert status == 200, body


def assert_runs_and_says_what_is(node: Node, rows: int) -> None:
    assert node.settled()["state"] == "deployed"
    assert node.check()["rows"] == rows

    def as_expected() -> bool:
        found = node.protection()
        good = found.get("guestbook.db", ("", ""))[0].startswith("protected")
        return good and all(found.get(name, ("", ""))[0] == "NOT PROTECTED" for name in NOT_PROTECTED)

    wait_for(as_expected, 30, f"guestbook.db is protected, the others are not: {node.protection()} {node.tail()}")
    found = node.protection()
    assert all(reason in found[name][1] and found[name][1] for name, reason in NOT_PROTECTED.items()), found


def test_an_app_always_starts_whatever_lies_in_its_volume(node: Node, make_node: MakeNode, base_archive: Path) -> None:
    assert node.deploy().returncode == 0
    sign(node, "one")
    volume = Path(node.app()["volumes"][0]["directory"])
    litter(volume)
    assert_runs_and_says_what_is(node, 1)
    node.done("restart", "guestbook")
    assert_runs_and_says_what_is(node, 1)
    node.done("secrets", "set", "--app", "guestbook", "COLOUR=red")
    assert_runs_and_says_what_is(node, 1)
    assert node.deploy().returncode == 0
    assert_runs_and_says_what_is(node, 1)
    node.kill()
    node.start()
    assert_runs_and_says_what_is(node, 1)
    node.stop()
    node.done("down")
    assert mounts_below(node.data) == []
    node.start()
    assert_runs_and_says_what_is(node, 1)
    node.done("destroy", "guestbook", "--yes")
    wait_for(lambda: node.containers(every=True) == [], 30, "no container is left")
    assert [each for each in mounts_below(node.data) if "/merged" in each] == []
    assert node.deploy().returncode == 0
    sign(node, "two")
    assert_runs_and_says_what_is(node, 2)
    wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected (lag 0"), 30, "all is shipped")
    node.end_at_once()
    other = make_node("b", "fra")
    other.recover(node.recovery_key, "--takeover")
    assert other.settled()["state"] == "deployed"
    assert other.check()["rows"] == 2
    wait_for(lambda: other.json("status")["durable"], 30, f"all is protected: {other.protection()}")
    assert set(other.protection()) == {"guestbook.db", "state.db"}


def mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(folder))]
