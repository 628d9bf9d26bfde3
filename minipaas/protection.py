"""What the platform asks of whoever keeps its data safe in object storage: the protocol, and the values it returns.

Owns the interface. The adapter is ``backups``; this never does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from replicator import ObjectStore


@dataclass(frozen=True)
class DatabaseState:
    """One database and how safe it is.

    volume_id: '' for the state database. words: 'protected (lag 0.2 s)', 'catching up' or 'NOT PROTECTED'; reason says
    why it is not, or what keeps its replica from being compacted. lag_s: age of the oldest commit that is not durable,
    0 when all are. durable_ms: wall clock of the last durable commit, UTC milliseconds since 1970; None before the first.
    size_bytes: of the database file.
    """

    volume_id: str
    path: Path
    words: str
    reason: str
    lag_s: float
    durable_txid: int
    timeline: int
    durable_ms: int | None
    size_bytes: int


class Backups(Protocol):
    """Replicates the state database and every SQLite database in watched volumes. Raises PlatformError and its subclasses."""

    @property
    def images(self) -> ObjectStore:
        """Where the bundles of images go."""
        ...

    def start(self) -> None: ...

    def stop(self, timeout_s: float) -> None: ...

    def watch_volume(self, volume_id: str, directory: Path) -> None:
        """From now on every SQLite database in ``directory`` is replicated. Idempotent."""
        ...

    def forget_volume(self, volume_id: str) -> None:
        """Stop replicating it; what is in the bucket stays there. No error when it is not watched."""
        ...

    def discard_volume(self, volume_id: str) -> None:
        """What is kept on this disk to replicate a volume, which is forgotten by now, goes. Raises OSError."""
        ...

    def sync_volume(self, volume_id: str, timeout_s: float) -> None:
        """All that was committed in the volume before the call is durable. Raises TimedOut."""
        ...

    def sync_state(self, timeout_s: float) -> None:
        """The same for the state database."""
        ...

    def restore_volume(self, volume_id: str, directory: Path, on_progress: Callable[[str], None]) -> None:
        """From the bucket into ``directory``, which nothing else uses. Idempotent; goes on where it was interrupted."""
        ...

    def databases(self) -> Sequence[DatabaseState]: ...
