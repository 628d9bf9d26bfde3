"""The command ``restore``: a replica becomes a database file. Owns its words, and whether replication goes on from there."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replicator.cli.options import (
    FILE,
    MOMENT,
    TXID,
    config_option,
    format_option,
    identity_option,
    json_option,
    parse_txid,
)
from replicator.cli.places import explained, find_config, identities_of, name_in, replica_of, store_of
from replicator.cli.words import note, tell
from replicator.errors import UsageError
from replicator.values import Position, format_size, format_time

if TYPE_CHECKING:
    from replicator.config import Config, DatabaseConfig
    from replicator.restore import OnProgress, RestoreOptions, RestorePlan, RestoreReport
    from replicator.store import ObjectStore


CLOCKS_DIFFER_MS = 60_000
"""By so much the clocks of two hosts may differ before a time counts as one in the future."""


@click.command()
@click.argument("source", metavar="URL|DB")
@config_option
@click.option("-o", "--output", type=FILE, help="Where the database is to be. Default for DB: its own path.")
@click.option(
    "--timestamp", callback=MOMENT, metavar="T", help="As it was at T: 2026-11-24T03:12:00Z, or an age such as 5m."
)
@click.option(
    "--txid",
    callback=TXID,
    metavar="N",
    help="As it was at a transaction: a number or TIMELINE:NUMBER, of Litestream's 16 hex digits; see `history`.",
)
@click.option("--timeline", type=int, metavar="N", help="Of this timeline instead of the newest; see `history`.")
@click.option("--if-db-not-exists", is_flag=True, help="Do nothing, and succeed, when there is a file at the output.")
@click.option("--if-replica-exists", is_flag=True, help="Do nothing, and succeed, when there is nothing at the URL.")
@click.option(
    "--integrity-check",
    type=click.Choice(["none", "quick", "full"]),
    default="quick",
    show_default=True,
    help="SQLite's own check of the result. Checksums of every page are verified in any case.",
)
@click.option("--parallelism", type=click.IntRange(1, 64), default=8, show_default=True, help="Downloads at once.")
@identity_option
@format_option
@click.option("--dry-run", is_flag=True, help="Say what would be restored; write nothing.")
@json_option
def restore(
    source: str,
    config_file: Path | None,
    no_expand_env: bool,
    output: Path | None,
    timestamp: int | None,
    txid: str | None,
    timeline: int | None,
    if_db_not_exists: bool,
    if_replica_exists: bool,
    integrity_check: str,
    parallelism: int,
    identity_file: Path | None,
    kind: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a database file of a replica, one of ours or one that Litestream (0.3 or 0.5) made.

    The replica is given by its URL, or by the path of a database in the configuration. A file that exists is never
    overwritten; what is restored has been verified to the last page, or there is an error and no file.
    """
    from replicator.litestream import command as litestream
    from replicator.restore import RestoreOptions, plan_restore

    options = RestoreOptions(
        timeline=timeline,
        at_ms=timestamp,
        parallelism=parallelism,
        integrity_check=integrity_check,  # type: ignore[arg-type]  # click.Choice gives one of the three
    )
    config = find_config(config_file, no_expand_env, required="://" not in source)
    store, entry = replica_of(source, config, identities_of(identity_file))
    if output is None and "://" in source:
        raise UsageError("where is the database to be? give its path with -o")
    target = (output or Path(source)).absolute()
    if if_db_not_exists and target.exists():
        return tell({"restored": False, "reason": f"{target} exists"}, as_json, f"{target} exists; nothing to do")
    with explained(store, if_replica_exists) as found:
        if litestream.is_meant(store, kind, options, txid, lambda what: click.echo(f"replicator: {what}", err=True)):
            progress = None if dry_run else partial(_progress_bar, str(target))
            document, words = litestream.run_restore(store, target, options, txid, progress)
            return tell(document, as_json, *words.splitlines())
        options = _at(options, txid)
        if dry_run:
            plan = plan_restore(store, options)
            _mention_moment(timestamp, plan.reached_ms)
            return tell(_plan_document(plan, target), as_json, _plan_words(plan, target))
        report = _restore(store, target, options)
    if not found:
        return tell(
            {"restored": False, "reason": "no replica"}, as_json, f"there is no replica at {store.url}; nothing to do"
        )
    _mention_moment(timestamp, report.reached_ms)
    owner = _owner(config, target, entry, store)
    then = _hand_over(owner, target, store, report) if owner else []
    return tell(_report_document(report, target), as_json, _report_words(report, target), *then)


def _mention_moment(wanted_ms: int | None, reached_ms: int) -> None:
    """A time that is still to come is answered with the newest commit; more may be made until then."""
    if wanted_ms is not None and wanted_ms > time.time_ns() // 1_000_000 + CLOCKS_DIFFER_MS:
        note(
            f"--timestamp {format_time(wanted_ms)} is in the future; what was reached is {format_time(reached_ms)}, the newest"
        )


def _at(options: RestoreOptions, txid: str | None) -> RestoreOptions:
    """The options with a transaction of our own."""
    wish = None if txid is None else parse_txid(txid)
    if isinstance(wish, Position):
        return dataclasses.replace(options, position=wish)
    return dataclasses.replace(options, txid=wish)


def _restore(store: ObjectStore, target: Path, options: RestoreOptions) -> RestoreReport:
    from replicator import restore as restore_database

    with _progress_bar(str(target)) as on_progress:
        return restore_database(store, target, options, on_progress=on_progress)


@contextmanager
def _progress_bar(title: str) -> Iterator[OnProgress | None]:
    """On a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _owner(
    config: Config | None, target: Path, entry: DatabaseConfig | None, store: ObjectStore
) -> DatabaseConfig | None:
    """The entry that will replicate the target to the very replica it was restored from."""
    owner = entry or (config.find(target) if config else None)
    if owner is None or config is None or config.find(target) != owner:
        return None
    return owner if store_of(owner, target).url.rstrip("/") == store.url.rstrip("/") else None


def _hand_over(entry: DatabaseConfig, target: Path, store: ObjectStore, report: RestoreReport) -> list[str]:
    """Have replication go on from the restored position; lines on what happens."""
    from replicator import mark_restored
    from replicator.errors import DatabaseNotReplicable
    from replicator.replica import Replica

    record = Replica(store).timelines().get(report.position.timeline)
    if record is None:
        return ["the replica has no record of this timeline; replication begins with a snapshot"]
    try:
        aside = mark_restored(_state_of(entry, target), report, record)
    except DatabaseNotReplicable:
        return ["a replicator runs for this database; it compares the file and goes on with a new timeline"]
    lines = [f"replication goes on from here as a new timeline; {report.position} stays as it is"]
    if aside is not None:
        lines.append(f"commits of the file that was there before, and that were never shipped, are kept in {aside}")
    return lines


def _state_of(entry: DatabaseConfig, target: Path) -> Path:
    from replicator import catalogue, default_state

    if entry.state is None:
        return default_state(entry.path if entry.folder is None else target)
    return entry.state if entry.folder is None else entry.state / catalogue.encode(name_in(entry, target))


def _plan_document(plan: RestorePlan, target: Path) -> dict[str, Any]:
    return {
        "target": str(target),
        "position": str(plan.position),
        "reached": format_time(plan.reached_ms),
        "size_bytes": plan.size_bytes,
        "download_bytes": plan.download_bytes,
        "segments": [ref.key for ref in plan.segments],
    }


def _plan_words(plan: RestorePlan, target: Path) -> str:
    return (
        f"{target} would be restored to {plan.position}, last commit {format_time(plan.reached_ms)}: {format_size(plan.size_bytes)} "
        f"from {len(plan.segments)} segments of {format_size(plan.download_bytes)}"
    )


def _report_document(report: RestoreReport, target: Path) -> dict[str, Any]:
    return {
        "restored": True,
        "target": str(target),
        "position": str(report.position),
        "reached": format_time(report.reached_ms),
        "size_bytes": report.size_bytes,
        "state_checksum": f"{report.state_checksum:016x}",
        "segments": report.segments,
        "downloaded_bytes": report.downloaded_bytes,
        "took_s": round(report.took_s, 3),
    }


def _report_words(report: RestoreReport, target: Path) -> str:
    return (
        f"restored {target} to {report.position}, last commit {format_time(report.reached_ms)}: "
        f"{format_size(report.size_bytes)} from {report.segments} segments in {report.took_s:.1f} s"
    )


COMMANDS = (restore,)
