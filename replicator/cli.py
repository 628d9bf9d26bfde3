"""The command ``replicator``: arguments in, one call into the library, text or JSON out.

Owns words and exit codes: 0 done, 1 failed, 2 used wrongly; what failed is one line on stderr. Decides nothing. Each command loads what it
needs, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from replicator import __version__
from replicator.errors import ConfigError, DaemonNotRunning, NothingToRestore, ReplicatorError, UsageError
from replicator.values import Position, format_size, format_time, parse_duration, parse_time, printable

if TYPE_CHECKING:
    from replicator.config import Config, DatabaseConfig, ReplicaConfig
    from replicator.restore import OnProgress, RestoreOptions, RestorePlan, RestoreReport
    from replicator.store import ObjectStore

INTERRUPTED = 130
CLOCKS_DIFFER_MS = 60_000
"""By so much the clocks of two hosts may differ before a time counts as one in the future."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code. Nothing but the message of an error reaches the user, unless ``--debug`` is among the arguments."""
    try:
        result = replicator.main(list(arguments), prog_name="replicator", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 1
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, ReplicatorError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, OSError):
            return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        return _fail(f"{type(error).__name__}: {error}; this is a defect, `replicator --debug …` shows where", 1)


def _fail(message: str, code: int) -> int:
    _note(message)
    return code


def _note(message: str) -> None:
    print(f"replicator: {printable(' '.join(message.split()))}", file=sys.stderr)


# -- options that several commands have --------------------------------------------------------------------------------


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """The callback of an option whose value one of our own parsers understands."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except UsageError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return convert


def _parse_txid(text: str) -> Position | int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else Position.parse(text)


def _check_txid(text: str) -> str:
    """The text as it is: 16 digits mean another number in a replica of Litestream's."""
    if not re.fullmatch("[0-9a-fA-F]{16}", text):
        _parse_txid(text)
    return text


DURATION = _parsed(parse_duration)
MOMENT = _parsed(lambda text: parse_time(text, time.time_ns() // 1_000_000))
TXID = _parsed(_check_txid)
FILE = click.Path(path_type=Path)


def _config_option(command: _Command) -> _Command:
    command = click.option("--no-expand-env", is_flag=True, help="Leave $NAME in the configuration as it is.")(command)
    return click.option(
        "--config",
        "config_file",
        type=FILE,
        help="Configuration file. Without it: REPLICATOR_CONFIG, /etc/replicator.yml, /etc/litestream.yml.",
    )(command)


def _socket_option(command: _Command) -> _Command:
    return click.option(
        "--socket",
        "socket_path",
        type=FILE,
        help="Control socket of the running replicator, when it is not the usual one.",
    )(command)


def _json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def _format_option(command: _Command) -> _Command:
    return click.option(
        "--format",
        "kind",
        type=click.Choice(["native", "litestream"]),
        help="Whose replica, when ours and Litestream's are both there. Default: that which reaches the later moment.",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="replicator", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show where in the code an error came from.")
def replicator(debug: bool) -> None:
    """Keep a copy of SQLite databases in object storage, up to date within a second, and restore them to any moment.

    \b
    The program that uses the database needs no change. First steps:
      replicator replicate app.db s3://bucket/app     copies from now on, until you stop it
      replicator restore -o copy.db s3://bucket/app   makes a database of the copy
    \b
    Credentials for S3 are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the usual AWS files, or the configuration.
    Where a copy goes is a URL: s3://BUCKET/PREFIX?endpoint=https://HOST for any S3 server, or file:///FOLDER.
    """


# -- replicate ---------------------------------------------------------------------------------------------------------


@replicator.command()
@click.argument("database", metavar="[DB", required=False, type=FILE)
@click.argument("url", metavar="URL]", required=False)
@_config_option
@click.option("--once", is_flag=True, help="Ship what is there now, and end.")
@click.option("--exec", "command", metavar="CMD", help="Run this program beside, and end with it and its exit code.")
@click.option(
    "--shutdown-timeout", callback=DURATION, metavar="TIME", help="For the last commits at the end. Default 30s."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Of the log on stderr.")
@_socket_option
def replicate(
    database: Path | None,
    url: str | None,
    config_file: Path | None,
    no_expand_env: bool,
    once: bool,
    command: str | None,
    shutdown_timeout: float | None,
    log_format: str | None,
    socket_path: Path | None,
) -> int:
    """Replicate databases until this is stopped.

    Either one database DB to URL, or all those that the configuration file names. On SIGTERM or Ctrl-C the last commits are
    shipped first; exit code 0 says that everything is in the store.
    """
    from replicator import daemon

    config = _config_of(database, url) if database else _need_config(config_file, no_expand_env)
    if not config.databases:
        raise UsageError(f"{config.file}: dbs names no database; add one, or run `replicator replicate DB URL`")
    options = daemon.RunOptions(
        once=once,
        exec_command=command if command is not None else ("" if once else config.exec_command),
        socket_path=socket_path,
        shutdown_timeout_s=config.shutdown_timeout_s if shutdown_timeout is None else shutdown_timeout,
    )
    if once and options.exec_command:
        raise UsageError("--once and --exec exclude each other: one ends by itself, the other with its program")
    daemon.set_up_logging(config.log_level, log_format or config.log_format)
    daemon.mention(config.notes)
    code = daemon.Daemon(config, options).run()
    if code:
        daemon.end_process(code)
    return code


def _config_of(database: Path, url: str | None) -> Config:
    from replicator.config import Config, DatabaseConfig, ReplicaConfig

    if url is None:
        raise UsageError(f"where is {database} to be replicated to? give a URL after it")
    return Config(databases=(DatabaseConfig(database.absolute(), ReplicaConfig(url)),))


# -- restore -----------------------------------------------------------------------------------------------------------


@replicator.command()
@click.argument("source", metavar="URL|DB")
@_config_option
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
@_format_option
@click.option("--dry-run", is_flag=True, help="Say what would be restored; write nothing.")
@_json_option
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
    config = _find_config(config_file, no_expand_env, required="://" not in source)
    store, entry = _replica_of(source, config)
    if output is None and "://" in source:
        raise UsageError("where is the database to be? give its path with -o")
    target = (output or Path(source)).absolute()
    if if_db_not_exists and target.exists():
        return _report({"restored": False, "reason": f"{target} exists"}, as_json, f"{target} exists; nothing to do")
    with _explained(store, if_replica_exists) as found:
        if litestream.is_meant(store, kind, options, txid, lambda what: click.echo(f"replicator: {what}", err=True)):
            progress = None if dry_run else partial(_progress_bar, str(target))
            document, words = litestream.run_restore(store, target, options, txid, progress)
            return _report(document, as_json, *words.splitlines())
        options = _at(options, txid)
        if dry_run:
            plan = plan_restore(store, options)
            _mention_moment(timestamp, plan.reached_ms)
            return _report(_plan_document(plan, target), as_json, _plan_words(plan, target))
        report = _restore(store, target, options)
    if not found:
        return _report(
            {"restored": False, "reason": "no replica"}, as_json, f"there is no replica at {store.url}; nothing to do"
        )
    _mention_moment(timestamp, report.reached_ms)
    owner = _owner(config, target, entry, store)
    then = _hand_over(owner, target, store, report) if owner else []
    return _report(_report_document(report, target), as_json, _report_words(report, target), *then)


def _mention_moment(wanted_ms: int | None, reached_ms: int) -> None:
    """A time that is still to come is answered with the newest commit; more may be made until then."""
    if wanted_ms is not None and wanted_ms > time.time_ns() // 1_000_000 + CLOCKS_DIFFER_MS:
        _note(
            f"--timestamp {format_time(wanted_ms)} is in the future; what was reached is {format_time(reached_ms)}, the newest"
        )


def _at(options: RestoreOptions, txid: str | None) -> RestoreOptions:
    """The options with a transaction of our own."""
    wish = None if txid is None else _parse_txid(txid)
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


@contextmanager
def _explained(store: ObjectStore, nothing_is_fine: bool) -> Iterator[list[bool]]:
    """Tells an empty place from the wrong moment, and a folder's replica from a database's. Yields [True], emptied if there is none."""
    found = [True]
    try:
        yield found
    except NothingToRestore as error:
        from replicator import catalogue
        from replicator.litestream.choice import is_litestream_at
        from replicator.replica import Replica

        names = list(catalogue.entries(store))
        if names:
            first = catalogue.replica_of(store, names[0]).url
            raise UsageError(
                f"{store.url} holds a folder of {len(names)} databases; name one of them, such as {first}"
            ) from error
        if not nothing_is_fine or Replica(store).segments() or is_litestream_at(store):
            raise
        found.clear()


def _owner(
    config: Config | None, target: Path, entry: DatabaseConfig | None, store: ObjectStore
) -> DatabaseConfig | None:
    """The entry that will replicate the target to the very replica it was restored from."""
    owner = entry or (config.find(target) if config else None)
    if owner is None or config is None or config.find(target) != owner:
        return None
    return owner if _store_of(owner, target).url.rstrip("/") == store.url.rstrip("/") else None


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
    return entry.state if entry.folder is None else entry.state / catalogue.encode(_name_in(entry, target))


def _name_in(entry: DatabaseConfig, path: Path) -> Path:
    return Path(os.path.realpath(path)).relative_to(os.path.realpath(entry.path))


# -- the running replicator --------------------------------------------------------------------------------------------


@replicator.command()
@_config_option
@_socket_option
@_json_option
def status(config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool) -> None:
    """Say how safe each database is, as the running replicator sees it.

    "protected (lag 0.2 s)": a commit is in the store after that time. "catching up": on its way. "NOT PROTECTED": a person must act.
    """
    from replicator import control

    found = control.status(_socket(config_file, no_expand_env, socket_path))
    databases = found["databases"]
    rows = [
        (d["path"], d["status"], d["durable"] or "-", d["durable_time"] or "-", format_size(d["waiting_bytes"]))
        for d in databases
    ]
    lines = _table(("DATABASE", "STATUS", "DURABLE", "LAST COMMIT THERE", "WAITING"), rows)
    _report(found, as_json, *lines, *(f"{d['path']}: {d['reason']}" for d in databases if d["reason"]))


@replicator.command()
@click.argument("database", metavar="DB", type=FILE)
@click.option("--wait", is_flag=True, help="Return when all that is committed now is in the store.")
@click.option(
    "--timeout",
    callback=DURATION,
    default="30s",
    metavar="TIME",
    show_default=True,
    help="For --wait; then exit code 1.",
)
@_config_option
@_socket_option
@_json_option
def sync(
    database: Path,
    wait: bool,
    timeout: float,
    config_file: Path | None,
    no_expand_env: bool,
    socket_path: Path | None,
    as_json: bool,
) -> None:
    """Have the running replicator ship a database now."""
    from replicator import control

    path = _socket(config_file, no_expand_env, socket_path)
    found = control.sync(path, database.absolute(), timeout if wait else 0.0)
    words = f"everything is in the store, up to {found['durable']}" if found["durable"] else "it is on its way"
    _report(found, as_json, f"{found['path']}: {words}")


@replicator.command()
@click.argument("url", required=False)
@_config_option
@_socket_option
@_json_option
def databases(
    url: str | None, config_file: Path | None, no_expand_env: bool, socket_path: Path | None, as_json: bool
) -> None:
    """List databases: those of a folder's replica at URL, of the configuration, or of the running replicator.

    Without URL and --config, the running replicator is asked first.
    """
    if url is not None:
        rows = _entries(url, _find_config(config_file, no_expand_env, required=False))
    elif config_file is None and (running := _running(no_expand_env, socket_path)) is not None:
        rows = running
    else:
        found = _need_config(config_file, no_expand_env)
        rows = [{"path": str(path), "url": store.url} for entry in found.databases for path, store in _members(entry)]
    _report({"databases": rows}, as_json, *_table(("DATABASE", "REPLICA"), [(r["path"], r["url"]) for r in rows]))


def _running(no_expand_env: bool, socket_path: Path | None) -> list[dict[str, Any]] | None:
    from replicator import control

    try:
        found: list[dict[str, Any]] = control.databases(_socket(None, no_expand_env, socket_path))["databases"]
    except (DaemonNotRunning, ConfigError):
        if socket_path is not None:
            raise
        return None
    return found


def _entries(url: str, config: Config | None) -> list[dict[str, Any]]:
    from replicator import catalogue

    store, _ = _replica_of(url, config)
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
        return [(entry.path, _store_of(entry, entry.path))]
    found = Finder(entry.folder).look(entry.folder.path, ())
    return [(path, _store_of(entry, path)) for path in sorted(each.path for each in found if not each.problem)]


# -- history -----------------------------------------------------------------------------------------------------------


@replicator.command()
@click.argument("source", metavar="URL|DB")
@_config_option
@_json_option
def history(source: str, config_file: Path | None, no_expand_env: bool, as_json: bool) -> None:
    """Show what a replica can restore.

    One line for each timeline, that is an unbroken history by one writer: from which it forked and where, its first and last
    transaction with their times, why it began and who wrote it.
    """
    from replicator import history as replica_history
    from replicator.litestream import history as litestream_history
    from replicator.litestream.choice import is_native_at

    store, _ = _replica_of(source, _find_config(config_file, no_expand_env, required="://" not in source))
    others = litestream_history.read(store)
    timelines: list[dict[str, Any]] = []
    if not others or is_native_at(store):
        with _explained(store, nothing_is_fine=False):
            timelines = replica_history.read(store)
    document = {"url": store.url, "timelines": timelines} | ({"litestream": others} if others else {})
    _report(document, as_json, *litestream_history.lines(others), *replica_history.tree(timelines))


# -- export ------------------------------------------------------------------------------------------------------------


@replicator.command()
@click.argument("source", metavar="URL|DB")
@click.argument("destination", metavar="TO")
@_config_option
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
@_json_option
def export(
    source: str,
    destination: str,
    config_file: Path | None,
    no_expand_env: bool,
    _kind: str,
    since: int | None,
    parallelism: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a replica out as one that Litestream 0.5 can restore, at the URL TO.

    Run again, it writes what has been added since. It deletes nothing, and refuses a place where something else is.
    """
    from replicator.litestream import command as litestream

    config = _find_config(config_file, no_expand_env, required="://" not in source)
    (store, _), (to, _) = _replica_of(source, config), _replica_of(destination, config)
    with _explained(store, nothing_is_fine=False):
        document, words = litestream.run_export(store, to, since, parallelism, dry_run=dry_run)
    _report(document, as_json, *words.splitlines())


# -- which database, which replica -------------------------------------------------------------------------------------


def _find_config(file: Path | None, no_expand_env: bool, *, required: bool) -> Config | None:
    """The configuration; None when there is none, or when the one in /etc is wrong and nothing depends on it."""
    from replicator import config

    named = file or config.default_file()
    if named is None:
        if required:
            raise UsageError("there is no configuration; name one with --config, or give a URL")
        return None
    try:
        return config.load(named, expand=not no_expand_env)
    except ConfigError as error:
        if required or file is not None:
            raise
        _note(f"the configuration is left out of account: {error}")
        return None


def _need_config(file: Path | None, no_expand_env: bool) -> Config:
    config = _find_config(file, no_expand_env, required=True)
    assert config is not None
    return config


def _replica_of(source: str, config: Config | None) -> tuple[ObjectStore, DatabaseConfig | None]:
    """The replica that a URL, or the path of a configured database, names."""
    from replicator.store import open_store

    if "://" in source:
        configured = _configured(source, config)
        return configured.open() if configured else open_store(source), None
    assert config is not None
    path = Path(source).absolute()
    found = config.find(path)
    if found is None:
        raise UsageError(
            f"{source} is not in {config.file}; give the URL of its replica, or a path that `databases` lists"
        )
    return _store_of(found, path), found


def _configured(source: str, config: Config | None) -> ReplicaConfig | None:
    """What the configuration says of the place at a URL, or above it: its server and credentials.

    A URL with another query is another place; credentials are not sent there.
    """
    place, _, query = source.partition("?")
    for entry in config.databases if config else ():
        known, _, known_query = entry.replica.url.partition("?")
        if query in ("", known_query) and f"{place.rstrip('/')}/".startswith(f"{known.rstrip('/')}/"):
            return dataclasses.replace(entry.replica, url=f"{place}?{known_query}" if known_query else place)
    return None


def _store_of(entry: DatabaseConfig, path: Path) -> ObjectStore:
    from replicator import catalogue

    store = entry.replica.open()
    return store if entry.folder is None else catalogue.replica_of(store, _name_in(entry, path))


def _socket(config_file: Path | None, no_expand_env: bool, named: Path | None) -> Path:
    from replicator import control

    if named is not None:
        return named
    if "REPLICATOR_SOCKET" not in os.environ:
        config = _find_config(config_file, no_expand_env, required=False)
        if config is not None and config.socket_path is not None:
            return config.socket_path
    return control.default_path()


# -- words -------------------------------------------------------------------------------------------------------------


def _report(document: dict[str, Any], as_json: bool, *lines: str) -> None:
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(map(printable, lines)))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


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


from replicator import cli_past as cli_past  # noqa: E402  (it registers its commands, and needs the names above)
