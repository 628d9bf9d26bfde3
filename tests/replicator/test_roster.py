"""What is replicated can be changed while it runs, and what did not change is not touched."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pyrage
import pytest
from ledger_support import wait_for

from replicator.config import AgeConfig, DatabaseConfig, ReplicaConfig
from replicator.errors import ConfigError, DatabaseMissing, DatabaseNotReplicable, UsageError
from replicator.replica import Replica
from replicator.roster import Changes, Roster
from replicator.service import Replicator
from replicator.store.file import FileStore
from replicator.store.seal import sealed
from replicator.watch import Folder
from replicator.worker import DatabaseStatus, Protection, WorkerSettings


def make(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE IF NOT EXISTS t(v); INSERT INTO t VALUES (1)").fetchall()
    connection.close()


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.replicator = Replicator(sweep_s=3600)
        self.replicator.start()
        self.roster = Roster(self.replicator, threading.Event())

    def entry(self, name: str, *, bucket: str = "", settings: WorkerSettings | None = None) -> DatabaseConfig:
        url = f"file://{self.folder}/bucket/{bucket or name}"
        return DatabaseConfig(
            self.folder / f"{name}.db", ReplicaConfig(url), settings=settings or WorkerSettings(), origin="c.yml:1"
        )

    def status(self, name: str) -> DatabaseStatus:
        return next(status for status in self.roster.status() if status.path == self.folder / f"{name}.db")

    def objects(self, bucket: str) -> list[Path]:
        return [path for path in (self.folder / "bucket" / bucket).rglob("*") if path.is_file()]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    for name in ("a", "b", "c"):
        make(tmp_path / f"{name}.db")
    found = Place(tmp_path)
    yield found
    found.replicator.stop(5)


def test_a_new_configuration_touches_only_what_changed_in_it(place: Place) -> None:
    a, b, c = place.entry("a"), place.entry("b"), place.entry("c")
    place.roster.load([a, b])
    place.roster.sync(a.path, 10)
    place.roster.sync(b.path, 10)
    before = place.status("a")
    moved = dataclasses.replace(a, origin="c.yml:7", replica=dataclasses.replace(a.replica, origin="c.yml:9"))
    other_b = place.entry("b", bucket="elsewhere")
    assert place.roster.reload([moved, other_b, c]) == Changes(added=1, changed=1, removed=0, same=1)
    place.roster.sync(b.path, 10)
    place.roster.sync(c.path, 10)
    assert place.status("a").durable == before.durable
    assert (place.status("a").puts_hour, place.status("b").url) == (before.puts_hour, other_b.replica.url)
    assert place.objects("elsewhere") and place.objects("c")
    assert place.roster.reload([c]) == Changes(added=0, changed=0, removed=2, same=1)
    assert [status.path.name for status in place.roster.status()] == ["c.db"]


def test_settings_that_change_have_a_database_begin_again_from_its_local_state(place: Place) -> None:
    place.roster.load([place.entry("a")])
    position = place.roster.sync(place.folder / "a.db", 10)
    count = len(place.objects("a"))
    slow = place.entry("a", settings=WorkerSettings(interval_s=5))
    assert place.roster.reload([slow]).changed == 1
    assert place.roster.sync(slow.path, 10) == position
    assert len(place.objects("a")) == count


def test_what_cannot_be_taken_up_is_shown_and_keeps_nothing_else_from_it(place: Place) -> None:
    missing = DatabaseConfig(
        place.folder / "tenants", ReplicaConfig(f"file://{place.folder}/bucket/t"), Folder(place.folder / "tenants")
    )
    place.roster.load([])
    place.roster.reload([missing, place.entry("a")])
    place.roster.sync(place.folder / "a.db", 10)
    (status,) = [status for status in place.roster.status() if status.path == missing.path]
    assert status.protection is Protection.NOT_PROTECTED
    assert "another reload tries again" in status.reason
    missing.path.mkdir()
    make(missing.path / "x.db")
    place.roster.reload([missing, place.entry("a")])
    wait_for(lambda: any(status.path.name == "x.db" for status in place.roster.status()))
    assert missing.path not in [status.path for status in place.roster.status()]


def test_a_wrong_url_changes_nothing(place: Place) -> None:
    place.roster.load([place.entry("a")])
    wrong = DatabaseConfig(place.folder / "b.db", ReplicaConfig("s3://b?endpoint=ftp://h", origin="c.yml:3"))
    with pytest.raises(ConfigError, match="c.yml:3: replica"):
        place.roster.reload([wrong])
    assert [status.path.name for status in place.roster.status()] == ["a.db"]


def test_a_registered_database_is_replicated_until_it_is_unregistered(place: Place) -> None:
    place.roster.load([place.entry("a")])
    path, url = place.folder / "b.db", f"file://{place.folder}/bucket/b"
    place.roster.register(path, url)
    place.roster.register(path, url)  # again is no error
    place.roster.reload([place.entry("a")])
    left = place.roster.unregister(path, 10)
    assert left.durable is not None and not left.reason
    assert place.objects("b")
    with pytest.raises(DatabaseMissing, match=r"b\.db is not replicated here; `replicator list`"):
        place.roster.unregister(path, 1)


def test_a_registration_that_would_disturb_another_is_refused(place: Place) -> None:
    a = place.entry("a")
    place.roster.load([a])
    with pytest.raises(UsageError, match="its replica is at the same place as that of .*/a.db"):
        place.roster.register(place.folder / "b.db", a.replica.url)
    with pytest.raises(UsageError, match="replicated already by .*/a.db"):
        place.roster.register(a.path, f"file://{place.folder}/bucket/z")
    with pytest.raises(UsageError):
        place.roster.register(place.folder / "b.db", "nonsense")
    with pytest.raises(UsageError, match="is a folder; write it into the configuration"):
        place.roster.register(place.folder, f"file://{place.folder}/bucket/z")
    assert [status.path.name for status in place.roster.status()] == ["a.db"]


def test_nothing_is_registered_readable_beside_what_is_encrypted(place: Place) -> None:
    pair = pyrage.x25519.Identity.generate()
    a = place.entry("a")
    age = AgeConfig((str(pair.to_public()),), (str(pair),))
    place.roster.load([dataclasses.replace(a, replica=dataclasses.replace(a.replica, age=age))])
    with pytest.raises(UsageError, match=r"b.db cannot be registered: it would be stored readable"):
        place.roster.register(place.folder / "b.db", f"file://{place.folder}/bucket/b")
    assert not place.objects("b")


def test_a_reload_with_other_recipients_goes_on_with_them(place: Place) -> None:
    old, new = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    a = place.entry("a")

    def encrypted_to(pair: pyrage.x25519.Identity) -> DatabaseConfig:
        age = AgeConfig((str(pair.to_public()),), (str(old), str(new)))
        return dataclasses.replace(a, replica=dataclasses.replace(a.replica, age=age))

    place.roster.load([encrypted_to(old)])
    place.roster.sync(a.path, 10)
    assert place.roster.reload([encrypted_to(old)]) == Changes(added=0, changed=0, removed=0, same=1)
    assert place.roster.reload([encrypted_to(new)]) == Changes(added=0, changed=1, removed=0, same=0)
    make(a.path)
    position = place.roster.sync(a.path, 10)
    replica = Replica(sealed(FileStore(place.folder / "bucket" / "a"), identities=[str(new)]))
    newest = max(replica.segments(), key=lambda ref: (ref.timeline, ref.last))
    assert (newest.timeline, newest.last) == (position.timeline, position.txid)
    assert replica.header(newest)


def test_a_configuration_that_would_disturb_a_registered_database_is_refused(place: Place) -> None:
    place.roster.load([place.entry("a")])
    place.roster.register(place.folder / "b.db", f"file://{place.folder}/bucket/b")
    with pytest.raises(ConfigError, match=r"b\.db, which was registered; unregister it first"):
        place.roster.reload([place.entry("a"), place.entry("c", bucket="b")])
    assert place.roster.reload([place.entry("a"), place.entry("b")]).same == 2
    assert place.roster.reload([place.entry("a")]).removed == 1


def test_a_stopped_database_is_let_go_of_and_goes_on_with_what_was_written_meanwhile(place: Place) -> None:
    a = place.entry("a")
    place.roster.load([a])
    left = place.roster.stop(a.path, 10)
    assert left.durable is not None
    status = place.status("a")
    assert status.protection is Protection.NOT_PROTECTED
    assert status.reason == "it was stopped by `replicator stop`; `replicator start` has it go on"
    with pytest.raises(DatabaseNotReplicable, match="it was stopped"):
        place.roster.sync(a.path, 1)
    place.roster.reload([a])  # a reload does not start what a person has stopped
    assert place.status("a").protection is Protection.NOT_PROTECTED
    make(a.path)
    place.roster.start(a.path)
    assert place.roster.sync(a.path, 10) > left.durable


def test_a_database_of_a_folder_is_not_stopped_by_itself(place: Place) -> None:
    tenants = place.folder / "tenants"
    tenants.mkdir()
    make(tenants / "x.db")
    place.roster.load([DatabaseConfig(tenants, ReplicaConfig(f"file://{place.folder}/bucket/t"), Folder(tenants))])
    with pytest.raises(DatabaseMissing, match="belongs to the folder .*tenants"):
        place.roster.stop(tenants / "x.db", 1)
    assert place.roster.stop(tenants, 10).reason == ""
    assert [status.path for status in place.roster.status()] == [tenants]
    place.roster.start(tenants)
    wait_for(lambda: [status.path for status in place.roster.status()] == [tenants / "x.db"])


def test_requests_are_counted_for_each_replica(place: Place) -> None:
    place.roster.load([place.entry("a")])
    place.roster.sync(place.folder / "a.db", 10)
    (meter,) = place.roster.meters().values()
    assert sum(each.requests for each in meter.snapshot() if each.operation == "put") >= 2
