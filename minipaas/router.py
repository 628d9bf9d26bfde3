"""The one table of routes of this node, applied to the edge as a whole.

Owns which route is in force. Never decides where a route goes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace

from minipaas.edge import Edge, Route
from minipaas.errors import EdgeError


class Router:
    """Thread-safe: one change of the edge at a time. A route is in the table only after the edge has taken it."""

    def __init__(self, edge: Edge, hold_s: float) -> None:
        self._edge, self._hold_s = edge, hold_s
        self._lock = threading.Lock()
        self._routes: dict[str, Route] = {}

    def route(self, app: str) -> Route | None:
        return self._routes.get(app)

    def routes(self) -> Mapping[str, Route]:
        return dict(self._routes)

    def set(self, app: str, hosts: tuple[str, ...], upstreams: tuple[str, ...]) -> None:
        self._change(app, Route(app, hosts, upstreams, hold_s=self._hold_s))

    def hold(self, app: str, hosts: tuple[str, ...]) -> None:
        """Requests wait from now on; those with an upstream finish there."""
        known = self._routes.get(app)
        self._change(app, Route(app, hosts, known.upstreams if known else (), held=True, hold_s=self._hold_s))

    def drop(self, app: str) -> None:
        self._change(app, None)

    def seed(self, routes: Iterable[Route]) -> None:
        """The first table of this process, in one step: the edge may have served the same routes all along. Raises EdgeError."""
        with self._lock:
            self._edge.start()
            self._apply({route.app: replace(route, hold_s=self._hold_s) for route in routes})

    def refresh(self) -> None:
        """Start the edge if it died, and give it the table again if it lost it. Raises EdgeError."""
        with self._lock:
            self._edge.start()
            self._edge.apply(list(self._routes.values()))

    def in_flight(self, upstream: str) -> int:
        """0 when the edge does not run: then nothing is in flight."""
        try:
            return self._edge.in_flight(upstream)
        except EdgeError:
            return 0

    def _change(self, app: str, route: Route | None) -> None:
        with self._lock:
            changed = {name: kept for name, kept in self._routes.items() if name != app}
            if route is not None:
                changed[app] = route
            if changed != self._routes:
                self._apply(changed)

    def _apply(self, routes: dict[str, Route]) -> None:
        self._edge.apply([routes[app] for app in sorted(routes)])
        self._routes = routes
