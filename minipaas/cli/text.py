"""How values look in a terminal: tables, times, sizes, and names that hold what a terminal would obey.

Owns no words of its own. Pure but for printing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replicator import printable

WIDE = 400
"""Columns, where the output is not a terminal: nothing is cut off in a file or a pipe."""

_COLOURS_AND_TABS = re.compile(r"(\x1b\[[0-9;]*m|\t)")

GAP = 2
"""Columns between two of a table."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """Print rows under columns, or the sentence when there are none."""
    if not rows:
        click.echo(empty)
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(cell_len(row[column]) for row in (columns, *cells)) for column in range(len(columns))]
    if sum(widths) + GAP * (len(widths) - 1) > console.width:
        _one_below_the_other(columns, cells)
        return
    shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column in columns:
        shown.add_column(column, no_wrap=True)
    for row in cells:
        shown.add_row(*map(_styled, row))
    console.print(shown)


def _one_below_the_other(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """For a terminal that is too narrow for the table: what belongs together stays together, and no cell is cut."""
    label_width = max(map(len, columns)) + GAP
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            if cell:
                console.print(f"[bold]{column.ljust(label_width)}[/bold]{_styled(cell)}", soft_wrap=True)
        console.print()


def output_of_app(line: str) -> str:
    """A line that an app or a build wrote: as it is for a file or a pipe; a terminal gets its text, tabs and colours only."""
    if not sys.stdout.isatty():
        return line
    parts = _COLOURS_AND_TABS.split(line)
    return "".join(part if number % 2 else printable(part) for number, part in enumerate(parts))


def say(sentence: str) -> None:
    """One line on standard output."""
    click.echo(printable(sentence))


def note(sentence: str) -> None:
    """One line on standard error: what is going on, beside the answer."""
    click.echo(printable(sentence), err=True)


def as_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def moment(ms: int | None, now_ms: int) -> str:
    """``2026-11-24 03:12:07 UTC, 3 min ago``; '' for None."""
    if ms is None:
        return ""
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC, {ago(ms, now_ms)}"


def ago(ms: int | None, now_ms: int) -> str:
    if ms is None:
        return ""
    seconds = (now_ms - ms) / 1000
    distance = _distance(abs(seconds))
    return f"in {distance}" if seconds < -1 else f"{distance} ago"


def _distance(seconds: float) -> str:
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size(count: int) -> str:
    return f"{count / 1048576:.1f} MiB" if count >= 104858 else f"{count / 1024:.0f} KiB"


def _styled(cell: str) -> str:
    for word, style in (
        ("NOT PROTECTED", "bold red"),
        ("failed", "red"),
        ("catching up", "yellow"),
        ("protected", "green"),
    ):
        if cell.startswith(word):
            return f"[{style}]{escape(cell)}[/{style}]"
    return escape(cell)
