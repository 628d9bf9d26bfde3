"""Whose replica is at a URL: our own, or one that Litestream made. Both may be there, after a move from one to the other.

Decides by the moment that each of them reaches, and never when a transaction is named, which each of them numbers by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.errors import FormatError, NothingToRestore, UsageError
from replicator.litestream import generations, restore
from replicator.litestream import replica as ltx_replica
from replicator.replica import Replica
from replicator.restore import plan_restore as plan_native
from replicator.restore_plan import RestoreOptions
from replicator.store import ObjectStore
from replicator.store.seal import bare
from replicator.values import format_time

NATIVE, LITESTREAM = "native", "litestream"


@dataclass(frozen=True)
class Choice:
    """is_litestream: whose replica is to be restored. besides: what else is there, '' for nothing."""

    is_litestream: bool
    besides: str = ""


def is_litestream_at(store: ObjectStore) -> bool:
    return ltx_replica.is_at(store) or generations.is_at(store)


def is_native_at(store: ObjectStore) -> bool:
    replica = Replica(store)
    return bool(replica.timelines() or replica.segments())


def choose(
    store: ObjectStore, named: str | None = None, at_ms: int | None = None, *, names_transaction: bool = False
) -> Choice:
    """named: NATIVE or LITESTREAM when the user says which. at_ms: the moment that is wanted, None for the newest.

    Raises UsageError when it has to be named, NothingToRestore when what was named is not there.
    """
    if named == NATIVE:
        return Choice(False)
    if not is_litestream_at(store):
        if named == LITESTREAM:
            raise NothingToRestore(f"there is no replica of Litestream at {store.url}; check the URL")
        return Choice(False)
    if named == LITESTREAM or not is_native_at(store):
        return Choice(True)
    if names_transaction:
        raise UsageError(
            f"{store.url} holds a replica of ours and one of Litestream's, which number transactions by themselves; say which "
            "with --format native or --format litestream"
        )
    return _later(store, at_ms)


def _later(store: ObjectStore, at_ms: int | None) -> Choice:
    try:
        other_ms = restore.moment(bare(store), at_ms)
    except FormatError as error:
        raise UsageError(
            f"{store.url} holds a replica of ours and one of Litestream's that cannot be read: {error}; say which with --format"
        ) from error
    try:
        own_ms: int | None = plan_native(store, RestoreOptions(at_ms=at_ms)).reached_ms
    except NothingToRestore:
        own_ms = None
    if other_ms is None:
        return Choice(False)
    if own_ms is None or other_ms > own_ms:
        besides = "an older replica of ours" if own_ms is not None else "a replica of ours that begins later"
        return Choice(True, f"{besides} is there as well; --format native restores it")
    return Choice(
        False,
        f"a replica by Litestream is there as well, up to {format_time(other_ms)}; --format litestream restores it",
    )
