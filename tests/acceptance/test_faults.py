"""What can go wrong with a node that serves: a crash in the middle of a deploy, a bucket that is away, a disk that is full."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import MakeNode, serving
from support.faultproxy import FaultProxy
from support.node import Load, Node, wait_for
from support.seaweed import SeaweedServer

from replicator import RestoreOptions, open_store, restore

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(420)]


def restored_rows(url: str, server: SeaweedServer, target: Path) -> int:
    """Rows of the newest guestbook in the bucket, after the checks of a restore."""
    import apsw

    store = open_store(url, access_key=server.access_key, secret_key=server.secret_key)
    volume = next(info.key.split("/")[1] for info in store.list("volumes/"))
    restore(store.sub(f"volumes/{volume}/db/guestbook.db"), target, RestoreOptions(integrity_check="full"))
    connection = apsw.Connection(str(target), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows, highest = connection.execute("SELECT count(*), max(id) FROM entries").get
        assert rows == highest, "a prefix has no gap"
        return int(rows)
    finally:
        connection.close()


def test_serve_killed_in_the_middle_of_a_deploy_comes_back_in_one_consistent_state(node: Node) -> None:
    assert node.deploy().returncode == 0
    chance = random.Random(20261124)
    with Load(node) as load:
        for _ in range(5):
            deploy = threading.Thread(target=node.deploy)
            deploy.start()
            time.sleep(chance.uniform(1.0, 3.0))
            node.kill()
            deploy.join()
            node.start()
            app = node.settled()
            live = [each for each in node.json("releases", "guestbook") if each["status"] in ("live", "deploying")]
            assert [each["number"] for each in live] == [app["release"]]
            assert node.containers() == [f"minipaas-guestbook-{app['machines'][0]['id']}"]
    assert load.bad == []
    load.assert_nothing_lost()


def test_a_bucket_that_is_away_is_not_noticed_by_the_app_and_everything_arrives_afterwards(
    make_node: MakeNode, base_archive: Path, seaweed: SeaweedServer, prefix: str, tmp_path: Path
) -> None:
    with FaultProxy(seaweed.endpoint) as proxy:
        url = seaweed.url(prefix).replace(seaweed.endpoint, proxy.endpoint)
        node = serving(make_node(bucket=url), base_archive)
        assert node.deploy().returncode == 0
        with Load(node) as load:
            wait_for(lambda: len(load.ok) > 50, 20, "rows")
            proxy.refuse()
            words, reason = wait_for(
                lambda: next((p for p in [node.protection()["guestbook.db"]] if p[0].startswith("NOT PROTECTED")), None),
                40, f"status says so: {node.protection()}",
            )  # fmt: skip
            assert proxy.endpoint.removeprefix("http://") in reason or "cannot be reached" in reason, (words, reason)
            refused = node.deploy()
            assert refused.returncode != 0
            assert "Error:" in refused.stderr
            assert "Traceback" not in refused.stderr
            proxy.heal()
            wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 60, "protected again")
        assert load.bad == []
        assert load.worst_s < 5
        load.assert_nothing_lost()
        written = node.check()["rows"]
        assert node.stop() == 0, node.tail()
    assert restored_rows(seaweed.url(prefix), seaweed, tmp_path / "back.db") == written


def test_a_full_disk_is_a_clear_state_and_it_goes_on_when_there_is_room(
    make_node: MakeNode, base_archive: Path, root: Path, seaweed: SeaweedServer, prefix: str, tmp_path: Path
) -> None:
    node = make_node()
    node.setup()
    local = node.data / "replicator"
    local.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(local)], check=True)
    try:
        node.start()
        node.podman("load", "--input", str(base_archive))
        assert node.deploy().returncode == 0
        with Load(node) as load:
            wait_for(lambda: len(load.ok) > 50, 20, "rows")
            filler = local / "filler"
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            words, reason = wait_for(
                lambda: next((p for p in [node.protection()["guestbook.db"]] if p[0].startswith("NOT PROTECTED")), None),
                40, "status says so",
            )  # fmt: skip
            assert "space" in reason.lower(), (words, reason)
            assert node.process is not None
            assert node.process.poll() is None
            filler.unlink()
            wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 90, "protected again")
        assert load.bad == []
        load.assert_nothing_lost()
        written = node.check()["rows"]
        assert node.stop() == 0, node.tail()
        assert restored_rows(seaweed.url(prefix), seaweed, tmp_path / "back.db") == written
    finally:
        node.end()
        subprocess.run(["umount", "-l", str(local)], check=False)


def test_a_deploy_under_load_fails_no_request_and_keeps_one_writer(node: Node) -> None:
    assert node.deploy().returncode == 0
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            seen.add(len(node.containers()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with Load(node) as load:
            wait_for(lambda: len(load.ok) > 50, 20, "rows")
            for _ in range(2):
                result = node.deploy()
                assert result.returncode == 0, result.stdout + result.stderr
    finally:
        done.set()
        watcher.join()
    assert load.bad == []
    assert load.worst_s < 5
    assert max(seen) == 1
    load.assert_nothing_lost()
    assert json.loads(json.dumps(node.app()))["release"] == 3
