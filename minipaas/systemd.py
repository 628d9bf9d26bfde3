"""The systemd unit that keeps a node running, as text. Owns what it says and how paths are quoted in it. Pure: never writes it anywhere."""

from __future__ import annotations

from pathlib import Path

from minipaas.errors import BadRequest, FleetHeld

ENVIRONMENT_FILE = Path("/etc/minipaas/environment")
STOP_TIMEOUT_S = 90
"""More than a start that is under way and the stop that follows it take, with a bucket that cannot be reached."""


def unit(python: Path, data_dir: Path) -> str:
    """The text of the unit. python: the interpreter in whose environment minipaas is installed. Both paths are absolute. Raises BadRequest.

    A stop ends this process only (KillMode), since apps, edge and engine go on without it. For the same reason it has no
    RuntimeDirectory, which would take their sockets away, and no mount namespace of its own, in which their mounts would lie.
    """
    return f"""\
# Written by minipaas systemd-unit.
[Unit]
Description=minipaas: apps, the edge, and the replication of their databases
Wants=network-online.target
After=network.target network-online.target time-sync.target docker.service podman.socket
RequiresMountsFor={quoted(data_dir)}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={quoted(python)} -P -m minipaas serve --data {quoted(data_dir)}
# NAME=value lines, mode 0600, if there is one: MINIPAAS_ACCESS_KEY, MINIPAAS_SECRET_KEY, DOCKER_HOST, AWS_CA_BUNDLE.
EnvironmentFile=-{ENVIRONMENT_FILE}
SyslogIdentifier=minipaas
Restart=always
RestartSec=5
# Another node has the fleet: nothing here changes that.
RestartPreventExitStatus={FleetHeld.exit_code}
# Apps, the edge and the engine go on when minipaas stops or is upgraded: minipaas down ends them.
KillMode=process
TimeoutStopSec={STOP_TIMEOUT_S}
Delegate=yes
TasksMax=infinity
# Each database takes several open files.
LimitNOFILE=524288

[Install]
WantedBy=multi-user.target
"""


def quoted(path: Path) -> str:
    """A path as one word of a unit file. Raises BadRequest for what systemd would read as a specifier, a variable or an escape.

    Source: systemd.syntax(7), "Quoting"; systemd.service(5), "Command lines".
    """
    if any(each in '"\\%$' or not each.isprintable() for each in str(path)):
        raise BadRequest(
            f"{str(path)!r} cannot stand in a systemd unit; use a path without quotes, backslashes, % and $"
        )
    return f'"{path}"'
