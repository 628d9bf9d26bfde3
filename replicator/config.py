"""The configuration file: Litestream's YAML, read with suspicion. It becomes values, or an error that names the line.

Owns reading and checking. Never opens a database; a store only when it is asked to. Secrets are in no message and in no ``repr``.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import yaml

from replicator.age import check_identity, check_recipient, read_identities
from replicator.capture import CaptureSettings
from replicator.config_keys import DATABASE_KEYS, REPLICA_KEYS, STORE_KEYS, TOP_KEYS, Key
from replicator.errors import ConfigError, UsageError
from replicator.heartbeat import check_heartbeat_url
from replicator.pace import Allowance
from replicator.peers import parse_address
from replicator.store import ObjectStore, open_store
from replicator.store.measure import Meter
from replicator.store.seal import sealed
from replicator.upkeep import MAX_LEVELS, UpkeepSettings
from replicator.values import parse_duration
from replicator.watch import Folder
from replicator.worker import WorkerSettings

DEFAULT_FILES = (Path("/etc/replicator.yml"), Path("/etc/litestream.yml"))
SHUTDOWN_TIMEOUT_S = 30.0
SWEEP_S = 60.0
HEARTBEAT_S = 300.0
NEVER_S = 10 * 365 * 86400.0
"""Longer than any process runs; Litestream's 0 for a checkpoint-interval means never."""

_MERGE_TAG = "tag:yaml.org,2002:merge"
_NULL_TAG = "tag:yaml.org,2002:null"
_TYPES = ("s3", "file")
_OTHER_TYPES = ("gs", "gcs", "abs", "sftp", "webdav", "nats", "oss")
_LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
}
_FORMATS = {"": "text", "text": "text", "pretty": "text", "tint": "text", "json": "json"}
_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*)|(\{))")
_PROVIDER_HOST = re.compile(
    r"(?P<bucket>.+)\.(?P<endpoint>s3[.-](?P<region>[a-z0-9-]+)\.(?:amazonaws\.com|backblazeb2\.com|scw\.cloud)"
    r"|[a-z0-9]+\.digitaloceanspaces\.com|s3\.filebase\.com)"
)
"""Litestream takes the host of a bucket at these providers as the bucket of a URL."""

PATIENCE_S = 60.0
SHIPPING_PATIENCE_S = 8.0
"""How long a request to a store is tried again."""


@dataclass(frozen=True)
class AgeConfig:
    """To whom a replica is encrypted, and what opens it."""

    recipients: tuple[str, ...]
    identities: tuple[str, ...] = field(default=(), repr=False)
    identity_file: Path | None = None

    def seal(self, store: ObjectStore, more_identities: Sequence[str]) -> ObjectStore:
        """Raises UsageError when the keys do not belong together, or the file cannot be read."""
        in_file = read_identities(self.identity_file) if self.identity_file else ()
        identities = (*self.identities, *in_file, *more_identities)
        return sealed(store, recipients=self.recipients, identities=identities)


@dataclass(frozen=True)
class ReplicaConfig:
    """Where a replica is. origin: ``file:line`` of it, '' when it was given on the command line. age: None for no encryption."""

    url: str
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    origin: str = field(default="", compare=False)
    age: AgeConfig | None = None

    def open(
        self, stop: threading.Event | None = None, identities: Sequence[str] = (), *, meter: Meter | None = None
    ) -> ObjectStore:
        """Raises ConfigError with the line, or UsageError, for a URL or keys that have no meaning. Sends nothing.

        stop: given by a daemon, which ships again and again anyway: a request of its store gives up soon, so that status says why.
        identities: of age, that open it too; without ``age`` it can then only be read. meter: where requests are counted.
        """
        try:
            store = self._open_bare(stop, meter)
            if self.age is not None:
                return self.age.seal(store, identities)
            return sealed(store, identities=identities) if identities else store
        except UsageError as error:
            if not self.origin:
                raise
            raise ConfigError(f"{self.origin}: replica: {error}") from error

    def _open_bare(self, stop: threading.Event | None, meter: Meter | None) -> ObjectStore:
        return open_store(
            self.url,
            access_key=self.access_key,
            secret_key=self.secret_key,
            retry_budget_s=SHIPPING_PATIENCE_S if stop else PATIENCE_S,
            stop=stop,
            meter=meter,
        )


@dataclass(frozen=True)
class DatabaseConfig:
    """One entry of ``dbs``. path: of the database, or of the folder. folder: None for a single database.

    state: folder of the local state, or of those of the folder's databases; None for beside the database.
    """

    path: Path
    replica: ReplicaConfig
    folder: Folder | None = None
    state: Path | None = None
    settings: WorkerSettings = WorkerSettings()
    restore_if_missing: bool = False
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Config:
    """notes: a line for each key that was accepted although something else happens. socket_path: None for the default one."""

    databases: tuple[DatabaseConfig, ...] = ()
    file: Path | None = None
    exec_command: str = ""
    log_level: str = "info"
    log_format: str = "text"
    socket_enabled: bool = True
    socket_path: Path | None = None
    socket_mode: int = 0o600
    sweep_s: float = SWEEP_S
    shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S
    metrics_address: str = ""
    heartbeat_url: str = field(default="", repr=False)
    heartbeat_s: float = HEARTBEAT_S
    notes: tuple[str, ...] = ()

    def find(self, path: Path) -> DatabaseConfig | None:
        """The entry that replicates the database at ``path``, by itself or in its folder."""
        path = _real(path)
        for entry in self.databases:
            if entry.folder is None and _real(entry.path) == path:
                return entry
        for entry in self.databases:
            if entry.folder is not None and Folder(
                _real(entry.path), entry.folder.pattern, entry.folder.recursive
            ).takes(path):
                return entry
        return None


def default_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that is read when none is named: REPLICATOR_CONFIG, or the first in /etc that is there."""
    named = environment.get("REPLICATOR_CONFIG")
    return Path(named) if named else next((file for file in DEFAULT_FILES if file.exists()), None)


def load(file: Path, *, expand: bool = True, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration in a file. expand: put in environment variables. Raises ConfigError with file, line and key."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    return parse(text, file, environment if expand else None)


load_config = load


def parse(text: str, file: Path, environment: Mapping[str, str] | None) -> Config:
    """The same for the text of a file. environment: None to leave ``$`` as it is."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{file}:{line}: is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}:1: is not YAML: {type(error).__name__}") from None
    reader = _Reader(file, environment)
    return _Builder(reader, environment or {}).config(reader.section(root, TOP_KEYS, "") if root else {})


# -- nodes to values ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """value: text, path, number … as the kind of the key says; a dict of _Value for a section."""

    line: int
    value: Any = field(repr=False)


_Section = dict[str, _Value]


class _Reader:
    """Takes nodes apart by the table of keys. ``notes`` grows as it goes."""

    def __init__(self, file: Path, environment: Mapping[str, str] | None) -> None:
        self.file = file
        self._environment = environment
        self.notes: list[str] = []

    def wrong(self, line: int, where: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.origin(line)}: {where}: {problem}" if where else f"{self.origin(line)}: {problem}")

    def origin(self, line: int) -> str:
        return f"{self.file}:{line}"

    def note(self, line: int, where: str, words: str) -> None:
        self.notes.append(f"{self.origin(line)}: {where}: {words}")

    def section(self, node: yaml.Node, keys: Iterable[Key], where: str) -> _Section:
        """The values of a mapping. Raises ConfigError for what is not in the table, twice there, or of another type."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise self.wrong(line, where, "is not a section; write keys with values, one a line, indented alike")
        known = {key.name: key for key in keys}
        found: _Section = {}
        for key_node, value_node in self._pairs(node, where):
            name, line = str(key_node.value), key_node.start_mark.line + 1
            path = f"{where}.{name}" if where else name
            if name not in known:
                raise self.wrong(line, path, _unknown(name, known))
            if value_node.tag == _NULL_TAG and isinstance(value_node, yaml.ScalarNode):
                continue
            key, notes = known[name], len(self.notes)
            value = self._value(value_node, key, path)
            if key.refused and value not in ("", {}):
                raise self.wrong(line, path, key.refused)
            if key.instead:
                del self.notes[notes:]  # one line for the whole section
                self.note(line, path, key.instead)
            found[name] = _Value(line, value)
        return found

    def _pairs(self, node: yaml.MappingNode, where: str) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Keys and values, those that ``<<`` brings too. A key of the mapping itself goes before what is brought."""
        own: dict[str, int] = {}
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.wrong(line, where, "has a key that is not a word")
            if key_node.tag == _MERGE_TAG:
                merged += self._merged(value_node, where)
                continue
            if key_node.value in own:
                raise self.wrong(
                    line,
                    f"{where}.{key_node.value}" if where else key_node.value,
                    f"is here twice; first in line {own[key_node.value]}",
                )
            own[key_node.value] = line
            yield key_node, value_node
        for key_node, value_node in merged:
            if key_node.value not in own:
                own[key_node.value] = key_node.start_mark.line + 1
                yield key_node, value_node

    def _merged(self, node: yaml.Node, where: str) -> list[tuple[yaml.Node, yaml.Node]]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        pairs: list[tuple[yaml.Node, yaml.Node]] = []
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self.wrong(node.start_mark.line + 1, where, "<< does not name a section")
            pairs += [pair for pair in part.value if isinstance(pair[0], yaml.ScalarNode) and pair[0].tag != _MERGE_TAG]
        return pairs

    def _value(self, node: yaml.Node, key: Key, path: str) -> Any:
        line = node.start_mark.line + 1
        if key.kind == "section":
            return self.section(node, key.section, path)
        if key.kind in ("sections", "texts"):
            if not isinstance(node, yaml.SequenceNode):
                raise self.wrong(line, path, "is not a list; begin each of its items with a dash")
            items = [(item, f"{path}[{number}]") for number, item in enumerate(node.value)]
            if key.kind == "texts":
                return [self._text(item, name) for item, name in items]
            return [_Value(item.start_mark.line + 1, self.section(item, key.section, name)) for item, name in items]
        text = self._text(node, path)
        try:
            return _CONVERTERS.get(key.kind, str)(text)
        except UsageError as error:
            raise self.wrong(line, path, str(error)) from None

    def _text(self, node: yaml.Node, path: str) -> str:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise self.wrong(line, path, "is a section or a list, and must be one value")
        if self._environment is None:
            return str(node.value)
        environment = self._environment

        def put_in(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$"
            name = match[1] or match[2]
            if not name:
                raise self.wrong(line, path, "has a ${ that is no variable; write ${NAME}, or $$ for a dollar sign")
            if name not in environment:
                raise self.wrong(
                    line, path, f"the environment variable {name} is not set; set it, or write $$ for a dollar sign"
                )
            return environment[name]

        return _VARIABLE.sub(put_in, str(node.value))


def _unknown(name: str, known: Mapping[str, Key]) -> str:
    elsewhere = {
        "at the top of the file": TOP_KEYS,
        "in an entry of dbs": DATABASE_KEYS,
        "in replica": REPLICA_KEYS,
        **{f"in {key.name}": key.section for key in TOP_KEYS if key.section and key.name != "dbs"},
    }
    places = [place for place, keys in elsewhere.items() if name in (key.name for key in keys)]
    if places:
        return f"does not belong here; it goes {places[0]}"
    every = {key.name for keys in elsewhere.values() for key in keys}
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, every, n=1)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known here: {', '.join(sorted(known))}"


# -- scalars -----------------------------------------------------------------------------------------------------------


def _duration(text: str) -> float:
    return 0.0 if text.strip() == "0" else parse_duration(text)


def _count(text: str) -> int:
    plain = text.replace("_", "")
    if not plain.isascii() or not plain.isdigit() or len(plain) > 18:
        raise UsageError(f"{text!r} is not a number")
    return int(plain)


def _flag(text: str) -> bool:
    if text.lower() in ("true", "yes", "on"):
        return True
    if text.lower() in ("false", "no", "off"):
        return False
    raise UsageError(f"{text!r} is neither true nor false")


def _octal(text: str) -> int:
    if not re.fullmatch(r"0?o?[0-7]{3}", text):
        raise UsageError(f"{text!r} is not a file mode; write it as 0600")
    return int(text[-3:], 8)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise UsageError("is empty; it must name a path")
    return Path(text).expanduser().absolute()


def _level(text: str) -> str:
    if text.lower() not in _LEVELS:
        raise UsageError(f"{text!r} is not a level; write debug, info, warn or error")
    return _LEVELS[text.lower()]


def _format(text: str) -> str:
    if text.lower() not in _FORMATS:
        raise UsageError(f"{text!r} is not a format; write text or json")
    return _FORMATS[text.lower()]


def _store_type(text: str) -> str:
    if text in _TYPES:
        return text
    if text in _OTHER_TYPES:
        raise UsageError(f"replicas of type {text} are not built yet; use s3 or file (most providers speak S3 too)")
    raise UsageError(f"{text!r} is not a type of replica; write s3 or file")


_CONVERTERS: dict[str, Any] = {
    "duration": _duration,
    "count": _count,
    "flag": _flag,
    "octal": _octal,
    "path": _path,
    "level": _level,
    "format": _format,
    "type": _store_type,
}


# -- values to the configuration ---------------------------------------------------------------------------------------


class _Builder:
    """Puts sections together, and checks what concerns several keys."""

    def __init__(self, reader: _Reader, environment: Mapping[str, str]) -> None:
        self._reader = reader
        self._environment = environment

    def config(self, top: _Section) -> Config:
        logging, socket = _get(top, "logging", {}), _get(top, "socket", {})
        databases = tuple(self._database(entry, top, f"dbs[{n}]") for n, entry in enumerate(_get(top, "dbs", [])))
        self._check_distinct(databases)
        return Config(
            databases=databases,
            file=self._reader.file,
            exec_command=_get(top, "exec", ""),
            log_level=_get(logging, "level", "info"),
            log_format=_get(logging, "type", "text"),
            socket_enabled=_get(socket, "enabled", True),
            socket_path=_get(socket, "path", None),
            socket_mode=_get(socket, "permissions", 0o600),
            sweep_s=self._positive(top, "sweep-interval", "", SWEEP_S),
            shutdown_timeout_s=_get(top, "shutdown-sync-timeout", SHUTDOWN_TIMEOUT_S),
            metrics_address=self._checked(top, "addr", parse_address),
            heartbeat_url=self._checked(top, "heartbeat-url", check_heartbeat_url),
            heartbeat_s=self._positive(top, "heartbeat-interval", "", HEARTBEAT_S),
            notes=tuple(self._reader.notes),
        )

    def _database(self, entry: _Value, top: _Section, where: str) -> DatabaseConfig:
        values: _Section = entry.value
        if ("path" in values) == ("dir" in values):
            raise self._reader.wrong(entry.line, where, "must have either path, of a database, or dir, of a folder")
        self._check_folder_keys(values, where)
        replica_value = self._replica_value(entry, where)
        settings = WorkerSettings(
            capture=CaptureSettings(
                checkpoint_pages=self._positive(
                    values, "min-checkpoint-page-count", where, CaptureSettings.checkpoint_pages
                ),
                idle_checkpoint_s=_get(values, "checkpoint-interval", CaptureSettings.idle_checkpoint_s) or NEVER_S,
            ),
            interval_s=self._interval(replica_value.value, top, f"{where}.replica"),
            upkeep=self._upkeep(values, top, where),
            allowance=self._allowance(replica_value, top, f"{where}.replica"),
            trial_every_s=_trial_interval(replica_value.value, top),
        )
        path: Path = values["dir" if "dir" in values else "path"].value
        return DatabaseConfig(
            path=path,
            replica=self._replica(replica_value, top, f"{where}.replica"),
            folder=Folder(path, _get(values, "pattern", "*"), _get(values, "recursive", False))
            if "dir" in values
            else None,
            state=_get(values, "meta-dir", _get(values, "meta-path", None)),
            settings=settings,
            restore_if_missing=_get(values, "restore-if-db-not-exists", False),
            origin=self._reader.origin(entry.line),
        )

    def _check_folder_keys(self, values: _Section, where: str) -> None:
        for name in ("pattern", "recursive", "watch", "meta-dir"):
            if name in values and "dir" not in values:
                raise self._reader.wrong(values[name].line, f"{where}.{name}", "has a meaning only with dir")
        if "restore-if-db-not-exists" in values and "dir" in values:
            line = values["restore-if-db-not-exists"].line
            raise self._reader.wrong(line, f"{where}.restore-if-db-not-exists", "has a meaning only with path")
        if "meta-dir" in values and "meta-path" in values:
            raise self._reader.wrong(
                values["meta-path"].line, f"{where}.meta-path", "leave it out, meta-dir says the same"
            )
        if not _get(values, "watch", True):
            self._reader.note(values["watch"].line, f"{where}.watch", "a folder is always watched for new databases")

    def _replica_value(self, entry: _Value, where: str) -> _Value:
        values: _Section = entry.value
        if ("replica" in values) == ("replicas" in values):
            raise self._reader.wrong(entry.line, where, "must have a replica, and one only: where it is replicated to")
        if "replica" in values:
            return values["replica"]
        several: list[_Value] = values["replicas"].value
        if len(several) != 1:
            line = several[1].line if several else values["replicas"].line
            raise self._reader.wrong(line, f"{where}.replicas", f"has {len(several)} items; a database has one replica")
        return several[0]

    def _interval(self, replica: _Section, top: _Section, where: str) -> float:
        default = self._positive(top, "sync-interval", "", WorkerSettings.interval_s)
        return float(self._positive(replica, "sync-interval", where, default))

    def _upkeep(self, values: _Section, top: _Section, where: str) -> UpkeepSettings:
        """A database says it for itself, or the top of the file for all."""
        of_all, own = _get(top, "snapshot", {}), _get(values, "snapshot", {})
        window_s = self._positive(of_all, "retention", "snapshot", UpkeepSettings.retention_s)
        window_s = self._positive(own, "retention", f"{where}.snapshot", window_s)
        snapshot_s = self._positive(of_all, "interval", "snapshot", UpkeepSettings.snapshot_s)
        return UpkeepSettings(
            levels_s=self._levels(top["levels"]) if "levels" in top else UpkeepSettings.levels_s,
            snapshot_s=self._positive(own, "interval", f"{where}.snapshot", snapshot_s),
            retention_s=window_s if _get(_get(top, "retention", {}), "enabled", True) else None,
            fine_s=_get(top, "l0-retention", UpkeepSettings.fine_s),
        )

    def _levels(self, value: _Value) -> tuple[float, ...]:
        levels: list[_Value] = value.value
        if len(levels) > MAX_LEVELS:
            raise self._reader.wrong(value.line, "levels", f"has {len(levels)} items; there are at most {MAX_LEVELS}")
        found: list[float] = []
        for number, level in enumerate(levels):
            where = f"levels[{number}]"
            if "interval" not in level.value:
                raise self._reader.wrong(level.line, f"{where}.interval", "is missing; how often is it merged?")
            found.append(self._positive(level.value, "interval", where, 0.0))
            if found[-1] <= max(found[:-1], default=0.0):
                raise self._reader.wrong(level.line, f"{where}.interval", "is not longer than that of the level before")
        return tuple(found)

    def _allowance(self, replica: _Value, top: _Section, where: str) -> Allowance | None:
        given, where = (replica.value, f"{where}.put-budget") if "put-budget" in replica.value else (top, "put-budget")
        if "put-budget" not in given:
            return None
        budget: _Section = given["put-budget"].value
        if "per-hour" not in budget:
            raise self._reader.wrong(given["put-budget"].line, f"{where}.per-hour", "is missing; how many may leave?")
        return Allowance(
            self._positive(budget, "per-hour", where, 0), self._positive(budget, "burst", where, Allowance.burst)
        )

    def _replica(self, replica: _Value, top: _Section, where: str) -> ReplicaConfig:
        defaults = {key.name: top[key.name] for key in STORE_KEYS if key.name in top}
        values: _Section = {**defaults, **replica.value}
        url = self._url(replica, values, where)
        access_key = secret_key = None
        if url.startswith("s3:"):
            access_key = _get(values, "access-key-id", "") or self._environment.get("LITESTREAM_ACCESS_KEY_ID")
            secret_key = _get(values, "secret-access-key", "") or self._environment.get("LITESTREAM_SECRET_ACCESS_KEY")
        if bool(access_key) != bool(secret_key):
            missing = "secret-access-key" if access_key else "access-key-id"
            raise self._reader.wrong(replica.line, f"{where}.{missing}", "is missing; the two keys belong together")
        age = self._age(values["age"], f"{where}.age") if "age" in values else None
        return ReplicaConfig(url, access_key or None, secret_key or None, self._reader.origin(replica.line), age)

    def _age(self, section: _Value, where: str) -> AgeConfig:
        values: _Section = section.value
        for name, check in (("recipients", check_recipient), ("identities", check_identity)):
            for number, text in enumerate(_get(values, name, [])):
                try:
                    check(text)
                except UsageError as error:
                    raise self._reader.wrong(values[name].line, f"{where}.{name}[{number}]", str(error)) from None
        age = AgeConfig(
            tuple(_get(values, "recipients", ())),
            tuple(_get(values, "identities", ())),
            _get(values, "identity-file", None),
        )
        if not age.recipients or not (age.identities or age.identity_file):
            raise self._reader.wrong(
                section.line,
                where,
                "needs recipients, and identities or an identity-file; without age nothing is encrypted",
            )
        return age

    def _url(self, replica: _Value, values: _Section, where: str) -> str:
        own: _Section = replica.value
        if "url" in own:
            for name in ("path", "bucket", "type"):
                if name in own:
                    raise self._reader.wrong(own[name].line, f"{where}.{name}", "leave it out, url says it already")
            return self._with_keys(own["url"], values, f"{where}.url")
        kind = _get(own, "type", "s3" if "bucket" in values and "bucket" in own else "file")
        path = _get(own, "path", "")
        if "://" in path:
            raise self._reader.wrong(own["path"].line, f"{where}.path", "is a URL; write it as url")
        if kind == "s3":
            if not _get(values, "bucket", ""):
                raise self._reader.wrong(replica.line, where, "has no bucket; give one, or a url")
            return _s3_url(values["bucket"].value, path, values, {})
        if not path:
            raise self._reader.wrong(replica.line, where, "says nowhere to replicate to; give a url, or type and path")
        return f"file://{quote(str(_path(path)))}"

    def _with_keys(self, url: _Value, values: _Section, where: str) -> str:
        """The URL with the keys beside it in it; they go before what it says itself, as in Litestream."""
        text: str = url.value
        try:
            parts = urlsplit(text)
            has_credentials = parts.username is not None or parts.password is not None
        except ValueError as error:
            raise self._reader.wrong(url.line, where, f"is malformed: {error}") from None
        if has_credentials:
            raise self._reader.wrong(
                url.line, where, "has credentials in it; give them as access-key-id and secret-access-key"
            )
        if parts.scheme in _OTHER_TYPES:
            raise self._reader.wrong(url.line, where, f"{parts.scheme}:// is not built yet; use s3:// or file://")
        if parts.scheme not in ("s3", "file", "memory"):
            raise self._reader.wrong(url.line, where, "is not the URL of a store; it begins with s3:// or file://")
        if parts.scheme != "s3":
            return text
        if not parts.netloc:
            raise self._reader.wrong(url.line, where, "names no bucket; write s3://BUCKET/PREFIX")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        bucket = parts.netloc
        if provider := _PROVIDER_HOST.fullmatch(bucket):
            bucket = provider["bucket"]
            if provider["region"]:
                options.setdefault("region", provider["region"])
            if not provider["endpoint"].endswith("amazonaws.com"):
                options.setdefault("endpoint", f"https://{provider['endpoint']}")
        return _s3_url(bucket, parts.path, values, options)

    def _checked(self, values: _Section, name: str, check: Callable[[str], object]) -> str:
        """A text of the top that has to pass a check; '' when it is not there."""
        text: str = _get(values, name, "")
        try:
            if text:
                check(text)
        except UsageError as error:
            raise self._reader.wrong(values[name].line, name, str(error)) from None
        return text

    def _positive(self, values: _Section, name: str, where: str, default: Any) -> Any:
        if name not in values:
            return default
        if not values[name].value > 0:
            raise self._reader.wrong(values[name].line, f"{where}.{name}" if where else name, "must be more than 0")
        return values[name].value

    def _check_distinct(self, databases: tuple[DatabaseConfig, ...]) -> None:
        """No database may be replicated twice, nor two to one place, nor with one local state."""
        known: dict[tuple[object, ...], int] = {}
        folders: list[int] = []
        for number, entry in enumerate(databases):
            marks = _marks(entry)
            alike = {known[mark] for mark in marks if mark in known}
            for earlier in range(number) if entry.folder else sorted({*folders, *alike}):
                problem = clash(databases[earlier], entry)
                if problem:
                    raise ConfigError(f"{entry.origin}: dbs[{number}]: {problem} {databases[earlier].origin}")
            known |= dict.fromkeys(marks, number)
            if entry.folder:
                folders.append(number)


def _marks(entry: DatabaseConfig) -> set[tuple[object, ...]]:
    """Two databases without one of these in common do not clash, so that not every pair of thousands is compared."""
    marks: set[tuple[object, ...]] = {("path", _real(entry.path)), ("url", entry.replica.url.rstrip("/"))}
    with suppress(OSError):
        found = entry.path.stat()
        marks.add(("file", found.st_dev, found.st_ino))
    if entry.state is not None:
        marks.add(("state", entry.state))
    return marks


def _get(values: _Section, name: str, default: Any) -> Any:
    return values[name].value if name in values else default


def _trial_interval(replica: _Section, top: _Section) -> float:
    """Seconds; 0 for never."""
    default = _get(top, "validation-interval", _get(_get(top, "validation", {}), "interval", 0.0))
    return float(_get(replica, "validation-interval", default))


def _s3_url(bucket: str, path: str, values: _Section, options: dict[str, str]) -> str:
    for name in ("endpoint", "region"):
        if _get(values, name, ""):
            options[name] = values[name].value
    if "force-path-style" in values:
        options.pop("forcePathStyle", None)
        options["force-path-style"] = "true" if values["force-path-style"].value else "false"
    prefix = f"/{path.strip('/')}" if path.strip("/") else ""
    return f"s3://{bucket}{prefix}" + (f"?{urlencode(options)}" if options else "")


def clash(one: DatabaseConfig, other: DatabaseConfig) -> str:
    """Words for why the two cannot be replicated side by side, to be followed by where the other is; '' when they can."""
    if one.folder is None and other.folder is None and _same_file(one.path, other.path):
        return "this database is replicated already by"
    if one.folder is not None and other.folder is not None and _overlap(one.folder, other.folder):
        return "databases in this folder are replicated already by"
    for folder, single in ((one.folder, other), (other.folder, one)):
        inside = folder is not None and single.folder is None
        if folder and inside and Folder(_real(folder.path), folder.pattern, folder.recursive).takes(_real(single.path)):
            return "this database is replicated already, in a folder, by"
    if one.replica.url.rstrip("/") == other.replica.url.rstrip("/"):
        return "its replica is at the same place as that of"
    if one.state is not None and one.state == other.state:
        return "its meta-path is the same as that of"
    return ""


def _overlap(one: Folder, other: Folder) -> bool:
    first, second = _real(one.path), _real(other.path)
    return (
        first == second
        or (one.recursive and second.is_relative_to(first))
        or (other.recursive and first.is_relative_to(second))
    )


def _same_file(one: Path, other: Path) -> bool:
    if _real(one) == _real(other):
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
