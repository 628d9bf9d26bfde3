"""Claims about trial restores of a running replicator: what is proved is shown, what is damaged is said loudly and healed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
from ledger_support import restored_rows, wait_for

from replicator.config import parse
from replicator.control import status_document
from replicator.drill import Drill
from replicator.errors import StoreUnavailable
from replicator.replica import Replica
from replicator.service import Replicator
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore
from replicator.trials import TrialRecord, Trials
from replicator.values import Position
from replicator.watch import Folder
from replicator.worker import DatabaseStatus, Protection, WorkerSettings

OFTEN = WorkerSettings(interval_s=0.0, trial_every_s=0.05)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(tmp_path / "app.db"))
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE ledger (id INTEGER PRIMARY KEY, body)").fetchall()
    yield connection
    connection.close()


@contextmanager
def replicating(folder: Path, settings: WorkerSettings = OFTEN) -> Iterator[Replicator]:
    replicator = Replicator()
    replicator.start()
    try:
        replicator.add(folder / "app.db", FileStore(folder / "bucket"), settings=settings)
        yield replicator
    finally:
        replicator.stop()


def status(replicator: Replicator) -> DatabaseStatus:
    (found,) = replicator.status()
    return found


def proved(replicator: Replicator, position: Position) -> Any:
    """A document of the status once the position is proved and nothing is wrong."""

    def look() -> Any:
        found = status(replicator)
        trial = found.trial
        is_done = trial is not None and not trial.problem and Position.parse(trial.position) >= position
        return status_document(found) if is_done and found.protection is Protection.PROTECTED else None

    return wait_for(look)


def test_a_replica_is_proved_again_and_again(tmp_path: Path, database: apsw.Connection) -> None:
    with replicating(tmp_path) as replicator:
        for number in range(2):
            database.execute("INSERT INTO ledger(body) VALUES (randomblob(99))")
            position = replicator.sync(tmp_path / "app.db", 20)
            found = proved(replicator, position)
            assert found["trial"]["proved_time"] == found["durable_time"], number
    state = tmp_path / ".app.db-replicator"
    assert not (state / "scratch").exists()
    assert Trials(state, f"file://{tmp_path}/bucket").record is not None


def test_what_was_proved_is_known_after_a_restart_and_not_tried_anew(tmp_path: Path, database: apsw.Connection) -> None:
    with replicating(tmp_path) as replicator:
        proved(replicator, replicator.sync(tmp_path / "app.db", 20))
    state = tmp_path / ".app.db-replicator"
    before = Trials(state, f"file://{tmp_path}/bucket").record
    (state / "scratch").mkdir()
    with replicating(tmp_path, WorkerSettings(trial_every_s=3600)) as replicator:
        replicator.sync(tmp_path / "app.db", 20)
        assert status(replicator).trial == before
    assert not (state / "scratch").exists()


def test_what_was_proved_says_nothing_of_another_place(tmp_path: Path, database: apsw.Connection) -> None:
    with replicating(tmp_path) as replicator:
        proved(replicator, replicator.sync(tmp_path / "app.db", 20))
        replicator.remove(tmp_path / "app.db")
        replicator.add(tmp_path / "app.db", FileStore(tmp_path / "other"), settings=WorkerSettings())
        replicator.sync(tmp_path / "app.db", 20)
        assert status(replicator).trial is None


def test_a_damaged_replica_is_said_and_begun_anew(
    tmp_path: Path, database: apsw.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    database.execute("INSERT INTO ledger(body) VALUES (randomblob(99))")
    with replicating(tmp_path) as replicator:
        proved(replicator, replicator.sync(tmp_path / "app.db", 20))
        (snapshot,) = (tmp_path / "bucket" / "segments" / "00000001" / "9").glob("*.seg")
        snapshot.write_bytes(snapshot.read_bytes()[:-9] + b"\0" * 9)
        assert proved(replicator, Position(2, 0))["durable"].startswith("2:")
        database.execute("INSERT INTO ledger(body) VALUES (randomblob(99))")
        replicator.sync(tmp_path / "app.db", 20)
    (said,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith(
        f"NOT PROTECTED: file://{tmp_path}/bucket does not give what was shipped: segments/00000001/9/"
    )
    assert restored_rows(FileStore(tmp_path / "bucket"), tmp_path) == [1, 2]
    assert "a trial restore failed" in Replica(FileStore(tmp_path / "bucket")).timelines()[2].reason


def test_what_was_shipped_and_is_gone_is_damage_too(tmp_path: Path, database: apsw.Connection) -> None:
    with replicating(tmp_path) as replicator:
        database.execute("INSERT INTO ledger(body) VALUES (randomblob(99))")
        position = replicator.sync(tmp_path / "app.db", 20)
        proved(replicator, position)
        database.execute("INSERT INTO ledger(body) VALUES (randomblob(99))")
        position = replicator.sync(tmp_path / "app.db", 20)
        for segment in (tmp_path / "bucket" / "segments" / "00000001" / "0").glob(f"*-{position.txid:016d}.seg"):
            segment.unlink()
        assert proved(replicator, Position(2, 0))


def test_a_database_that_is_deleted_takes_its_trials_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "tenants"
    folder.mkdir()
    connection = apsw.Connection(str(folder / "app.db"))
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE ledger (id INTEGER PRIMARY KEY)").fetchall()
    replicator = Replicator()
    replicator.start()
    replicator.add_folder(Folder(folder), FileStore(tmp_path / "bucket"), state=tmp_path / "state", settings=OFTEN)
    proved(replicator, replicator.sync(folder / "app.db", 20))
    connection.close()
    (folder / "app.db").unlink()
    wait_for(lambda: replicator.status() == [])
    replicator.stop()
    assert [path.name for path in (tmp_path / "state").rglob("*") if path.is_file()] == []


class Fake:
    """A database with a replica in which nothing is."""

    def __init__(self, folder: Path, every_s: float, record: TrialRecord | None = None) -> None:
        self.store = MemoryStore()
        folder.mkdir()
        self.trials = Trials(folder, self.store.url)
        self.trials.record = record
        self.trial_every_s = every_s
        self.safe_position: Position | None = Position(1, 1)
        self.distrusted = ""

    def distrust(self, reason: str) -> None:
        self.distrusted = reason


def test_the_one_that_waits_longest_is_tried_first_and_those_without_trials_never(tmp_path: Path) -> None:
    old, new = TrialRecord(tried_ms=1_000), TrialRecord(tried_ms=9_000)
    one, other = Fake(tmp_path / "1", 5.0, new), Fake(tmp_path / "2", 5.0, old)
    never = Fake(tmp_path / "3", 0.0)
    drill = Drill(lambda: [one, other, never], now_ms=lambda: 10_000)
    assert drill.step() == 0.0
    assert "holds" in other.distrusted and not one.distrusted and not never.distrusted
    assert 3.5 < drill.step() <= 4.0


def test_a_store_that_is_away_is_no_damage(tmp_path: Path) -> None:
    one = Fake(tmp_path / "1", 500.0)

    def away(operation: str, key: str) -> None:
        raise StoreUnavailable("the store is away")

    one.store.before = away
    drill = Drill(lambda: [one], now_ms=lambda: 10_000)
    assert drill.step() == 0.0
    assert not one.distrusted and one.trials.record is None
    assert 50 < drill.step() <= 60


def test_a_replica_that_is_not_up_to_date_is_not_tried(tmp_path: Path) -> None:
    one = Fake(tmp_path / "1", 500.0)
    one.safe_position = None
    drill = Drill(lambda: [one], now_ms=lambda: 10_000)
    drill.step()
    assert one.store.calls == [] and drill.step() > 50


@pytest.mark.parametrize(
    "top, replica, seconds",
    [
        ("", "", 0),
        ("validation: {interval: 24h}\n", "", 86400),
        ("validation: {interval: 24h}\n", ", validation-interval: 1h", 3600),
        ("validation: {interval: 24h}\n", ", validation-interval: 0", 0),
        ("validation-interval: 2h\n", "", 7200),
    ],
)
def test_the_interval_is_litestreams_key(top: str, replica: str, seconds: float) -> None:
    text = f"{top}dbs:\n- path: /x.db\n  replica: {{url: 'memory://x'{replica}}}\n"
    config = parse(text, Path("r.yml"), None)
    assert config.databases[0].settings.trial_every_s == seconds
    assert config.notes == ()


def test_a_database_that_is_damaged_itself_is_not_protected(tmp_path: Path) -> None:
    with replicating(tmp_path, OFTEN) as replicator:
        connection = apsw.Connection(str(tmp_path / "app.db"))
        connection.execute(
            "PRAGMA journal_mode=wal; CREATE TABLE ledger (id INTEGER PRIMARY KEY, body); CREATE INDEX i ON ledger(body);"
            "INSERT INTO ledger(body) VALUES ('a'), ('b'); PRAGMA writable_schema=on;"
            "UPDATE sqlite_schema SET rootpage = 2 WHERE name = 'i'"
        ).fetchall()
        connection.close()

        def damaged() -> bool:
            found = status(replicator)
            return found.protection is Protection.NOT_PROTECTED and "the database itself is damaged" in found.reason

        wait_for(damaged)
        assert Replica(FileStore(tmp_path / "bucket")).timelines().keys() == {1}
