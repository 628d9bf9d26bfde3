"""Claims about what changed between two positions: schema, rows, and what need not be read for it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from restore_support import ReplicaBuilder, SourceDatabase

from replicator import Difference, Position, RestoreOptions, RowChange, UsageError, open_past
from replicator.btree import DatabasePages
from replicator.store.memory import MemoryStore


class History:
    """A database and its replica; each ``commit`` is a position."""

    def __init__(self, folder: Path, page_size: int = 4096) -> None:
        self.path = folder / "source.db"
        self.source = SourceDatabase(self.path, page_size)
        self.store = MemoryStore("diff")
        self.builder = ReplicaBuilder(self.store, page_size)
        self.builder.timeline(1)
        self.txid = 0

    def commit(self, *statements: str) -> int:
        return self._add(self.source.commit(*statements))

    def _add(self, state: bytes) -> int:
        self.txid += 1
        if self.txid == 1:
            self.builder.snapshot(Position(1, 1), state)
        else:
            self.builder.commit(Position(1, self.txid), state)
        return self.txid

    def vacuumed(self) -> int:
        return self._add(self.source.vacuum())

    def rows(self, start: int, end: int, table: str | None = None) -> list[RowChange]:
        with self.difference(start, end) as difference:
            names = difference.tables() if table is None else [table]
            return [change for name in names for change in difference.rows(name)]

    def difference(self, start: int, end: int) -> OpenDifference:
        return OpenDifference(self.store, start, end)


class OpenDifference:
    """Both positions, their difference, and in the end what was fetched for it."""

    def __init__(self, store: MemoryStore, start: int, end: int) -> None:
        self._sides = [open_past(store, RestoreOptions(position=Position(1, txid))) for txid in (start, end)]
        self.fetched_bytes = 0

    def __enter__(self) -> Difference:
        self._difference = Difference(*self._sides)
        return self._difference

    def __exit__(self, *_: object) -> None:
        self._difference.close()
        for side in self._sides:
            self.fetched_bytes += side.fetched.size_bytes
            side.close()


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    found = History(tmp_path)
    yield found
    found.source.close()


def short(changes: list[RowChange]) -> list[tuple[str, object, object]]:
    ordered = sorted(changes, key=lambda change: (change.table, repr(change.before or change.after)))
    return [(change.table, change.before, change.after) for change in ordered]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_added_removed_and_changed_rows_are_told_with_what_they_were(history: History) -> None:
    start = history.commit(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v)", "INSERT INTO t VALUES (1, 'one'), (2, 'two'), (3, NULL)"
    )
    end = history.commit(
        "DELETE FROM t WHERE id = 1", "UPDATE t SET v = x'02' WHERE id = 2", "INSERT INTO t VALUES (4, 4.5)"
    )
    there = [
        ("t", {"id": 1, "v": "one"}, None),
        ("t", {"id": 2, "v": "two"}, {"id": 2, "v": b"\x02"}),
        ("t", None, {"id": 4, "v": 4.5}),
    ]
    back = [
        ("t", None, {"id": 1, "v": "one"}),
        ("t", {"id": 2, "v": b"\x02"}, {"id": 2, "v": "two"}),
        ("t", {"id": 4, "v": 4.5}, None),
    ]
    assert short(history.rows(start, end)) == there
    assert short(history.rows(end, start)) == back
    assert history.rows(end, end) == []


@pytest.mark.parametrize(("old", "new"), [("1", "1.0"), ("'a'", "'A'"), ("'a'", "x'61'"), ("NULL", "''")])
def test_values_that_only_a_comparison_in_sql_takes_for_the_same_differ(history: History, old: str, new: str) -> None:
    start = history.commit(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v COLLATE NOCASE)", f"INSERT INTO t VALUES (1, {old})"
    )
    end = history.commit(f"UPDATE t SET v = {new}")
    assert [change.change for change in history.rows(start, end)] == ["changed"]


def test_tables_without_rowid_are_compared_by_their_key(history: History) -> None:
    start = history.commit(
        "CREATE TABLE t(v, b, a COLLATE NOCASE, PRIMARY KEY (a, b)) WITHOUT ROWID",
        "INSERT INTO t VALUES (1, 1, 'x'), (2, 2, 'x'), (3, 3, 'z')",
    )
    end = history.commit(
        "UPDATE t SET a = 'X' WHERE b = 1", "DELETE FROM t WHERE b = 2", "INSERT INTO t VALUES (4, 4, 'y')"
    )
    changes = history.rows(start, end)
    assert Counter(change.change for change in changes) == {"changed": 1, "removed": 1, "added": 1}
    assert ({"v": 1, "b": 1, "a": "x"}, {"v": 1, "b": 1, "a": "X"}) in [(c.before, c.after) for c in changes]


def test_a_replaced_row_keeps_its_identity_by_the_primary_key(history: History) -> None:
    start = history.commit("CREATE TABLE t(k TEXT PRIMARY KEY, v)", "INSERT INTO t VALUES ('a', 1), ('b', 2)")
    end = history.commit("REPLACE INTO t VALUES ('a', 3)")
    assert short(history.rows(start, end)) == [("t", {"k": "a", "v": 1}, {"k": "a", "v": 3})]


def test_tables_without_a_primary_key_have_rows_by_rowid_and_a_vacuum_changes_none(history: History) -> None:
    start = history.commit("CREATE TABLE t(v)", "INSERT INTO t VALUES (1), (1), (2), (3)")
    changed = history.commit("UPDATE t SET v = 9 WHERE rowid = 2", "DELETE FROM t WHERE rowid = 1")
    vacuumed = history.vacuumed()
    assert short(history.rows(start, changed)) == [("t", {"v": 1}, None), ("t", {"v": 1}, {"v": 9})]
    assert history.rows(changed, vacuumed) == []


def test_rows_of_tables_that_were_created_and_dropped_are_added_and_removed(history: History) -> None:
    start = history.commit("CREATE TABLE old(v)", "INSERT INTO old VALUES (1)")
    end = history.commit("DROP TABLE old", "CREATE TABLE new(v)", "INSERT INTO new VALUES (2)")
    assert short(history.rows(start, end)) == [("new", None, {"v": 2}), ("old", {"v": 1}, None)]


def test_a_column_that_was_added_or_dropped_changes_the_schema_and_not_every_row(history: History) -> None:
    start = history.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, a, b)", "INSERT INTO t VALUES (1, 2, 3), (4, 5, 6)")
    end = history.commit(
        "ALTER TABLE t ADD COLUMN c DEFAULT 7", "ALTER TABLE t DROP COLUMN a", "UPDATE t SET b = 0 WHERE id = 4"
    )
    assert short(history.rows(start, end)) == [("t", {"id": 4, "a": 5, "b": 6}, {"id": 4, "b": 0, "c": 7})]
    with history.difference(start, end) as difference:
        assert [(one.change, one.kind, one.name) for one in difference.schema()] == [("changed", "table", "t")]


def test_a_table_that_becomes_one_without_rowid_has_the_same_rows(history: History) -> None:
    start = history.commit("CREATE TABLE t(k PRIMARY KEY, v)", "INSERT INTO t VALUES ('a', 1), ('b', 2)")
    end = history.commit(
        "DROP TABLE t",
        "CREATE TABLE t(k PRIMARY KEY, v) WITHOUT ROWID",
        "INSERT INTO t VALUES ('b', 2), ('a', 1), ('c', 3)",
    )
    assert short(history.rows(start, end)) == [("t", None, {"k": "c", "v": 3})]


def test_names_of_the_rowid_may_be_taken(history: History) -> None:
    start = history.commit(
        'CREATE TABLE "a ""b"(rowid, _rowid_, oid)', 'INSERT INTO "a ""b" VALUES (1, 2, 3), (4, 5, 6)'
    )
    end = history.commit('DELETE FROM "a ""b" WHERE oid = 3')
    assert short(history.rows(start, end)) == [('a "b', {"rowid": 1, "_rowid_": 2, "oid": 3}, None)]


def test_a_full_text_index_is_seen_by_its_own_tables(history: History) -> None:
    start = history.commit("CREATE VIRTUAL TABLE f USING fts5(x)", "INSERT INTO f VALUES ('one')")
    end = history.commit("INSERT INTO f VALUES ('two')")
    changes = history.rows(start, end)
    assert ("f_content", {"id": 2, "c0": "two"}) in [(c.table, c.after) for c in changes]
    assert {c.table for c in changes} <= {"f_content", "f_data", "f_docsize", "f_idx", "f_config"}


def test_a_blob_that_is_written_in_place_beyond_its_first_page_is_seen(history: History) -> None:
    """Neither the leaf of the row nor any page that leads to it changes."""
    start = history.commit(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v)", "INSERT INTO t VALUES (1, zeroblob(50000)), (2, zeroblob(50000))"
    )
    connection = apsw.Connection(str(history.path))
    with connection.blob_open("main", "t", "v", 2, True) as blob:
        blob.seek(40_000)
        blob.write(b"new")
    connection.close()
    end = history._add(history.source.state())
    changes = history.rows(start, end)
    assert [(c.change, c.after["id"] if c.after else None) for c in changes] == [("changed", 2)]


def test_schema_changes_have_their_sql(history: History) -> None:
    start = history.commit("CREATE TABLE t(v)", "CREATE INDEX i ON t(v)")
    end = history.commit("DROP INDEX i", "CREATE VIEW w AS SELECT 1")
    with history.difference(start, end) as difference:
        assert [(one.change, one.kind, one.name, one.before, one.after) for one in difference.schema()] == [
            ("removed", "index", "i", "CREATE INDEX i ON t(v)", None),
            ("added", "view", "w", None, "CREATE VIEW w AS SELECT 1"),
        ]
        assert difference.tables() == []


def test_a_database_that_was_empty_has_everything_added(history: History) -> None:
    history._add(b"")
    end = history.commit("CREATE TABLE t(v)", "INSERT INTO t VALUES (1)")
    assert short(history.rows(1, end)) == [("t", None, {"v": 1})]


def test_a_table_that_is_not_there_is_named(history: History) -> None:
    start = history.commit("CREATE TABLE t(v)")
    with pytest.raises(UsageError, match="no table u"):
        history.rows(start, start, "u")


# -- what need not be read ---------------------------------------------------------------------------------------------


def numbered(first: int, last: int) -> str:
    return f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"


def test_of_a_large_table_only_the_changed_leaves_are_read(history: History) -> None:
    start = history.commit(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v)",
        f"{numbered(1, 8000)} INSERT INTO t SELECT i, randomblob(1000) FROM n",
        "CREATE TABLE other(id INTEGER PRIMARY KEY, v)",
        f"{numbered(1, 100)} INSERT INTO other SELECT i, i FROM n",
        "CREATE INDEX v ON other(v)",
    )
    history.commit("UPDATE t SET v = 'x' WHERE id IN (5, 4000)")
    end = history.commit("INSERT INTO t VALUES (9000, randomblob(30000))")
    opened = history.difference(start, end)
    with opened as difference:
        assert difference.tables() == ["t"]
        changes = list(difference.rows("t"))
    assert [c.after["id"] for c in changes if c.after] == [5, 4000, 9000]
    assert opened.fetched_bytes < 3_000_000
    assert history.path.stat().st_size > 8_000_000


def test_tables_of_which_no_page_changed_are_left_out(history: History) -> None:
    start = history.commit(
        "CREATE TABLE a(v)",
        "CREATE TABLE b(k PRIMARY KEY) WITHOUT ROWID",
        "INSERT INTO a VALUES (zeroblob(9000))",
        "INSERT INTO b VALUES (1)",
        "CREATE TABLE c(v)",
    )
    end = history.commit("INSERT INTO c VALUES (1)")
    with history.difference(start, end) as difference:
        assert difference.tables() == ["c"]


def test_a_snapshot_in_between_does_not_make_everything_differ(history: History) -> None:
    start = history.commit("CREATE TABLE a(v)", "CREATE TABLE b(v)")
    end = history.commit("INSERT INTO b VALUES (1)")
    history.builder.snapshot(Position(1, end))
    with history.difference(start, end) as difference:
        assert difference.tables() == ["b"]


def test_positions_on_two_timelines_are_compared_too(history: History) -> None:
    start = history.commit("CREATE TABLE a(v)", "INSERT INTO a VALUES (1)")
    history.commit("INSERT INTO a VALUES (2)")
    history.builder.timeline(2, Position(1, start))
    history.builder.states[Position(2, start)] = history.builder.states[Position(1, start)]
    history.builder.commit(Position(2, 2), history.source.commit("UPDATE a SET v = 3 WHERE v = 1"))
    sides = [open_past(history.store, RestoreOptions(position=Position(n, 2))) for n in (1, 2)]
    with Difference(*sides) as difference:
        assert [(c.before, c.after) for c in difference.rows("a")] == [({"v": 1}, {"v": 3})]
    for side in sides:
        side.close()


@pytest.mark.parametrize("page_size", [512, 4096])
def test_trees_and_overflow_chains_have_the_pages_that_sqlite_says(tmp_path: Path, page_size: int) -> None:
    path = tmp_path / "a.db"
    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA page_size = {page_size}; PRAGMA auto_vacuum = full").fetchall()
    for statement in (
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v)",
        "CREATE INDEX i ON t(v)",
        "CREATE TABLE w(k PRIMARY KEY, v) WITHOUT ROWID",
        f"{numbered(-3000, 3000)} INSERT INTO t SELECT i * 1000003, hex(zeroblob(abs(i) % 700)) FROM n",
        "INSERT INTO w SELECT id, v FROM t",
        "DELETE FROM t WHERE id % 3 = 0",
    ):
        connection.execute(statement)
    pages = path.read_bytes()
    count = len(pages) // page_size
    image = DatabasePages(lambda n: pages[(n - 1) * page_size : n * page_size], count)
    seen = {*image.free(), *image.pointer_maps()}
    for name, root in [("sqlite_schema", 1), *connection.execute("SELECT name, rootpage FROM sqlite_schema")]:
        own = image.pages_of(root)
        nodes = [node for node in map(image.node, own) if node is not None]
        overflow = {n for node in nodes for n in image.overflow_of(node)}
        said = connection.execute("SELECT pagetype = 'overflow', pageno FROM dbstat WHERE name = ?", (name,)).fetchall()
        assert own == {n for is_overflow, n in said if not is_overflow}
        assert overflow == {n for is_overflow, n in said if is_overflow}
        seen |= own | overflow
    connection.close()
    assert seen == set(range(1, count + 1))


# -- any history -------------------------------------------------------------------------------------------------------

TABLES = {
    "a": "CREATE TABLE IF NOT EXISTS a(id INTEGER PRIMARY KEY, v)",
    "b": "CREATE TABLE IF NOT EXISTS b(k TEXT PRIMARY KEY, v) WITHOUT ROWID",
    "c": "CREATE TABLE IF NOT EXISTS c(k, v)",
    "d": "CREATE TABLE IF NOT EXISTS d(k TEXT UNIQUE, v)",
}


def content(state: bytes) -> dict[str, Counter[tuple[object, ...]]]:
    connection = apsw.Connection(":memory:")
    connection.deserialize("main", state[:18] + b"\x01\x01" + state[20:])
    found = {}
    for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        found[name] = Counter((*row, *map(type, row)) for row in connection.execute(f"SELECT * FROM {name}"))
    connection.close()
    return found


def random_step(chance: random.Random) -> list[str]:
    table = chance.choice(list(TABLES))
    key = "id" if table == "a" else "k"
    size, low = chance.choice((3, 200, 6000)), chance.randrange(200)
    return [
        TABLES[table],
        *chance.choice(
            (
                [f"{numbered(low, low + 30)} INSERT OR REPLACE INTO {table} SELECT i, hex(randomblob({size})) FROM n"],
                [f"DELETE FROM {table} WHERE {key} % 5 = {low % 5}"],
                [f"UPDATE {table} SET v = zeroblob({size}) WHERE {key} % 7 = {low % 7}"],
                [f"UPDATE {table} SET v = substr(v, 1, length(v) - 1) || 'x' WHERE {key} % 11 = {low % 11}"],
                [f"DROP TABLE {table}"],
            )
        ),
    ]


def applied(before: Counter[tuple[object, ...]], changes: list[RowChange]) -> Counter[tuple[object, ...]]:
    """Raises when a row is said to be removed that is not there."""
    after = before.copy()
    for change in changes:
        for row, sign in ((change.before, -1), (change.after, 1)):
            if row is not None:
                values = tuple(row.values())
                after[(*values, *map(type, values))] += sign
    assert all(count >= 0 for count in after.values())
    return +after


@pytest.mark.parametrize(
    ("seed", "page_size"), [(1, 512), (2, 4096), *(pytest.param(n, 1024, marks=pytest.mark.slow) for n in range(3, 9))]
)
def test_the_differences_turn_one_state_into_the_other(tmp_path: Path, seed: int, page_size: int) -> None:
    chance = random.Random(seed)
    history = History(tmp_path, page_size)
    history.commit(*TABLES.values())
    for _ in range(14):
        history.vacuumed() if chance.random() < 0.1 else history.commit(*random_step(chance))
        if chance.random() < 0.1:
            history.builder.snapshot(Position(1, history.txid))
    history.source.close()
    states = {txid: content(history.builder.states[Position(1, txid)]) for txid in range(1, history.txid + 1)}
    for _ in range(8):
        start, end = chance.randrange(1, history.txid + 1), chance.randrange(1, history.txid + 1)
        changes = history.rows(start, end)
        for table in {*states[start], *states[end]}:
            own = [change for change in changes if change.table == table]
            assert applied(states[start].get(table, Counter()), own) == states[end].get(table, Counter())
            assert all(change.before != change.after for change in own)


def step_in_deep_trees(chance: random.Random) -> str:
    table = chance.choice("aacdb")
    key, low = ("id" if table == "a" else "k"), chance.randrange(3000)
    high, size = low + chance.choice((1, 5, 300)), chance.choice((1, 3, 60, 900))
    return chance.choice(
        (
            f"{numbered(low, high)} INSERT OR REPLACE INTO {table} SELECT i, hex(randomblob({size})) FROM n",
            f"DELETE FROM {table} WHERE CAST({key} AS INT) BETWEEN {low} AND {high}",
            f"UPDATE {table} SET v = zeroblob({size}) WHERE CAST({key} AS INT) BETWEEN {low} AND {high}",
            f"UPDATE {table} SET v = substr(v, 1, length(v) - 1) || 'x' WHERE {key} % 101 = {low % 101}",
        )
    )


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_small_changes_in_deep_trees_are_found_whole(tmp_path: Path, seed: int) -> None:
    """Pages split, merge and become free; most leaves stay as they are."""
    chance = random.Random(seed)
    history = History(tmp_path, 512)
    rows = (f"{numbered(1, 2000)} INSERT INTO {table} SELECT i, hex(randomblob(40)) FROM n" for table in TABLES)
    history.commit(*TABLES.values(), *rows)
    for _ in range(8):
        history.commit(*(step_in_deep_trees(chance) for _ in range(chance.choice((1, 1, 3)))))
    history.source.close()
    for start in range(1, history.txid):
        end = min(start + chance.choice((1, 2)), history.txid)
        states = [content(history.builder.states[Position(1, txid)]) for txid in (start, end)]
        changes = history.rows(start, end)
        for table in TABLES:
            own = [change for change in changes if change.table == table]
            assert applied(states[0][table], own) == states[1][table]
