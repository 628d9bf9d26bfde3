"""Options that several commands have, and how their values are read. Owns their help."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from replicator.errors import UsageError
from replicator.values import Position, parse_duration, parse_time

_Command = TypeVar("_Command", bound=Callable[..., Any])


def parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """The callback of an option whose value one of our own parsers understands."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except UsageError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return convert


def parse_txid(text: str) -> Position | int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else Position.parse(text)


def _check_txid(text: str) -> str:
    """The text as it is: 16 digits mean another number in a replica of Litestream's."""
    if not re.fullmatch("[0-9a-fA-F]{16}", text):
        parse_txid(text)
    return text


DURATION = parsed(parse_duration)
MOMENT = parsed(lambda text: parse_time(text, time.time_ns() // 1_000_000))
TXID = parsed(_check_txid)
FILE = click.Path(path_type=Path)


def config_option(command: _Command) -> _Command:
    command = click.option("--no-expand-env", is_flag=True, help="Leave $NAME in the configuration as it is.")(command)
    return click.option(
        "--config",
        "config_file",
        type=FILE,
        help="Configuration file. Without it: REPLICATOR_CONFIG, /etc/replicator.yml, /etc/litestream.yml.",
    )(command)


def identity_option(command: _Command) -> _Command:
    return click.option(
        "--identity",
        "identity_file",
        type=FILE,
        help="File with the age identity that opens an encrypted replica. Without it: REPLICATOR_AGE_IDENTITY, the configuration.",
    )(command)


def socket_option(command: _Command) -> _Command:
    return click.option(
        "--socket",
        "socket_path",
        type=FILE,
        help="Control socket of the running replicator, when it is not the usual one.",
    )(command)


def json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def format_option(command: _Command) -> _Command:
    return click.option(
        "--format",
        "kind",
        type=click.Choice(["native", "litestream"]),
        help="Whose replica, when ours and Litestream's are both there. Default: that which reaches the later moment.",
    )(command)
