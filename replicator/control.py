"""The control socket of a running replicator: HTTP on a unix-domain socket, for its owner only, and the calls of a client.

Owns the socket file, and ROUTES. ``sync`` and ``barrier`` answer when everything that was committed before is in the store. Decides
nothing: what is asked for goes to the one who operates the replicator.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from socketserver import UnixStreamServer
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, urlencode, urlsplit

from replicator import __version__
from replicator.errors import (
    DaemonNotRunning,
    DatabaseMissing,
    DatabaseNotReplicable,
    ReplicatorError,
    SyncTimeout,
    UsageError,
)
from replicator.peers import BoundedThreads, Handler
from replicator.values import Position, format_time, parse_duration

if TYPE_CHECKING:
    from replicator.roster import Left
    from replicator.trials import TrialRecord
    from replicator.worker import DatabaseStatus

DEFAULT_WAIT_S = 30.0
MAX_WAIT_S = 3600.0
MAX_PATH_BYTES = 107
"""The longest name that the kernel takes for a unix-domain socket."""
_CALL_TIMEOUT_S = 10.0
_PROTECTIONS = ("protected", "catching up", "NOT PROTECTED")

ROUTES = {
    "GET": ("/status", "/list", "/info", "/barrier"),
    "POST": ("/sync", "/register", "/unregister", "/start", "/stop"),
}

_STATUS_OF: dict[type[ReplicatorError], int] = {
    UsageError: 400,
    DatabaseMissing: 404,
    DatabaseNotReplicable: 409,
    SyncTimeout: 504,
}


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
        "upkeep_problem": status.upkeep_problem,
        "checkpoint_blocked": status.checkpoint_blocked,
        "longest_barrier_s": round(status.barrier_s, 6),
        "puts_minute": status.puts_minute,
        "puts_hour": status.puts_hour,
        "usd_per_month": None if status.usd_per_month is None else round(status.usd_per_month, 2),
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


class Operated(Protocol):
    """Who answers: the list of what is replicated. Paths are absolute. Raises ReplicatorError."""

    def status(self) -> list[DatabaseStatus]: ...
    def sync(self, path: Path, timeout_s: float) -> Position: ...
    def register(self, path: Path, url: str) -> None: ...
    def unregister(self, path: Path, timeout_s: float) -> Left: ...
    def start(self, path: Path) -> None: ...
    def stop(self, path: Path, timeout_s: float) -> Left: ...


# -- the server --------------------------------------------------------------------------------------------------------


class ControlServer:
    """Serves from ``start`` to ``close``; each peer has a thread of its own, so that one that hangs holds up no other."""

    def __init__(
        self, path: Path, operated: Operated, mode: int = 0o600, *, info: Callable[[], dict[str, Any]] = dict
    ) -> None:
        """Takes the path; a socket that a dead replicator left there is replaced. info: what ``info`` tells of the process besides.

        Raises SocketInUse when a living one answers there, UsageError when there can be no socket.
        """
        self.path = path
        check_path(path)
        _check_free(path)
        self._server = _Server(path, operated, mode, info)
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


class _Server(BoundedThreads, UnixStreamServer):
    def __init__(self, path: Path, operated: Operated, mode: int, info: Callable[[], dict[str, Any]]) -> None:
        self.operated = operated
        self.info = info
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


class _Handler(Handler):
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def address_string(self) -> str:
        return "control"  # a peer of a unix-domain socket has no address

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query: dict[str, str] = {}
        try:
            if parts.path not in ROUTES[self.command]:
                self._send(404, {"error": f"there is no {self.command} {parts.path} here", "code": "NoRoute"})
                return
            parsed = parse_qs(parts.query, keep_blank_values=True, errors="surrogateescape")
            query = {key: values[-1] for key, values in parsed.items()}
            route: Callable[[dict[str, str]], dict[str, Any]] = getattr(self, f"_{parts.path[1:]}")
            self._send(200, route(query))
        except ReplicatorError as error:
            code = next((status for kind, status in _STATUS_OF.items() if isinstance(error, kind)), 500)
            reached = {"durable": self._reached(query)} if isinstance(error, SyncTimeout) else {}
            self._send(code, {"error": str(error), "code": type(error).__name__, **reached})

    def _send(self, code: int, document: dict[str, Any]) -> None:
        # In ASCII, as a path may be no valid UTF-8.
        self.send(code, "application/json", json.dumps(document).encode() + b"\n")

    def _status(self, _: dict[str, str]) -> dict[str, Any]:
        databases = [status_document(status) for status in self.server.operated.status()]
        return {"pid": os.getpid(), "version": __version__, "databases": databases}

    def _list(self, _: dict[str, str]) -> dict[str, Any]:
        known = self.server.operated.status()
        return {"databases": [{"path": str(it.path), "url": it.url, "protection": it.protection.value} for it in known]}

    def _info(self, _: dict[str, str]) -> dict[str, Any]:
        counts = Counter(status.protection.value for status in self.server.operated.status())
        return {
            "pid": os.getpid(),
            "version": __version__,
            **self.server.info(),
            "databases": {each.lower().replace(" ", "_"): counts[each] for each in _PROTECTIONS},
        }

    def _sync(self, query: dict[str, str]) -> dict[str, Any]:
        path = self._known(_path_of(query))
        timeout_s = _wait_of(query.get("timeout", ""))
        try:
            position: Position | None = self.server.operated.sync(path, timeout_s)
        except SyncTimeout:
            if timeout_s > 0:
                raise
            position = None  # it was only to be set going
        return {"path": str(path), "durable": str(position) if position else None}

    _barrier = _sync

    def _register(self, query: dict[str, str]) -> dict[str, Any]:
        path, url = _path_of(query), query.get("replica", "")
        if not url:
            raise UsageError("say where the replica is to be: ?db=PATH&replica=URL")
        self.server.operated.register(path, url)
        return {"path": str(path), "url": url}

    def _unregister(self, query: dict[str, str]) -> dict[str, Any]:
        return _left(self.server.operated.unregister(self._known(_path_of(query)), _wait_of(query.get("timeout", ""))))

    def _start(self, query: dict[str, str]) -> dict[str, Any]:
        path = self._known(_path_of(query))
        self.server.operated.start(path)
        return {"path": str(path)}

    def _stop(self, query: dict[str, str]) -> dict[str, Any]:
        return _left(self.server.operated.stop(self._known(_path_of(query)), _wait_of(query.get("timeout", ""))))

    def _reached(self, query: dict[str, str]) -> str | None:
        path = self._known(_path_of(query))
        durable = (status.durable for status in self.server.operated.status() if status.path == path)
        return str(found) if (found := next(durable, None)) else None

    def _known(self, path: Path) -> Path:
        """The database as the replicator names it; it may have been reached over a link."""
        known = [status.path for status in self.server.operated.status()]
        if path in known:
            return path
        real = os.path.realpath(path)
        return next((other for other in known if os.path.realpath(other) == real), path)


def _path_of(query: dict[str, str]) -> Path:
    name = query.get("db", "")
    if not name or "\0" in name:
        raise UsageError("name the database: ?db=PATH")
    if not name.startswith("/"):
        raise UsageError(f"{name} is not the whole path of a database; it begins with /")
    return Path(os.path.normpath(name))


def _left(left: Left) -> dict[str, Any]:
    return {
        "path": str(left.path),
        "durable": str(left.durable) if left.durable else None,
        "reason": left.reason,
    }


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
    """What ``GET /list`` says. Raises DaemonNotRunning."""
    return _call(path, "GET", "/list", _CALL_TIMEOUT_S)


def info(path: Path) -> dict[str, Any]:
    """What ``GET /info`` says. Raises DaemonNotRunning."""
    return _call(path, "GET", "/info", _CALL_TIMEOUT_S)


def sync(path: Path, database: Path, timeout_s: float) -> dict[str, Any]:
    """Have the replicator at ``path`` ship a database, and wait for it up to ``timeout_s``; with 0 only set it going.

    Raises DaemonNotRunning, DatabaseMissing, SyncTimeout.
    """
    return _post(path, "sync", timeout_s, db=str(database), timeout=f"{timeout_s:g}")


def register(path: Path, database: Path, url: str) -> dict[str, Any]:
    """Have it replicate one more database. Raises DaemonNotRunning, UsageError, DatabaseNotReplicable."""
    return _post(path, "register", MAX_WAIT_S, db=str(database), replica=url)


def unregister(path: Path, database: Path, timeout_s: float) -> dict[str, Any]:
    """Have it ship a database and forget it. Raises DaemonNotRunning, DatabaseMissing."""
    return _post(path, "unregister", timeout_s + _CALL_TIMEOUT_S, db=str(database), timeout=f"{timeout_s:g}")


def stop(path: Path, database: Path, timeout_s: float) -> dict[str, Any]:
    """Have it ship a database and let go of it. Raises DaemonNotRunning, DatabaseMissing."""
    return _post(path, "stop", timeout_s + _CALL_TIMEOUT_S, db=str(database), timeout=f"{timeout_s:g}")


def start(path: Path, database: Path) -> dict[str, Any]:
    """Have it go on with one that was stopped. Raises DaemonNotRunning, DatabaseMissing."""
    return _post(path, "start", _CALL_TIMEOUT_S, db=str(database))


def _post(path: Path, verb: str, patience_s: float, **query: str) -> dict[str, Any]:
    return _call(path, "POST", f"/{verb}?{urlencode(query, errors='surrogateescape')}", patience_s + _CALL_TIMEOUT_S)


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
