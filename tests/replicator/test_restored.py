"""The hand-over from a restore to the writer that goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from restore_support import ReplicaBuilder, SourceDatabase

from replicator import history
from replicator.errors import DatabaseNotReplicable, NothingToRestore, UsageError
from replicator.replica import Replica
from replicator.restore import RestoreReport, restore
from replicator.restored import mark_restored
from replicator.spool import Spool
from replicator.store import open_store
from replicator.values import Position, Timeline


@pytest.fixture
def restored(tmp_path: Path) -> tuple[RestoreReport, Timeline]:
    builder = ReplicaBuilder(open_store(f"file://{tmp_path}/bucket"))
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "source.db")
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    source.close()
    report = restore(builder.store, tmp_path / "app.db")
    return report, Replica(builder.store).timelines()[1]


def test_the_writer_finds_the_restored_position_and_its_hashes(
    tmp_path: Path, restored: tuple[RestoreReport, Timeline]
) -> None:
    report, timeline = restored
    assert mark_restored(tmp_path / "state", report, timeline) is None
    spool = Spool(tmp_path / "state")
    captured = spool.load()
    spool.close()
    assert captured is not None
    assert (captured.timeline, captured.txid, captured.restored, captured.source) == (timeline, 1, True, None)
    assert captured.hashes.checksum == report.state_checksum


def test_a_state_that_a_replicator_uses_is_left_alone(tmp_path: Path, restored: tuple[RestoreReport, Timeline]) -> None:
    spool = Spool(tmp_path / "state")
    with pytest.raises(DatabaseNotReplicable, match="in use by another replicator"):
        mark_restored(tmp_path / "state", *restored)
    spool.close()
    assert not (tmp_path / "state" / "base").exists()


def test_the_record_of_another_timeline_is_refused(tmp_path: Path, restored: tuple[RestoreReport, Timeline]) -> None:
    report, _ = restored
    other = Timeline(2, "0" * 32, 1, 1, 0, "w", "r")
    with pytest.raises(UsageError, match="is that of timeline 2"):
        mark_restored(tmp_path / "state", report, other)


def test_the_history_is_a_tree(tmp_path: Path) -> None:
    builder = ReplicaBuilder(open_store(f"file://{tmp_path}/bucket"))
    with pytest.raises(NothingToRestore, match="there is no replica"):
        history.read(builder.store)
    source = SourceDatabase(tmp_path / "source.db")
    builder.timeline(1)
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    builder.timeline(2, parent=Position(1, 1))
    builder.timeline(3, parent=Position(1, 1))
    builder.snapshot(Position(3, 2), source.insert(1, 1, 10))
    source.close()
    documents = history.read(builder.store)
    assert [(d["timeline"], d["parent"], d["fork_txid"], d["last_txid"]) for d in documents] == [
        (1, None, None, 1),
        (2, 1, 1, None),
        (3, 1, 1, 2),
    ]
    assert documents[2]["restorable"] == [{"first": 2, "last": 2}]
    assert [line.partition(";")[0] for line in history.tree(documents)] == [
        "timeline 1",
        "  timeline 2",
        "  timeline 3",
    ]
