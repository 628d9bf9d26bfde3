"""TOML tables read key by key, so that whatever is wrong is told with its file, line and key.

Owns the kinds of values: texts, numbers, durations, tables. Never knows what a key is for.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any, NoReturn

from minipaas.errors import ManifestError
from minipaas.toml_lines import KeyPath, key_lines, spell

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class TomlSource:
    """The text behind a document: turns a path into ``file:line: key``, collects warnings."""

    def __init__(self, text: str, file: str) -> None:
        self._text, self._file = text, file
        self._lines: dict[KeyPath, int] | None = None
        self.warnings: list[str] = []

    def at(self, path: KeyPath) -> str:
        if self._lines is None:
            self._lines = key_lines(self._text)
        shown = path
        while path and path not in self._lines:
            path = path[:-1]
        return f"{self._file}:{self._lines.get(path, 1)}: {spell(shown) or 'the manifest'}"


class TomlTable:
    """One table, read key by key; ``close`` refuses the keys that nobody asked for."""

    def __init__(self, source: TomlSource, path: KeyPath, values: dict[str, Any]) -> None:
        self._source, self._path, self._values = source, path, values
        self._known: set[str] = set()
        self._unserved: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._values)

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ManifestError(f"{self._source.at((*self._path, key) if key else self._path)}: {problem}")

    def warn(self, key: str, problem: str) -> None:
        self._source.warnings.append(f"{self._source.at((*self._path, key))} {problem}")

    def take(self, key: str, expected: str, *types: type) -> Any:
        """The value, or None when the key is not there. A boolean is not a number here."""
        self._known.add(key)
        value = self._values.get(key)
        if value is None or (isinstance(value, types) and (not isinstance(value, bool) or bool in types)):
            return value
        return self.wrong(key, expected)

    def wrong(self, key: str, expected: str) -> NoReturn:
        self.fail(key, f"expected {expected}, found {_show(self._values[key])}")

    def text(self, key: str) -> str | None:
        value = self.take(key, "a text", str)
        if value is not None and (not value or "\0" in value):
            self.wrong(key, "a text that is not empty")
        return str(value) if value is not None else None

    def flag(self, key: str) -> bool:
        return bool(self.take(key, "true or false", bool))

    def whole(self, key: str, low: int, high: int) -> int | None:
        expected = f"a whole number from {low} to {high}"
        value = self.take(key, expected, int)
        if value is not None and not low <= value <= high:
            self.wrong(key, expected)
        return int(value) if value is not None else None

    def one_of(self, key: str, choices: tuple[str, ...]) -> str | None:
        expected = f"one of {', '.join(choices)}"
        value = self.take(key, expected, str)
        if value is not None and value not in choices:
            self.wrong(key, expected)
        return str(value) if value is not None else None

    def duration(self, key: str, low_s: float, high_s: float, *, bare: str) -> float | None:
        """Seconds. bare: unit of a number without one."""
        expected = f'a duration from {low_s:g} s to {high_s:g} s, such as "10s" or "1m" (a bare number is in {bare})'
        value = self.take(key, expected, str, int, float)
        if value is None:
            return None
        seconds = _seconds(str(value), bare)
        if seconds is None or not low_s <= seconds <= high_s:
            self.wrong(key, expected)
        return seconds

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.take(key, "a list of texts", list) or []
        if not all(isinstance(value, str) for value in values):
            self.wrong(key, "a list of texts")
        return tuple(values)

    def pairs(self, key: str) -> dict[str, str]:
        """A table of texts. Numbers and booleans become texts, as TOML writes them."""
        pairs = {}
        inner = self.table(key)
        for name in inner.keys if inner else ():
            assert inner is not None
            value = inner.take(name, "a text, a number or true or false", str, int, float, bool)
            if isinstance(value, str) and "\0" in value:
                inner.wrong(name, "a text without a zero byte")
            pairs[name] = str(value).lower() if isinstance(value, bool) else str(value)
        return pairs

    def table(self, key: str) -> TomlTable | None:
        values = self.take(key, f"a table, [{spell((*self._path, key))}]", dict)
        return None if values is None else TomlTable(self._source, (*self._path, key), values)

    def tables(self, key: str) -> list[TomlTable]:
        """An array of tables; a single one, as older files of fly have it, counts as well."""
        expected = f"tables, [[{spell((*self._path, key))}]]"
        values = self.take(key, expected, dict, list)
        if isinstance(values, dict):
            return [TomlTable(self._source, (*self._path, key), values)]
        if not all(isinstance(value, dict) for value in values or ()):
            self.wrong(key, expected)
        return [TomlTable(self._source, (*self._path, key, n), value) for n, value in enumerate(values or ())]

    def unserved(self, *keys: str) -> None:
        """Keys of fly that have no effect here yet."""
        self._known.update(keys)
        self._unserved.update(keys)
        for key in keys:
            if key in self._values:
                self.warn(key, "is not served yet: it has no effect")

    def close(self) -> None:
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, sorted(self._known), 1)
                served = ", ".join(sorted(self._known - self._unserved))
                hint = f"did you mean {near[0]}?" if near else f"what is served here: {served}"
                self.fail(key, f"there is no such key; {hint}")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    shown = repr(value) if not isinstance(value, str) or not value.isprintable() else f'"{value}"'
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


def _seconds(text: str, bare: str) -> float | None:
    stripped = text.strip()
    if re.fullmatch(r"\d+(?:\.\d+)?", stripped):
        stripped += bare
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", stripped):
        return None
    seconds = math.fsum(float(number) * _UNIT_S[unit] for number, unit in _DURATION.findall(stripped))
    return round(seconds, 3)
