"""The edge: what the platform asks of the HTTP server in front of the apps.

Owns the interface. Adapters: ``caddy`` (the real one), ``fake``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Route:
    """Requests for ``hosts`` go to ``upstreams`` ("10.88.0.5:8080"), chosen by least connections.

    held: requests wait, at most ``hold_s`` seconds, until the route is applied again with held False; those already with an
    upstream finish there. A route with no upstream and not held answers 503 with a page that names the app.
    """

    app: str
    hosts: tuple[str, ...]
    upstreams: tuple[str, ...]
    held: bool = False
    hold_s: float = 60.0


class Edge(Protocol):
    def start(self) -> None:
        """Make sure it runs: adopt one that runs already (it survives restarts of minipaas), else start it. Raises EdgeError."""
        ...

    def apply(self, routes: Sequence[Route]) -> None:
        """Make these the only routes, without dropping a connection. Does nothing when they are in force already."""
        ...

    def in_flight(self, upstream: str) -> int:
        """Requests that an upstream is answering now."""
        ...

    def stop(self) -> None:
        """End it for good (uninstall, tests); a stopping ``minipaas serve`` leaves it running."""
        ...
