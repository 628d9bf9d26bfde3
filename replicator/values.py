"""The values that name places in a replica: timelines, transaction ids, positions, times; and names made fit to be printed.

Owns their one text form, both directions. Never does I/O, never reads the clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from replicator.errors import UsageError

MAX_TXID = 10**16 - 1
MAX_TIMELINE = 10**8 - 1
MAX_EPOCH = 2**53 - 1
MAX_DURATION_S = 100 * 366 * 86400.0

_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Controls, what turns the direction of writing, and halves of characters that names of files bring."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_AGE_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True, order=True)
class Position:
    """A point on a timeline: everything up to ``txid`` has been applied. Text form ``1:163``."""

    timeline: int
    txid: int

    def __str__(self) -> str:
        return f"{self.timeline}:{self.txid}"

    @classmethod
    def parse(cls, text: str) -> Position:
        match = re.fullmatch(r"(\d{1,8}):(\d{1,16})", text)
        if not match or int(match[1]) == 0:
            raise UsageError(f"{text!r} is not a position; write TIMELINE:TXID, such as 1:163")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Timeline:
    """One unbroken history of a database, by one writer.

    number: from 1, grows with every timeline of a replica. parent, fork_txid: where it left its parent; both None
    for a timeline that begins with a snapshot of unknown descent. database: 32 hex digits, the same for all timelines
    of a replica. created_ms: wall clock, UTC milliseconds since 1970; a label, it orders nothing. epoch: of the lease
    under which it was begun, 0 without one: what a writer that has lost its lease begins is never the newest.
    """

    number: int
    database: str
    parent: int | None
    fork_txid: int | None
    created_ms: int
    writer: str
    reason: str
    epoch: int = 0


def format_time(ms: int) -> str:
    """RFC 3339 in UTC with milliseconds, of UTC milliseconds since 1970."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"


def printable(text: str) -> str:
    """The same on one line, with everything that a terminal or a log would take for more than text written as an escape."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def format_size(size_bytes: int) -> str:
    if size_bytes < 1024:
        return f"{size_bytes} B"
    return f"{size_bytes / 1024:.1f} KiB" if size_bytes < 1 << 20 else f"{size_bytes / (1 << 20):.1f} MiB"


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``500ms``, ``1h30m``, ``7d``. Raises UsageError."""
    stripped = text.strip()
    if not stripped or not re.fullmatch(f"(?:{_AGE.pattern})+", stripped):
        raise UsageError(f"{text!r} is not a duration; write one such as 500ms, 5m or 1h30m")
    seconds = sum(float(n) * _AGE_UNITS[unit] for n, unit in _AGE.findall(stripped))
    if seconds > MAX_DURATION_S:
        raise UsageError(f"{text!r} is longer than 100 years; write a duration such as 500ms, 5m or 1h30m")
    return seconds


def parse_time(text: str, now_ms: int) -> int:
    """UTC milliseconds since 1970 of an RFC 3339 time, or of an age such as ``5m`` before ``now_ms``.

    A time without an offset is refused, since it would mean another moment on another host; so is one before 1970, when there was
    no SQLite. Raises UsageError.
    """
    stripped = text.strip()
    is_age = re.fullmatch(f"(?:{_AGE.pattern})+", stripped)
    found = now_ms - round(parse_duration(stripped) * 1000) if is_age else _moment(text)
    if found < 0:
        raise UsageError(f"{text!r} is a moment before 1970; nothing is as old as that")
    return found


def _moment(text: str) -> int:
    stripped = text.strip()
    try:
        moment = datetime.fromisoformat(stripped)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a time; write RFC 3339, such as 2026-11-24T03:12:00Z, or an age such as 5m"
        ) from None
    if moment.tzinfo is None:
        raise UsageError(f"{text!r} has no time zone; add Z for UTC or an offset such as +02:00")
    return round((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))
