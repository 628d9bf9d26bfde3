"""Commands about the node itself: ``setup``, ``serve``, ``recover``, ``down``, ``systemd-unit``. Owns the wiring of the real parts.

These five work on the node's data directory, on this host; everything else is a client of the API.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipaas.cli import text
from minipaas.errors import BadRequest
from minipaas.settings import (
    DEFAULT_DATA_DIR,
    DEFAULT_RUN_DIR,
    Credentials,
    Settings,
    read_credentials,
    read_settings,
)

if TYPE_CHECKING:
    from minipaas.state import State

data_option = click.option("--data", "data_dir", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_DATA_DIR,
                           envvar="MINIPAAS_DATA", show_default=True, help="Where this node keeps everything.")  # fmt: skip


def _fixed_port(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A port that the system chooses would be another one at every start, and nobody would find it."""
    if value.rpartition(":")[2] == "0":
        raise BadRequest(f"{param.opts[0]} {value}: there is no port 0; choose one from 1 to 65535")
    return value


def node_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a node is told when it is made, by ``setup`` and by ``recover``."""
    options = (
        data_option,
        click.option("--run", "run_dir", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_RUN_DIR,
                     show_default=True, help="Sockets; emptied by a reboot."),
        click.option("--bucket", required=True,
                     help="s3://BUCKET/PREFIX?endpoint=URL&region=R; keys in MINIPAAS_ACCESS_KEY and MINIPAAS_SECRET_KEY."),
        click.option("--name", "node", required=True, help="Of this node."),
        click.option("--region", required=True, help="Where it is, such as ams."),
        click.option("--domain", default="", help="Apps answer to APP.DOMAIN  [setup: localhost; recover: as before]"),
        click.option("--http", "http_listen", default="0.0.0.0:80", show_default=True, callback=_fixed_port,
                     help="Where apps are reached."),
        click.option("--api", "api_listen", default="127.0.0.1:7070", show_default=True, callback=_fixed_port,
                     help="Where API and page are reached."),
        click.option("--engine", default="", help="URL of a container engine's API; else one is found, or Podman is run."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Given:
    """The values of ``node_options``."""

    data_dir: Path
    run_dir: Path
    bucket: str
    node: str
    region: str
    domain: str
    http_listen: str
    api_listen: str
    engine: str

    def absolute(self) -> dict[str, Any]:
        return {**self.__dict__, "data_dir": self.data_dir.absolute(), "run_dir": self.run_dir.absolute()}


@click.command()
@node_options
@click.option("--sync-interval", type=click.FloatRange(0.05, 60), default=0.5, show_default=True,
              help="Seconds between two shipments of a database that is written without pause.")  # fmt: skip
@click.option("-j", "--json", "as_json", is_flag=True, help="Recovery key and token as JSON.")
def setup(sync_interval: float, as_json: bool, **given: Any) -> None:
    """Make this host the first node of a new fleet, and show its recovery key, once."""
    from minipaas import backups
    from minipaas.serve import now_ms
    from minipaas.setup import SetupRequest
    from minipaas.setup import setup as set_up

    values = Given(**given).absolute()
    values["domain"] = values["domain"] or "localhost"
    credentials = read_credentials(values["data_dir"], os.environ)
    bucket = backups.open_bucket(values["bucket"], credentials, backups.PROBE_PATIENCE_S)
    request = SetupRequest(**values, sync_interval_s=sync_interval, credentials=credentials)
    result = set_up(request, bucket, now_ms(), text.note)
    if as_json:
        click.echo(json.dumps({"recovery_key": result.recovery_key, "token": result.token, "fleet": result.fleet}))
        return
    click.echo(
        f"{values['node']} is the first node of a new fleet in {values['bucket']}\n\n"
        f"Recovery key, shown this once. Without it the bucket rebuilds nothing; keep it away from this host:\n\n"
        f"    {result.recovery_key}\n\n"
        f"Token of the owner, for the page and for commands on other hosts (here it is in {values['data_dir'] / 'token'}):\n\n"
        f"    {result.token}\n\n"
        f"Next: minipaas serve --data {values['data_dir']}"
    )


@click.command()
@data_option
def serve(data_dir: Path) -> None:
    """Run this node: its apps, the edge, the API, the page, and the replication of every database. In the foreground."""
    _serve(read_settings(data_dir.absolute()))


@click.command()
@node_options
@click.option(
    "--takeover",
    "take_over",
    is_flag=True,
    help="Do not wait to see whether the old node is alive: you know that it is gone.",
)
@click.option(
    "--recovery-key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Instead of standard input.",
)
@click.option("--no-serve", is_flag=True, help="Only restore the platform's state; `minipaas serve` does the rest.")
def recover(take_over: bool, recovery_key_file: Path | None, no_serve: bool, **given: Any) -> None:
    """Bring back everything that a lost node had, on this empty host, and go on as ``serve``.

    Needs the bucket, its credentials and the recovery key (MINIPAAS_RECOVERY_KEY, a file, or standard input). Can be
    interrupted and run again.
    """
    from minipaas.recover import Recovery
    from minipaas.recover import recover as bring_back
    from minipaas.serve import now_ms

    values = Given(**given).absolute()
    credentials = read_credentials(values["data_dir"], os.environ)
    key = _recovery_key(recovery_key_file)
    request = Recovery(**values, take_over=take_over, recovery_key=key, credentials=credentials)
    settings = bring_back(request, text.say, now_ms=now_ms)
    if no_serve:
        text.say(f"the platform's state is back; next: minipaas serve --data {settings.data_dir}")
    else:
        _serve(settings)


@click.command()
@data_option
def down(data_dir: Path) -> None:
    """Stop the apps, the edge and the engine service of this node. A stopped ``serve`` leaves them running."""
    from minipaas.serve import stop_everything

    settings = read_settings(data_dir.absolute())
    stop_everything(settings, _wiring(settings), text.say)


@click.command("systemd-unit")
@data_option
def systemd_unit(data_dir: Path) -> None:
    """Print a systemd unit that runs ``serve`` for this node, with the minipaas that prints it.

    \b
    minipaas systemd-unit > /etc/systemd/system/minipaas.service
    systemctl daemon-reload && systemctl enable --now minipaas
    """
    from minipaas import systemd

    settings = read_settings(data_dir.absolute())
    click.echo(systemd.unit(Path(sys.executable), settings.data_dir), nl=False)


def _serve(settings: Settings) -> None:
    from minipaas.serve import Server
    from minipaas.serve import serve as run

    def ready(server: Server) -> None:
        text.say(f"ready: API and page on http://{settings.api_listen}/, apps on {settings.http_listen}")
        if waiting := _being_restored(server.state):
            text.say(
                f"being restored from the bucket, before their apps start: {', '.join(waiting)}; see: minipaas status APP"
            )
        sys.stdout.flush()

    run(settings, _wiring(settings), ready, text.say)


def _being_restored(state: State) -> list[str]:
    return [f"{each.app}/{each.name}" for each in state.volumes() if each.state == "restoring"]


def _wiring(settings: Settings) -> Any:
    from minipaas import backups
    from minipaas.fleet import fleet_lease, keep_fleet, record_of
    from minipaas.serve import Wiring

    credentials = _credentials(settings)
    bucket = backups.open_bucket(settings.bucket, credentials)
    shipping = backups.open_bucket(settings.bucket, credentials, backups.SHIPPING_PATIENCE_S)
    return Wiring(
        backups=lambda settings, epoch: backups.BucketBackups(settings, bucket, shipping, epoch),
        keep_fleet=lambda settings, fleet: keep_fleet(shipping, record_of(fleet, settings)),
        lease=lambda settings, stop: fleet_lease(shipping, settings.node_id, settings.node, settings.lease_ttl_s, stop),
    )


def _credentials(settings: Settings) -> Credentials | None:
    return read_credentials(settings.data_dir, os.environ)


def _recovery_key(path: Path | None) -> str:
    """From the file, the environment, or standard input; asked for without echo at a terminal. No program started later inherits it."""
    from_environment = os.environ.pop("MINIPAAS_RECOVERY_KEY", "")
    if path is not None:
        content = path.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in content.splitlines() if line.strip() and not line.startswith("#")]
        return lines[0] if lines else ""
    if from_environment:
        return from_environment
    if sys.stdin.isatty():
        return str(click.prompt("Recovery key", hide_input=True))
    key = sys.stdin.readline().strip()
    if not key:
        raise BadRequest(
            "the recovery key is needed: on standard input, in MINIPAAS_RECOVERY_KEY, or in --recovery-key-file"
        )
    return key


COMMANDS = (setup, serve, recover, down, systemd_unit)
