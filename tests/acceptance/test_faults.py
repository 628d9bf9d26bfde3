"""What can go wrong with a node that serves: a crash in the middle of a deploy, a bucket that is away."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
from support.bucket import restored_rows
from support.faultproxy import FaultProxy
from support.node import GUESTBOOK, Load, MakeNode, Node, serving, unprotected, wait_for
from support.seaweed import SeaweedServer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(420)]


def guestbook_named(folder: Path, name: str) -> Path:
    """Another app of the same source."""
    shutil.copytree(GUESTBOOK, folder)
    manifest = folder / "minipaas.toml"
    manifest.write_text(manifest.read_text().replace('app = "guestbook"', f'app = "{name}"'))
    return folder


def kill_during_deploy(node: Node, directory: Path, chance: random.Random) -> None:
    """kill -9 of ``serve`` at a random moment after a random step of a deploy."""
    client = node.deploying(directory)
    assert client.stdout is not None
    steps = chance.randrange(1, 11)
    for number, _ in enumerate(client.stdout, 1):
        if number == steps:
            break
    time.sleep(chance.uniform(0.0, 0.3))
    node.kill()
    _, said = client.communicate(timeout=60)
    assert "Traceback" not in said


def assert_one_consistent_state(node: Node, name: str) -> None:
    """One release that is live, one container of it, no other; every volume mounted once; requests are answered."""
    app = node.settled(name)
    alive = [each for each in node.json("releases", name) if each["status"] in ("live", "deploying", "pending")]
    assert [each["number"] for each in alive] == [app["release"]]
    expected = [f"minipaas-{name}-{app['machines'][0]['id']}"]
    wait_for(lambda: node.containers(name, every=True) == expected, 20, f"no other container than {expected}")
    mounts = json.loads(node.podman("inspect", *expected))[0]["Mounts"]
    assert [each["Source"] for each in mounts] == [volume["directory"] for volume in app["volumes"]]
    assert node.check(name)["integrity"] == "ok"


def test_serve_killed_in_the_middle_of_a_first_deploy_comes_back_in_one_consistent_state(
    node: Node, tmp_path: Path
) -> None:
    chance = random.Random(7)
    for round_no in range(5):
        name = f"book-{round_no}"
        source = guestbook_named(tmp_path / name, name)
        kill_during_deploy(node, source, chance)
        node.start()
        wait_for(lambda name=name: unfinished(node, name) is False, 60, f"{name} is decided")
        if node.app_or_none(name) is None or node.app(name)["release"] is None:
            assert node.containers(name, every=True) == []
        else:
            assert_one_consistent_state(node, name)
        again = node.deploy(source)
        assert again.returncode == 0, again.stderr
        assert_one_consistent_state(node, name)
        assert node.request("POST", "/", b'{"name": "a", "message": "b"}', app=name)[0] == 200
        node.done("destroy", name, "-y")


def unfinished(node: Node, name: str) -> bool:
    app = node.app_or_none(name)
    return app is not None and app["state"] == "deploying"


def test_serve_killed_in_the_middle_of_a_deploy_under_load_loses_nothing(node: Node) -> None:
    assert node.deploy().returncode == 0
    chance = random.Random(20261124)
    with Load(node) as load:
        for _ in range(6):
            kill_during_deploy(node, GUESTBOOK, chance)
            node.start()
            assert_one_consistent_state(node, "guestbook")
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
            reason = unprotected(node)
            assert proxy.endpoint.removeprefix("http://") in reason or "cannot be reached" in reason, reason
            refused = node.deploy()
            assert refused.returncode == 1
            assert "cannot be stored in the bucket, so nothing was deployed" in refused.stderr
            assert "Traceback" not in refused.stderr
            assert node.settled()["release"] == 1
            proxy.heal()
            wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 60, "protected again")
        assert load.bad == []
        assert load.worst_s < 2
        load.assert_nothing_lost()
        written = node.check()["rows"]
        node.end()
    assert restored_rows(seaweed.url(prefix), seaweed, tmp_path / "back.db") == written


def test_a_bucket_that_crashes_and_comes_back_has_everything(
    make_node: MakeNode, base_archive: Path, tmp_path: Path
) -> None:
    with SeaweedServer() as server:
        node = serving(make_node(bucket=server.url("fleet")), base_archive)
        assert node.deploy().returncode == 0
        with Load(node) as load:
            wait_for(lambda: len(load.ok) > 50, 20, "rows")
            server.halt()
            unprotected(node)
            node.kill()
            node.start()
            assert node.settled()["release"] == 1
            server.resume()
            wait_for(lambda: node.protection()["guestbook.db"][0].startswith("protected"), 60, "protected again")
        assert load.bad == []
        load.assert_nothing_lost()
        written = node.check()["rows"]
        node.end()
        assert restored_rows(server.url("fleet"), server, tmp_path / "back.db") == written


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
    assert node.app()["release"] == 3
