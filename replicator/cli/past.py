"""The commands ``query`` and ``diff``: the past of a replica, without restoring it.

Owns their words and the form in which rows are printed. Decides nothing.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replicator.cli.options import config_option, identity_option, json_option, parse_txid, parsed
from replicator.cli.places import explained, find_config, identities_of, replica_of
from replicator.cli.words import table, tell
from replicator.errors import UsageError
from replicator.values import Position, format_time, parse_time

if TYPE_CHECKING:
    from replicator.config import Config
    from replicator.diff import Difference, RowChange
    from replicator.past import Columns, Past, Value
    from replicator.restore_plan import RestoreOptions

_WIDTH_ROWS = 100  # of a result, from which the widths of its columns are taken
_MOST_WIDTH = 60
_MOST_BLOB = 32  # bytes that are shown of a blob in a table


_MOMENT = parsed(lambda text: parse_time(text, time.time_ns() // 1_000_000))
_TXID = parsed(parse_txid)


def _parse_place(text: str) -> Position | int | tuple[int]:
    """A position, a txid, or (a time in UTC milliseconds,)."""
    if text.isascii() and text.replace(":", "", 1).isdigit():
        return parse_txid(text)
    return (parse_time(text, time.time_ns() // 1_000_000),)


_PLACE = parsed(_parse_place)


@click.command()
@click.argument("source", metavar="URL|DB")
@click.argument("sql", metavar="SQL")
@config_option
@click.option(
    "--as-of", callback=_MOMENT, metavar="T", help="As it was at T: 2026-11-24T03:12:00Z, or an age such as 5m."
)
@click.option(
    "--txid",
    callback=_TXID,
    metavar="N",
    help="As it was at a transaction, a number or TIMELINE:NUMBER; see `history`.",
)
@click.option("--timeline", type=int, metavar="N", help="Of this timeline instead of the newest; see `history`.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="At most so many rows of each statement.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, with a head for each statement.")
@identity_option
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what was fetched.")
@json_option
def query(
    source: str,
    sql: str,
    config_file: Path | None,
    no_expand_env: bool,
    as_of: int | None,
    txid: Position | int | None,
    timeline: int | None,
    limit: int | None,
    as_csv: bool,
    identity_file: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run SQL on a database as it was at some moment, without restoring it.

    Only the pages that SQLite asks for are fetched. SQL may hold several statements; they can read, and nothing else. Without
    a moment, it is the newest state in the replica. The moment that was reached is said on stderr.
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other")
    options = _options(position_or_txid=txid, at_ms=as_of, timeline=timeline)
    config, identities = (
        find_config(config_file, no_expand_env, required="://" not in source),
        identities_of(identity_file),
    )
    with _opened(source, config, identities, options) as past:
        _say_where(past)
        try:
            _print_results(past, sql, limit, "csv" if as_csv else "json" if as_json else "table")
        finally:
            if verbose:
                _say_fetched(past)


@click.command()
@click.argument("source", metavar="URL|DB")
@config_option
@click.option(
    "--from",
    "start",
    callback=_PLACE,
    required=True,
    metavar="T",
    help="The one position: a time, an age such as 1h, a transaction or TIMELINE:NUMBER.",
)
@click.option("--to", "end", callback=_PLACE, metavar="T", help="The other one. Default: the newest.")
@click.option("--timeline", type=int, metavar="N", help="Of this timeline instead of the newest; see `history`.")
@click.option("--table", metavar="NAME", help="Only this table.")
@click.option("--rows", is_flag=True, help="Print every row that differs as a line of JSON, before and after.")
@identity_option
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what was fetched.")
@json_option
def diff(
    source: str,
    config_file: Path | None,
    no_expand_env: bool,
    start: Any,
    end: Any,
    timeline: int | None,
    table: str | None,
    rows: bool,
    identity_file: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Show what changed between two positions of a replica: schema, tables, rows.

    Only tables of which a page changed are compared, by the values of their rows. A row is known by its primary key, in a table
    without one by its rowid.
    """
    from replicator.diff import Difference

    if rows and as_json:
        raise UsageError("--rows prints lines of JSON by itself; leave out --json")
    config, identities = (
        find_config(config_file, no_expand_env, required="://" not in source),
        identities_of(identity_file),
    )
    with (
        _opened(source, config, identities, _place_options(start, timeline)) as before,
        _opened(source, config, identities, _place_options(end, timeline)) as after,
        Difference(before, after) as difference,
    ):
        if rows:
            _say_where(before)
            _say_where(after)
            _print_rows(difference, table)
        else:
            document = _difference_document(before, after, difference, table)
            tell(document, as_json, *_difference_words(document))
        if verbose:
            _say_fetched(before)
            _say_fetched(after)


# -- which position ----------------------------------------------------------------------------------------------------


def _options(*, position_or_txid: Position | int | None, at_ms: int | None, timeline: int | None) -> RestoreOptions:
    from replicator.restore_plan import RestoreOptions

    return RestoreOptions(
        position=position_or_txid if isinstance(position_or_txid, Position) else None,
        txid=position_or_txid if isinstance(position_or_txid, int) else None,
        timeline=timeline,
        at_ms=at_ms,
    )


def _place_options(place: Position | int | tuple[int] | None, timeline: int | None) -> RestoreOptions:
    if isinstance(place, tuple):
        return _options(position_or_txid=None, at_ms=place[0], timeline=timeline)
    return _options(position_or_txid=place, at_ms=None, timeline=None if isinstance(place, Position) else timeline)


def _opened(source: str, config: Config | None, identities: tuple[str, ...], options: RestoreOptions) -> Past:
    from replicator.past import open_past

    store, _ = replica_of(source, config, identities)
    with explained(store, nothing_is_fine=False):
        return open_past(store, options)


def _say_where(past: Past) -> None:
    click.echo(f"{past.position}, last commit {format_time(past.reached_ms)}", err=True)


def _say_fetched(past: Past) -> None:
    fetched = past.fetched
    click.echo(
        f"{past.position}: fetched {fetched.size_bytes} bytes by {fetched.requests} requests; "
        f"the database has {past.pages.plan.size_bytes}",
        err=True,
    )


# -- results of statements ---------------------------------------------------------------------------------------------

Row = tuple["Value", ...]


def _print_results(past: Past, sql: str, limit: int | None, form: str) -> None:
    """Rows are printed as they come; JSON is one document, which stays unfinished when there is an error."""
    from replicator.past import run

    connection = past.connect()
    try:
        results = _results(run(connection, sql), limit)
        if form == "json":
            _print_json(past, results)
        else:
            for number, (names, rows) in enumerate(results):
                if number:
                    click.echo()
                _print_csv(names, rows) if form == "csv" else _print_table(names, rows)
    finally:
        connection.close()


def _results(stream: Iterator[Columns | Row], limit: int | None) -> Iterator[tuple[tuple[str, ...], Iterator[Row]]]:
    """For each statement its columns and its rows, which must be read before the next is asked for."""
    from replicator.past import Columns

    pending: list[Columns] = [one for one in islice(stream, 1) if isinstance(one, Columns)]

    def rows() -> Iterator[Row]:
        for count, one in enumerate(stream):
            if isinstance(one, Columns):
                pending.append(one)
                return
            if limit is None or count < limit:
                yield one

    while pending:
        found = rows()
        yield pending.pop().names, found
        for _ in found:
            pass


def _print_table(names: tuple[str, ...], rows: Iterator[Row]) -> None:
    """Widths are those of the first rows; a later row that needs more is not cut."""
    first = [tuple(map(_cell, row)) for row in islice(rows, _WIDTH_ROWS)]
    head = tuple(map(_plain, names))
    widths = [min(_MOST_WIDTH, max(len(row[i]) for row in [head, *first])) for i in range(len(head))]
    rest = (tuple(map(_cell, row)) for row in rows)
    for cells in chain([head, tuple("-" * width for width in widths)], first, rest):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _print_csv(names: tuple[str, ...], rows: Iterable[Row]) -> None:
    """NULL is an empty field, a blob is written as SQLite's literal."""
    for row in chain([names], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(
            [_blob(value) if isinstance(value, bytes) else value for value in row]
        )
        click.echo(line.getvalue(), nl=False)


def _print_json(past: Past, results: Iterator[tuple[tuple[str, ...], Iterator[Row]]]) -> None:
    where = json.dumps({"position": str(past.position), "reached": format_time(past.reached_ms)})
    click.echo(f'{where[:-1]}, "results": [', nl=False)
    for number, (names, rows) in enumerate(results):
        click.echo(f'{"," if number else ""}\n  {{"columns": {_dump(names)}, "rows": [', nl=False)
        for count, row in enumerate(rows):
            click.echo(("," if count else "") + "\n    " + _dump([_json_value(value) for value in row]), nl=False)
        click.echo("]}", nl=False)
    click.echo("]}")


def _cell(value: Value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return _blob(value) if len(value) <= _MOST_BLOB else f"{_blob(value[:_MOST_BLOB])}… ({len(value)} bytes)"
    return _plain(value) if isinstance(value, str) else str(value)


def _plain(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _blob(value: bytes) -> str:
    return f"x'{value.hex()}'"


def _json_value(value: Value) -> Any:
    """A blob is an object with its hex digits; JSON has no infinity, which is a text."""
    if isinstance(value, bytes):
        return {"blob": value.hex()}
    return str(value) if value in (float("inf"), float("-inf")) else value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- differences -------------------------------------------------------------------------------------------------------


def _tables(difference: Difference, table: str | None) -> list[str]:
    return difference.tables() if table is None else [table]


def _print_rows(difference: Difference, table: str | None) -> None:
    for name in _tables(difference, table):
        for change in difference.rows(name):
            click.echo(_dump(_row_document(change)))


def _row_document(change: RowChange) -> dict[str, Any]:
    sides = {
        side: None if row is None else {column: _json_value(value) for column, value in row.items()}
        for side, row in (("before", change.before), ("after", change.after))
    }
    return {"table": change.table, "change": change.change, **sides}


def _difference_document(before: Past, after: Past, difference: Difference, table: str | None) -> dict[str, Any]:
    tables = []
    for name in _tables(difference, table):
        counts = {"added": 0, "removed": 0, "changed": 0}
        for change in difference.rows(name):
            counts[change.change] += 1
        if any(counts.values()):
            tables.append({"table": name, **counts})
    return {
        "from": {"position": str(before.position), "reached": format_time(before.reached_ms)},
        "to": {"position": str(after.position), "reached": format_time(after.reached_ms)},
        "schema": [
            {"change": one.change, "type": one.kind, "name": one.name, "before": one.before, "after": one.after}
            for one in difference.schema()
            if table in (None, one.name)
        ],
        "tables": tables,
    }


def _difference_words(document: dict[str, Any]) -> Iterator[str]:
    sides = (f"{document[side]['position']} ({document[side]['reached']})" for side in ("from", "to"))
    yield "from {} to {}".format(*sides)
    yield from (f"{one['change']} {one['type']} {_plain(one['name'])}" for one in document["schema"])
    rows = [
        (_plain(one["table"]), *(str(one[change]) for change in ("added", "removed", "changed")))
        for one in document["tables"]
    ]
    if rows:
        yield from table(("TABLE", "ADDED", "REMOVED", "CHANGED"), rows)
    elif not document["schema"]:
        yield "nothing changed"


COMMANDS = (query, diff)
