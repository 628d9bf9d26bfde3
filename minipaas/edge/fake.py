"""An edge in this process, for tests: it keeps the contract of ``Edge`` and passes requests to real upstreams.

Owns nothing outside the process: it listens nowhere; a test sends through ``request``.
"""

from __future__ import annotations

import http.client
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minipaas.edge import Route
from minipaas.errors import EdgeError

DIAL_FOR_S = 3.0
DIAL_EVERY_S = 0.05


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class FakeEdge:
    """``Edge`` without a server. applied: how often routes really changed. started: whether it runs."""

    def __init__(self) -> None:
        self.applied = 0
        self.started = False
        self._routes: tuple[Route, ...] = ()
        self._in_flight: Counter[str] = Counter()
        self._changed = threading.Condition()

    # -- Edge --

    def start(self) -> None:
        self.started = True

    def apply(self, routes: Sequence[Route]) -> None:
        if not self.started:
            raise EdgeError("the edge does not run; start it first")
        with self._changed:
            if tuple(routes) != self._routes:
                self._routes = tuple(routes)
                self.applied += 1
                self._changed.notify_all()

    def in_flight(self, upstream: str) -> int:
        with self._changed:
            return self._in_flight[upstream]

    def stop(self) -> None:
        self.started = False
        with self._changed:
            self._routes = ()

    # -- what tests ask --

    @property
    def routes(self) -> tuple[Route, ...]:
        return self._routes

    def request(self, host: str, method: str = "GET", path: str = "/", body: bytes = b"") -> Answer:
        """The answer to one request; waits while the route is held."""
        route = self._await_route(host)
        if route is None:
            return Answer(404, f"No app on this server answers to {host}.\n".encode())
        if route.held:
            return Answer(
                503, f"{route.app} is being replaced and was not ready in time.\n".encode(), {"Retry-After": "5"}
            )
        if not route.upstreams:
            return Answer(503, f"{route.app} has no running machine.\n".encode(), {"Retry-After": "5"})
        return self._pass_on(route, host, method, path, body)

    def _await_route(self, host: str) -> Route | None:
        began = time.monotonic()
        with self._changed:
            while (route := self._find(host)) and route.held:
                left_s = began + route.hold_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    return self._find(host)
            return route

    def _find(self, host: str) -> Route | None:
        return next((route for route in self._routes if host in route.hosts), None)

    def _pass_on(self, route: Route, host: str, method: str, path: str, body: bytes) -> Answer:
        limit = time.monotonic() + DIAL_FOR_S
        while True:
            upstream = min(route.upstreams, key=self.in_flight)
            connection = http.client.HTTPConnection(upstream, timeout=30)
            try:
                connection.connect()
            except OSError:
                if time.monotonic() > limit:
                    page = f"{route.app} does not accept connections.\n".encode()
                    return Answer(503, page, {"Retry-After": "5"})
                time.sleep(DIAL_EVERY_S)
                route = self._find(host) or route
                continue
            return self._exchange(connection, upstream, host, method, path, body)

    def _exchange(
        self, connection: http.client.HTTPConnection, upstream: str, host: str, method: str, path: str, body: bytes
    ) -> Answer:
        request_id = str(uuid.uuid4())
        headers = {"Host": host, "X-Request-Id": request_id, "Fly-Request-Id": request_id, "X-Forwarded-Host": host}
        self._count(upstream, 1)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.read(), dict(response.getheaders()))
        except (OSError, http.client.HTTPException):
            return Answer(502, f"{host} broke off or gave no answer.\n".encode())
        finally:
            connection.close()
            self._count(upstream, -1)

    def _count(self, upstream: str, change: int) -> None:
        with self._changed:
            self._in_flight[upstream] += change
