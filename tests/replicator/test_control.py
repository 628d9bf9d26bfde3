"""The control socket: who may use it, what it answers, and that a peer that hangs holds up nobody."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from replicator import control
from replicator.control import ControlServer, SocketInUse
from replicator.errors import DaemonNotRunning, DatabaseMissing, DatabaseNotReplicable, SyncTimeout, UsageError
from replicator.peers import MAX_PEERS
from replicator.roster import Left
from replicator.values import Position
from replicator.worker import DatabaseStatus, Protection

APP = DatabaseStatus(
    path=Path("/data/app.db"),
    url="file:///backup",
    protection=Protection.PROTECTED,
    reason="",
    lag_s=0.25,
    captured=Position(1, 7),
    durable=Position(1, 6),
    durable_ms=1_790_000_000_123,
    waiting_segments=1,
    waiting_bytes=512,
    wal_bytes=4152,
    page_size=4096,
    page_count=3,
    checkpoint_blocked=False,
    barrier_s=0.0,
)


class FakeReplicator:
    """Knows one database; ``released`` is when it is durable."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.asked: list[Path] = []
        self.changes: list[tuple[object, ...]] = []

    def status(self) -> list[DatabaseStatus]:
        return [APP]

    def sync(self, path: Path, timeout_s: float) -> Position:
        self.asked.append(path)
        if path != APP.path:
            raise DatabaseMissing(f"{path} is not replicated here")
        if not self.released.wait(timeout_s):
            raise SyncTimeout(f"{path} is not durable after {timeout_s:g} s")
        return Position(1, 7)

    def register(self, path: Path, url: str) -> None:
        if path.name == "used.db":
            raise DatabaseNotReplicable(f"{path} is in use by another replicator")
        self.changes.append(("register", path, url))

    def unregister(self, path: Path, timeout_s: float) -> Left:
        self.changes.append(("unregister", path, timeout_s))
        return Left(path, None, "too late")

    def start(self, path: Path) -> None:
        self.changes.append(("start", path))

    def stop(self, path: Path, timeout_s: float) -> Left:
        self.changes.append(("stop", path, timeout_s))
        return Left(path, Position(1, 7))


@contextmanager
def serving(path: Path, replicator: FakeReplicator) -> Iterator[ControlServer]:
    server = ControlServer(path, replicator, info=lambda: {"config": "/etc/replicator.yml"})
    server.start()
    try:
        yield server
    finally:
        server.close()


def exchange(path: Path, line: str) -> tuple[str, str]:
    """Status line and body of the answer to a request line."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(str(path))
        peer.sendall(f"{line}\r\nHost: control\r\n\r\n".encode())
        answer = b"".join(iter(lambda: peer.recv(65536), b"")).decode()
    return answer.partition("\r\n")[0], answer.partition("\r\n\r\n")[2]


@pytest.fixture
def fake() -> FakeReplicator:
    return FakeReplicator()


@pytest.fixture
def path(tmp_path: Path, fake: FakeReplicator) -> Iterator[Path]:
    with serving(tmp_path / "control.sock", fake):
        yield tmp_path / "control.sock"


def test_status_tells_how_each_database_is(path: Path) -> None:
    database = control.status(path)["databases"][0]
    assert database["status"] == "protected (lag 0.2 s)"
    assert (database["captured"], database["durable"]) == ("1:7", "1:6")
    assert database["durable_time"] == "2026-09-21T14:13:20.123Z"
    assert control.databases(path) == {
        "databases": [{"path": "/data/app.db", "url": "file:///backup", "protection": "protected"}]
    }


def test_info_tells_of_the_process_and_counts_the_databases(path: Path) -> None:
    found = control.info(path)
    assert found["pid"] == os.getpid()
    assert found["config"] == "/etc/replicator.yml"
    assert found["databases"] == {"protected": 1, "catching_up": 0, "not_protected": 0}


def test_changes_go_to_who_operates_it(path: Path, fake: FakeReplicator) -> None:
    other = Path("/data/new\udcff.db")  # a name that is no UTF-8
    assert control.register(path, other, "file:///b")["url"] == "file:///b"
    assert control.stop(path, APP.path, 2)["durable"] == "1:7"
    assert control.start(path, APP.path) == {"path": "/data/app.db"}
    assert control.unregister(path, APP.path, 0) == {"path": "/data/app.db", "durable": None, "reason": "too late"}
    assert fake.changes == [
        ("register", other, "file:///b"),
        ("stop", APP.path, 2.0),
        ("start", APP.path),
        ("unregister", APP.path, 0.0),
    ]
    with pytest.raises(DatabaseNotReplicable, match="is in use"):
        control.register(path, Path("/data/used.db"), "file:///b")


def test_sync_answers_when_it_is_durable(path: Path, fake: FakeReplicator) -> None:
    threading.Timer(0.1, fake.released.set).start()
    assert control.sync(path, APP.path, 10)["durable"] == "1:7"


def test_sync_without_waiting_sets_it_going(path: Path, fake: FakeReplicator) -> None:
    assert control.sync(path, APP.path, 0)["durable"] is None
    assert fake.asked == [APP.path]


def test_errors_arrive_as_what_they_are(path: Path) -> None:
    with pytest.raises(SyncTimeout, match=r"not durable after 0\.01 s"):
        control.sync(path, APP.path, 0.01)
    with pytest.raises(DatabaseMissing, match="other.db is not replicated here"):
        control.sync(path, Path("/data/other.db"), 1)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("GET /barrier?db=/data/app.db&timeout=50ms HTTP/1.1", 504),
        ("GET /barrier?db=/data/app.db&timeout=soon HTTP/1.1", 400),
        ("GET /barrier?db=/data/app.db&timeout=nan HTTP/1.1", 400),
        ("GET /barrier HTTP/1.1", 400),
        ("GET /barrier?db=app.db HTTP/1.1", 400),
        ("GET /barrier?db=/data/%00.db HTTP/1.1", 400),
        ("GET /barrier?db=/data/app.db&timeout=7200 HTTP/1.1", 400),
        ("POST /register?db=/data/x.db HTTP/1.1", 400),
        ("POST /stop HTTP/1.1", 400),
        ("GET /stop?db=/data/app.db HTTP/1.1", 404),
        ("GET /__init__ HTTP/1.1", 404),
        ("GET /sync?db=/data/app.db HTTP/1.1", 404),
        ("POST /status HTTP/1.1", 404),
        ("DELETE /status HTTP/1.1", 501),
        ("nonsense", 400),
    ],
)
def test_a_wrong_request_gets_a_code_and_a_reason(path: Path, line: str, code: int) -> None:
    status, body = exchange(path, line)
    if line.startswith(("GET", "POST")):
        assert f" {code} " in status
        assert json.loads(body)["error"]
    else:  # the standard library answers these itself, with a page
        assert f" {code} " in status or f"Error code: {code}" in status + body


def test_the_barrier_is_a_sync_that_may_be_asked_by_get(path: Path, fake: FakeReplicator) -> None:
    fake.released.set()
    status, body = exchange(path, "GET /barrier?db=/data/app.db HTTP/1.1")
    assert "200" in status
    assert json.loads(body)["durable"] == "1:7"


def test_a_barrier_whose_time_ran_out_tells_how_far_it_came(path: Path) -> None:
    status, body = exchange(path, "GET /barrier?db=/data/app.db&timeout=10ms HTTP/1.1")
    assert " 504 " in status
    assert json.loads(body) == {
        "error": "/data/app.db is not durable after 0.01 s",
        "code": "SyncTimeout",
        "durable": "1:6",
    }


def test_only_the_owner_may_connect(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_peer_that_hangs_holds_up_nobody(path: Path, fake: FakeReplicator) -> None:
    peers = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for peer in peers:
            peer.connect(str(path))
            peer.sendall(b"GET /sta")
        began = time.monotonic()
        assert control.status(path)["databases"]
        assert time.monotonic() - began < 2
    finally:
        for peer in peers:
            peer.close()


def test_beyond_the_limit_of_peers_one_is_hung_up_on_and_later_served_again(path: Path) -> None:
    peers = [socket.socket(socket.AF_UNIX) for _ in range(MAX_PEERS)]
    for peer in peers:
        peer.connect(str(path))
        peer.sendall(b"GET /sta")
    with pytest.raises(DaemonNotRunning):
        _until_refused(path)
    for peer in peers:
        peer.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            assert control.status(path)["databases"]
            return
        except DaemonNotRunning:
            assert time.monotonic() < deadline


def _until_refused(path: Path) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        control.status(path)


def test_the_socket_of_a_dead_replicator_is_replaced(tmp_path: Path, fake: FakeReplicator) -> None:
    path = tmp_path / "control.sock"
    code = "import socket,sys,os; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=20)
    assert path.exists()
    with serving(path, fake):
        assert control.status(path)["databases"]


def test_the_socket_of_a_living_replicator_stays(path: Path, fake: FakeReplicator) -> None:
    with pytest.raises(SocketInUse, match="another replicator answers"):
        ControlServer(path, fake)
    assert control.status(path)["databases"]


def test_a_file_that_is_no_socket_stays(tmp_path: Path, fake: FakeReplicator) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(UsageError, match="is no socket"):
        ControlServer(path, fake)
    assert path.read_text() == "data"


def test_closing_removes_the_socket_and_a_client_is_told_what_to_do(tmp_path: Path, fake: FakeReplicator) -> None:
    path = tmp_path / "control.sock"
    with serving(path, fake):
        pass
    assert not path.exists()
    with pytest.raises(DaemonNotRunning, match="start `replicator replicate`"):
        control.status(path)


def test_the_docs_name_every_request() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "replicator.md").read_text("utf-8")
    assert [
        f"{method} {route}"
        for method, routes in control.ROUTES.items()
        for route in routes
        if f"`{method} {route}" not in docs
    ] == []


def test_a_path_that_the_kernel_does_not_take_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        control.status(tmp_path / ("x" * 108))


def test_a_server_that_is_something_else_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            peer.recv(1000)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n<a>")
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DaemonNotRunning, match="does not answer as it should"):
            control.status(path)
        thread.join(5)


def test_the_usual_path_belongs_to_the_user() -> None:
    assert control.default_path({}, uid=0) == Path("/run/replicator.sock")
    assert control.default_path({"XDG_RUNTIME_DIR": "/run/user/7"}, uid=7) == Path("/run/user/7/replicator.sock")
    assert control.default_path({}, uid=7) == Path("/run/user/7/replicator.sock")
    assert control.default_path({"REPLICATOR_SOCKET": "/x.sock"}, uid=0) == Path("/x.sock")


def test_the_status_names_what_keeps_a_replica_from_being_thinned() -> None:
    assert control.status_document(APP)["upkeep_problem"] == ""
    stuck = replace(APP, upkeep_problem="the store is read-only")
    assert control.status_document(stuck)["upkeep_problem"] == "the store is read-only"
