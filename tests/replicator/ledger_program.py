"""An application of its own process that writes an SQLite database: JSON lines in, JSON lines out.

Imports nothing of ours, so that it starts in no time. ``ledger_support.App`` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import apsw

LEDGER = "CREATE TABLE IF NOT EXISTS ledger (id INTEGER PRIMARY KEY, body BLOB)"


class _FailingSyncs(apsw.VFS):
    """SQLite's own, but for WALs that fail to become durable when told so."""

    def __init__(self) -> None:
        self.fail_next = False
        super().__init__("failing-syncs", "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _FailingFile(self, name, flags)


class _FailingFile(apsw.VFSFile):
    def __init__(self, vfs: _FailingSyncs, name: Any, flags: list[int]) -> None:
        self._vfs = vfs
        self._is_wal = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__("", name, flags)

    def xSync(self, flags: int) -> None:
        if self._is_wal and self._vfs.fail_next:
            self._vfs.fail_next = False
            raise apsw.IOError("told to fail")
        super().xSync(flags)


class _Program:
    def __init__(self, path: str, busy_timeout_ms: str, acknowledged: str) -> None:
        self._path = path
        self._busy_timeout_ms = int(busy_timeout_ms)
        self._acknowledged = acknowledged
        self._syncs = _FailingSyncs()
        self._connection: apsw.Connection | None = None
        self._ending = threading.Event()
        self._storming: threading.Thread | None = None
        self._report: dict[str, Any] = {}

    def answer(self, question: dict[str, Any]) -> Any:
        name, value = next(iter(question.items()))
        return getattr(self, f"_{name}")(value)

    @property
    def connection(self) -> apsw.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(self._path, vfs="failing-syncs")
        connection.set_busy_timeout(self._busy_timeout_ms)
        return connection

    def _run(self, statements: list[str]) -> list[Any]:
        found: list[Any] = []
        for statement in statements:
            found = self.connection.execute(statement).fetchall()
        return [row[0] if len(row) == 1 else row for row in found]

    def _insert(self, value: list[int]) -> None:
        count, size = value
        self.connection.execute(LEDGER)
        for _ in range(count):
            self.connection.execute("INSERT INTO ledger(body) VALUES (randomblob(?))", (size,))

    def _storm(self, value: list[Any]) -> None:
        self._ending.clear()
        self._storming = threading.Thread(target=self._write_on, args=value, daemon=True)
        self._storming.start()

    def _write_on(self, pause_ms: float, size: int, pragmas: list[str], every: str, every_n: int) -> None:
        report = self._report = {"committed": 0, "errors": [], "worst_ms": 0.0}
        ledger = os.open(self._acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            connection = self._connect()
            for pragma in pragmas:
                connection.execute(f"PRAGMA {pragma}").fetchall()
            connection.execute(LEDGER)
            while not self._ending.wait(pause_ms / 1000):
                began = time.monotonic()
                connection.execute("INSERT INTO ledger(body) VALUES (randomblob(?))", (size,))
                os.write(ledger, b".")
                report["worst_ms"] = max(report["worst_ms"], (time.monotonic() - began) * 1000)
                report["committed"] += 1
                if every and report["committed"] % every_n == 0:
                    connection.execute(every).fetchall()
            connection.close()
        except apsw.Error as error:
            report["errors"].append(repr(error))
        finally:
            os.close(ledger)

    def _end(self, _: bool) -> dict[str, Any]:
        self._ending.set()
        if self._storming:
            self._storming.join()
        return self._report

    def _fail_sync(self, _: bool) -> None:
        self._syncs.fail_next = True

    def _close(self, _: bool) -> None:
        if self._connection:
            self._connection.close()


def main() -> None:
    program = _Program(*sys.argv[1:])
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"ok": program.answer(question)}
        except apsw.Error as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer, default=bytes.hex), flush=True)
        if "close" in question:
            return


if __name__ == "__main__":
    main()
