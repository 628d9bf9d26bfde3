"""The line of every key of a TOML text, which tomllib does not tell. Pure.

Owns the mapping from a path such as ``("mounts", 0, "source")`` to a line, and its spelling. Never judges what the keys mean.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

KeyPath = tuple[str | int, ...]

# Characters to parse in all. A text of thousands of keys needs a hundredth of it; one that consists of a single value with
# thousands of brackets would take minutes, and what follows in it goes without a line.
MAX_PARSED = 1_000_000


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, from 1, of each key and table of a valid TOML text: that on which its statement begins.

    tomllib gives no lines, but it knows where a statement ends: a piece of the text that begins with a statement parses when,
    and only when, it does not end within a value. So each statement is parsed by itself and says which keys it sets.
    """
    lines: dict[KeyPath, int] = {}
    tables: Counter[KeyPath] = Counter()
    at: KeyPath = ()
    for number, statement in _statements(text):
        part = tomllib.loads(statement)
        if statement.lstrip(" \t").startswith("["):
            at = _enter(part, tables)
            for depth in range(1, len(at) + 1):
                lines.setdefault(at[:depth], number)
        else:
            for path in _paths(part):
                lines.setdefault(at + path, number)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    piece, first, parsed = "", 1, 0
    for number, line in enumerate(text.split("\n"), 1):
        # The end of a value of several lines closes something; to try only there keeps long values cheap.
        within, piece = bool(piece), f"{piece}{line}\n"
        if within and not any(mark in line for mark in ('"""', "'''", "]", "}")):
            continue
        parsed += len(piece)
        if parsed > MAX_PARSED:
            return
        if not _parses(piece):
            continue
        if piece.strip() and not piece.lstrip().startswith("#"):
            yield first, piece
        piece, first = "", number + 1


def _parses(piece: str) -> bool:
    try:
        tomllib.loads(piece)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _enter(header: Mapping[str, Any], tables: Counter[KeyPath]) -> KeyPath:
    """Path of the table that a header opens; inside an array of tables it is in the last one."""
    path: KeyPath = ()
    value: Any = header
    while value:
        if isinstance(value, list):
            tables[path] += 1
            return (*path, tables[path] - 1)
        ((key, value),) = value.items()
        path = (*path, key)
        if tables[path] and isinstance(value, dict):
            path = (*path, tables[path] - 1)
    return path


def _paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*at, key)
        yield from _paths(below, (*at, key))


def spell(path: KeyPath) -> str:
    words = ""
    for key in path:
        words += f"[{key}]" if isinstance(key, int) else f".{key}" if words else key
    return words
