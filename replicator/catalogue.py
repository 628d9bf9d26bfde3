"""Which databases a folder's replica holds: one small object for each, and a place for its replica.

Owns the keys ``databases/<name>`` and ``db/<name>/…`` below a folder's prefix. The name of a database is its path in the folder.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from replicator.errors import FormatError, PreconditionFailed
from replicator.store import ObjectStore

ENTRIES = "databases/"
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


def register(store: ObjectStore, name: Path) -> ObjectStore:
    """Enter a database, if it is not there yet, and the store of its replica. Raises StoreError."""
    key = encode(name)
    try:
        store.put(f"{ENTRIES}{key}", b"", if_none_match=True)
    except PreconditionFailed:
        pass
    return replica_of(store, name)


def replica_of(store: ObjectStore, name: Path | PurePosixPath) -> ObjectStore:
    return store.sub(f"db/{encode(name)}")


def entries(store: ObjectStore) -> list[PurePosixPath]:
    """Names of all databases that the folder's replica holds. Raises StoreError."""
    return [decode(info.key.removeprefix(ENTRIES)) for info in store.list(ENTRIES)]
