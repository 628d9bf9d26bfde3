"""Object storage: the protocol that the replicator and the platform need, and ``open_store(url)``.

Owns the interface. Adapters: ``s3`` (the only importer of boto3), ``file``, ``memory``; wrappers of the same protocol: ``retry``.
Keys are relative to the store's prefix, use ``/`` and hold only ``[A-Za-z0-9._/-]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """key: relative to the store's prefix. etag: opaque, changes with the content, valid for ``if_match``."""

    key: str
    size_bytes: int
    etag: str


class ObjectStore(Protocol):
    """Immutable-minded object storage. Every call has a time-out and raises only StoreError and its subclasses."""

    @property
    def url(self) -> str:
        """Where it is, without credentials; for messages."""
        ...

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        """Store ``body`` (bytes, or the file at a path) atomically: a reader sees all of it or nothing.

        if_none_match: only if no object has this key. if_match: only if the object there has this etag.
        Raises PreconditionFailed when the condition does not hold.
        """
        ...

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``offset`` (all that follow, if None). A negative offset counts from the end.

        A range beyond the end gives the bytes that are there. Raises ObjectMissing.
        """
        ...

    def head(self, key: str) -> ObjectInfo:
        """Raises ObjectMissing."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix`` (a string prefix, not a folder), in ascending key order."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete them; a key that is not there is no error."""
        ...

    def sub(self, prefix: str) -> ObjectStore:
        """The same storage seen below ``prefix``; shares connections with this one."""
        ...
