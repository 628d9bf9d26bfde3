"""Our own Podman: ``podman system service`` with storage, networks and settings of one node.

Owns the process and its files below ``data_dir/engine`` and ``run_dir``; never talks its API beyond a ping. The service
is its own session, so that it and the containers outlive minipaas, and is adopted again when it still answers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minipaas.engine.docker_api.abilities import host_ulimits
from minipaas.engine.docker_api.network import NETWORK
from minipaas.errors import EngineError, EngineMissing, EngineUnavailable

MAX_SOCKET_PATH = 107
START_S = 30.0
STOP_S = 10.0
MAX_LOG = 1 << 20
_HELPER_DIRS = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/lib/podman", "/usr/local/libexec/podman")
_INITS = ("catatonit", "tini-static", "tini", "docker-init", "dumb-init")


# -- what fits this host; pure -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """What the settings depend on. cgroups: v1, hybrid or v2. ulimits: hard limits by name. init, network_backend: '' if none."""

    cgroups: str
    has_systemd: bool
    runtimes: tuple[str, ...]
    ulimits: tuple[tuple[str, int], ...]
    init: str = ""
    network_backend: str = ""


def choose_runtime(cgroups: str, runtimes: Sequence[str]) -> str:
    """crun on cgroups v2; else runc, as crun refuses hybrid hierarchies that systemd did not make. Raises EngineMissing."""
    order = ("crun", "runc") if cgroups == "v2" else ("runc", "crun")
    chosen = next((each for each in order if each in runtimes), None)
    if chosen is None:
        raise EngineMissing("Podman has no runtime: install one, on Debian with: apt install runc")
    return chosen


def containers_conf(host: Host) -> str:
    """The text of containers.conf, which replaces the system's."""
    quoted = ", ".join(f'"{name}={value}:{value}"' for name, value in host.ulimits)
    lines = ["# Written by minipaas at each start of its Podman service.", "[containers]"]
    lines += [f"default_ulimits = [{quoted}]", 'log_driver = "k8s-file"', "log_size_max = 10485760"]
    lines += [f'init_path = "{host.init}"'] if host.init else []
    lines += ["[engine]", f'runtime = "{choose_runtime(host.cgroups, host.runtimes)}"', 'events_logger = "file"']
    lines += [f'cgroup_manager = "{"systemd" if host.has_systemd else "cgroupfs"}"']
    # The process that watches an exec stays for this long after its end, 300 s by default.
    lines += ["exit_command_delay = 10"]
    # The default, shared memory, is one area for all Podmans of the host, and outlives a data directory.
    lines += ['lock_type = "file"', "[network]"]
    lines += [f'network_backend = "{host.network_backend}"'] if host.network_backend else []
    return "\n".join(lines) + "\n"


def this_host() -> Host:
    return Host(
        cgroups=_cgroups(),
        has_systemd=Path("/run/systemd/system").is_dir() and Path("/proc/1/comm").read_text().strip() == "systemd",
        runtimes=tuple(each for each in ("crun", "runc") if _program(each)),
        ulimits=host_ulimits(),
        init=next((path for each in _INITS if (path := _program(each))), ""),
        network_backend="netavark" if _program("netavark") else "",
    )


def _cgroups() -> str:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return "v2"
    return "hybrid" if (root / "unified").is_dir() else "v1"


def _program(name: str) -> str:
    search = os.pathsep.join(
        (os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin", *_HELPER_DIRS)
    )
    return shutil.which(name, path=search) or ""


# -- the service -------------------------------------------------------------------------------------------------------

# Settings of another Podman, and what only this process needs to know: the keys of the bucket, the recovery key, tokens.
_NOT_FOR_PODMAN = ("CONTAINER", "DOCKER_", "MINIPAAS_", "AWS_")


class PodmanService:
    """One node's Podman. data_dir, run_dir: the node's; run_dir should be on a tmpfs, such as /run/minipaas."""

    def __init__(self, data_dir: Path, run_dir: Path) -> None:
        self._home, self._run = data_dir.absolute() / "engine", run_dir.absolute()
        self.socket = self._run / "podman.sock"
        self._pid_file, self._conf = self._run / "podman.pid", self._run / "containers.conf"
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise EngineError(f"{self.socket} is longer than {MAX_SOCKET_PATH} bytes; choose a shorter run directory")

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def has_storage(self) -> bool:
        """Whether this node has run containers here before."""
        return (self._home / "storage").is_dir()

    @property
    def is_installed(self) -> bool:
        return bool(_program("podman"))

    def answers(self) -> bool:
        return answers(self.socket)

    def start(self) -> None:
        """Make sure it runs: adopt it if it answers, else start it. Raises EngineMissing, EngineUnavailable."""
        program = _program("podman")
        if not program:
            raise EngineMissing("Podman is not installed: on Debian, apt install podman")
        self._make_folders()
        with self._lock():
            if self.answers():
                return
            self._end_process()
            self._forget_old_boot()
            self._conf.write_text(containers_conf(this_host()))
            self.socket.unlink(missing_ok=True)
            self._await_answer(self._spawn(program))

    def _make_folders(self) -> None:
        for folder in (self._home, self._home / "networks", self._home / "tmp", self._run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._run / "podman.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _forget_old_boot(self) -> None:
        """Podman takes what is in its run directories for the present; after a reboot, on a disk, it is not."""
        marker, boot = self._run / "boot_id", Path("/proc/sys/kernel/random/boot_id").read_text()
        if marker.exists() and marker.read_text() != boot:
            for folder in ("engine", "libpod"):
                shutil.rmtree(self._run / folder, ignore_errors=True)
        marker.write_text(boot)

    def _flags(self) -> list[str]:
        flags = {
            "--root": self._home / "storage",
            "--runroot": self._run / "engine",
            "--tmpdir": self._run / "libpod",
            "--network-config-dir": self._home / "networks",
            "--volumepath": self._home / "volumes",
            "--storage-driver": self._storage_driver(),
        }
        return [f"{name}={value}" for name, value in flags.items()]

    def _storage_driver(self) -> str:
        """What the storage was made with, else overlay if the kernel has it on this file system, else vfs."""
        storage = self._home / "storage"
        for driver in ("overlay", "vfs"):
            if (storage / f"{driver}-images").is_dir():
                return driver
        return "overlay" if overlay_works(self._home) else "vfs"

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_PODMAN)}
        path = os.pathsep.join((kept.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
        return {**kept, "PATH": path, "CONTAINERS_CONF": str(self._conf), "TMPDIR": str(self._home / "tmp")}

    def _spawn(self, program: str) -> subprocess.Popen[bytes]:
        log = self._run / "podman.log"
        mode = "wb" if log.exists() and log.stat().st_size > MAX_LOG else "ab"
        with log.open(mode) as output:
            process = subprocess.Popen(
                [program, *self._flags(), "system", "service", "--time=0", self.url],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=self._environment(),
                start_new_session=True,
            )
        self._pid_file.write_text(f"{process.pid} {_started(process.pid)}\n")
        return process

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        limit = time.monotonic() + START_S
        while not self.answers():
            if process.poll() is not None:
                raise EngineUnavailable(f"podman system service ended at once: {self._last_words()}")
            if time.monotonic() > limit:
                self._end_process()
                raise EngineUnavailable(f"podman system service did not answer in {START_S:g} s: {self._last_words()}")
            time.sleep(0.02)

    def _last_words(self) -> str:
        lines = (self._run / "podman.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it said nothing"

    def _pid(self) -> int | None:
        """The service's process; None when it is gone, also when its number belongs to another by now."""
        try:
            pid, started = self._pid_file.read_text().split()
            return int(pid) if _started(int(pid)) == started else None
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        """End the service; containers go on. No error when it does not run."""
        if self._run.is_dir():
            with self._lock():
                self._end_process()
                self.socket.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Detach what Podman keeps mounted below its storage, so that the disk can be. Nothing while a container is there."""
        points = mounts_below(self._home)
        if not any(point.endswith("/merged") for point in points):
            unmount_below(self._home)

    def _end_process(self) -> None:
        for sign, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            pid = self._pid()
            if pid is None:
                break
            os.kill(pid, sign)
            limit = time.monotonic() + patience_s
            while self._pid() is not None and time.monotonic() < limit:
                _reap(pid)
                time.sleep(0.02)
        self._pid_file.unlink(missing_ok=True)

    def wipe(self) -> None:
        """Kill and delete everything: containers, network, service, images, files. For uninstalling and for tests."""
        usable = self.is_installed and self.has_storage and self._conf.exists()
        if usable:
            self._run_podman("rm", "--all", "--force", "--time=0")
        for bridge in self._bridges():
            remove_bridge(bridge)
        if usable:
            self._run_podman("network", "rm", "--force", NETWORK)
        self.stop()
        for pid in _monitors(self._home):
            os.kill(pid, signal.SIGKILL)
        for folder in (self._home, self._run):
            unmount_below(folder)
            shutil.rmtree(folder, ignore_errors=True)

    def _bridges(self) -> list[str]:
        """Interfaces of our networks; Podman leaves one when a container in it was not taken down in order."""
        names = []
        for path in (self._home / "networks").glob("*.json"):
            try:
                names.append(str(json.loads(path.read_text())["network_interface"]))
            except (ValueError, KeyError, TypeError):
                continue
        return names

    def _run_podman(self, *arguments: str) -> None:
        """Best effort: what it leaves, the caller takes down by other means."""
        command = [_program("podman"), *self._flags(), *arguments]
        try:
            subprocess.run(command, env=self._environment(), capture_output=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            pass


def _monitors(home: Path) -> Iterator[int]:
    """conmon processes below ``home``: one for each container, and for a while for each exec that has ended."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        prefix = os.fsencode(home) + b"/"
        if arguments[0].endswith(b"conmon") and any(each.startswith(prefix) for each in arguments):
            yield int(entry.name)


def answers(path: Path, timeout_s: float = 2.0) -> bool:
    """Whether an engine's API answers on a unix socket."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")
            return connection.recv(64).split(b" ")[1:2] == [b"200"]
    except OSError:
        return False


def _started(pid: int) -> str:
    """The start time of a process in clock ticks since boot, which tells it from a later one of the same number; '' if none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _reap(pid: int) -> None:
    """Collect it when it is a child of this process; of an adopted one its parent does."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def overlay_works(folder: Path) -> bool:
    """Whether an overlay can be mounted on this file system, tried with three empty folders."""
    probe = folder / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    lower, upper, work, merged = (probe / each for each in ("lower", "upper", "work", "merged"))
    for each in (lower, upper, work, merged):
        each.mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    try:
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)],
            check=True,
            capture_output=True,
            timeout=10,
        )
        subprocess.run(["umount", str(merged)], check=True, capture_output=True, timeout=10)
        return True
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def remove_bridge(name: str) -> None:
    """Delete a bridge, and the network namespaces and interfaces in it; nothing when there is none."""
    shown = _ip("-json", "link", "show", "master", name)
    for link in json.loads(shown.stdout or b"[]") if shown.returncode == 0 else []:
        if namespace := str(link.get("link_netns") or ""):
            _ip("netns", "delete", namespace)
        _ip("link", "delete", str(link.get("ifname")))
    _ip("link", "delete", name)


def _ip(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *arguments], capture_output=True, timeout=10, check=False)


def mounts_below(folder: Path) -> list[str]:
    """The deepest first."""
    prefix = f"{folder.resolve()}/"
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((each for each in points if each.startswith(prefix)), key=len, reverse=True)


def unmount_below(folder: Path) -> None:
    """Detach every mount in ``folder``, the deepest first."""
    for point in mounts_below(folder):
        subprocess.run(["umount", "--lazy", point], capture_output=True, timeout=10, check=False)
