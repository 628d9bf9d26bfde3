"""`replicator replicate` in operation: another configuration, systemd, metrics, the program beside it. Processes of their own."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import apsw
import pytest

from replicator import control
from replicator.errors import DaemonNotRunning

ROOT = Path(__file__).parents[2]
LIMIT_S = 20.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


class Place:
    """A folder with databases, a configuration, and where a supervisor listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "replicator.yml"
        self.socket = folder / "control.sock"
        self.log = folder / "log"
        self.supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.supervisor.bind(str(folder / "notify"))
        self.supervisor.settimeout(LIMIT_S)

    def database(self, name: str) -> Path:
        path = self.folder / f"{name}.db"
        connection = apsw.Connection(str(path))
        connection.execute(
            "PRAGMA journal_mode=wal; CREATE TABLE IF NOT EXISTS t(v); INSERT INTO t VALUES (1)"
        ).fetchall()
        connection.close()
        return path

    def configure(self, *names: str, top: str = "", replica: str = "") -> None:
        entries = "".join(
            f"- path: {self.folder}/{name}.db\n  replica: {{url: 'file://{self.folder}/bucket/{name}'{replica}}}\n"
            for name in names
        )
        self.config.write_text(f"{top}\ndbs:\n{entries}")

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("REPLICATOR_", "LITESTREAM_"))}
        return {
            **kept,
            "PYTHONPATH": str(ROOT),
            "REPLICATOR_SOCKET": str(self.socket),
            "NOTIFY_SOCKET": str(self.folder / "notify"),
            "WATCHDOG_USEC": "300000",
        }

    @contextmanager
    def running(self, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
        given = arguments or ("--config", self.config)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "replicator", "replicate", *map(str, given)],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        try:
            self.told("READY=1")
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(LIMIT_S)

    def told(self, state: str) -> None:
        """Wait until the supervisor was told this."""
        while not self.supervisor.recv(1000).decode().startswith(state):
            pass

    def reload(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGHUP)
        self.told("RELOADING=1\nMONOTONIC_USEC=")
        self.told("READY=1")

    def protected(self) -> list[str]:
        try:
            return [
                Path(each["path"]).stem
                for each in control.status(self.socket)["databases"]
                if each["protection"] == "protected"
            ]
        except DaemonNotRunning:
            return []

    def run(self, *arguments: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "replicator", *map(str, arguments)],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.supervisor.close()


def test_a_reload_takes_up_what_is_new_and_a_wrong_file_changes_nothing(place: Place) -> None:
    place.database("a"), place.database("b")
    place.configure("a")
    with place.running() as process:
        eventually(lambda: place.protected() == ["a"])
        place.configure("a", "b")
        place.reload(process)
        eventually(lambda: place.protected() == ["a", "b"])
        assert "loaded again: 1 added, 0 changed, 0 removed, 1 as before" in place.log.read_text()
        place.configure("b", top="nonsense: 1")
        place.reload(process)
        assert place.protected() == ["a", "b"]
        wrong = f"{place.config}:1: nonsense: unknown key"
        assert f"the one from before stays in use: {wrong}" in place.log.read_text()
        assert control.info(place.socket)["reload_problem"].startswith(wrong)
        place.configure("b", top="addr: ':9'")
        place.reload(process)
        assert place.protected() == ["b"]
        assert control.info(place.socket)["reload_problem"] == ""
        assert "a change of addr takes effect at the next start" in place.log.read_text()
        place.told("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        place.told("STOPPING=1")
        assert process.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_without_a_file_a_hangup_ends_it_in_order(place: Place) -> None:
    database = place.database("a")
    with place.running(database, f"file://{place.folder}/bucket/a") as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(LIMIT_S) == 0
    assert "everything is in the store" in place.log.read_text()


@pytest.mark.slow
def test_databases_come_and_go_by_commands(place: Place) -> None:
    place.database("a")
    other = place.database("b")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place.configure("a", top=f"addr: 127.0.0.1:{port}", replica=", put-budget: {per-hour: 60}")
    with place.running():
        url = f"file://{place.folder}/bucket/b"
        assert "until the replicator ends" in place.run("register", other, url)
        eventually(lambda: place.protected() == ["a", "b"])
        listed = place.run("list")
        assert url in listed and listed.count("protected") == 2
        assert "2 protected, 0 catching up, 0 not protected" in place.run("info")
        assert "is stopped: everything is in the store, up to 1:" in place.run("stop", other)
        assert "it was stopped by `replicator stop`" in place.run("status")
        assert "it was stopped" in place.run("sync", "--wait", other, code=1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert f'replicator_not_protected{{db="{other}"}} 1.0' in answer.read().decode()
        place.run("start", other)
        place.run("sync", "--wait", other)
        assert "everything is in the store" in place.run("unregister", other)
        assert "is not replicated here" in place.run("unregister", other, code=1)
        assert "PUTS/H" in place.run("status")


@pytest.mark.slow
def test_an_address_that_is_taken_stops_it_before_it_is_ready(place: Place) -> None:
    place.database("a")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        place.configure("a", top=f"addr: {address}")
        assert f"addr: nothing can listen at {address}" in place.run("replicate", "--config", place.config, code=2)


@pytest.mark.slow
def test_the_heartbeat_begins_with_protection_and_its_url_is_in_no_log(place: Place) -> None:
    asked = threading.Event()

    class Monitor(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    place.database("a")
    with HTTPServer(("127.0.0.1", 0), Monitor) as monitor:
        thread = threading.Thread(target=monitor.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{monitor.server_port}/token-of-the-monitor"
        place.configure("a", top=f"heartbeat-url: {url}\nheartbeat-interval: 100ms")
        with place.running():
            assert asked.wait(LIMIT_S)
        monitor.shutdown()
        thread.join()
    assert "token-of-the-monitor" not in place.log.read_text()


def test_a_unit_is_printed(place: Place) -> None:
    unit = place.run("systemd-unit", "--config", "/srv/r.yml")
    assert f'ExecStart="{sys.executable}" -P -m replicator replicate --config "/srv/r.yml"\n' in unit


# -- the program beside ------------------------------------------------------------------------------------------------


def python(program: str) -> str:
    return shlex.join([sys.executable, "-c", program])


@pytest.mark.slow
def test_a_program_that_cannot_be_run_leaves_no_socket_behind(place: Place) -> None:
    database = place.database("a")
    place.run("replicate", "--exec", "nowhere/program", database, f"file://{place.folder}/bucket/a", code=2)
    assert not place.socket.exists()


@pytest.mark.slow
def test_a_program_that_is_ended_by_a_signal_gives_the_code_that_a_shell_gives(place: Place) -> None:
    database = place.database("a")
    program = python("import os; os.kill(os.getpid(), 9)")
    url = f"file://{place.folder}/bucket/a"
    assert "has ended with -9" in place.run("replicate", "--exec", program, database, url, code=137)


@pytest.mark.slow
def test_a_program_that_ignores_the_signal_is_killed_after_the_time_that_it_has(place: Place) -> None:
    database = place.database("a")
    ready = place.folder / "program-is-ready"
    program = python(
        "import pathlib,signal,sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); [signal.pause() for _ in iter(int, 1)]"
    )
    url = f"file://{place.folder}/bucket/a"
    with place.running("--exec", program, "--shutdown-timeout", "500ms", database, url) as process:
        eventually(ready.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 137
    assert "does not end within 0.5 s; it is killed" in place.log.read_text()
    assert "everything is in the store" in place.log.read_text()
