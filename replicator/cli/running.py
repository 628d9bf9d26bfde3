"""Commands that ask the running replicator, and those that change what it replicates until it ends. Owns their words."""

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
        (
            d["path"],
            d["status"],
            d["durable"] or "-",
            d["durable_time"] or "-",
            format_size(d["waiting_bytes"]),
            str(d["puts_hour"]),
            "-" if d["usd_per_month"] is None else f"{d['usd_per_month']:.2f}",
        )
        for d in databases
    ]
    lines = table(("DATABASE", "STATUS", "DURABLE", "LAST COMMIT THERE", "WAITING", "PUTS/H", "USD/MONTH"), rows)
    lines += [f"{d['path']}: {d['reason']}" for d in databases if d["reason"]]
    lines += [f"{d['path']}: its replica grows, {d['upkeep_problem']}" for d in databases if d["upkeep_problem"]]
    lines += [_proof(d["path"], d["trial"]) for d in databases if d["trial"]]
    tell(found, as_json, *lines)


def _proof(path: str, trial: dict[str, Any]) -> str:
    proved = (
        f"proved until {trial['proved_time']} ({trial['proved']}), at {trial['proved_at']}"
        if trial["proved"]
        else "never proved"
    )
    problem = f"; the trial restore at {trial['tried_at']} FAILED: {trial['problem']}" if trial["problem"] else ""
    return f"{path}: {proved}{problem}"


@click.command("list")
@config_option
@socket_option
@json_option
def list_(config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool) -> None:
    """List what the running replicator has: databases, where their replicas are, and whether they are protected."""
    from replicator import control

    found = control.databases(socket_of(config_file, no_expand_env, socket_path))
    rows = [(d["path"], d["protection"], d["url"]) for d in found["databases"]]
    tell(found, as_json, *table(("DATABASE", "PROTECTION", "REPLICA"), rows))


@click.command()
@config_option
@socket_option
@json_option
def info(config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool) -> None:
    """Say which process the running replicator is, since when, with which configuration, and how many databases it has."""
    from replicator import control

    found = control.info(socket_of(config_file, no_expand_env, socket_path))
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["databases"].items())
    lines = [
        f"version        {found['version']}, process {found['pid']}, since {found['started']}",
        f"configuration  {found['config'] or 'none'}, loaded {found['config_loaded']}",
        f"databases      {counts}",
    ]
    if found["reload_problem"]:
        lines.append(f"the configuration could not be loaded again: {found['reload_problem']}")
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


@click.command()
@click.argument("database", metavar="DB", type=FILE)
@click.argument("url", metavar="URL")
@config_option
@socket_option
@json_option
def register(
    database: Path, url: str, config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool
) -> None:
    """Have the running replicator replicate one more database, to URL.

    It does so until it ends, or until `unregister`; to have it do so for good, write the database into the configuration. The
    credentials are those of the replicator's environment. It is refused when the configuration encrypts, which this would not.
    """
    from replicator import control

    found = control.register(socket_of(config_file, no_expand_env, socket_path), database.absolute(), url)
    tell(found, as_json, f"{found['path']} is replicated to {found['url']}, until the replicator ends")


def _timeout_option(command: Any) -> Any:
    return click.option(
        "--timeout", callback=DURATION, default="30s", metavar="TIME", show_default=True, help="For the last commits."
    )(command)


@click.command()
@click.argument("database", metavar="DB", type=FILE)
@_timeout_option
@config_option
@socket_option
@json_option
def unregister(
    database: Path,
    timeout: float,
    config_file: Path | None,
    no_expand_env: bool,
    socket_path: Path | None,
    as_json: bool,
) -> None:
    """Have the running replicator ship the last commits of a database, or of a folder's, and forget it.

    Its replica stays. One that is in the configuration is replicated again after the next start or reload.
    """
    from replicator import control

    found = control.unregister(socket_of(config_file, no_expand_env, socket_path), database.absolute(), timeout)
    tell(found, as_json, f"{found['path']} is not replicated any more: {_how_left(found)}")


@click.command()
@click.argument("database", metavar="DB", type=FILE)
@_timeout_option
@config_option
@socket_option
@json_option
def stop(
    database: Path,
    timeout: float,
    config_file: Path | None,
    no_expand_env: bool,
    socket_path: Path | None,
    as_json: bool,
) -> None:
    """Have the running replicator ship the last commits of a database, or of a folder's, and let go of it until `start`.

    Meanwhile it is NOT PROTECTED in the status. A restart of the replicator starts it too.
    """
    from replicator import control

    found = control.stop(socket_of(config_file, no_expand_env, socket_path), database.absolute(), timeout)
    tell(found, as_json, f"{found['path']} is stopped: {_how_left(found)}")


@click.command()
@click.argument("database", metavar="DB", type=FILE)
@config_option
@socket_option
@json_option
def start(
    database: Path, config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool
) -> None:
    """Have the running replicator go on with a database, or a folder, that was stopped, or that it could not replicate.

    What was written meanwhile is found by comparing all pages.
    """
    from replicator import control

    found = control.start(socket_of(config_file, no_expand_env, socket_path), database.absolute())
    tell(found, as_json, f"{found['path']} is replicated")


def _how_left(found: dict[str, Any]) -> str:
    if found["reason"]:
        return f"NOT everything is in the store: {found['reason']}"
    return f"everything is in the store{', up to ' + found['durable'] if found['durable'] else ''}"


COMMANDS = (status, list_, info, sync, register, unregister, start, stop)
