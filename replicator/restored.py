"""After a restore to the path of a replicated database: the local state that makes the writer go on as a fork from there.

Owns nothing but that hand-over. Never touches the database, never a store.
"""

from __future__ import annotations

from pathlib import Path

from replicator.errors import UsageError
from replicator.restore import RestoreReport
from replicator.spool import Captured, Spool
from replicator.values import Timeline


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
        aside = spool.set_aside()
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
