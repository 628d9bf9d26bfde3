"""What systemd is told while it supervises ``replicate``, and the unit as text.

Owns the protocol of sd_notify (a datagram to a socket that is named in the environment). Never writes a unit anywhere.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from replicator.errors import UsageError

ENVIRONMENT_FILE = Path("/etc/replicator/environment")
STOP_TIMEOUT_S = 120
"""More than a program beside and the last commits are given by default, one after the other."""
WATCHDOG_S = 60


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell systemd ``NAME=value`` lines. False when nothing supervises this process, or does not take it.

    Source: sd_notify(3).
    """
    name = environment.get("NOTIFY_SOCKET", "")
    if not name.startswith(("/", "@")):
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer:
        peer.connect("\0" + name[1:] if name.startswith("@") else name)
        peer.sendall(state.encode())
        return True
    return False


def notify_reloading(environment: Mapping[str, str] = os.environ) -> None:
    """Until the next ``READY=1``."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", environment)


def watchdog_s(environment: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """After how long without a sign of life systemd ends this process; None for never. Source: sd_watchdog_enabled(3)."""
    microseconds, meant = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    if meant and meant != str(os.getpid() if pid is None else pid):
        return None
    return int(microseconds) / 1_000_000


class Watchdog:
    """Gives signs of life as long as there is life, if systemd waits for them. is_alive: asked each time."""

    def __init__(self, is_alive: Callable[[], bool], environment: Mapping[str, str] = os.environ) -> None:
        self._is_alive = is_alive
        self._environment = environment
        self._within_s = watchdog_s(environment)
        self._stopping = threading.Event()

    def start(self) -> None:
        if self._within_s is not None:
            threading.Thread(target=self._run, args=(self._within_s / 3,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self, every_s: float) -> None:
        while not self._stopping.wait(every_s):
            if self._is_alive():
                notify("WATCHDOG=1", self._environment)


def unit(python: Path, config: Path) -> str:
    """The text of the unit. python: the interpreter that has the replicator. Both paths are absolute. Raises UsageError."""
    return f"""\
# Written by replicator systemd-unit.
[Unit]
Description=replicator: SQLite databases, continuously replicated to object storage
Wants=network-online.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={_quoted(python)} -P -m replicator replicate --config {_quoted(config)}
ExecReload=/bin/kill -HUP $MAINPID
# NAME=value lines, mode 0600, if there is one: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_CA_BUNDLE.
EnvironmentFile=-{ENVIRONMENT_FILE}
SyslogIdentifier=replicator
# Also when it says that it was used wrongly: a folder that is missing may be a disk that is mounted later.
Restart=always
RestartSec=5
# A database may be restored before replication begins.
TimeoutStartSec=infinity
TimeoutStopSec={STOP_TIMEOUT_S}
WatchdogSec={WATCHDOG_S}
# Each database takes several open files.
LimitNOFILE=524288

[Install]
WantedBy=multi-user.target
"""


def _quoted(path: Path) -> str:
    """A path as one word of a unit file. Source: systemd.syntax(7), "Quoting"; systemd.service(5), "Command lines"."""
    if any(each in '"\\%$' or not each.isprintable() for each in str(path)):
        raise UsageError(
            f"{str(path)!r} cannot stand in a systemd unit; use a path without quotes, backslashes, % and $"
        )
    return f'"{path}"'
