"""A replica that Litestream 0.5 made, as a reader sees it: its files, their headers, and which transaction a moment is.

Writes nothing. A file's time is the one in its header. Litestream itself goes by the object's metadata or modification time, which it
sets to the same moment, and which copying a bucket loses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from replicator.errors import FormatError, LtxDamaged, NothingToRestore
from replicator.litestream.chain import LtxRef
from replicator.ltx import HEADER_SIZE, LtxHeader
from replicator.store import ObjectStore
from replicator.values import format_time

LEVELS = range(10)
_PREFIXES = ("ltx/", "000")


def is_at(store: ObjectStore) -> bool:
    """Whether there is a replica of Litestream 0.5. A few small requests."""
    return any(next(_refs(store, prefix), None) is not None for prefix in _PREFIXES)


def list_files(store: ObjectStore) -> list[LtxRef]:
    """All files, in both layouts. Raises FormatError when two replicas are at one place."""
    found = [ref for prefix in _PREFIXES for ref in _refs(store, prefix)]
    if len({ref.key.startswith("ltx/") for ref in found}) > 1:
        raise FormatError(
            f"{store.url} holds two replicas of Litestream, one below ltx/ and one below 0000/; move one of them away"
        )
    return found


def read_header(store: ObjectStore, ref: LtxRef) -> LtxHeader:
    """One small request. Raises ObjectMissing, LtxDamaged."""
    header = LtxHeader.decode(store.get(ref.key, offset=0, length=HEADER_SIZE), ref.key)
    check_identity(ref, header)
    return header


def check_identity(ref: LtxRef, header: LtxHeader) -> None:
    if (header.first, header.last) != (ref.first, ref.last):
        raise LtxDamaged(
            f"{ref.key} is damaged: it holds {header.first:x} to {header.last:x}; it was copied or renamed"
        )


def time_of(store: ObjectStore, refs: Sequence[LtxRef], txid: int) -> int:
    """When a transaction was made, in UTC milliseconds since 1970: the earliest of the files that end with it.

    A snapshot bears the time at which it was taken, and may be later.
    """
    return min(read_header(store, ref).time_ms for ref in refs if ref.last == txid)


def txid_at(store: ObjectStore, refs: Sequence[LtxRef], at_ms: int) -> int:
    """The last transaction that some file says was made at or before a moment.

    Asks for O(log n) headers of n files, and relies on times that never go back along a level. Raises NothingToRestore
    with the first moment, LtxDamaged.
    """
    reached: list[int] = []
    for level in LEVELS:
        files = sorted((ref for ref in refs if ref.level == level), key=lambda ref: (ref.last, ref.first))
        count = bisect_right(files, at_ms, key=lambda ref: read_header(store, ref).time_ms)
        reached += [files[count - 1].last] if count else []
    if reached:
        return max(reached)
    if not refs:
        raise NothingToRestore(f"the replica of Litestream at {store.url} holds no file")
    first = format_time(time_of(store, refs, min(ref.last for ref in refs)))
    raise NothingToRestore(f"the replica holds nothing at or before {format_time(at_ms)}; its first moment is {first}")


def _refs(store: ObjectStore, prefix: str) -> Iterator[LtxRef]:
    listed = (LtxRef.from_key(info.key, info.size_bytes) for info in store.list(prefix))
    return (ref for ref in listed if ref is not None)
