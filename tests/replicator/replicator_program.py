"""A replicator in a process of its own, to be killed: replicates one database, and says after each sync what is durable.

Each line that it prints is how many rows were acknowledged before the sync began, and the position that is durable after it.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from replicator.capture import CaptureSettings
from replicator.service import Replicator
from replicator.store.file import FileStore
from replicator.upkeep import UpkeepSettings
from replicator.worker import WorkerSettings


def main(path: str, store: str, acknowledged: str, quick_upkeep: str = "") -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    # As in a life of months, in seconds: merged, thinned and deleted all the time.
    upkeep = UpkeepSettings(levels_s=(0.1, 0.3), snapshot_s=0.5, retention_s=1.0, fine_s=0.3, grace_s=0.1)
    settings = WorkerSettings(
        interval_s=0.02,
        capture=CaptureSettings(checkpoint_pages=30),
        upkeep=upkeep if quick_upkeep else UpkeepSettings(),
    )
    replicator = Replicator()
    replicator.start()
    replicator.add(Path(path), FileStore(Path(store)), settings=settings)
    while True:
        rows = Path(acknowledged).stat().st_size
        position = replicator.sync(Path(path), 30)
        print(rows, position, flush=True)
        time.sleep(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])
