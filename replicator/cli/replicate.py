"""The commands ``replicate`` and ``systemd-unit``. Decides nothing; the work is in ``replicator.daemon``."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replicator.cli.options import DURATION, FILE, config_option, socket_option
from replicator.cli.places import need_config
from replicator.errors import UsageError

if TYPE_CHECKING:
    from replicator.config import Config


@click.command()
@click.argument("database", metavar="[DB", required=False, type=FILE)
@click.argument("url", metavar="URL]", required=False)
@config_option
@click.option("--once", is_flag=True, help="Ship what is there now, and end.")
@click.option("--exec", "command", metavar="CMD", help="Run this program beside, and end with it and its exit code.")
@click.option(
    "--shutdown-timeout", callback=DURATION, metavar="TIME", help="For the last commits at the end. Default 30s."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Of the log on stderr.")
@socket_option
def replicate(
    database: Path | None,
    url: str | None,
    config_file: Path | None,
    no_expand_env: bool,
    once: bool,
    command: str | None,
    shutdown_timeout: float | None,
    log_format: str | None,
    socket_path: Path | None,
) -> int:
    """Replicate databases until this is stopped.

    Either one database DB to URL, or all those that the configuration file names. On SIGTERM or Ctrl-C the last commits are
    shipped first; exit code 0 says that everything is in the store.
    """
    from replicator import daemon

    load = None if database else partial(_load, config_file, no_expand_env)
    config = load() if load else _config_of(database, url)
    options = daemon.RunOptions(
        once=once,
        exec_command=command if command is not None else ("" if once else config.exec_command),
        socket_path=socket_path,
        shutdown_timeout_s=shutdown_timeout,
        log_format=log_format or "",
        load=load,
    )
    if once and options.exec_command:
        raise UsageError("--once and --exec exclude each other: one ends by itself, the other with its program")
    daemon.set_up_logging(config.log_level, log_format or config.log_format)
    daemon.mention(config.notes)
    code = daemon.Daemon(config, options).run()
    if code:
        daemon.end_process(code)
    return code


def _load(config_file: Path | None, no_expand_env: bool) -> Config:
    config = need_config(config_file, no_expand_env)
    if not config.databases:
        raise UsageError(f"{config.file}: dbs names no database; add one, or run `replicator replicate DB URL`")
    return config


def _config_of(database: Path | None, url: str | None) -> Config:
    from replicator.age import IDENTITY_VARIABLE
    from replicator.config import Config, DatabaseConfig, ReplicaConfig

    assert database is not None
    if os.environ.get(IDENTITY_VARIABLE):
        raise UsageError(
            f"{IDENTITY_VARIABLE} is set, which only opens replicas; to encrypt one, name its recipients in a configuration (key `age`)"
        )
    if url is None:
        raise UsageError(f"where is {database} to be replicated to? give a URL after it")
    return Config(databases=(DatabaseConfig(database.absolute(), ReplicaConfig(url)),))


@click.command("systemd-unit")
@click.option("--config", "config_file", type=FILE, help="Configuration file. Default /etc/replicator.yml.")
def systemd_unit(config_file: Path | None) -> None:
    """Print a systemd unit that keeps `replicator replicate` running with a configuration.

    To install it: replicator systemd-unit > /etc/systemd/system/replicator.service; then systemctl daemon-reload, and systemctl
    enable --now replicator.
    """
    from replicator import systemd
    from replicator.config import DEFAULT_FILES

    click.echo(systemd.unit(Path(sys.executable), (config_file or DEFAULT_FILES[0]).absolute()), nl=False)


COMMANDS = (replicate, systemd_unit)
