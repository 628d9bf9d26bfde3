"""Claims about bringing the databases of a volume back: none is passed over, and none keeps the others from coming back."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from minipaas.backups import restore_folder
from replicator import Folder, Replicator, ReplicatorError
from replicator.store.memory import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """A volume's replica with a.db and deep/b.db, of three rows each."""
    store, directory = MemoryStore(), tmp_path / "volume"
    (directory / "deep").mkdir(parents=True)
    for name in ("a.db", "deep/b.db"):
        connection = apsw.Connection(str(directory / name))
        connection.execute("PRAGMA journal_mode=wal").fetchall()
        connection.execute("CREATE TABLE t (n); INSERT INTO t VALUES (1), (2), (3)").fetchall()
        if name == "a.db":
            connection.execute("INSERT INTO t VALUES (NULL); PRAGMA writable_schema=on").fetchall()
            connection.execute("UPDATE sqlite_schema SET sql = 'CREATE TABLE t (n NOT NULL)'").fetchall()
        connection.close()
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    try:
        replicator.add_folder(Folder(directory), store, state=tmp_path / "state")
        replicator.sync_folder(directory, 20)
    finally:
        replicator.stop()
    return store


def restored(store: MemoryStore, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Names of what came back, and what was said."""
    directory, said = tmp_path / "restored", list[str]()
    directory.mkdir()
    restore_folder(store, directory, tmp_path / "local", "volume data", said.append)
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*.db")), said


def test_a_database_that_breaks_its_own_constraints_comes_back_as_it_was(store: MemoryStore, tmp_path: Path) -> None:
    names, said = restored(store, tmp_path)
    assert names == ["a.db", "deep/b.db"]
    assert any("a.db of volume data: as it was, though SQLite complains" in line for line in said)


def test_a_database_whose_entry_is_lost_or_damaged_comes_back(store: MemoryStore, tmp_path: Path) -> None:
    store.delete(["databases/a.db"])
    store.put("databases/deep=2Fb.db", b"no JSON")
    names, _ = restored(store, tmp_path)
    assert names == ["a.db", "deep/b.db"]
    owner = (tmp_path / "restored").stat()
    status = (tmp_path / "restored" / "a.db").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (owner.st_uid, owner.st_gid, 0o600)


def test_a_database_whose_timeline_record_is_lost_comes_back(store: MemoryStore, tmp_path: Path) -> None:
    store.delete(["db/a.db/timelines/00000001.json"])
    assert restored(store, tmp_path)[0] == ["a.db", "deep/b.db"]


def test_a_database_of_which_nothing_was_ever_whole_is_left_out(store: MemoryStore, tmp_path: Path) -> None:
    keys = [info.key for info in store.list("db/a.db/segments/")]
    store.delete(keys)
    names, said = restored(store, tmp_path)
    assert names == ["deep/b.db"]
    assert any("a.db of volume data: nothing of it was ever whole" in line for line in said)


def test_one_that_fails_keeps_no_other_from_coming_back(store: MemoryStore, tmp_path: Path) -> None:
    store.put("db/a.db/timelines/00000001.json", b"damaged")
    with pytest.raises(ReplicatorError, match="00000001.json"):
        restored(store, tmp_path)
    assert (tmp_path / "restored" / "deep" / "b.db").exists()
