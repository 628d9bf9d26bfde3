"""The command line. Owns the root command and how errors end it; each group of commands has a file of its own.

Never does what the server does: but for those of ``node``, every command is a client of the API.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import click

from minipaas.cli import apps, deploy, node
from minipaas.errors import Interrupted, PlatformError
from replicator import ReplicatorError, printable


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


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 refused or failed, 2 usage, 3 partly done, 4 auth, 5 time-out, 130 interrupted."""
    debug = "--debug" in arguments
    _log_to_stderr(logging.DEBUG if debug else logging.INFO)
    try:
        root.main(list(arguments), prog_name="minipaas", standalone_mode=False)
        sys.stdout.flush()
        return 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("interrupted", Interrupted.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 1
    except (PlatformError, ReplicatorError) as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}; this is a defect, `minipaas --debug …` shows where", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"Error: {printable(' '.join(message.split()))}", err=True)
    return code


class _Fields(logging.Formatter):
    """The message, and the fields that came with it as name=value: one line, whatever names and words are in them."""

    STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [f"{name}={value}" for name, value in vars(record).items() if name not in self.STANDARD]
        return printable(" ".join([super().formatMessage(record), *fields]))


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Fields("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in ("watchdog", "urllib3", "botocore", "docker"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
