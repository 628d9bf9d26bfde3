"""The real Litestream 0.5 and the replicator, both ways, in a folder and in a bucket: the same bytes at every transaction and moment."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest
from restore_support import ReplicaBuilder, SourceDatabase
from support.seaweed import SeaweedServer

from replicator.errors import ChainBroken, LtxDamaged
from replicator.litestream.chain import LtxRef, txid_text
from replicator.litestream.export import export
from replicator.litestream.replica import list_files, time_of
from replicator.litestream.restore import restore
from replicator.restore import RestoreOptions
from replicator.store import ObjectStore, open_store
from replicator.store.memory import MemoryStore
from replicator.values import Position, format_time

pytestmark = [pytest.mark.real, pytest.mark.slow]

LIMIT_S = 60.0
KEEP = "100000h"
"""Retention. Exported files bear the times of their commits, and Litestream deletes those that are older than it keeps."""


@dataclass
class Replica:
    """A place for a replica, and the real Litestream."""

    folder: Path
    url: str
    config: dict[str, object]
    store: ObjectStore
    environment: dict[str, str]
    count: int = 0

    @property
    def in_bucket(self) -> bool:
        return self.url.startswith("s3://")

    def target(self) -> Path:
        self.count += 1
        return self.folder / f"restored-{self.count}.db"

    def theirs(self, *options: str) -> bytes:
        """What ``litestream restore`` makes of it."""
        target = self.target()
        self.litestream("restore", *options, "-integrity-check", "full", "-o", str(target), self.url)
        return target.read_bytes()

    def ours(self, txid: int | None = None, at_ms: int | None = None) -> bytes:
        target = self.target()
        restore(self.store, target, RestoreOptions(txid=txid, at_ms=at_ms, integrity_check="full"))
        return target.read_bytes()

    def litestream(self, *arguments: str) -> str:
        done = subprocess.run(
            [binary(), *arguments], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def replicating(self, database: Path) -> Iterator[None]:
        """Litestream at work, with levels and snapshots in quick succession. It ends in an orderly way."""
        config = {
            "levels": [{"interval": "1s"}, {"interval": "3s"}],
            "snapshot": {"interval": "4s", "retention": KEEP},
            "l0-retention": KEEP,
            "dbs": [
                {
                    "path": str(database),
                    "monitor-interval": "100ms",
                    "replica": {"sync-interval": "100ms", **self.config},
                }
            ],
        }
        file = self.folder / "litestream.yml"
        file.write_text(json.dumps(config))
        with (self.folder / "litestream.log").open("a") as log:
            process = subprocess.Popen(
                [binary(), "replicate", "-config", str(file)], env=self.environment, stdout=log, stderr=log
            )
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(LIMIT_S)

    def files(self) -> list[LtxRef]:
        return list_files(self.store)


def binary() -> str:
    return str(Path(sys.executable).with_name("litestream"))


@pytest.fixture(params=["folder", "bucket"])
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Replica:
    if request.param == "folder":
        path = tmp_path / "replica"
        url = f"file://{path}"
        return Replica(tmp_path, url, {"type": "file", "path": str(path)}, open_store(url), dict(os.environ))
    server: SeaweedServer = request.getfixturevalue("seaweed")
    prefix = f"litestream/{uuid.uuid4().hex}"
    config = {"type": "s3", "bucket": server.bucket, "path": prefix, "endpoint": server.endpoint, "region": "us-east-1"}
    url = f"s3://{server.bucket}/{prefix}?endpoint={server.endpoint}&region=us-east-1&forcePathStyle=true"
    keys = {"LITESTREAM_ACCESS_KEY_ID": server.access_key, "LITESTREAM_SECRET_ACCESS_KEY": server.secret_key}
    store = open_store(server.url(prefix), access_key=server.access_key, secret_key=server.secret_key)
    # Whatever this host has set for AWS is not meant for the server of the tests.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | keys
    return Replica(tmp_path, url, {**config, "force-path-style": True}, store, environment)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.1)


def use(replica: Replica, database: Path) -> None:
    """An app at work until there are transactions, merged files of two levels, and a second snapshot: growth, updates, a shrink."""
    connection = apsw.Connection(str(database))
    connection.set_busy_timeout(10_000)
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)").fetchall()
    before, commits = {ref.key for ref in replica.files()}, itertools.count(1)

    def commit_and_look() -> bool:
        connection.execute("INSERT INTO t(v) VALUES (randomblob(abs(random()) % 9000))")
        connection.execute("UPDATE t SET v = randomblob(500) WHERE id % 7 = abs(random()) % 7")
        if next(commits) == 12:
            connection.execute("DELETE FROM t WHERE id % 2 = 0")
            connection.execute("VACUUM")
        levels = [ref.level for ref in replica.files() if ref.key not in before]
        return {0, 1, 2, 9} <= set(levels) and levels.count(0) > 20 and levels.count(9) > 1

    eventually(commit_and_look)
    connection.close()


def test_what_litestream_replicated_is_restored_as_litestream_restores_it(replica: Replica) -> None:
    database = replica.folder / "app.db"
    with replica.replicating(database):
        use(replica, database)
    files = replica.files()
    singles = sorted(ref.last for ref in files if ref.level == 0)
    assert replica.ours() == replica.theirs()
    for txid in [*singles[:: max(1, len(singles) // 6)], singles[-1]]:
        assert replica.ours(txid=txid) == replica.theirs("-txid", txid_text(txid)), txid_text(txid)
    for txid in singles[len(singles) // 2 : -2 : 6]:  # it takes no moment after the last
        at_ms = time_of(replica.store, files, txid) + 1
        if at_ms > time_of(replica.store, files, singles[-1]):
            break
        if any(time_of(replica.store, files, other) == at_ms for other in singles if other > txid):
            continue  # the two disagree on purpose about a transaction right at a moment
        assert replica.ours(at_ms=at_ms) == replica.theirs("-timestamp", format_time(at_ms)), txid_text(txid)


def test_a_hole_and_a_damaged_file_in_litestreams_replica_are_errors(replica: Replica) -> None:
    database = replica.folder / "app.db"
    with replica.replicating(database):
        use(replica, database)
    files = replica.files()
    snapshot = min((ref for ref in files if ref.level == 9), key=lambda ref: ref.last)
    after = next(ref for ref in files if ref.level == 0 and ref.first == snapshot.last + 2)
    gone = [ref.key for ref in files if ref.level and ref != snapshot]
    replica.store.delete([*gone, after.key])
    with pytest.raises(ChainBroken, match=f"{txid_text(after.first)} is missing"):
        replica.ours()
    replica.store.put(after.key, b"LTX1")
    with pytest.raises(LtxDamaged, match=f"{after.key} is damaged"):
        replica.ours()


def made(folder: Path, page_size: int) -> tuple[ReplicaBuilder, SourceDatabase]:
    """A native replica with two snapshots, a shrink, a VACUUM and two timelines."""
    source = SourceDatabase(folder / "source.db", page_size)
    native = ReplicaBuilder(MemoryStore(), page_size)
    native.timeline(1)
    native.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    for txid in range(2, 8):
        native.commit(Position(1, txid), source.insert(txid * 10, txid * 10 + 9, 900))
    native.commit(Position(1, 8), source.commit("DELETE FROM t WHERE id < 60"))
    native.commit(Position(1, 9), source.vacuum())
    native.snapshot(Position(1, 9))
    native.timeline(2, Position(1, 9))
    for txid in range(10, 15):
        native.commit(Position(2, txid), source.insert(txid * 100, txid * 100 + 9, 900))
    return native, source


def state(native: ReplicaBuilder, txid: int) -> bytes:
    return native.states[Position(1 if txid < 10 else 2, txid)]


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_litestream_restores_every_exported_transaction(replica: Replica, tmp_path: Path, page_size: int) -> None:
    native, _ = made(tmp_path, page_size)
    assert export(native.store, replica.store, from_ms=0).files == 14
    assert replica.theirs() == state(native, 14)
    for txid in range(1, 15):
        assert replica.theirs("-txid", txid_text(txid)) == state(native, txid)
        if not replica.in_bucket and txid < 14:  # in a bucket it takes no moment from before the upload
            at = format_time(native.time_of(Position(1, txid)) + 1)
            assert replica.theirs("-timestamp", at) == state(native, txid)


def test_litestream_finds_the_times_of_exported_files_in_a_bucket(replica: Replica, tmp_path: Path) -> None:
    """Moments after the upload of the first file, at which the others were made."""
    native, source = made(tmp_path, 1024)
    export(native.store, replica.store)
    begun_ms = time.time_ns() // 1_000_000
    for txid in range(15, 19):
        native.times[Position(2, txid)] = begun_ms + 1000 * (txid - 14)
        native.commit(Position(2, txid), source.insert(txid * 100, txid * 100 + 9, 900))
    eventually(lambda: time.time_ns() // 1_000_000 > begun_ms + 5000)
    assert export(native.store, replica.store).files == 4
    for txid in range(15, 18):
        at = format_time(native.time_of(Position(2, txid)) + 500)
        assert replica.theirs("-timestamp", at) == state(native, txid)


def test_merged_segments_are_restored_by_litestream_and_it_goes_on_from_there(replica: Replica, tmp_path: Path) -> None:
    native, _ = made(tmp_path, 4096)
    single = [info.key for info in native.store.list("segments/00000002/0/")]
    native.increment(Position(2, 12), 10, level=1)
    native.increment(Position(2, 14), 13, level=2)
    native.store.delete(single)
    export(native.store, replica.store)
    for txid in (9, 12, 14):
        assert replica.theirs("-txid", txid_text(txid)) == state(native, txid)

    database = tmp_path / "app.db"
    database.write_bytes(replica.theirs())
    with replica.replicating(database):
        use(replica, database)
    newest = max(ref.last for ref in replica.files())
    assert newest > 14
    assert replica.ours() == replica.theirs()
    assert replica.ours(txid=14) == state(native, 14), "what was exported stays"
