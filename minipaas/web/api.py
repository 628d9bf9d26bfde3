"""The JSON API: /v1, with a bearer token. What the command line speaks.

Owns the shapes of requests and answers, and how errors look. Never decides anything: ``service.Platform`` does, authorisation
included. Answers that last (changes of an app, logs, events) have a limit in number, so that they never take all threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

import msgspec
from flask import Blueprint, Response, g, request

from minipaas.access import Action, Principal, authorise
from minipaas.engine import LogLine
from minipaas.errors import BadRequest, PlatformError, TooManyClients, TooMuch
from minipaas.service import DeployRequest, Platform, Progress
from minipaas.settings import Limits
from minipaas.sources import Source
from minipaas.web.door import MAX_BODY_BYTES

NDJSON = "application/x-ndjson"
MAX_TAIL = 1_000_000
EVENTS_EVERY_S = 0.5
KEEPALIVE_S = 15.0
LOOK_S = 1.0

_T = TypeVar("_T")
_View = Callable[..., Response]


class CreateApp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class Deploy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest: null to keep what the app has; see ``DeployRequest``."""

    source: Source
    manifest: str | None = None
    file: str = "minipaas.toml"
    build_args: dict[str, str] = {}


class UnsetSecrets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: list[str]


class Api:
    """The routes. Each names the action that it needs, which is checked before anything of the request is read."""

    def __init__(self, platform: Platform, limits: Limits) -> None:
        self._platform = platform
        self._followers = threading.BoundedSemaphore(limits.followers)
        self._changes = threading.BoundedSemaphore(limits.changes)
        self._actions: dict[str, Action] = {}
        self.blueprint = Blueprint("api", __name__, url_prefix="/v1")
        self.blueprint.before_request(self._admit)
        self._add_routes()

    def _add_routes(self) -> None:
        self._route("GET", "/status", Action.READ, self._status)
        self._route("GET", "/events", Action.READ, self._events)
        self._route("GET", "/volumes", Action.READ, self._volumes)
        self._route("POST", "/uploads", Action.DEPLOY, self._begin_upload)
        self._route("PUT", "/uploads/<upload>", Action.DEPLOY, self._write_upload)
        self._route("GET", "/apps", Action.READ, self._apps)
        self._route("POST", "/apps", Action.CREATE, self._create)
        self._route("GET", "/apps/<app>", Action.READ, self._app)
        self._route("DELETE", "/apps/<app>", Action.DESTROY, self._destroy)
        self._route("POST", "/apps/<app>/deploys", Action.DEPLOY, self._deploy)
        self._route("GET", "/apps/<app>/releases", Action.READ, self._releases)
        self._route("POST", "/apps/<app>/restart", Action.RESTART, self._restart)
        self._route("GET", "/apps/<app>/logs", Action.LOGS, self._logs)
        self._route("GET", "/apps/<app>/secrets", Action.READ, self._secrets)
        self._route("PUT", "/apps/<app>/secrets", Action.SECRETS, self._set_secrets)
        self._route("DELETE", "/apps/<app>/secrets", Action.SECRETS, self._unset_secrets)

    def _route(self, method: str, rule: str, action: Action, view: _View) -> None:
        endpoint = view.__name__.strip("_")
        self._actions[f"api.{endpoint}"] = action
        self.blueprint.add_url_rule(rule, endpoint, view, methods=[method])

    def _admit(self) -> None:
        principal = self._platform.authenticate(request.headers.get("Authorization", ""))
        authorise(principal, self._actions[request.endpoint or ""], (request.view_args or {}).get("app", ""))
        g.principal = principal

    # -- the node

    def _status(self) -> Response:
        return _json(self._platform.status(_principal()))

    def _volumes(self) -> Response:
        return _json(self._platform.volumes(_principal()))

    def _events(self) -> Response:
        self._take(self._followers)
        stream = snapshots(self._platform, _principal(), _gone())
        return _stream(stream, "text/event-stream", self._followers.release)

    def _begin_upload(self) -> Response:
        return _json({"id": self._platform.begin_upload(_principal())}, 201)

    def _write_upload(self, upload: str) -> Response:
        at = _number("at", most=1 << 50)
        if at is None:
            raise BadRequest("say where the part begins: ?at=BYTES")
        return _json({"size": self._platform.write_upload(_principal(), upload, at, _bytes())})

    # -- apps

    def _apps(self) -> Response:
        return _json(self._platform.apps(_principal()))

    def _create(self) -> Response:
        return _json(self._platform.create_app(_principal(), _body(CreateApp).name), 201)

    def _app(self, app: str) -> Response:
        return _json(self._platform.app(_principal(), app))

    def _destroy(self, app: str) -> Response:
        return _json(self._platform.destroy(_principal(), app))

    def _restart(self, app: str) -> Response:
        with self._change():
            self._platform.restart(_principal(), app)
        return _json(self._platform.app(_principal(), app))

    def _releases(self, app: str) -> Response:
        return _json(self._platform.releases(_principal(), app))

    def _deploy(self, app: str) -> Response:
        body = _body(Deploy)
        wish = DeployRequest(body.source, body.manifest, body.file, body.build_args)
        self._take(self._changes)
        lines = _deploy_lines(self._platform, _principal(), app, wish, _gone(), self._changes.release)
        return _stream(lines, NDJSON)

    def _logs(self, app: str) -> Response:
        tail, follow = _number("tail", most=MAX_TAIL), _flag("follow")
        self._take(self._followers)
        try:
            lines = self._platform.logs(_principal(), app, tail=tail, follow=follow, gone=_gone())
            first = [] if follow else list(islice(lines, 1))
        except BaseException:
            self._followers.release()
            raise
        return _stream((_log_line(*line) for line in chain(first, lines)), NDJSON, self._followers.release)

    # -- secrets

    def _secrets(self, app: str) -> Response:
        times = self._platform.secrets(_principal(), app)
        return _json([{"name": name, "updated_ms": at} for name, at in times.items()])

    def _set_secrets(self, app: str) -> Response:
        values = _body(dict[str, str])
        with self._change():
            return _json(self._platform.set_secrets(_principal(), app, values))

    def _unset_secrets(self, app: str) -> Response:
        names = _body(UnsetSecrets).names
        with self._change():
            return _json(self._platform.unset_secrets(_principal(), app, names))

    def _take(self, places: threading.BoundedSemaphore) -> None:
        if not places.acquire(blocking=False):
            what = "changes are under way" if places is self._changes else "clients follow"
            raise TooManyClients(f"as many {what} as there may be at once; try again when one of them has ended")

    @contextmanager
    def _change(self) -> Iterator[None]:
        self._take(self._changes)
        try:
            yield
        finally:
            self._changes.release()


def error_answer(error: PlatformError) -> Response:
    return _json({"error": {"code": type(error).__name__, "message": str(error)}}, error.http_status)


def snapshots(platform: Platform, principal: Principal, gone: Callable[[], bool]) -> Iterator[bytes]:
    """Server-sent events: a ``views.Snapshot`` at once and whenever it changes, at most two a second."""
    version, before, quiet_s = -1, b"", 0.0
    while not gone():
        now = msgspec.json.encode(platform.snapshot(principal))
        if now != before:
            yield b"event: snapshot\ndata: " + now + b"\n\n"
            before, quiet_s = now, 0.0
        elif quiet_s >= KEEPALIVE_S:
            yield b": still here\n\n"
            quiet_s = 0.0
        platform.pause(EVENTS_EVERY_S)
        version = platform.wait_for_change(principal, version, LOOK_S)
        quiet_s += EVENTS_EVERY_S + LOOK_S


def _deploy_lines(
    platform: Platform,
    principal: Principal,
    app: str,
    wish: DeployRequest,
    gone: Callable[[], bool],
    on_end: Callable[[], None],
) -> Iterator[bytes]:
    """What happens, to the end; the deploy goes on when nobody listens any more, and ``on_end`` is called when it is over."""
    lines: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
    listening = threading.Event()
    listening.set()

    def tell(progress: Progress) -> None:
        if listening.is_set():
            lines.put(progress)

    def work() -> None:
        try:
            release = platform.deploy(principal, app, wish, tell)
            tell(Progress("done", f"{app} v{release.number} is live", release.number))
        except PlatformError as error:
            tell(Progress("failed", str(error)))
        except Exception as error:
            tell(Progress("failed", f"internal error: {error!r}; see the log of minipaas serve"))
            raise
        finally:
            on_end()
            lines.put(None)

    try:
        threading.Thread(target=work, name=f"deploy-{app}", daemon=True).start()
    except RuntimeError:
        on_end()
        raise
    return _told(lines, listening, gone)


def _told(
    lines: queue.SimpleQueue[Progress | None], listening: threading.Event, gone: Callable[[], bool]
) -> Iterator[bytes]:
    try:
        for progress in _until_none(lines, gone):
            yield _line({"event": progress.kind, "text": progress.text, "release": progress.release})
    finally:
        listening.clear()


def _until_none(lines: queue.SimpleQueue[_T | None], gone: Callable[[], bool]) -> Iterator[_T]:
    while not gone():
        try:
            line = lines.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        if line is None:
            return
        yield line


def _principal() -> Principal:
    principal: Principal = g.principal
    return principal


def _gone() -> Callable[[], bool]:
    """Whether the client of this request has closed its connection, as far as the server can tell."""
    gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return gone


def _bytes() -> bytes:
    """The body. Raises TooMuch."""
    content = request.stream.read(MAX_BODY_BYTES + 1)
    if len(content) > MAX_BODY_BYTES:
        raise TooMuch(f"a request may have {MAX_BODY_BYTES >> 20} MiB; send files in parts to /v1/uploads")
    return content


def _body(kind: type[_T]) -> _T:
    """The JSON body as a value. Raises BadRequest that names the field, TooMuch."""
    try:
        return msgspec.json.decode(_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body of the request is wrong: {error}") from error


def _flag(name: str) -> bool:
    return request.args.get(name, "").lower() in ("1", "true", "yes")


def _number(name: str, *, most: int) -> int | None:
    text = request.args.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
        raise BadRequest(f"{name}={text[:40]!r} is not a number from 0 to {most}")
    return int(text)


def _log_line(machine: str, line: LogLine) -> bytes:
    return _line({"at_ms": line.at_ms, "machine": machine, "stream": line.stream, "text": line.text})


def _line(value: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status=status, mimetype="application/json")


def _stream(chunks: Iterator[bytes], mimetype: str, on_close: Callable[[], None] = lambda: None) -> Response:
    response = Response(chunks, mimetype=mimetype, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    response.call_on_close(on_close)
    return response
