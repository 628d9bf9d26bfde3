"""Claims about ``verify``: it proves what can be restored by restoring it, and names what is wrong and what remains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
from restore_support import STEP_MS, T0_MS, ReplicaBuilder, SourceDatabase

from replicator import cli
from replicator.layout import SegmentRef
from replicator.pagehash import hash_pages
from replicator.restore import RestoreOptions, restore_nowhere
from replicator.store.file import FileStore
from replicator.values import Position, format_time

LAST = 6


@pytest.fixture
def replica(tmp_path: Path) -> ReplicaBuilder:
    """A snapshot at 1, commits up to LAST, and another snapshot at 3."""
    builder = ReplicaBuilder(FileStore(tmp_path / "bucket"))
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "app.db")
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t (id INTEGER PRIMARY KEY, body BLOB)"))
    for txid in range(2, LAST + 1):
        builder.commit(Position(1, txid), source.insert(txid * 100, txid * 100 + 50, 700))
    builder.snapshot(Position(1, 3))
    source.close()
    return builder


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.run(["verify", *map(str, arguments)]) == code, capsys.readouterr()
    return capsys.readouterr()


def document(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *arguments, "--json", code=code)[0])
    return found


def spoil(body: bytes) -> bytes:
    return body[:200] + bytes([body[200] ^ 1]) + body[201:]


def test_a_whole_replica_is_proved_and_leaves_nothing_behind(
    replica: ReplicaBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").mkdir()
    out, _ = run(capsys, replica.store.url, "--every-segment", "--scratch", tmp_path / "scratch")
    moment = format_time(T0_MS + LAST * STEP_MS)
    assert f"proved up to 1:{LAST}, last commit {moment}: " in out and "integrity_check ok; from 4 segments" in out
    assert f"restorable on timeline 1, by what is there: 1 to {LAST} (" in out
    assert list((tmp_path / "scratch").iterdir()) == []


def test_damage_names_what_remains_and_that_was_restored_too(
    replica: ReplicaBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.damage(SegmentRef(1, 0, 5, 5), spoil)
    out, _ = run(capsys, replica.store.url, code=1)
    assert "DAMAGED: segments/00000001/0/0000000000000005" in out
    assert "what remains restorable: proved up to 1:4, " in out


def test_pages_that_do_not_make_the_recorded_state_are_damage(
    replica: ReplicaBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.store.delete([SegmentRef(1, 0, LAST, LAST).key])
    replica.commit(Position(1, LAST), replica.states[Position(1, LAST)], state_after=7)
    found = document(capsys, replica.store.url, code=1)
    assert "have the state checksum" in found["problem"] and found["restorable"]["position"] == f"1:{LAST - 1}"


def test_a_replica_of_which_nothing_is_left_says_so(
    replica: ReplicaBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    for txid in (1, 3):
        replica.damage(SegmentRef(1, 9, txid, txid), lambda body: b"")
    found = document(capsys, replica.store.url, code=1)
    assert found["restorable"] is None and not found["proved"]


def test_what_only_older_positions_need_is_looked_at_when_all_is_to_be(
    replica: ReplicaBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.damage(SegmentRef(1, 0, 2, 2), spoil)
    assert document(capsys, replica.store.url)["proved"]
    found = document(capsys, replica.store.url, "--every-segment", code=1)
    assert [each["key"] for each in found["damaged"]] == [SegmentRef(1, 0, 2, 2).key]
    assert found["restorable"]["position"] == f"1:{LAST}"


def test_without_room_every_page_counts_in_the_checksum_all_the_same(
    replica: ReplicaBuilder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2, f_frsize=4096))
    out, _ = run(capsys, replica.store.url)
    assert "proved up to 1:6" in out and "integrity_check left out: the restored database needs" in out
    report = restore_nowhere(replica.store, RestoreOptions(position=Position(1, 4)))
    assert (report.hashes.hashes == hash_pages(1, replica.states[Position(1, 4)], 4096)).all()


def test_a_database_that_is_corrupt_at_its_source_is_told_from_a_damaged_replica(
    replica: ReplicaBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    state = replica.states[Position(1, LAST)]
    replica.commit(Position(1, LAST + 1), state[: 4096 * 3] + os.urandom(4096) + state[4096 * 4 :])
    found = document(capsys, replica.store.url, code=1)
    assert "integrity_check finds" in found["integrity"] and found["damaged"] == []
    assert found["restorable"]["position"] == f"1:{LAST + 1}"


def test_a_live_database_is_compared_at_its_own_position(
    replica: ReplicaBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = tmp_path / "app.db"
    out, _ = run(capsys, replica.store.url, "--against", live)
    assert f"{live} has the same" in out and f"was at 1:{LAST} when it was read" in out
    connection = apsw.Connection(str(live))
    connection.wal_autocheckpoint(0)
    connection.execute("INSERT INTO t VALUES (1, 2)")
    before = (live.read_bytes(), Path(f"{live}-wal").read_bytes())
    out, _ = run(capsys, replica.store.url, "--against", live, code=1)
    assert "pages differ from 1:6" in out
    assert (live.read_bytes(), Path(f"{live}-wal").read_bytes()) == before
    connection.close()
