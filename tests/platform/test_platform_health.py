"""Checks against real sockets: what passes, and how long an app can keep one waiting."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from minipaas.health import Probe, SocketProber


@contextmanager
def app_that(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that serves one connection."""

    def work() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(4096)
            serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=work)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(5)


def trickle(text: bytes) -> Callable[[socket.socket], None]:
    """Sends ``text`` again and again, byte by byte, for as long as somebody listens."""

    def serve(connection: socket.socket) -> None:
        waiting = threading.Event()
        while True:
            for byte in text:
                connection.sendall(bytes([byte]))
                waiting.wait(0.01)

    return serve


@pytest.mark.parametrize("text", [b"HTTP/1.1 2", b"HTTP/1.1 100 Continue\r\n\r\n", b"X"])
def test_an_answer_that_is_trickled_fails_at_the_deadline_of_the_check(text: bytes) -> None:
    began = time.monotonic()
    with app_that(trickle(text)) as port:
        words = SocketProber().probe("127.0.0.1", Probe("http", port, timeout_s=0.2))
    assert words == f"no answer on port {port} within 0.2 s"
    assert time.monotonic() - began < 1.0


def test_a_body_is_not_waited_for() -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        trickle(b"body")(connection)

    with app_that(serve) as port:
        assert SocketProber().probe("127.0.0.1", Probe("http", port, timeout_s=5.0)) == ""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", ""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", "GET /up gave 302"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "GET /up gave 503"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        (
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
            "got more than 65536 bytes when reading header line",
        ),
        (b"", "Remote end closed connection without response"),
    ],
)
def test_what_an_app_answers_decides(answer: bytes, words: str) -> None:
    with app_that(lambda connection: connection.sendall(answer)) as port:
        said = SocketProber().probe("127.0.0.1", Probe("http", port, path="/up"))
    assert said.removeprefix(f"port {port}: ").strip() == words
