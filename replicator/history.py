"""What a replica can restore, for people and for programs: its timelines with their descent, ends and times.

Owns that view. It reads two small headers of each timeline, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replicator import chain
from replicator.errors import NothingToRestore
from replicator.layout import SegmentRef
from replicator.replica import Replica
from replicator.store import ObjectStore
from replicator.values import Timeline, format_time


def read(store: ObjectStore) -> list[dict[str, Any]]:
    """One document for each timeline, by number. Raises NothingToRestore when there is none, StoreError, FormatError.

    restorable: ranges of txids in which every segment's end can be restored; what comes from the parent is listed there.
    """
    replica = Replica(store)
    timelines, segments = replica.timelines(), replica.segments()
    if not timelines and not segments:
        raise NothingToRestore(
            f"there is no replica at {store.url}; check the URL, or let the first snapshot be shipped"
        )
    ranges = chain.restorable(timelines, segments)
    return [
        _document(
            replica,
            number,
            timelines.get(number),
            [ref for ref in segments if ref.timeline == number],
            [{"first": part.first, "last": part.last} for part in ranges[number]],
        )
        for number in sorted(ranges)
    ]


def _document(
    replica: Replica, number: int, record: Timeline | None, refs: list[SegmentRef], restorable: list[dict[str, int]]
) -> dict[str, Any]:
    first = min(refs, key=lambda ref: (ref.first, ref.last), default=None)
    last = max(refs, key=lambda ref: ref.last, default=None)
    return {
        "timeline": number,
        "parent": record.parent if record else None,
        "fork_txid": record.fork_txid if record else None,
        "created": format_time(record.created_ms) if record else None,
        "writer": record.writer if record else None,
        "reason": record.reason if record else "its record is missing",
        "epoch": record.epoch if record else None,
        "first_txid": first.first if first else None,
        "first_time": format_time(replica.header(first).first_commit_ms) if first else None,
        "last_txid": last.last if last else None,
        "last_time": format_time(replica.header(last).last_commit_ms) if last else None,
        "segments": len(refs),
        "size_bytes": sum(ref.size_bytes for ref in refs),
        "restorable": restorable,
    }


def tree(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for people: every timeline below the one that it forked from."""
    known = {document["timeline"] for document in documents}
    children: dict[int | None, list[dict[str, Any]]] = {}
    for document in documents:
        children.setdefault(document["parent"] if document["parent"] in known else None, []).append(document)
    lines: list[str] = []
    pending = [(document, 0) for document in reversed(children.get(None, []))]
    while pending:
        document, depth = pending.pop()
        lines.append("  " * depth + _line(document))
        pending += [(child, depth + 1) for child in reversed(children.get(document["timeline"], []))]
    return lines


def _line(document: dict[str, Any]) -> str:
    words = [f"timeline {document['timeline']}"]
    if document["parent"] is not None:
        words.append(f"forked from {document['parent']}:{document['fork_txid']}")
    if document["last_txid"] is None:
        words.append("nothing of its own")
    else:
        words.append(
            f"{document['first_txid']} to {document['last_txid']}, {document['first_time']} to {document['last_time']}"
        )
    if document["writer"] is not None:
        words.append(f"{document['reason']}, by {document['writer']}")
    else:
        words.append(str(document["reason"]))
    return "; ".join(words)
