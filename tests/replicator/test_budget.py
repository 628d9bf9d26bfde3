"""A budget of segments: what waits for it is in the WAL, shows in the lag, and keeps nobody from a barrier."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from ledger_support import wait_for

from replicator.pace import Allowance
from replicator.service import Replicator
from replicator.store.memory import MemoryStore
from replicator.values import Position
from replicator.watch import Folder
from replicator.worker import DatabaseStatus, Protection, WorkerSettings

SCARCE = WorkerSettings(interval_s=0.02, allowance=Allowance(per_hour=60, burst=3))


class Place:
    def __init__(self, folder: Path, replicator: Replicator) -> None:
        self.folder = folder
        self.replicator = replicator
        self.store = MemoryStore()
        self.connections: dict[str, apsw.Connection] = {}

    def commit(self, name: str) -> None:
        if name not in self.connections:
            self.connections[name] = apsw.Connection(str(self.folder / name))
            self.connections[name].execute("PRAGMA journal_mode=wal; CREATE TABLE IF NOT EXISTS t(v)").fetchall()
        self.connections[name].execute("INSERT INTO t VALUES (1)")

    def status(self, name: str) -> DatabaseStatus:
        return next(status for status in self.replicator.status() if status.path.name == name)

    def durable(self, name: str) -> Position | None:
        return self.status(name).durable

    def sync(self, name: str) -> Position:
        return self.replicator.sync(self.folder / name, 10)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    found = Place(tmp_path, replicator)
    yield found
    replicator.stop(5)
    for connection in found.connections.values():
        connection.close()


def spend_all(place: Place, name: str) -> Position:
    """Commits that leave, until the budget is used up, and none more."""
    for _ in range(4):
        place.commit(name)
        reached = place.sync(name)
    return reached


def lags(place: Place, name: str) -> bool:
    """After one more commit."""
    place.commit(name)
    return place.status(name).lag_s > 1


def test_beyond_it_commits_wait_and_leave_together_and_the_lag_says_so(place: Place) -> None:
    place.commit("app.db")
    place.replicator.add(place.folder / "app.db", place.store, settings=SCARCE)
    reached = spend_all(place, "app.db")
    wait_for(lambda: lags(place, "app.db"))
    status = place.status("app.db")
    assert status.protection is Protection.PROTECTED
    # One may have come just when it was seen that nothing waits.
    assert status.durable in (reached, Position(reached.timeline, reached.txid + 1))
    assert place.sync("app.db").txid == status.durable.txid + 1


def test_an_idle_database_waits_for_nothing(place: Place) -> None:
    place.commit("app.db")
    place.replicator.add(place.folder / "app.db", place.store, settings=SCARCE)
    spend_all(place, "app.db")
    began = time.monotonic()
    place.sync("app.db")
    assert time.monotonic() - began < 1
    assert place.status("app.db").protection is Protection.PROTECTED


@pytest.mark.slow
def test_databases_of_a_folder_share_it_and_a_first_copy_does_not_wait(place: Place) -> None:
    place.commit("a.db")
    place.replicator.add_folder(Folder(place.folder, "*.db"), place.store, settings=SCARCE)
    spend_all(place, "a.db")
    place.commit("b.db")
    wait_for(lambda: len(place.replicator.status()) == 2)
    wait_for(lambda: place.durable("b.db") is not None)
    reached = place.sync("b.db")
    wait_for(lambda: lags(place, "b.db"))
    assert place.durable("b.db") in (reached, Position(reached.timeline, reached.txid + 1))


@pytest.mark.slow
def test_what_fills_a_segment_leaves_whatever_the_budget_says(place: Place) -> None:
    place.commit("app.db")
    place.replicator.add(place.folder / "app.db", place.store, settings=SCARCE)
    reached = spend_all(place, "app.db")
    place.connections["app.db"].execute("INSERT INTO t VALUES (zeroblob(70000000))")
    wait_for(lambda: (place.durable("app.db") or reached) > reached)


def test_a_program_that_opens_and_closes_it_each_time_is_bound_by_it_too(place: Place) -> None:
    def commit() -> None:
        place.commit("app.db")
        place.connections.pop("app.db").close()

    path = place.folder / "app.db"
    commit()
    place.replicator.add(path, place.store, settings=SCARCE)
    for _ in range(4):
        commit()
        reached = place.sync("app.db")
    for _ in range(5):
        wait_for(lambda: not Path(f"{path}-wal").exists())
        commit()
    wait_for(lambda: place.status("app.db").lag_s > 1)
    assert place.durable("app.db") in (reached, Position(reached.timeline, reached.txid + 1))
