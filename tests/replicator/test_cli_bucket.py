"""The command ``replicator`` over a real S3 server: what it prints can be given to it again."""

from __future__ import annotations

import json
from pathlib import Path

import apsw
import pytest
from support.seaweed import SeaweedServer

from replicator import Folder, Replicator, cli, open_store
from replicator.store import ObjectStore

pytestmark = pytest.mark.real


@pytest.fixture
def store(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    return open_store(seaweed.url("tenants"))


def replicate_folder(folder: Path, store: ObjectStore) -> None:
    connection = apsw.Connection(str(folder / "one.db"))
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE t(v); INSERT INTO t VALUES(7)").fetchall()
    running = Replicator(writer="test")
    running.start()
    running.add_folder(Folder(folder), store, state=folder.parent / "state")
    running.sync_folder(folder, 20)
    running.stop(20)
    connection.close()


def test_a_database_is_restored_from_the_url_that_is_listed(
    tmp_path: Path, store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tenants"
    folder.mkdir()
    replicate_folder(folder, store)
    assert cli.run(["databases", "--json", store.url]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["databases"]
    assert cli.run(["restore", "-o", str(tmp_path / "all"), store.url]) == 0
    assert (tmp_path / "all" / "one.db").exists()
    assert cli.run(["history", store.url]) == 2
    assert f"such as {listed['url']}" in capsys.readouterr().err
    assert cli.run(["restore", "-o", str(tmp_path / "copy.db"), listed["url"]]) == 0
    assert apsw.Connection(str(tmp_path / "copy.db")).execute("SELECT v FROM t").fetchall() == [(7,)]
