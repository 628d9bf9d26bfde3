"""Which files of a Litestream 0.5 replica give a transaction, and how the files are named. Pure: keys in, keys out.

Owns Litestream's keys, both layouts of them, and the choice of files. Unlike Litestream it never takes an older state for the one that
was asked for. Source: reading Litestream's ``CalcRestorePlan`` and trying 0.5.17.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from replicator.errors import ChainBroken, NothingToRestore, UsageError

SNAPSHOT_LEVEL = 9

_FOLDER_KEY = re.compile(r"ltx/(\d)/([0-9a-f]{16})-([0-9a-f]{16})\.ltx")
_BUCKET_KEY = re.compile(r"(000\d)/([0-9a-f]{16})-([0-9a-f]{16})\.ltx")


@dataclass(frozen=True)
class LtxRef:
    """A file as its key names it: it takes the database from txid ``first - 1`` to ``last``; from nothing if first is 1.

    level: 0 as shipped, 1 to 8 merged, SNAPSHOT_LEVEL.
    """

    key: str
    level: int
    first: int
    last: int
    size_bytes: int = 0

    @classmethod
    def from_key(cls, key: str, size_bytes: int = 0) -> LtxRef | None:
        """None when the key is not that of a file of a replica."""
        match = _FOLDER_KEY.fullmatch(key) or _BUCKET_KEY.fullmatch(key)
        if match is None:
            return None
        first, last = int(match[2], 16), int(match[3], 16)
        return cls(key, int(match[1]), first, last, size_bytes) if 1 <= first <= last else None

    @property
    def is_snapshot(self) -> bool:
        return self.first == 1


def key_of(level: int, first: int, last: int, *, in_bucket: bool) -> str:
    """in_bucket: as Litestream names files in S3; elsewhere, there is a folder above."""
    folder = f"{level:04x}" if in_bucket else f"ltx/{level}"
    return f"{folder}/{txid_text(first)}-{txid_text(last)}.ltx"


def txid_text(txid: int) -> str:
    """As Litestream writes it."""
    return f"{txid:016x}"


def parse_txid(text: str) -> int:
    """Raises UsageError for anything but 16 hex digits: a shorter number could be meant in either base."""
    if not re.fullmatch("[0-9a-f]{16}", text.lower()) or not int(text, 16):
        raise UsageError(
            f"{text!r} is not a transaction of Litestream; write its 16 hex digits, such as {txid_text(26)}"
        )
    return int(text, 16)


def plan(refs: Sequence[LtxRef], target: int | None = None) -> tuple[LtxRef, ...]:
    """The files to apply, in this order, to get exactly the state at ``target``; None for the newest transaction there is.

    The snapshot that reaches farthest is the base, and from there always the file that reaches farthest: a file may be applied
    anywhere inside its range, so that this finds a chain whenever there is one. Raises ChainBroken naming what is
    missing, NothingToRestore.
    """
    if not refs:
        raise NothingToRestore("the replica of Litestream holds no file")
    newest = max(ref.last for ref in refs)
    target = newest if target is None else target
    if target > newest:
        raise NothingToRestore(f"the replica ends at {txid_text(newest)}, before {txid_text(target)}")
    usable = [ref for ref in refs if ref.last <= target]
    base = max((ref for ref in usable if ref.is_snapshot), key=lambda ref: (ref.last, ref.level), default=None)
    if base is None:
        raise _no_base(refs, target)
    chain = [base]
    ahead = sorted(usable, key=lambda ref: ref.first, reverse=True)
    best = base
    while best.last < target:
        while ahead and ahead[-1].first <= chain[-1].last + 1:
            best = max(best, ahead.pop(), key=lambda ref: (ref.last, ref.level))
        if best.last <= chain[-1].last:
            raise _gap(refs, chain[-1].last, target)
        chain.append(best)
    return tuple(chain)


def restorable(refs: Iterable[LtxRef]) -> list[int]:
    """Every txid that can be restored, ascending."""
    reached: list[int] = []
    for ref in sorted(refs, key=lambda ref: (ref.last, ref.first)):
        if reached and reached[-1] == ref.last:
            continue
        if ref.is_snapshot or (reached and ref.first - 1 <= reached[-1]):
            reached.append(ref.last)
    return reached


def _no_base(refs: Sequence[LtxRef], target: int) -> ChainBroken | NothingToRestore:
    stops = restorable(refs)
    if stops and stops[0] > target:
        return NothingToRestore(
            f"the replica holds nothing at or before {txid_text(target)}; the first transaction that can be restored is "
            f"{txid_text(stops[0])}"
        )
    first = min(ref.first for ref in refs)
    return ChainBroken(
        f"{txid_text(target)} cannot be restored: there is no snapshot, {_range(1, first - 1)} missing; nothing of this "
        "replica can be restored"
    )


def _gap(refs: Sequence[LtxRef], reached: int, target: int) -> ChainBroken:
    resumes = min((ref.first for ref in refs if ref.first > reached + 1), default=target + 1)
    across = [ref for ref in refs if ref.first <= reached + 1 and ref.last > target]
    offer = f"the nearest before that can be is {txid_text(reached)}"
    if across:
        nearest = min(across, key=lambda ref: ref.last)
        return ChainBroken(
            f"{txid_text(target)} cannot be restored: Litestream has merged {txid_text(max(reached + 1, nearest.first))} to "
            f"{txid_text(nearest.last)} into one file; {offer}, the nearest after it {_after(refs, target)}"
        )
    return ChainBroken(
        f"{txid_text(target)} cannot be restored: {_range(reached + 1, min(resumes - 1, target))} missing; {offer}"
    )


def _after(refs: Sequence[LtxRef], target: int) -> str:
    stops = restorable(refs)
    at = bisect_left(stops, target)
    return txid_text(stops[at]) if at < len(stops) else "is none"


def _range(first: int, last: int) -> str:
    if first >= last:
        return f"transaction {txid_text(first)} is"
    return f"transactions {txid_text(first)} to {txid_text(last)} are"
