"""Builds replicas out of real SQLite databases, for tests of what reads them.

Owns no expectations: what a replica must give is for the tests to say.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import apsw

from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.pagehash import StateHashes, hash_pages, lock_page
from replicator.replica import Replica
from replicator.segment import SegmentHeader, SegmentWriter
from replicator.store import ObjectStore
from replicator.values import Position, Timeline

DATABASE = "0123456789abcdef0123456789abcdef"
T0_MS = 1_790_000_000_000
STEP_MS = 1000


class SourceDatabase:
    """A WAL database whose committed states are taken as the bytes of its file."""

    def __init__(self, path: Path, page_size: int = 4096) -> None:
        self._path = path
        self.page_size = page_size
        self._connection = apsw.Connection(str(path))
        self._connection.execute(f"PRAGMA page_size={page_size}")
        self._connection.execute("PRAGMA journal_mode=wal")

    def commit(self, *statements: str) -> bytes:
        self._connection.execute("BEGIN")
        for statement in statements:
            self._connection.execute(statement)
        self._connection.execute("COMMIT")
        return self.state()

    def insert(self, first_id: int, last_id: int, size: int) -> bytes:
        """Rows of ``size`` random bytes into table t, as one transaction."""
        return self.commit(
            f"WITH RECURSIVE ids(id) AS (SELECT {first_id} UNION ALL SELECT id + 1 FROM ids WHERE id < {last_id}) "
            f"INSERT INTO t SELECT id, randomblob({size}) FROM ids"
        )

    def vacuum(self) -> bytes:
        self._connection.execute("VACUUM")
        return self.state()

    def state(self) -> bytes:
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return self._path.read_bytes()

    def close(self) -> None:
        self._connection.close()


def state_checksum(state: bytes, page_size: int) -> int:
    hashes = StateHashes(len(state) // page_size)
    hashes.set_range(1, hash_pages(1, state, page_size))
    return hashes.checksum


@dataclass
class ReplicaBuilder:
    """Writes timelines and segments, and remembers the state at each position.

    times: commit time of a position, in UTC milliseconds since 1970; T0_MS + txid * STEP_MS if it is not there.
    """

    store: ObjectStore
    page_size: int = 4096
    states: dict[Position, bytes] = field(default_factory=dict)
    times: dict[Position, int] = field(default_factory=dict)

    def timeline(self, number: int, parent: Position | None = None, created_ms: int = T0_MS, *, epoch: int = 0) -> None:
        record = Timeline(
            number=number,
            database=DATABASE,
            parent=parent.timeline if parent else None,
            fork_txid=parent.txid if parent else None,
            created_ms=created_ms,
            writer="test",
            reason="test",
            epoch=epoch,
        )
        assert Replica(self.store).write_timeline(record)
        if parent:
            self.states[Position(number, parent.txid)] = self.states[parent]

    def time_of(self, position: Position) -> int:
        return self.times.get(position, T0_MS + position.txid * STEP_MS)

    def snapshot(self, at: Position, state: bytes | None = None, **changed: object) -> SegmentRef:
        """changed: fields of the header that lie."""
        self.states[at] = state if state is not None else self.states[at]
        return self._put(SegmentRef(at.timeline, SNAPSHOT_LEVEL, at.txid, at.txid), b"", self.states[at], changed)

    def commit(self, at: Position, state: bytes, **changed: object) -> SegmentRef:
        """A level-0 segment that leads from the position before to ``state``."""
        self.states[at] = state
        return self.increment(at, at.txid, level=0, **changed)

    def increment(self, last: Position, first: int, level: int = 1, **changed: object) -> SegmentRef:
        """A segment over positions whose states are known already; holds every page that any of them changed."""
        ref = SegmentRef(last.timeline, level, first, last.txid)
        return self._put(ref, self.states[Position(last.timeline, first - 1)], self.states[last], changed)

    def damage(self, ref: SegmentRef, change: Callable[[bytes], bytes]) -> None:
        body = change(self.store.get(ref.key))
        self.store.delete([ref.key])
        self.store.put(ref.key, body)

    def _put(self, ref: SegmentRef, before: bytes, after: bytes, changed: dict[str, object]) -> SegmentRef:
        size = self.page_size
        steps = [self.states[Position(ref.timeline, txid)] for txid in range(ref.first, ref.last + 1)]
        values: dict[str, object] = {
            "database": DATABASE,
            "timeline": ref.timeline,
            "first": ref.first,
            "last": ref.last,
            "snapshot": ref.is_snapshot,
            "page_size": size,
            "page_count": len(after) // size,
            "pages_before": len(before) // size,
            "first_commit_ms": self.time_of(Position(ref.timeline, ref.first)),
            "last_commit_ms": self.time_of(Position(ref.timeline, ref.last)),
            "state_before": state_checksum(before, size),
            "state_after": state_checksum(after, size),
        }
        out = io.BytesIO()
        writer = SegmentWriter(out, SegmentHeader(**(values | changed)))  # type: ignore[arg-type]
        for page_no in range(1, len(after) // size + 1):
            place = slice((page_no - 1) * size, page_no * size)
            versions = {before[place], *(step[place] for step in steps)}
            if page_no != lock_page(size) and (len(versions) > 1 or page_no > len(before) // size):
                writer.add(page_no, after[place])
        writer.finish()
        info = self.store.put(ref.key, out.getvalue(), if_none_match=True)
        return SegmentRef(ref.timeline, ref.level, ref.first, ref.last, info.size_bytes)
