"""Claims about replication with encryption as a user has it: what a bucket shows, who can read it, and what happens without the key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pyrage
import pytest
from ledger_support import wait_for
from restore_support import ReplicaBuilder, SourceDatabase
from support.seaweed import SeaweedServer

from replicator import Folder, Replicator, catalogue, cli, default_state, open_store, sealed
from replicator.age import IDENTITY_VARIABLE
from replicator.config import Config, load
from replicator.daemon import restore_if_missing
from replicator.errors import ConfigError, IdentityMissing, NotEncrypted, SealDamaged, StoreUnavailable, SyncTimeout
from replicator.litestream.export import export
from replicator.replica import Replica
from replicator.restore import RestoreOptions, restore
from replicator.store import ObjectStore
from replicator.store.memory import MemoryStore
from replicator.values import Position
from replicator.worker import DatabaseStatus, Protection

ROOT = Path(__file__).parents[2]
MARKS = (b"unmistakable_table", b"unmistakable row", b"unmistakable-host")


class Place:
    """A database of one test, the folder that is its bucket, and keys."""

    def __init__(self, folder: Path) -> None:
        pair = pyrage.x25519.Identity.generate()
        self.identity, self.recipient = str(pair), str(pair.to_public())
        self.folder = folder
        self.database = folder / "app.db"
        self.bucket = folder / "bucket"
        self.url = f"file://{self.bucket}/app"
        self.key_file = folder / "key.txt"
        self.key_file.write_text(f"# created: today\n# public key: {self.recipient}\n{self.identity}\n")
        self.connection = apsw.Connection(str(self.database))
        self.connection.execute(
            "PRAGMA journal_mode=wal; CREATE TABLE unmistakable_table(v); "
            "INSERT INTO unmistakable_table VALUES ('unmistakable row')"
        ).fetchall()

    def insert(self) -> None:
        self.connection.execute("INSERT INTO unmistakable_table VALUES ('unmistakable row')")

    def sealed(self, store: ObjectStore) -> ObjectStore:
        return sealed(store, recipients=[self.recipient], identities=[self.identity])

    def config(self, age: str | None = None, url: str | None = None) -> Config:
        """One that encrypts to this place's keys, if nothing else is said."""
        age = f"{{recipients: [{self.recipient}], identity-file: {self.key_file}}}" if age is None else age
        file = self.folder / "replicator.yml"
        file.write_text(f"dbs:\n- path: {self.database}\n  replica: {{url: '{url or self.url}', age: {age}}}\n")
        return load(file, environment={})

    def stored(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.bucket.rglob("*")) if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.connection.close()


@contextmanager
def replicating(path: Path, store: ObjectStore) -> Iterator[Replicator]:
    running = Replicator()
    running.start()
    running.add(path, store)
    try:
        yield running
    finally:
        running.stop(0.1)  # some can never ship what they have


def ship(path: Path, store: ObjectStore) -> None:
    with replicating(path, store) as running:
        running.sync(path, 20)


def count(path: Path) -> int:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return int(next(iter(connection.execute("SELECT count(*) FROM unmistakable_table")))[0])
    finally:
        connection.close()


def status_of(running: Replicator) -> DatabaseStatus:
    return running.status()[0]


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_no_stored_byte_shows_a_row_a_table_or_the_host(place: Place) -> None:
    inner = MemoryStore()
    folder = place.folder / "tenants"
    folder.mkdir()
    connection = apsw.Connection(str(folder / "one.db"))
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE unmistakable_table(v)").fetchall()
    running = Replicator(writer="unmistakable-host:1")
    running.start()
    running.add(place.database, place.sealed(inner.sub("app")))
    running.add_folder(Folder(folder), place.sealed(inner.sub("tenants")))
    for _ in range(3):
        place.insert()
        running.sync(place.database, 20)
    running.sync_folder(folder, 20)
    running.stop(5)
    connection.close()
    kinds = {info.key.split("/")[1] for info in inner.list()}
    assert kinds == {"timelines", "segments", "databases", "db"}
    for info in inner.list():
        body = inner.get(info.key)
        assert body.startswith(b"\x89SEAL"), info.key
        assert not [mark for mark in (*MARKS, b"one.db", b"RSEG", b"writer") if mark in body], info.key
        assert not [mark for mark in MARKS if mark in info.key.encode()]


def test_a_restore_gives_what_was_committed_and_nothing_without_the_identity(place: Place) -> None:
    inner = MemoryStore()
    for _ in range(3):
        place.insert()
        ship(place.database, place.sealed(inner))
    restore(sealed(inner, identities=[place.identity]), place.folder / "copy.db", RestoreOptions())
    assert count(place.folder / "copy.db") == 4
    with pytest.raises(IdentityMissing, match=r"timelines/00000001.json is encrypted; give an age identity"):
        restore(inner, place.folder / "other.db", RestoreOptions())
    assert not (place.folder / "other.db").exists()


@pytest.mark.parametrize("altered", [0, 9, 30, 1020, 1100, -1], ids=lambda at: f"byte{at}")
def test_an_altered_segment_is_gone_around_where_others_lead_to_the_same_state(tmp_path: Path, altered: int) -> None:
    pair = pyrage.x25519.Identity.generate()
    inner = MemoryStore()
    store = sealed(inner, recipients=[str(pair.to_public())], identities=[str(pair)])
    source, replica = SourceDatabase(tmp_path / "source.db"), ReplicaBuilder(store)
    replica.timeline(1)
    replica.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    state = source.insert(1, 50, 300)
    replica.commit(Position(1, 2), state)
    damaged = replica.snapshot(Position(1, 2))
    source.close()
    body = bytearray(inner.get(damaged.key))
    body[altered] ^= 4
    inner.put(damaged.key, bytes(body))
    reader = sealed(inner, identities=[str(pair)])
    restore(reader, tmp_path / "copy.db", RestoreOptions(position=Position(1, 2)))
    assert (tmp_path / "copy.db").read_bytes() == state
    inner.delete([Replica(reader).segments()[0].key])
    with pytest.raises(SealDamaged, match=f"{damaged.key} is encrypted and damaged: .*; without it, "):
        restore(reader, tmp_path / "other.db", RestoreOptions(position=Position(1, 2)))


def test_a_moment_is_found_although_a_segment_that_is_not_the_answer_was_altered(tmp_path: Path) -> None:
    pair = pyrage.x25519.Identity.generate()
    inner = MemoryStore()
    source = SourceDatabase(tmp_path / "source.db")
    replica = ReplicaBuilder(sealed(inner, recipients=[str(pair.to_public())], identities=[str(pair)]))
    replica.timeline(1)
    replica.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    refs = [replica.commit(Position(1, txid), source.insert(txid, txid, 10)) for txid in (2, 3, 4)]
    source.close()
    inner.put(refs[1].key, inner.get(refs[1].key)[:-1])
    reader = Replica(sealed(inner, identities=[str(pair)]))
    found = reader.find_position(reader.timelines(), reader.segments(), replica.time_of(Position(1, 1)))
    assert found[0] == Position(1, 1)


def test_a_segment_whose_answer_was_lost_is_known_again_although_its_bytes_differ(place: Place) -> None:
    inner = MemoryStore()
    ship(place.database, place.sealed(inner))
    place.insert()
    inner.fail_next("put", StoreUnavailable("the answer was lost"), after=True)
    ship(place.database, place.sealed(inner))
    puts = [key for operation, key in inner.calls if operation == "put" and key.startswith("segments")]
    assert len(puts) == len(set(puts)) + 1
    assert list(Replica(place.sealed(inner)).timelines()) == [1]
    restore(place.sealed(inner), place.folder / "copy.db", RestoreOptions())
    assert count(place.folder / "copy.db") == 2


# -- what is not mixed -------------------------------------------------------------------------------------------------


def readable(place: Place, inner: ObjectStore) -> ObjectStore:
    return inner


def for_others(place: Place, inner: ObjectStore) -> ObjectStore:
    pair = pyrage.x25519.Identity.generate()
    return sealed(inner, recipients=[str(pair.to_public())], identities=[str(pair)])


@pytest.mark.parametrize("known", [True, False], ids=["with-local-state", "without-local-state"])
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Place.sealed, readable, "is encrypted; give an age identity"),
        (readable, Place.sealed, "is not encrypted, but was to be opened with an age identity"),
        (Place.sealed, for_others, "is encrypted, and none of the age identities given opens it"),
    ],
    ids=["encrypted-then-readable", "readable-then-encrypted", "encrypted-to-others"],
)
def test_a_replica_of_the_other_kind_is_left_alone_and_said(
    place: Place,
    before: Callable[[Place, ObjectStore], ObjectStore],
    after: Callable[[Place, ObjectStore], ObjectStore],
    words: str,
    known: bool,
) -> None:
    inner = MemoryStore()
    ship(place.database, before(place, inner))
    objects = {info.key: inner.get(info.key) for info in inner.list()}
    state = default_state(place.database)
    if not known:
        state.rename(place.folder / "aside")
    place.insert()
    with replicating(place.database, after(place, inner)) as running:
        wait_for(lambda: words in status_of(running).reason)
        assert status_of(running).protection is Protection.NOT_PROTECTED
        with pytest.raises(SyncTimeout, match=words):
            running.sync(place.database, 0.1)
    assert {info.key: inner.get(info.key) for info in inner.list()} == objects
    ship(place.database, before(place, inner))
    restore(before(place, inner), place.folder / "copy.db", RestoreOptions())
    assert count(place.folder / "copy.db") == 2
    assert list(Replica(before(place, inner)).timelines()) == ([1] if known else [1, 2])


@pytest.mark.parametrize(("before", "after"), [(Place.sealed, readable), (readable, Place.sealed)])
def test_a_new_database_of_a_folder_is_not_stored_otherwise_than_the_others(
    place: Place,
    before: Callable[[Place, ObjectStore], ObjectStore],
    after: Callable[[Place, ObjectStore], ObjectStore],
) -> None:
    inner = MemoryStore()
    catalogue.register(before(place, inner), place.folder, place.database)
    objects = {info.key: inner.get(info.key) for info in inner.list()}
    folder = place.folder / "tenants"
    folder.mkdir()
    apsw.Connection(str(folder / "new.db")).execute("CREATE TABLE t(v)").fetchall()
    running = Replicator()
    running.start()
    running.add_folder(Folder(folder), after(place, inner))
    wait_for(lambda: "encrypted" in status_of(running).reason)
    running.stop(0.1)
    assert {info.key: inner.get(info.key) for info in inner.list()} == objects
    with pytest.raises((IdentityMissing, NotEncrypted)):
        catalogue.renew(after(place, inner), catalogue.entry_of(place.folder, place.database))


def test_encryption_that_is_switched_on_begins_at_another_place(place: Place) -> None:
    plain, other = MemoryStore("plain"), MemoryStore("other")
    ship(place.database, plain)
    place.insert()
    ship(place.database, place.sealed(other))
    restore(place.sealed(other), place.folder / "copy.db", RestoreOptions())
    assert count(place.folder / "copy.db") == 2


# -- configuration -----------------------------------------------------------------------------------------------------


def test_the_keys_of_litestreams_configuration_encrypt(place: Place) -> None:
    config = place.config(f"{{recipients: [{place.recipient}], identities: [{place.identity}]}}")
    ship(place.database, config.databases[0].replica.open())
    assert place.stored()
    assert all(body.startswith(b"\x89SEAL") for body in place.stored().values())
    assert place.identity not in repr(config)
    place.connection.close()
    place.database.unlink()
    restore_if_missing(config.databases[0], config.databases[0].replica.open())
    assert count(place.database) == 1


def test_keys_at_the_top_of_the_file_are_for_all_replicas(place: Place) -> None:
    file = place.folder / "all.yml"
    file.write_text(
        f"age:\n  recipients: [{place.recipient}]\n  identities: [$KEY]\n"
        f"dbs:\n- path: {place.database}\n  replica: {{url: '{place.url}'}}\n"
    )
    ship(place.database, load(file, environment={"KEY": place.identity}).databases[0].replica.open())
    assert all(body.startswith(b"\x89SEAL") for body in place.stored().values())


def test_the_daemon_encrypts_by_its_configuration_and_never_shows_the_identity(place: Place) -> None:
    config = place.config(f"{{recipients: [{place.recipient}], identities: [{place.identity}]}}")
    command = [sys.executable, "-m", "replicator", "replicate", "--once", "--config", str(config.file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "everything is in the store, up to 1:1" in done.stderr
    assert place.identity not in done.stdout + done.stderr
    assert len(place.stored()) == 2
    assert all(body.startswith(b"\x89SEAL") for body in place.stored().values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "the identity file .* cannot be read: No such file"),
        ("# nothing\n", "holds no age identity; make one with age-keygen"),
        ("AGE-SECRET-KEY-1S3CR3T\n", "key.txt: this is not an age identity"),
        ("OTHER", "no age identity belongs to one of the recipients"),
    ],
)
def test_a_wrong_identity_file_is_one_clear_line(place: Place, content: str | None, words: str) -> None:
    config = place.config()
    place.key_file.unlink()
    if content is not None:
        place.key_file.write_text(content.replace("OTHER", str(pyrage.x25519.Identity.generate())))
    with pytest.raises(ConfigError, match=rf"replicator.yml:3: replica: .*{words}") as caught:
        config.databases[0].replica.open()
    assert "S3CR3T" not in str(caught.value)
    assert "\n" not in str(caught.value)


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place with an encrypted replica in a folder, and no configuration."""
    monkeypatch.delenv(IDENTITY_VARIABLE, raising=False)
    monkeypatch.setenv("REPLICATOR_CONFIG", str(place.folder / "empty.yml"))
    (place.folder / "empty.yml").write_text("dbs: []\n")
    ship(place.database, place.sealed(open_store(place.url)))
    place.insert()
    ship(place.database, place.sealed(open_store(place.url)))
    return place


def commands(place: Place) -> dict[str, list[str]]:
    return {
        "restore": ["restore", "-o", str(place.folder / "copy.db"), place.url],
        "history": ["history", place.url],
        "query": ["query", place.url, "SELECT count(*) FROM unmistakable_table"],
        "diff": ["diff", "--from", "1:1", place.url],
        "export": ["export", place.url, f"file://{place.folder}/litestream"],
    }


@pytest.mark.parametrize("command", ["restore", "history", "query", "diff", "export"])
def test_commands_open_an_encrypted_replica_with_an_identity_only(
    shipped: Place, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = commands(shipped)[command]
    assert cli.run(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is encrypted; give an age identity that opens it: --identity FILE" in line
    monkeypatch.setenv(IDENTITY_VARIABLE, str(pyrage.x25519.Identity.generate()))
    assert cli.run(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the age identities given opens it" in line
    assert cli.run([*arguments, "--identity", str(shipped.key_file)]) == 0
    (shipped.folder / "copy.db").unlink(missing_ok=True)
    monkeypatch.setenv(IDENTITY_VARIABLE, shipped.identity)
    assert cli.run(arguments) == 0
    captured = capsys.readouterr()
    assert shipped.identity not in captured.out + captured.err


def test_the_results_of_commands_are_those_of_the_content(shipped: Place, capsys: pytest.CaptureFixture[str]) -> None:
    key = ["--identity", str(shipped.key_file)]
    assert cli.run([*commands(shipped)["query"], *key, "--csv"]) == 0
    assert capsys.readouterr().out.split() == ["count(*)", "2"]
    assert cli.run([*commands(shipped)["diff"], *key, "--json"]) == 0
    assert '"added": 1' in capsys.readouterr().out
    assert cli.run([*commands(shipped)["restore"], *key]) == 0
    assert count(shipped.folder / "copy.db") == 2


def test_a_readable_replica_is_not_opened_with_an_identity(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPLICATOR_CONFIG", str(place.folder / "empty.yml"))
    (place.folder / "empty.yml").write_text("dbs: []\n")
    ship(place.database, open_store(place.url))
    assert cli.run(["history", place.url, "--identity", str(place.key_file)]) == 1
    assert "is not encrypted, but was to be opened" in capsys.readouterr().err
    assert cli.run(["history", place.url]) == 0


def test_databases_of_an_encrypted_folder_are_listed_with_an_identity(
    shipped: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{shipped.bucket}/tenants"
    catalogue.register(shipped.sealed(open_store(url)), shipped.folder, shipped.database)
    assert cli.run(["databases", url]) == 1
    assert "is encrypted; give an age identity" in capsys.readouterr().err
    assert cli.run(["databases", url, "--identity", str(shipped.key_file), "--json"]) == 0
    assert [row["path"] for row in json.loads(capsys.readouterr().out)["databases"]] == ["app.db"]


def test_the_configuration_of_a_place_opens_it_also_by_its_url(
    shipped: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shipped.config().file is not None
    assert cli.run(["history", "--config", str(shipped.folder / "replicator.yml"), shipped.url]) == 0
    assert "timeline 1; 1 to 2" in capsys.readouterr().out


def test_a_replica_of_litestreams_beside_an_encrypted_one_is_still_read(
    shipped: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    export(sealed(open_store(shipped.url), identities=[shipped.identity]), open_store(shipped.url))
    key = ["--identity", str(shipped.key_file)]
    assert cli.run(["history", shipped.url, *key]) == 0
    told = capsys.readouterr().out
    assert "Litestream 0.5: " in told
    assert "timeline 1; 1 to 2" in told
    for kind in ("litestream", "native"):
        copy = shipped.folder / f"{kind}.db"
        assert cli.run(["restore", "-o", str(copy), "--format", kind, shipped.url, *key]) == 0
        assert count(copy) == 2
    assert cli.run(["restore", "--dry-run", "-o", str(shipped.folder / "x.db"), shipped.url, *key]) == 0


def test_an_export_to_where_everything_is_to_be_encrypted_is_refused(
    shipped: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped.config()
    config = ["--config", str(shipped.folder / "replicator.yml")]
    assert cli.run(["export", *config, shipped.url, f"{shipped.url}/litestream"]) == 2
    assert "Litestream 0.5 has no encryption; export to another place" in capsys.readouterr().err
    assert not (shipped.bucket / "app" / "litestream").exists()


def test_replicating_to_a_url_does_not_take_an_identity_for_a_wish_to_encrypt(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(IDENTITY_VARIABLE, place.identity)
    assert cli.run(["replicate", "--once", str(place.database), place.url]) == 2
    error = capsys.readouterr().err
    assert "to encrypt one, name its recipients in a configuration" in error
    assert place.identity not in error


# -- on a real server --------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_an_encrypted_replica_on_a_real_server_comes_back(
    place: Place, seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    url = seaweed.url("encrypted")
    place.connection.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000) "
        "INSERT INTO unmistakable_table SELECT randomblob(9000) FROM n"
    )
    ship(place.database, place.config(url=url).databases[0].replica.open())
    place.insert()
    ship(place.database, place.config(url=url).databases[0].replica.open())
    snapshot = next(info for info in open_store(url).list("segments/") if "/9/" in info.key)
    assert snapshot.size_bytes > 100 << 20, "so that it is sent in parts"
    for info in open_store(url).list():
        assert open_store(url).get(info.key, offset=0, length=8) == b"\x89SEAL\r\n\x1a"
    key = ["--identity", str(place.key_file)]
    assert cli.run(["restore", "-o", str(place.folder / "copy.db"), url, *key]) == 0
    assert count(place.folder / "copy.db") == 12_002
    assert cli.run(["query", url, "SELECT count(*) FROM unmistakable_table WHERE rowid > 12001", *key, "--csv"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["count(*)", "1"]
