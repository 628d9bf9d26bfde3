"""Claims about restores, copies that follow and proofs from a real S3 server, with a proxy before it that is slow or breaks off."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from restore_support import ReplicaBuilder, SourceDatabase
from support.faultproxy import FaultProxy
from support.seaweed import SeaweedServer

from replicator.errors import StoreError
from replicator.follow import Follower
from replicator.proof import verify
from replicator.restore import RestoreOptions, restore
from replicator.store import ObjectStore, open_store
from replicator.values import Position

pytestmark = [pytest.mark.real, pytest.mark.slow]

PAGES = 8000
INCREMENTS = 40


@pytest.fixture
def proxy(seaweed: SeaweedServer) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(seaweed: SeaweedServer, proxy: FaultProxy, request: pytest.FixtureRequest) -> ObjectStore:
    """Through the proxy; it gives up soon."""
    return open_store(
        f"s3://{seaweed.bucket}/proof/{request.node.name}?endpoint={proxy.endpoint}",
        access_key=seaweed.access_key,
        secret_key=seaweed.secret_key,
        retry_budget_s=0.5,
    )


def filled(store: ObjectStore) -> ReplicaBuilder:
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    state = os.urandom(4096 * PAGES)
    builder.snapshot(Position(1, 1), state)
    for txid in range(2, INCREMENTS):
        state = state[: 4096 * txid] + os.urandom(4096) + state[4096 * (txid + 1) :]
        builder.commit(Position(1, txid), state)
    return builder


def test_eight_downloads_at_once_take_a_fraction_of_the_time_of_one(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    builder = filled(store)
    proxy.delay_ms = 30
    took_s = {}
    for parallelism in (1, 8):
        began = time.monotonic()
        target = tmp_path / f"{parallelism}.db"
        restore(store, target, RestoreOptions(parallelism=parallelism, integrity_check="none"))
        took_s[parallelism] = time.monotonic() - began
        assert target.read_bytes() == builder.states[Position(1, INCREMENTS - 1)]
    assert took_s[8] < took_s[1] / 2, took_s


def test_a_restore_goes_on_after_an_outage(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    builder = filled(store)
    options = RestoreOptions(parallelism=2, integrity_check="none", resume=True)

    def break_off(done: int, total: int) -> None:
        if done > total // 2:
            proxy.answer(503, None)

    with pytest.raises(StoreError):
        restore(store, tmp_path / "app.db", options, on_progress=break_off)
    proxy.heal()
    report = restore(store, tmp_path / "app.db", options)
    assert report.downloaded_bytes < 0.6 * 4096 * PAGES
    assert (tmp_path / "app.db").read_bytes() == builder.states[Position(1, INCREMENTS - 1)]


def test_a_copy_follows_through_an_outage(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "source.db")
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t (id INTEGER PRIMARY KEY, body)"))
    follower = Follower(store, tmp_path / "copy.db", RestoreOptions(), list_every_s=0.0)
    follower.open()
    reader = apsw.Connection(str(tmp_path / "copy.db"), flags=apsw.SQLITE_OPEN_READONLY)
    for txid in range(2, 8):
        builder.commit(Position(1, txid), source.insert(txid * 1000, txid * 1000 + 99, 500))
        if txid == 4:
            proxy.refuse()
            with pytest.raises(StoreError):
                follower.step()
            proxy.heal()
        assert follower.step().position == Position(1, txid)
        assert reader.execute("SELECT count(*), max(id) FROM t").fetchall() == [((txid - 1) * 100, txid * 1000 + 99)]
    reader.close()
    follower.close()
    source.close()


def test_a_bucket_is_proved_and_what_is_damaged_in_it_is_found(store: ObjectStore, tmp_path: Path) -> None:
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "source.db")
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t (id INTEGER PRIMARY KEY, body)"))
    refs = [builder.commit(Position(1, txid), source.insert(txid * 1000, txid * 1000 + 9, 500)) for txid in (2, 3, 4)]
    source.close()
    options = RestoreOptions(integrity_check="full")
    assert verify(store, tmp_path, options, every_segment=True).is_whole
    builder.damage(refs[1], lambda body: body[:200] + bytes([body[200] ^ 1]) + body[201:])
    found = verify(store, tmp_path, options)
    assert refs[1].key in found.problem and found.report is not None
    assert found.report.position == Position(1, 2)
