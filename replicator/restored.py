"""After a restore to the path of a replicated database: the local state that makes the writer go on as a fork from there.

Owns nothing but that hand-over. Never touches the database, never a store.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from replicator import durable
from replicator.errors import UsageError
from replicator.restore import RestoreReport
from replicator.spool import Captured, Spool
from replicator.values import Timeline

log = logging.getLogger(__name__)

ASIDE_PREFIX = ".aside-"


def mark_restored(state_directory: Path, report: RestoreReport, timeline: Timeline) -> Path | None:
    """Note in the database's local state that what is at its path is the restored position, and nothing that was captured before.

    Replication then goes on as a new timeline whose parent is ``timeline``, the one of the restored position, and ships only what changes.
    Segments of the file that was there before, and that never reached the store, are moved into a folder of their own below the state;
    its path is returned, None when there were none. Raises DatabaseNotReplicable while a replicator uses the state, OSError.
    """
    if timeline.number != report.position.timeline:
        raise UsageError(f"{report.position} was restored, and the record is that of timeline {timeline.number}")
    spool = Spool(state_directory)
    try:
        aside = _move_aside(spool)
        spool.discard()
        spool.save_base(
            Captured(
                timeline=timeline,
                txid=report.position.txid,
                page_size=report.page_size,
                last_commit_ms=report.reached_ms,
                source=None,
                restored=True,
                hashes=report.hashes,
            )
        )
    finally:
        spool.close()
    return aside


def _move_aside(spool: Spool) -> Path | None:
    """The divergent tail: commits of the lost file that nobody has but this folder."""
    waiting = spool.waiting()
    if not waiting:
        return None
    aside = spool.directory / f"{ASIDE_PREFIX}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    durable.make_dirs(aside)
    for ref in waiting:
        durable.replace(spool.path(ref), aside / ref.file_name)
    log.warning(
        "%d segments (%d bytes) of the database that was there before never reached the store; they are kept in %s",
        len(waiting),
        sum(ref.size_bytes for ref in waiting),
        aside,
    )
    return aside
