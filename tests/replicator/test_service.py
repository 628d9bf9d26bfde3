"""Claims about the replicator as a whole, with its threads and file events."""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import apsw
import msgspec
import pytest
from ledger_support import app, restored, restored_rows, rows, wait_for

from replicator import catalogue
from replicator.capture import CaptureSettings
from replicator.errors import (
    DatabaseMissing,
    DatabaseNotReplicable,
    ReplicatorError,
    StoreDenied,
    StoreUnavailable,
    SyncTimeout,
)
from replicator.replica import Replica
from replicator.restore import RestoreOptions, restore
from replicator.scheduler import Crew, Scheduler
from replicator.service import Replicator
from replicator.store.memory import MemoryStore
from replicator.upkeep import UpkeepSettings
from replicator.watch import Folder
from replicator.worker import DatabaseStatus, Protection, WorkerSettings

FAST = WorkerSettings(interval_s=0.02, capture=CaptureSettings(checkpoint_pages=50))


class Bucket:
    """A store in memory that can be slow, down, or hang."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.down = False
        self.hang = threading.Event()
        self.hang.set()
        self.puts_under_way = 0
        self.most_puts_under_way = 0
        self._guard = threading.Lock()
        self.store = MemoryStore(before=self._before, after=self._after)

    def _before(self, operation: str, key: str) -> None:
        if operation == "put":
            with self._guard:
                self.puts_under_way += 1
                self.most_puts_under_way = max(self.most_puts_under_way, self.puts_under_way)
        try:
            self.hang.wait()
            if self.delay_s:
                threading.Event().wait(self.delay_s)
            if self.down:
                raise StoreUnavailable("the store is down")
        except StoreUnavailable:
            self._after(operation, key)
            raise

    def _after(self, operation: str, key: str) -> None:
        if operation == "put":
            with self._guard:
                self.puts_under_way -= 1


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    yield made
    made.hang.set()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def replicator() -> Iterator[Replicator]:
    running = Replicator(sweep_s=3600)
    running.start()
    yield running
    running.stop(5)


def status_of(replicator: Replicator, path: Path) -> DatabaseStatus:
    return next(status for status in replicator.status() if status.path == path)


def is_durable(replicator: Replicator, path: Path) -> bool:
    found = [status for status in replicator.status() if status.path == path]
    return bool(found) and found[0].protection is Protection.PROTECTED and found[0].captured == found[0].durable


def make(path: Path, count: int = 3) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode=wal").fetchall()
    connection.execute("CREATE TABLE ledger (id INTEGER PRIMARY KEY, body)")
    for _ in range(count):
        connection.execute("INSERT INTO ledger(body) VALUES ('x')")
    connection.close()


# -- under load --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("autocheckpoint", ["0", "1", "1000"])
@pytest.mark.parametrize("mode", ["", "passive", "full", "restart", "truncate"])
def test_under_load_and_checkpoints_nothing_is_lost_and_the_application_sees_no_error(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path, autocheckpoint: str, mode: str
) -> None:
    path = data / "app.db"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, bucket.store, settings=FAST)
        every = f"PRAGMA wal_checkpoint({mode})" if mode else ""
        pragmas = [f"wal_autocheckpoint={autocheckpoint}", "synchronous=normal"]
        writer.begin_storm(pause_ms=0.5, size=1000, pragmas=pragmas, every=every, every_n=5)
        wait_for(lambda: writer.committed() > 300)
        storm = writer.end_storm()
        assert storm["errors"] == []
        assert storm["worst_ms"] < 2500
        replicator.sync(path, 20)
        assert Path(f"{path}-wal").stat().st_size < 2_000_000
        expected = list(range(1, storm["committed"] + 2))
        assert restored_rows(bucket.store, tmp_path) == expected
        replicator.remove(path)
        writer.empty_wal()
        assert restored(bucket.store, tmp_path).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_while_the_store_is_down_the_application_notices_nothing_and_all_arrives_afterwards(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path = data / "app.db"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, bucket.store, settings=FAST)
        replicator.sync(path, 10)
        bucket.down, bucket.delay_s = True, 0.02
        writer.begin_storm(pause_ms=1)
        wait_for(lambda: status_of(replicator, path).waiting_segments > 20)
        assert status_of(replicator, path).protection is Protection.NOT_PROTECTED
        assert "the store is down" in status_of(replicator, path).reason
        with pytest.raises(SyncTimeout, match="the store is down"):
            replicator.sync(path, 0.2)
        bucket.down = False
        replicator.sync(path, 20)
        storm = writer.end_storm()
        replicator.sync(path, 20)
    assert storm["errors"] == [] and storm["worst_ms"] < 1000
    assert bucket.most_puts_under_way > 1
    assert restored_rows(bucket.store, tmp_path) == list(range(1, storm["committed"] + 2))
    assert len(Replica(bucket.store).timelines()) == 1


@pytest.mark.slow
def test_a_full_disk_under_the_spool_is_said_and_survived(bucket: Bucket, data: Path, tmp_path: Path) -> None:
    path, small = data / "app.db", tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], check=True)
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    try:
        with app(path, "journal_mode=wal") as writer:
            writer.insert(1)
            replicator.add(path, bucket.store, state=small / "state", settings=FAST)
            replicator.sync(path, 10)
            (small / "hog").write_bytes(b"x" * 1_400_000)
            writer.begin_storm(pause_ms=1, size=4000)
            wait_for(lambda: "No space left" in status_of(replicator, path).reason)
            assert str(small) in status_of(replicator, path).reason
            rows_then = writer.committed()
            wait_for(lambda: writer.committed() > rows_then + 200)
            (small / "hog").unlink()
            storm = writer.end_storm()
            wait_for(lambda: status_of(replicator, path).protection is Protection.PROTECTED)
            replicator.sync(path, 30)
            assert storm["errors"] == []
        assert restored_rows(bucket.store, tmp_path) == list(range(1, storm["committed"] + 2))
        assert len(Replica(bucket.store).timelines()) == 1
    finally:
        replicator.stop(5)
        subprocess.run(["umount", str(small)], check=True)


# -- idle, and quick ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_while_nothing_changes_no_request_is_made_and_no_thread_runs(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    with app(data / "app.db", "journal_mode=wal") as writer:
        writer.insert(3)
        for n in range(20):
            make(data / f"{n}.db")
        replicator.add_folder(Folder(data), bucket.store)
        replicator.sync_folder(data, 20)
        wait_for(lambda: all(is_durable(replicator, status.path) for status in replicator.status()))
        wait_for(lambda: not list(data.glob("[0-9]*.db-shm")))
        time.sleep(0.7)  # events of our own opening and of the spools; this is a measurement, not a wait
        requests, cpu = len(bucket.store.calls), time.process_time()
        time.sleep(2)
        assert len(bucket.store.calls) == requests
        assert time.process_time() - cpu < 0.05
        assert not list(data.glob("[0-9]*.db-shm")), "nothing opens what nobody uses"


def test_a_commit_on_an_idle_database_is_in_the_store_within_200_ms(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    path, arrivals = data / "app.db", []
    settings = WorkerSettings(interval_s=0.01)
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, bucket.store, settings=settings)
        replicator.sync(path, 10)
        bucket.delay_s = 0.005
        wait_for(lambda: is_durable(replicator, path))
        for _ in range(30):
            before = status_of(replicator, path).durable
            began = time.monotonic()
            writer.insert(1)
            wait_for(lambda before=before: status_of(replicator, path).durable != before)
            arrivals.append(time.monotonic() - began)
            threading.Event().wait(0.03)
    logging.getLogger(__name__).info("commit to store: median %.1f ms", statistics.median(arrivals) * 1000)
    assert statistics.median(arrivals) < 0.2


# -- upkeep ------------------------------------------------------------------------------------------------------------

HASTY = WorkerSettings(
    interval_s=0.0,
    upkeep=UpkeepSettings(levels_s=(0.1, 0.3), snapshot_s=0.1, retention_s=0.5, fine_s=0.1, grace_s=0.1),
)


def test_a_replica_is_merged_and_thinned_while_it_is_written(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path = data / "app.db"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, bucket.store, settings=HASTY)
        for _ in range(20):
            writer.insert(1)
            replicator.sync(path, 10)
        wait_for(lambda: 0 < len(Replica(bucket.store).segments()) <= 6, what="a small replica")
        assert not status_of(replicator, path).upkeep_problem
        assert restored_rows(bucket.store, tmp_path) == list(range(1, 22))


def test_a_restart_goes_on_with_a_replica_that_was_merged_and_thinned(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path = data / "app.db"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        before = Replicator(sweep_s=3600)
        before.start()
        before.add(path, bucket.store, settings=HASTY)
        for _ in range(20):
            writer.insert(1)
            before.sync(path, 10)
        wait_for(lambda: 0 < len(Replica(bucket.store).segments()) <= 6, what="a small replica")
        assert before.stop(5) == []
        writer.insert(1)
        replicator.add(path, bucket.store, settings=HASTY)
        assert replicator.sync(path, 10).timeline == 1
        assert restored_rows(bucket.store, tmp_path) == list(range(1, 23))


def test_an_upkeep_that_fails_is_named_and_holds_up_no_commit(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    def refuse(operation: str, key: str) -> None:
        if operation == "put" and "/1/" in key:
            raise StoreDenied("level 1 may not be written")

    path, store = data / "app.db", bucket.store
    store.before = refuse
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, store, settings=HASTY)

        def is_named() -> bool:
            writer.insert(1)
            replicator.sync(path, 10)
            return status_of(replicator, path).upkeep_problem == "level 1 may not be written"

        wait_for(is_named)
        assert status_of(replicator, path).protection is Protection.PROTECTED
        writer.insert(1)
        replicator.sync(path, 10)
        assert restored_rows(store, tmp_path) == list(range(1, writer.run("SELECT count(*) FROM ledger")[0] + 1))


@pytest.mark.slow
def test_a_stop_waits_for_no_upkeep(bucket: Bucket, data: Path) -> None:
    hangs, released = threading.Event(), threading.Event()

    def hang(operation: str, key: str) -> None:
        if operation == "put" and "/1/" in key:
            hangs.set()
            released.wait(20)

    bucket.store.before = hang
    running = Replicator(sweep_s=3600)
    running.start()
    path = data / "app.db"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        running.add(path, bucket.store, settings=HASTY)
        while not hangs.is_set():
            writer.insert(1)
            running.sync(path, 10)
        began = time.monotonic()
        writer.insert(1)
        assert running.stop(3) == []
        assert time.monotonic() - began < 8
    released.set()


def test_of_a_database_that_is_gone_for_good_the_upkeep_ends_too(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    path, hangs, released = data / "app.db", threading.Event(), threading.Event()
    calls_after: list[tuple[str, str]] = []

    def hang(operation: str, key: str) -> None:
        if released.is_set():
            calls_after.append((operation, key))
        elif operation == "put" and "/1/" in key:
            hangs.set()
            released.wait(20)

    bucket.store.before = hang
    replicator.add_folder(Folder(data), bucket.store, settings=HASTY)
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        wait_for(lambda: is_durable(replicator, path))
        while not hangs.is_set():
            writer.insert(1)
            replicator.sync(path, 10)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
    wait_for(lambda: not (data / ".app.db-replicator").exists(), what="the end of its local state")
    released.set()
    replicator.stop(5)
    assert calls_after == []


# -- sync --------------------------------------------------------------------------------------------------------------


def test_sync_covers_everything_that_was_committed_before_it(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    """In spite of the pace, of a capture that runs at the moment, and of others that call it too."""
    path = data / "app.db"
    slow_pace = WorkerSettings(interval_s=30.0, burst=1)
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, bucket.store, settings=slow_pace)
        bucket.delay_s = 0.005
        seen: list[tuple[int, int]] = []

        def sync_often() -> None:
            for _ in range(8):
                count = writer.committed()
                position = replicator.sync(path, 10)
                seen.append((count, position.txid))

        writer.begin_storm(pause_ms=1)
        threads = [threading.Thread(target=sync_often) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.end_storm()
    assert len(seen) == 24

    for count, txid in seen[:: len(seen) // 4]:
        assert len(rows(restored(bucket.store, tmp_path, RestoreOptions(txid=txid)))) >= count


@pytest.mark.slow
def test_sync_waits_through_a_failure_instead_of_passing_over_it(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path = data / "app.db"
    state = tmp_path / "state"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(path, bucket.store, state=state, settings=WorkerSettings(interval_s=60, burst=1))
        replicator.sync(path, 10)
        (state / "spool").rename(state / "away")
        writer.insert(1)
        with pytest.raises(SyncTimeout, match="No such file"):
            replicator.sync(path, 0.3)
        later = threading.Timer(0.3, lambda: (state / "away").rename(state / "spool"))
        later.start()
        replicator.sync(path, 10)
        later.join()
    assert restored_rows(bucket.store, tmp_path) == [1, 2]


def test_sync_of_a_missing_database_says_so_at_once(replicator: Replicator, bucket: Bucket, data: Path) -> None:
    replicator.add(data / "app.db", bucket.store)
    began = time.monotonic()
    with pytest.raises(DatabaseMissing, match="no such file"):
        replicator.sync(data / "app.db", 10)
    assert time.monotonic() - began < 2


# -- finding databases -------------------------------------------------------------------------------------------------


def test_databases_that_appear_are_found_and_those_that_go_are_dropped(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    replicator.add_folder(Folder(data), bucket.store)
    made = [data / "plain.db", data / "sub" / "deep" / "a b.sqlite", data / "ünï\ncode.db", data / "moved.db"]
    make(made[0])
    made[1].parent.mkdir(parents=True)
    make(made[1])
    make(made[2])
    make(tmp_path / "outside.db")
    (tmp_path / "outside.db").rename(made[3])
    (data / "notes.txt").write_text("no database")
    (data / "link.db").symlink_to(made[0])
    late = data / "late.db"
    late.touch()
    threading.Event().wait(0.2)
    make(late)
    made.append(late)
    wait_for(lambda: all(is_durable(replicator, path) for path in made))
    assert sorted(status.path for status in replicator.status()) == sorted(made)
    assert sorted(map(str, catalogue.entries(bucket.store))) == sorted(str(path.relative_to(data)) for path in made)
    for path in made:
        replica = catalogue.replica_of(bucket.store, path.relative_to(data))
        assert restored_rows(replica, tmp_path) == [1, 2, 3]
    made[0].unlink()
    shutil.rmtree(data / "sub")
    wait_for(lambda: sorted(status.path for status in replicator.status()) == sorted(made[2:]))


def test_a_folder_that_is_moved_in_or_away_counts(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    replicator.add_folder(Folder(data), bucket.store)
    (tmp_path / "elsewhere").mkdir()
    make(tmp_path / "elsewhere" / "app.db")
    (tmp_path / "elsewhere").rename(data / "here")
    wait_for(lambda: is_durable(replicator, data / "here" / "app.db"))
    (data / "here").rename(tmp_path / "away")
    wait_for(lambda: not replicator.status())


def test_a_link_in_place_of_a_folder_leads_to_nothing_of_the_folder(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    """Whoever may write to the folder could have any database of the host copied as its own."""
    volume, host = data / "volume", data / "host"
    for folder, count in ((volume / "sub", 3), (host, 5)):
        folder.mkdir(parents=True)
        make(folder / "x.db", count)
    replicator.add_folder(Folder(volume), bucket.store, state=tmp_path / "state")
    replicator.sync_folder(volume, 10)
    (volume / "sub").rename(volume / "old")
    (volume / "sub").symlink_to(host)
    wait_for(lambda: [status.path for status in replicator.status()] == [volume / "old" / "x.db"])
    replicator.sync_folder(volume, 10)
    replica = catalogue.replica_of(bucket.store, Path("sub/x.db"))
    assert restored_rows(replica, tmp_path) == [1, 2, 3]
    assert list(host.iterdir()) == [host / "x.db"]


def test_owner_and_mode_in_the_catalogue_follow_the_file_and_cost_no_request_while_they_stay(
    bucket: Bucket, data: Path
) -> None:
    def entry(name: str) -> tuple[int, int, int]:
        found = msgspec.json.decode(bucket.store.get(f"databases/{name}"))
        return found["mode"], found["uid"], found["gid"]

    def requests_for(name: str) -> list[str]:
        return [operation for operation, key in bucket.store.calls if key == f"databases/{name}"]

    for name in ("app.db", "other.db"):
        make(data / name)
        (data / name).chmod(0o600)
    replicator = Replicator(sweep_s=0.05)
    replicator.start()
    try:
        replicator.add_folder(Folder(data), bucket.store)
        wait_for(lambda: is_durable(replicator, data / "app.db") and is_durable(replicator, data / "other.db"))
        wait_for(lambda: requests_for("other.db") == ["put", "get"])
        assert entry("app.db")[0] == 0o600
        (data / "app.db").chmod(0o640)
        os.chown(data / "app.db", 1234, 2345)
        wait_for(lambda: entry("app.db") == (0o640, 1234, 2345))
        (data / "app.db").chmod(0o644)
        wait_for(lambda: entry("app.db") == (0o644, 1234, 2345))
        assert requests_for("other.db") == ["put", "get"]
    finally:
        replicator.stop(5)


@pytest.mark.slow
def test_two_hundred_databases_at_once_are_in_the_store_within_seconds(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    make(data / "template.db")
    replicator.add_folder(Folder(data, pattern="*.sqlite"), bucket.store)
    bucket.delay_s = 0.005
    for n in range(200):
        shutil.copy(data / "template.db", data / f"{n}.sqlite")
    began = time.monotonic()
    wait_for(lambda: len(replicator.status()) == 200)
    replicator.sync_folder(data, 30)
    assert time.monotonic() - began < 20
    assert restored_rows(catalogue.replica_of(bucket.store, Path("77.sqlite")), tmp_path) == [1, 2, 3]


def test_a_database_that_goes_is_kept_in_mind_until_its_last_commits_are_in_the_store(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path = data / "app.db"
    replicator.add_folder(Folder(data), bucket.store, settings=FAST)
    with app(path, "journal_mode=wal") as writer:
        writer.insert(3)
        wait_for(lambda: is_durable(replicator, path))
        bucket.down = True
        writer.insert(4)
        wait_for(lambda: status_of(replicator, path).waiting_segments)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
    wait_for(lambda: status_of(replicator, path).protection is Protection.NOT_PROTECTED)
    bucket.down = False
    wait_for(lambda: not replicator.status())
    assert restored_rows(catalogue.replica_of(bucket.store, Path("app.db")), tmp_path) == list(range(1, 8))
    wait_for(lambda: not (data / ".app.db-replicator").exists())


def delete_while_the_store_is_down(path: Path, bucket: Bucket, state: Path | None) -> None:
    """Its last commits are captured, and not shipped by the process that ends here."""
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    replicator.add_folder(Folder(path.parent), bucket.store, state=state, settings=FAST)
    with app(path, "journal_mode=wal") as writer:
        writer.insert(3)
        wait_for(lambda: is_durable(replicator, path))
        bucket.down = True
        writer.insert(4)
        wait_for(lambda: status_of(replicator, path).waiting_segments)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
    wait_for(lambda: "no such file" in status_of(replicator, path).reason)
    replicator.stop(0.1)
    bucket.down = False


@pytest.mark.parametrize("beside", [True, False])
def test_the_last_commits_of_a_database_that_went_before_the_start_reach_the_store(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path, beside: bool
) -> None:
    """Then nothing of it is left here."""
    state = None if beside else tmp_path / "state"
    local = data / ".app.db-replicator" if beside else tmp_path / "state" / "app.db"
    delete_while_the_store_is_down(data / "app.db", bucket, state)
    assert list((local / "spool").iterdir())
    replicator.add_folder(Folder(data), bucket.store, state=state, settings=FAST)
    assert [status.path for status in replicator.status()] == [data / "app.db"]
    wait_for(lambda: not replicator.status())
    assert restored_rows(catalogue.replica_of(bucket.store, Path("app.db")), tmp_path) == list(range(1, 8))
    wait_for(lambda: not local.exists())


def test_last_commits_that_nobody_else_has_are_kept_when_their_replica_was_deleted(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path, spool = data / "app.db", tmp_path / "state" / "app.db" / "spool"
    delete_while_the_store_is_down(path, bucket, tmp_path / "state")
    tail = sorted(file.name for file in spool.iterdir())
    bucket.store.delete([info.key for info in bucket.store.list()])
    replicator.add_folder(Folder(data), bucket.store, state=tmp_path / "state", settings=FAST)
    wait_for(lambda: not replicator.status())
    wait_for(lambda: not (spool.parent / "lock").exists())
    (aside,) = spool.parent.iterdir()
    assert aside.name.startswith(".aside-")
    assert sorted(file.name for file in aside.iterdir()) == tail


def test_a_database_that_is_found_while_the_store_is_down_is_shown_as_not_protected(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    bucket.down = True
    replicator.add_folder(Folder(data), bucket.store)
    make(data / "app.db")
    wait_for(lambda: replicator.status())
    wait_for(lambda: status_of(replicator, data / "app.db").protection is Protection.NOT_PROTECTED)
    assert "the store is down" in status_of(replicator, data / "app.db").reason
    bucket.down = False
    wait_for(lambda: is_durable(replicator, data / "app.db"))


def test_a_folder_of_a_database_that_is_named_too_is_still_looked_through(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    make(data / "named.db")
    replicator.add(data / "named.db", bucket.store.sub("named"))
    replicator.add_folder(Folder(data), bucket.store)
    make(data / "found.db")
    wait_for(lambda: is_durable(replicator, data / "found.db"))
    replicator.remove_folder(data)
    assert [status.path for status in replicator.status()] == [data / "named.db"]
    with app(data / "named.db") as writer:
        before = wait_for(lambda: status_of(replicator, data / "named.db").durable)
        writer.insert(1)
        wait_for(lambda: status_of(replicator, data / "named.db").durable != before)


@dataclass(frozen=True)
class Dropped(Folder):
    """A folder that is dropped while it is looked through."""

    drop: Callable[[], object] = lambda: None

    def takes_name(self, name: str) -> bool:
        self.drop()
        return super().takes_name(name)


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_folder_that_is_dropped_while_it_is_looked_through_gets_no_database_afterwards(
    replicator: Replicator, bucket: Bucket, data: Path, is_taken: bool
) -> None:
    """Nor one that could not be taken up."""
    make(data / "app.db")
    other = Replicator()
    if is_taken:
        other.add(data / "app.db", bucket.store.sub("other"))
    replicator.add_folder(Dropped(data, drop=lambda: replicator.remove_folder(data)), bucket.store)
    assert replicator.status() == []
    other.stop(1)


def test_a_folder_that_is_made_anew_is_watched_again(bucket: Bucket, data: Path, tmp_path: Path) -> None:
    replicator = Replicator(sweep_s=0.2)
    replicator.start()
    try:
        replicator.add_folder(Folder(data), bucket.store, state=tmp_path / "state")
        make(data / "one.db")
        wait_for(lambda: is_durable(replicator, data / "one.db"))
        data.rename(tmp_path / "away")
        wait_for(lambda: not replicator.status())
        data.mkdir()
        make(data / "two.db")
        wait_for(lambda: is_durable(replicator, data / "two.db"))
    finally:
        replicator.stop(5)


# -- refusing, letting go, stopping ------------------------------------------------------------------------------------


def test_two_replicators_on_one_database_are_refused_with_words(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    path = data / "app.db"
    make(path)
    replicator.add(path, bucket.store)
    replicator.sync(path, 10)
    second = Replicator()
    with pytest.raises(DatabaseNotReplicable, match="in use by another replicator"):
        second.add(path, bucket.store)
    second.add_folder(Folder(data), bucket.store)
    (refused,) = second.status()
    assert refused.protection is Protection.NOT_PROTECTED and "in use by another replicator" in refused.reason
    second.stop(1)
    replicator.remove(path)
    replicator.add(path, bucket.store)
    replicator.sync(path, 10)
    assert len(Replica(bucket.store).timelines()) == 1


def test_an_application_in_this_process_keeps_its_locks_when_its_database_is_let_go(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path = data / "state.db"
    application = apsw.Connection(str(path))
    application.execute("PRAGMA journal_mode=wal; CREATE TABLE ledger(id INTEGER PRIMARY KEY)").fetchall()
    replicator.add(path, bucket.store)
    application.execute("INSERT INTO ledger VALUES (1)")
    replicator.sync(path, 10)
    replicator.remove(path)
    with app(path) as intruder:
        assert "Busy" in intruder.try_run("PRAGMA busy_timeout=10", "PRAGMA journal_mode=delete")
    application.execute("INSERT INTO ledger VALUES (2)")
    replicator.add(path, bucket.store)
    replicator.sync(path, 10)
    application.close()
    assert restored_rows(bucket.store, tmp_path) == [1, 2]


def test_a_database_that_is_open_in_this_process_is_not_checkpointed_after_every_commit(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    """As one is that nobody has open, so that its WAL is empty when another file is put in its place."""
    path = data / "state.db"
    application = apsw.Connection(str(path))
    application.execute("PRAGMA journal_mode=wal; CREATE TABLE ledger(id INTEGER PRIMARY KEY)").fetchall()
    replicator.add(path, bucket.store, settings=FAST)
    sizes = []
    for n in range(10):
        application.execute("INSERT INTO ledger VALUES (?)", (n,))
        replicator.sync(path, 10)
        for _ in range(3):
            replicator.sync(path, 10)  # steps that find nothing
        sizes.append(Path(f"{path}-wal").stat().st_size)
    assert sizes == sorted(sizes) and sizes[0] > 0, "it was never emptied"
    application.close()
    replicator.sync(path, 10)  # no event tells of an application that was not there for the kernel
    wait_for(lambda: not Path(f"{path}-wal").exists())


def test_a_bigger_file_in_place_of_a_closed_database_is_whole_for_its_application_and_in_the_store(
    replicator: Replicator, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    path, other = data / "app.db", data / "new.db"
    with app(path, "journal_mode=wal") as writer:
        writer.insert(20)
        replicator.add(path, bucket.store, settings=FAST)
        replicator.sync(path, 10)
        writer.insert(20)
        writer.close()
    make(other, 1000)
    wait_for(lambda: not Path(f"{path}-wal").exists() and not Path(f"{path}-shm").exists(), 1.0)
    other.rename(path)
    with app(path) as writer:
        writer.insert(1)
        assert writer.run("PRAGMA integrity_check") == ["ok"]
        assert writer.run("SELECT count(*) FROM ledger") == [1001]
        replicator.sync(path, 10)
    assert len(restored_rows(bucket.store, tmp_path)) == 1001


def test_the_first_commit_on_a_database_that_rests_is_in_the_store_within_200_ms(
    replicator: Replicator, bucket: Bucket, data: Path
) -> None:
    path, arrivals = data / "app.db", []
    make(path)
    replicator.add(path, bucket.store, settings=WorkerSettings(interval_s=0.01))
    replicator.sync(path, 10)
    for _ in range(5):
        wait_for(lambda: is_durable(replicator, path) and not Path(f"{path}-shm").exists())
        before = status_of(replicator, path).durable
        with app(path) as writer:
            writer.run("SELECT 1 FROM ledger")
            began = time.monotonic()
            writer.insert(1)
            wait_for(lambda before=before: status_of(replicator, path).durable != before)
            arrivals.append(time.monotonic() - began)
            writer.close()
    assert statistics.median(arrivals) < 0.2


def test_a_stop_leaves_no_descriptor_and_no_thread(bucket: Bucket, data: Path) -> None:
    def descriptors() -> list[str]:
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the one of the listing itself
                found.append(str(entry.readlink()))
        return sorted(target for target in found if not target.startswith("/proc"))

    before, threads = descriptors(), set(threading.enumerate())
    for _ in range(2):
        replicator = Replicator()
        replicator.start()
        replicator.add_folder(Folder(data), bucket.store)
        for n in range(5):
            if not (data / f"{n}.db").exists():
                make(data / f"{n}.db")
        wait_for(lambda replicator=replicator: len(replicator.status()) == 5)
        assert replicator.stop(10) == []
    wait_for(lambda: set(threading.enumerate()) <= threads)
    assert descriptors() == before


def test_a_stop_ships_what_was_committed_last(bucket: Bucket, data: Path, tmp_path: Path) -> None:
    replicator = Replicator()
    replicator.start()
    with app(data / "app.db", "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(data / "app.db", bucket.store, settings=WorkerSettings(interval_s=60, burst=1))
        replicator.sync(data / "app.db", 10)
        writer.insert(5)
        assert replicator.stop(10) == []
    assert len(restored_rows(bucket.store, tmp_path)) == 6


@pytest.mark.slow
def test_a_stop_with_a_store_that_hangs_ends_in_time_and_says_what_is_missing(
    bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    replicator = Replicator()
    replicator.start()
    with app(data / "app.db", "journal_mode=wal") as writer:
        writer.insert(1)
        replicator.add(data / "app.db", bucket.store)
        replicator.sync(data / "app.db", 10)
        bucket.hang.clear()
        replicator.add(data / "other.db", bucket.store.sub("other"))
        make(data / "other.db")
        writer.insert(1)
        began = time.monotonic()
        late = {found.path.name for found in replicator.stop(1)}
        assert time.monotonic() - began < 5
        assert late == {"app.db", "other.db"}
        bucket.hang.set()
        again = Replicator()
        again.start()
        wait_for(lambda: _can_add(again, data / "app.db", bucket))
        again.sync(data / "app.db", 10)
        again.stop(5)
    assert restored_rows(bucket.store, tmp_path) == [1, 2]


def _can_add(replicator: Replicator, path: Path, bucket: Bucket) -> bool:
    try:
        replicator.add(path, bucket.store)
    except DatabaseNotReplicable:
        return False
    return True


# -- the threads -------------------------------------------------------------------------------------------------------


class Counting:
    def __init__(self, step: Callable[[int], float | None]) -> None:
        self.calls = 0
        self._step = step

    def step(self) -> float | None:
        self.calls += 1
        return self._step(self.calls)


def test_a_wake_during_a_step_leads_to_another_step() -> None:
    scheduler: Scheduler[Counting] = Scheduler(2, "test")
    running, go_on = threading.Event(), threading.Event()

    def step(_: int) -> None:
        running.set()
        go_on.wait(10)

    worker = Counting(step)
    scheduler.wake(worker)
    assert running.wait(10)
    scheduler.wake(worker)
    scheduler.wake(worker)
    go_on.set()
    wait_for(lambda: worker.calls == 2)
    assert scheduler.stop(5)
    assert worker.calls == 2


def test_a_step_that_raises_is_called_again_later_and_not_at_once() -> None:
    scheduler: Scheduler[Counting] = Scheduler(1, "test")

    def step(calls: int) -> float | None:
        raise RuntimeError("unforeseen")

    worker = Counting(step)
    scheduler.wake(worker)
    wait_for(lambda: worker.calls == 1)
    threading.Event().wait(0.1)
    assert worker.calls == 1
    assert scheduler.forget(worker, 5) and scheduler.stop(5)


def test_a_forgotten_worker_is_never_called_again() -> None:
    scheduler: Scheduler[Counting] = Scheduler(1, "test")
    worker = Counting(lambda _: 0.001)
    scheduler.wake(worker)
    wait_for(lambda: worker.calls > 3)
    assert scheduler.forget(worker, 5)
    calls = worker.calls
    scheduler.wake(worker)
    other = Counting(lambda _: None)
    scheduler.wake(other)
    wait_for(lambda: other.calls == 1)
    assert worker.calls == calls
    assert scheduler.stop(5)


def test_a_crew_runs_all_work_and_stops_in_time_though_one_piece_hangs() -> None:
    crew, done, hang = Crew(3, "test"), [], threading.Event()
    for n in range(50):
        crew.submit(done.append, n)
    wait_for(lambda: len(done) == 50)
    crew.submit(lambda: 1 / 0)
    begun = threading.Event()
    crew.submit(lambda: (begun.set(), hang.wait()))
    assert begun.wait(5)
    began = time.monotonic()
    assert not crew.stop(0.2)
    assert time.monotonic() - began < 2
    hang.set()
    assert crew.stop(5)


def test_a_file_that_is_no_database_keeps_no_other_of_its_folder_from_being_shipped(tmp_path: Path) -> None:
    data, store = tmp_path / "data", MemoryStore()
    data.mkdir()
    (data / "aaa-junk.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 16)
    connection = apsw.Connection(str(data / "good.db"))
    connection.set_busy_timeout(5000)
    connection.execute("PRAGMA journal_mode=wal").fetchall()
    connection.execute("CREATE TABLE t (n)")
    replicator = Replicator()
    replicator.start()
    try:
        replicator.add_folder(Folder(data), store, state=tmp_path / "state")
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(ReplicatorError, match="aaa-junk"):
            replicator.sync_folder(data, 10)
        good = next(status for status in replicator.status() if status.path.name == "good.db")
        assert good.words.startswith("protected")
    finally:
        replicator.stop()
        connection.close()


def test_a_database_that_goes_to_another_place_is_waited_for_there(data: Path, tmp_path: Path) -> None:
    path, places = data / "app.db", (MemoryStore("before"), MemoryStore("after"))
    make(path)
    for number, place in enumerate(places):
        connection = apsw.Connection(str(path))
        connection.execute("INSERT INTO ledger(body) VALUES ('more')")
        replicator = Replicator(sweep_s=3600)
        replicator.start()
        replicator.add(path, place)
        assert replicator.sync(path, 20).timeline == 1
        replicator.stop(5)
        connection.close()
        assert len(restored_rows(place, tmp_path)) == 4 + number


def test_a_database_without_a_wal_gets_its_snapshot_when_its_replica_was_emptied(tmp_path: Path) -> None:
    path, store = tmp_path / "app.db", MemoryStore()
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE t (n)")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.close()
    for emptied in (False, True):
        if emptied:
            store.delete([info.key for info in store.list()])
        replicator = Replicator()
        replicator.start()
        try:
            replicator.add(path, store, state=tmp_path / "state")
            wait_for(partial(_has_one_row, store, tmp_path / f"out-{emptied}.db"), 10)
        finally:
            replicator.stop()


def _has_one_row(store: MemoryStore, target: Path) -> bool:
    """False while there is nothing to restore."""
    try:
        restore(store, target)
    except ReplicatorError:
        return False
    connection = apsw.Connection(str(target))
    try:
        return int(connection.execute("SELECT count(*) FROM t").get) == 1
    finally:
        connection.close()


def test_a_spool_that_is_over_its_limit_at_the_start_is_shipped(tmp_path: Path) -> None:
    path, store = tmp_path / "app.db", MemoryStore()
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    connection.execute("PRAGMA journal_mode=wal").fetchall()
    connection.execute("CREATE TABLE t (n)")
    replicator = Replicator()
    replicator.start()
    replicator.add(path, store, state=tmp_path / "state")
    replicator.sync(path, 10)
    store.fail_next("put", StoreUnavailable("away"), times=1000)
    connection.execute("INSERT INTO t VALUES (1)")
    wait_for(lambda: replicator.status()[0].waiting_segments > 0, 10)
    replicator.stop(0.5)
    healthy = MemoryStore()
    for info in store.list():
        healthy.put(info.key, store.get(info.key))
    again = Replicator()
    again.start()
    try:
        again.add(path, healthy, state=tmp_path / "state", settings=WorkerSettings(spool_limit_bytes=1))
        wait_for(lambda: again.status()[0].waiting_segments == 0 and again.status()[0].durable is not None, 10)
    finally:
        again.stop()
        connection.close()


@pytest.mark.slow
def test_a_file_that_was_copied_over_in_place_is_compared_and_never_mixed(tmp_path: Path) -> None:
    path, backup, store = tmp_path / "app.db", tmp_path / "backup.db", MemoryStore()

    def commit(*statements: str) -> None:
        """As an application in a process of its own, which ends."""
        code = "import apsw, sys\nc = apsw.Connection(sys.argv[1])\nc.set_busy_timeout(5000)\n"
        code += "[c.execute(s).fetchall() for s in sys.argv[2:]]"
        subprocess.run([sys.executable, "-c", code, str(path), *statements], check=True)

    numbers = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 2000) "
    numbers += "INSERT INTO t SELECT hex(randomblob(50)) FROM c"
    commit("PRAGMA journal_mode=wal", "CREATE TABLE t (x)", numbers, "PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copyfile(path, backup)
    replicator = Replicator()
    replicator.start()
    try:
        replicator.add(path, store, state=tmp_path / "state")
        commit("UPDATE t SET x = 'new'")
        replicator.sync(path, 10)
        wait_for(lambda: not Path(f"{path}-wal").exists(), 10)
        shutil.copyfile(backup, path)
        commit("INSERT INTO t VALUES ('after')")
        replicator.sync(path, 10)
    finally:
        replicator.stop()
    restore(store, tmp_path / "out.db")
    connection = apsw.Connection(str(tmp_path / "out.db"))
    assert connection.execute("SELECT count(*), sum(x = 'new'), sum(x = 'after') FROM t").get == (2001, 0, 1)
    connection.close()
