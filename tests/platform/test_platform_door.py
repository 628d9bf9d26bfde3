"""The API's listening socket: what those who show no token can hold, and for how long."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest
from flask import Flask, Response, request
from platform_support import QUICK, until

from minipaas.errors import NotAuthorised
from minipaas.web.door import MAX_BODY_BYTES, MAX_PIPELINED, Waiting, give_way, listening

LIMITS = replace(QUICK, connections=20, request_within_s=0.3, body_silence_s=5.0, api_threads=2)
TOKEN = "Authorization: Bearer good"


@dataclass
class Entrance:
    """An application behind the door. bodies: sizes of what reached it."""

    port: int
    bodies: list[int] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    def connect(self, sent: str = "") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(sent.encode())
        return connection

    def ask(self, *headers: str, method: str = "GET", path: str = "/") -> socket.socket:
        return self.connect(request_text(*headers, method=method, path=path))


def request_text(*headers: str, method: str = "GET", path: str = "/") -> str:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *headers, "", ""])


@pytest.fixture
def entrance() -> Iterator[Entrance]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        entrance = Entrance(probe.getsockname()[1])
    app = Flask(__name__)

    @app.route("/", methods=["GET", "PUT"])
    def whole() -> str:
        entrance.bodies.append(len(request.get_data()))
        return "hello"

    @app.get("/stream")
    def stream() -> Response:
        def lines() -> Iterator[bytes]:
            yield b"first\n"
            entrance.go_on.wait(10)
            yield b"last\n"

        return Response(lines())

    with listening(app, "127.0.0.1", entrance.port, LIMITS, authenticate):
        yield entrance


def authenticate(header: str) -> None:
    if header != "Bearer good":
        raise NotAuthorised("this token is not known here")


def answer(connection: socket.socket) -> str:
    """All that comes until the server closes the connection, or has sent a body that is whole."""
    got = b""
    while chunk := connection.recv(65536):
        got += chunk
        if got.endswith((b"hello", b"0\r\n\r\n", b"}}")):
            break
    return got.decode()


def is_closed(connection: socket.socket) -> bool:
    """Within the time-out of the socket."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_silent_connections_beyond_the_limit_do_not_keep_anybody_out(entrance: Entrance) -> None:
    with ExitStack() as silent:
        for _ in range(LIMITS.connections * 3):
            silent.enter_context(entrance.connect("GET / HTTP/1.1\r\nX: "))
        began = time.monotonic()
        with entrance.ask() as connection:
            assert "200 OK" in answer(connection)
        assert time.monotonic() - began < 1.0


def test_a_connection_that_sends_no_whole_request_is_closed(entrance: Entrance) -> None:
    with entrance.connect() as silent, entrance.connect("GET / HT") as begun, entrance.connect() as slow:
        slow.settimeout(0.02)
        until(lambda: trickled_until_closed(slow))
        assert is_closed(silent)
        assert is_closed(begun)


def trickled_until_closed(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"X")
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("how", [f"Content-Length: {1 << 20}", "Transfer-Encoding: chunked"])
def test_a_body_of_nobody_is_refused_before_it_is_sent(entrance: Entrance, how: str) -> None:
    with entrance.ask(how, "Expect: 100-continue", method="PUT") as connection:
        told = answer(connection)
    assert told.startswith("HTTP/1.1 401 ")
    assert json.loads(told.partition("\r\n\r\n")[2])["error"]["code"] == "NotAuthorised"
    assert entrance.bodies == []


def test_a_body_beyond_the_limit_is_refused_even_with_a_token(entrance: Entrance) -> None:
    with entrance.ask(TOKEN, f"Content-Length: {MAX_BODY_BYTES + 1}", method="PUT") as connection:
        assert answer(connection).startswith("HTTP/1.1 413 ")


def test_chunks_beyond_the_limit_are_refused(entrance: Entrance) -> None:
    with entrance.ask(TOKEN, "Transfer-Encoding: chunked", method="PUT") as connection:
        connection.sendall(f"{MAX_BODY_BYTES + 1:x}\r\n".encode() + bytes(MAX_BODY_BYTES + 1))
        assert answer(connection).startswith("HTTP/1.1 413 ")


def test_the_largest_body_passes(entrance: Entrance) -> None:
    with entrance.ask(TOKEN, f"Content-Length: {MAX_BODY_BYTES}", method="PUT") as connection:
        connection.sendall(bytes(MAX_BODY_BYTES))
        assert "200 OK" in answer(connection)
    assert entrance.bodies == [MAX_BODY_BYTES]


def test_slow_bodies_with_a_token_and_answers_that_last_are_not_cut(entrance: Entrance) -> None:
    with (
        entrance.ask(TOKEN, f"Content-Length: {1 << 20}", method="PUT") as slow,
        entrance.ask(path="/stream") as follower,
        entrance.connect() as silent,
    ):
        assert is_closed(silent)
        slow.sendall(bytes(1 << 20))
        assert "200 OK" in answer(slow)
        entrance.go_on.set()
        assert "last" in answer(follower)


def test_requests_that_are_heaped_up_end_the_connection(entrance: Entrance) -> None:
    with entrance.connect(request_text(path="/stream") * (MAX_PIPELINED + 1)) as heaping:
        entrance.go_on.set()
        with pytest.raises((ConnectionError, AssertionError)):
            assert answer(heaping).count("last") == MAX_PIPELINED + 1


@pytest.mark.parametrize(
    "junk", ["GET http://[x HTTP/1.1\r\n\r\n", "\0\r\n\r\n", request_text("Content-Length: -1"), "A" * 70_000]
)
def test_what_is_no_request_is_refused(entrance: Entrance, junk: str) -> None:
    with entrance.connect(junk) as connection:
        assert connection.recv(13)[9:] in (b"400 ", b"431 ")


def test_the_oldest_of_the_largest_crowd_gives_way() -> None:
    crowd = [Waiting("10.0.0.9", float(since), key=since) for since in range(3, 6)]
    few = [Waiting("127.0.0.1", 1.0), Waiting("10.0.0.1", 2.0)]
    assert [each.key for each in give_way([*crowd, *few], 2)] == [3, 4]
    assert give_way([*crowd, *few], -1) == []
    assert len(give_way(few, 9)) == 2
