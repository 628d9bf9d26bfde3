"""Commands that ask the running replicator: ``status`` and ``sync``. Owns their words."""

from __future__ import annotations

from pathlib import Path

import click

from replicator.cli.options import DURATION, FILE, config_option, json_option, socket_option
from replicator.cli.places import socket_of
from replicator.cli.words import table, tell
from replicator.values import format_size


@click.command()
@config_option
@socket_option
@json_option
def status(config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool) -> None:
    """Say how safe each database is, as the running replicator sees it.

    "protected (lag 0.2 s)": a commit is in the store after that time. "catching up": on its way. "NOT PROTECTED": a person must act.
    """
    from replicator import control

    found = control.status(socket_of(config_file, no_expand_env, socket_path))
    databases = found["databases"]
    rows = [
        (d["path"], d["status"], d["durable"] or "-", d["durable_time"] or "-", format_size(d["waiting_bytes"]))
        for d in databases
    ]
    lines = table(("DATABASE", "STATUS", "DURABLE", "LAST COMMIT THERE", "WAITING"), rows)
    lines += [f"{d['path']}: {d['reason']}" for d in databases if d["reason"]]
    lines += [f"{d['path']}: its replica grows, {d['upkeep_problem']}" for d in databases if d["upkeep_problem"]]
    tell(found, as_json, *lines)


@click.command()
@click.argument("database", metavar="DB", type=FILE)
@click.option("--wait", is_flag=True, help="Return when all that is committed now is in the store.")
@click.option(
    "--timeout",
    callback=DURATION,
    default="30s",
    metavar="TIME",
    show_default=True,
    help="For --wait; then exit code 1.",
)
@config_option
@socket_option
@json_option
def sync(
    database: Path,
    wait: bool,
    timeout: float,
    config_file: Path | None,
    no_expand_env: bool,
    socket_path: Path | None,
    as_json: bool,
) -> None:
    """Have the running replicator ship a database now."""
    from replicator import control

    path = socket_of(config_file, no_expand_env, socket_path)
    found = control.sync(path, database.absolute(), timeout if wait else 0.0)
    words = f"everything is in the store, up to {found['durable']}" if found["durable"] else "it is on its way"
    tell(found, as_json, f"{found['path']}: {words}")


COMMANDS = (status, sync)
