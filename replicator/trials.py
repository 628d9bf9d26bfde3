"""What trial restores of one database have shown: kept in its local state, so that a restart does not begin them all anew.

Owns the file ``trial`` there and the folder of the scratch file. It tries nothing itself.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import msgspec

from replicator import durable


class TrialRecord(msgspec.Struct, frozen=True):
    """position: up to which the replica was proved last, '' if never; commit_ms: time of its last commit; proved_ms: when that was.

    tried_ms: when the last trial ended. problem: what it found, '' when nothing; is_source: the database itself is damaged, and not
    the replica. unchecked: why SQLite's own check was left out. url: of the replica. Times are UTC milliseconds since 1970.
    """

    position: str = ""
    commit_ms: int = 0
    proved_ms: int = 0
    tried_ms: int = 0
    problem: str = ""
    is_source: bool = False
    unchecked: str = ""
    url: str = ""


class Trials:
    """The newest record of a database; written by one thread, read by any."""

    def __init__(self, state_directory: Path, url: str) -> None:
        """url: of the replica; what was found of another one, to which the database went before, says nothing of it."""
        self._url = url
        self._file = state_directory / "trial"
        self.scratch = state_directory / "scratch"
        self.record: TrialRecord | None = None
        with suppress(OSError, msgspec.MsgspecError):  # without it, the next trial comes sooner
            found = msgspec.json.decode(self._file.read_bytes(), type=TrialRecord)
            self.record = found if found.url == url else None
        self.clean()

    def note(self, record: TrialRecord) -> None:
        """Raises OSError."""
        self.record = record = msgspec.structs.replace(record, url=self._url)
        durable.write_file(self._file, msgspec.json.encode(record))

    def clean(self) -> None:
        """Remove what a trial left that was cut short."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def remove(self) -> None:
        """Raises OSError."""
        self.clean()
        self._file.unlink(missing_ok=True)
