"""Commands that ask the running replicator: ``status`` and ``sync``. Owns their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    tell(found, as_json, *lines, *(_proof(d["path"], d["trial"]) for d in databases if d.get("trial")))


def _proof(path: str, trial: dict[str, Any]) -> str:
    proved = (
        f"proved until {trial['proved_time']} ({trial['proved']}), at {trial['proved_at']}"
        if trial["proved"]
        else "never proved"
    )
    problem = f"; the trial restore at {trial['tried_at']} FAILED: {trial['problem']}" if trial["problem"] else ""
    return f"{path}: {proved}{problem}"


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
