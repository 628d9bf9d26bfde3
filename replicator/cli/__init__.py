"""The command ``replicator``: arguments in, one call into the library, text or JSON out.

Owns exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted; what failed is one line on stderr. Decides nothing. Each command
loads what it needs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from replicator import __version__
from replicator.cli import past, replica, replicate, restore, running, verify
from replicator.cli.words import note
from replicator.errors import ReplicatorError

INTERRUPTED = 130


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code. Nothing but the message of an error reaches the user, unless ``--debug`` is among the arguments."""
    try:
        result = replicator.main(list(arguments), prog_name="replicator", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 1
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, ReplicatorError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, OSError):
            return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        return _fail(f"{type(error).__name__}: {error}; this is a defect, `replicator --debug …` shows where", 1)


def _fail(message: str, code: int) -> int:
    note(message)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="replicator", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show where in the code an error came from.")
def replicator(debug: bool) -> None:
    """Keep a copy of SQLite databases in object storage, up to date within a second, and restore them to any moment.

    \b
    The program that uses the database needs no change. First steps:
      replicator replicate app.db s3://bucket/app     copies from now on, until you stop it
      replicator restore -o copy.db s3://bucket/app   makes a database of the copy
    \b
    Credentials for S3 are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the usual AWS files, or the configuration.
    Where a copy goes is a URL: s3://BUCKET/PREFIX?endpoint=https://HOST for any S3 server, or file:///FOLDER.
    """


for _command in (
    *replicate.COMMANDS,
    *restore.COMMANDS,
    *running.COMMANDS,
    *replica.COMMANDS,
    *past.COMMANDS,
    *verify.COMMANDS,
):
    replicator.add_command(_command)
