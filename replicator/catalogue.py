"""Which databases a folder's replica holds: one small object for each, and a place for its replica.

Owns the keys ``databases/<name>`` and ``db/<name>/…`` below a folder's prefix (docs/format.md, section 2.4). The name of a database is its
path in the folder.
"""

from __future__ import annotations

import contextlib
import logging
import re
import stat
from itertools import islice
from pathlib import Path, PurePosixPath

import msgspec

from replicator.envelope import refuse_sealed
from replicator.errors import FormatError, ObjectMissing, PreconditionFailed
from replicator.store import ObjectStore

log = logging.getLogger(__name__)

ENTRIES = "databases/"
REPLICAS = "db/"
_PLAIN = re.compile(rb"[A-Za-z0-9._-]")
_ENCODED = re.compile(r"(?:[A-Za-z0-9._-]|=[0-9A-F]{2})+")


def encode(name: Path | PurePosixPath) -> str:
    """A relative path as one key component: every byte but ``[A-Za-z0-9._-]`` is ``=XX``, the separator too."""
    return "".join(
        chr(byte) if _PLAIN.match(bytes([byte])) else f"={byte:02X}"
        for byte in str(name).encode("utf-8", "surrogateescape")
    )


def decode(text: str) -> PurePosixPath:
    """Raises FormatError for a component that ``encode`` does not make, or that would lead out of the folder."""
    if not _ENCODED.fullmatch(text):
        raise FormatError(f"{text!r} is not the name of a database in a folder's replica")
    raw = re.sub(rb"=([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    name = PurePosixPath(raw.decode("utf-8", "surrogateescape"))
    if name.is_absolute() or ".." in name.parts or b"\0" in raw:
        raise FormatError(f"{text!r} names a place outside of the folder")
    return name


class Entry(msgspec.Struct, frozen=True):
    """A database of a folder: who owns the file and who may read it, for the restore."""

    name: str
    mode: int
    uid: int
    gid: int
    version: int = 1


def register(store: ObjectStore, folder: Path, path: Path) -> ObjectStore:
    """Enter the database at ``path``, if it is not there yet; the store of its replica. Raises StoreError, OSError."""
    name = path.relative_to(folder)
    with contextlib.suppress(PreconditionFailed):
        store.put(_key(name), msgspec.json.encode(entry_of(folder, path)), if_none_match=True)
    return replica_of(store, name)


def entry_of(folder: Path, path: Path) -> Entry:
    """What the entry of the file should say now. Raises OSError."""
    status = path.stat()
    return Entry(str(path.relative_to(folder)), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def check_encryption(store: ObjectStore) -> None:
    """Before the first entry is written: those that are there are encrypted if the store encrypts, and readable if it does not.

    Raises IdentityMissing, NotEncrypted and other StoreErrors.
    """
    for info in islice(store.list(ENTRIES), 1):
        with contextlib.suppress(ObjectMissing):
            _content(store, info.key)


def renew(store: ObjectStore, entry: Entry) -> None:
    """Make the store hold it, if that holds something else under its key, or nothing.

    Raises StoreError; PreconditionFailed when another writer has replaced it at the same time.
    """
    key, body = _key(Path(entry.name)), msgspec.json.encode(entry)
    try:
        if _content(store, key) != body:
            store.put(key, body, if_match=store.head(key).etag)
    except ObjectMissing:
        store.put(key, body, if_none_match=True)


def _content(store: ObjectStore, key: str) -> bytes:
    content = store.get(key)
    refuse_sealed(content, f"{store.url}/{key}")
    return content


def _key(name: Path | PurePosixPath) -> str:
    return f"{ENTRIES}{encode(name)}"


def replica_of(store: ObjectStore, name: Path | PurePosixPath) -> ObjectStore:
    return store.sub(f"{REPLICAS}{encode(name)}")


def is_there(store: ObjectStore) -> bool:
    """Whether the store holds the entry of any database. Raises StoreError."""
    return any(_ENCODED.fullmatch(info.key.removeprefix(ENTRIES)) for info in store.list(ENTRIES))


def find(store: ObjectStore, name: Path | PurePosixPath) -> Entry | None:
    """The entry of one database, None when there is none. Raises StoreError, FormatError."""
    try:
        return _read(store, _key(name))
    except ObjectMissing:
        return None


def entries(store: ObjectStore) -> dict[PurePosixPath, Entry]:
    """All databases that the folder's replica holds. Raises StoreError, FormatError."""
    found = {}
    for info in store.list(ENTRIES):
        name = decode(info.key.removeprefix(ENTRIES))
        found[name] = _read(store, info.key)
    return found


def recoverable(store: ObjectStore) -> dict[PurePosixPath, Entry | None]:
    """What ``entries`` says, and the databases of which only a replica is there: None for one whose entry is lost or damaged.

    For a recovery, which must not pass over any: it lists the whole folder. Raises StoreError.
    """
    found: dict[PurePosixPath, Entry | None] = {}
    for info in store.list():
        kind, _, rest = info.key.partition("/")
        if f"{kind}/" not in (ENTRIES, REPLICAS):
            continue
        with contextlib.suppress(FormatError):  # the key of something else
            found.setdefault(decode(rest.partition("/")[0]), None)
    for name in found:
        try:
            found[name] = _read(store, _key(name))
        except (ObjectMissing, FormatError) as error:
            log.warning("%s/%s: the entry of a database is lost or damaged: %s", store.url, _key(name), error)
    return found


def _read(store: ObjectStore, key: str) -> Entry:
    try:
        return msgspec.json.decode(_content(store, key), type=Entry)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{store.url}/{key} is not the entry of a database: {error}") from error
