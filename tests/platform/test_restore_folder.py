"""Claims about the restore of a volume's databases into a directory in which an app has left links."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from minipaas.backups import restore_folder
from minipaas.errors import PlatformError
from replicator import Folder, Replicator
from replicator.store.memory import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """The replica of a volume with two databases."""
    volume, store = tmp_path / "lost", MemoryStore()
    for path in (volume / "sub" / "x.db", volume / "y.db"):
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = apsw.Connection(str(path))
        connection.execute("PRAGMA journal_mode=wal; CREATE TABLE t (x)").fetchall()
        connection.close()
    replicator = Replicator()
    replicator.start()
    try:
        replicator.add_folder(Folder(volume), store, state=tmp_path / "state")
        replicator.sync_folder(volume, 10)
    finally:
        replicator.stop(5)
    return store


def test_a_restore_follows_no_link_out_of_the_volume_and_brings_back_the_rest(
    store: MemoryStore, tmp_path: Path
) -> None:
    volume, host = tmp_path / "volume", tmp_path / "host"
    for folder in (volume, host):
        folder.mkdir()
    (volume / "sub").symlink_to(host)
    with pytest.raises(PlatformError, match="is a symbolic link; remove it"):
        restore_folder(store, volume, tmp_path / "local", "a volume", lambda words: None)
    assert list(host.iterdir()) == []
    assert (volume / "y.db").is_file()


def test_owner_and_mode_are_not_given_to_what_a_link_names(store: MemoryStore, tmp_path: Path) -> None:
    volume, secret = tmp_path / "volume", tmp_path / "secret"
    volume.mkdir()
    secret.write_text("of the host")
    secret.chmod(0o600)
    (volume / "y.db").symlink_to(secret)
    restore_folder(store, volume, tmp_path / "local", "a volume", lambda words: None)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_text() == "of the host"
