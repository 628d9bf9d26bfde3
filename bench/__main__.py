"""``make bench``: how long a commit takes to the store, and how fast a database is shipped and restored. By hand, never a test.

Owns the measurements and their table; docs/benchmarks.md keeps results with date, machine and command. Works in a temporary folder.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import apsw

from replicator import Replicator, RestoreOptions, restore
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore

IDLE_COMMITS = 40
PAUSE_S = 0.4
STORE_S = 0.005
BULK_MIB = 256
ROW_BYTES = 1000


def new_database(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    connection.execute("PRAGMA journal_mode=wal").fetchall()
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT)")
    return connection


def idle_commit(folder: Path) -> list[float]:
    """Seconds from the return of a commit on an idle database until its segment is in a store that takes STORE_S."""
    landed = threading.Event()
    store = MemoryStore(before=lambda operation, key: time.sleep(STORE_S), after=lambda operation, key: landed.set())
    path = folder / "idle.db"
    connection = new_database(path)
    replicator = Replicator()
    replicator.start()
    took = []
    try:
        replicator.add(path, store)
        replicator.sync(path, 30)
        for _ in range(IDLE_COMMITS):
            time.sleep(PAUSE_S)
            landed.clear()
            connection.execute("INSERT INTO t (body) VALUES (?)", ("x" * 100,))
            began = time.monotonic()
            landed.wait(10)
            took.append(time.monotonic() - began)
    finally:
        replicator.stop()
        connection.close()
    return took


def bulk(folder: Path) -> tuple[float, float, float]:
    """MiB, seconds from the first commit until all is durable in a folder, seconds of the restore with a full check."""
    path = folder / "bulk.db"
    store = FileStore(folder / "replica")
    connection = new_database(path)
    words = [f"row {number} " * (ROW_BYTES // 8) for number in range(1000)]
    replicator = Replicator()
    replicator.start()
    try:
        replicator.add(path, store)
        replicator.sync(path, 30)
        began = time.monotonic()
        for _ in range(BULK_MIB):
            with connection:
                connection.executemany("INSERT INTO t (body) VALUES (?)", [(word,) for word in words])
        replicator.sync(path, 300)
        shipped_s = time.monotonic() - began
    finally:
        replicator.stop()
        connection.close()
    report = restore(store, folder / "back.db", RestoreOptions(integrity_check="full"))
    return report.size_bytes / 1048576, shipped_s, report.took_s


def in_folder(measure: Callable[[Path], object]) -> object:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return measure(Path(folder))


def main() -> None:
    print(f"{time.strftime('%Y-%m-%d')}, {platform.platform()}, apsw {apsw.apsw_version()}")
    took = in_folder(idle_commit)
    assert isinstance(took, list)
    ordered = sorted(1000 * seconds for seconds in took)
    print(f"commit on an idle database -> store that takes {STORE_S * 1000:g} ms, {len(ordered)} commits:")
    print(
        f"  median {statistics.median(ordered):.1f} ms, p90 {ordered[int(len(ordered) * 0.9)]:.1f} ms, longest {ordered[-1]:.1f} ms"
    )
    result = in_folder(bulk)
    assert isinstance(result, tuple)
    size, shipped_s, restored_s = result
    print(
        f"{size:.0f} MiB database: written and shipped in {shipped_s:.1f} s, restored with a full check in {restored_s:.1f} s"
    )


main()
