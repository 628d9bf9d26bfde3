"""Claims about restores that are interrupted, and about segments that vanish under them: nothing is downloaded twice."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from restore_support import ReplicaBuilder

from replicator.errors import NoRoom, RestoreError, StoreUnavailable
from replicator.layout import SegmentRef
from replicator.partial import Partial, take_journal
from replicator.restore import RestoreOptions, plan_restore, restore
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore
from replicator.values import Position

PAGES = 2000
RESUME = RestoreOptions(resume=True, integrity_check="none")
KILLED = """
import os, signal, sys
from pathlib import Path
from replicator.restore import RestoreOptions, restore
from replicator.store.file import FileStore
def die(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
options = RestoreOptions(resume=True, integrity_check="none", parallelism=2)
restore(FileStore(Path(sys.argv[1])), Path(sys.argv[2]), options, on_progress=die)
"""


@pytest.fixture
def state() -> bytes:
    return os.urandom(4096 * PAGES)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def builder(store: MemoryStore, state: bytes) -> ReplicaBuilder:
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    builder.snapshot(Position(1, 1), state)
    return builder


def fail_in_the_middle(store: MemoryStore, target: Path) -> None:
    seen = []

    def fail(operation: str, key: str) -> None:
        if operation == "get" and key.endswith(".seg"):
            seen.append(key)
            if len(seen) > 5:
                raise StoreUnavailable("the store is away")

    store.before = fail
    with pytest.raises(StoreUnavailable):
        restore(store, target, RestoreOptions(resume=True, parallelism=1, integrity_check="none"))
    store.before = lambda operation, key: None


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_restore_goes_on_where_it_ended(tmp_path: Path, state: bytes) -> None:
    store = FileStore(tmp_path / "bucket")
    ReplicaBuilder(store).snapshot(Position(1, 1), state)
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "bucket"), str(folder / "app.db")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert left(folder) == [".app.db.restoring-partial", ".app.db.restoring-partial.pages"]
    report = restore(store, folder / "app.db", RESUME)
    assert (folder / "app.db").read_bytes() == state
    assert report.downloaded_bytes < 0.6 * plan_restore(store, RestoreOptions()).download_bytes
    assert left(folder) == ["app.db"]


def test_a_store_that_fails_leaves_what_was_downloaded(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path, state: bytes
) -> None:
    target = tmp_path / "app.db"
    fail_in_the_middle(store, target)
    assert not target.exists()
    assert restore(store, target, RESUME).downloaded_bytes < 0.8 * len(state)
    assert target.read_bytes() == state


def test_a_restore_that_goes_on_reaches_the_position_that_is_newest_now(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path, state: bytes
) -> None:
    target = tmp_path / "app.db"
    fail_in_the_middle(store, target)
    shorter = state[: 4096 * 700] + os.urandom(4096 * 300)
    builder.commit(Position(1, 2), shorter)
    builder.commit(Position(1, 3), shorter + os.urandom(4096 * 100))
    restore(store, target, RESUME)
    assert target.read_bytes() == builder.states[Position(1, 3)]


def test_what_was_spoiled_meanwhile_is_found_and_downloaded_anew(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path, state: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "app.db"
    fail_in_the_middle(store, target)
    with (tmp_path / ".app.db.restoring-partial").open("r+b") as file:
        file.seek(8000)
        file.write(b"spoiled")
    restore(store, target, RESUME)
    assert target.read_bytes() == state
    assert "downloaded anew" in caplog.text


@pytest.mark.parametrize("keep", [0, 1, 20, 200])
def test_a_torn_journal_costs_a_download_and_nothing_else(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path, state: bytes, keep: int
) -> None:
    target = tmp_path / "app.db"
    fail_in_the_middle(store, target)
    journal = tmp_path / ".app.db.restoring-partial.pages"
    journal.write_bytes(journal.read_bytes()[:keep])
    restore(store, target, RESUME)
    assert target.read_bytes() == state


def test_what_is_left_of_another_database_is_not_used(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path
) -> None:
    target = tmp_path / "app.db"
    fail_in_the_middle(store, target)
    other = ReplicaBuilder(MemoryStore())
    other.snapshot(Position(1, 1), os.urandom(4096 * 50), database="f" * 32)
    restore(other.store, target, RESUME)
    assert target.read_bytes() == other.states[Position(1, 1)]


def test_a_full_disk_costs_nothing_of_what_is_there(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path, state: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "app.db"
    fail_in_the_middle(store, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2, f_frsize=4096))
        with pytest.raises(NoRoom, match="needs 7.8 MiB in .*, where 8.0 KiB are free"):
            restore(store, target, RESUME)
    assert restore(store, target, RESUME).downloaded_bytes < 0.8 * len(state)
    assert target.read_bytes() == state


def test_a_restore_that_got_nothing_leaves_nothing(builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path) -> None:
    def fail(operation: str, key: str) -> None:
        raise StoreUnavailable("the store is away")

    store.before = fail
    with pytest.raises(StoreUnavailable):
        restore(store, tmp_path / "app.db", RESUME)
    assert left(tmp_path) == []


def test_two_restores_never_write_one_file(builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path) -> None:
    fail_in_the_middle(store, tmp_path / "app.db")
    descriptor = take_journal(tmp_path / ".app.db.restoring-partial.pages")
    with pytest.raises(RestoreError, match="another restore to this place is under way"):
        restore(store, tmp_path / "app.db", RESUME)
    os.close(descriptor)
    restore(store, tmp_path / "app.db", RESUME)


def test_segments_that_vanish_one_after_the_other_cost_no_second_download(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path, state: bytes
) -> None:
    """As while a long history is merged: each plan runs into the next segment that is gone."""
    now = state
    for txid in range(2, 8):
        now = now[: 4096 * txid] + os.urandom(4096) + now[4096 * (txid + 1) :]
        builder.commit(Position(1, txid), now)
    merged: list[SegmentRef] = []

    def merge(operation: str, key: str) -> None:
        txid = 7 - len(merged)
        if operation == "get" and key == SegmentRef(1, 0, txid, txid).key and txid > 3:
            merged.append(builder.increment(Position(1, txid), 2, level=len(merged) + 1))
            store.delete([key])

    store.before = merge
    report = restore(store, tmp_path / "app.db", RestoreOptions(integrity_check="none", parallelism=1))
    assert (tmp_path / "app.db").read_bytes() == now
    assert len(merged) >= 1
    assert report.downloaded_bytes < 1.2 * len(state)


def test_pages_are_known_by_the_segment_that_wrote_them_last(tmp_path: Path) -> None:
    one, other = SegmentRef(1, 9, 1, 1), SegmentRef(1, 0, 2, 2)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    journal = take_journal(tmp_path / "journal")
    partial = Partial(fd, journal)
    partial.prepare("f" * 32, 512, 10)
    pages = np.arange(1, 11, dtype=np.uint32)
    partial.wrote(one, pages)
    partial.wrote(other, pages[2:4])
    partial.prepare("f" * 32, 512, 8)
    partial.prepare("f" * 32, 512, 10)
    again = Partial(fd, journal)
    for each in (partial, again):
        assert each.missing(one, pages).tolist() == [3, 4, 9, 10]
        assert each.missing(other, pages).tolist() == [1, 2, 5, 6, 7, 8, 9, 10]
    os.close(fd)
    os.close(journal)


def test_the_file_gets_the_owner_and_mode_that_are_given(
    builder: ReplicaBuilder, store: MemoryStore, tmp_path: Path
) -> None:
    options = RestoreOptions(mode=0o640, owner=(12345, 23456), integrity_check="none")
    restore(store, tmp_path / "app.db", options)
    found = (tmp_path / "app.db").stat()
    if os.getuid() == 0:
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 23456, 0o640)
    else:
        assert stat.S_IMODE(found.st_mode) == 0o600
