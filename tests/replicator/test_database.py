"""Claims about how live databases are opened: locks are kept, nothing is left behind, and the WAL holds still."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from ledger_support import App, app

from replicator.database import Journal, LiveDatabase, begins_as_database
from replicator.errors import DatabaseBusy, DatabaseError, DatabaseMissing, DatabaseNotReplicable, NotADatabase


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.db"


@pytest.fixture
def writer(path: Path) -> Iterator[App]:
    with app(path, "journal_mode=wal", "wal_autocheckpoint=0") as running:
        running.insert(20)
        yield running


@pytest.fixture
def live(path: Path, writer: App) -> Iterator[LiveDatabase]:
    database = LiveDatabase(path)
    yield database
    database.close()


def posix_locks(path: Path) -> int:
    """How many locks this process holds on the file."""
    inode, pid = path.stat().st_ino, os.getpid()
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sum(int(words[4]) == pid and words[5].endswith(f":{inode}") for words in lines if "->" not in words)


def leave_wal_mode(path: Path) -> str:
    """What another process is told that wants to switch the WAL off, which takes every lock there is."""
    code = f"import apsw; print(apsw.Connection({str(path)!r}).execute('PRAGMA journal_mode=delete').get)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


# -- locks -------------------------------------------------------------------------------------------------------------


def test_closing_drops_no_lock_of_an_application_in_the_same_process(path: Path) -> None:
    application = apsw.Connection(str(path))
    application.execute("PRAGMA journal_mode=wal; CREATE TABLE t(x)").fetchall()
    held = posix_locks(path)
    assert held
    database = LiveDatabase(path)
    database.acquire()
    database.read_pages(1, 1)
    database.close()
    assert begins_as_database(path)
    assert posix_locks(path) == held
    assert "BusyError" in leave_wal_mode(path)
    application.execute("INSERT INTO t VALUES (1)")
    application.close()
    assert leave_wal_mode(path) == ""


def test_looking_at_a_file_opens_no_pipe_and_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(DatabaseError, match="not a regular file|no such file"):
            begins_as_database(tmp_path / name)


def test_a_failed_opening_leaves_no_descriptor(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(NotADatabase):
            LiveDatabase(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_while_the_lock_is_held_no_checkpoint_starts_the_wal_anew(writer: App, live: LiveDatabase) -> None:
    live.acquire()
    header = live.wal_header()
    for mode in ("passive", "full", "restart", "truncate"):
        writer.run(f"PRAGMA busy_timeout=10; PRAGMA wal_checkpoint({mode})")
        writer.insert(1)
    assert live.wal_header() == header


def test_the_lock_goes_hand_over_hand_without_a_gap(path: Path, writer: App, live: LiveDatabase) -> None:
    live.acquire()
    header = live.wal_header()
    for _ in range(5):
        writer.insert(1)
        live.pass_lock()
        assert live.holds_lock
    writer.try_run("PRAGMA busy_timeout=10", "PRAGMA wal_checkpoint(truncate)")
    assert live.wal_header() == header


def test_a_checkpoint_lets_the_next_commit_start_the_wal_anew(writer: App, live: LiveDatabase) -> None:
    drained: list[int] = []
    live.acquire()
    before = live.wal_header()
    result = live.checkpoint(lambda: drained.append(live.committed_frames()))
    assert result.complete and result.barrier_s < 0.25
    assert len(drained) == 3
    writer.insert(1)
    after = live.wal_header()
    assert before and after and before.salt1 + 1 == after.salt1


def test_after_a_checkpoint_sqlite_itself_leaves_the_file_as_it_was_under_the_barrier(
    path: Path, writer: App, live: LiveDatabase
) -> None:
    live.acquire()
    rest = live.checkpoint(lambda: None).rest
    writer.insert(5)
    writer.run("PRAGMA wal_checkpoint(PASSIVE)")
    live.truncate_wal()
    assert rest == live.stamp()
    path.write_bytes(path.read_bytes())
    assert not rest.same_content(live.stamp())


def test_a_checkpoint_under_a_long_write_is_put_off(writer: App, live: LiveDatabase) -> None:
    live.acquire()
    writer.run("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseBusy):
        live.checkpoint(lambda: None)
    writer.run("ROLLBACK")
    assert live.checkpoint(lambda: None).complete


def test_an_older_reader_makes_a_checkpoint_incomplete(path: Path, writer: App, live: LiveDatabase) -> None:
    with app(path) as reader:
        reader.run("BEGIN", "SELECT count(*) FROM ledger")
        writer.insert(1)
        live.acquire()
        assert not live.checkpoint(lambda: None).complete
        reader.run("COMMIT")
        assert live.checkpoint(lambda: None).complete


# -- what cannot be opened ---------------------------------------------------------------------------------------------


def test_a_missing_and_an_empty_file_have_words_of_their_own(path: Path) -> None:
    with pytest.raises(DatabaseMissing, match="no such file"):
        LiveDatabase(path)
    path.touch()
    with pytest.raises(NotADatabase, match="is empty"):
        LiveDatabase(path)


def test_a_symbolic_link_is_refused_with_the_name_of_its_target(path: Path, writer: App) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with pytest.raises(DatabaseNotReplicable, match=f"symbolic link; replicate the file that it names: {path}"):
        LiveDatabase(link)


def test_a_second_name_of_an_open_file_is_refused(path: Path, live: LiveDatabase) -> None:
    alias = path.with_name("alias.db")
    alias.hardlink_to(path)
    with pytest.raises(DatabaseNotReplicable, match=f"same file as {path}"):
        LiveDatabase(alias)


def test_an_exclusive_lock_is_named_as_the_reason(path: Path) -> None:
    with app(path, "locking_mode=exclusive", "journal_mode=wal") as hog:
        hog.insert(1)
        with pytest.raises(DatabaseBusy, match="locking_mode=EXCLUSIVE"):
            LiveDatabase(path)
    LiveDatabase(path).close()


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.db"))
    path.write_bytes(b"SQLite format 3\x00".ljust(4096, b"\0"))
    with pytest.raises(DatabaseNotReplicable, match="UTF-8"):
        begins_as_database(path)
    with pytest.raises(DatabaseError, match="UTF-8"):
        LiveDatabase(path)


# -- no footprint ------------------------------------------------------------------------------------------------------


def test_opening_reading_and_checkpoints_leave_the_file_as_it_would_be_without_us(path: Path, writer: App) -> None:
    schema = writer.run("SELECT sql FROM sqlite_schema")
    twin = path.with_name("twin.db")
    twin.write_bytes(path.read_bytes())
    Path(f"{twin}-wal").write_bytes(Path(f"{path}-wal").read_bytes())
    with app(twin) as unwatched:
        unwatched.empty_wal()
    database = LiveDatabase(path)
    database.acquire()
    assert database.checkpoint(lambda: None).complete
    database.close()
    assert path.read_bytes() == twin.read_bytes()
    assert writer.run("SELECT sql FROM sqlite_schema") == schema
    assert writer.run("PRAGMA wal_autocheckpoint") == [0]
    assert writer.run("PRAGMA journal_mode") == ["wal"]


def test_a_database_without_a_wal_is_told_apart(path: Path) -> None:
    with app(path, "page_size=512", "journal_mode=truncate") as writer:
        writer.insert(1)
        database = LiveDatabase(path)
        assert (database.journal, database.page_size) == (Journal.ROLLBACK, 512)
        writer.run("PRAGMA page_size=8192", "VACUUM")
        database.acquire()
        assert database.page_size == 8192
        database.close()


def test_another_wal_at_the_path_is_not_deleted_when_the_database_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    writer = apsw.Connection(str(path))
    writer.execute("PRAGMA journal_mode=wal").fetchall()
    writer.execute("CREATE TABLE t (n)")
    database = LiveDatabase(path)
    database.acquire()
    writer.close()
    wal = tmp_path / "app.db-wal"
    wal.unlink()
    wal.write_bytes(b"of an application")
    database.close()
    assert wal.read_bytes() == b"of an application"


def test_a_link_that_takes_the_place_of_a_folder_leads_to_no_database_outside(tmp_path: Path, writer: App) -> None:
    volume, host = tmp_path / "volume", tmp_path / "host"
    for folder in (volume / "sub", host):
        folder.mkdir(parents=True)
        with app(folder / "x.db", "journal_mode=wal") as maker:
            maker.insert(1)
    inside = LiveDatabase(volume / "sub" / "x.db", volume)
    (volume / "sub").rename(volume / "old")
    (volume / "sub").symlink_to(host)
    assert not inside.still_at_path()
    inside.close()
    with pytest.raises(DatabaseMissing):
        LiveDatabase(volume / "sub" / "x.db", volume)
    LiveDatabase(volume / "old" / "x.db", volume).close()


def test_what_sqlite_opens_must_be_the_file_that_was_looked_at(tmp_path: Path, path: Path, writer: App) -> None:
    """A link may be there for just that moment."""
    database = LiveDatabase(path, path.parent)
    try:
        with app(tmp_path / "hosts.db", "journal_mode=wal") as other:
            other.insert(1)
            other.close()
        path.rename(path.with_name("away.db"))
        (tmp_path / "hosts.db").rename(path)
        with pytest.raises(DatabaseBusy, match="was replaced while it was opened"):
            database._connect()
    finally:
        path.with_name("away.db").rename(path)
        database.close()
