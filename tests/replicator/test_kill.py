"""Claim: a replicator that is killed at any point loses nothing that it called durable, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ledger_support import App, app, restored, restored_rows, rows, wait_for

from replicator import failpoints
from replicator.restore import RestoreOptions
from replicator.store.file import FileStore
from replicator.values import Position

LARGE_ROWS = 150_000  # so that the base is written several times


class Killed:
    """What a replicator had said when it was killed."""

    def __init__(self, lines: list[str]) -> None:
        self.said = [(int(count), Position.parse(position)) for count, position in map(str.split, lines)]


@contextmanager
def replicator(
    writer: App, store: Path, failpoint: str = "", *, quick_upkeep: bool = False
) -> Iterator[subprocess.Popen[str]]:
    program = Path(__file__).with_name("replicator_program.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parents[2]), "REPLICATOR_FAILPOINT": failpoint}
    command = [sys.executable, str(program), str(writer.path), str(store), str(writer.acknowledged)]
    command += ["quick upkeep"] if quick_upkeep else []
    with (store.parent / "log").open("a") as log:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def run_until_killed(writer: App, store: Path, failpoint: str, *, quick_upkeep: bool = False) -> Killed:
    with replicator(writer, store, failpoint, quick_upkeep=quick_upkeep) as running:
        out, _ = running.communicate(timeout=60)
        assert running.returncode == -signal.SIGKILL, (store.parent / "log").read_text()[-4000:]
        return Killed(out.rpartition("\n")[0].splitlines())


def objects(store: FileStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", failpoints.NAMES)
def test_a_kill_at_any_point_loses_nothing_that_was_durable(failpoint: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    store = FileStore(tmp_path / "bucket")
    size = LARGE_ROWS if "base" in failpoint else 300
    with app(data / "app.db", "journal_mode=wal") as writer:
        writer.begin_storm(
            pause_ms=2, size=size, pragmas=["synchronous=normal"], every="PRAGMA wal_checkpoint", every_n=7
        )
        wait_for(lambda: writer.committed() > 3)
        before: dict[str, bytes] = {}
        for passage in (1, 3):
            killed = run_until_killed(writer, tmp_path / "bucket", f"{failpoint}:{passage}")
            for count, position in killed.said[-1:]:
                kept = rows(restored(store, tmp_path, RestoreOptions(position=position)))
                assert kept == list(range(1, len(kept) + 1)) and len(kept) >= count
            after = objects(store)
            assert {key: after.get(key) for key in before} == before, "an object was written twice"
            before = after
        with replicator(writer, tmp_path / "bucket") as running:
            assert running.stdout
            running.stdout.readline()
            storm = writer.end_storm()
            assert storm["errors"] == []
            durable = -1
            while durable < storm["committed"]:
                durable = int(running.stdout.readline().split()[0])
        after = objects(store)
        assert {key: after.get(key) for key in before} == before, "an object was written twice"
        assert restored_rows(store, tmp_path) == list(range(1, storm["committed"] + 1))
        assert {key.split("/")[1] for key in after if key.startswith("segments/")} <= {"00000001", "00000002"}
        writer.empty_wal()
        assert restored(store, tmp_path).read_bytes() == writer.path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", failpoints.UPKEEP_NAMES)
def test_a_kill_at_any_point_of_the_upkeep_loses_nothing_that_was_durable(failpoint: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    store = FileStore(tmp_path / "bucket")
    with app(data / "app.db", "journal_mode=wal") as writer:
        writer.begin_storm(pause_ms=2, size=300, pragmas=["synchronous=normal"])
        wait_for(lambda: writer.committed() > 3)
        for passage in (1, 4, 2):
            killed = run_until_killed(writer, tmp_path / "bucket", f"{failpoint}:{passage}", quick_upkeep=True)
            kept = restored_rows(store, tmp_path)
            assert kept == list(range(1, len(kept) + 1))
            assert len(kept) >= max((count for count, _ in killed.said), default=0)
        with replicator(writer, tmp_path / "bucket", quick_upkeep=True) as running:
            assert running.stdout
            storm = writer.end_storm()
            assert storm["errors"] == []
            durable = -1
            while durable < storm["committed"]:
                durable = int(running.stdout.readline().split()[0])
            wait_for(lambda: len(list(store.list())) < 20, what="a replica that is thinned")
        assert restored_rows(store, tmp_path) == list(range(1, storm["committed"] + 1))
        writer.empty_wal()
        assert restored(store, tmp_path).read_bytes() == writer.path.read_bytes()
