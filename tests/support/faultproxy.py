"""A proxy in front of an S3 server that breaks on command: refuses, hangs, delays, answers errors, cuts, swallows answers.

Owns its sockets, its threads and a log of the requests. Never changes what it forwards (signatures stay valid) but for the
faults it is told to make.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import BinaryIO, Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 16
_IDLE_TIMEOUT_S = 120.0
_SETTLE_S = 0.5
_FOREVER = 1 << 60


@dataclass(frozen=True)
class Request:
    """One that has ended. status: 0 when the client got no answer. forwarded: the server's status; 0 when it gave none.

    at_s: when it arrived; ended_s: when the last byte of the answer was sent; monotonic clock. asked_leave: the client
    waited for "100 Continue" before its body.
    """

    method: str
    path: str
    status: int
    forwarded: int
    at_s: float
    ended_s: float
    sent_bytes: int
    received_bytes: int
    asked_leave: bool


@dataclass
class _Fault:
    kind: str
    times: int
    methods: tuple[str, ...]
    path_part: str
    after_bytes: int = 0
    status: int = 0
    code: str = ""

    def fits(self, head: _Head) -> bool:
        return self.times > 0 and self.path_part in head.path and (not self.methods or head.method in self.methods)


class FaultProxy:
    """``with FaultProxy(server.endpoint) as proxy``: then ``proxy.endpoint`` stands for the server's.

    Each fault is for the next ``times`` requests (None: until ``heal``) with one of ``methods`` (none: all) and
    ``path_part`` in the path. The fault that was told first comes first. delay_ms: before each request is forwarded; set it
    at any time. The server is not needed for what is not forwarded.
    """

    def __init__(self, target: str, *, host: str = "127.0.0.1") -> None:
        parts = urlsplit(target)
        assert parts.hostname and parts.port
        self.delay_ms = 0.0
        self._target = (parts.hostname, parts.port)
        self._host = host
        self._port = 0
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._answering = 0
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._faults: list[_Fault] = []
        self._log: list[Request] = []
        self._healed = threading.Event()
        self._stopping = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def log(self) -> list[Request]:
        """Requests that have ended, in that order. A client that has its answer finds its request here."""
        with self._settled:
            self._settled.wait_for(lambda: self._answering == 0, _SETTLE_S)
            return list(self._log)

    def counts(self) -> Counter[str]:
        """Requests that have ended, by method."""
        return Counter(request.method for request in self.log)

    def clear_log(self) -> None:
        with self._lock:
            self._log.clear()

    # -- faults --------------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Refuse connections, and cut those there are, until ``heal``."""
        listener, self._listener = self._listener, None
        if listener is not None:
            _close(listener)
        self._cut_all()

    def hang(self, times: int | None = None, *, methods: Sequence[str] = (), path_part: str = "") -> None:
        """Take requests and give no answer until ``heal``, then cut."""
        self._add(_Fault("hang", _times(times), tuple(methods), path_part))

    def answer(
        self, status: int, times: int | None = 1, *, code: str = "", methods: Sequence[str] = (), path_part: str = ""
    ) -> None:
        """Answer with an S3 error document (nothing below 300), without asking the server. code: S3's, or the usual one."""
        code = code or {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}.get(status, f"Error{status}")
        self._add(_Fault("answer", _times(times), tuple(methods), path_part, status=status, code=code))

    def cut_response(
        self, after_bytes: int, times: int | None = 1, *, methods: Sequence[str] = ("GET",), path_part: str = ""
    ) -> None:
        """Cut the connection after so many bytes of the answer's body."""
        self._add(_Fault("cut_response", _times(times), tuple(methods), path_part, after_bytes))

    def cut_request(
        self, after_bytes: int, times: int | None = 1, *, methods: Sequence[str] = ("PUT",), path_part: str = ""
    ) -> None:
        """Forward so many bytes of the request's body, then cut both connections."""
        self._add(_Fault("cut_request", _times(times), tuple(methods), path_part, after_bytes))

    def swallow(
        self, times: int | None = 1, *, methods: Sequence[str] = ("PUT", "POST", "DELETE"), path_part: str = ""
    ) -> None:
        """Forward the request, wait until the server has done it, then cut the connection without an answer."""
        self._add(_Fault("swallow", _times(times), tuple(methods), path_part))

    def damage_request(self, times: int | None = 1, *, methods: Sequence[str] = ("PUT",), path_part: str = "") -> None:
        """Flip a bit in the first byte of the request's body on the way to the server."""
        self._add(_Fault("damage", _times(times), tuple(methods), path_part))

    def heal(self) -> None:
        """End all faults. The delay stays."""
        with self._lock:
            self._faults.clear()
            self._healed.set()
            self._healed = threading.Event()
        if self._listener is None and not self._stopping.is_set():
            self._listen()

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        self._listen()
        return self

    def stop(self) -> None:
        self._stopping.set()
        self._healed.set()
        self.refuse()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self) -> None:
        listener = socket.create_server((self._host, self._port), backlog=128)
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="faultproxy", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if self._listener is not listener:
                _close(client)
                return
            threading.Thread(target=self._serve, args=(client,), name="faultproxy-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        pair = _Pair(client, self._connect)
        try:
            self._enter(client)
            while self._serve_one(pair):
                pass
        except OSError:
            pass
        finally:
            for connection in pair.close():
                with self._lock:
                    self._connections.discard(connection)

    def _connect(self) -> socket.socket:
        server = socket.create_connection(self._target, timeout=_IDLE_TIMEOUT_S)
        self._enter(server)
        return server

    def _serve_one(self, pair: _Pair) -> bool:
        """Whether the connection may carry another request."""
        head = _read_head(pair.from_client)
        if head is None:
            return False
        exchange = _Exchange(head, pair, time.monotonic(), self._begin_answer)
        if self.delay_ms:
            self._stopping.wait(self.delay_ms / 1000)
        try:
            return exchange.run(self._take(head), self._healed)
        finally:
            with self._settled:
                self._log.append(exchange.request())
                self._answering -= exchange.answering
                self._settled.notify_all()

    def _begin_answer(self) -> None:
        with self._lock:
            self._answering += 1

    def _take(self, head: _Head) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.fits(head):
                    fault.times -= 1
                    return replace(fault)
        return None

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _enter(self, connection: socket.socket) -> None:
        connection.settimeout(_IDLE_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._connections.add(connection)

    def _cut_all(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _close(connection)


@dataclass(frozen=True)
class _Head:
    """First line and headers, as they came."""

    first: bytes
    lines: tuple[bytes, ...]

    @property
    def method(self) -> str:
        return self.first.split(b" ")[0].decode("latin-1")

    @property
    def path(self) -> str:
        return self.first.split(b" ")[1].decode("latin-1")

    @property
    def status(self) -> int:
        return int(self.first.split(b" ")[1])

    def header(self, name: bytes) -> bytes:
        for line in self.lines:
            if line[: len(name) + 1].lower() == name + b":":
                return line[len(name) + 1 :].strip()
        return b""

    def bytes(self, without: bytes = b"") -> bytes:
        kept = [line for line in self.lines if not without or line[: len(without) + 1].lower() != without + b":"]
        return b"".join([self.first, *kept, b"\r\n"])

    @property
    def keeps_alive(self) -> bool:
        return self.header(b"connection").lower() != b"close"


class _Pair:
    """The two connections of one client; that to the server is made when it is first needed."""

    def __init__(self, client: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self.client = client
        self.from_client: BinaryIO = client.makefile("rb")
        self._connect = connect
        self._server: socket.socket | None = None

    @property
    def server(self) -> socket.socket:
        if self._server is None:
            self._server = self._connect()
        return self._server

    @cached_property
    def from_server(self) -> BinaryIO:
        return self.server.makefile("rb")

    def close(self) -> list[socket.socket]:
        """The connections that were closed."""
        connections = [self.client] if self._server is None else [self.client, self._server]
        for connection in connections:
            _close(connection)
        return connections


class _Exchange:
    """One request and its answer."""

    def __init__(self, head: _Head, pair: _Pair, at_s: float, begin_answer: Callable[[], None]) -> None:
        self.answering = False
        self._begin_answer = begin_answer
        self._head = head
        self._pair = pair
        self._at_s = at_s
        self._status = 0
        self._forwarded = 0
        self._sent_bytes = 0
        self._received_bytes = 0

    def request(self) -> Request:
        return Request(
            self._head.method,
            self._head.path,
            self._status,
            self._forwarded,
            self._at_s,
            time.monotonic(),
            self._sent_bytes,
            self._received_bytes,
            bool(self._head.header(b"expect")),
        )

    def run(self, fault: _Fault | None, healed: threading.Event) -> bool:
        kind = fault.kind if fault else ""
        if self._head.header(b"expect"):
            self._pair.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "hang":
            healed.wait()
            return False
        if fault is not None and kind == "answer":
            return self._answer(fault)
        limit = fault.after_bytes if fault and kind == "cut_request" else _FOREVER
        if not self._forward(limit, damage=kind == "damage"):
            return False
        return self._answer_from_server(fault)

    def _forward(self, limit: int, *, damage: bool) -> bool:
        """Whether all of the request was forwarded."""
        damaged = not damage

        def send(data: bytes) -> bool:
            nonlocal damaged
            if not damaged:
                data, damaged = bytes([data[0] ^ 1]) + data[1:], True
            data = data[: limit - self._sent_bytes]
            self._pair.server.sendall(data)
            self._sent_bytes += len(data)
            return self._sent_bytes < limit

        # The proxy has given the leave that the client waited for; the header is not part of the signature.
        self._pair.server.sendall(self._head.bytes(without=b"expect"))
        return _relay_body(self._pair.from_client, self._head, send, until_closed=False)

    def _answer(self, fault: _Fault) -> bool:
        _relay_body(self._pair.from_client, self._head, lambda data: True, until_closed=False)
        body = (
            b""
            if fault.status < 300
            else f'<?xml version="1.0"?><Error><Code>{fault.code}</Code><Message>told to</Message></Error>'.encode()
        )
        etag = 'ETag: "told-to"\r\n' if fault.status < 300 else ""
        head = f"HTTP/1.1 {fault.status} Told\r\n{etag}Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self._status = fault.status
        self._begin()
        self._pair.client.sendall(head.encode() + (b"" if self._head.method == "HEAD" else body))
        return True

    def _begin(self) -> None:
        self.answering = True
        self._begin_answer()

    def _answer_from_server(self, fault: _Fault | None) -> bool:
        head = _read_head(self._pair.from_server)
        while head is not None and 100 <= head.status < 200:
            head = _read_head(self._pair.from_server)
        if head is None:
            return False
        self._forwarded = head.status
        swallow = fault is not None and fault.kind == "swallow"
        limit = fault.after_bytes if fault is not None and fault.kind == "cut_response" else _FOREVER

        def send(data: bytes) -> bool:
            data = data[: limit - self._received_bytes]
            self._received_bytes += len(data)
            if not swallow:
                self._pair.client.sendall(data)
            return self._received_bytes < limit

        self._begin()
        if not swallow:
            self._pair.client.sendall(head.bytes())
        has_body = self._head.method != "HEAD" and head.status not in (204, 304)
        whole = not has_body or _relay_body(self._pair.from_server, head, send, until_closed=True)
        if swallow or not whole:
            return False
        self._status = head.status
        return head.keeps_alive and self._head.keeps_alive and (not has_body or _has_length(head))


def _times(times: int | None) -> int:
    return _FOREVER if times is None else times


def _read_head(source: BinaryIO) -> _Head | None:
    """None at the end of the stream."""
    first = source.readline()
    if not first:
        return None
    lines = []
    while (line := source.readline()) not in (b"\r\n", b"\n", b""):
        lines.append(line)
    return _Head(first, tuple(lines))


def _has_length(head: _Head) -> bool:
    return bool(head.header(b"content-length")) or b"chunked" in head.header(b"transfer-encoding").lower()


def _relay_body(source: BinaryIO, head: _Head, send: Callable[[bytes], bool], *, until_closed: bool) -> bool:
    """Hand the body on, as it is framed. ``send`` says whether to go on. Whether the body came to its end."""
    if b"chunked" in head.header(b"transfer-encoding").lower():
        return _relay_chunked(source, send)
    length = head.header(b"content-length")
    if not length and not until_closed:
        return True
    return _relay_bytes(source, int(length) if length else _FOREVER, send, to_the_end=not length)


def _relay_bytes(source: BinaryIO, count: int, send: Callable[[bytes], bool], *, to_the_end: bool = False) -> bool:
    while count > 0:
        data = source.read1(min(count, _CHUNK_BYTES))  # type: ignore[attr-defined]  # BufferedReader's
        if not data:
            return to_the_end
        count -= len(data)
        if not send(data):
            return False
    return True


def _relay_chunked(source: BinaryIO, send: Callable[[bytes], bool]) -> bool:
    while True:
        line = source.readline()
        if not line or not send(line):
            return False
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        if not _relay_bytes(source, size + 2, send):
            return False
    while True:
        line = source.readline()
        if not line or not send(line):
            return False
        if line in (b"\r\n", b"\n"):
            return True


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
