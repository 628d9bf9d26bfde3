"""A replica that Litestream 0.3 made: generations of snapshots and pieces of WAL. Read only; both are frames of LZ4.

Owns the keys and the choice of objects. What lies in a WAL is judged by ``replicator.wal``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import lz4.frame

from replicator.errors import ChainBroken, LtxDamaged, NothingToRestore, UsageError
from replicator.store import ObjectStore
from replicator.values import format_time

log = logging.getLogger(__name__)

FOLDER = "generations/"

_SNAPSHOT_KEY = re.compile(r"generations/([0-9a-f]{16})/snapshots/([0-9a-f]{8})\.snapshot\.lz4")
_WAL_KEY = re.compile(r"generations/([0-9a-f]{16})/wal/([0-9a-f]{8})_([0-9a-f]{8,16})\.wal\.lz4")
_PIECE_BYTES = 1 << 20
_AGE_MAGIC = b"age-encryption.org/"


@dataclass(frozen=True)
class OldRef:
    """A snapshot (offset None), or a piece of WAL number ``index`` from byte ``offset`` on.

    A snapshot is the database before WAL number ``index``. time_ms: when the object was written, the only time there is.
    """

    key: str
    generation: str
    index: int
    offset: int | None
    size_bytes: int
    time_ms: int

    @property
    def position(self) -> str:
        """As Litestream 0.3 writes it."""
        return f"{self.generation}/{self.index:08x}" + ("" if self.offset is None else f":{self.offset:08x}")


@dataclass(frozen=True)
class OldChain:
    """The snapshot, and the pieces of each WAL after it in the order of the WALs."""

    snapshot: OldRef
    wals: tuple[tuple[OldRef, ...], ...]

    @property
    def objects(self) -> tuple[OldRef, ...]:
        return (self.snapshot, *(piece for wal in self.wals for piece in wal))


def is_at(store: ObjectStore) -> bool:
    """Whether there is a replica of Litestream 0.3."""
    return next(_refs(store), None) is not None


def list_objects(store: ObjectStore) -> list[OldRef]:
    return list(_refs(store))


def plan(objects: Iterable[OldRef], at_ms: int | None = None) -> OldChain:
    """The objects that give the newest state, or the last that was written at or before a moment.

    Of several generations, that which was written last. Raises ChainBroken when a WAL or the beginning of one is missing,
    and when the times of the objects contradict their order; NothingToRestore.
    """
    known = sorted(objects, key=lambda ref: (ref.generation, ref.index, -1 if ref.offset is None else ref.offset))
    if not known:
        raise NothingToRestore("the replica of Litestream 0.3 holds no object")
    if at_ms is not None:
        _check_times(known)
    past = [ref for ref in known if at_ms is None or ref.time_ms <= at_ms]
    if not past:
        first = format_time(min(ref.time_ms for ref in known))
        raise NothingToRestore(
            f"the replica holds nothing at or before {format_time(at_ms or 0)}; its first moment is {first}"
        )
    generation = max(past, key=lambda ref: (ref.time_ms, ref.offset is None)).generation
    own = [ref for ref in past if ref.generation == generation]
    snapshot = max((ref for ref in own if ref.offset is None), key=lambda ref: ref.index, default=None)
    if snapshot is None:
        raise ChainBroken(f"generation {generation} cannot be restored: there is no snapshot before {own[-1].position}")
    wal = [ref for ref in own if ref.offset is not None and ref.index >= snapshot.index]
    return OldChain(snapshot, _whole(generation, snapshot.index, wal))


def decompressed(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """What one frame of LZ4 holds, in pieces. Raises LtxDamaged when it is cut off, wrong, or followed by something.

    Raises UsageError when it is encrypted.
    """
    decompressor = lz4.frame.LZ4FrameDecompressor()
    for chunk in chunks:
        if chunk.startswith(_AGE_MAGIC):
            raise UsageError(
                f"{name} is encrypted with age, and cannot be restored here; restore it with Litestream 0.3"
            )
        data = chunk
        while data or not (decompressor.needs_input or decompressor.eof):
            if decompressor.eof:
                raise _damaged(name, "bytes follow after its end")
            try:
                piece = decompressor.decompress(data, max_length=_PIECE_BYTES)
            except (RuntimeError, ValueError) as error:
                raise _damaged(name, f"it cannot be decompressed ({error})") from error
            data = decompressor.unused_data or b"" if decompressor.eof else b""
            if piece:
                yield piece
    if not decompressor.eof:
        raise _damaged(name, "it ends before it is complete")


def _refs(store: ObjectStore) -> Iterator[OldRef]:
    for info in store.list(FOLDER):
        time_ms = info.time_ms or 0
        if match := _SNAPSHOT_KEY.fullmatch(info.key):
            yield OldRef(info.key, match[1], int(match[2], 16), None, info.size_bytes, time_ms)
        elif match := _WAL_KEY.fullmatch(info.key):
            yield OldRef(info.key, match[1], int(match[2], 16), int(match[3], 16), info.size_bytes, time_ms)


def _check_times(known: Sequence[OldRef]) -> None:
    """The pieces of a generation were written one after the other; a copy may have given them other times."""
    pieces = [ref for ref in known if ref.offset is not None]
    for before, after in pairwise(pieces):
        if before.generation == after.generation and before.time_ms > after.time_ms:
            raise ChainBroken(
                f"the times of the objects cannot be trusted: {before.position} is from {format_time(before.time_ms)}, and "
                f"{after.position}, which follows it, from {format_time(after.time_ms)}; they were copied; restore the newest"
            )


def _whole(generation: str, first_index: int, wal: Sequence[OldRef]) -> tuple[tuple[OldRef, ...], ...]:
    by_index: dict[int, list[OldRef]] = {}
    for ref in wal:
        by_index.setdefault(ref.index, []).append(ref)
    for index in range(first_index, max(by_index, default=first_index - 1) + 1):
        if index not in by_index:
            raise ChainBroken(f"generation {generation} cannot be restored: WAL {index:08x} is missing")
        if by_index[index][0].offset:
            raise ChainBroken(
                f"generation {generation} cannot be restored: the beginning of WAL {index:08x} is missing"
            )
    return tuple(tuple(pieces) for _, pieces in sorted(by_index.items()))


def _damaged(name: str, what: str) -> LtxDamaged:
    return LtxDamaged(f"{name} is damaged: {what}; fetch it again, or restore to an earlier moment")
