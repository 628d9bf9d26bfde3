"""What changed between two positions of a replica: the schema, and the rows of each table.

Owns that comparison. It writes nothing. Which pages changed decides only what need not be compared; whether two rows are
the same is decided by their values.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, Self, cast

import apsw
import numpy as np

from replicator import chain
from replicator.btree import MOST_TOLD_APART, DatabasePages, Node, Span, TreeDamaged
from replicator.errors import ChainBroken, FormatError, ObjectMissing, UsageError
from replicator.pagehash import lock_page
from replicator.past import Past, Value, explained
from replicator.past_pages import PastPages
from replicator.restore_plan import RestorePlan, check_link
from replicator.segment import SegmentReader

log = logging.getLogger(__name__)

Kind = Literal["added", "removed", "changed"]
Row = tuple[Value, ...]

_MANY = 1000  # changed pages
_AT_ONCE = 64  # of them are fetched together
_BELOW_ALL, _HIGHEST = -(1 << 63) - 1, (1 << 63) - 1  # rowids
_ROWID_NAMES = ("rowid", "_rowid_", "oid")


@dataclass(frozen=True)
class SchemaChange:
    """kind: table, index, view or trigger. before, after: its SQL; None for an index that a constraint makes."""

    change: Kind
    kind: str
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class RowChange:
    """One row as it was and as it is, by column; None when there was or is none."""

    table: str
    before: dict[str, Value] | None
    after: dict[str, Value] | None

    @property
    def change(self) -> Kind:
        return "added" if self.before is None else "removed" if self.after is None else "changed"


class Difference:
    """From one position to another of the same replica, in either order in time. For one thread; close it at the end.

    A row is known again by its primary key, in a table without one by its rowid; one that a VACUUM has only given another
    rowid has not changed. Methods raise what reading the store raises, and QueryFailed.
    """

    def __init__(self, before: Past, after: Past) -> None:
        self._pages = (before.pages, after.pages)
        self._connection = after.connect()
        with explained():
            self._connection.execute(f"ATTACH '{before.uri}' AS past")
        self._schemas = (_Schema(self._connection, "past"), _Schema(self._connection, "main"))

    def close(self) -> None:
        self._connection.close()
        self._pages[0].share(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def schema(self) -> list[SchemaChange]:
        """By kind and name."""
        before, after = (schema.sql for schema in self._schemas)
        return [
            SchemaChange(_kind(key in before, key in after), *key, before.get(key), after.get(key))
            for key in sorted({*before, *after})
            if not (key in before and key in after and before[key] == after[key])
        ]

    def tables(self) -> list[str]:
        """Those in which rows may have changed, with the tables in which virtual tables keep theirs."""
        names = sorted({*self._schemas[0].roots, *self._schemas[1].roots})
        return [name for name in names if self._touched(name) is not None]

    def rows(self, table: str) -> Iterator[RowChange]:
        """Every row that differs. Takes memory for those rows when the table has no primary key, or another than before.

        Raises UsageError when the table is at neither position.
        """
        if all(table not in schema.roots for schema in self._schemas):
            raise UsageError(f"there is no table {table} at either position; tables are named as in sqlite_schema")
        ranges = self._touched(table)
        if ranges is None:
            return
        with explained():
            before, after = (schema.table(table) for schema in self._schemas)
            if before is None or after is None:
                found = _rows_of_one(self._connection, before, after)
            elif before.rowid and after.rowid:
                found = _by_rowid(self._connection, before, after, ranges)
            elif before.key == after.key and before.without_rowid and after.without_rowid:
                found = _by_key(self._connection, before, after)
            else:
                old_rows, new_rows = (_numbered(self._connection, side) for side in (before, after))
                found = _matched(old_rows, new_rows, before, after)
            for old, new in found:
                yield RowChange(table, _named(before, old), _named(after, new))

    # -- what need not be compared -------------------------------------------------------------------------------------

    def _touched(self, table: str) -> list[_Range] | None:
        """Stretches of rowids outside of which no row differs (for a table without rowids: everything); None if none does."""
        before, after = (schema.roots.get(table) for schema in self._schemas)
        if before is None or after is None:
            return [_EVERYTHING]
        if not self._changed:
            return None
        try:
            if before != after or self._ranges is None:
                return [_EVERYTHING]
            if table in self._ranges:
                return self._ranges[table] or None
            pages = [image.pages_of(before) for image in self._images]
        except TreeDamaged as error:
            log.warning("the table %s is compared row by row: %s", table, error)
            return [_EVERYTHING]
        return None if pages[0] == pages[1] and not pages[0] & self._changed else [_EVERYTHING]

    @cached_property
    def _changed(self) -> set[int]:
        before, after = self._pages
        changed = _changed_pages(before, after)
        if before.page_size == after.page_size:
            before.share(after, changed)
        return changed

    @cached_property
    def _images(self) -> tuple[DatabasePages, DatabasePages]:
        before, after = self._pages
        return DatabasePages(before.page, before.page_count), DatabasePages(after.page, after.page_count)

    @cached_property
    def _ranges(self) -> dict[str, list[_Range]] | None:
        """For each table with rowids that is in one place at both positions, the rowids below pages that changed.

        None when that is not known, or is not enough: then everything is to be compared.
        """
        if len(self._changed) > max(_MANY, self._pages[1].page_count // 4):
            return None  # to find out where they belong costs more than it saves
        try:
            return None if self._may_hide_changes() else self._ranges_of_changes()
        except TreeDamaged as error:
            log.warning("the tables are compared row by row: %s", error)
            return None

    def _ranges_of_changes(self) -> dict[str, list[_Range]]:
        before, after = (schema.roots for schema in self._schemas)
        names = [name for name in before if before[name] == after.get(name)]
        same = {before[name]: name for name in names if self._has_rowids(before[name])}
        sides = [
            _Locator(image, list(same), {*schema.roots.values()})
            for image, schema in zip(self._images, self._schemas, strict=True)
        ]
        found: dict[str, list[Span]] = {name: [] for name in same.values()}
        for page_no in self._each_changed():
            for root, span in _differing(*(side.locate(page_no) for side in sides)):
                found[same[root]].append(span)
        return {name: _merged_ranges(spans) for name, spans in found.items()}

    def _has_rowids(self, root: int) -> bool:
        nodes = [image.node(root) for image in self._images]
        return all(node is not None and node.by_rowid for node in nodes)

    def _each_changed(self) -> Iterator[int]:
        """Ascending; they are fetched some at a time."""
        ordered = sorted(self._changed)
        for start in range(0, len(ordered), _AT_ONCE):
            some = ordered[start : start + _AT_ONCE]
            for pages in self._pages:
                pages.prefetch(some)
            yield from some

    def _may_hide_changes(self) -> bool:
        """Whether a page changed on which a row may go on whose own page did not: then any table may have changed.

        SQLite writes into such a page alone when a value changes and its size does not.
        """
        image, pages = self._images[1], self._pages[1]
        left = {page_no for page_no in self._changed if page_no <= pages.page_count}
        left.difference_update(image.free(), image.pointer_maps(), [lock_page(pages.page_size)])
        if left and pages.page_count > MOST_TOLD_APART:
            return True
        nodes: set[int] = set()
        for page_no in self._each_changed():
            node = image.node(page_no) if page_no in left else None
            if node is not None:
                nodes.add(page_no)
                left.difference_update(image.overflow_of(node))
        return bool(left - nodes)


_Place = tuple[int, Span, Node]


class _Locator:
    """Finds to which of some tables a page belongs, in one image."""

    def __init__(self, image: DatabasePages, roots: list[int], every_root: set[int]) -> None:
        """roots: of the tables that matter; every_root: of all tables."""
        self._image = image
        self._roots = roots  # the one that was found last comes first
        self._every_root = every_root
        self._free = {*image.free()}

    def locate(self, page_no: int) -> _Place | None:
        """Root, place and content; None when it is a page of none of them."""
        if page_no > self._image.page_count or page_no in self._free:
            return None
        node = self._image.node(page_no)
        if node is None or not node.by_rowid:
            return None
        if page_no in self._every_root:
            return (page_no, Span(page_no), node) if page_no in self._roots else None
        if page_no == 1:
            return None  # the schema
        if not node.keys:
            raise TreeDamaged(f"page {page_no} of a table is empty")
        for root in self._roots:
            span = self._image.find(root, page_no, node.keys[0])
            if span is not None:
                self._roots.remove(root)
                self._roots.insert(0, root)
                return root, span, node
        return None


def _differing(before: _Place | None, after: _Place | None) -> Iterator[tuple[int, Span]]:
    """Below which places of which tables rows may differ because of one changed page, as far as pages above it do not say so.

    Of an inner page that is in the same place at both positions, that is only where its children are not the same.
    """
    if before is not None and after is not None and before[:2] == after[:2]:
        root, span, node = before
        if not node.leaf and not after[2].leaf:
            yield from ((root, child) for child in {*node.spans(span)} ^ {*after[2].spans(span)})
            return
    yield from ((place[0], place[1]) for place in (before, after) if place is not None)


def _changed_pages(before: PastPages, after: PastPages) -> set[int]:
    """A superset of the pages that are not the same at both positions."""
    if before.page_size != after.page_size:
        return set(range(1, max(before.page_count, after.page_count) + 1))
    both = min(before.page_count, after.page_count)
    changed = set(range(both + 1, max(before.page_count, after.page_count) + 1))
    if (written := _written(before, after)) is not None:
        return changed | written
    page_nos = np.arange(1, both + 1, dtype=np.uint32)
    return changed | set(page_nos[~after.is_same(before, page_nos)].tolist())


def _written(before: PastPages, after: PastPages) -> set[int] | None:
    """The pages in the segments between the two, if these are there and lead from one to the other."""
    replica = after.replica
    timelines, segments = replica.timelines(), replica.segments()
    for start, end in ((before.plan, after.plan), (after.plan, before.plan)):
        refs = chain.between(timelines, segments, start.position, end.position)
        if refs is not None:
            try:
                readers = after.open_segments(refs)
                _check_way(readers, start, end)
            except (FormatError, ChainBroken, ObjectMissing) as error:
                log.warning("the segments between the positions are left out of account: %s", error)
                return None
            return {page_no for reader in readers for page_no in reader.page_nos().tolist()}
    return None


def _check_way(readers: Sequence[SegmentReader], start: RestorePlan, end: RestorePlan) -> None:
    """Raises ChainBroken unless the segments take the state at ``start`` to that at ``end``, as far as they say so."""
    for older, newer in pairwise(readers):
        check_link(older, newer)
    reached = start.state_checksum
    if readers:
        first, reached = readers[0].header, readers[-1].header.state_after
        adjoining = first.first == start.position.txid + 1
        if adjoining and (first.state_before, first.pages_before) != (start.state_checksum, start.page_count):
            raise ChainBroken(f"{readers[0].name} does not follow from the state at {start.position}")
    if reached != end.state_checksum:
        raise ChainBroken(f"the segments from {start.position} do not lead to the state at {end.position}")


_Range = tuple[int, int]
_EVERYTHING: _Range = (_BELOW_ALL, _HIGHEST)


def _merged_ranges(spans: Iterable[Span]) -> list[_Range]:
    """Rowids above the first and up to the second, ascending."""
    found = sorted(
        (_BELOW_ALL if span.low is None else span.low, _HIGHEST if span.high is None else span.high) for span in spans
    )
    merged: list[_Range] = []
    end = _BELOW_ALL - 1
    for low, high in found:
        if low > end:
            merged.append((low, high))
        elif high > end:
            merged[-1] = (merged[-1][0], high)
        end = max(end, high)
    return merged


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """columns: those that are stored. key: columns of the primary key, each with its collation. rowid: a name for it.

    rowid is None in a table without, and in one that has other columns of all its names. integer_key: the rowid is the key.
    """

    place: str
    columns: tuple[str, ...]
    key: tuple[tuple[str, str], ...]
    rowid: str | None = None
    integer_key: bool = False
    without_rowid: bool = False


class _Schema:
    """sql: by kind and name. roots: root pages of the tables that have one."""

    def __init__(self, connection: apsw.Connection, database: str) -> None:
        self._connection = connection
        self._database = database
        with explained():
            found = connection.execute(f"SELECT type, name, rootpage, sql FROM {database}.sqlite_schema").fetchall()
        rows = cast("list[tuple[str, str, int, str | None]]", found)
        self.sql: dict[tuple[str, str], str | None] = {(kind, name): sql for kind, name, _, sql in rows}
        self.roots: dict[str, int] = {name: root for kind, name, root, _ in rows if kind == "table" and root}

    def table(self, name: str) -> _Table | None:
        if name not in self.roots:
            return None
        every = self._pragma("table_xinfo", name)
        stored = [row for row in every if row[6] == 0]  # the others are computed
        columns = tuple(str(row[1]) for row in stored)
        index = next((str(row[1]) for row in self._pragma("index_list", name) if row[3] == "pk"), None)
        declared = tuple((str(row[1]), "BINARY") for row in stored if row[5])
        key = declared if index is None else self._key_of(index)
        if any(row[4] for row in self._pragma("table_list", name)):
            return _Table(self._place(name), columns, key, without_rowid=True)
        integer_key = bool(declared) and index is None
        taken = {str(row[1]).lower() for row in every}
        free = (rowid for rowid in _ROWID_NAMES if rowid not in taken)
        rowid = _quoted(declared[0][0]) if integer_key else next(free, None)
        return _Table(self._place(name), columns, key, rowid, integer_key)

    def _key_of(self, index: str) -> tuple[tuple[str, str], ...]:
        return tuple((str(row[2]), str(row[4])) for row in self._pragma("index_xinfo", index) if row[5])

    def _pragma(self, pragma: str, name: str) -> list[Row]:
        return list(self._connection.execute(f"PRAGMA {self._database}.{pragma}({_quoted(name)})"))

    def _place(self, name: str) -> str:
        return f"{self._database}.{_quoted(name)}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _list(columns: Iterable[str], of: str = "") -> str:
    return ", ".join(of + _quoted(column) for column in columns)


def _named(table: _Table | None, row: Row | None) -> dict[str, Value] | None:
    return None if table is None or row is None else dict(zip(table.columns, row, strict=True))


def _kind(was: bool, is_now: bool) -> Kind:
    return "changed" if was and is_now else "removed" if was else "added"


# -- rows --------------------------------------------------------------------------------------------------------------

_Numbered = tuple[int | None, Row]
_Pair = tuple[Row | None, Row | None]


class _Comparison:
    """Two rows are the same when the columns that both tables have hold the same values of the same types."""

    def __init__(self, before: _Table, after: _Table) -> None:
        common = [column for column in before.columns if column in after.columns]
        self._before = [before.columns.index(column) for column in common]
        self._after = [after.columns.index(column) for column in common]

    def of_before(self, row: Row) -> tuple[object, ...]:
        return _typed([row[i] for i in self._before])

    def of_after(self, row: Row) -> tuple[object, ...]:
        return _typed([row[i] for i in self._after])


def _typed(values: Sequence[Value]) -> tuple[object, ...]:
    """1 and 1.0 are equal in Python, and not the same in SQLite."""
    return (*values, *map(type, values))


def _numbered(connection: apsw.Connection, table: _Table, within: _Range = _EVERYTHING) -> Iterator[_Numbered]:
    """By rowid, where there is one."""
    rowid = table.rowid
    low, high = within
    where = f" WHERE {rowid} BETWEEN ? AND ?" if rowid and within != _EVERYTHING else ""
    order = f" ORDER BY {rowid}" if rowid else ""
    sql = f"SELECT {rowid or 'NULL'}, {_list(table.columns)} FROM {table.place}{where}{order}"
    for number, *row in connection.execute(sql, (low + 1, high) if where else ()):
        yield number, tuple(row)


def _rows_of_one(connection: apsw.Connection, before: _Table | None, after: _Table | None) -> Iterator[_Pair]:
    """A table that was dropped, or created."""
    if before is not None:
        yield from ((row, None) for _, row in _numbered(connection, before))
    if after is not None:
        yield from ((None, row) for _, row in _numbered(connection, after))


def _by_rowid(connection: apsw.Connection, before: _Table, after: _Table, ranges: Sequence[_Range]) -> Iterator[_Pair]:
    differing = _merged(connection, before, after, ranges)
    if before.integer_key and after.integer_key and before.key == after.key:
        yield from ((old, new) for _, old, new in differing)
        return
    old_rows: list[_Numbered] = []
    new_rows: list[_Numbered] = []
    for number, old, new in differing:
        if old is not None:
            old_rows.append((number, old))
        if new is not None:
            new_rows.append((number, new))
    yield from _matched(old_rows, new_rows, before, after)


def _merged(
    connection: apsw.Connection, before: _Table, after: _Table, ranges: Sequence[_Range]
) -> Iterator[tuple[int, Row | None, Row | None]]:
    """Each rowid in the ranges under which not the same row was."""
    comparison = _Comparison(before, after)
    for within in ranges:
        old_rows, new_rows = (_numbered(connection, table, within) for table in (before, after))
        old, new = next(old_rows, None), next(new_rows, None)
        while old is not None or new is not None:
            here = min(number for number, _ in filter(None, (old, new)) if number is not None)
            old_row = old[1] if old is not None and old[0] == here else None
            new_row = new[1] if new is not None and new[0] == here else None
            if old_row is None or new_row is None or comparison.of_before(old_row) != comparison.of_after(new_row):
                yield here, old_row, new_row
            old = next(old_rows, None) if old_row is not None else old
            new = next(new_rows, None) if new_row is not None else new


def _matched(
    old_rows: Iterable[_Numbered], new_rows: Iterable[_Numbered], before: _Table, after: _Table
) -> Iterator[_Pair]:
    """Rows that are there both before and after are left out; of the others, those with one key, or else one rowid, are pairs."""
    comparison = _Comparison(before, after)
    old_list, new_list = list(old_rows), list(new_rows)
    same = Counter(comparison.of_before(row) for _, row in old_list) & Counter(
        comparison.of_after(row) for _, row in new_list
    )
    old_list = _without(old_list, [comparison.of_before(row) for _, row in old_list], same.copy())
    new_list = _without(new_list, [comparison.of_after(row) for _, row in new_list], same)
    by_key = before.key == after.key
    waiting = {_identity(after, one, by_key): one[1] for one in new_list}
    paired: set[tuple[object, ...]] = set()
    for one in old_list:
        identity = _identity(before, one, by_key)
        new = waiting.get(identity) if identity else None
        if new is not None:
            paired.add(identity)
        yield one[1], new
    for one in new_list:
        identity = _identity(after, one, by_key)
        if identity not in paired:
            yield None, one[1]


def _without(
    rows: list[_Numbered], values: list[tuple[object, ...]], same: Counter[tuple[object, ...]]
) -> list[_Numbered]:
    left = []
    for one, value in zip(rows, values, strict=True):
        if same[value] > 0:
            same[value] -= 1
        else:
            left.append(one)
    return left


def _identity(table: _Table, one: _Numbered, by_key: bool) -> tuple[object, ...]:
    """What a row is known by: its key if it has one without NULL, else its rowid; () for nothing."""
    number, row = one
    key = [row[table.columns.index(name)] for name, _ in table.key] if by_key else []
    if key and None not in key:
        return ("key", *_typed(key))
    return ("rowid", number) if number is not None else ()


def _by_key(connection: apsw.Connection, before: _Table, after: _Table) -> Iterator[_Pair]:
    """Two tables without rowids, of one key, whose columns are never NULL."""
    same_key = " AND ".join(f"b.{_quoted(name)} = a.{_quoted(name)} COLLATE {_quoted(c)}" for name, c in before.key)
    comparison = _Comparison(before, after)
    width = len(before.columns)
    pairs = connection.execute(
        f"SELECT {_list(before.columns, 'b.')}, {_list(after.columns, 'a.')}, a.{_quoted(after.key[0][0])} IS NULL "
        f"FROM {before.place} AS b LEFT JOIN {after.place} AS a ON {same_key}"
    )
    for *values, missing in pairs:
        old, new = tuple(values[:width]), tuple(values[width:])
        if missing:
            yield old, None
        elif comparison.of_before(old) != comparison.of_after(new):
            yield old, new
    added = connection.execute(
        f"SELECT {_list(after.columns, 'a.')} FROM {after.place} AS a "
        f"WHERE NOT EXISTS (SELECT 1 FROM {before.place} AS b WHERE {same_key})"
    )
    for row in added:
        yield None, tuple(row)
