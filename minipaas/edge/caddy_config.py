"""Caddy's configuration as values: routes in, JSON and small files out. Pure.

Owns the shape of the configuration and the way requests are held. Never talks to Caddy (``caddy`` does).

Where an app's requests go is not in the configuration but in small files which it names (``dial: {file.PATH}``) and which Caddy
reads for every attempt. A deploy changes such a file and reloads nothing: a reload cancels the retries of the configuration
before it, and drops connections whose request has not arrived yet.

How requests are held: the file names a socket that does not exist. Dialling fails, and a failed dial is tried again, with the
body of the request still unread, until the file names a machine or the wait is over.

A reload is needed when an app or a host comes or goes. A request whose retries it cut short goes through a socket to the
server ``inner`` of the configuration that is then in force, and waits there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaas.edge import Route

Json = dict[str, Any]

DIAL_TIMEOUT = "2s"
RETRY_DIAL_MS = 3000
RETRY_EVERY = "50ms"
# Each held request costs Caddy some 50 µs of processor time at this interval, and waits at most this much too long.
RETRY_HELD_EVERY = "100ms"
# Shorter than the keep-alive of usual servers (gunicorn 2 s, node and uvicorn 5 s), so that a request is not sent on a
# connection which the app is just closing.
IDLE_UPSTREAM = "1500ms"
# An open WebSocket outlives reloads of the configuration; Caddy closes it at the first one otherwise.
STREAM_CLOSE_DELAY = "24h"
MAX_HEADER_BYTES = 64 * 1024
SPOOFABLE_HEADERS = ["Fly-*", "Minipaas-*", "Forwarded", "X-Real-Ip", "X-Forwarded-Ssl", "X-Forwarded-Port"]
HOPS = "Minipaas-Hops"
_NEVER: Json = {"not": [{}]}


@dataclass(frozen=True)
class Site:
    """Where one Caddy lives. listen: address:port for HTTP."""

    listen: str
    run_dir: Path
    storage: Path
    log_file: Path

    @property
    def admin_socket(self) -> Path:
        return self.run_dir / "caddy-admin.sock"

    @property
    def again_file(self) -> Path:
        """Says where ``inner`` of the newest configuration listens."""
        return self.run_dir / "again"

    def inner(self, generation: int) -> str:
        """Where the inner server of one configuration listens. Another for each, so that none is met while it closes."""
        return f"unix/{self.run_dir / f'inner-{generation}.sock'}"

    @property
    def upstream_dir(self) -> Path:
        return self.run_dir / "upstreams"

    @property
    def held(self) -> str:
        """The dial address of a held app; nothing ever listens there."""
        return f"unix/{self.run_dir / 'held.sock'}"

    @property
    def down(self) -> str:
        """The dial address of an app without machine; nothing ever listens there."""
        return f"unix/{self.run_dir / 'down.sock'}"

    def upstream_file(self, app: str, index: int) -> Path:
        return self.upstream_dir / f"{app}.{index}"


def upstream_files(site: Site, routes: Sequence[Route]) -> dict[Path, str]:
    """What each upstream file has to say."""
    files = {}
    for route in routes:
        for index in range(_width(route)):
            path = site.upstream_file(route.app, index)
            files[path] = site.held if route.held else route.upstreams[index] if route.upstreams else site.down
    return files


def starting(site: Site) -> Json:
    """Before the first routes are known every request is told to come back."""
    page = _page(503, "This server is starting; try again in a few seconds.\n", retry_after_s=2)
    return _config(site, {"edge": _server(site.listen, [{"handle": [page]}])})


def build(site: Site, routes: Sequence[Route], generation: int) -> Json:
    """The whole configuration. It is the same for routes that differ only in addresses and in being held."""
    apps = [_app_route(site, route) for route in sorted(routes, key=lambda route: route.app) if route.hosts]
    unknown = {"handle": [_page(404, "No app on this server answers to {http.request.host}.\n")]}
    edge = _server(site.listen, [{"handle": _clean_headers()}, *apps, unknown])
    inner = _server(f"{site.inner(generation)}|0600", [*apps, unknown])
    # The first hop has set the forwarding headers; here they pass as they are.
    inner["trusted_proxies_unix"] = True
    for server in (edge, inner):
        server["errors"] = {"routes": [_again(site), *_error_pages()]}
    return _config(site, {"edge": edge, "inner": inner})


def _width(route: Route) -> int:
    return max(1, len(route.upstreams))


def _config(site: Site, servers: Json) -> Json:
    writer: Json = {"output": "file", "filename": str(site.log_file), "roll_size_mb": 10, "roll_keep": 3}
    return {
        "admin": {"listen": f"unix/{site.admin_socket}|0600", "config": {"persist": False}},
        # The admin endpoint warns at each reload that a unix socket has no host to check.
        "logging": {"logs": {"default": {"writer": writer, "level": "WARN", "exclude": ["admin"]}}},
        "storage": {"module": "file_system", "root": str(site.storage)},
        # No grace period: what an old configuration has begun may take as long as it needs.
        "apps": {"http": {"servers": servers}},
    }


def _server(listen: str, routes: list[Json]) -> Json:
    return {
        "listen": [listen],
        "protocols": ["h1", "h2c"],
        "automatic_https": {"disable": True},
        "read_header_timeout": "10s",
        "idle_timeout": "2m",
        "max_header_bytes": MAX_HEADER_BYTES,
        "routes": routes,
    }


def _clean_headers() -> list[Json]:
    """Remove what clients may not say, set what apps rely on. X-Forwarded-For, -Proto, -Host and Via are Caddy's own."""
    port, request_id = ["{http.request.local.port}"], ["{http.request.uuid}"]
    said = {
        "Fly-Client-Ip": ["{http.request.remote.host}"],
        "Fly-Forwarded-Port": port,
        "X-Forwarded-Port": port,
        "Fly-Request-Id": request_id,
        "X-Request-Id": request_id,
    }
    # Two handlers: within one, Caddy deletes after it has set.
    return [
        {"handler": "headers", "request": {"delete": SPOOFABLE_HEADERS}},
        {"handler": "headers", "request": {"set": said}},
    ]


def _app_route(site: Site, route: Route) -> Json:
    """Choose by what the first upstream file says when the request arrives."""
    hold_ms = round(route.hold_s * 1000)
    down = _page(503, f"{route.app} has no running machine; try again in a few seconds.\n", retry_after_s=5)
    to = f"{{file.{site.upstream_file(route.app, 0)}}}"
    choice = [
        {"match": [{"vars": {"to": [site.down]}}], "handle": [down], "terminal": True},
        {"match": [{"vars": {"to": [site.held]}}], "handle": _proxy(site, route, "held", hold_ms), "terminal": True},
        {"handle": _proxy(site, route, "open", RETRY_DIAL_MS)},
    ]
    told = {"handler": "vars", "app": route.app, "to": to}
    handlers = [told, {"handler": "subroute", "routes": choice}]
    return {"match": [{"host": list(route.hosts)}], "handle": handlers, "terminal": True}


def _proxy(site: Site, route: Route, state: str, patience_ms: int) -> list[Json]:
    """Pass the request on; dial for ``patience_ms``."""
    dials = [f"{{file.{site.upstream_file(route.app, index)}}}" for index in range(_width(route))]
    proxy = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": dial} for dial in dials],
        "flush_interval": -1,
        "stream_close_delay": STREAM_CLOSE_DELAY,
        "headers": {"request": {"delete": ["Minipaas-*"]}},
        "transport": {
            "protocol": "http",
            "dial_timeout": DIAL_TIMEOUT,
            "keep_alive": {"idle_timeout": IDLE_UPSTREAM},
        },
        "load_balancing": {
            "selection_policy": {"policy": "least_conn"},
            "try_duration": f"{patience_ms}ms",
            "try_interval": RETRY_HELD_EVERY if state == "held" else RETRY_EVERY,
            # Failed dials are always tried again. Nothing else is, not even GET: the app may have acted on it.
            "retry_match": [_NEVER],
        },
    }
    return [{"handler": "vars", "state": state, "patience_ms": str(patience_ms)}, proxy]


def _again(site: Site) -> Json:
    """Go to the configuration in force: if a reload ended the dialling early, or once if the app may be held by now."""
    undialled = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial "}}}
    cut_short = "double({http.reverse_proxy.duration_ms}) < double({http.vars.patience_ms}) - 50.0"
    first_hop = {"vars": {"state": ["open"]}, "not": [{"header": {HOPS: ["*"]}}]}
    # The number of hops is bounded, whatever happens.
    reloaded = {"expression": cut_short, "not": [{"header": {HOPS: ["xxxxxxxxxxxxxxxx*"]}}]}
    count = {"handler": "headers", "request": {"set": {HOPS: [f"{{http.request.header.{HOPS}}}x"]}}}
    proxy = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"{{file.{site.again_file}}}"}],
        "flush_interval": -1,
        "stream_close_delay": STREAM_CLOSE_DELAY,
        "transport": {"protocol": "http", "keep_alive": {"enabled": False}},
        # The file is ahead of the configuration for the moment that loading takes.
        "load_balancing": {"try_duration": "2s", "try_interval": RETRY_EVERY, "retry_match": [_NEVER]},
    }
    return {"match": [undialled | first_hop, undialled | reloaded], "handle": [count, proxy], "terminal": True}


def _error_pages() -> list[Json]:
    """What was never sent to the app may be repeated (503); of anything else nobody knows (502, 504)."""
    dial = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial "}}}
    held = dial | {"vars": {"state": ["held"]}}
    known = {"vars_regexp": {"{http.vars.app}": {"pattern": "."}}}
    late = "{http.vars.app} is being replaced and was not ready within {http.vars.patience_ms} ms; try again.\n"
    down = "{http.vars.app} does not accept connections; try again in a few seconds.\n"
    broke = "{http.vars.app} broke off or gave no answer; whether it acted on the request is not known.\n"
    return [
        {"match": [held], "handle": [_page(503, late, retry_after_s=5)], "terminal": True},
        {"match": [dial], "handle": [_page(503, down, retry_after_s=5)], "terminal": True},
        {"match": [known], "handle": [_page("{http.error.status_code}", broke)], "terminal": True},
    ]


def _page(status: int | str, text: str, *, retry_after_s: int | None = None) -> Json:
    headers = {"Content-Type": ["text/plain; charset=utf-8"], "X-Content-Type-Options": ["nosniff"]}
    if retry_after_s is not None:
        headers["Retry-After"] = [str(retry_after_s)]
    return {"handler": "static_response", "status_code": str(status), "headers": headers, "body": text}
