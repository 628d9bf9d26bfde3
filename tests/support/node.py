"""A real node on this machine, driven through the command line as its owner would, and load on an app of it.

Owns the node's processes, ports and folders; ``end`` leaves nothing behind. Never reaches into the platform's own objects.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from images.make_base import TAG as BASE_TAG
from minipaas.engine.podman_service import PodmanService
from minipaas.workload import LABEL_APP

REPOSITORY = Path(__file__).resolve().parents[2]
GUESTBOOK = REPOSITORY / "images" / "guestbook"
READY_WITHIN_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """What the condition gives as soon as it gives something. Fails with ``what`` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


@dataclass
class Node:
    """root: a short path, as sockets lie below it. bucket: URL; keys: of the bucket."""

    root: Path
    name: str
    region: str
    bucket: str
    keys: tuple[str, str]
    http: int = field(default_factory=free_port)
    api: int = field(default_factory=free_port)
    recovery_key: str = ""
    process: subprocess.Popen[str] | None = None

    @property
    def data(self) -> Path:
        return self.root / self.name

    @property
    def run(self) -> Path:
        return self.root / f"run-{self.name}"

    @property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self.root),
            "MINIPAAS_DATA": str(self.data),
            "MINIPAAS_ACCESS_KEY": self.keys[0],
            "MINIPAAS_SECRET_KEY": self.keys[1],
            **more,
        }

    def node_options(self) -> list[str]:
        return [
            "--data", str(self.data), "--run", str(self.run), "--bucket", self.bucket, "--name", self.name, "--region", self.region,
            "--http", f"127.0.0.1:{self.http}", "--api", f"127.0.0.1:{self.api}",
        ]  # fmt: skip

    def command(
        self, *arguments: str, stdin: str = "", timeout_s: float = 180.0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """One command of minipaas, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "minipaas", *arguments],
            env=self.environment(**more), input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def done(self, *arguments: str, stdin: str = "") -> str:
        """Standard output of a command that must succeed."""
        result = self.command(*arguments, stdin=stdin)
        assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.done(*arguments, "--json"))

    def setup(self) -> None:
        self.recovery_key = self.json("setup", *self.node_options())["recovery_key"]

    def launch(self, *arguments: str, stdin: str = "") -> subprocess.Popen[str]:
        """Start ``serve`` or ``recover`` in the background."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minipaas", *arguments],
                env=self.environment(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(stdin)
            self.process.stdin.close()
        return self.process

    def start(self, *arguments: str, stdin: str = "") -> None:
        """``launch``, and wait until it says that it is ready."""
        told = self.log.stat().st_size if self.log.exists() else 0
        process = self.launch(*(arguments or ("serve",)), stdin=stdin)
        wait_for(
            lambda: process.poll() is not None or "ready:" in self.log.read_text()[told:], READY_WITHIN_S, self.tail()
        )
        assert process.poll() is None, self.tail()

    def recover(self, recovery_key: str, *options: str) -> None:
        self.start("recover", *self.node_options(), *options, stdin=f"{recovery_key}\n")

    def kill(self) -> None:
        """kill -9, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def end(self) -> None:
        """Everything of this node, whatever state it is in; nothing to do the second time."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        if (self.data / "node.toml").exists():
            with suppress(subprocess.TimeoutExpired):
                self.command("down", timeout_s=60)
        PodmanService(self.data, self.run).wipe()
        (self.data / "node.toml").unlink(missing_ok=True)

    def end_at_once(self) -> None:
        """The host is lost: containers, edge and engine end without warning, and the disk is gone."""
        for pid, _ in [*processes_of(self.data), *processes_of(self.run)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        PodmanService(self.data, self.run).wipe()
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)

    def tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else "no log"

    # -- what is there

    def podman(self, *arguments: str) -> str:
        """The node's own engine, asked past the platform."""
        return subprocess.run(
            ["podman", "--remote", "--url", f"unix://{self.run}/podman.sock", *arguments],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip

    def containers(self, app: str = "", *, every: bool = False) -> list[str]:
        """Names of those that run; of one app only, and also those that do not run, when asked."""
        filters = ["--filter", f"label={LABEL_APP}={app}"] if app else []
        return self.podman("ps", "--format", "{{.Names}}", *filters, *(["--all"] if every else [])).split()

    def deploy(self, directory: Path = GUESTBOOK) -> subprocess.CompletedProcess[str]:
        return self.command("deploy", str(directory), "--build-arg", f"BASE={BASE_TAG}")

    def deploying(self, directory: Path = GUESTBOOK) -> subprocess.Popen[str]:
        """A deploy in the background; its standard output has a line for each step."""
        return subprocess.Popen(
            [sys.executable, "-m", "minipaas", "deploy", str(directory), "--build-arg", f"BASE={BASE_TAG}"],
            env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def app(self, name: str = "guestbook") -> Any:
        return self.json("status", name)

    def app_or_none(self, name: str) -> Any:
        return next((app for app in self.json("apps") if app["name"] == name), None)

    def settled(self, name: str = "guestbook") -> Any:
        """The app, once it runs as it should."""

        def look() -> Any:
            app = self.app(name)
            return app if app["state"] == "deployed" and all(m["state"] == "started" for m in app["machines"]) else None

        return wait_for(look, 60, f"{name} runs: {self.tail()}")

    def protection(self) -> dict[str, tuple[str, str]]:
        """Name of each database file -> words, reason."""
        return {Path(d["path"]).name: (d["words"], d["reason"]) for d in self.json("status")["databases"]}

    def request(
        self, method: str, path: str, body: bytes = b"", app: str = "guestbook", timeout_s: float = 30
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=timeout_s)
        try:
            connection.request(
                method, path, body=body, headers={"Host": f"{app}.localhost", "Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def check(self, app: str = "guestbook") -> dict[str, Any]:
        """What guestbook says of its database."""
        status, body = self.request("GET", "/check", app=app)
        assert status == 200, body
        return dict(json.loads(body))


class Load:
    """Writes to guestbook at a steady rate, whether answers come or not; keeps what was acknowledged.

    ok: ids, in no order. bad: what went wrong. worst_s: the longest from when a request was due to its answer.
    """

    def __init__(self, node: Node, rate: float = 50.0, senders: int = 16) -> None:
        self.ok: list[int] = []
        self.bad: list[str] = []
        self.worst_s = 0.0
        self._node, self._rate = node, rate
        self._due: queue.Queue[tuple[int, float] | None] = queue.Queue()
        self._stop = threading.Event()
        self._senders = [threading.Thread(target=self._send, daemon=True) for _ in range(senders)]
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Load:
        for thread in (*self._senders, self._clock):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._clock.join()
        for _sender in self._senders:
            self._due.put(None)
        for sender in self._senders:
            sender.join(90)

    def _tick(self) -> None:
        began = time.monotonic()
        number = 0
        while not self._stop.wait(max(0.0, began + number / self._rate - time.monotonic())):
            self._due.put((number, began + number / self._rate))
            number += 1

    def _send(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._node.http, timeout=75)
        headers = {"Host": "guestbook.localhost", "Content-Type": "application/json"}
        for number, due in iter(self._due.get, None):
            try:
                connection.request(
                    "POST", "/", body=json.dumps({"name": "load", "message": str(number)}), headers=headers
                )
                answer = connection.getresponse()
                body = answer.read()
                if answer.status == 200:
                    self.ok.append(json.loads(body)["id"])
                else:
                    self.bad.append(f"{answer.status} {body[:100]!r}")
            except (OSError, http.client.HTTPException) as error:
                self.bad.append(repr(error))
                connection.close()
            self.worst_s = max(self.worst_s, time.monotonic() - due)
        connection.close()

    def assert_nothing_lost(self) -> None:
        """Every acknowledged row is there, and the ids have no gap."""
        found = self._node.check()
        assert found["integrity"] == "ok"
        assert set(self.ok) <= set(range(1, found["max_id"] + 1))
        assert found["rows"] == found["max_id"]


def unprotected(node: Node) -> str:
    """The reason that status gives."""
    return str(
        wait_for(
            lambda: next((p[1] for p in [node.protection()["guestbook.db"]] if p[0].startswith("NOT PROTECTED")), ""),
            40,
            f"status says so: {node.protection()}",
        )
    )


def processes_of(root: Path) -> Iterator[tuple[int, str]]:
    """Process id and command line of everything that was started with a path below ``root``."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if int(entry.name) != os.getpid():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(root) in line:
                    yield int(entry.name), line


MakeNode = Callable[..., Node]


def serving(node: Node, base_archive: Path) -> Node:
    node.setup()
    node.start()
    node.podman("load", "--input", str(base_archive))
    return node
