"""What is in the bucket of a fleet, seen past the platform: through the replicator's library alone."""

from __future__ import annotations

from pathlib import Path

import apsw
from support.seaweed import SeaweedServer

from replicator import ObjectStore, RestoreOptions, open_store, restore


def bucket_of(url: str, server: SeaweedServer) -> ObjectStore:
    return open_store(url, access_key=server.access_key, secret_key=server.secret_key)


def restored_rows(url: str, server: SeaweedServer, target: Path) -> int:
    """Rows of the newest guestbook in the bucket, after the checks of a restore; ids without a gap."""
    store = bucket_of(url, server)
    volume = next(info.key.split("/")[1] for info in store.list("volumes/"))
    restore(store.sub(f"volumes/{volume}/db/guestbook.db"), target, RestoreOptions(integrity_check="full"))
    connection = apsw.Connection(str(target), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows, highest = connection.execute("SELECT count(*), max(id) FROM entries").get
        assert rows == highest, "a prefix has no gap"
        return int(rows)
    finally:
        connection.close()
