"""The state database: desired state of the fleet. The only SQL of the platform.

Owns one guarded apsw connection for the life of the process. Never holds facts about what runs, so that an idle platform
writes nothing. The replicator of the same process holds connections of its own to this file: nothing here, nor anywhere
else in the process, opens or closes the file by other means, since that would drop SQLite's POSIX locks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec

from minipaas.errors import Conflict, NotFound, StateTooNew, StateUnavailable
from minipaas.model import App, Event, Fleet, Machine, Node, Release, ReleaseStatus, Token, Volume

_BUSY_TIMEOUT_MS = 10_000

_RELEASE = "app, number, image, image_digest, config, created_ms, status, message"
_MACHINE = 'id, app, release, "group", node, desired, restarts'
_VOLUME = "id, app, name, node, created_ms, state, destroyed_ms, purge_after_ms"
_APP = "name, created_ms, destroyed_ms, purge_after_ms"

_Row = TypeVar("_Row", bound=msgspec.Struct)


@dataclass(frozen=True)
class DesiredApp:
    """Everything that is wanted of one app. machines, volumes: on all nodes. live, candidate: of the releases, if there is one."""

    app: App
    live: Release | None
    candidate: Release | None
    machines: tuple[Machine, ...] = ()
    volumes: tuple[Volume, ...] = ()


@dataclass(frozen=True)
class NewRelease:
    """A release and what it needs, to be made desired in one transaction. secrets: name to sealed value."""

    release: Release
    machines: tuple[Machine, ...]
    volumes: tuple[Volume, ...] = ()
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)


class State:
    """Thread-safe. Every mutation is one transaction, durable when the call returns. Raises StateUnavailable when it cannot be."""

    def __init__(self, path: Path, clock_ms: Callable[[], int], kept_events: int = 1000) -> None:
        self._clock_ms, self._kept_events = clock_ms, kept_events
        self._lock = threading.RLock()
        self._generations: dict[str, int] = {}
        self._on_change: list[Callable[[str], None]] = []
        with _translated(path):
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(_BUSY_TIMEOUT_MS)
            self._db.pragma("journal_mode", "wal")
            self._db.pragma("synchronous", "full")
            self._db.pragma("foreign_keys", True)
        self._path = path
        self._migrate()
        self._tokens = self._read_tokens()

    def close(self) -> None:
        """Only when nothing in this process replicates the file any more."""
        with self._lock:
            self._db.close()

    def subscribe(self, on_change: Callable[[str], None]) -> None:
        """``on_change(app)`` after every change of what is wanted of an app; it must return at once."""
        self._on_change.append(on_change)

    def generation(self, app: str) -> int:
        """Grows with every change of what is wanted of the app, within this process."""
        return self._generations.get(app, 0)

    # -- fleet, nodes, tokens

    def set_fleet(self, fleet: Fleet) -> None:
        with self._write():
            self._db.execute("INSERT OR REPLACE INTO fleet VALUES (1, ?, ?)", (fleet.id, fleet.recovery_recipient))

    def fleet(self) -> Fleet:
        rows = self._rows("SELECT id, recovery_recipient FROM fleet")
        if not rows:
            raise NotFound(f"{self._path} belongs to no fleet yet; run: minipaas setup")
        return Fleet(id=rows[0][0], recovery_recipient=rows[0][1])

    def put_node(self, node: Node) -> None:
        with self._write():
            self._db.execute(
                "INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?)",
                (node.id, node.name, node.region, node.recipient, node.joined_ms),
            )

    def nodes(self) -> Sequence[Node]:
        return self._structs(Node, "SELECT id, name, region, recipient, joined_ms FROM nodes ORDER BY name")

    def move_everything(self, old_node: str, new: Node) -> None:
        """All machines and volumes of a lost node belong to a new one, whose volumes are to be restored first."""
        with self._write(*self._app_names()):
            self._db.execute("DELETE FROM nodes WHERE id = ? OR name = ?", (old_node, new.name))
            self._db.execute(
                "INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?)",
                (new.id, new.name, new.region, new.recipient, new.joined_ms),
            )
            self._db.execute("UPDATE machines SET node = ? WHERE node = ?", (new.id, old_node))
            self._db.execute(
                "UPDATE volumes SET node = ?, state = 'restoring' WHERE node = ?",
                (new.id, old_node),
            )

    def replace_token(self, token: Token) -> None:
        """Another token of the same name is worth nothing any more."""
        with self._lock:
            with self._write():
                self._db.execute("DELETE FROM tokens WHERE name = ?", (token.name,))
                self._db.execute(
                    "INSERT INTO tokens (sha256, name, abilities, created_ms) VALUES (?, ?, ?, ?)",
                    (token.sha256, token.name, msgspec.json.encode(token.abilities).decode(), token.created_ms),
                )
            self._tokens = self._read_tokens()

    def tokens(self) -> Sequence[Token]:
        """From memory: the thread of all connections asks for them, and must wait neither for the file nor for who holds it."""
        return self._tokens

    def _read_tokens(self) -> Sequence[Token]:
        rows = self._rows("SELECT name, sha256, abilities, created_ms FROM tokens")
        return [Token(name=n, sha256=h, abilities=tuple(msgspec.json.decode(a)), created_ms=c) for n, h, a, c in rows]

    # -- apps

    def create_app(self, name: str) -> App:
        """A new app, or one that was destroyed, with the volumes that are kept. Raises Conflict when it is there."""
        known = self._find_app(name)
        if known is not None and known.destroyed_ms is None:
            raise Conflict(f"app {name} exists already; deploy to it, or choose another name")
        with self._write(name):
            if known is None:
                self._db.execute("INSERT INTO apps (name, created_ms) VALUES (?, ?)", (name, self._clock_ms()))
            else:
                self._db.execute("UPDATE apps SET destroyed_ms = NULL, purge_after_ms = NULL WHERE name = ?", (name,))
                self._db.execute("UPDATE volumes SET destroyed_ms = NULL, purge_after_ms = NULL WHERE app = ?", (name,))
        return self.app(name)

    def app(self, name: str) -> App:
        """Also one that is destroyed and not yet purged. Raises NotFound."""
        found = self._find_app(name)
        if found is None:
            raise NotFound(f"there is no app {name!r}; see: minipaas apps")
        return found

    def apps(self) -> Sequence[App]:
        return self._structs(App, f"SELECT {_APP} FROM apps ORDER BY name")

    def destroy_app(self, name: str, keep_ms: int) -> App:
        """Its machines go, releases are over; volumes and their databases stay until the time that is returned."""
        now = self._clock_ms()
        with self._write(name):
            self._db.execute(
                "UPDATE apps SET destroyed_ms = ?, purge_after_ms = ? WHERE name = ?", (now, now + keep_ms, name)
            )
            self._db.execute(
                "UPDATE volumes SET destroyed_ms = ?, purge_after_ms = ? WHERE app = ?", (now, now + keep_ms, name)
            )
            self._db.execute("DELETE FROM machines WHERE app = ?", (name,))
            self._db.execute(
                "UPDATE releases SET status = 'failed', message = 'the app was destroyed' "
                "WHERE app = ? AND status = 'deploying'",
                (name,),
            )
            self._db.execute("UPDATE releases SET status = 'superseded' WHERE app = ? AND status = 'live'", (name,))
            self._add_event(name, "destroyed; its volumes are kept for now")
        return self.app(name)

    def purge_volume(self, volume_id: str) -> bool:
        """Forget it, if its time after destroy is over and nobody has brought it back meanwhile. Whether it was forgotten."""
        with self._write(*self._apps_of_volume(volume_id)):
            self._db.execute(
                "DELETE FROM volumes WHERE id = ? AND destroyed_ms IS NOT NULL AND purge_after_ms <= ?",
                (volume_id, self._clock_ms()),
            )
            return self._db.changes() == 1

    def purge_app(self, name: str) -> None:
        """Forget a destroyed app whose volumes are gone. Nothing happens when it was brought back meanwhile."""
        with self._write(name):
            self._db.execute(
                "DELETE FROM apps WHERE name = ? AND destroyed_ms IS NOT NULL AND purge_after_ms <= ? "
                "AND NOT EXISTS (SELECT 1 FROM volumes WHERE app = apps.name)",
                (name, self._clock_ms()),
            )
            if self._db.changes():
                self._add_event(name, "purged: its time after destroy is over")

    # -- releases and machines

    def next_release(self, app: str) -> int:
        number: int = self._rows("SELECT coalesce(max(number), 0) + 1 FROM releases WHERE app = ?", app)[0][0]
        return number

    def add_release(self, new: NewRelease) -> None:
        """The release is DEPLOYING, its machines and volumes are wanted, its secrets are fixed. Raises Conflict, NotFound."""
        release = new.release
        with self._write(release.app):
            app = self._find_app(release.app)
            if app is None or app.destroyed_ms is not None:
                raise NotFound(f"app {release.app} was destroyed while it was deployed")
            if self._rows("SELECT 1 FROM releases WHERE app = ? AND status = 'deploying'", release.app):
                raise Conflict(f"another release of {release.app} is being deployed; wait until it is done")
            self._db.execute(
                f"INSERT INTO releases ({_RELEASE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", msgspec.structs.astuple(release)
            )
            self._db.executemany(
                f"INSERT INTO volumes ({_VOLUME}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _tuples(new.volumes)
            )
            self._db.executemany(
                f"INSERT INTO machines ({_MACHINE}) VALUES (?, ?, ?, ?, ?, ?, ?)", _tuples(new.machines)
            )
            self._db.executemany(
                "INSERT INTO release_secrets (app, release, name, sealed) VALUES (?, ?, ?, ?)",
                [(release.app, release.number, name, sealed) for name, sealed in new.secrets.items()],
            )

    def releases(self, app: str) -> Sequence[Release]:
        """Newest first."""
        return self._structs(Release, f"SELECT {_RELEASE} FROM releases WHERE app = ? ORDER BY number DESC", app)

    def release(self, app: str, number: int) -> Release:
        found = self._structs(Release, f"SELECT {_RELEASE} FROM releases WHERE app = ? AND number = ?", app, number)
        if not found:
            raise NotFound(f"{app} has no release v{number}; see: minipaas releases")
        return found[0]

    def mark_live(self, app: str, number: int) -> None:
        """The release serves; the one before is superseded and its machines are no longer wanted."""
        with self._write(app):
            self._db.execute("UPDATE releases SET status = 'superseded' WHERE app = ? AND status = 'live'", (app,))
            self._db.execute(
                "UPDATE releases SET status = 'live', message = '' WHERE app = ? AND number = ? AND status = 'deploying'",
                (app, number),
            )
            if self._db.changes() != 1:
                raise Conflict(f"{app} v{number} is not being deployed any more")
            self._db.execute("DELETE FROM machines WHERE app = ? AND release <> ?", (app, number))
            self._add_event(app, f"v{number} is live")

    def mark_failed(self, app: str, number: int, message: str) -> None:
        """The release did not become healthy; its machines are no longer wanted. No error when it is not being deployed."""
        with self._write(app):
            self._db.execute(
                "UPDATE releases SET status = 'failed', message = ? WHERE app = ? AND number = ? AND status = 'deploying'",
                (message, app, number),
            )
            if self._db.changes():
                self._db.execute("DELETE FROM machines WHERE app = ? AND release = ?", (app, number))
                self._add_event(
                    app, f"v{number} failed: {message.splitlines()[0] if message else 'no reason is known'}"
                )

    def machines(self, app: str) -> Sequence[Machine]:
        return self._structs(Machine, f"SELECT {_MACHINE} FROM machines WHERE app = ? ORDER BY id", app)

    def restart_machines(self, app: str) -> None:
        with self._write(app):
            self._db.execute("UPDATE machines SET restarts = restarts + 1, desired = 'started' WHERE app = ?", (app,))

    def desired(self, app: str) -> DesiredApp:
        """Read in one transaction. Raises NotFound."""
        with self._read():
            return DesiredApp(
                app=self.app(app),
                live=self._release_with(app, ReleaseStatus.LIVE),
                candidate=self._release_with(app, ReleaseStatus.DEPLOYING),
                machines=tuple(self.machines(app)),
                volumes=tuple(self.volumes(app)),
            )

    # -- volumes

    def volumes(self, app: str | None = None) -> Sequence[Volume]:
        if app is None:
            return self._structs(Volume, f"SELECT {_VOLUME} FROM volumes ORDER BY app, name")
        return self._structs(Volume, f"SELECT {_VOLUME} FROM volumes WHERE app = ? ORDER BY name", app)

    def set_volume_state(self, volume_id: str, state: str) -> None:
        with self._write(*self._apps_of_volume(volume_id)):
            self._db.execute("UPDATE volumes SET state = ? WHERE id = ?", (state, volume_id))

    # -- secrets

    def secrets(self, app: str) -> Mapping[str, bytes]:
        return dict(self._rows("SELECT name, sealed FROM secrets WHERE app = ? ORDER BY name", app))

    def secret_times(self, app: str) -> Mapping[str, int]:
        return dict(self._rows("SELECT name, updated_ms FROM secrets WHERE app = ? ORDER BY name", app))

    def release_secrets(self, app: str, number: int) -> Mapping[str, bytes]:
        return dict(self._rows("SELECT name, sealed FROM release_secrets WHERE app = ? AND release = ?", app, number))

    def change_secrets(self, app: str, put: Mapping[str, bytes], drop: Sequence[str]) -> None:
        now = self._clock_ms()
        with self._write():
            self._db.executemany("DELETE FROM secrets WHERE app = ? AND name = ?", [(app, name) for name in drop])
            self._db.executemany(
                "INSERT OR REPLACE INTO secrets (app, name, sealed, updated_ms) VALUES (?, ?, ?, ?)",
                [(app, name, sealed, now) for name, sealed in put.items()],
            )

    def reseal(self, again: Callable[[bytes], bytes]) -> int:
        """Replace every sealed value by what ``again`` makes of it, all or none; how many there were."""
        with self._write():
            current = self._rows("SELECT sealed, app, name FROM secrets")
            self._db.executemany(
                "UPDATE secrets SET sealed = ? WHERE app = ? AND name = ?", [(again(s), *key) for s, *key in current]
            )
            released = self._rows("SELECT sealed, app, release, name FROM release_secrets")
            self._db.executemany(
                "UPDATE release_secrets SET sealed = ? WHERE app = ? AND release = ? AND name = ?",
                [(again(s), *key) for s, *key in released],
            )
        return len(current) + len(released)

    # -- journal

    def add_event(self, app: str, text: str) -> None:
        with self._write():
            self._add_event(app, text)

    def events(self, limit: int = 50) -> Sequence[Event]:
        """Newest first."""
        return self._structs(Event, "SELECT at_ms, app, text FROM events ORDER BY id DESC LIMIT ?", limit)

    # -- inside

    def _add_event(self, app: str, text: str) -> None:
        self._db.execute("INSERT INTO events (at_ms, app, text) VALUES (?, ?, ?)", (self._clock_ms(), app, text))
        self._db.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (self._kept_events,))

    def _find_app(self, name: str) -> App | None:
        found = self._structs(App, f"SELECT {_APP} FROM apps WHERE name = ?", name)
        return found[0] if found else None

    def _app_names(self) -> list[str]:
        return [name for (name,) in self._rows("SELECT name FROM apps")]

    def _apps_of_volume(self, volume_id: str) -> list[str]:
        return [app for (app,) in self._rows("SELECT app FROM volumes WHERE id = ?", volume_id)]

    def _release_with(self, app: str, status: ReleaseStatus) -> Release | None:
        found = self._structs(Release, f"SELECT {_RELEASE} FROM releases WHERE app = ? AND status = ?", app, status)
        return found[0] if found else None

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _translated(self._path):
            return list(self._db.execute(sql, values))

    def _structs(self, kind: type[_Row], sql: str, *values: Any) -> list[_Row]:
        names = kind.__struct_fields__
        return [msgspec.convert(dict(zip(names, row, strict=True)), kind) for row in self._rows(sql, *values)]

    @contextmanager
    def _read(self) -> Iterator[None]:
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            with _translated(self._path):
                self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    @contextmanager
    def _write(self, *apps: str) -> Iterator[None]:
        with self._lock:
            with _translated(self._path):
                self._db.execute("BEGIN IMMEDIATE")
            try:
                with _translated(self._path):
                    yield
                    self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            for app in apps:
                self._generations[app] = self._generations.get(app, 0) + 1
        for app in apps:
            for on_change in self._on_change:
                on_change(app)

    def _migrate(self) -> None:
        steps = _migrations()
        with _translated(self._path):
            version: int = self._db.pragma("user_version")
        if version > len(steps):
            raise StateTooNew(
                f"{self._path} has version {version}, this minipaas knows {len(steps)}; install a newer one"
            )
        for number, sql in enumerate(steps[version:], start=version + 1):
            with self._write():
                self._db.execute(sql)
                self._db.pragma("user_version", number)


def _migrations() -> list[str]:
    """The text of migrations/NNN_*.sql in the order of their numbers, which begin at 1 and have no gap."""
    files = sorted(
        (
            entry
            for entry in resources.files("minipaas").joinpath("migrations").iterdir()
            if entry.name.endswith(".sql")
        ),
        key=lambda entry: entry.name,
    )
    return [entry.read_text(encoding="utf-8") for entry in files]


def _tuples(values: Sequence[msgspec.Struct]) -> list[tuple[Any, ...]]:
    return [msgspec.structs.astuple(value) for value in values]


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except apsw.FullError as error:
        raise StateUnavailable(f"the disk that holds {path} is full; make room, then it goes on by itself") from error
    except apsw.ConstraintError as error:
        raise Conflict(f"the state changed meanwhile ({error}); try again") from error
    except apsw.Error as error:
        raise StateUnavailable(f"{path} cannot be read or written now: {error}") from error
