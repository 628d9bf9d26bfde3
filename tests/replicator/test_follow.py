"""Claims about ``restore --follow``: readers see committed states only, forwards, whatever happens to the follower or at the source."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest
from ledger_support import wait_for
from restore_support import ReplicaBuilder, SourceDatabase

from replicator import failpoints
from replicator.errors import DatabaseBusy, RestoreError, SegmentDamaged, StoreUnavailable, TargetExists, UsageError
from replicator.follow import Followed, Follower, follow
from replicator.layout import SegmentRef
from replicator.restore import RestoreOptions
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore
from replicator.values import Position

ROOT = Path(__file__).parents[2]
QUICK = RestoreOptions(integrity_check="none")
SCHEMA = (
    "CREATE TABLE counter (n INTEGER, rows INTEGER)",
    "CREATE TABLE ledger (id INTEGER PRIMARY KEY, n INTEGER, body BLOB)",
    "CREATE INDEX by_n ON ledger (n)",
    "INSERT INTO counter VALUES (0, 0)",
)
COUNT = "UPDATE counter SET rows = (SELECT count(*) FROM ledger)"


class Source:
    """A database whose every commit is a segment of a replica. Its tables always agree, and its count only grows."""

    def __init__(
        self, builder: ReplicaBuilder, path: Path, page_size: int = 4096, timeline: int = 1, txid: int = 1
    ) -> None:
        self.builder = builder
        self.database = SourceDatabase(path, page_size)
        self.position = Position(timeline, txid)
        builder.snapshot(self.position, self.database.commit(*SCHEMA))

    def commit(self, rows: int = 5, *more: str) -> Position:
        n = self.count() + 1
        statements = [f"INSERT INTO ledger(n, body) VALUES ({n}, randomblob(700))"] * rows
        return self._ship(self.database.commit(f"UPDATE counter SET n = {n}", *statements, *more, COUNT))

    def vacuum(self) -> Position:
        return self._ship(self.database.vacuum())

    def count(self) -> int:
        return int(self.database._connection.execute("SELECT n FROM counter").get)

    def _ship(self, state: bytes) -> Position:
        self.position = Position(self.position.timeline, self.position.txid + 1)
        self.builder.commit(self.position, state)
        return self.position


@dataclass
class Place:
    store: Any
    builder: ReplicaBuilder
    folder: Path

    @property
    def copy(self) -> Path:
        return self.folder / "copy.db"

    def follower(self, **more: Any) -> Follower:
        return Follower(self.store, self.copy, QUICK, **{"list_every_s": 0.0, **more})

    def content(self) -> bytes:
        """All of the copy, as a reader has it, with the mode that its source has."""
        connection = apsw.Connection(str(self.copy), flags=apsw.SQLITE_OPEN_READWRITE)
        connection.execute("PRAGMA wal_checkpoint(truncate)").fetchall()
        connection.close()
        return self.copy.read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    store = FileStore(tmp_path / "bucket")
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    return Place(store, builder, tmp_path)


@pytest.fixture
def source(place: Place) -> Iterator[Source]:
    source = Source(place.builder, place.folder / "source.db")
    yield source
    source.database.close()


@contextmanager
def following(place: Place, **more: Any) -> Iterator[Follower]:
    follower = place.follower(**more)
    try:
        follower.open()
        yield follower
    finally:
        follower.close()


class Reader:
    def __init__(self, path: Path, check_every: int = 5) -> None:
        program = Path(__file__).with_name("reader_program.py")
        command = [sys.executable, str(program), str(path), str(check_every)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=30)
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.mark.slow
def test_readers_in_other_processes_see_whole_commits_only_and_forwards(place: Place, source: Source) -> None:
    chance = random.Random(1)
    with following(place) as follower:
        readers = [Reader(place.copy), Reader(place.copy, 50)]
        for step in range(60):
            source.commit(
                chance.choice((1, 5, 200)), *(["DELETE FROM ledger WHERE id % 7 = 3"] if step % 9 == 8 else [])
            )
            if step % 20 == 19:
                source.vacuum()
            assert follower.step().position == source.position
        reports = [reader.end() for reader in readers]
    assert [report["wrong"] for report in reports] == [[], []]
    assert all(report["states"] > 5 for report in reports)
    assert max(report["worst_ms"] for report in reports) < 2000
    assert place.content() == place.builder.states[source.position]


def test_a_reader_in_the_middle_of_a_transaction_blocks_nothing_and_keeps_its_state(
    place: Place, source: Source
) -> None:
    with following(place) as follower:
        slow = apsw.Connection(str(place.copy), flags=apsw.SQLITE_OPEN_READONLY)
        slow.execute("BEGIN; SELECT n FROM counter").fetchall()
        for _ in range(30):
            source.commit(200)
            follower.step()
        assert slow.execute("SELECT n, rows FROM counter").fetchall() == [(0, 0)]
        slow.execute("COMMIT")
        assert slow.execute("SELECT n FROM counter").get == 30
        slow.close()


def test_a_copy_goes_on_after_a_restart_without_a_second_download(place: Place, source: Source) -> None:
    with following(place):
        pass
    source.commit(300)
    place.store.delete([SegmentRef(1, 9, 1, 1).key])
    with following(place) as follower:
        found = follower.step()
    assert (found.position, found.changed) == (source.position, True)
    assert place.content() == place.builder.states[source.position]


@pytest.mark.parametrize("rows", [3, 400])
def test_merged_segments_take_the_place_of_those_that_are_gone(place: Place, source: Source, rows: int) -> None:
    with following(place) as follower:
        for _ in range(4):
            source.commit(rows)
        place.builder.increment(Position(1, 4), 1 + 1, level=1)
        place.store.delete([SegmentRef(1, 0, txid, txid).key for txid in (2, 3, 4)])
        while follower.step().position != source.position:
            pass
        assert place.content() == place.builder.states[source.position]


def test_a_timeline_that_left_ours_behind_is_followed(place: Place, source: Source) -> None:
    for _ in range(3):
        source.commit()
    with following(place) as follower:
        reader = apsw.Connection(str(place.copy), flags=apsw.SQLITE_OPEN_READONLY)
        assert reader.execute("SELECT n FROM counter").get == 3
        place.builder.timeline(2, Position(1, 3))
        other = SourceDatabase(place.folder / "other.db")
        other.commit(*SCHEMA)
        place.builder.commit(Position(2, 4), other.commit("UPDATE counter SET n = 77"))
        assert follower.step().position == Position(2, 4)
        assert reader.execute("SELECT n FROM counter").get == 77
        place.builder.commit(Position(2, 5), other.commit("UPDATE counter SET n = 78"))
        assert follower.step().position == Position(2, 5)
        assert reader.execute("SELECT n FROM counter").get == 78
        reader.close()
        other.close()
    assert place.content() == place.builder.states[Position(2, 5)]


def test_another_page_size_waits_for_readers_and_then_takes_its_place(place: Place, source: Source) -> None:
    source.commit(50)
    with following(place) as follower:
        reader = apsw.Connection(str(place.copy), flags=apsw.SQLITE_OPEN_READONLY)
        reader.execute("SELECT n FROM counter").fetchall()
        place.builder.timeline(2, source.position)
        larger = ReplicaBuilder(place.store, 8192)
        other = Source(larger, place.folder / "larger.db", 8192, timeline=2, txid=source.position.txid + 1)
        other.commit(80)
        with pytest.raises(DatabaseBusy, match="another page size now"):
            follower.step()
        assert reader.execute("SELECT n FROM counter").get == 1
        reader.close()
        assert follower.step().position == other.position
        other.commit(10)
        assert follower.step().position == other.position
        other.database.close()
    assert place.content() == larger.states[other.position]


def test_a_source_without_a_wal_is_followed(place: Place, tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "plain.db"))
    connection.execute("CREATE TABLE counter (n)")
    place.builder.snapshot(Position(1, 1), (tmp_path / "plain.db").read_bytes())
    with following(place):
        pass
    connection.execute("INSERT INTO counter VALUES (1)")
    place.builder.commit(Position(1, 2), (tmp_path / "plain.db").read_bytes())
    with following(place) as follower:
        assert follower.step().position == Position(1, 2)
    connection.close()
    state = place.builder.states[Position(1, 2)]
    assert place.content() == state[:18] + b"\2\2" + state[20:]


def test_a_copy_that_somebody_has_written_is_put_right(place: Place, source: Source) -> None:
    with following(place) as follower:
        writer = apsw.Connection(str(place.copy))
        writer.execute("DELETE FROM counter; CREATE TABLE mine(x)")
        source.commit()
        assert follower.step().position == source.position
        assert writer.execute("SELECT n, rows FROM counter").fetchall() == [(1, 5)]
        writer.close()
    assert place.content() == place.builder.states[source.position]


def test_a_damaged_segment_never_reaches_a_reader(place: Place, source: Source) -> None:
    with following(place) as follower:
        source.commit()
        place.builder.damage(SegmentRef(1, 0, 2, 2), lambda body: body[:200] + b"\0" + body[201:])
        with pytest.raises(SegmentDamaged):
            follower.step()
        connection = apsw.Connection(str(place.copy), flags=apsw.SQLITE_OPEN_READONLY)
        assert connection.execute("SELECT n FROM counter").get == 0
        assert connection.execute("PRAGMA integrity_check").get == "ok"
        connection.close()


def test_a_file_that_is_no_copy_of_ours_is_refused(place: Place, source: Source) -> None:
    place.copy.write_bytes(b"precious")
    with pytest.raises(TargetExists), following(place):
        pass
    place.copy.unlink()
    with following(place):
        with pytest.raises(RestoreError, match="another process follows"):
            place.follower().open()
    place.copy.rename(place.folder / "moved.db")
    (place.folder / "copy.db").write_bytes(b"precious")
    with pytest.raises(TargetExists), following(place):
        pass
    assert place.copy.read_bytes() == b"precious"
    with pytest.raises(UsageError):
        Follower(place.store, place.copy, RestoreOptions(txid=3))


def test_a_store_that_is_away_is_said_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    other = Source(builder, tmp_path / "other.db")
    follower = Follower(store, tmp_path / "followed.db", QUICK)
    follower.open()
    waits: list[float] = []
    told: list[Followed] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 3:
            store.before = lambda operation, key: None
        return len(waits) == 5

    def away(operation: str, key: str) -> None:
        raise StoreUnavailable("the store is away")

    other.commit()
    store.before = away
    follow(follower, 1.0, wait, told.append)
    follower.close()
    other.database.close()
    assert waits[:4] == [1.0, 2.0, 4.0, 0.0]
    assert [found.position for found in told][:1] == [other.position]
    assert [record.message for record in caplog.records] == ["the store is away", "following goes on"]


POINTS = (*failpoints.FOLLOW_NAMES, "after-followed-index:3")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_follower_that_is_killed_goes_on(place: Place, source: Source, point: str) -> None:
    """While a reader has the copy open, which sees nothing but committed states."""
    command = [
        sys.executable,
        "-m",
        "replicator",
        "restore",
        "--follow",
        "--follow-interval",
        "20ms",
        "-o",
        str(place.copy),
    ]
    command.append(place.store.url)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(**more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env={**environment, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    reader = None
    if "restore" not in point:
        with following(place):
            pass
        reader = Reader(place.copy)
    killed = run(REPLICATOR_FAILPOINT=point)
    for _ in range(4):
        source.commit(60)
    assert killed.wait(30) == -signal.SIGKILL
    killed.communicate()
    again = run()
    try:
        source.commit(3)

        def is_there() -> bool:
            try:
                connection = apsw.Connection(str(place.copy), flags=apsw.SQLITE_OPEN_READONLY)
                try:
                    return bool(connection.execute("SELECT n FROM counter").get == source.count())
                finally:
                    connection.close()
            except apsw.Error:
                return False

        wait_for(is_there)
    finally:
        again.terminate()
        out, err = again.communicate(timeout=30)
    assert again.returncode in (0, -signal.SIGTERM), err.decode()  # the latter before it had begun to follow
    if reader is not None:
        assert reader.end()["wrong"] == []
    assert place.content() == place.builder.states[source.position]
