"""How a command answers: lines for people, JSON for programs, notes on stderr. Never lets a name act on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from replicator.values import printable


def tell(document: dict[str, Any], as_json: bool, *lines: str) -> None:
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(map(printable, lines)))


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def note(message: str) -> None:
    print(f"replicator: {printable(' '.join(message.split()))}", file=sys.stderr)
