"""Object keys of one replica, both directions. Pure.

Owns the names in docs/format.md, section "Keys". Digits are decimal and zero-padded, so that key order is number order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SNAPSHOT_LEVEL = 9

TIMELINES = "timelines/"
SEGMENTS = "segments/"

_TIMELINE_KEY = re.compile(r"timelines/(\d{8})\.json")
_SEGMENT_KEY = re.compile(r"segments/(\d{8})/(\d)/(\d{16})-(\d{16})\.seg")


@dataclass(frozen=True, order=True, slots=True)
class SegmentRef:
    """A segment as its key names it: it takes the database from txid ``first - 1`` to ``last``.

    level: 0 as shipped, higher levels compacted, SNAPSHOT_LEVEL needs no predecessor (then first == last).
    size_bytes: of the object; 0 when not known.
    """

    timeline: int
    level: int
    first: int
    last: int
    size_bytes: int = 0

    @property
    def is_snapshot(self) -> bool:
        return self.level == SNAPSHOT_LEVEL

    @property
    def key(self) -> str:
        return f"{SEGMENTS}{self.timeline:08d}/{self.level}/{self.first:016d}-{self.last:016d}.seg"

    @property
    def file_name(self) -> str:
        """The name of the same segment in the local spool."""
        return f"{self.timeline:08d}-{self.level}-{self.first:016d}-{self.last:016d}.seg"

    @classmethod
    def from_key(cls, key: str, size_bytes: int = 0) -> SegmentRef | None:
        """None when the key is not that of a segment."""
        match = _SEGMENT_KEY.fullmatch(key)
        return _ref(match, size_bytes) if match else None

    @classmethod
    def from_file_name(cls, name: str, size_bytes: int = 0) -> SegmentRef | None:
        match = re.fullmatch(r"(\d{8})-(\d)-(\d{16})-(\d{16})\.seg", name)
        return _ref(match, size_bytes) if match else None


def _ref(match: re.Match[str], size_bytes: int) -> SegmentRef:
    timeline, level, first, last = map(int, match.groups())
    return SegmentRef(timeline, level, first, last, size_bytes)


def timeline_key(number: int) -> str:
    return f"{TIMELINES}{number:08d}.json"


def timeline_of_key(key: str) -> int | None:
    match = _TIMELINE_KEY.fullmatch(key)
    return int(match[1]) if match else None


def segments_of(timeline: int) -> str:
    """Prefix under which all segments of a timeline are listed."""
    return f"{SEGMENTS}{timeline:08d}/"
