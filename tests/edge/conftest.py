"""Real upstream servers, and both edges behind one way of sending requests."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minipaas.edge import Edge
from minipaas.edge.caddy import CaddyEdge
from minipaas.edge.fake import Answer, FakeEdge


class Upstream:
    """An app: tells what it received; ``/slow`` answers when ``let_go`` is set, ``/break`` closes the connection."""

    def __init__(self, name: str, port: int = 0) -> None:
        self.name, self.seen, self.let_go = name, [], threading.Event()
        self._connections: list[socket.socket] = []
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                upstream._connections.append(self.connection)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                upstream.seen.append(self.path)
                if self.path.startswith("/slow"):
                    upstream.let_go.wait(20)
                if self.path == "/break":
                    self.close_connection = True
                    return
                answer = body if self.path == "/echo" else json.dumps(self._told(body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def _told(self, body: bytes) -> dict[str, Any]:
                return {
                    "name": upstream.name,
                    "path": self.path,
                    "size": len(body),
                    "headers": dict(self.headers.items()),
                }

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with_suppressed(connection.close)


def with_suppressed(act: Callable[[], object]) -> None:
    try:
        act()
    except OSError:
        pass


@dataclass
class Subject:
    """An edge and how to send it a request."""

    edge: Edge
    send: Callable[..., Answer]


@pytest.fixture
def upstream() -> Iterator[Callable[..., Upstream]]:
    started: list[Upstream] = []

    def start(name: str = "a", port: int = 0) -> Upstream:
        started.append(Upstream(name, port))
        return started[-1]

    yield start
    for one in started:
        with_suppressed(one.kill)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Place:
    data_dir: Path
    run_dir: Path
    port: int

    def edge(self) -> CaddyEdge:
        return CaddyEdge(self.data_dir, self.run_dir, ("127.0.0.1", self.port))

    def send(
        self, host: str, method: str = "GET", path: str = "/", body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Host": host} | (headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.read(), dict(response.getheaders()))
        finally:
            connection.close()


@pytest.fixture
def place() -> Iterator[Place]:
    """A short directory (socket paths), a free port; whatever Caddy was started there is ended."""
    root = Path(tempfile.mkdtemp(prefix="edge", dir="/tmp"))
    found = Place(root / "data", root / "run", free_port())
    yield found
    found.edge().stop()
    shutil.rmtree(root)


@pytest.fixture
def caddy(place: Place) -> CaddyEdge:
    edge = place.edge()
    edge.start()
    return edge


@pytest.fixture(params=["fake", pytest.param("caddy", marks=pytest.mark.real)])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "fake":
        fake = FakeEdge()
        fake.start()
        return Subject(fake, fake.request)
    return Subject(request.getfixturevalue("caddy"), request.getfixturevalue("place").send)


@pytest.fixture
def until() -> Callable[..., None]:
    def wait(holds: Callable[[], bool], limit_s: float = 10.0) -> None:
        deadline = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    return wait


@pytest.fixture
def in_background() -> Iterator[Callable[..., list[Any]]]:
    """Call something in a thread; the list has its result when it is done."""
    threads: list[threading.Thread] = []

    def call(act: Callable[[], Any]) -> list[Any]:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(act()), daemon=True)
        threads.append(thread)
        thread.start()
        return results

    yield call
    for thread in threads:
        thread.join(30)
