"""Claims about the past as SQL: what it gives, what it fetches, how it fails. Real SQLite databases in a memory store."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from restore_support import DATABASE, STEP_MS, T0_MS, ReplicaBuilder, SourceDatabase
from support.seaweed import SeaweedServer

from replicator import (
    NothingToRestore,
    ObjectMissing,
    ObjectStore,
    Past,
    PastIsReadOnly,
    Position,
    QueryFailed,
    RestoreOptions,
    StoreUnavailable,
    UsageError,
    open_past,
    open_store,
    restore,
)
from replicator.errors import SegmentDamaged
from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.past import Columns, run
from replicator.segment import SegmentHeader, SegmentWriter
from replicator.store.memory import MemoryStore

CONTENT = "SELECT count(*), sum(id), sum(length(v)), sum(unicode(hex(v))) FROM t"


def at(txid: int, timeline: int = 1) -> RestoreOptions:
    return RestoreOptions(position=Position(timeline, txid))


def rows(past: Past, sql: str) -> list[tuple[object, ...]]:
    connection = past.connect()
    try:
        return [row for row in run(connection, sql) if not isinstance(row, Columns)]
    finally:
        connection.close()


def file_rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    connection = apsw.Connection(str(path))
    try:
        return list(connection.execute(sql))
    finally:
        connection.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("past")


@pytest.fixture
def builder(store: MemoryStore) -> ReplicaBuilder:
    found = ReplicaBuilder(store)
    found.timeline(1)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceDatabase]:
    found = SourceDatabase(tmp_path / "source.db")
    yield found
    found.close()


def small_history(builder: ReplicaBuilder, source: SourceDatabase) -> None:
    """Positions 1:1 to 1:4 with 0, 100, 200 and 300 rows of 500 bytes."""
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    for txid in (2, 3, 4):
        builder.commit(Position(1, txid), source.insert(txid * 1000, txid * 1000 + 99, 500))


def large_snapshot(builder: ReplicaBuilder, source: SourceDatabase, rows: int = 12_000) -> int:
    """Position 1:1 with ``rows`` rows of a KiB that do not compress; the size of the database."""
    source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    state = source.insert(1, rows, 1000)
    builder.snapshot(Position(1, 1), state)
    return len(state)


# -- what it gives -----------------------------------------------------------------------------------------------------


def random_history(chance: random.Random, source: SourceDatabase, builder: ReplicaBuilder) -> int:
    """Commits of all kinds, snapshots and longer segments here and there; the last txid."""
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
    txid = 1
    for _ in range(10):
        txid += 1
        low = chance.randrange(1000)
        kind = chance.choice(("insert", "insert", "delete", "update", "vacuum"))
        if kind == "insert":
            state = source.insert(
                txid * 10_000, txid * 10_000 + chance.randrange(1, 60), chance.choice((10, 300, 9000))
            )
        elif kind == "delete":
            state = source.commit(f"DELETE FROM t WHERE id % 7 = {low % 7}")
        elif kind == "update":
            state = source.commit(f"UPDATE t SET v = zeroblob({low}) WHERE id % 5 = {low % 5}")
        else:
            state = source.vacuum()
        builder.commit(Position(1, txid), state)
        if chance.random() < 0.3 and txid > 3:
            builder.increment(Position(1, txid), chance.randrange(2, txid))
        if chance.random() < 0.15:
            builder.snapshot(Position(1, txid))
    return txid


@pytest.mark.parametrize(
    ("seed", "page_size"),
    [
        (1, 512),
        (2, 4096),
        *(pytest.param(n, size, marks=pytest.mark.slow) for n, size in [(3, 65536), (4, 1024), (5, 4096)]),
    ],
)
def test_every_position_of_a_random_history_is_what_a_restore_gives(
    tmp_path: Path, store: MemoryStore, seed: int, page_size: int
) -> None:
    builder = ReplicaBuilder(store, page_size)
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "source.db", page_size)
    last = random_history(random.Random(seed), source, builder)
    source.close()
    for txid in range(1, last + 1):
        restored = tmp_path / f"{txid}.db"
        restore(store, restored, at(txid))
        with open_past(store, at(txid), cache_bytes=1 << 20) as past:
            assert past.pages.read(0, 1 << 40) == restored.read_bytes()
            assert rows(past, CONTENT) == file_rows(restored, CONTENT)
            assert rows(past, "PRAGMA integrity_check") == [("ok",)]


def test_a_moment_and_a_txid_and_the_newest_are_reached_as_by_a_restore(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    small_history(builder, source)
    wishes = {None: 4, RestoreOptions(at_ms=T0_MS + 3 * STEP_MS + 1): 3, RestoreOptions(txid=2): 2}
    for options, txid in wishes.items():
        with open_past(store, options) as past:
            assert (past.position, past.reached_ms) == (Position(1, txid), T0_MS + txid * STEP_MS)
            assert rows(past, "SELECT count(*) FROM t") == [((txid - 1) * 100,)]


def test_an_empty_database_has_no_tables(store: MemoryStore, builder: ReplicaBuilder) -> None:
    builder.snapshot(Position(1, 1), b"")
    with open_past(store) as past:
        assert rows(past, "SELECT * FROM sqlite_schema; SELECT 7") == [(7,)]


def test_the_file_is_the_committed_one_but_for_the_mark_of_a_wal(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    small_history(builder, source)
    with open_past(store) as past:
        assert past.pages.read(18, 2) == b"\x02\x02"
        assert rows(past, "PRAGMA journal_mode") == [("delete",)]
        assert rows(past, "PRAGMA page_count") == [(past.pages.page_count,)]


@pytest.mark.slow
def test_the_lock_page_reads_as_zeros_and_what_follows_is_right(store: MemoryStore, builder: ReplicaBuilder) -> None:
    size, count = 65536, 16386
    lock = 16385
    ref = SegmentRef(1, SNAPSHOT_LEVEL, 1, 1)
    header = SegmentHeader(DATABASE, 1, 1, 1, True, size, count, 0, T0_MS, T0_MS, 0, 1)
    out = io.BytesIO()
    writer = SegmentWriter(out, header, level=1)
    for page_no in range(1, count + 1):
        if page_no != lock:
            writer.add(page_no, page_no.to_bytes(4, "big") * (size // 4))
    writer.finish()
    store.put(ref.key, out.getvalue())
    with open_past(store) as past:
        around = [past.pages.page(page_no)[:4].tobytes() for page_no in (lock - 1, lock, lock + 1)]
        assert around == [(lock - 1).to_bytes(4, "big"), bytes(4), (lock + 1).to_bytes(4, "big")]


def test_several_statements_give_their_columns_also_without_a_row(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    small_history(builder, source)
    with open_past(store) as past:
        connection = past.connect()
        sql = "SELECT 1 AS a; CREATE TEMP TABLE x(y); SELECT y FROM x; SELECT min(id), 2 AS b FROM t; SELECT 3 AS c WHERE 0"
        assert list(run(connection, sql)) == [
            Columns(("a",)),
            (1,),
            Columns(("y",)),
            Columns(("min(id)", "b")),
            (2000, 2),
            Columns(("c",)),
        ]
        connection.close()


def test_two_positions_can_be_attached_to_one_connection(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    small_history(builder, source)
    with open_past(store, at(2)) as old, open_past(store, at(4)) as new:
        connection = new.connect()
        connection.execute(f"ATTACH '{old.uri}' AS old")
        assert connection.execute("SELECT count(*) FROM main.t EXCEPT SELECT count(*) FROM old.t").get == 300
        connection.close()


def test_connections_in_several_threads_share_what_was_fetched(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    large_snapshot(builder, source, 4000)
    found: list[object] = []
    with open_past(store) as past:
        threads = [threading.Thread(target=lambda: found.append(rows(past, CONTENT))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert found[0] == found[1] == found[2] == found[3]
        assert past.fetched.size_bytes < 1.2 * 4000 * 1100


# -- what it fetches ---------------------------------------------------------------------------------------------------


def test_a_lookup_fetches_little_of_a_large_database(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    size_bytes = large_snapshot(builder, source)
    with open_past(store) as past:
        assert rows(past, "SELECT length(v) FROM t WHERE id = 7777") == [(1000,)]
        assert size_bytes > 12_000_000
        assert past.fetched.size_bytes < 900_000


def test_a_scan_is_read_ahead_in_few_requests(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    size_bytes = large_snapshot(builder, source)
    with open_past(store) as past:
        opened = past.fetched.requests
        assert rows(past, "SELECT count(*), sum(length(v)) FROM t") == [(12_000, 12_000_000)]
        assert past.fetched.requests - opened < size_bytes / 262_144 / 3
        assert past.fetched.size_bytes < 1.1 * size_bytes


def test_pages_that_newer_segments_have_are_not_fetched_from_the_snapshot(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    large_snapshot(builder, source, 6000)
    builder.commit(Position(1, 2), source.commit("UPDATE t SET v = zeroblob(1000)"))
    with open_past(store) as past:
        assert rows(past, "SELECT sum(v = zeroblob(1000)) FROM t") == [(6000,)]
        assert past.fetched.size_bytes < 1_500_000


def test_nothing_but_reading_is_asked_of_the_store(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    small_history(builder, source)
    before = len(store.calls)
    with open_past(store) as past:
        rows(past, CONTENT)
    assert {operation for operation, _ in store.calls[before:]} == {"list", "get"}


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1, 1)",
        "CREATE TABLE u(x)",
        "DROP TABLE t",
        "PRAGMA user_version = 7",
        "VACUUM",
        "VACUUM INTO '{there}'",
        "ATTACH '{there}' AS there; CREATE TABLE there.u(x)",
        "ATTACH 'file:{there}?vfs=unix' AS there",
        "PRAGMA temp_store = file",
    ],
)
def test_writes_are_refused_and_leave_no_file(
    tmp_path: Path, store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase, sql: str
) -> None:
    small_history(builder, source)
    there = tmp_path / "there.db"
    with open_past(store) as past:
        with pytest.raises(PastIsReadOnly, match="can only be read"):
            rows(past, sql.format(there=there))
    assert not there.exists()


def test_an_error_in_the_sql_is_one_line_of_ours(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    small_history(builder, source)
    with open_past(store) as past:
        with pytest.raises(QueryFailed, match="no such table: u"):
            rows(past, "SELECT * FROM u")
        with pytest.raises(QueryFailed, match="CAST"):
            rows(past, "SELECT CAST(x'ff' AS TEXT)")


def test_a_past_that_was_closed_says_so(store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase) -> None:
    large_snapshot(builder, source, 1000)
    past = open_past(store)
    connection = past.connect()
    connection.execute("SELECT 1 FROM sqlite_schema").fetchall()
    past.close()
    with pytest.raises(UsageError, match="closed"):
        connection.execute("SELECT sum(length(v)) FROM t").fetchall()
    connection.close()


def test_where_nothing_is_there_is_nothing_to_open(store: MemoryStore) -> None:
    with pytest.raises(NothingToRestore):
        open_past(store)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def flipped(body: bytes) -> bytes:
    """A byte in the middle of the groups is another."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def test_a_damaged_group_is_named_and_not_a_disk_error(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    large_snapshot(builder, source, 2000)
    ref = SegmentRef(1, SNAPSHOT_LEVEL, 1, 1)
    builder.damage(ref, flipped)
    with open_past(store) as past, pytest.raises(SegmentDamaged, match=ref.key):
        rows(past, CONTENT)


def test_a_damaged_group_is_gone_around_when_others_lead_to_the_position(
    tmp_path: Path, store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    large_snapshot(builder, source, 2000)
    builder.commit(Position(1, 2), source.commit("UPDATE t SET v = x'00' WHERE id % 9 = 0"))
    newer = builder.snapshot(Position(1, 2))
    builder.damage(newer, flipped)
    restore(store, tmp_path / "restored.db", at(2))
    with open_past(store, at(2)) as past:
        assert rows(past, CONTENT) == file_rows(tmp_path / "restored.db", CONTENT)


def test_segments_that_are_merged_and_deleted_meanwhile_do_not_end_a_query(
    tmp_path: Path, store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    builder.snapshot(Position(1, 1), source.insert(1, 500, 1000))
    shipped = [builder.commit(Position(1, n), source.insert(n * 1000, n * 1000 + 400, 1000)) for n in (2, 3)]
    restore(store, tmp_path / "restored.db")
    with open_past(store) as past:
        builder.increment(Position(1, 3), 2)
        store.delete([ref.key for ref in shipped])
        assert rows(past, CONTENT) == file_rows(tmp_path / "restored.db", CONTENT)
        assert past.position == Position(1, 3)


def test_an_object_that_is_gone_for_good_is_named(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    large_snapshot(builder, source, 2000)
    ref = SegmentRef(1, SNAPSHOT_LEVEL, 1, 1)
    with open_past(store) as past:
        store.delete([ref.key])
        with pytest.raises(ObjectMissing, match=ref.key):
            rows(past, CONTENT)


def test_a_store_that_fails_is_said_to_and_asked_again_by_the_next_statement(
    store: MemoryStore, builder: ReplicaBuilder, source: SourceDatabase
) -> None:
    large_snapshot(builder, source, 2000)
    with open_past(store) as past:
        connection = past.connect()
        store.fail_next("get", StoreUnavailable("the store is away"))
        with pytest.raises(StoreUnavailable, match="the store is away"):
            list(run(connection, CONTENT))
        assert list(run(connection, "SELECT count(*) FROM t"))[1] == (2000,)
        connection.close()


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_real_s3_server_gives_the_same(tmp_path: Path, seaweed: SeaweedServer, source: SourceDatabase) -> None:
    store: ObjectStore = open_store(seaweed.url("past"), access_key=seaweed.access_key, secret_key=seaweed.secret_key)
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    large_snapshot(builder, source, 4000)
    builder.commit(Position(1, 2), source.commit("UPDATE t SET v = 'x' WHERE id % 11 = 0"))
    restore(store, tmp_path / "restored.db")
    with open_past(store) as past:
        assert rows(past, CONTENT) == file_rows(tmp_path / "restored.db", CONTENT)
    with open_past(store) as past:
        assert rows(past, "SELECT v FROM t WHERE id = 1100") == [("x",)]
        assert past.fetched.size_bytes < 1_000_000
