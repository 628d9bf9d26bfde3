"""A Lab: the network between hosts that live on this machine, and the removal of what an earlier, killed run left.

Owns the bridge, its addresses and the folder of disks. Never touches the machine's own addresses, firewall or engine.
A lab is locked as long as its maker lives; the next one to be made removes those that are not.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from demo.host import Host

LAB_ROOT = Path("/var/lib/minipaas-demo")
"""Labs outside; inside of a host its own disk is mounted here."""

BRIDGE_PREFIX = "mpd"
RANGES: tuple[ipaddress.IPv4Network, ...] = tuple(ipaddress.IPv4Network("10.223.0.0/16").subnets(new_prefix=24))
PREFIX_BITS = 24
NAMESPACES = ("pid", "mnt", "net", "uts", "ipc")
GONE_WITHIN_S = 20.0


class LabError(Exception):
    """A host cannot be made or taken away on this machine; the message says why and what to do next, on one line."""


# -- small steps -------------------------------------------------------------------------------------------------------


def system(*arguments: str, timeout_s: float = 20.0) -> str:
    """Output of a command of the system. Raises LabError with its last line on standard error."""
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise LabError(f"{arguments[0]} is not installed; run scripts/system-packages demo") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(arguments)} did not end within {timeout_s:.0f} s; try again") from None
    if done.returncode != 0:
        why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(f"{' '.join(arguments)} failed: {why[-1]}")
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout_s: float, step_s: float = 0.02) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step_s)
    return True


def namespaces(process: Path) -> set[str]:
    """Namespaces of a process, such as ``pid:[4026531836]``; those that it has left already are missing."""
    found = set()
    for kind in NAMESPACES:
        try:
            found.add(str((process / "ns" / kind).readlink()))
        except OSError:
            continue
    return found


def processes(proc: Path) -> Iterator[Path]:
    return (entry for entry in proc.iterdir() if entry.name.isdigit())


def check_allowed() -> None:
    """Raises LabError unless this process may make namespaces and mounts."""
    if os.geteuid() != 0:
        raise LabError("the demo makes network and process namespaces: run it as root, or with sudo")
    try:
        system("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "true")
    except LabError as error:
        raise LabError(
            f"this machine does not allow new namespaces ({error}); use a virtual machine or a privileged container"
        ) from None


# -- the network between hosts -----------------------------------------------------------------------------------------


class Lab:
    """A bridge with an unused range of addresses; ``gateway`` is this machine's address on it.

    Used as a context manager, in the main thread: hosts end with the thread that started them.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(3)
        self.folder = LAB_ROOT / f"lab-{self.token}"
        self.bridge = f"{BRIDGE_PREFIX}{self.token}"
        self._hosts: list[Host] = []
        self._next = 10
        self._lock: IO[str] | None = None
        self._network = RANGES[0]

    @property
    def gateway(self) -> str:
        return str(self._network[1])

    def __enter__(self) -> Lab:
        check_allowed()
        with _all_labs():
            remove_leftovers()
            self.folder.mkdir(parents=True, mode=0o700)
            self._lock = _locked(self.folder / "lock")
            self._network = _unused_range()
            system("ip", "link", "add", self.bridge, "type", "bridge")
            system("ip", "address", "add", f"{self.gateway}/{PREFIX_BITS}", "dev", self.bridge)
            system("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in list(self._hosts):
            host.power_off()
        with _all_labs():
            _remove_lab(self.folder)
        if self._lock:
            self._lock.close()

    def join(self, host: Host) -> tuple[str, str]:
        """The address and the interface name for a new host."""
        number = self._next
        self._next += 1
        self._hosts.append(host)
        return str(self._network[number]), f"{self.bridge}-{number}"

    def leave(self, host: Host) -> None:
        if host in self._hosts:
            self._hosts.remove(host)


@contextmanager
def _all_labs() -> Iterator[None]:
    """Making and removing labs happens one at a time on a machine."""
    LAB_ROOT.mkdir(parents=True, exist_ok=True)
    with open(LAB_ROOT / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _locked(path: Path) -> IO[str] | None:
    """The file, locked for as long as it stays open; None when somebody else holds it."""
    file = open(path, "w")  # noqa: SIM115 - it stays open as long as the lab
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _unused_range() -> ipaddress.IPv4Network:
    """A range that no route of this machine touches. Raises LabError."""
    routes = [ipaddress.IPv4Network(text, strict=False) for text in _routes()]
    for candidate in RANGES:
        if not any(candidate.overlaps(route) for route in routes):
            return candidate
    raise LabError(f"all of {RANGES[0].supernet(new_prefix=16)} is routed on this machine already; remove that route")


def _routes() -> Iterator[str]:
    for line in system("ip", "-4", "route", "show", "table", "all").splitlines():
        match = re.search(r"\b(\d+\.\d+\.\d+\.\d+(?:/\d+)?)", line.partition(" dev ")[0])
        if match and not line.startswith("default"):
            yield match[1]


def remove_leftovers() -> None:
    """Remove labs whose maker is gone. Called while no other lab is being made."""
    for folder in LAB_ROOT.glob("lab-*"):
        lock = _locked(folder / "lock")
        if lock:
            _remove_lab(folder)
            lock.close()
    alive = {BRIDGE_PREFIX + folder.name.removeprefix("lab-") for folder in LAB_ROOT.glob("lab-*")}
    for link in Path("/sys/class/net").glob(f"{BRIDGE_PREFIX}??????"):
        if link.name not in alive and (link / "bridge").exists():
            system("ip", "link", "delete", link.name)


def _remove_lab(folder: Path) -> None:
    for record in folder.glob("*.init"):
        _end_recorded(record)
    _end_working_in(folder)
    for disk in folder.glob("*.disk"):
        remove_disk(disk)
    bridge = BRIDGE_PREFIX + folder.name.removeprefix("lab-")
    if Path("/sys/class/net", bridge).exists():
        system("ip", "link", "delete", bridge)
    shutil.rmtree(folder, ignore_errors=True)


def _end_recorded(record: Path) -> None:
    """Kill the first process of a host of an earlier run, if it is still the same process."""
    pid, _, namespace = record.read_text().partition(" ")
    process = Path("/proc", pid)
    if not pid or namespace not in namespaces(process):
        return
    try:
        os.kill(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_until(lambda: namespace not in namespaces(process), GONE_WITHIN_S)


def _end_working_in(folder: Path) -> None:
    """Kill what was started outside of the hosts with its working directory in the lab, such as the S3 server."""

    def workers() -> list[Path]:
        return [process for process in processes(Path("/proc")) if _works_in(process, folder)]

    for process in workers():
        try:
            os.kill(int(process.name), signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_until(lambda: not workers(), GONE_WITHIN_S)


def _works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink().is_relative_to(folder)
    except OSError:
        return False


def remove_disk(disk: Path) -> None:
    """Delete a host's disk and the control groups of the containers on it, whose processes have ended."""
    ids = {
        path.name for depth in ("*", "*/*", "*/*/*", "*/*/*/*") for path in disk.glob(f"{depth}/overlay-containers/*")
    }
    remove_cgroups(ids)
    shutil.rmtree(disk, ignore_errors=True)
    if disk.exists():
        raise LabError(f"{disk} could not be deleted: something still writes to it; end it and delete the folder")


def remove_cgroups(container_ids: set[str]) -> None:
    """Remove what containers that are gone leave in the control group tree, which namespaces do not take along."""
    groups = [
        group
        for pattern in ("libpod_parent/*", "*/libpod_parent/*")
        for group in Path("/sys/fs/cgroup").glob(pattern)
        if any(container in group.name for container in container_ids)
    ]
    for group in groups:
        for inner in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            inner.rmdir()
        wait_until(lambda group=group: _rmdir(group), 2.0)  # type: ignore[misc]


def _rmdir(folder: Path) -> bool:
    """Whether it is gone. A control group whose last process just died is busy for a moment."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
