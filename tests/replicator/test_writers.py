"""Claims about who may write a replica: timelines that were begun and never used, lost leases, lost segments."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import apsw
from ledger_support import restored_rows, wait_for

from replicator import origin
from replicator.errors import LeaseLost
from replicator.layout import SEGMENTS, TIMELINES
from replicator.replica import Replica
from replicator.restore import restore
from replicator.restored import mark_restored
from replicator.service import Replicator
from replicator.spool import Spool
from replicator.store.memory import MemoryStore
from replicator.worker import Protection, WorkerSettings

AT_ONCE = WorkerSettings(interval_s=0.0)


class Ledger:
    """A database with numbered rows, and its writer's local state."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.path, self.state = directory / "app.db", directory / "state"
        self.connection = apsw.Connection(str(self.path))
        self.connection.execute("PRAGMA journal_mode=wal").fetchall()
        self.connection.execute("CREATE TABLE IF NOT EXISTS ledger (id INTEGER PRIMARY KEY, body)")

    def add_rows(self, count: int = 1) -> None:
        for _ in range(count):
            self.connection.execute("INSERT INTO ledger(body) VALUES ('x')")

    def replicate(self, store: MemoryStore, epoch: Callable[[], int] = lambda: 0) -> Replicator:
        replicator = Replicator(sweep_s=3600, epoch=epoch)
        replicator.start()
        replicator.add(self.path, store, state=self.state, settings=AT_ONCE)
        return replicator

    def ship(self, store: MemoryStore, epoch: int = 0) -> None:
        """Until all that is committed is durable; the replicator has stopped then."""
        replicator = self.replicate(store, lambda: epoch)
        try:
            replicator.sync(self.path, 20)
        finally:
            replicator.stop()


def timelines(store: MemoryStore) -> list[int]:
    return sorted(Replica(store).timelines())


def test_a_writer_killed_after_it_wrote_a_timeline_record_never_goes_on_in_the_timeline_before(tmp_path: Path) -> None:
    ledger, store = Ledger(tmp_path / "a"), MemoryStore()
    ledger.add_rows(3)
    ledger.ship(store)
    spool = Spool(ledger.state)
    spool.begin_fork()
    origin.new_timeline(Replica(store), spool.load(), writer="test", reason="killed after this", now_ms=1)
    spool.close()
    ledger.add_rows(2)
    ledger.ship(store)
    assert restored_rows(store, tmp_path) == [1, 2, 3, 4, 5]
    assert timelines(store) == [1, 2, 3]


def test_a_timeline_that_is_in_use_is_not_begun_again(tmp_path: Path) -> None:
    ledger, store = Ledger(tmp_path / "a"), MemoryStore()
    for _ in range(3):
        ledger.add_rows(1)
        ledger.ship(store)
    assert timelines(store) == [1]


def test_a_writer_with_an_old_lease_begins_no_timeline_any_more(tmp_path: Path) -> None:
    a, store = Ledger(tmp_path / "a"), MemoryStore()
    a.add_rows(3)
    a.ship(store, epoch=1)
    (tmp_path / "b").mkdir()
    report = restore(store, tmp_path / "b" / "app.db")
    mark_restored(tmp_path / "b" / "state", report, Replica(store).timelines()[1])
    b = Ledger(tmp_path / "b")
    b.add_rows(2)
    b.ship(store, epoch=2)
    a.add_rows(4)
    spool = Spool(a.state)
    spool.begin_fork()  # whatever makes it take a new timeline
    spool.close()
    late = a.replicate(store, lambda: 1)
    try:
        wait_for(lambda: "another has taken over" in late.status()[0].reason)
    finally:
        late.stop(0.1)
    assert timelines(store) == [1, 2]
    assert restored_rows(store, tmp_path) == [1, 2, 3, 4, 5]


def test_a_restored_position_that_the_window_has_left_behind_is_no_place_to_fork_from(tmp_path: Path) -> None:
    a, store = Ledger(tmp_path / "a"), MemoryStore()
    a.add_rows(3)
    a.ship(store)
    (tmp_path / "b").mkdir()
    report = restore(store, tmp_path / "b" / "app.db")
    mark_restored(tmp_path / "b" / "state", report, Replica(store).timelines()[1])
    store.delete([info.key for info in store.list(SEGMENTS)])
    b = Ledger(tmp_path / "b")
    b.add_rows(2)
    b.ship(store)
    assert timelines(store) == [1, 2]
    assert restored_rows(store, tmp_path) == [1, 2, 3, 4, 5]


def test_what_is_written_without_a_lease_after_one_with_it_is_the_newest(tmp_path: Path) -> None:
    a, store = Ledger(tmp_path / "a"), MemoryStore()
    a.add_rows(3)
    a.ship(store, epoch=7)
    (tmp_path / "b").mkdir()
    restore(store, tmp_path / "b" / "app.db")
    b = Ledger(tmp_path / "b")
    b.add_rows(2)
    b.ship(store)
    assert restored_rows(store, tmp_path) == [1, 2, 3, 4, 5]


def test_without_the_lease_no_timeline_is_begun_and_the_status_says_so(tmp_path: Path) -> None:
    ledger, store = Ledger(tmp_path / "a"), MemoryStore()
    ledger.add_rows(3)
    right: list[int] = []

    def epoch() -> int:
        if not right:
            raise LeaseLost("the lease fleet/lease.json is not held")
        return right[0]

    replicator = ledger.replicate(store, epoch)
    try:
        wait_for(lambda: replicator.status()[0].protection is Protection.NOT_PROTECTED)
        assert "fleet/lease.json is not held" in replicator.status()[0].reason
        assert list(store.list()) == []
        right.append(7)
        replicator.sync(ledger.path, 20)
        assert Replica(store).timelines()[1].epoch == 7
    finally:
        replicator.stop()


def test_segments_that_vanished_from_the_store_meanwhile_are_noticed_at_the_start(tmp_path: Path) -> None:
    for number, lost in enumerate((slice(0, 1), slice(1, 2), slice(-1, None), slice(None))):
        ledger, store = Ledger(tmp_path / f"a{number}"), MemoryStore()
        for _ in range(3):
            ledger.add_rows(1)
            ledger.ship(store)
        keys = [info.key for info in store.list(SEGMENTS)]
        store.delete(keys[lost])
        replicator = ledger.replicate(store)
        try:
            wait_for(partial(is_protected, replicator))
        finally:
            replicator.stop()
        out = tmp_path / f"out{number}"
        out.mkdir()
        assert restored_rows(store, out) == [1, 2, 3]
        assert timelines(store) == [1, 2]


def test_a_replica_whose_timeline_records_are_gone_is_begun_anew_beside_its_segments(tmp_path: Path) -> None:
    ledger, store = Ledger(tmp_path / "a"), MemoryStore()
    ledger.add_rows(3)
    ledger.ship(store)
    store.delete([info.key for info in store.list(TIMELINES)])
    ledger.add_rows(1)
    replicator = ledger.replicate(store)
    try:
        wait_for(partial(is_protected, replicator))
    finally:
        replicator.stop()
    assert timelines(store) == [2]
    assert restored_rows(store, tmp_path) == [1, 2, 3, 4]


def is_protected(replicator: Replicator) -> bool:
    return replicator.status()[0].protection is Protection.PROTECTED


def test_the_record_of_a_timeline_is_proven_with_few_requests(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []
    store = MemoryStore(before=lambda operation, key: asked.append((operation, key)))
    ledger = Ledger(tmp_path / "a")
    ledger.add_rows(3)
    ledger.ship(store)
    asked.clear()
    ledger.ship(store)
    lists = [key for operation, key in asked if operation == "list"]
    assert sorted(lists) == [SEGMENTS, TIMELINES]


def test_increments_wait_until_the_snapshot_that_they_follow_has_arrived(tmp_path: Path) -> None:
    """Else a host that is lost meanwhile leaves a timeline that hides the one before and restores nothing."""
    hold = threading.Event()
    arrived: list[str] = []

    def before(operation: str, key: str) -> None:
        if operation == "put" and "/9/" in key:
            assert hold.wait(20)

    store = MemoryStore(before=before, after=lambda operation, key: arrived.append(key))
    ledger = Ledger(tmp_path / "a")
    ledger.add_rows(1)
    replicator = ledger.replicate(store)
    try:
        wait_for(lambda: replicator.status()[0].waiting_segments == 1)
        for count in (2, 3):
            ledger.add_rows(1)
            wait_for(lambda count=count: replicator.status()[0].waiting_segments == count)
        assert not [key for key in arrived if key.endswith(".seg")]
        hold.set()
        replicator.sync(ledger.path, 20)
    finally:
        hold.set()
        replicator.stop()
    assert restored_rows(store, tmp_path) == [1, 2, 3]


def test_a_commit_after_a_sync_that_came_between_is_not_left_to_the_sweep(tmp_path: Path) -> None:
    path, store = tmp_path / "app.db", MemoryStore()
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE t (n)")
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    try:
        replicator.add(path, store, state=tmp_path / "state")
        for round_ in range(5):
            for n in (1, 2):
                connection.execute("INSERT INTO t VALUES (?)", (n,))
            before = replicator.sync(path, 20)
            connection.execute("INSERT INTO t VALUES (3)")
            wait_for(lambda before=before: replicator.status()[0].durable > before, 5, f"the commit of round {round_}")
    finally:
        replicator.stop()
