"""The command ``replicator`` as a user has it: processes, a folder as the store, databases written with another connection."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import click
import pytest

import replicator
from replicator import cli, control
from replicator.cli import places
from replicator.config import parse
from replicator.errors import DaemonNotRunning

ROOT = Path(__file__).parents[2]
LIMIT_S = 20.0


class Place:
    """A folder of one test with a database in it, and the command as it is run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "app.db"
        self.url = f"file://{folder}/bucket"
        self.socket = folder / "control.sock"
        self.connection = apsw.Connection(str(self.database))
        self.connection.execute("PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, v)").fetchall()

    def insert(self, count: int = 1) -> int:
        for _ in range(count):
            self.connection.execute("INSERT INTO t(v) VALUES (hex(randomblob(50)))")
        return self.connection.last_insert_rowid()

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("REPLICATOR_", "LITESTREAM_"))}
        return {**kept, "PYTHONPATH": str(ROOT), "REPLICATOR_SOCKET": str(self.socket)}

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "replicator", *map(str, arguments)]

    def run(self, *arguments: object, code: int = 0, of: str = "stdout") -> str:
        """stdout, or what is named; stderr when a failure is expected."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 and of == "stdout" else done.stderr

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    @contextmanager
    def running(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """``replicate`` in the background; killed at the end if it still runs."""
        given = arguments or (self.database, self.url)
        process = subprocess.Popen(
            self.command("replicate", *given),
            cwd=self.folder,
            env=self.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            eventually(lambda: process.poll() is not None or self.answers())
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=LIMIT_S)

    def answers(self) -> bool:
        try:
            return bool(control.status(self.socket))
        except DaemonNotRunning:
            return False


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def rows(path: Path) -> list[int]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [row[0] for row in connection.execute("SELECT id FROM t ORDER BY id")]
    finally:
        connection.close()


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """What it logged, after it was told to stop."""
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.connection.close()


# -- without a process of their own ------------------------------------------------------------------------------------


def test_help_of_every_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.replicator.commands:
        assert cli.run([name, "--help"]) == 0
        assert len(capsys.readouterr().out) > 200


def test_the_docs_name_every_command_and_option() -> None:
    docs = (ROOT / "docs" / "replicator.md").read_text("utf-8")
    for name, command in cli.replicator.commands.items():
        assert f"`{name}" in docs
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert any(option in docs for option in parameter.opts), f"{name} {parameter.opts}"


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"replicator {replicator.__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == replicator.__version__


def test_every_public_name_is_there_and_restore_stays_the_function() -> None:
    import replicator.restore

    for name in replicator.__all__:
        assert getattr(replicator, name) is not None
    assert callable(replicator.restore)
    assert replicator.restore.__module__ == "replicator.restore"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["foo"], "No such command 'foo'"),
        (["replicate", "app.db"], "where is app.db to be replicated to"),
        (["replicate", "app.db", "ftp://x/y"], "is not the URL of a store"),
        (["replicate", "app.db", "file:///x", "--once", "--exec", "true"], "exclude each other"),
        (["replicate", "app.db", "file:///x", "--shutdown-timeout", "soon"], "'soon' is not a duration"),
        (["replicate", "--config", "none.yml"], "none.yml: cannot be read"),
        (["restore", "file:///nowhere"], "give its path with -o"),
        (["restore", "-o", "x", "--timestamp", "yesterday", "file:///nowhere"], "'yesterday' is not a time"),
        (["restore", "-o", "x", "--timestamp", "2026-11-24T03:12:00", "file:///nowhere"], "has no time zone"),
        (["restore", "-o", "x", "--txid", "-3", "file:///nowhere"], "is not a position"),
        (["restore", "-o", "x", "--txid", "3", "--timestamp", "5m", "file:///nowhere"], "one target"),
        (["restore", "-o", "x", "--parallelism", "0", "file:///nowhere"], "--parallelism"),
        (["restore", "app.db"], "there is no configuration"),
        (["sync"], "Missing argument 'DB'"),
        (["status", "--socket", "/x" * 90], "longer than 107 bytes"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPLICATOR_CONFIG", raising=False)
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.startswith("replicator: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["restore", "-o", "x", "file:///nowhere/at/all"], "the replica holds no segment"),
        (["history", "file:///nowhere/at/all"], "there is no replica at file:///nowhere/at/all"),
        (["status", "--socket", "none.sock"], "no replicator answers at none.sock"),
        (["sync", "--socket", "none.sock", "app.db"], "no replicator answers at none.sock"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--debug", "history", "file:///nowhere/at/all"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_restore_on_condition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.db"
    there.write_text("mine")
    assert cli.run(["restore", "--if-db-not-exists", "-o", str(there), "file:///nowhere"]) == 0
    assert there.read_text() == "mine"
    assert cli.run(["restore", "--if-replica-exists", "-o", str(tmp_path / "new.db"), "file:///nowhere"]) == 0
    assert "there is no replica at" in capsys.readouterr().out


def test_credentials_of_the_configuration_go_to_the_place_they_are_for_only() -> None:
    config = parse(
        "dbs:\n- dir: /d\n  replica: {url: 's3://b/d?endpoint=https://one', access-key-id: A, secret-access-key: S}\n",
        Path("r.yml"),
        {},
    )
    configured = places.configured_at("s3://b/d/db/x.db", config)
    assert configured is not None
    assert (configured.url, configured.secret_key) == ("s3://b/d/db/x.db?endpoint=https%3A%2F%2Fone", "S")
    for other in ("s3://b/dd", "s3://b", "s3://b/d?endpoint=https://two", "file:///b/d"):
        assert places.configured_at(other, config) is None


# -- processes ---------------------------------------------------------------------------------------------------------


def test_once_ships_everything_and_ends(place: Place) -> None:
    last = place.insert(20)
    place.run("replicate", "--once", place.database, place.url)
    place.run("restore", "-o", "copy.db", place.url)
    assert rows(place.folder / "copy.db") == list(range(1, last + 1))


def test_once_says_what_is_not_durable(place: Place) -> None:
    said = place.run("replicate", "--once", "missing.db", place.url, code=1)
    assert re.search(r"error +\S+/missing.db: NOT durable: there is no such file", said)


def test_the_first_copy_is_told_from_a_comparison(place: Place) -> None:
    place.connection.close()
    first = place.run("replicate", "--once", place.database, place.url, of="stderr")
    assert "begins timeline 1: first sight" in first
    assert "first copy of all 2 pages" in first
    visitor = apsw.Connection(str(place.database))
    visitor.execute("PRAGMA user_version = 7").fetchall()
    visitor.close()
    second = place.run("replicate", "--once", place.database, place.url, of="stderr")
    assert "what was written since the last time is not known; compared: 1 of 2 pages differ" in second


def test_a_moment_that_is_still_to_come_is_named_with_what_was_reached(place: Place) -> None:
    place.run("replicate", "--once", place.database, place.url)
    said = place.run("restore", "-o", "x.db", "--timestamp", "2999-01-01T00:00:00Z", place.url, of="stderr")
    assert "--timestamp 2999-01-01T00:00:00.000Z is in the future; what was reached is 20" in said


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_place_without_a_folder_of_databases_is_a_failure(place: Place, options: tuple[str, ...]) -> None:
    assert "there is no replica of a folder at" in place.run("databases", place.url, *options, code=1)
    place.run("replicate", "--once", place.database, place.url)
    assert "is the replica of one database, not of a folder" in place.run("databases", place.url, *options, code=1)


def test_names_of_files_never_reach_the_terminal_as_commands(place: Place) -> None:
    name = "a\x1b[2J\n.db"
    place.database.rename(place.folder / name)
    said = place.run("replicate", "--once", name, place.url, of="stderr")
    assert "a\\x1b[2J\\n.db: everything is in the store" in said
    assert "\x1b" not in said


@pytest.mark.slow
def test_the_whole_story(place: Place) -> None:
    """Replicate, write, sync, look, stop; restore the newest, a transaction and a moment."""
    with place.running() as process:
        place.insert(10)
        first = place.json("sync", "--wait", place.database)["durable"]
        eventually(lambda: place.json("status")["databases"][0]["durable_time"] is not None)
        time_then = place.json("status")["databases"][0]["durable_time"]
        eventually(lambda: time.time() > _seconds(time_then) + 0.002)
        place.insert(5)
        second = place.json("sync", "--wait", place.database)["durable"]

        database = place.json("status")["databases"][0]
        assert database["protection"] == "protected"
        assert (database["path"], database["url"]) == (str(place.database), place.url)
        assert "protected (lag" in place.run("status")
        assert place.json("databases")["databases"] == [{"path": str(place.database), "url": place.url}]
        assert "not replicated here" in place.run("sync", "--wait", "other.db", code=1)

        last = place.insert(3)
        said = end(process)
        assert process.returncode == 0
        assert "everything is in the store, up to" in said
        assert "Traceback" not in said
    assert not place.socket.exists()

    timelines = place.json("history", place.url)["timelines"]
    assert [(t["timeline"], t["parent"], t["first_txid"], t["reason"]) for t in timelines] == [
        (1, None, 1, "first sight")
    ]
    assert "timeline 1; 1 to" in place.run("history", place.url)

    report = place.json("restore", "-o", "newest.db", place.url)
    assert rows(place.folder / "newest.db") == list(range(1, last + 1))
    assert report["position"] == f"1:{timelines[0]['last_txid']}"
    place.run("restore", "-o", "first.db", "--txid", first.partition(":")[2], place.url)
    place.run("restore", "-o", "second.db", "--txid", second, "--integrity-check", "full", place.url)
    place.run("restore", "-o", "moment.db", "--timestamp", time_then, place.url)
    assert len(rows(place.folder / "first.db")) == 10
    assert len(rows(place.folder / "second.db")) == 15
    assert len(rows(place.folder / "moment.db")) == 10
    assert "exists; move it away" in place.run("restore", "-o", "moment.db", place.url, code=1)
    assert "nothing at or before" in place.run("restore", "-o", "x.db", "--timestamp", "1d", place.url, code=1)
    plan = place.json("restore", "--dry-run", "-o", "x.db", place.url)
    assert plan["position"] == report["position"]
    assert not (place.folder / "x.db").exists()


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


@pytest.mark.slow
def test_a_stop_without_a_store_is_bounded_and_says_what_is_missing(place: Place) -> None:
    with place.running(place.database, place.url, "--shutdown-timeout", "1s") as process:
        place.run("sync", "--wait", place.database)
        (place.folder / "bucket").rename(place.folder / "away")
        (place.folder / "bucket").write_text("in the way")
        place.insert()
        began = time.monotonic()
        said = end(process)
        assert process.returncode == 1
        assert time.monotonic() - began < 8
        assert re.search(r"error +\S+/app.db: NOT durable: ", said)
    (place.folder / "bucket").unlink()
    (place.folder / "away").rename(place.folder / "bucket")
    place.run("replicate", "--once", place.database, place.url)
    place.run("restore", "-o", "copy.db", place.url)
    assert rows(place.folder / "copy.db") == [1]


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(place: Place) -> None:
    with place.running(place.database, place.url, "--shutdown-timeout", "1h") as process:
        place.run("sync", "--wait", place.database)
        (place.folder / "bucket").rename(place.folder / "away")
        (place.folder / "bucket").write_text("in the way")
        place.insert()
        process.send_signal(signal.SIGTERM)
        eventually(lambda: not place.answers())  # it is on its way out, and waits for the store
        assert process.poll() is None
        end(process)
        assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_exec_returns_the_exit_code_of_its_program_after_the_last_commit_is_shipped(place: Place) -> None:
    program = "import apsw,sys; c=apsw.Connection(sys.argv[1]); c.execute('INSERT INTO t(v) VALUES (1)'); c.close(); sys.exit(7)"
    command = shlex.join([sys.executable, "-c", program, str(place.database)])
    place.run("replicate", "--exec", command, place.database, place.url, code=7)
    place.run("restore", "-o", "copy.db", place.url)
    assert rows(place.folder / "copy.db") == [1]
    assert "nowhere/prog cannot be run" in place.run(
        "replicate", "--exec", "nowhere/prog", place.database, place.url, code=2
    )


@pytest.mark.slow
def test_exec_passes_the_signal_on(place: Place) -> None:
    program = (
        "import signal,sys,pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
        "pathlib.Path('ready').touch(); signal.pause()"
    )
    command = shlex.join([sys.executable, "-c", program])
    with place.running("--exec", command, place.database, place.url) as process:
        eventually((place.folder / "ready").exists)
        said = end(process)
        assert process.returncode == 3, said


@pytest.mark.slow
def test_logs_may_be_json(place: Place) -> None:
    with place.running(place.database, place.url, "--log-format", "json") as process:
        place.run("sync", "--wait", place.database)
        lines = [json.loads(line) for line in end(process, signal.SIGINT).splitlines()]
    assert process.returncode == 0
    assert {"time", "level", "logger", "message"} <= set(lines[0])


@pytest.mark.slow
def test_a_second_replicator_of_the_same_database_is_refused(place: Place) -> None:
    with place.running():
        said = place.run("replicate", place.database, f"file://{place.folder}/elsewhere", code=1)
        assert "is in use by another replicator" in said
        assert place.answers()


@pytest.mark.slow
def test_a_configured_database_is_restored_in_place_and_goes_on_as_a_fork(place: Place) -> None:
    config = place.folder / "r.yml"
    config.write_text(f"dbs:\n- path: {place.database}\n  replica: {{url: '{place.url}'}}\n")
    place.insert(5)
    place.run("replicate", "--once", "--config", config)
    place.insert(5)
    place.run("replicate", "--once", "--config", config)
    place.connection.close()
    for file in place.folder.glob("app.db*"):
        file.unlink()

    said = place.run("restore", "--config", config, "--txid", "1", place.database)
    assert "restored" in said
    assert "as a new timeline" in said
    place.connection = apsw.Connection(str(place.database))
    assert place.insert() == 6
    place.run("replicate", "--once", "--config", config)

    timelines = place.json("history", "--config", config, place.database)["timelines"]
    assert [(t["timeline"], t["parent"], t["fork_txid"]) for t in timelines] == [(1, None, None), (2, 1, 1)]
    assert timelines[1]["reason"] == "restored"
    assert place.run("history", place.url).splitlines()[1].startswith("  timeline 2; forked from 1:1; 2 to 2")
    place.run("restore", "-o", "fork.db", place.url)
    place.run("restore", "-o", "old.db", "--timeline", "1", place.url)
    assert rows(place.folder / "fork.db") == [1, 2, 3, 4, 5, 6]
    assert rows(place.folder / "old.db") == list(range(1, 11))


@pytest.mark.slow
def test_commits_that_never_reached_the_store_are_kept_aside_by_a_restore_in_place(place: Place) -> None:
    config = place.folder / "r.yml"
    config.write_text(f"dbs:\n- path: {place.database}\n  replica: {{url: '{place.url}'}}\n")
    place.insert()
    place.run("replicate", "--once", "--config", config)
    bucket, away = place.folder / "bucket", place.folder / "away"
    bucket.rename(away)
    bucket.write_text("in the way")
    place.insert()
    place.run("replicate", "--once", "--shutdown-timeout", "500ms", "--config", config, code=1)
    bucket.unlink()
    away.rename(bucket)
    place.connection.close()
    for file in place.folder.glob("app.db*"):
        file.unlink()

    assert "never shipped, are kept in" in place.run("restore", "--config", config, place.database)
    kept = list((place.folder / ".app.db-replicator").glob(".aside-*/*.seg"))
    assert [file.name for file in kept] == ["00000001-0-0000000000000002-0000000000000002.seg"]
    place.connection = apsw.Connection(str(place.database))
    place.run("replicate", "--once", "--config", config)
    assert rows(place.database) == [1]


@pytest.mark.slow
def test_a_missing_database_is_restored_before_replication_when_the_configuration_says_so(place: Place) -> None:
    config = place.folder / "r.yml"
    config.write_text(
        f"dbs:\n- path: {place.database}\n  restore-if-db-not-exists: true\n  replica: {{url: '{place.url}'}}\n"
    )
    place.insert(3)
    place.run("replicate", "--once", "--config", config)
    place.connection.close()
    for file in [*place.folder.glob("app.db*")]:
        file.unlink()
    place.run("replicate", "--once", "--config", config)
    place.connection = apsw.Connection(str(place.database))
    assert rows(place.database) == [1, 2, 3]


@pytest.mark.slow
def test_a_folder_is_replicated_listed_and_restored_by_name(place: Place) -> None:
    (place.folder / "tenants" / "eu").mkdir(parents=True)
    for name in ("one.db", "eu/two.db"):
        connection = apsw.Connection(str(place.folder / "tenants" / name))
        connection.execute(
            "PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES(1, 2)"
        ).fetchall()
        connection.close()
    config = place.folder / "r.yml"
    config.write_text(f"dbs:\n- dir: {place.folder}/tenants\n  recursive: true\n  replica: {{url: '{place.url}'}}\n")
    place.run("replicate", "--once", "--config", config)

    listed = place.json("databases", place.url)["databases"]
    assert [entry["path"] for entry in listed] == ["eu/two.db", "one.db"]
    assert len(place.json("databases", "--config", config)["databases"]) == 2
    place.run("restore", "-o", "two.db", listed[0]["url"])
    assert rows(place.folder / "two.db") == [1]
    said = place.run("history", place.url, code=2)
    assert f"holds a folder of 2 databases; name one of them, such as {listed[0]['url']}" in said
    (place.folder / "tenants" / "eu" / "two.db").unlink()
    place.run("restore", "--config", config, place.folder / "tenants" / "eu" / "two.db")
    assert rows(place.folder / "tenants" / "eu" / "two.db") == [1]
    assert (place.folder / "tenants" / "eu" / ".two.db-replicator" / "base").exists()


@pytest.mark.slow
def test_a_wrong_configuration_stops_before_anything_starts(place: Place) -> None:
    config = place.folder / "r.yml"
    config.write_text(f"dbs:\n- path: {place.database}\n  replicaa: {{url: '{place.url}'}}\n")
    said = place.run("replicate", "--config", config, code=2)
    assert said == f"replicator: {config}:3: dbs[0].replicaa: unknown key; did you mean replica?\n"
    assert not (place.folder / "bucket").exists()
