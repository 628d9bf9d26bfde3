"""A Host: a machine of its own on this machine, with its own processes, disk, mounts, address and engine storage.

Owns its namespaces; ``power_off`` is the plug being pulled. Knows nothing of minipaas. A host dies with the thread that
switched it on, whatever way that ends, so that a killed run leaves no process behind.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import demo.init
from demo.lab import LAB_ROOT, PREFIX_BITS, Lab, LabError, namespaces, processes, remove_disk, system, wait_until

CLONE_NEWNET = 0x40000000
GONE_WITHIN_S = 20.0


class Process:
    """A program in a host, seen from outside. Signals go to the program itself, not to what carried it in."""

    def __init__(self, carrier: subprocess.Popen[bytes]) -> None:
        self._carrier = carrier
        self.stdout = carrier.stdout
        self.stdin = carrier.stdin

    @property
    def pid(self) -> int | None:
        """Outside of the host; None before it has begun and after it has ended."""
        try:
            children = Path(f"/proc/{self._carrier.pid}/task/{self._carrier.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def poll(self) -> int | None:
        return self._carrier.poll()

    def wait(self, timeout_s: float) -> int:
        """Its exit code; negative or 1 when a signal ended it. Raises subprocess.TimeoutExpired."""
        return self._carrier.wait(timeout_s)

    def send_signal(self, number: int) -> None:
        wait_until(lambda: self.poll() is not None or self.pid is not None, 5.0)
        pid = self.pid
        if pid is not None:
            os.kill(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Host:
    """A machine that can be switched off like pulling the plug.

    Inside, its disk is at LAB_ROOT: use ``DATA`` there, and ``RUN``, which is in memory, on every host alike.
    disk: the same folder, seen from outside.
    """

    DATA = str(LAB_ROOT / "data")
    RUN = "/run/minipaas"

    def __init__(self, name: str, *, lab: Lab, region: str = "") -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
            raise LabError(f"{name!r} is not a name for a host; use lower-case letters, digits and hyphens")
        self.name = name
        self.region = region
        self.address = ""
        self.disk = lab.folder / f"{name}.disk"
        self._lab = lab
        self._interface = ""
        self._carrier: subprocess.Popen[bytes] | None = None
        self._init_pid = 0

    @property
    def on(self) -> bool:
        return self._init_pid != 0

    def __enter__(self) -> Host:
        self.power_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_off()

    def power_on(self) -> None:
        """Start it with an empty disk. Raises LabError."""
        if self.on:
            raise LabError(f"host {self.name} is on already")
        for folder in ("data", "home", "tmp"):
            (self.disk / folder).mkdir(parents=True)
        self.address, self._interface = self._lab.join(self)
        try:
            self._start_init()
            self._connect()
        except BaseException:
            self.power_off()
            raise

    def _start_init(self) -> None:
        """The init is killed by the kernel when this thread ends, so that nothing outlives a killed run."""
        unshare = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        init = [sys.executable, "-I", demo.init.__file__, str(self.disk), str(LAB_ROOT), self.name]
        self._carrier = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *unshare, "--propagation", "private", "--", *init],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._carrier.stdout and self._carrier.stderr
        if self._carrier.stdout.readline() != demo.init.READY:
            why = self._carrier.stderr.read().decode(errors="replace").strip().splitlines()
            raise LabError(f"host {self.name} did not start: {why[-1] if why else 'its first process ended'}")
        self._init_pid = int(Path(f"/proc/{self._carrier.pid}/task/{self._carrier.pid}/children").read_text())
        namespace = Path(f"/proc/{self._init_pid}/ns/pid").readlink()
        (self._lab.folder / f"{self.name}.init").write_text(f"{self._init_pid} {namespace}")

    def _connect(self) -> None:
        """A cable from the bridge to ``eth0``. There is no way from it to other networks."""
        inside = ("nsenter", f"--net=/proc/{self._init_pid}/ns/net", "ip")
        peer = ("peer", "name", "eth0", "netns", str(self._init_pid))
        system("ip", "link", "add", self._interface, "type", "veth", *peer)
        system("ip", "link", "set", self._interface, "master", self._lab.bridge, "up")
        system(*inside, "address", "add", f"{self.address}/{PREFIX_BITS}", "dev", "eth0")
        system(*inside, "link", "set", "eth0", "up")
        system(*inside, "link", "set", "lo", "up")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The argument list that runs ``arguments`` inside."""
        if not self.on:
            raise LabError(f"host {self.name} is off")
        return ["nsenter", "-t", str(self._init_pid), "-m", "-n", "-p", "-u", "-i", "--", *arguments]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a program inside gets: nothing of this machine's settings, and folders on the host's own disk."""
        base = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(LAB_ROOT / "home"),
            "TMPDIR": str(LAB_ROOT / "tmp"),
            "LANG": "C.UTF-8",
        }
        return base | dict(extra or {})

    def popen(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        stdin: bytes | None = None,
    ) -> Process:
        """Start a program inside.

        log: a file outside for its output, appended to; without one ``stdout`` is a pipe of both streams.
        stdin: given to it, then closed; at most what a pipe holds (64 KiB).
        """
        with open(log, "ab") if log else open(os.devnull, "wb") as output:
            carrier = subprocess.Popen(
                self.command(arguments),
                env=self.environment(env),
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=output if log else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if stdin is not None and carrier.stdin:
            carrier.stdin.write(stdin)
            carrier.stdin.close()
        return Process(carrier)

    def run(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        timeout_s: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside and wait. Raises LabError with its last line when it fails and ``check`` is set."""
        try:
            done = subprocess.run(
                self.command(arguments),
                env=self.environment(env),
                input=(stdin or b"").decode(),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{arguments[0]} on host {self.name} did not end within {timeout_s:.0f} s") from None
        if check and done.returncode != 0:
            why = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise LabError(f"{' '.join(arguments)} on host {self.name} exited with {done.returncode}: {why[-1]}")
        return done

    def connect(self, port: int, timeout_s: float = 5.0) -> socket.socket:
        """A connection to 127.0.0.1 inside, for what listens there only. Raises OSError.

        A socket stays in the network in which it was made, and a thread can enter another: so a thread does, and ends.
        """
        if not self.on:
            raise LabError(f"host {self.name} is off")
        result: list[socket.socket | OSError] = []

        def from_inside() -> None:
            try:
                _enter_network(self._init_pid)
                result.append(socket.create_connection(("127.0.0.1", port), timeout_s))
            except OSError as error:
                result.append(error)

        visitor = threading.Thread(target=from_inside, name=f"visitor-{self.name}")
        visitor.start()
        visitor.join()
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    def power_off(self) -> float:
        """Kill every process and container at once, delete the disk, and see that nothing is left.

        Returns the monotonic time of the kill. Nothing happens to a host that is off. Raises LabError when something stays.
        """
        carrier, self._carrier = self._carrier, None
        left = self._all_namespaces()
        moment = time.monotonic()
        if self._init_pid:
            os.kill(self._init_pid, signal.SIGKILL)
        elif carrier:
            carrier.kill()
        self._init_pid = 0
        if carrier:
            _end(carrier)
        self._lab.leave(self)
        self._check_gone(left)
        (self._lab.folder / f"{self.name}.init").unlink(missing_ok=True)
        if self.disk.exists():
            remove_disk(self.disk)
        return moment

    def _all_namespaces(self) -> set[str]:
        """Those of the host and of every container in it."""
        if not self._init_pid:
            return set()
        inside = processes(Path(f"/proc/{self._init_pid}/root/proc"))
        return {name for process in inside for name in namespaces(process)} - namespaces(Path("/proc/self"))

    def _check_gone(self, left: set[str]) -> None:
        """The kernel removes the cable some time after the last process."""
        link = Path("/sys/class/net", self._interface or "-")

        def gone() -> bool:
            return not link.exists() and not any(left & namespaces(p) for p in processes(Path("/proc")))

        if left and not wait_until(gone, GONE_WITHIN_S, 0.05):
            raise LabError(f"host {self.name} is not wholly off: a process or its network {link.name} is still there")


def _enter_network(pid: int) -> None:
    """Move this thread, and no other, into the network of a process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def _end(carrier: subprocess.Popen[bytes]) -> None:
    try:
        carrier.wait(GONE_WITHIN_S)
    except subprocess.TimeoutExpired:
        carrier.kill()
        carrier.wait()
    for stream in (carrier.stdout, carrier.stderr):
        if stream:
            stream.close()
