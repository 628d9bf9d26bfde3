"""Setup and serve: what a node is made of, how it starts and stops, and what it leaves running."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import requests
from click.testing import CliRunner
from platform_support import GUESTBOOK, OWNER, QUICK, SITE, FakeBackups, FakeProber, WatchedEngine, until

from minipaas.access import read_local_token
from minipaas.cli import root
from minipaas.cli.node import _recovery_key
from minipaas.edge.fake import FakeEdge
from minipaas.engine.fake import make_image
from minipaas.errors import AlreadyRunning, BadRequest, Conflict, FleetHeld, NodeNotEmpty, Unavailable
from minipaas.fleet import keep_fleet, read_fleet, record_of
from minipaas.model import Fleet
from minipaas.sealing import Identity
from minipaas.serve import Server, Wiring, stop_everything
from minipaas.service import DeployRequest
from minipaas.settings import Credentials, Settings, read_credentials, read_settings, write_settings
from minipaas.setup import SetupRequest, setup
from minipaas.sources import Source
from replicator import Lease
from replicator.errors import LeaseHeld, LeaseLost, ReplicatorError, StoreUnavailable
from replicator.store.memory import MemoryStore


def request_for(directory: Path) -> SetupRequest:
    return SetupRequest(
        data_dir=directory / "data",
        run_dir=directory / "run",
        bucket="s3://bucket/fleet",
        node="a",
        region="ams",
        api_listen="127.0.0.1:0",
        credentials=Credentials("key", "correct horse"),
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return setup(request_for(tmp_path), MemoryStore(), 1000).settings


class Host:
    """The outside parts of a node, which outlive its process."""

    def __init__(self) -> None:
        self.engine, self.edge, self.backups = WatchedEngine(), FakeEdge(), FakeBackups()
        self.wiring = Wiring(
            backups=lambda settings, epoch: self.backups,
            engine=lambda settings: self.engine,
            edge=lambda settings: self.edge,
            prober=FakeProber(self.engine),
            limits=QUICK,
        )


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def server(settings: Settings, host: Host) -> Iterator[Server]:
    server = Server(settings, host.wiring)
    server.start()
    yield server
    if not server.ended.is_set():
        server.stop()


def deploy_site(server: Server, host: Host) -> None:
    host.engine.images.remote["site"] = make_image([bytes(1024)])
    server.platform.deploy(OWNER, "site", DeployRequest(Source(kind="image", ref="site"), SITE))


def deploy_guestbook(server: Server, host: Host) -> None:
    host.engine.images.remote["guestbook"] = make_image([bytes(1024)])
    server.platform.deploy(OWNER, "guestbook", DeployRequest(Source(kind="image", ref="guestbook"), GUESTBOOK))


# -- setup


def test_setup_writes_a_node_and_keeps_no_private_half_of_the_recovery_key(tmp_path: Path) -> None:
    bucket = MemoryStore()
    result = setup(request_for(tmp_path), bucket, 1000)
    data_dir = tmp_path / "data"
    assert read_settings(data_dir) == result.settings
    assert read_local_token(data_dir) == result.token
    kept = b"".join(path.read_bytes() for path in data_dir.rglob("*") if path.is_file())
    kept += b"".join(bucket.get(each.key) for each in bucket.list())
    assert result.recovery_key.encode() not in kept
    assert Identity.parse(result.recovery_key).recipient.encode() in bucket.get("fleet/fleet.json")
    assert result.recovery_key not in repr(result)


@pytest.mark.parametrize("name", ["node.toml", "node.key", "token", "credentials"])
def test_what_setup_writes_is_for_root_only(settings: Settings, name: str) -> None:
    assert ((settings.data_dir / name).stat().st_mode & 0o777) == 0o600


def test_setup_refuses_a_directory_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").touch()
    with pytest.raises(NodeNotEmpty, match="is not an empty directory"):
        setup(request_for(tmp_path), MemoryStore(), 1000)


def test_setup_refuses_a_bucket_that_holds_a_fleet_and_leaves_nothing(tmp_path: Path) -> None:
    bucket = MemoryStore()
    setup(request_for(tmp_path / "first"), bucket, 1000)
    with pytest.raises(Conflict, match="minipaas recover"):
        setup(request_for(tmp_path / "second"), bucket, 1000)
    assert not (tmp_path / "second" / "data").exists()


@pytest.mark.parametrize("in_a_file", [False, True])
def test_the_recovery_key_does_not_stay_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_file: bool
) -> None:
    monkeypatch.setenv("MINIPAAS_RECOVERY_KEY", "AGE-SECRET-KEY-1")
    path = tmp_path / "key"
    path.write_text("# kept in a safe\nAGE-SECRET-KEY-1\n")
    assert _recovery_key(path if in_a_file else None) == "AGE-SECRET-KEY-1"
    assert "MINIPAAS_RECOVERY_KEY" not in os.environ


def test_settings_with_an_unknown_key_name_it(settings: Settings) -> None:
    path = settings.data_dir / "node.toml"
    path.write_text(path.read_text() + 'colour = "red"\n')
    with pytest.raises(BadRequest, match="colour"):
        read_settings(settings.data_dir)


def test_credentials_come_from_the_environment_before_the_file(settings: Settings) -> None:
    environ = {"MINIPAAS_ACCESS_KEY": "other", "MINIPAAS_SECRET_KEY": "other secret"}
    assert read_credentials(settings.data_dir, environ) == Credentials("other", "other secret")
    assert read_credentials(settings.data_dir, {}) == Credentials("key", "correct horse")
    assert "correct horse" not in repr(read_credentials(settings.data_dir, {}))


# -- serve


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """More than select() can tell apart, as a node with many databases has."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    null = os.open(os.devnull, os.O_RDONLY)
    held = [null, *(os.dup(null) for _ in range(1100))]
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_api_answers_when_more_than_a_thousand_files_are_open(
    settings: Settings, host: Host, many_open_files: None
) -> None:
    settings = replace_port(settings)
    server = Server(settings, host.wiring)
    server.start()
    assert requests.get(f"http://{settings.api_listen}/v1/status", timeout=5).status_code == 401
    server.stop()


def test_the_api_answers_over_the_network(settings: Settings, host: Host) -> None:
    settings = replace_port(settings)
    server = Server(settings, host.wiring)
    server.start()
    headers = {"Authorization": f"Bearer {read_local_token(settings.data_dir)}"}
    url = f"http://{settings.api_listen}/v1/status"
    assert requests.get(url, headers=headers, timeout=5).json()["name"] == "a"
    assert requests.get(url, timeout=5).status_code == 401
    server.stop()


def test_a_command_that_sets_a_secret_names_the_release_that_runs_with_it(settings: Settings, host: Host) -> None:
    settings = replace_port(settings)
    server = Server(settings, host.wiring)
    server.start()
    deploy_site(server, host)
    arguments = ["secrets", "set", "--data", str(settings.data_dir), "-a", "site", "KEY=hush"]
    said = CliRunner().invoke(root, arguments, catch_exceptions=False).output
    server.stop()
    assert said.splitlines()[-1] == "1 set; v2 runs with them"


def test_followers_of_a_quiet_app_that_leave_make_room_for_others(settings: Settings, host: Host) -> None:
    settings = replace_port(settings)
    server = Server(settings, host.wiring)
    server.start()
    deploy_site(server, host)
    headers = {"Authorization": f"Bearer {read_local_token(settings.data_dir)}"}

    def follow(path: str) -> requests.Response:
        return requests.get(f"http://{settings.api_listen}{path}", headers=headers, stream=True, timeout=5)

    for path in ("/v1/apps/site/logs?follow=1", "/v1/events"):
        container = host.engine.running()[0].name
        host.engine.fake.containers.say(container, "the only line")
        followers = [follow(path) for _ in range(QUICK.followers)]
        assert [each.status_code for each in followers] == [200] * QUICK.followers
        assert follow(path).status_code == 429
        assert requests.get(f"http://{settings.api_listen}/v1/status", headers=headers, timeout=2).ok
        for each in followers:
            each.close()
        until(lambda path=path: follow(path).status_code == 200)
    server.stop()


def replace_port(settings: Settings) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changed: Settings = msgspec.structs.replace(settings, api_listen=f"127.0.0.1:{port}")
    write_settings(changed)
    return changed


def test_a_second_serve_on_the_same_directory_is_refused(server: Server, host: Host) -> None:
    with pytest.raises(AlreadyRunning, match="another minipaas works on"):
        Server(server.settings, host.wiring).start()


def test_a_stop_leaves_apps_and_edge_running_and_says_that_all_is_durable(server: Server, host: Host) -> None:
    deploy_site(server, host)
    server.ended.set()
    assert server.stop() == ["left running: site, the edge, the engine", "everything that was committed is durable"]
    assert (len(host.engine.running()), host.edge.started) == (1, True)


def test_a_stop_while_the_bucket_is_away_says_what_is_not_durable(server: Server, host: Host) -> None:
    host.backups.unreachable = True
    server.ended.set()
    assert "NOT durable yet: the state" in server.stop()[1]


def test_the_next_serve_adopts_what_runs(settings: Settings, host: Host) -> None:
    first = Server(settings, host.wiring)
    first.start()
    deploy_site(first, host)
    first.stop()
    before = host.engine.running()[0].id, host.edge.applied
    second = Server(settings, host.wiring)
    second.start()
    until(lambda: second.platform.app(OWNER, "site").machines[0].state == "started")
    assert (host.engine.running()[0].id, host.edge.applied) == before
    second.stop()


def test_what_a_killed_process_left_half_done_goes_at_the_next_start(settings: Settings, host: Host) -> None:
    left = [settings.data_dir / "scratch" / "push-x.tar", settings.uploads_dir / "tree_1" / "Containerfile"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left behind")
    server = Server(settings, host.wiring)
    server.start()
    assert list((settings.data_dir / "scratch").iterdir()) + list(settings.uploads_dir.iterdir()) == []
    kept = settings.data_dir / "scratch" / "in-use"
    kept.touch()
    with pytest.raises(AlreadyRunning):
        Server(settings, host.wiring).start()
    assert kept.exists()
    server.stop()


def test_an_address_that_is_taken_is_named_and_nothing_stays_locked(settings: Settings, host: Host) -> None:
    changed = replace_port(settings)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(changed.api_listen.split(":")[1])))
        taken.listen()
        with pytest.raises(Unavailable, match="cannot listen on"):
            Server(changed, host.wiring).start()
    again = Server(changed, host.wiring)
    again.start()
    again.stop()


def test_down_ends_apps_and_edge_and_ships_what_they_wrote_last(settings: Settings, host: Host) -> None:
    server = Server(settings, host.wiring)
    server.start()
    request = DeployRequest(Source(kind="image", ref="site"), GUESTBOOK)
    host.engine.images.remote["site"] = make_image([bytes(1024)])
    server.platform.deploy(OWNER, "guestbook", request)
    with pytest.raises(AlreadyRunning):
        stop_everything(settings, host.wiring, print)
    server.stop()
    host.backups.synced.clear()
    said: list[str] = []
    stop_everything(settings, host.wiring, said.append)
    assert (host.engine.containers.list(), host.edge.started, len(host.backups.synced)) == ((), False, 1)
    assert said == [
        "stopped 1 containers",
        "the edge and the engine service have ended; everything that was committed is durable",
    ]


def test_down_names_what_is_not_durable_and_what_was_left_out(settings: Settings, host: Host) -> None:
    server = Server(settings, host.wiring)
    server.start()
    deploy_guestbook(server, host)
    (volume,) = server.state.volumes()
    server.stop()
    directory = settings.volume_dir(volume.app, volume.name)
    directory.rename(directory.with_name("away"))
    host.backups.unreachable = True
    said: list[str] = []
    stop_everything(settings, host.wiring, said.append)
    assert said[1].startswith("left out, and perhaps NOT durable: guestbook/data: its directory is gone")
    assert said[2:] == [
        "NOT durable yet: the state: not everything of the state is in the bucket",
        "the edge and the engine service have ended",
    ]


def test_a_volume_that_is_being_restored_is_named_by_stop_and_by_down(settings: Settings, host: Host) -> None:
    server = Server(settings, host.wiring)
    server.start()
    deploy_guestbook(server, host)
    server.reconciler.stop(5)
    (volume,) = server.state.volumes()
    server.state.set_volume_state(volume.id, "restoring")
    said = server.stop()
    stop_everything(settings, host.wiring, said.append)
    assert said.count("left out: guestbook/data is not yet restored from the bucket") == 2


# -- the lease of the bucket


class FakeLease:
    def __init__(self, answers: list[ReplicatorError | None], lost: threading.Event, leaving: threading.Event) -> None:
        self._answers, self._lost, self._leaving = answers, lost, leaving

    def resume(self) -> int:
        answer = self._answers.pop(0) if self._answers else None
        if answer is not None:
            raise answer
        return 1

    def token(self) -> int:
        return 1

    def release(self) -> None:
        self.released = True

    def keep(self, on_lost: Callable[[ReplicatorError], None]) -> None:
        while not self._leaving.wait(0.01):
            if self._lost.is_set():
                on_lost(LeaseLost("node b has it now"))
                return


def with_lease(host: Host, answers: list[ReplicatorError | None], lost: threading.Event) -> Wiring:
    return replace(host.wiring, lease=lambda settings, leaving: FakeLease(answers, lost, leaving))


def test_a_node_whose_fleet_another_holds_does_not_start(settings: Settings, host: Host) -> None:
    server = Server(settings, with_lease(host, [LeaseHeld("node b is alive")], threading.Event()))
    with pytest.raises(FleetHeld, match="node b is alive"):
        server.start()
    assert not host.edge.started


def test_a_store_that_is_away_at_the_start_does_not_stop_the_apps(settings: Settings, host: Host) -> None:
    server = Server(settings, with_lease(host, [StoreUnavailable("away")] * 2, threading.Event()))
    server.start()
    assert host.edge.started
    server.stop()


def test_a_node_that_loses_its_fleet_ends_and_stops_its_apps(settings: Settings, host: Host) -> None:
    lost = threading.Event()
    server = Server(settings, with_lease(host, [], lost))
    server.start()
    deploy_site(server, host)
    lost.set()
    assert server.ended.wait(5)
    assert "the apps and the edge of this node have ended" in server.stop()
    assert "node b has it now" in server.lost
    assert (host.engine.running(), host.edge.started) == ([], False)


def test_a_node_that_has_lost_its_fleet_stays_so_even_when_the_bucket_cannot_be_asked(
    settings: Settings, host: Host
) -> None:
    lost = threading.Event()
    server = Server(settings, with_lease(host, [], lost))
    server.start()
    lost.set()
    assert server.ended.wait(5)
    server.stop()
    host.edge.start()
    with pytest.raises(FleetHeld, match="node b has it now"):
        Server(settings, with_lease(host, [StoreUnavailable("away")] * 9, threading.Event())).start()
    assert not host.edge.started


def test_a_lost_node_ends_its_apps_before_it_ships(settings: Settings, host: Host) -> None:
    lost = threading.Event()
    server = Server(settings, with_lease(host, [], lost))
    server.start()
    deploy_site(server, host)
    running: list[int] = []
    host.backups.on_sync = lambda: running.append(len(host.engine.running()))
    lost.set()
    assert server.ended.wait(5)
    server.stop()
    assert running and set(running) == {0}


def test_a_container_that_resists_the_fence_keeps_no_other_running(settings: Settings, host: Host) -> None:
    lost = threading.Event()
    server = Server(settings, with_lease(host, [], lost))
    server.start()
    deploy_site(server, host)
    deploy_guestbook(server, host)
    stubborn = min(container.name for container in host.engine.running())
    host.engine.witness.resisting = stubborn
    lost.set()
    assert server.ended.wait(5)
    sentences = server.stop()
    assert any(f"container {stubborn} could NOT be stopped" in sentence for sentence in sentences)
    assert [container.name for container in host.engine.running()] == [stubborn]


def test_a_node_without_the_bucket_has_no_token_for_new_timelines(settings: Settings, host: Host) -> None:
    tokens: list[Callable[[], int]] = []

    def backups(_: Settings, epoch: Callable[[], int]) -> FakeBackups:
        tokens.append(epoch)
        return host.backups

    store = MemoryStore()
    lease = Lease(store, "lease", holder="a", label="node a", now_s=lambda: 1)
    wiring = replace(host.wiring, backups=backups, lease=lambda settings, leaving: lease)
    server = Server(settings, wiring)
    server.start()
    assert tokens[0]() == 1
    Lease(store, "lease", holder="b", label="node b").acquire(take_over=True)
    with pytest.raises(LeaseLost):
        lease.renew()
    with pytest.raises(LeaseLost):
        tokens[0]()
    server.stop()


def test_a_bucket_that_was_emptied_is_told_again_which_fleet_it_holds(settings: Settings) -> None:
    bucket = MemoryStore()
    record = record_of(Fleet(id="0" * 32, recovery_recipient="age1x"), settings)
    keep_fleet(bucket, record)
    keep_fleet(bucket, msgspec.structs.replace(record, domain="elsewhere"))
    assert read_fleet(bucket) == record


def test_a_node_sees_to_the_record_of_its_fleet_once_it_has_the_bucket(settings: Settings, host: Host) -> None:
    kept: list[str] = []
    wiring = replace(
        with_lease(host, [StoreUnavailable("away")], threading.Event()),
        keep_fleet=lambda settings, fleet: kept.append(fleet.id),
    )
    server = Server(settings, wiring)
    server.start()
    until(lambda: kept == [server.state.fleet().id])
    server.stop()
