"""The API's listening socket: who may hold a connection, and whose bodies are read.

Owns waitress and the bounds on what nobody has shown a token for: time, number of connections, bytes. Never answers a request that
is whole: that is the application's. All bodies are held in memory; nothing that a client sends is spooled to a disk from here.
"""

from __future__ import annotations

import resource
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any

import msgspec
from flask import Flask
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher
from waitress.utilities import Error, RequestEntityTooLarge

from minipaas.errors import BadRequest, PlatformError, TooMuch
from minipaas.settings import Limits

MAX_BODY_BYTES = 4 << 20
SMALL_BODY_BYTES = 64 << 10
MAX_HEADER_BYTES = 32 << 10
MAX_PIPELINED = 4
RECEIVE_BYTES = 32 << 10
VANISHED_S = 60

_Authenticate = Callable[[str], object]


@contextmanager
def listening(app: Flask, host: str, port: int, limits: Limits, authenticate: _Authenticate) -> Iterator[None]:
    """The application answers on all addresses of ``host`` while the context lasts. Raises OSError when they cannot be had.

    authenticate: given an Authorization header; raises PlatformError when it is nobody's.
    """
    bounds = _bounds(limits)
    adjustments = _adjustments(host, port, bounds)
    channels: dict[int, Any] = {}
    dispatcher = ThreadedTaskDispatcher()
    with ExitStack() as undo:
        undo.callback(wasyncore.close_all, channels)
        doors = [
            _Door(app, channels, dispatcher, adjustments, address, bounds, authenticate)
            for address in adjustments.listen
        ]
        leaving = Event()
        thread = Thread(target=_run, args=(channels, leaving), name="api", daemon=True)
        thread.start()
        undo.callback(thread.join, 2.0)
        undo.callback(doors[0].pull_trigger)
        undo.callback(leaving.set)
        undo.callback(dispatcher.shutdown, cancel_pending=True, timeout=1)
        dispatcher.set_thread_count(limits.api_threads)
        yield


def _run(channels: dict[int, Any], leaving: Event) -> None:
    """The thread that owns all connections. ``poll``, since ``select`` cannot watch descriptors above 1023."""
    while not leaving.is_set():
        wasyncore.poll2(1.0, channels)


@dataclass(frozen=True)
class Bounds:
    """connections: beyond it, those that wait longest give way. request_within_s: for headers and a small body, and between two
    requests. body_silence_s: within a large body of somebody who has a token."""

    connections: int
    request_within_s: float
    body_silence_s: float


def _bounds(limits: Limits) -> Bounds:
    """Connections leave half of the process's file descriptors to everything else."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Bounds(min(limits.connections, descriptors // 2), limits.request_within_s, limits.body_silence_s)


def _adjustments(host: str, port: int, bounds: Bounds) -> Adjustments:
    """One request of a connection at a time is worked on."""
    return Adjustments(
        host=host,
        port=port,
        ident=None,
        cleanup_interval=1,
        channel_request_lookahead=1,
        connection_limit=bounds.connections + 64,
        recv_bytes=RECEIVE_BYTES,
        max_request_header_size=MAX_HEADER_BYTES,
        max_request_body_size=MAX_BODY_BYTES + 1,
        inbuf_overflow=MAX_BODY_BYTES + 1,
    )


@dataclass(frozen=True)
class Waiting:
    """A connection that has not sent a whole request yet. since: seconds of the monotonic clock."""

    address: str
    since: float
    key: int = 0


def give_way(waiting: Sequence[Waiting], surplus: int) -> list[Waiting]:
    """Which to close: those that wait longest, of the address that has most of them."""
    crowds: defaultdict[str, list[Waiting]] = defaultdict(list)
    for each in sorted(waiting, key=lambda each: each.since):
        crowds[each.address].append(each)
    leaving: list[Waiting] = []
    while len(leaving) < min(surplus, len(waiting)):
        leaving.append(max(crowds.values(), key=len).pop(0))
    return leaving


class _Refusal(Error):  # type: ignore[misc]
    """An error of ours, told by waitress, as the API would tell it."""

    def __init__(self, error: PlatformError) -> None:
        super().__init__(str(error))
        self._error = error

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        told = {"error": {"code": type(self._error).__name__, "message": str(self._error)}}
        return f"{self._error.http_status} Refused", [("Content-Type", "application/json")], msgspec.json.encode(told)


class _Request(HTTPRequestParser):  # type: ignore[misc]
    """A request as it comes in. admitted: it has a body of some size, and comes from somebody who has a token."""

    admitted = False

    def __init__(self, adj: Adjustments, *, authenticate: _Authenticate) -> None:
        super().__init__(adj)
        self._authenticate = authenticate

    def received(self, data: bytes) -> int:
        had_headers = self.headers_finished
        try:
            consumed: int = super().received(data)
        except ValueError as error:
            self._refuse(BadRequest(f"the first line of the request makes no sense: {error}"))
            return len(data)
        if isinstance(self.error, RequestEntityTooLarge):
            self._refuse(TooMuch(f"a request may have {MAX_BODY_BYTES >> 20} MiB; send files in parts to /v1/uploads"))
        elif self.headers_finished and not had_headers and not self.completed:
            self._admit()
        return consumed

    def _admit(self) -> None:
        """Before anything of a body is kept that is not small."""
        if not self.chunked and self.content_length <= SMALL_BODY_BYTES:
            return
        try:
            self._authenticate(self.headers.get("AUTHORIZATION", ""))
            self.admitted = True
        except PlatformError as error:
            self._refuse(error)

    def _refuse(self, error: PlatformError) -> None:
        self.error = _Refusal(error)
        self.expect_continue = False
        self.completed = True


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection. waiting_since: from when on it owes a request; heard: when it last sent anything. unsent: bytes of answers that
    it had not taken a moment ago."""

    unsent = 0

    def __init__(self, server: _Door, sock: socket.socket, addr: Any, adj: Adjustments, map: dict[int, Any]) -> None:
        super().__init__(server, sock, addr, adj, map=map)
        self.parser_class = partial(_Request, authenticate=server.authenticate)
        self.waiting_since = self.heard = time.monotonic()

    def received(self, data: bytes) -> bool:
        self.heard = time.monotonic()
        more: bool = super().received(data)
        if len(self.requests) > MAX_PIPELINED:
            self.handle_close()
        return more

    def end(self) -> None:
        """Closed at the next event, which this makes happen. Not at once: its descriptor is being polled, and a connection that
        is accepted meanwhile could be given the same number."""
        self.will_close = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    @property
    def sends_admitted_body(self) -> bool:
        return self.request is not None and self.request.admitted


class _Door(TcpWSGIServer):  # type: ignore[misc]
    """One listening socket. Its methods run in the one thread that owns all connections, but ``add_task``."""

    channel_class = _Channel

    def __init__(
        self,
        app: Flask,
        channels: dict[int, Any],
        dispatcher: ThreadedTaskDispatcher,
        adjustments: Adjustments,
        address: Any,
        bounds: Bounds,
        authenticate: _Authenticate,
    ) -> None:
        self._bounds, self.authenticate = bounds, authenticate
        super().__init__(app, channels, dispatcher=dispatcher, adj=adjustments, sockinfo=address)

    def set_socket_options(self, conn: socket.socket) -> None:
        """A client whose host has vanished, or that takes nothing of its answer, is gone after ``VANISHED_S``."""
        super().set_socket_options(conn)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, VANISHED_S // 2)
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, VANISHED_S // 6)
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_S * 1000)

    def add_task(self, channel: _Channel) -> None:
        channel.waiting_since = time.monotonic()
        super().add_task(channel)

    def handle_accept(self) -> None:
        super().handle_accept()
        if len(self.active_channels) > self._bounds.connections:
            self.next_channel_cleanup = 0

    def maintenance(self, now: float) -> None:
        """Every second, and when a connection too many has come."""
        waiting = self._end_overdue(time.monotonic())
        staying = sum(1 for channel in self.active_channels.values() if not channel.will_close)
        for each in give_way(waiting, staying - self._bounds.connections):
            self.active_channels[each.key].end()

    def _end_overdue(self, now: float) -> list[Waiting]:
        """Those that wait and still may."""
        waiting = []
        for key, channel in self.active_channels.items():
            if channel.will_close:
                continue
            if channel.total_outbufs_len != channel.unsent:
                channel.unsent, channel.waiting_since = channel.total_outbufs_len, now
            if channel.requests:
                channel.waiting_since = now
            elif channel.sends_admitted_body:
                if now - channel.heard > self._bounds.body_silence_s:
                    channel.end()
            elif now - channel.waiting_since > self._bounds.request_within_s:
                channel.end()
            else:
                waiting.append(Waiting(str(channel.addr[0]), channel.waiting_since, key))
        return waiting
