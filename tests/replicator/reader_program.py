"""A reader in a process of its own: looks at a database again and again until its input ends, and says what was wrong.

Each of its transactions must find tables that agree, at a count that never goes back. Imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import apsw


def main(path: str, check_every: str) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5000)
    found = {"looks": 0, "states": 0, "wrong": [], "worst_ms": 0.0}
    last = -1
    while not ended.is_set():
        began = time.monotonic()
        try:
            connection.execute("BEGIN")
            (count,) = connection.execute("SELECT n FROM counter").fetchone()
            (rows,) = connection.execute("SELECT count(*) FROM ledger WHERE n <= ?", (count,)).fetchone()
            (others,) = connection.execute("SELECT count(*) FROM ledger WHERE n > ?", (count,)).fetchone()
            (total,) = connection.execute("SELECT rows FROM counter").fetchone()
            if rows != total or others:
                found["wrong"].append(f"at {count}: {rows} + {others} rows instead of {total}")
            if found["looks"] % int(check_every) == 0:
                verdict = connection.execute("PRAGMA integrity_check(1)").get
                if verdict != "ok":
                    found["wrong"].append(f"at {count}: {verdict}")
            connection.execute("COMMIT")
        except apsw.Error as error:
            found["wrong"].append(repr(error))
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            break
        if count < last:
            found["wrong"].append(f"went back from {last} to {count}")
        found["states"] += count != last
        last = count
        found["looks"] += 1
        found["worst_ms"] = max(found["worst_ms"], (time.monotonic() - began) * 1000)
        if found["looks"] == 1:
            print("ready", flush=True)
    connection.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
