"""The control socket of a running replicator: HTTP on a unix-domain socket, for its owner only, and the calls of a client.

Owns the socket file. Never changes what is replicated. Routes: ``GET /status``, ``GET /databases``, ``POST /sync?db=&timeout=`` and
``GET /barrier?db=&timeout=``; the last two answer when everything that was committed before is in the store.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from replicator import __version__
from replicator.errors import DaemonNotRunning, DatabaseMissing, ReplicatorError, SyncTimeout, UsageError
from replicator.values import Position, format_time, parse_duration

if TYPE_CHECKING:
    from replicator.service import Replicator
    from replicator.trials import TrialRecord
    from replicator.worker import DatabaseStatus

log = logging.getLogger(__name__)

PEER_TIMEOUT_S = 10.0
"""A peer that sends nothing, or takes nothing, for so long is hung up on."""
MAX_PEERS = 64
DEFAULT_WAIT_S = 30.0
MAX_WAIT_S = 3600.0
MAX_PATH_BYTES = 107
"""The longest name that the kernel takes for a unix-domain socket."""
_CALL_TIMEOUT_S = 10.0

_STATUS_OF: dict[type[ReplicatorError], int] = {UsageError: 400, DatabaseMissing: 404, SyncTimeout: 504}


class SocketInUse(ReplicatorError):
    """Another replicator answers at the path."""


def default_path(environment: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """Where the socket is when no option or configuration says: REPLICATOR_SOCKET, else a place that only the user has."""
    named = environment.get("REPLICATOR_SOCKET")
    if named:
        return Path(named)
    uid = os.getuid() if uid is None else uid
    if uid == 0:
        return Path("/run/replicator.sock")
    return Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "replicator.sock"


def status_document(status: DatabaseStatus) -> dict[str, Any]:
    """One database in JSON. Times are RFC 3339 in UTC; positions ``timeline:txid``; null is what is not known yet."""
    return {
        "path": str(status.path),
        "url": status.url,
        "status": status.words,
        "protection": status.protection.value,
        "reason": status.reason,
        "lag_s": round(status.lag_s, 3),
        "captured": str(status.captured) if status.captured else None,
        "durable": str(status.durable) if status.durable else None,
        "durable_time": format_time(status.durable_ms) if status.durable and status.durable_ms else None,
        "waiting_segments": status.waiting_segments,
        "waiting_bytes": status.waiting_bytes,
        "wal_bytes": status.wal_bytes,
        "page_size": status.page_size,
        "page_count": status.page_count,
        "checkpoint_blocked": status.checkpoint_blocked,
        "longest_barrier_s": round(status.barrier_s, 6),
        "trial": _trial_document(status.trial) if status.trial else None,
    }


def _trial_document(trial: TrialRecord) -> dict[str, Any]:
    """proved_*: up to which position and commit the replica was restored for a trial, and when; null if never."""
    return {
        "proved": trial.position or None,
        "proved_time": format_time(trial.commit_ms) if trial.position else None,
        "proved_at": format_time(trial.proved_ms) if trial.position else None,
        "tried_at": format_time(trial.tried_ms),
        "problem": trial.problem,
        "integrity_unchecked": trial.unchecked,
    }


# -- the server --------------------------------------------------------------------------------------------------------


class ControlServer:
    """Serves from ``start`` to ``close``; each peer has a thread of its own, so that one that hangs holds up no other."""

    def __init__(self, path: Path, replicator: Replicator, mode: int = 0o600) -> None:
        """Takes the path; a socket that a dead replicator left there is replaced.

        Raises SocketInUse when a living one answers there, UsageError when there can be no socket.
        """
        self.path = path
        check_path(path)
        _check_free(path)
        self._server = _Server(path, replicator, mode)
        self._inode = _inode(path)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread; waiting there costs nothing while idle
            self._thread.join()
        self._server.server_close()
        if _inode(self.path) == self._inode:
            self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._closing.is_set():
            self._server.handle_request()


def check_path(path: Path) -> None:
    """Raises UsageError when the kernel takes no socket of this name."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise UsageError(f"the socket's path {path} is longer than {MAX_PATH_BYTES} bytes; name a shorter one")


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_PEERS

    def __init__(self, path: Path, replicator: Replicator, mode: int) -> None:
        self.replicator = replicator
        self._places = threading.BoundedSemaphore(MAX_PEERS)
        super().__init__(str(path), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
            path.chmod(mode)  # before it listens, so that nobody else gets in meanwhile
            self.server_activate()
        except OSError as error:
            self.server_close()
            raise UsageError(
                f"no socket can be made at {path}: {error.strerror}; name another with --socket"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a peer of the control socket went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = PEER_TIMEOUT_S
    server_version = f"replicator/{__version__}"

    def do_GET(self) -> None:
        self._answer({"/status": self._status, "/databases": self._databases, "/barrier": self._wait})

    def do_POST(self) -> None:
        self._answer({"/sync": self._wait})

    def address_string(self) -> str:
        return "control"  # a peer of a unix-domain socket has no address

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _answer(self, routes: Mapping[str, Callable[[dict[str, str]], dict[str, Any]]]) -> None:
        parts = urlsplit(self.path)
        try:
            route = routes.get(parts.path)
            if route is None:
                self._send(404, {"error": f"there is no {self.command} {parts.path} here", "code": "NoRoute"})
                return
            query = parse_qs(parts.query, keep_blank_values=True)
            self._send(200, route({key: values[-1] for key, values in query.items()}))
        except ReplicatorError as error:
            code = next((status for kind, status in _STATUS_OF.items() if isinstance(error, kind)), 500)
            self._send(code, {"error": str(error), "code": type(error).__name__})

    def _send(self, code: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode() + b"\n"  # in ASCII, as a path may be no valid UTF-8
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _status(self, _: dict[str, str]) -> dict[str, Any]:
        databases = [status_document(status) for status in self.server.replicator.status()]
        return {"pid": os.getpid(), "version": __version__, "databases": databases}

    def _databases(self, _: dict[str, str]) -> dict[str, Any]:
        known = self.server.replicator.status()
        return {"databases": [{"path": str(status.path), "url": status.url} for status in known]}

    def _wait(self, query: dict[str, str]) -> dict[str, Any]:
        if "db" not in query:
            raise UsageError("name the database: ?db=PATH")
        path = self._known(query["db"])
        timeout_s = _wait_of(query.get("timeout", ""))
        try:
            position: Position | None = self.server.replicator.sync(path, timeout_s)
        except SyncTimeout:
            if timeout_s > 0:
                raise
            position = None  # it was only to be set going
        return {"path": str(path), "durable": str(position) if position else None}

    def _known(self, name: str) -> Path:
        """The database as the replicator names it; it may have been reached over a link."""
        known = [status.path for status in self.server.replicator.status()]
        path = Path(name)
        if path in known:
            return path
        real = os.path.realpath(path)
        return next((other for other in known if os.path.realpath(other) == real), path)


def _wait_of(text: str) -> float:
    if not text:
        return DEFAULT_WAIT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = parse_duration(text)
    if not 0 <= seconds <= MAX_WAIT_S:
        raise UsageError(f"the timeout {text} is not between 0 and {MAX_WAIT_S:g} seconds")
    return seconds


def _check_free(path: Path) -> None:
    """Remove the socket of a replicator that is gone."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path} is there and is no socket; move it away, or name another with --socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
        raise SocketInUse(f"another replicator answers at {path}")
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
    except TimeoutError as error:
        raise SocketInUse(f"another replicator holds {path}, and does not answer") from error
    except OSError as error:
        raise UsageError(f"no socket can be made at {path}: {error.strerror}; name another with --socket") from error


def _inode(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = path.lstat()
        return found.st_dev, found.st_ino
    return None


# -- the client --------------------------------------------------------------------------------------------------------


def status(path: Path) -> dict[str, Any]:
    """What ``GET /status`` says. Raises DaemonNotRunning."""
    return _call(path, "GET", "/status", _CALL_TIMEOUT_S)


def databases(path: Path) -> dict[str, Any]:
    """What ``GET /databases`` says. Raises DaemonNotRunning."""
    return _call(path, "GET", "/databases", _CALL_TIMEOUT_S)


def sync(path: Path, database: Path, timeout_s: float) -> dict[str, Any]:
    """Have the replicator at ``path`` ship a database, and wait for it up to ``timeout_s``; with 0 only set it going.

    Raises DaemonNotRunning, DatabaseMissing, SyncTimeout.
    """
    query = urlencode({"db": str(database), "timeout": f"{timeout_s:g}"})
    return _call(path, "POST", f"/sync?{query}", timeout_s + _CALL_TIMEOUT_S)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("control", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _call(path: Path, method: str, target: str, timeout_s: float) -> dict[str, Any]:
    check_path(path)
    connection = _Connection(path, timeout_s)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        body, code = response.read(), response.status
        document: dict[str, Any] = json.loads(body)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise DaemonNotRunning(
            f"no replicator answers at {path}; start `replicator replicate`, or name its socket with --socket"
        ) from error
    except PermissionError as error:
        raise DaemonNotRunning(
            f"the socket {path} belongs to another user; run this as the replicator's user"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DaemonNotRunning(f"the replicator at {path} does not answer as it should: {error}") from error
    finally:
        connection.close()
    if code != 200:
        kind = next((kind for kind in _STATUS_OF if kind.__name__ == document.get("code")), ReplicatorError)
        raise kind(str(document.get("error", f"the replicator at {path} answered {code}")))
    return document
