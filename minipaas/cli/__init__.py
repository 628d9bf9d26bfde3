"""The command line. Owns the root command and how errors end it; each group of commands has a file of its own.

Never does what the server does: but for those of ``node``, every command is a client of the API.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import click

from minipaas.cli import apps, deploy, node
from minipaas.errors import PlatformError
from replicator import ReplicatorError


class _Commands(click.Group):
    """Accepts flyctl's singular and short names."""

    ALIASES = {
        "app": "apps",
        "volume": "volumes",
        "vol": "volumes",
        "secret": "secrets",
        "release": "releases",
        "up": "deploy",
    }

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.ALIASES.get(cmd_name, cmd_name))


def _version() -> str:
    try:
        return version("minipaas")
    except PackageNotFoundError:
        return "from a clone"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="minipaas")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def root(debug: bool) -> None:
    """Run apps in containers on your own hosts; every SQLite database in them is in your bucket within a second.

    \b
    A new node:        minipaas setup, then minipaas serve
    A new app:         minipaas deploy, in its directory
    A lost host:       minipaas recover, on an empty machine
    """


for command in (*node.COMMANDS, *deploy.COMMANDS, *apps.COMMANDS):
    root.add_command(command)


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 1 refused or failed, 2 usage, 3 partly done, 4 auth, 5 time-out, 130 interrupted."""
    debug = "--debug" in sys.argv
    _log_to_stderr(logging.DEBUG if debug else logging.INFO)
    try:
        root.main(standalone_mode=False)
        code = 0
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, PlatformError | ReplicatorError)
        click.echo(
            f"Error: {error}" if known else f"Error: {error!r}; `minipaas --debug …` shows where it comes from",
            err=True,
        )
        code = error.exit_code if isinstance(error, PlatformError | ReplicatorError) else 1
    sys.exit(code)


class _Fields(logging.Formatter):
    """The message, and the fields that came with it as name=value."""

    STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields = [f"{name}={value}" for name, value in vars(record).items() if name not in self.STANDARD]
        return " ".join([text, *fields])


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Fields("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in ("watchdog", "urllib3", "botocore", "docker"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
