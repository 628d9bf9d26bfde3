"""Claims about what proves, follows and restores many encrypted replicas: with the identity as any other, without it one clear line."""

from __future__ import annotations

from pathlib import Path

import pyrage
import pytest
from ledger_support import rows, wait_for
from restore_support import ReplicaBuilder, SourceDatabase

from replicator import Replicator, catalogue, cli
from replicator.follow import Follower
from replicator.layout import SegmentRef
from replicator.restore import RestoreOptions
from replicator.store import ObjectStore
from replicator.store.file import FileStore
from replicator.store.seal import sealed
from replicator.values import Position
from replicator.worker import DatabaseStatus, WorkerSettings

NAMES = ("one.db", "eu/two.db")
LAST = 4


class Keys:
    def __init__(self, folder: Path) -> None:
        pair = pyrage.x25519.Identity.generate()
        self.recipient, self.identity = str(pair.to_public()), str(pair)
        self.file = folder / "key.txt"
        self.file.write_text(self.identity)

    def seal(self, store: ObjectStore) -> ObjectStore:
        return sealed(store, recipients=[self.recipient], identities=[self.identity])


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def write(store: ObjectStore, path: Path) -> ReplicaBuilder:
    """A snapshot, and a commit with a row for each txid up to LAST."""
    builder, source = ReplicaBuilder(store), SourceDatabase(path)
    builder.timeline(1)
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE ledger (id INTEGER PRIMARY KEY)"))
    for txid in range(2, LAST + 1):
        builder.commit(Position(1, txid), source.commit(f"INSERT INTO ledger VALUES ({txid})"))
    source.close()
    return builder


@pytest.fixture
def bucket(tmp_path: Path, keys: Keys) -> FileStore:
    """An encrypted replica of a folder with two databases."""
    store, folder = FileStore(tmp_path / "bucket"), tmp_path / "source"
    (folder / "eu").mkdir(parents=True)
    for name in NAMES:
        (folder / name).touch(0o640)
        place = catalogue.register(keys.seal(store), folder, folder / name)
        (folder / name).unlink()
        write(place, folder / name)
    return store


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.run([str(argument) for argument in arguments]) == code
    return "".join(capsys.readouterr())


def test_verify_proves_an_encrypted_replica_with_its_identity_and_says_when_it_has_none(
    bucket: FileStore, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    one = catalogue.replica_of(bucket, Path("one.db"))
    assert f"proved up to 1:{LAST}" in run(capsys, "verify", one.url, "--identity", keys.file, "--every-segment")
    assert "2 of 2 databases proved" in run(capsys, "verify", bucket.url, "--identity", keys.file)
    assert "is encrypted; give an age identity that opens it" in run(capsys, "verify", one.url, code=1)


def test_verify_names_what_is_altered_in_an_encrypted_replica_and_what_remains(
    bucket: FileStore, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    one = catalogue.replica_of(bucket, Path("one.db"))
    ReplicaBuilder(one).damage(SegmentRef(1, 0, LAST, LAST), lambda body: body[:-1] + bytes([body[-1] ^ 1]))
    said = run(capsys, "verify", one.url, "--identity", keys.file, code=1)
    assert "is encrypted and damaged" in said and f"what remains restorable: proved up to 1:{LAST - 1}" in said


def test_what_was_downloaded_of_an_altered_encrypted_replica_is_not_kept_for_another_try(
    bucket: FileStore, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = catalogue.replica_of(bucket, Path("one.db"))
    ReplicaBuilder(one).damage(SegmentRef(1, 9, 1, 1), lambda body: body[:-1] + bytes([body[-1] ^ 1]))
    (tmp_path / "out").mkdir()
    said = run(capsys, "restore", "-o", tmp_path / "out" / "x.db", one.url, "--identity", keys.file, code=1)
    assert "is encrypted and damaged" in said
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_and_a_configuration_come_back_with_the_identity(
    bucket: FileStore, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said = run(capsys, "restore", "-o", out, bucket.url, "--identity", keys.file)
    assert "2 of 2 databases done" in said
    assert [rows(out / name) for name in NAMES] == [list(range(2, LAST + 1))] * 2
    assert (out / "one.db").stat().st_mode & 0o777 == 0o640
    one = catalogue.replica_of(bucket, Path("one.db"))
    run(capsys, "restore", "-o", out / "alone.db", one.url, "--identity", keys.file)
    assert (out / "alone.db").stat().st_mode & 0o777 == 0o640
    config = tmp_path / "r.yml"
    config.write_text(
        f"dbs:\n- dir: {tmp_path}/again\n  recursive: true\n  replica: {{url: '{bucket.url}'}}\n"
        f"- path: {tmp_path}/single.db\n  replica: {{url: '{one.url}'}}\n"
    )
    assert "3 of 3" in run(capsys, "restore", "--all", "--config", config, "--identity", keys.file)
    assert rows(tmp_path / "again" / "eu" / "two.db") == rows(tmp_path / "single.db")
    assert "give an age identity" in run(capsys, "restore", "-o", tmp_path / "none", bucket.url, code=1)


def test_a_copy_follows_an_encrypted_replica(tmp_path: Path, keys: Keys) -> None:
    inner = FileStore(tmp_path / "bucket")
    builder, source = ReplicaBuilder(keys.seal(inner)), SourceDatabase(tmp_path / "source.db")
    builder.timeline(1)
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE ledger (id INTEGER PRIMARY KEY)"))
    follower = Follower(sealed(inner, identities=[keys.identity]), tmp_path / "copy.db", RestoreOptions())
    follower.open()
    for txid in (2, 3):
        builder.commit(Position(1, txid), source.commit(f"INSERT INTO ledger VALUES ({txid})"))
        assert follower.step().position == Position(1, txid)
    follower.close()
    source.close()
    assert rows(tmp_path / "copy.db") == [2, 3]


def test_trial_restores_prove_an_encrypted_replica_and_have_a_damaged_one_begin_anew(
    tmp_path: Path, keys: Keys
) -> None:
    inner, path = FileStore(tmp_path / "bucket"), tmp_path / "app.db"
    source = SourceDatabase(path)
    source.commit("CREATE TABLE ledger (id INTEGER PRIMARY KEY)")
    source.close()
    running = Replicator()

    def proved_on(timeline: int) -> DatabaseStatus | None:
        (status,) = running.status()
        trial = status.trial
        is_proved = trial is not None and not trial.problem and Position.parse(trial.position).timeline == timeline
        return status if is_proved else None

    running.start()
    try:
        running.add(path, keys.seal(inner), settings=WorkerSettings(trial_every_s=0.05))
        running.sync(path, 20)
        wait_for(lambda: proved_on(1))
        for info in list(inner.list("segments/00000001/")):
            body = inner.get(info.key)
            inner.put(info.key, body[:-1] + bytes([body[-1] ^ 1]))
        wait_for(lambda: proved_on(2))
    finally:
        running.stop(5)
