"""What systemd is told, and the unit that it is given."""

from __future__ import annotations

import configparser
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import systemd
from replicator.errors import UsageError
from replicator.service import Replicator


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(5)
        yield receiver


def environment(supervisor: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(supervisor.getsockname()), **more}


def test_a_state_is_one_datagram(supervisor: socket.socket) -> None:
    assert systemd.notify("READY=1", environment(supervisor))
    assert supervisor.recv(100) == b"READY=1"


def test_an_abstract_socket_is_found() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")
        name = receiver.getsockname()[1:].decode()
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": f"@{name}"})
        assert receiver.recv(100) == b"READY=1"


@pytest.mark.parametrize("name", ["", "relative", "/nowhere/notify"])
def test_without_a_supervisor_nothing_happens(name: str) -> None:
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": name})


def test_a_reload_bears_the_time_that_systemd_asks_for(supervisor: socket.socket) -> None:
    systemd.notify_reloading(environment(supervisor))
    assert supervisor.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


def test_the_watchdog_hears_of_life_only_while_there_is_any(supervisor: socket.socket) -> None:
    alive = iter([False, False, True])
    asked = 0

    def is_alive() -> bool:
        nonlocal asked
        asked += 1
        return next(alive, True)

    watchdog = systemd.Watchdog(is_alive, environment(supervisor, WATCHDOG_USEC="30000"))
    watchdog.start()
    try:
        assert supervisor.recv(100) == b"WATCHDOG=1"
        assert asked >= 3
    finally:
        watchdog.stop()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_when_there_is_a_watchdog(given: dict[str, str], expected: float | None) -> None:
    assert systemd.watchdog_s(given) == expected


def test_the_unit_says_how_it_is_run() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read_string(systemd.unit(Path("/opt/r/bin/python"), Path("/etc/my replicator.yml")))
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["ExecStart"] == ('"/opt/r/bin/python" -P -m replicator replicate --config "/etc/my replicator.yml"')
    assert int(service["TimeoutStopSec"]) > 2 * 30
    assert (service["WatchdogSec"], service["Restart"]) == ("60", "always")


def test_a_path_that_systemd_would_read_otherwise_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot stand in a systemd unit"):
        systemd.unit(Path("/usr/bin/python"), Path("/etc/%i.yml"))


def test_a_replicator_that_was_stopped_is_not_alive() -> None:
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    assert replicator.is_alive(5)
    replicator.stop(1)
    assert not replicator.is_alive(5)
