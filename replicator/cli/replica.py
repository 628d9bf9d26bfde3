"""Commands that look at a replica, or copy it: ``databases``, ``history`` and ``export``. Owns their words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replicator.cli.options import MOMENT, config_option, identity_option, json_option, socket_option
from replicator.cli.places import (
    explained,
    find_config,
    identities_of,
    need_config,
    replica_of,
    socket_of,
    store_of,
)
from replicator.cli.words import table, tell
from replicator.errors import ConfigError, DaemonNotRunning, NothingToRestore, UsageError

if TYPE_CHECKING:
    from replicator.config import Config, DatabaseConfig
    from replicator.store import ObjectStore


@click.command()
@click.argument("url", required=False)
@config_option
@identity_option
@socket_option
@json_option
def databases(
    url: str | None,
    config_file: Path | None,
    no_expand_env: bool,
    identity_file: Path | None,
    socket_path: Path | None,
    as_json: bool,
) -> None:
    """List databases: those of a folder's replica at URL, of the configuration, or of the running replicator.

    Without URL and --config, the running replicator is asked first.
    """
    if url is not None:
        rows = _entries(url, find_config(config_file, no_expand_env, required=False), identities_of(identity_file))
    elif config_file is None and (running := _running(no_expand_env, socket_path)) is not None:
        rows = running
    else:
        found = need_config(config_file, no_expand_env)
        rows = [{"path": str(path), "url": store.url} for entry in found.databases for path, store in _members(entry)]
    tell({"databases": rows}, as_json, *table(("DATABASE", "REPLICA"), [(r["path"], r["url"]) for r in rows]))


def _running(no_expand_env: bool, socket_path: Path | None) -> list[dict[str, Any]] | None:
    from replicator import control

    try:
        found = control.databases(socket_of(None, no_expand_env, socket_path))["databases"]
    except (DaemonNotRunning, ConfigError):
        if socket_path is not None:
            raise
        return None
    return [{"path": each["path"], "url": each["url"]} for each in found]


def _entries(url: str, config: Config | None, identities: tuple[str, ...]) -> list[dict[str, Any]]:
    from replicator import catalogue

    store, _ = replica_of(url, config, identities)
    entries = catalogue.entries(store)
    if not entries:
        raise _no_folder(store)
    return [
        {"path": str(name), "url": catalogue.replica_of(store, name).url, "mode": f"{entry.mode:04o}"}
        for name, entry in sorted(entries.items())
    ]


def _no_folder(store: ObjectStore) -> NothingToRestore:
    from replicator.replica import Replica

    if Replica(store).timelines():
        return NothingToRestore(
            f"{store.url} is the replica of one database, not of a folder; see `replicator history`"
        )
    return NothingToRestore(
        f"there is no replica of a folder at {store.url}; check the URL, or let the first database be shipped"
    )


def _members(entry: DatabaseConfig) -> Iterable[tuple[Path, ObjectStore]]:
    from replicator.discovery import Finder

    if entry.folder is None:
        return [(entry.path, store_of(entry, entry.path))]
    found = Finder(entry.folder).look(entry.folder.path, ())
    return [(path, store_of(entry, path)) for path in sorted(each.path for each in found if not each.problem)]


@click.command()
@click.argument("source", metavar="URL|DB")
@config_option
@identity_option
@json_option
def history(
    source: str, config_file: Path | None, no_expand_env: bool, identity_file: Path | None, as_json: bool
) -> None:
    """Show what a replica can restore.

    One line for each timeline, that is an unbroken history by one writer: from which it forked and where, its first and last
    transaction with their times, why it began and who wrote it.
    """
    from replicator import history as replica_history
    from replicator.litestream import history as litestream_history
    from replicator.litestream.choice import is_native_at
    from replicator.store.seal import bare

    config = find_config(config_file, no_expand_env, required="://" not in source)
    store, _ = replica_of(source, config, identities_of(identity_file))
    others = litestream_history.read(bare(store))
    timelines: list[dict[str, Any]] = []
    if not others or is_native_at(store):
        with explained(store, nothing_is_fine=False):
            timelines = replica_history.read(store)
    document = {"url": store.url, "timelines": timelines} | ({"litestream": others} if others else {})
    tell(document, as_json, *litestream_history.lines(others), *replica_history.tree(timelines))


@click.command()
@click.argument("source", metavar="URL|DB")
@click.argument("destination", metavar="TO")
@config_option
@identity_option
@click.option(
    "--format",
    "_kind",
    type=click.Choice(["litestream"]),
    default="litestream",
    show_default=True,
    help="What to write.",
)
@click.option(
    "--from",
    "since",
    callback=MOMENT,
    metavar="T",
    help="Every moment from T on is to be in it. Default: from the newest snapshot on.",
)
@click.option("--parallelism", type=click.IntRange(1, 64), default=8, show_default=True, help="Uploads at once.")
@click.option("--dry-run", is_flag=True, help="Say what would be written; write nothing.")
@json_option
def export(
    source: str,
    destination: str,
    config_file: Path | None,
    no_expand_env: bool,
    identity_file: Path | None,
    _kind: str,
    since: int | None,
    parallelism: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a replica out as one that Litestream 0.5 can restore, at the URL TO.

    Run again, it writes what has been added since. It deletes nothing, and refuses a place where something else is. What it writes
    is not encrypted, since Litestream 0.5 has no encryption.
    """
    from replicator.litestream import command as litestream
    from replicator.store.seal import bare

    config = find_config(config_file, no_expand_env, required="://" not in source)
    store, _ = replica_of(source, config, identities_of(identity_file))
    to, _ = replica_of(destination, config)
    if bare(to) is not to:
        raise UsageError(
            f"{config.file if config else destination} says that {to.url} is to be encrypted, and Litestream 0.5 has no encryption; "
            "export to another place"
        )
    with explained(store, nothing_is_fine=False):
        document, words = litestream.run_export(store, to, since, parallelism, dry_run=dry_run)
    tell(document, as_json, *words.splitlines())


COMMANDS = (databases, history, export)
