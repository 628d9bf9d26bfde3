"""The command ``restore``: replicas become database files. Owns which, and whether replication goes on from there."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replicator.cli import progress, restore_follow, restore_many
from replicator.cli.options import (
    DURATION,
    FILE,
    MOMENT,
    TXID,
    config_option,
    format_option,
    identity_option,
    json_option,
    parse_txid,
)
from replicator.cli.places import (
    explained,
    find_config,
    folder_entry,
    identities_of,
    is_folder,
    name_in,
    need_config,
    replica_of,
    store_of,
)
from replicator.cli.restore_many import Job, Said
from replicator.cli.restore_words import moment_words, plan_document, plan_words, report_document, report_words
from replicator.cli.words import note, tell
from replicator.errors import UsageError
from replicator.values import Position

if TYPE_CHECKING:
    from replicator.config import Config, DatabaseConfig
    from replicator.restore import OnProgress, RestoreReport
    from replicator.restore_plan import RestoreOptions
    from replicator.store import ObjectStore


CLOCKS_DIFFER_MS = 60_000
"""By so much the clocks of two hosts may differ before a time counts as one in the future."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the options ask for, of each database. txid, kind: as the user wrote them."""

    options: RestoreOptions
    txid: str | None
    kind: str | None
    if_db_not_exists: bool
    if_replica_exists: bool
    dry_run: bool


@click.command()
@click.argument("source", metavar="URL|DB", required=False)
@click.option("--all", "everything", is_flag=True, help="Every database of the configuration, each to its own path.")
@config_option
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="Where the database, or the folder of databases, is to be. Default for DB: its own path.",
)
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
@click.option(
    "--follow", is_flag=True, help="Keep the copy up to date until this is stopped; others may read it meanwhile."
)
@click.option(
    "--follow-interval",
    callback=DURATION,
    metavar="TIME",
    default="1s",
    show_default=True,
    help="Between two looks at the replica.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be restored; write nothing.")
@json_option
def restore(
    source: str | None,
    everything: bool,
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
    follow: bool,
    follow_interval: float,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make a database file of a replica, one of ours or one that Litestream (0.3 or 0.5) made.

    The replica is given by its URL, or by the path of a database in the configuration. The URL of a folder's replica restores all its
    databases below -o. A file that exists is never overwritten; what is restored has been verified to the last page, or there
    is an error and no file. What a restore had when it was interrupted is kept beside the target, and the next one goes on with it.
    """
    from replicator.restore_plan import RestoreOptions

    options = RestoreOptions(
        timeline=timeline,
        at_ms=timestamp,
        parallelism=parallelism,
        integrity_check=integrity_check,  # type: ignore[arg-type]  # click.Choice gives one of the three
        resume=True,
    )
    identities = identities_of(identity_file)
    wish = Wish(options, txid, kind, if_db_not_exists, if_replica_exists, dry_run)
    if everything:
        if source is not None or output is not None:
            raise UsageError(
                "--all restores each database of the configuration to its own path; leave out URL, DB and -o"
            )
        known = need_config(config_file, no_expand_env)
        return _restore_many(restore_many.of_config(known, identities), wish, known, as_json)
    if source is None:
        raise UsageError("which replica? give its URL, the path of a configured database, or --all")
    config = find_config(config_file, no_expand_env, required="://" not in source)
    store, configured = replica_of(source, config, identities)
    if output is None and "://" in source:
        raise UsageError("where is the database to be? give its path with -o")
    target = (output or Path(source)).absolute()
    if if_db_not_exists and not follow and target.exists() and not target.is_dir():
        tell({"restored": False, "reason": f"{target} exists"}, as_json, f"{target} exists; nothing to do")
        return 0
    if configured is None and is_folder(store):
        return _restore_many(restore_many.of_folder(store, target), wish, config, as_json)
    if follow:
        if dry_run or txid is not None or kind == "litestream" or configured is not None:
            raise UsageError(
                "--follow keeps one copy of a replica at a URL up to date; leave out what does not fit to that"
            )
        return restore_follow.run(store, target, options, follow_interval, as_json)
    job = Job(store, target, folder_entry(source, configured, config, identities), configured)
    with progress.shown(str(target)) as on_progress:
        document, lines = _restore_one(job, on_progress, wish, config)
    tell(document, as_json, *lines)
    return 0


def _restore_many(jobs: list[Job], wish: Wish, config: Config | None, as_json: bool) -> int:
    if wish.txid is not None or wish.options.timeline is not None:
        raise UsageError(
            "databases count transactions each by itself; say which moment with --timestamp, or restore them one by one"
        )

    def act(job: Job, on_progress: OnProgress, parallelism: int) -> Said:
        own = dataclasses.replace(wish, options=dataclasses.replace(wish.options, parallelism=parallelism))
        return _restore_one(job, on_progress, own, config)

    document, lines, is_whole = restore_many.run(jobs, act, wish.options.parallelism, dry_run=wish.dry_run)
    tell(document, as_json, *lines)
    return 0 if is_whole else 1


def _restore_one(job: Job, on_progress: OnProgress, wish: Wish, config: Config | None) -> Said:
    from replicator import restore as restore_database
    from replicator.litestream import command as litestream
    from replicator.restore import plan_restore

    target, store = job.target, job.store
    if wish.if_db_not_exists and target.exists():
        return {"restored": False, "target": str(target), "reason": f"{target} exists"}, [
            f"{target} exists; nothing to do"
        ]
    options = wish.options
    if job.entry is not None:
        options = dataclasses.replace(options, mode=job.entry.mode, owner=(job.entry.uid, job.entry.gid))
    with explained(store, wish.if_replica_exists) as found:
        if litestream.is_meant(
            store, wish.kind, options, wish.txid, lambda what: click.echo(f"replicator: {what}", err=True)
        ):
            document, words = litestream.run_restore(
                store, target, options, wish.txid, None if wish.dry_run else on_progress
            )
            return document, words.splitlines()
        options = _at(options, wish.txid)
        if wish.dry_run:
            plan = plan_restore(store, options)
            _mention_moment(store, options, plan.position, plan.reached_ms)
            return plan_document(plan, target), [plan_words(plan, target)]
        report = restore_database(store, target, options, on_progress=on_progress)
    if not found:
        words = f"there is no replica at {store.url}; nothing to do"
        return {"restored": False, "target": str(target), "reason": "no replica"}, [words]
    _mention_moment(store, options, report.position, report.reached_ms)
    owner = _owner(config, target, job.configured, store)
    then = _hand_over(owner, target, store, report) if owner else []
    return report_document(report, target), [report_words(report, target), *then]


def _mention_moment(store: ObjectStore, options: RestoreOptions, position: Position, reached_ms: int) -> None:
    """What is nearest to the moment that was asked for, when it is none of those that can be restored."""
    from replicator.replica import Replica

    wanted_ms = options.at_ms
    if wanted_ms is None or wanted_ms == reached_ms:
        return
    is_to_come = wanted_ms > time.time_ns() // 1_000_000 + CLOCKS_DIFFER_MS
    next_ms = None if is_to_come else Replica(store).moment_after(position, options.timeline)
    note(moment_words(wanted_ms, reached_ms, next_ms, is_to_come=is_to_come))


def _at(options: RestoreOptions, txid: str | None) -> RestoreOptions:
    """The options with a transaction of our own."""
    wish = None if txid is None else parse_txid(txid)
    if isinstance(wish, Position):
        return dataclasses.replace(options, position=wish)
    return dataclasses.replace(options, txid=wish)


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


COMMANDS = (restore,)
