"""What Litestream's replicas at a place can restore, for people and for programs. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from replicator.litestream import generations
from replicator.litestream import replica as ltx_replica
from replicator.litestream.chain import LtxRef, restorable, txid_text
from replicator.litestream.generations import OldRef
from replicator.store import ObjectStore
from replicator.values import format_time


def read(store: ObjectStore) -> list[dict[str, Any]]:
    """A document for the replica of 0.5, one for each generation of 0.3, those that are there. Raises StoreError, FormatError."""
    files = ltx_replica.list_files(store)
    old = sorted(generations.list_objects(store), key=lambda ref: ref.generation)
    documents = [_generation(name, list(refs)) for name, refs in groupby(old, key=lambda ref: ref.generation)]
    documents.sort(key=lambda document: str(document["last_time"]))
    return documents + ([_files(store, files)] if files else [])


def lines(documents: Sequence[dict[str, Any]]) -> list[str]:
    return [_line(document) for document in documents]


def _files(store: ObjectStore, files: Sequence[LtxRef]) -> dict[str, Any]:
    """restorable: how many transactions can be; between the first and the last, those where some file ends."""
    stops = restorable(files)
    newest = max(ref.last for ref in files)
    return {
        "version": "0.5",
        "first_txid": txid_text(stops[0]) if stops else None,
        "first_time": format_time(ltx_replica.time_of(store, files, stops[0])) if stops else None,
        "last_txid": txid_text(stops[-1]) if stops else None,
        "last_time": format_time(ltx_replica.time_of(store, files, stops[-1])) if stops else None,
        "restorable": len(stops),
        "newest_txid": txid_text(newest),
        "files": len(files),
        "size_bytes": sum(ref.size_bytes for ref in files),
    }


def _generation(name: str, refs: Sequence[OldRef]) -> dict[str, Any]:
    return {
        "version": "0.3",
        "generation": name,
        "first_time": format_time(min(ref.time_ms for ref in refs)),
        "last_time": format_time(max(ref.time_ms for ref in refs)),
        "snapshots": sum(ref.offset is None for ref in refs),
        "files": len(refs),
        "size_bytes": sum(ref.size_bytes for ref in refs),
    }


def _line(document: dict[str, Any]) -> str:
    times = f"{document['first_time']} to {document['last_time']}"
    if document["version"] == "0.3":
        return f"Litestream 0.3: generation {document['generation']}; {times}; {document['snapshots']} snapshots"
    if not document["restorable"]:
        return f"Litestream 0.5: nothing can be restored; {document['files']} files without a snapshot"
    words = f"Litestream 0.5: {document['first_txid']} to {document['last_txid']}, {times}; {document['restorable']} transactions"
    if document["newest_txid"] != document["last_txid"]:
        words += f"; up to {document['newest_txid']} there are files that cannot be restored, since some before them are missing"
    return words
