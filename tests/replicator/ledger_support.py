"""Applications that write SQLite databases from processes of their own, and what a restore must give afterwards.

Owns no expectations of the replicator.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from replicator.restore import RestoreOptions, restore
from replicator.scheduler import Crew
from replicator.store import ObjectStore
from replicator.values import Position
from replicator.worker import DatabaseWorker, WorkerSettings

LIMIT_S = 20.0
AT_ONCE = WorkerSettings(interval_s=0.0)


def wait_for(condition: Callable[[], Any], limit_s: float = LIMIT_S, what: str = "the condition") -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {limit_s} s"
        time.sleep(0.002)
    return value


class App:
    """A process with one connection, and if told so a thread that commits numbered rows through another one."""

    def __init__(self, path: Path, *pragmas: str, busy_timeout_ms: int = 5000) -> None:
        """The number of each row is in the file ``acknowledged`` before the next one is written."""
        self.path = path
        self.acknowledged = path.parent / f"{path.name}.acknowledged-{next(_numbers)}"
        program = Path(__file__).with_name("ledger_program.py")
        command = [sys.executable, str(program), str(path), str(busy_timeout_ms), str(self.acknowledged)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for pragma in pragmas:
            self.run(f"PRAGMA {pragma}")

    def run(self, *statements: str) -> list[Any]:
        """The rows of the last one. An error of SQLite is an AssertionError here."""
        return self._ask(run=statements)

    def try_run(self, *statements: str) -> str:
        """The error, '' when there was none."""
        return str(self._answer(run=statements).get("error", ""))

    def insert(self, count: int, size: int = 100) -> None:
        """So many rows, each in a transaction of its own."""
        self._ask(insert=[count, size])

    def empty_wal(self) -> None:
        """Move all of the WAL into the file. (A connection that has not read yet would stand in its own way.)"""
        self.run("SELECT count(*) FROM sqlite_schema")
        ((is_busy, _, _),) = self.run("PRAGMA wal_checkpoint(truncate)")
        assert not is_busy

    def begin_storm(
        self, *, pause_ms: float = 1.0, size: int = 200, pragmas: Sequence[str] = (), every: str = "", every_n: int = 10
    ) -> None:
        """Commit rows without end. every: a statement to run after each ``every_n`` of them."""
        self._ask(storm=[pause_ms, size, list(pragmas), every, every_n])

    def end_storm(self) -> dict[str, Any]:
        """Keys: committed, errors, worst_ms (of a commit)."""
        return dict(self._ask(end=True))

    def committed(self) -> int:
        """Rows that the storm was told are committed, by now; also after the process was killed."""
        return self.acknowledged.stat().st_size if self.acknowledged.exists() else 0

    def fail_next_wal_sync(self) -> None:
        self._ask(fail_sync=True)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Ends as a program does that closes its connections."""
        if self._process.poll() is None:
            self._ask(close=True)
        self.wait()

    def wait(self) -> None:
        self._process.wait(LIMIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def _ask(self, **question: Any) -> Any:
        answer = self._answer(**question)
        assert "error" not in answer, answer["error"]
        return answer["ok"]

    def _answer(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


_numbers = itertools.count()


@contextmanager
def app(path: Path, *pragmas: str, busy_timeout_ms: int = 5000) -> Iterator[App]:
    running = App(path, *pragmas, busy_timeout_ms=busy_timeout_ms)
    try:
        yield running
    finally:
        if running._process.poll() is None:
            running.kill()


class Rig:
    """One database under replication without threads that step it: the test says when."""

    def __init__(
        self,
        path: Path,
        store: ObjectStore,
        state: Path | None = None,
        settings: WorkerSettings = AT_ONCE,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.store = store
        self._crew = Crew(4, "rig-upload")
        self.worker = DatabaseWorker(
            path,
            store,
            state or path.parent / "state",
            self._crew,
            settings,
            lambda worker: None,
            lambda upkeep, delay_s: None,
            writer="test",
            now_ms=now_ms,
        )
        self.figures = self.worker.figures

    def step(self) -> float | None:
        return self.worker.step()

    def settle(self) -> Position:
        """Step until everything that was committed before the call is durable."""
        self.step()

        def settled() -> Position | None:
            status = self.worker.status()
            if status.reason or status.captured != status.durable:
                self.step()
                return None
            return status.durable

        try:
            position: Position = wait_for(settled)
        except AssertionError:
            raise AssertionError(f"not durable: {self.worker.status()}") from None
        return position

    def close(self) -> None:
        self.worker.close()
        assert self._crew.stop(LIMIT_S)


@contextmanager
def rig(path: Path, store: ObjectStore, **more: Any) -> Iterator[Rig]:
    running = Rig(path, store, **more)
    try:
        yield running
    finally:
        running.close()


_targets = itertools.count()


def restored(store: ObjectStore, folder: Path, options: RestoreOptions | None = None) -> Path:
    """The path of a new file with what the store gives; chain, checksums and SQLite's own check have passed."""
    target = folder / f"restored-{next(_targets)}.db"
    restore(store, target, RestoreOptions(**{**vars(options or RestoreOptions()), "integrity_check": "full"}))
    return target


def rows(path: Path, sql: str = "SELECT id FROM ledger ORDER BY id") -> list[Any]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [row[0] if len(row) == 1 else row for row in connection.execute(sql)]
    finally:
        connection.close()


def restored_rows(store: ObjectStore, folder: Path, sql: str = "SELECT id FROM ledger ORDER BY id") -> list[Any]:
    return rows(restored(store, folder), sql)
