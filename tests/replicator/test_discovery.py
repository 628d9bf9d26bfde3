"""What is found in a folder: databases under unusual names, what only looks like one, and what cannot be looked at."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import apsw
import pytest
from ledger_support import restored_rows, wait_for
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    Mask,
    WatchCallback,
    WatchDescriptor,
)

from replicator import catalogue
from replicator.database import begins_as_database
from replicator.discovery import Finder
from replicator.errors import DatabaseNotReplicable, ReplicatorError
from replicator.service import Replicator
from replicator.store.memory import MemoryStore
from replicator.watch import CalmInotify, Folder
from replicator.worker import Protection


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def replicator() -> Iterator[Replicator]:
    running = Replicator(sweep_s=3600)
    running.start()
    yield running
    running.stop(5)


def make(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode=wal").fetchall()
    connection.execute("CREATE TABLE ledger (id INTEGER PRIMARY KEY, body)")
    connection.execute("INSERT INTO ledger(body) VALUES ('x')")
    connection.close()


def reasons(replicator: Replicator) -> dict[str, str]:
    """Of what is not protected, by file name."""
    found = [status for status in replicator.status() if status.protection is Protection.NOT_PROTECTED]
    return {status.path.name: status.reason for status in found}


def protected(replicator: Replicator) -> set[str]:
    return {status.path.name for status in replicator.status() if status.protection is Protection.PROTECTED}


@pytest.mark.parametrize("name", ["orders-wal", "orders-journal", "orders-shm"])
@pytest.mark.parametrize("before", [True, False])
def test_a_database_that_is_called_like_a_companion_is_replicated(
    replicator: Replicator, data: Path, tmp_path: Path, name: str, before: bool
) -> None:
    store = MemoryStore()
    if before:
        make(data / name)
    replicator.add_folder(Folder(data), store)
    if not before:
        make(data / name)
    wait_for(lambda: protected(replicator) == {name})
    wait_for(lambda: restored_rows(catalogue.replica_of(store, Path(name)), tmp_path) == [1])
    connection = apsw.Connection(str(data / name))
    connection.execute("INSERT INTO ledger(body) VALUES ('y')")
    wait_for(lambda: restored_rows(catalogue.replica_of(store, Path(name)), tmp_path) == [1, 2])
    connection.close()


def test_a_database_in_the_place_of_another_one_s_wal_is_shown_and_the_other_one_is_protected(
    replicator: Replicator, data: Path
) -> None:
    make(data / "a-wal")
    (data / "a").write_text("notes")
    make(data / "good.db")
    replicator.add_folder(Folder(data), MemoryStore())
    wait_for(lambda: protected(replicator) == {"good.db"})
    assert "rename it" in reasons(replicator)["a-wal"]


def test_a_name_that_is_not_utf8_is_shown_with_its_reason(replicator: Replicator, data: Path) -> None:
    make(data / "good.db")
    name = os.fsdecode(b"caf\xe9.db")
    (data / name).write_bytes((data / "good.db").read_bytes())
    replicator.add_folder(Folder(data), MemoryStore())
    wait_for(lambda: protected(replicator) == {"good.db"})
    assert "not valid UTF-8" in reasons(replicator)[name]
    with pytest.raises(DatabaseNotReplicable, match="UTF-8"):
        replicator.sync(data / name, 1)


def test_a_link_to_a_database_inside_is_found_by_its_own_name_and_one_that_leads_outside_is_shown(
    replicator: Replicator, data: Path, tmp_path: Path
) -> None:
    make(tmp_path / "outside.db")
    make(data / "inside.db")
    (data / "in.db").symlink_to("inside.db")
    (data / "out.db").symlink_to(tmp_path / "outside.db")
    (data / "nowhere.db").symlink_to(tmp_path / "missing.db")
    (data / "round.db").symlink_to(data / "round.db")
    replicator.add_folder(Folder(data), MemoryStore())
    wait_for(lambda: protected(replicator) == {"inside.db"})
    assert list(reasons(replicator)) == ["out.db"]
    assert "symbolic link to" in reasons(replicator)["out.db"]


def test_a_file_that_is_called_a_database_and_is_none_is_shown_until_it_goes(
    replicator: Replicator, data: Path
) -> None:
    (data / "sealed.db").write_bytes(os.urandom(8192))
    (data / "odd").write_bytes(b"not a database")
    (data / "odd-wal").write_bytes(b"")
    (data / "empty.db").touch()
    (data / "notes.txt").write_text("notes")
    make(data / "good.db")
    replicator.add_folder(Folder(data), MemoryStore())
    wait_for(lambda: protected(replicator) == {"good.db"})
    assert set(reasons(replicator)) == {"sealed.db", "odd"}
    assert "encrypted as a whole" in reasons(replicator)["sealed.db"]
    (data / "sealed.db").unlink()
    (data / "odd-wal").unlink()
    (data / "odd").unlink()
    wait_for(lambda: not reasons(replicator))


def test_a_database_that_cannot_be_read_uses_up_the_time_of_no_other_one(replicator: Replicator, data: Path) -> None:
    make(data / "good.db")
    (data / "cut.db").write_bytes((data / "good.db").read_bytes()[:100])
    replicator.add_folder(Folder(data), MemoryStore())
    wait_for(lambda: protected(replicator) == {"good.db"} and "malformed" in reasons(replicator).get("cut.db", ""))
    with apsw_connection(data / "good.db") as writer:
        writer.execute("INSERT INTO ledger(body) VALUES ('y')")
        began = time.monotonic()
        with pytest.raises(ReplicatorError, match="cut.db"):
            replicator.sync_folder(data, 20)
        assert time.monotonic() - began < 5
        good = next(status for status in replicator.status() if status.path.name == "good.db")
        assert good.durable == good.captured
    began = time.monotonic()
    replicator.stop(20)
    assert time.monotonic() - began < 5


@contextmanager
def apsw_connection(path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    yield connection
    connection.close()


def test_what_cannot_be_opened_is_shown_and_found_as_soon_as_it_can(data: Path) -> None:
    """The limit of open files stands for whatever the system refuses; root may read everything else."""
    make(data / "app.db")
    (data / "notes.txt").write_text("notes")
    finder = Finder(Folder(data))
    held = exhaust_descriptors()
    try:
        found = finder.look_at(data / "app.db", ())
        everything = finder.look(data, ())
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert found is not None and "cannot be looked at" in found.problem
    assert [each.path for each in everything] == [data] and "cannot be listed" in everything[0].problem
    assert [(each.path.name, each.problem) for each in finder.look(data, ())] == [("app.db", "")]


def exhaust_descriptors() -> list[int]:
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return held


@pytest.mark.parametrize("name", [".app.db.restoring-0123", ".app.db.restoring-0123-wal"])
def test_files_of_a_restore_are_never_taken(data: Path, name: str) -> None:
    make(data / "app.db")
    (data / name).write_bytes((data / "app.db").read_bytes())
    finder = Finder(Folder(data))
    assert [found.path.name for found in finder.look(data, ())] == ["app.db"]
    assert finder.look_at(data / name, ()) is None


def test_a_file_that_has_not_changed_is_not_opened_again(data: Path) -> None:
    opened: list[str] = []
    now_ns = time.time_ns()

    def is_database(path: Path) -> bool:
        opened.append(path.name)
        return begins_as_database(path)

    finder = Finder(Folder(data), now_ns=lambda: now_ns, is_database=is_database)
    (data / "notes.txt").write_text("notes")
    for later_s in (0, 5, 5):
        now_ns += later_s * 10**9
        assert finder.look(data, ()) == []
    assert opened == ["notes.txt", "notes.txt"]  # it had only just changed at the first look
    make(data / "new.db")
    (data / "new.db").replace(data / "notes.txt")
    assert [found.path.name for found in finder.look(data, ())] == ["notes.txt"]


def test_a_companion_of_a_live_database_is_not_opened(data: Path) -> None:
    """Closing a descriptor of the index would drop the locks that SQLite holds on it in this process."""
    writer = apsw.Connection(str(data / "app.db"))
    writer.execute("PRAGMA journal_mode=wal").fetchall()
    writer.execute("CREATE TABLE t (x)")
    writer.execute("BEGIN IMMEDIATE")
    inode = (data / "app.db-shm").stat().st_ino
    locks = locks_of(inode)
    assert locks
    assert [found.path.name for found in Finder(Folder(data)).look(data, ())] == ["app.db"]
    assert locks_of(inode) == locks
    writer.close()


def locks_of(inode: int) -> list[list[str]]:
    lines = [line.split()[1:] for line in Path("/proc/locks").read_text().splitlines()]
    return sorted(line for line in lines if any(word.endswith(f":{inode}") for word in line))


class Refusing(CalmInotify):
    """The kernel's limit of watches, which holds for folders of these names."""

    names: ClassVar[set[str]] = set()

    def _ask_kernel(self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId) -> WatchDescriptor:
        if Path(os.fsdecode(path)).name in self.names:
            raise OSError(errno.ENOSPC, "inotify watch limit reached")
        return super()._ask_kernel(path, mask, callback, id_)


@pytest.mark.parametrize("refused", ["data", "sub"])
def test_a_database_in_a_folder_that_cannot_be_watched_is_not_protected_until_it_can(
    data: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    (data / "sub").mkdir()
    make(data / "sub" / "app.db")
    monkeypatch.setattr(Refusing, "names", {refused})
    replicator = Replicator(sweep_s=0.1, inotify=Refusing)
    replicator.start()
    try:
        replicator.add_folder(Folder(data), MemoryStore())
        wait_for(lambda: "max_user_watches" in reasons(replicator).get("app.db", ""))
        assert replicator.sync(data / "sub" / "app.db", 10)  # it is shipped all the same
        assert protected(replicator) == set()
        Refusing.names.clear()
        wait_for(lambda: protected(replicator) == {"app.db"})
    finally:
        replicator.stop(5)


def test_a_folder_without_databases_that_cannot_be_watched_is_shown(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refusing, "names", {"data"})
    replicator = Replicator(sweep_s=3600, inotify=Refusing)
    replicator.start()
    try:
        replicator.add_folder(Folder(data), MemoryStore())
        assert "max_user_watches" in reasons(replicator)["data"]
    finally:
        replicator.stop(5)


def test_before_the_start_and_after_the_stop_nothing_is_protected(data: Path) -> None:
    make(data / "app.db")
    replicator = Replicator(sweep_s=3600)
    replicator.add_folder(Folder(data), MemoryStore())
    assert protected(replicator) == set()
    replicator.start()
    wait_for(lambda: protected(replicator) == {"app.db"})
    replicator.stop(5)
    assert protected(replicator) == set()


def test_lost_events_lead_to_a_look_at_everything(data: Path) -> None:
    made: list[CalmInotify] = []

    def inotify() -> CalmInotify:
        made.append(CalmInotify())
        return made[0]

    replicator = Replicator(sweep_s=3600, inotify=inotify)
    replicator.start()
    try:
        replicator.add_folder(Folder(data), MemoryStore())
        replicator._watch.remove_folder(Folder(data))
        make(data / "app.db")
        assert replicator.status() == []
        made[0].handle_event(InotifyEvent(WatchDescriptor(-1), InotifyConstants.IN_Q_OVERFLOW, 0, b""))
        wait_for(lambda: protected(replicator) == {"app.db"})
    finally:
        replicator.stop(5)
