"""Caddy's configuration as a value: routes in, JSON out, and what a running configuration says. Pure.

Owns the shape of the configuration and the way requests are held. Never talks to Caddy (``caddy`` does).

How requests are held. Caddy gives every request to the configuration that was in force when it arrived, and a reload cancels
the retries of that configuration. So a held request must not be retrying: it must be *connected*. Caddy inherits some
listening unix sockets ("slots", file descriptors) that nobody accepts from. The route of a held app proxies to its slot:
the kernel queues the connection, the request waits there with no polling, and reloads do not touch it. On release the
new configuration serves that slot (server ``inner``), and the queued requests go where the app's route then leads. The
queue has a bound, and a request that finds it full is answered 503 at once.

The inner server chooses by host as the outer one does, so a slot never delivers to an app it was not held for. One more
slot, ``again``, is always served: a request whose dial attempts a reload cut short goes through it to the configuration in
force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaas.edge import Route
from minipaas.errors import EdgeError

Json = dict[str, Any]

DIAL_TIMEOUT = "2s"
RETRY_DIAL_FOR = "3s"
RETRY_EVERY = "100ms"
# Shorter than the keep-alive of usual servers (gunicorn 2 s, node and uvicorn 5 s), so that a request is not sent on a
# connection which the app is just closing.
IDLE_UPSTREAM = "1500ms"
# An open WebSocket outlives reloads of the configuration; Caddy closes it at the first one otherwise.
STREAM_CLOSE_DELAY = "24h"
MAX_HEADER_BYTES = 64 * 1024
SPOOFABLE_HEADERS = ["Fly-*", "Minipaas-*", "Forwarded", "X-Real-Ip", "X-Forwarded-Ssl", "X-Forwarded-Port"]
_NEVER = {"not": [{}]}


@dataclass(frozen=True)
class Site:
    """Where one Caddy lives. slots: inherited listening sockets by number; the last of them is ``again``."""

    listen: str
    admin_socket: Path
    hold_dir: Path
    storage: Path
    log_file: Path
    slots: tuple[int, ...] = ()

    def slot_path(self, slot: int) -> Path:
        return self.hold_dir / f"{slot}.sock"

    @property
    def hold_slots(self) -> tuple[int, ...]:
        return self.slots[:-1]

    @property
    def again(self) -> int:
        return self.slots[-1]


# -- what is in force --------------------------------------------------------------------------------------------------


def held_slots(config: Json) -> dict[str, int]:
    """Slot of each held app in a running configuration."""
    held = {}
    for handler in _handlers(config, "edge"):
        if handler.get("handler") == "vars" and "slot" in handler:
            held[str(handler["app"])] = int(handler["slot"])
    return held


def routed_upstreams(config: Json) -> tuple[str, ...]:
    """Upstreams that a running configuration sends requests to."""
    proxies = [h for h in _handlers(config, "edge") if h.get("handler") == "reverse_proxy"]
    dials = {str(up["dial"]) for proxy in proxies for up in proxy["upstreams"]}
    return tuple(sorted(dial for dial in dials if not dial.startswith("unix/")))


def pinned_upstreams(config: Json) -> tuple[str, ...]:
    """Upstreams that get no new requests but are still counted."""
    return tuple(str(up["dial"]) for up in _pin_route(config)[0].get("upstreams", ())) if _pin_route(config) else ()


def same_routing(one: Json, other: Json) -> bool:
    """Whether two configurations differ at most in the upstreams that are only counted."""
    return _without_pins(one) == _without_pins(other)


def _servers(config: Json) -> Json:
    servers = config.get("apps", {}).get("http", {}).get("servers", {})
    return servers if isinstance(servers, dict) else {}


def _handlers(config: Json, server: str) -> Iterable[Json]:
    for route in _servers(config).get(server, {}).get("routes", ()):
        yield from route.get("handle", ())


def _pin_route(config: Json) -> list[Json]:
    routes = _servers(config).get("inner", {}).get("routes", ())
    return [handler for route in routes if route.get("match") == [_NEVER] for handler in route["handle"]]


def _without_pins(config: Json) -> Json:
    servers = _servers(config)
    if "inner" not in servers:
        return config
    routes = [route for route in servers["inner"]["routes"] if route.get("match") != [_NEVER]]
    http = {**config["apps"]["http"], "servers": {**servers, "inner": {**servers["inner"], "routes": routes}}}
    return {**config, "apps": {**config["apps"], "http": http}}


# -- what should be in force -------------------------------------------------------------------------------------------


def assign_slots(routes: Sequence[Route], current: Mapping[str, int], slots: Sequence[int]) -> dict[str, int]:
    """A slot for each held app; one that is held already keeps its own. Raises EdgeError when there are not enough."""
    held = list(dict.fromkeys(route.app for route in routes if route.held))
    assigned = {app: current[app] for app in held if current.get(app) in slots}
    free = [slot for slot in slots if slot not in assigned.values()]
    waiting = [app for app in held if app not in assigned]
    if len(waiting) > len(free):
        raise EdgeError(
            f"requests of {len(held)} apps cannot be held at once, at most {len(slots)}; deploy fewer at a time"
        )
    return assigned | dict(zip(waiting, free, strict=False))


def starting(site: Site) -> Json:
    """Before the first routes are known every request is told to come back."""
    page = _page(503, "This server is starting; try again in a few seconds.\n", retry_after_s=2)
    return _config(site, {"edge": _edge(site, [{"handle": [page]}])})


def build(site: Site, routes: Sequence[Route], held: Mapping[str, int], pinned: Sequence[str]) -> Json:
    """The whole configuration. held: slot by app. pinned: upstreams without new requests whose requests are still counted."""
    apps = [_app_route(site, route, held) for route in sorted(routes, key=lambda route: route.app) if route.hosts]
    unknown = {"handle": [_page(404, "No app on this server answers to {http.request.host}.\n")]}
    edge = _edge(site, [{"handle": _clean_headers()}, *apps, unknown])
    edge["errors"] = {"routes": [_again(site), *_error_pages()]}
    listening = [f"fd/{slot}" for slot in site.slots if slot not in held.values()]
    inner = _server(listening, [_expired(), *apps, *_pins(pinned), unknown])
    # The first hop has set the forwarding headers; here they pass as they are.
    inner |= {"trusted_proxies_unix": True, "errors": {"routes": _error_pages()}}
    return _config(site, {"edge": edge, "inner": inner})


def _config(site: Site, servers: Json) -> Json:
    log: Json = {"output": "file", "filename": str(site.log_file), "roll_size_mb": 10, "roll_keep": 3}
    return {
        "admin": {"listen": f"unix/{site.admin_socket}|0600", "config": {"persist": False}},
        "logging": {"logs": {"default": {"writer": log, "level": "WARN"}}},
        "storage": {"module": "file_system", "root": str(site.storage)},
        # No grace period: what an old configuration has begun may take as long as it needs.
        "apps": {"http": {"servers": servers}},
    }


def _server(listen: list[str], routes: list[Json]) -> Json:
    return {
        "listen": listen,
        "protocols": ["h1", "h2c"],
        "automatic_https": {"disable": True},
        "read_header_timeout": "10s",
        "idle_timeout": "2m",
        "max_header_bytes": MAX_HEADER_BYTES,
        "routes": routes,
    }


def _edge(site: Site, routes: list[Json]) -> Json:
    return _server([site.listen], routes)


def _clean_headers() -> list[Json]:
    """What clients may not say is removed, what apps rely on is set. X-Forwarded-For, -Proto and -Host and Via are Caddy's."""
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


def _app_route(site: Site, route: Route, held: Mapping[str, int]) -> Json:
    told: Json = {"handler": "vars", "app": route.app, "hold_ms": str(round(route.hold_s * 1000))}
    if route.app in held:
        handlers = [told | {"slot": str(held[route.app])}, *_hold(site.slot_path(held[route.app]), route)]
    elif route.upstreams:
        handlers = [told, _proxy(route.upstreams)]
    else:
        handlers = [
            told,
            _page(503, f"{route.app} has no running machine; try again in a few seconds.\n", retry_after_s=5),
        ]
    return {"match": [{"host": list(route.hosts)}], "handle": handlers, "terminal": True}


def _proxy(upstreams: Sequence[str]) -> Json:
    return {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": upstream} for upstream in upstreams],
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
            "try_duration": RETRY_DIAL_FOR,
            "try_interval": RETRY_EVERY,
            # Failed dials are always tried again. Nothing else is, not even GET: the app may have acted on it.
            "retry_match": [_NEVER],
        },
    }


def _hold(slot: Path, route: Route) -> list[Json]:
    """Wait in the slot's queue. A request that nobody accepts in time is answered by the error pages."""
    limit = f"{round(route.hold_s * 1000)}ms"
    proxy = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"unix/{slot}"}],
        "flush_interval": -1,
        "stream_close_delay": STREAM_CLOSE_DELAY,
        "transport": {
            "protocol": "http",
            "keep_alive": {"enabled": False},
            # The first counts from the end of the request, the second for each part of a body larger than a socket takes.
            "response_header_timeout": limit,
            "write_timeout": limit,
        },
    }
    return [_stamp(), proxy]


def _stamp() -> Json:
    """Say when the wait began, and for how long, unless an earlier hop has."""
    unstamped = [{"not": [{"header": {"Minipaas-Held-At": ["*"]}}]}]
    stamp = {"Minipaas-Held-At": ["{time.now.unix_ms}"], "Minipaas-Hold-Ms": ["{http.vars.hold_ms}"]}
    headers = {"handler": "headers", "request": {"set": stamp}}
    return {"handler": "subroute", "routes": [{"match": unstamped, "handle": [headers]}]}


def _expired() -> Json:
    """Whoever waited longer than allowed was told so; to run the request now would do behind their back what they may repeat."""
    late = (
        "int({time.now.unix_ms}) - int({http.request.header.Minipaas-Held-At})"
        " >= int({http.request.header.Minipaas-Hold-Ms})"
    )
    match = {"header_regexp": {"Minipaas-Held-At": {"pattern": "^[0-9]+$"}}, "expression": late}
    return {"match": [match], "handle": [_page(503, "It took too long.\n", retry_after_s=5)], "terminal": True}


def _pins(pinned: Sequence[str]) -> list[Json]:
    """Caddy counts requests of an upstream only while some route names it."""
    if not pinned:
        return []
    proxy = {"handler": "reverse_proxy", "upstreams": [{"dial": upstream} for upstream in pinned]}
    return [{"match": [_NEVER], "handle": [proxy]}]


def _again(site: Site) -> Json:
    proxy = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"unix/{site.slot_path(site.again)}"}],
        "flush_interval": -1,
        "stream_close_delay": STREAM_CLOSE_DELAY,
        "transport": {"protocol": "http", "keep_alive": {"enabled": False}},
    }
    match = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial tcp"}}}
    return {"match": [match], "handle": [_stamp(), proxy]}


def _error_pages() -> list[Json]:
    """A dial that failed, a full queue and a wait that was too long may be repeated (503); of others nobody knows (502, 504)."""
    held = {"vars_regexp": {"{http.vars.slot}": {"pattern": "^[0-9]+$"}}}
    dial = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial "}}}
    known = {"vars_regexp": {"{http.vars.app}": {"pattern": "."}}}
    late = (
        "{http.vars.app} is being replaced and took longer than {http.vars.hold_ms} ms; try again in a few seconds.\n"
    )
    full = "{http.vars.app} is being replaced and too many requests wait for it; try again in a few seconds.\n"
    down = "{http.vars.app} does not accept connections; try again in a few seconds.\n"
    broke = "{http.vars.app} broke off, or gave no answer; whether it acted on the request is not known.\n"
    return [
        {"match": [held | {"not": [dial]}], "handle": [_page(503, late, retry_after_s=5)], "terminal": True},
        {"match": [held], "handle": [_page(503, full, retry_after_s=5)], "terminal": True},
        {"match": [dial], "handle": [_page(503, down, retry_after_s=5)], "terminal": True},
        {"match": [known], "handle": [_page("{http.error.status_code}", broke)], "terminal": True},
    ]


def _page(status: int | str, text: str, *, retry_after_s: int | None = None) -> Json:
    headers = {"Content-Type": ["text/plain; charset=utf-8"], "X-Content-Type-Options": ["nosniff"]}
    if retry_after_s is not None:
        headers["Retry-After"] = [str(retry_after_s)]
    return {"handler": "static_response", "status_code": str(status), "headers": headers, "body": text}
