"""Writes litestream-VERSION/: a small replica by a released Litestream, and what that program restores from it.

    python tests/replicator/golden/make_litestream.py /path/to/litestream

Owns the making only; the files stay as they are for good. ``states.json``: SHA-256 of the restored file, for each txid of a
0.5 replica, and for "" the newest state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import apsw

GOLDEN = Path(__file__).parent
CONFIG = {
    "0.3": """
dbs:
  - {path: DB, monitor-interval: 100ms, min-checkpoint-page-count: 20, replicas: [
      {type: file, path: REPLICA, sync-interval: 100ms, snapshot-interval: 2s}]}
""",
    "0.5": """
snapshot: {interval: 3s}
levels: [{interval: 1s}, {interval: 2s}]
dbs:
  - {path: DB, monitor-interval: 100ms, replica: {type: file, path: REPLICA, sync-interval: 100ms}}
""",
}


def main(binary: str) -> None:
    version = subprocess.run([binary, "version"], capture_output=True, text=True, check=True).stdout.strip().lstrip("v")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replica = folder / "replica"
        make(binary, folder, replica, version[:3])
        states = {txid: restored(binary, folder, replica, txid) for txid in txids(replica)}
        target = GOLDEN / f"litestream-{version}"
        shutil.copytree(replica, target)
        (target / "states.json").write_text(json.dumps(states, indent=2) + "\n")


def make(binary: str, folder: Path, replica: Path, series: str) -> None:
    database, config = folder / "app.db", folder / "litestream.yml"
    config.write_text(CONFIG[series].replace("DB", str(database)).replace("REPLICA", str(replica)))
    process = subprocess.Popen([binary, "replicate", "-config", str(config)])
    try:
        use(database)
        time.sleep(1)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def use(database: Path) -> None:
    """Growth, change in place, and a VACUUM that shrinks."""
    connection = apsw.Connection(str(database))
    connection.set_busy_timeout(5000)
    connection.execute(
        "PRAGMA page_size=512; PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, v)"
    ).fetchall()
    for number in range(10):
        connection.execute("INSERT INTO t(v) VALUES (?)", ("abc " * (20 + 150 * (number % 4)),))
        if number == 6:
            connection.execute("DELETE FROM t WHERE id < 6; VACUUM").fetchall()
        time.sleep(0.4)
    connection.close()


def txids(replica: Path) -> list[str]:
    return ["", *sorted(path.stem[17:] for path in replica.glob("ltx/0/*.ltx"))]


def restored(binary: str, folder: Path, replica: Path, txid: str) -> str:
    output = folder / f"restored-{txid}"
    wish = ["-txid", txid] if txid else []
    subprocess.run([binary, "restore", *wish, "-o", str(output), f"file://{replica}"], check=True)
    return hashlib.sha256(output.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1])
