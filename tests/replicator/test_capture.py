"""Claims about what is captured and shipped of one database, step by step: every restore equals a committed state of the source."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest
from ledger_support import AT_ONCE, App, Rig, app, restored, restored_rows, rig, rows, wait_for

from replicator.capture import CaptureSettings
from replicator.database import FileStamp
from replicator.errors import DatabaseError, StoreDenied, StoreUnavailable
from replicator.layout import SegmentRef, segments_of
from replicator.replica import Replica
from replicator.restore import RestoreOptions
from replicator.scheduler import Crew
from replicator.segment import SegmentReader
from replicator.ship import Shipper
from replicator.spool import Spool
from replicator.store.memory import MemoryStore
from replicator.values import Position
from replicator.worker import Protection, WorkerSettings

SMALL_WAL = WorkerSettings(interval_s=0.0, capture=CaptureSettings(checkpoint_pages=20))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "app.db"


@pytest.fixture
def writer(path: Path) -> Iterator[App]:
    with app(path, "journal_mode=wal") as running:
        running.insert(20)
        yield running


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def live(path: Path, store: MemoryStore, writer: App) -> Iterator[Rig]:
    with rig(path, store) as running:
        running.settle()
        yield running


def assert_same_as_source(store: MemoryStore, path: Path, tmp_path: Path) -> None:
    """Byte for byte, once everything is in the file; the replicator is closed by now."""
    with app(path) as checkpointing:
        checkpointing.empty_wal()
        assert restored(store, tmp_path).read_bytes() == path.read_bytes()


def timelines(store: MemoryStore) -> list[tuple[int | None, int | None]]:
    """Parent and fork of each, by number."""
    return [(line.parent, line.fork_txid) for line in Replica(store).timelines().values()]


def headers(store: MemoryStore, timeline: int = 1) -> list[tuple[bool, int, int]]:
    found = []
    for info in store.list(segments_of(timeline)):
        header = SegmentReader.from_bytes(store.get(info.key)).header
        found.append((header.snapshot, header.last, header.last_commit_ms))
    return sorted(found, key=lambda one: one[1])


# -- commits, checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_what_is_committed_comes_back_byte_for_byte(
    path: Path, store: MemoryStore, tmp_path: Path, page_size: int
) -> None:
    with app(path, f"page_size={page_size}", "journal_mode=wal") as writer:
        with rig(path, store, settings=SMALL_WAL) as live:
            for n in range(1, 11):
                writer.insert(10, 700)
                live.settle()
                assert len(restored_rows(store, tmp_path)) == n * 10
            assert live.figures.rebases == 1 and live.figures.checkpoints > 0
        assert_same_as_source(store, path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["passive", "full", "restart", "truncate"])
@pytest.mark.parametrize("autocheckpoint", [0, 1, 10])
def test_checkpoints_of_the_application_lose_nothing_and_cost_no_comparison(
    path: Path, store: MemoryStore, tmp_path: Path, mode: str, autocheckpoint: int
) -> None:
    with app(path, "journal_mode=wal", f"wal_autocheckpoint={autocheckpoint}", busy_timeout_ms=5) as writer:
        writer.insert(5)
        with rig(path, store, settings=SMALL_WAL) as live:
            for _ in range(20):
                writer.insert(3)
                live.step()
                writer.run(f"PRAGMA wal_checkpoint({mode})")
            live.settle()
            assert live.figures.rebases == 1 and live.figures.checkpoints > 0
            assert live.figures.wal_bytes < 100 * 4120
        assert restored_rows(store, tmp_path) == list(range(1, 66))
        assert_same_as_source(store, path, tmp_path)


def test_a_long_reader_delays_the_checkpoint_and_nothing_else(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "journal_mode=wal") as writer, app(path) as reader:
        writer.insert(5)
        reader.run("BEGIN", "SELECT * FROM ledger")
        with rig(path, store, settings=SMALL_WAL) as live:
            for _ in range(5):
                writer.insert(10)
                live.settle()
            assert live.worker.status().checkpoint_blocked
            assert len(restored_rows(store, tmp_path)) == 55
            reader.run("COMMIT")


def test_the_first_commit_after_a_checkpoint_is_not_missed(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "journal_mode=wal") as writer:
        with rig(
            path, store, settings=WorkerSettings(interval_s=0, capture=CaptureSettings(checkpoint_pages=1))
        ) as live:
            for n in range(1, 30):
                writer.insert(1)
                live.settle()
                assert restored_rows(store, tmp_path) == list(range(1, n + 1))
            assert live.figures.checkpoints > 20
            assert live.figures.rebases == 1


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_after_a_plain_restart_continuity_is_proven_without_a_comparison(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    for n in range(1, 4):
        with rig(path, store) as live:
            live.settle()
            assert live.figures.rebases == (1 if n == 1 else 0)
            writer.insert(10)
            live.settle()
        writer.insert(10)
    with rig(path, store) as live:
        live.settle()
    assert restored_rows(store, tmp_path) == list(range(1, 81))
    assert len(timelines(store)) == 1


@pytest.mark.parametrize("attributes", [[], ["-p"]], ids=["cp", "cp -p"])
@pytest.mark.parametrize(("running", "backfilled"), [(False, False), (False, True), (True, True)])
def test_a_file_that_is_copied_over_in_place_under_its_wal_is_never_mixed_with_what_was_captured(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path, running: bool, backfilled: bool, attributes: list[str]
) -> None:
    """The WAL alone would prove that nothing has happened. While it runs, it is seen once all of the WAL is in the file."""
    backup = tmp_path / "backup.db"
    writer.insert(100)
    writer.empty_wal()
    subprocess.run(["cp", "-p", str(path), str(backup)], check=True)
    settings = WorkerSettings(interval_s=0, capture=CaptureSettings(checkpoint_pages=1 if backfilled else 1000))
    with rig(path, store, settings=settings) as live:
        live.settle()
        writer.run("UPDATE ledger SET body = 'new'")
        live.settle()
        assert live.figures.checkpoints == int(backfilled)
        if running:
            subprocess.run(["cp", *attributes, str(backup), str(path)], check=True)
            live.worker._ask_for_step()
            live.settle()
    inode = path.stat().st_ino
    if not running:
        subprocess.run(["cp", *attributes, str(backup), str(path)], check=True)
    assert path.stat().st_ino == inode and Path(f"{path}-wal").stat().st_size > 0
    with rig(path, store, settings=settings) as live:
        live.settle()
        with app(path) as fresh:
            fresh.insert(1)
            live.settle()
        assert live.figures.rebases == int(not running)
    assert_same_as_source(store, path, tmp_path)


def test_what_the_applications_checkpoint_wrote_while_we_were_away_costs_one_comparison(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    with rig(path, store) as live:
        writer.insert(10)
        live.settle()
    writer.run("PRAGMA wal_checkpoint(passive)")
    wait_for(lambda: FileStamp(0, 0, path.stat().st_ctime_ns, b"").is_settled(time.time_ns()))
    for comparisons in (1, 0, 0):
        with rig(path, store) as live:
            live.settle()
            assert live.figures.rebases == comparisons
    assert len(headers(store)) == 1


@pytest.mark.parametrize("ctime_ns", [5_000_000_000, 5_000_000_001])
def test_a_stamp_within_the_tick_of_the_last_write_proves_nothing(ctime_ns: int) -> None:
    """File systems that keep whole seconds have long ticks."""
    stamp = FileStamp(4096, 1, ctime_ns, b"1234")
    tick_ns = 20_000_000 if ctime_ns % 2 else 2_000_000_000
    assert not stamp.is_settled(ctime_ns + tick_ns)
    assert stamp.is_settled(ctime_ns + tick_ns + 1)


@pytest.mark.parametrize("times", [1, 2])
def test_a_wal_that_began_anew_while_nobody_looked_is_noticed(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path, times: int
) -> None:
    """The application goes on, its WAL starts anew, and a few frames follow: the old tail is still in the file."""
    with rig(path, store) as live:
        writer.insert(100)
        live.settle()
    for _ in range(times):
        writer.insert(30)
        writer.run("PRAGMA wal_checkpoint(passive)")
        writer.insert(5)
    with rig(path, store) as live:
        live.settle()
        assert live.figures.rebases == 1
    assert restored_rows(store, tmp_path) == list(range(1, 121 + 35 * times))
    assert len(timelines(store)) == 1
    assert_same_as_source(store, path, tmp_path)


def test_an_application_that_closes_while_we_run_or_are_away_loses_nothing(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    for n in range(1, 4):
        with rig(path, store) as live:
            with app(path, "journal_mode=wal") as writer:
                writer.insert(10)
                if n > 1:
                    live.settle()
                writer.close()
            live.settle()
            assert len(restored_rows(store, tmp_path)) == n * 20 - 10
        with app(path) as writer:
            writer.insert(10)
            writer.close()
        assert not Path(f"{path}-wal").exists()
    with rig(path, store) as live:
        live.settle()
    assert_same_as_source(store, path, tmp_path)


# -- what is not committed ---------------------------------------------------------------------------------------------


def test_rolled_back_frames_are_never_shipped(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "journal_mode=wal", "cache_size=10", "cache_spill=on") as writer:
        writer.insert(5)
        with rig(path, store) as live:
            live.settle()
            writer.run("BEGIN", "UPDATE ledger SET body = randomblob(300)")
            writer.run(
                "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 900) "
                "INSERT INTO ledger SELECT i, randomblob(900) FROM n"
            )
            wal = Path(f"{path}-wal")
            spilled = wal.stat().st_size
            assert spilled > 100 * 4120
            live.step()
            writer.run("ROLLBACK")
            live.settle()
            assert restored_rows(store, tmp_path) == [1, 2, 3, 4, 5]
            writer.insert(3)
            live.settle()
            assert restored_rows(store, tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
            assert live.figures.rebases == 1
        assert_same_as_source(store, path, tmp_path)


def test_a_large_transaction_that_spills_arrives_whole(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "journal_mode=wal", "cache_size=10") as writer:
        writer.insert(5)
        with rig(path, store) as live:
            live.settle()
            writer.run("BEGIN")
            for first in (1000, 2000, 3000):
                writer.run(
                    f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {first + 199}) "
                    "INSERT INTO ledger SELECT i, randomblob(900) FROM n"
                )
                live.settle()
                assert len(restored_rows(store, tmp_path)) == 5
            writer.run("COMMIT")
            live.settle()
            assert len(restored_rows(store, tmp_path)) == 605
            assert live.figures.rebases == 1


def test_savepoints_that_are_taken_back_are_not_shipped(
    writer: App, live: Rig, store: MemoryStore, tmp_path: Path
) -> None:
    writer.run("BEGIN", "INSERT INTO ledger VALUES (100, 'a')", "SAVEPOINT s", "INSERT INTO ledger VALUES (101, 'b')")
    writer.run("ROLLBACK TO s", "RELEASE s", "INSERT INTO ledger VALUES (102, 'c')", "COMMIT")
    live.settle()
    assert restored_rows(store, tmp_path)[-2:] == [100, 102]


def test_an_application_that_is_killed_in_a_transaction_leaves_the_committed_prefix(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    with rig(path, store) as live:
        with app(path, "journal_mode=wal", "cache_size=5") as writer:
            writer.insert(10)
            live.settle()
            writer.run("BEGIN", "UPDATE ledger SET body = randomblob(3000)")
            live.step()
            writer.kill()
        live.settle()
        with app(path) as writer:
            assert writer.run("SELECT count(*) FROM ledger WHERE length(body) = 3000") == [0]
            writer.insert(1)
            live.settle()
    assert restored_rows(store, tmp_path) == list(range(1, 12))
    assert_same_as_source(store, path, tmp_path)


def test_garbage_at_the_end_of_the_wal_is_ignored(path: Path, store: MemoryStore, writer: App, tmp_path: Path) -> None:
    with open(f"{path}-wal", "ab") as wal:
        wal.write(os.urandom(3 * 4120 + 17))
    with rig(path, store) as live:
        live.settle()
        assert len(restored_rows(store, tmp_path)) == 20
        writer.insert(10)
        live.settle()
    assert len(restored_rows(store, tmp_path)) == 30


def test_a_commit_that_sqlite_takes_back_after_a_failed_fsync_does_not_stay_in_the_replica(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    """Its frames look committed, and the WAL starts anew before anything is written over them."""
    with app(path, "journal_mode=wal", "synchronous=full") as writer:
        writer.insert(50, 1000)
        with rig(
            path, store, settings=WorkerSettings(interval_s=0, capture=CaptureSettings(checkpoint_pages=1))
        ) as live:
            live.settle()
            writer.insert(1)  # so that the frames that are taken back are not the first ones of their WAL
            writer.fail_next_wal_sync()
            assert "told to fail" in writer.try_run("UPDATE ledger SET body = 'phantom' WHERE id = 1")
            live.settle()
            live.settle()
            writer.run("INSERT INTO ledger(body) VALUES ('real')")
            live.settle()
            found = restored_rows(store, tmp_path, "SELECT count(*) FROM ledger WHERE body = 'phantom'")
            assert found == [0]
        assert_same_as_source(store, path, tmp_path)


# -- shapes of a database ----------------------------------------------------------------------------------------------


def test_vacuum_growth_shrinking_and_free_pages_come_back(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "auto_vacuum=incremental", "journal_mode=wal") as writer:
        writer.insert(100, 2000)
        with rig(path, store, settings=SMALL_WAL) as live:
            for statement in (
                "DELETE FROM ledger WHERE id % 2",
                "PRAGMA incremental_vacuum(10)",
                "DELETE FROM ledger WHERE id > 20",
                "VACUUM",
                "INSERT INTO ledger SELECT id + 1000, zeroblob(50000) FROM ledger",
                "PRAGMA secure_delete=on",
                "DELETE FROM ledger WHERE id > 1005",
                "PRAGMA incremental_vacuum",
                "CREATE TABLE other AS SELECT * FROM ledger",
                "DROP TABLE other",
                "INSERT INTO ledger SELECT id + 2000, randomblob(9000) FROM ledger",
            ):
                writer.run(statement)
                live.settle()
                expected = writer.run("SELECT id, hex(body) FROM ledger")
                assert [
                    list(row) for row in restored_rows(store, tmp_path, "SELECT id, hex(body) FROM ledger")
                ] == expected
        assert_same_as_source(store, path, tmp_path)


def test_shrinking_and_growing_between_two_steps_comes_back(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "auto_vacuum=full", "journal_mode=wal") as writer:
        writer.insert(200, 2000)
        with rig(path, store) as live:
            live.settle()
            writer.run("DELETE FROM ledger WHERE id > 10")
            writer.run("PRAGMA wal_checkpoint(passive)")
            writer.run("BEGIN", "CREATE TABLE more(x)", "INSERT INTO more SELECT zeroblob(3000000)", "DROP TABLE more")
            writer.run("INSERT INTO ledger SELECT id + 1000, randomblob(20000) FROM ledger", "COMMIT")
            live.settle()
        assert_same_as_source(store, path, tmp_path)


def test_a_database_of_one_page_and_then_of_a_table_comes_back(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    with app(path, "journal_mode=wal") as writer, rig(path, store) as live:
        writer.run("PRAGMA user_version=7")
        live.settle()
        assert live.worker.status().page_count == 1
        assert restored_rows(store, tmp_path, "PRAGMA user_version") == [7]
        writer.insert(1)
        live.settle()
        assert restored_rows(store, tmp_path) == [1]


def test_an_empty_file_is_not_protected_and_says_so_until_it_is_a_database(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    path.touch()
    with rig(path, store) as live:
        live.step()
        status = live.worker.status()
        assert status.protection is Protection.NOT_PROTECTED and "is empty" in status.reason
        with app(path, "journal_mode=wal") as writer:
            writer.insert(3)
            live.settle()
    assert restored_rows(store, tmp_path) == [1, 2, 3]


def test_a_page_size_that_changes_while_we_are_away_begins_with_a_snapshot(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    with rig(path, store) as live:
        before = live.settle()
    writer.run("PRAGMA journal_mode=delete", "PRAGMA page_size=16384", "VACUUM", "PRAGMA journal_mode=wal")
    writer.insert(1)
    with rig(path, store) as live:
        after = live.settle()
    assert [snapshot for snapshot, _, _ in headers(store)] == [True, True]
    assert len(restored_rows(store, tmp_path)) == 21
    assert len(rows(restored(store, tmp_path, RestoreOptions(position=before)))) == 20
    assert after.timeline == before.timeline
    assert_same_as_source(store, path, tmp_path)


# -- without a WAL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist"])
def test_a_database_without_a_wal_is_captured_by_comparison(
    path: Path, store: MemoryStore, tmp_path: Path, journal: str
) -> None:
    with app(path, f"journal_mode={journal}") as writer:
        with rig(path, store) as live:
            for n in range(1, 6):
                writer.insert(10)
                live.settle()
                assert len(restored_rows(store, tmp_path)) == n * 10
            segments = len(headers(store))
            live.settle()
            assert len(headers(store)) == segments
            writer.run("PRAGMA page_size=8192", "VACUUM")
            live.settle()
            assert len(restored_rows(store, tmp_path)) == 50
            writer.insert(1)
            live.settle()
        assert_same_as_source(store, path, tmp_path)


def test_the_wal_may_be_switched_on_at_any_time_and_off_while_we_are_away(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    with app(path) as writer:
        writer.insert(10)
        with rig(path, store) as live:
            live.settle()
            writer.run("PRAGMA journal_mode=wal")
            writer.insert(10)
            live.settle()
            assert len(restored_rows(store, tmp_path)) == 20
            writer.insert(10)
            live.settle()
            assert live.figures.wal_bytes > 0
            assert "Busy" in writer.try_run("PRAGMA busy_timeout=10", "PRAGMA journal_mode=delete")
        writer.run("PRAGMA journal_mode=delete")
        writer.insert(10)
        with rig(path, store) as live:
            live.settle()
            assert len(restored_rows(store, tmp_path)) == 40
        assert_same_as_source(store, path, tmp_path)


def test_writers_without_a_wal_wait_no_longer_than_their_timeout(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    with app(path, "journal_mode=truncate") as writer:
        writer.insert(200, 3000)
        with rig(path, store) as live:
            writer.begin_storm(pause_ms=2)
            for _ in range(30):
                live.step()
            storm = writer.end_storm()
            live.settle()
        assert storm["errors"] == []
        assert len(restored_rows(store, tmp_path)) == 200 + storm["committed"]


def test_an_exclusive_application_is_named_and_captured_when_it_lets_go(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    with rig(path, store) as live:
        with app(path, "locking_mode=exclusive", "journal_mode=wal") as writer:
            writer.insert(3)
            live.step()
            status = live.worker.status()
            assert status.protection is Protection.NOT_PROTECTED and "locking_mode=EXCLUSIVE" in status.reason
            writer.close()
        live.settle()
    assert restored_rows(store, tmp_path) == [1, 2, 3]


def test_a_lock_that_passes_in_a_moment_does_not_make_a_database_unprotected(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    with rig(path, store) as live:
        make(path, 3)
        live.settle()
        live.worker._capture.let_go()
        with app(path, "locking_mode=exclusive", "journal_mode=wal") as writer:
            writer.insert(1)
            live.step()
            status = live.worker.status()
            assert status.protection is Protection.CATCHING_UP and "locking_mode=EXCLUSIVE" in status.reason
            writer.close()
        live.settle()
    assert restored_rows(store, tmp_path) == [1, 2, 3, 4]


# -- another file ------------------------------------------------------------------------------------------------------


def make(path: Path, count: int) -> None:
    with app(path, "journal_mode=wal") as other:
        other.insert(count)
        other.close()


def let_rest(live: Rig, path: Path) -> None:
    def is_at_rest() -> bool:
        live.step()
        return not Path(f"{path}-wal").exists() and not Path(f"{path}-shm").exists()

    wait_for(is_at_rest, what="the end of the WAL and its index")


@pytest.fixture
def resting(path: Path, store: MemoryStore, writer: App, live: Rig) -> Rig:
    """Whose application has gone."""
    writer.insert(5)
    live.settle()
    writer.close()
    let_rest(live, path)
    return live


def test_a_database_that_nobody_has_open_is_closed_and_goes_on_without_a_comparison(
    path: Path, store: MemoryStore, resting: Rig, tmp_path: Path
) -> None:
    for n in range(1, 4):
        assert resting.step() is None and not Path(f"{path}-shm").exists(), "there is nothing to open it for"
        with app(path) as writer:
            writer.insert(10)
            resting.settle()
            writer.close()
        let_rest(resting, path)
        assert len(restored_rows(store, tmp_path)) == 25 + n * 10
    assert resting.figures.rebases == 1
    resting.close()
    assert_same_as_source(store, path, tmp_path)


def test_a_database_that_rests_is_not_opened_by_a_restart(path: Path, store: MemoryStore, resting: Rig) -> None:
    before = resting.worker.status().durable
    resting.close()
    with rig(path, store) as live:
        assert live.settle() == before
        assert live.figures.rebases == 0 and not Path(f"{path}-shm").exists()
        with app(path) as writer:
            writer.insert(1)
            live.settle()
        assert live.figures.rebases == 0


def test_who_comes_and_goes_while_a_database_rests_costs_one_comparison_and_then_none(
    path: Path, store: MemoryStore, resting: Rig, tmp_path: Path
) -> None:
    """A program that is there for one commit would otherwise have the whole database read each time."""
    for n in range(1, 4):
        with app(path) as visitor:
            visitor.insert(1)
            visitor.close()
        assert Path(f"{path}-wal").exists() == (n > 1)
        resting.settle()
        assert len(restored_rows(store, tmp_path)) == 25 + n
    assert resting.figures.rebases == 2


@pytest.mark.parametrize("attributes", [[], ["-p"]], ids=["cp", "cp -p"])
def test_a_file_that_is_copied_over_a_database_that_rests_is_compared(
    path: Path, store: MemoryStore, resting: Rig, tmp_path: Path, attributes: list[str]
) -> None:
    backup = tmp_path / "backup.db"
    subprocess.run(["cp", "-p", str(path), str(backup)], check=True)
    with app(path) as writer:
        writer.run("UPDATE ledger SET body = 'new'")
        resting.settle()
        writer.close()
    let_rest(resting, path)
    subprocess.run(["cp", *attributes, str(backup), str(path)], check=True)
    with app(path) as writer:
        writer.insert(1)
        resting.settle()
    resting.close()
    assert_same_as_source(store, path, tmp_path)


@pytest.mark.parametrize("how", ["replaced", "made anew", "made anew later"])
def test_another_file_at_the_path_is_another_timeline_and_both_come_back(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path, how: str
) -> None:
    with rig(path, store) as live:
        live.settle()
        writer.insert(5)
        other = path.with_name("other.db")
        make(other, 300)
        assert other.stat().st_size > path.stat().st_size
        if how == "replaced":
            writer.close()
            let_rest(live, path)
        else:
            path.unlink()
            Path(f"{path}-wal").unlink()
            Path(f"{path}-shm").unlink()
        if how == "made anew later":
            live.step()
            assert "no such file" in live.worker.status().reason
        writer.kill() if how != "replaced" else None
        other.rename(path)
        if how == "replaced":
            with app(path) as reader:
                assert reader.run("PRAGMA integrity_check", "SELECT count(*) FROM ledger") == [300]
        position = live.settle()
        assert position.timeline == 2
        assert restored_rows(store, tmp_path) == list(range(1, 301))
        (_, first), (parent, fork) = timelines(store)
        assert (first, parent) == (None, 1) and fork is not None
        kept = rows(restored(store, tmp_path, RestoreOptions(position=Position(1, fork))))
        assert len(kept) == 25, "the last commits of the file that went were captured"
        make(path, 1)
        live.settle()
    assert len(timelines(store)) == 2


def test_a_file_that_gets_the_number_of_the_one_before_is_another_all_the_same(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    """File systems give the inode of a deleted file to the next one, which must not pass for it."""
    make(path, 5)
    with rig(path, store) as live:
        live.settle()
        inode = path.stat().st_ino
        path.unlink()
        live.step()
        make(path, 2)
        same = path.stat().st_ino == inode
        live.settle()
    assert len(timelines(store)) == 2, f"same inode: {same}"
    assert restored_rows(store, tmp_path) == [1, 2]


def test_closing_an_old_file_leaves_the_wal_of_the_new_one_alone(
    path: Path, store: MemoryStore, tmp_path: Path
) -> None:
    make(path, 5)
    with rig(path, store) as live:
        with app(path) as opened:
            opened.insert(1)
            live.settle()
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink()
            opened.kill()
        with app(path, "journal_mode=wal") as writer:
            writer.insert(7)
            live.settle()
            writer.insert(1)
            assert Path(f"{path}-wal").stat().st_size > 0
            live.settle()
    assert len(restored_rows(store, tmp_path)) == 8


# -- the spool and the store -------------------------------------------------------------------------------------------


def test_nothing_is_skipped_when_the_spool_cannot_be_written_for_a_while(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    """What was read from the WAL and could not be kept is read again."""
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        live.settle()
        spool = state / "spool"
        for _ in range(3):
            spool.rename(state / "away")
            writer.insert(5, 6000)
            live.step()
            assert live.worker.status().protection is Protection.NOT_PROTECTED
            (state / "away").rename(spool)
            writer.insert(5)
            live.worker.touched()
            live.worker._ask_for_step()
            live.settle()
        assert live.figures.rebases == 1
    assert restored_rows(store, tmp_path) == list(range(1, 51))
    assert_same_as_source(store, path, tmp_path)


def test_a_full_disk_is_named(path: Path, store: MemoryStore, writer: App, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        captured = live.settle()
        full = state / "spool" / f"{SegmentRef(1, 0, captured.txid + 1, captured.txid + 1).file_name}.tmp"
        full.symlink_to("/dev/full")
        writer.insert(1)
        live.step()
        assert live.worker.status().reason.startswith(f"{full} cannot be written: No space left on device; make room")
        live.worker._ask_for_step()
        live.settle()


def test_a_comparison_that_fails_half_way_is_not_taken_for_done(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        live.settle()
    writer.insert(2000, 400)
    writer.run("PRAGMA wal_checkpoint(truncate)")
    writer.insert(5)
    with rig(path, store, state=state) as live:
        (state / "spool").rename(state / "away")
        live.step()
        (state / "away").rename(state / "spool")
        live.worker._ask_for_step()
        live.settle()
    assert restored_rows(store, tmp_path) == list(range(1, 2026))


def test_segments_arrive_in_any_order_and_count_only_without_a_gap(writer: App, path: Path, tmp_path: Path) -> None:
    held = threading.Event()

    def before(operation: str, key: str) -> None:
        if operation == "put" and key.endswith("2-0000000000000002.seg"):
            held.wait()

    store = MemoryStore(before=before)
    with rig(path, store) as live:
        live.settle()
        for _ in range(4):
            writer.insert(1)
            live.step()
        while len(live.worker.status().waiting_segments and headers(store)) < 4:
            live.step()
        status = live.worker.status()
        assert status.captured == Position(1, 5) and status.durable == Position(1, 1)
        held.set()
        assert live.settle() == Position(1, 5)
    assert len(restored_rows(store, tmp_path)) == 24


def test_a_lost_acknowledgement_is_no_divergence(writer: App, live: Rig, store: MemoryStore, tmp_path: Path) -> None:
    store.fail_next("put", StoreUnavailable("the answer was lost"), after=True)
    writer.insert(1)
    live.settle()
    assert len(timelines(store)) == 1
    assert len(restored_rows(store, tmp_path)) == 21


def test_another_object_under_our_key_leads_to_a_new_timeline(
    writer: App, live: Rig, store: MemoryStore, tmp_path: Path
) -> None:
    foreign = store.get(SegmentRef(1, 9, 1, 1).key)
    store.put(SegmentRef(1, 0, 2, 2).key, foreign)
    writer.insert(1)
    assert live.settle().timeline == 2
    assert len(restored_rows(store, tmp_path)) == 21
    assert len(rows(restored(store, tmp_path, RestoreOptions(position=Position(1, 1))))) == 20


@contextmanager
def no_room() -> Iterator[None]:
    """Files can be made and renamed, and hold next to nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_commits_that_were_thrown_away_for_a_new_timeline_never_count_as_durable(
    writer: App, live: Rig, store: MemoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even when the disk is too full to begin it."""
    store.put(SegmentRef(1, 0, 2, 2).key, b"another")
    writer.insert(1)
    live.step()
    wait_for(lambda: "holds another" in caplog.text)
    with no_room():
        live.step()
    status = live.worker.status()
    assert "base cannot be written" in status.reason and status.protection is Protection.NOT_PROTECTED
    assert (status.waiting_segments, status.captured, status.durable) == (0, None, None)
    live.worker._ask_for_step()
    assert live.settle().timeline == 2, "the record that was written for the failed try is used"
    assert len(timelines(store)) == 2
    assert len(restored_rows(store, tmp_path)) == 21


def test_a_timeline_that_was_begun_for_a_state_that_is_not_the_newest_any_more_is_dropped(
    path: Path, writer: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It forks from a commit that never reached the store, and never will."""
    caplog.set_level("INFO")
    down = threading.Event()

    def before(operation: str, key: str) -> None:
        if down.is_set() and operation == "put" and "segments/" in key:
            raise StoreUnavailable("down")

    store = MemoryStore(before=before)
    other = path.with_name("other.db")
    make(other, 3)
    with rig(path, store) as live:
        live.settle()
        store.put(SegmentRef(1, 0, 2, 2).key, b"another")
        down.set()
        writer.insert(1)
        live.step()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
        live.step()
        other.rename(path)
        with no_room():
            live.step()
            assert timelines(store) == [(None, None), (1, 2)]
            down.clear()
            wait_for(lambda: (live.step(), "holds another" in caplog.text)[1])
        live.worker._ask_for_step()
        assert live.settle().timeline == 3
    assert "goes on as timeline 2" not in caplog.text and headers(store, 2) == []
    assert [snapshot for snapshot, _, _ in headers(store, 3)] == [True]
    assert restored_rows(store, tmp_path) == [1, 2, 3]


def test_a_full_spool_whose_segments_can_never_be_shipped_leads_to_a_new_timeline(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither waits for the other: uploads would free the spool, and a capture would begin the timeline."""
    with rig(path, store, settings=WorkerSettings(interval_s=0, spool_limit_bytes=1000)) as live:
        live.settle()
        store.put(SegmentRef(1, 0, 2, 2).key, b"another")
        writer.insert(1, 30_000)
        live.step()
        wait_for(lambda: "holds another" in caplog.text)
        assert live.worker.status().waiting_bytes > 1000
        assert live.settle().timeline == 2
    assert len(restored_rows(store, tmp_path)) == 21


def test_while_the_store_is_down_a_divergence_asks_it_seldom(writer: App, live: Rig, store: MemoryStore) -> None:
    store.put(SegmentRef(1, 0, 2, 2).key, b"another")
    store.fail_next("list", StoreUnavailable("down"), times=10**6)
    writer.insert(1)
    live.step()
    while "another" not in str(live.worker.status().reason) and "down" not in live.worker.status().reason:
        live.step()
    before = len(store.calls)
    for _ in range(200):
        live.worker.touched()
        live.step()
    assert len(store.calls) - before <= 2


def test_a_bucket_that_was_emptied_while_we_were_away_is_filled_again(path: Path, writer: App, tmp_path: Path) -> None:
    store = MemoryStore()
    with rig(path, store) as live:
        live.settle()
    store.delete([info.key for info in store.list()])
    with rig(path, store) as live:
        live.settle()
    assert len(restored_rows(store, tmp_path)) == 20


def test_a_bucket_that_is_emptied_while_we_run_is_filled_again(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(path, store, settings=WorkerSettings(interval_s=0, prove_every_s=0)) as live:
        live.settle()
        store.delete([info.key for info in store.list()])
        writer.insert(1)
        live.settle()
    assert len(restored_rows(store, tmp_path)) == 21
    assert [r.levelname for r in caplog.records if "was it emptied" in r.message and "ship" in r.name] == ["WARNING"]


def test_in_the_steady_state_there_are_uploads_and_no_other_request(writer: App, live: Rig, store: MemoryStore) -> None:
    before = len(store.calls)
    for _ in range(5):
        writer.insert(1)
        live.settle()
    assert [operation for operation, _ in store.calls[before:]] == ["put"] * 5


@pytest.mark.slow
def test_a_store_that_denies_is_said_and_nothing_is_lost(
    writer: App, live: Rig, store: MemoryStore, tmp_path: Path
) -> None:
    store.fail_next("put", StoreDenied("no permission to write; check the key"), times=3)
    writer.insert(1)
    live.step()
    while live.worker.status().protection is not Protection.NOT_PROTECTED:
        live.step()
    assert "no permission" in live.worker.status().reason
    live.settle()
    assert len(restored_rows(store, tmp_path)) == 21


def test_beyond_the_spools_limit_capturing_pauses_and_goes_on_with_one_comparison(
    path: Path, writer: App, tmp_path: Path
) -> None:
    down = threading.Event()

    def before(operation: str, key: str) -> None:
        if down.is_set():
            raise StoreUnavailable("down")

    store = MemoryStore(before=before)
    limited = WorkerSettings(interval_s=0, spool_limit_bytes=100_000)
    with rig(path, store, settings=limited) as live:
        live.settle()
        down.set()
        for _ in range(10):
            writer.insert(1, 30_000)
            live.step()
        status = live.worker.status()
        assert "capturing pauses" in status.reason and status.waiting_bytes < 200_000
        writer.run("PRAGMA wal_checkpoint(restart)")
        writer.insert(1)
        writer.run("PRAGMA wal_checkpoint(truncate)")
        assert Path(f"{path}-wal").stat().st_size == 0, "the lock was let go"
        down.clear()
        live.settle()
        assert live.figures.rebases == 2
    assert len(restored_rows(store, tmp_path)) == 31


def test_damaged_local_state_leads_to_a_new_timeline(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    with rig(path, store) as live:
        live.settle()
    base = tmp_path / "data" / "state" / "base"
    base.write_bytes(base.read_bytes()[:-1] + b"\xff")
    writer.insert(1)
    with rig(path, store) as live:
        assert live.settle().timeline == 2
    assert len(restored_rows(store, tmp_path)) == 21


def test_damaged_local_state_keeps_what_never_reached_the_store(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        live.settle()
        store.fail_next("put", StoreUnavailable("down"), times=1000)
        writer.insert(1)
        live.step()
    (waiting,) = (state / "spool").iterdir()
    tail = waiting.read_bytes()
    (state / "base").write_bytes(b"damaged")
    with rig(path, MemoryStore(), state=state) as live:
        assert live.settle().timeline == 1
    (aside,) = state.glob(".aside-*")
    assert [(file.name, file.read_bytes()) for file in aside.iterdir()] == [(waiting.name, tail)]


@pytest.fixture
def tail(path: Path, store: MemoryStore, writer: App, tmp_path: Path) -> Path:
    """A local state in which one segment waits."""
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        live.settle()
        store.fail_next("put", StoreUnavailable("down"), times=1000)
        writer.insert(1)
        live.step()
    return state


def test_segments_without_a_base_of_a_database_that_is_gone_are_set_aside(
    path: Path, store: MemoryStore, writer: App, tail: Path
) -> None:
    """A crash in the middle of discarding leaves them; there is no timeline that they could be shipped to."""
    writer.kill()
    (tail / "base").unlink()
    path.unlink()
    with rig(path, store, state=tail) as live:
        live.step()
        assert live.worker.is_finished
    assert len(list(tail.glob(".aside-*/*.seg"))) == 1


def test_what_is_set_aside_again_within_a_second_replaces_nothing(tail: Path) -> None:
    (waiting,) = (tail / "spool").iterdir()
    copy, asides = waiting.read_bytes(), set()
    for _ in range(3):
        waiting.write_bytes(copy)
        spool = Spool(tail)
        asides.add(spool.set_aside())
        spool.close()
    assert len(asides) == len(list(tail.glob(".aside-*/*.seg"))) == 3


def test_a_kick_for_a_timeline_that_has_been_left_starts_nothing(tail: Path) -> None:
    """An upload that has just ended may still have read the one before."""
    spool, store, crew = Spool(tail), MemoryStore(), Crew(1, "kick-upload")
    shipper = Shipper(spool, store, crew, lambda: None, lambda ref, header: None, now_ms=lambda: 0)
    left = spool.load()
    assert left is not None
    shipper.begin_timeline(dataclasses.replace(left.timeline, number=2))
    shipper.kick(left.timeline, left.txid)
    assert shipper.idle
    assert crew.stop(5)
    spool.close()
    assert store.calls == []


def test_a_tail_that_is_set_aside_half_way_leaves_a_queue_without_a_hole(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        live.settle()
        store.fail_next("put", StoreUnavailable("down"), times=1000)
        for _ in range(3):
            writer.insert(1)
            live.step()
    spool = Spool(state)
    first, second, third = spool.waiting()
    spool.path(second).unlink()
    with pytest.raises(FileNotFoundError):
        spool.set_aside()
    assert spool.waiting() == [first, second]
    assert [file.name for file in (state / "spool").iterdir()] == [first.file_name]
    assert [file.name for file in state.glob(".aside-*/*")] == [third.file_name]
    spool.close()


def test_a_state_of_an_older_backup_never_writes_one_txid_twice(
    path: Path, store: MemoryStore, writer: App, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with rig(path, store, state=state) as live:
        live.settle()
    backup = {file: file.read_bytes() for file in state.rglob("*") if file.is_file()}
    with rig(path, store, state=state) as live:
        writer.insert(3)
        live.settle()
    for file in (file for file in state.rglob("*") if file.is_file()):
        file.unlink()
    for file, content in backup.items():
        file.write_bytes(content)
    writer.insert(1)
    with rig(path, store, state=state) as live:
        assert live.settle().timeline == 2
    assert len(restored_rows(store, tmp_path)) == 24
    assert len(rows(restored(store, tmp_path, RestoreOptions(position=Position(1, 2))))) == 23


# -- clocks, figures ---------------------------------------------------------------------------------------------------


def test_times_never_decrease_when_the_clock_jumps(path: Path, store: MemoryStore, writer: App, tmp_path: Path) -> None:
    now = [1_900_000_000_000]
    with rig(path, store, now_ms=lambda: now[0]) as live:
        for jump in (0, -3_600_000, 7_200_000, -86_400_000):
            now[0] += jump
            writer.insert(1)
            live.settle()
            assert live.worker.status().protection is Protection.PROTECTED
    times = [ms for _, _, ms in headers(store)]
    assert times == sorted(times) and len(times) == 4


def test_the_lag_is_the_age_of_what_waits_not_of_what_was_before(path: Path, store: MemoryStore, writer: App) -> None:
    now = [1_900_000_000_000]
    with rig(path, store, now_ms=lambda: now[0]) as live:
        live.settle()
        now[0] += 3_600_000
        store.fail_next("put", StoreUnavailable("down"), times=1)
        writer.insert(1)
        live.step()
        assert live.worker.status().lag_s < 5
        live.settle()


def test_what_waited_at_the_start_is_as_old_as_its_first_commit(path: Path, store: MemoryStore, writer: App) -> None:
    now = [1_700_000_000_000]
    with rig(path, store, now_ms=lambda: now[0]) as live:
        live.settle()
        store.fail_next("put", StoreUnavailable("down"), times=10**6)
        for _ in range(2):
            now[0] += 1000
            writer.insert(1)
            live.step()
    first_ms = now[0] - 1000
    now[0] = first_ms + 3_600_000
    with rig(path, store, now_ms=lambda: now[0]) as live:
        live.step()
        status = live.worker.status()
        assert status.waiting_segments == 2
        assert 3600 <= status.lag_s < 3605
        assert status.durable_ms == first_ms


def test_a_local_state_that_cannot_be_written_has_words(path: Path, store: MemoryStore, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder belongs")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DatabaseError, match="cannot hold the local state"):
        Rig(path, store, state=blocked / "state", settings=AT_ONCE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_restored_file_is_not_the_sources_wal(
    path: Path, store: MemoryStore, writer: App, live: Rig, tmp_path: Path
) -> None:
    """No table of ours and no changed setting is in what comes back."""
    target = restored(store, tmp_path)
    connection = apsw.Connection(str(target))
    assert [row[0] for row in connection.execute("SELECT name FROM sqlite_schema")] == ["ledger"]
    connection.close()
