"""Which databases a running replicator has: those of its configuration, and those that were registered since. Changes go through here.

Owns the list, and what a new configuration changes in it; what did not change is not touched. Never reads a file, never replicates.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from replicator.config import DatabaseConfig, ReplicaConfig, clash
from replicator.errors import (
    ConfigError,
    DatabaseMissing,
    DatabaseNotReplicable,
    NotADatabase,
    ReplicatorError,
    UsageError,
)
from replicator.service import CLOSE_S, Replicator, unprotected
from replicator.store import ObjectStore
from replicator.store.measure import Meter
from replicator.values import Position
from replicator.worker import DatabaseStatus

log = logging.getLogger(__name__)

STOPPED = "it was stopped by `replicator stop`; `replicator start` has it go on"


@dataclass
class _Member:
    """absent: why it is not replicated at present, '' when it is. registered: not from the configuration."""

    entry: DatabaseConfig
    store: ObjectStore
    meter: Meter = field(repr=False)
    registered: bool = False
    absent: str = ""


@dataclass(frozen=True)
class Changes:
    """What a new configuration changed: how many entries."""

    added: int
    changed: int
    removed: int
    same: int


@dataclass(frozen=True)
class Left:
    """How a database, or a folder, was let go. durable: of a database, up to there everything is in the store.

    reason: why not everything is there, '' when it is.
    """

    path: Path
    durable: Position | None
    reason: str = ""


class Roster:
    """Every method may be called from any thread; changes come one after the other.

    stop: ends what the stores wait for. prepare: called before an entry is replicated for the first time.
    """

    def __init__(
        self,
        replicator: Replicator,
        stop: threading.Event,
        prepare: Callable[[DatabaseConfig, ObjectStore], None] = lambda entry, store: None,
    ) -> None:
        self._replicator = replicator
        self._stop = stop
        self._prepare = prepare
        self._guard = threading.Lock()
        self._members: dict[Path, _Member] = {}

    # -- the configuration ---------------------------------------------------------------------------------------------

    def load(self, entries: Iterable[DatabaseConfig]) -> None:
        """The first configuration: all of it, or the first error. All stores are opened first, so that a wrong URL costs nothing."""
        with self._guard:
            members = [self._opened(entry) for entry in entries]
            for member in members:
                self._prepare(member.entry, member.store)
            for member in members:
                self._begin(member)
                self._members[member.entry.path] = member

    def reload(self, entries: Iterable[DatabaseConfig]) -> Changes:
        """Another configuration: only what it changes. Raises UsageError before anything is changed.

        What cannot be replicated then is logged, is NOT PROTECTED in the status, and keeps nothing else from going on.
        """
        wanted = {entry.path: entry for entry in entries}
        with self._guard:
            known = dict(self._members)
            self._check_registered(wanted)
            same = {path for path in wanted if path in known and known[path].entry == wanted[path]}
            new = [self._opened(entry) for path, entry in wanted.items() if path not in same]
            gone = [member for path, member in known.items() if path not in wanted and not member.registered]
            changed = [known[member.entry.path] for member in new if member.entry.path in known]
            for member in (*gone, *changed):
                self._end(member)
                del self._members[member.entry.path]
            for path in same:
                known[path].registered = False
            again = [known[path] for path in same if known[path].absent and known[path].absent != STOPPED]
            for member in (*new, *again):
                self._members[member.entry.path] = member
                self._try_to_begin(member)
        return Changes(len(new) - len(changed), len(changed), len(gone), len(same))

    def _check_registered(self, wanted: Mapping[Path, DatabaseConfig]) -> None:
        for path, member in self._members.items():
            for entry in wanted.values() if member.registered and path not in wanted else ():
                if problem := clash(member.entry, entry):
                    raise ConfigError(f"{entry.origin}: {problem} {path}, which was registered; unregister it first")

    # -- one by one ----------------------------------------------------------------------------------------------------

    def register(self, path: Path, url: str) -> None:
        """Replicate one more database, until the end of this process. Raises UsageError, DatabaseNotReplicable, StoreError."""
        if path.is_dir():
            raise UsageError(f"{path} is a folder; write it into the configuration, as dir")
        entry = DatabaseConfig(path, ReplicaConfig(url))
        with self._guard:
            known = self._members.get(path)
            if known is not None and known.entry.replica.url == url:
                return
            for other, member in self._members.items():
                if problem := clash(member.entry, entry):
                    raise UsageError(f"{path} cannot be registered: {problem} {other}")
                if member.entry.replica.age is not None:
                    raise UsageError(
                        f"{path} cannot be registered: it would be stored readable, and {other} is encrypted; "
                        "write it into the configuration, and load that again"
                    )
            member = dataclasses.replace(self._opened(entry), registered=True)
            self._prepare(entry, member.store)
            self._begin(member)
            self._members[path] = member
        log.info("%s is registered; it is replicated to %s until this process ends", path, member.store.url)

    def unregister(self, path: Path, timeout_s: float) -> Left:
        """Ship what is committed, and replicate it no more, until the next start or another configuration. Raises DatabaseMissing."""
        member, left = self._last_sync(path, timeout_s)
        with self._guard:
            if self._members.get(path) is member:
                self._end(member)
                del self._members[path]
        log.info("%s is unregistered; its replica stays", path)
        return left

    def stop(self, path: Path, timeout_s: float) -> Left:
        """Ship what is committed, and let go of it until ``start``. Raises DatabaseMissing."""
        member, left = self._last_sync(path, timeout_s)
        with self._guard:
            if self._members.get(path) is member:
                self._end(member)
                member.absent = STOPPED
        log.warning("NOT PROTECTED: %s: %s", path, STOPPED)
        return left

    def start(self, path: Path) -> None:
        """Go on with one that was stopped, or that could not be replicated. Raises DatabaseMissing, and what keeps it from that."""
        with self._guard:
            member = self._member(path)
            if member.absent:
                self._begin(member)
                member.absent = ""
                log.info("%s is replicated again", path)

    # -- how it is -----------------------------------------------------------------------------------------------------

    def status(self) -> list[DatabaseStatus]:
        """Of all that is replicated, and of what should be and is not."""
        absent = [
            unprotected(member.entry.path, member.store.url, member.absent)
            for member in list(self._members.values())
            if member.absent
        ]
        return sorted([*self._replicator.status(), *absent], key=lambda status: status.path)

    def sync(self, path: Path, timeout_s: float) -> Position:
        """As that of the replicator; a database that was stopped is refused."""
        member = self._members.get(path)
        if member is not None and member.absent:
            raise DatabaseNotReplicable(f"{path} is not replicated: {member.absent}")
        return self._replicator.sync(path, timeout_s)

    def meters(self) -> dict[str, Meter]:
        """What was asked of the stores, by the URL of the replica."""
        return {member.store.url: member.meter for member in list(self._members.values())}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _member(self, path: Path) -> _Member:
        found = self._members.get(path)
        if found is not None:
            return found
        for other, member in self._members.items():
            if member.entry.folder is not None and member.entry.folder.takes(path):
                raise DatabaseMissing(f"{path} belongs to the folder {other}, which is one thing here; name the folder")
        raise DatabaseMissing(f"{path} is not replicated here; `replicator list` shows what is")

    def _opened(self, entry: DatabaseConfig) -> _Member:
        meter = Meter()
        return _Member(entry, entry.replica.open(self._stop, meter=meter), meter)

    def _begin(self, member: _Member) -> None:
        entry = member.entry
        if entry.folder is not None:
            self._replicator.add_folder(entry.folder, member.store, state=entry.state, settings=entry.settings)
        else:
            self._replicator.add(entry.path, member.store, state=entry.state, settings=entry.settings)

    def _try_to_begin(self, member: _Member) -> None:
        try:
            self._prepare(member.entry, member.store)
            self._begin(member)
        except (ReplicatorError, OSError) as error:
            member.absent = f"{error}; `replicator start` or another reload tries again"
            log.error("NOT PROTECTED: %s: %s", member.entry.path, member.absent)
        else:
            member.absent = ""

    def _last_sync(self, path: Path, timeout_s: float) -> tuple[_Member, Left]:
        """Without the guard, since it may take its time."""
        with self._guard:
            member = self._member(path)
        return member, Left(path, None, member.absent) if member.absent else self._synced(member, timeout_s)

    def _synced(self, member: _Member, timeout_s: float) -> Left:
        path = member.entry.path
        try:
            if member.entry.folder is None:
                return Left(path, self._replicator.sync(path, timeout_s))
            self._replicator.sync_folder(path, timeout_s)
        except (DatabaseMissing, NotADatabase) as error:
            return Left(path, None, str(error))
        except ReplicatorError as error:
            return Left(path, None, f"{error}; what is missing waits in the local state")
        return Left(path, None)

    def _end(self, member: _Member) -> None:
        if member.entry.folder is None:
            self._replicator.remove(member.entry.path, CLOSE_S)
        else:
            self._replicator.remove_folder(member.entry.path, CLOSE_S)
