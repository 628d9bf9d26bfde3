"""Claims about restores of many databases on the command line, about what is said of moments, and of how far a download is."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from ledger_support import rows
from restore_support import STEP_MS, T0_MS, ReplicaBuilder, SourceDatabase

from replicator import catalogue, cli
from replicator.cli.progress import lines
from replicator.layout import SegmentRef
from replicator.store.file import FileStore
from replicator.values import Position, format_time

NAMES = ("one.db", "eu/two.db", "eu/three.db")


@pytest.fixture
def bucket(tmp_path: Path) -> FileStore:
    """A folder's replica of three databases with a row each, the mode of each another."""
    store, folder = FileStore(tmp_path / "bucket"), tmp_path / "source"
    (folder / "eu").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        source = SourceDatabase(folder / name)
        source.commit("CREATE TABLE ledger (id INTEGER PRIMARY KEY)")
        state = source.commit(f"INSERT INTO ledger VALUES ({number})")
        source.close()
        (folder / name).chmod(0o640 + number)
        builder = ReplicaBuilder(catalogue.register(store, folder, folder / name))
        builder.timeline(1)
        builder.snapshot(Position(1, 1), state)
    return store


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.run([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def documents(out: str) -> dict[str, Any]:
    return {Path(each["target"]).name: each for each in json.loads(out)["databases"]}


def test_a_folder_comes_back_with_owners_and_modes(
    bucket: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "restore", "-o", tmp_path / "out", bucket.url)
    assert "3 of 3 databases done" in out
    for number, name in enumerate(NAMES):
        path = tmp_path / "out" / name
        assert rows(path) == [number]
        assert stat.S_IMODE(path.stat().st_mode) == 0o640 + number


def test_one_that_fails_keeps_no_other_from_it_and_is_exit_code_1(
    bucket: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = catalogue.replica_of(bucket, Path("eu/two.db"))
    ReplicaBuilder(damaged).damage(SegmentRef(1, 9, 1, 1), lambda body: body[:-1] + b"x")
    out, err = run(capsys, "restore", "-o", tmp_path / "out", bucket.url, "--json", code=1)
    assert documents(out)["one.db"]["restored"] and "is damaged" in documents(out)["two.db"]["error"]
    assert f"{tmp_path}/out/eu/two.db: " in err
    assert rows(tmp_path / "out" / "eu" / "three.db") == [2]
    out, _ = run(capsys, "restore", "-o", tmp_path / "out", bucket.url, "--if-db-not-exists", code=1)
    assert "2 of 3 databases done, 1 FAILED" in out


def test_a_dry_run_of_a_folder_makes_nothing(
    bucket: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "restore", "--dry-run", "-o", tmp_path / "out", bucket.url)
    assert out.count("would be restored to 1:1") == 3 and "3 of 3 databases would be restored" in out
    assert not (tmp_path / "out").exists()


def test_all_databases_of_a_configuration_come_back_in_place(
    bucket: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / "source" / name).unlink()
    config = tmp_path / "r.yml"
    single = catalogue.replica_of(bucket, Path("one.db"))
    config.write_text(
        f"dbs:\n- dir: {tmp_path}/source\n  recursive: true\n  replica: {{url: '{bucket.url}'}}\n"
        f"- path: {tmp_path}/alone.db\n  replica: {{url: '{single.url}'}}\n"
    )
    out, _ = run(capsys, "restore", "--all", "--config", config)
    assert "4 of 4 databases done" in out
    assert rows(tmp_path / "alone.db") == [0]
    assert rows(tmp_path / "source" / "eu" / "three.db") == [2]
    assert (tmp_path / "source" / "eu" / ".three.db-replicator" / "base").exists()


def test_one_database_of_a_folder_keeps_its_mode(
    bucket: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = catalogue.replica_of(bucket, Path("eu/three.db")).url
    run(capsys, "restore", "-o", tmp_path / "three.db", url)
    assert stat.S_IMODE((tmp_path / "three.db").stat().st_mode) == 0o642


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--all", "file:///x"), "leave out URL, DB and -o"),
        ((), "which replica"),
        (("--txid", "3", "-o", "OUT", "URL"), "count transactions each by itself"),
        (("-o", "FILE", "URL"), "is no folder"),
    ],
)
def test_wrong_use_is_said(
    bucket: FileStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "file").touch()
    places = {"URL": bucket.url, "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    _, err = run(capsys, "restore", *(places.get(each, each) for each in arguments), code=2)
    assert words in err


def test_the_moments_around_the_one_that_was_asked_for_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = ReplicaBuilder(FileStore(tmp_path / "bucket"))
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "source.db")
    builder.snapshot(Position(1, 1), source.commit("CREATE TABLE t(x)"))
    for txid in (2, 3):
        builder.commit(Position(1, txid), source.commit("INSERT INTO t VALUES (1)"))
    source.close()

    def said(after_ms: int, code: int = 0) -> str:
        moment = format_time(T0_MS + after_ms)
        target = tmp_path / f"{after_ms}.db"
        return run(capsys, "restore", "-o", target, "--timestamp", moment, builder.store.url, code=code)[1]

    reached, following = format_time(T0_MS + 2 * STEP_MS), format_time(T0_MS + 3 * STEP_MS)
    assert f"{reached} was reached; the next one is {following}" in said(2 * STEP_MS + 1)
    assert f"is after the last commit there is; what was reached is {following}" in said(3 * STEP_MS + 1)
    assert f"its first moment is {format_time(T0_MS + STEP_MS)}" in said(0, code=1)
    assert said(2 * STEP_MS) == ""


def test_a_download_says_its_rate_and_the_time_left_now_and_then() -> None:
    now, said = [100.0], list[str]()
    on_progress = lines("app.db", lambda: now[0], said.append)
    for seconds in range(26):
        now[0] = 100.0 + seconds
        on_progress(seconds << 20, 60 << 20)
    assert said == [
        "app.db: 5.0 MiB of 60.0 MiB (8 %), 1.0 MiB/s, about 55 s left",
        "app.db: 15.0 MiB of 60.0 MiB (25 %), 1.0 MiB/s, about 45 s left",
        "app.db: 25.0 MiB of 60.0 MiB (41 %), 1.0 MiB/s, about 35 s left",
    ]
