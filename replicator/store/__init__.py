"""Object storage: the protocol that the replicator and the platform need, and ``open_store(url)``.

Owns the interface and the rule for keys. Adapters: ``s3`` (the only importer of boto3), ``file``, ``memory``; wrappers of
the same protocol: ``retry``, ``measure``, ``seal``. Keys are relative to the store's prefix, use ``/`` and hold only
``[A-Za-z0-9._=/-]``. No key continues another one after a slash ("a" and "a/b"): not every server can hold both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from replicator.errors import StoreError

MAX_KEY_LENGTH = 900
"""Characters; S3 allows 1024 bytes, of which the store's own prefix takes some."""

_KEY = re.compile(r"[A-Za-z0-9._=-]+(?:/[A-Za-z0-9._=-]+)*")


def is_key(text: str) -> bool:
    """Whether an object may have this key: legal characters, no empty part, no part ``.`` or ``..``."""
    return (
        len(text) <= MAX_KEY_LENGTH
        and _KEY.fullmatch(text) is not None
        and not any(part in (".", "..") for part in text.split("/"))
    )


def check_key(key: str) -> str:
    """The key itself. Raises StoreError when no object may have it."""
    if not is_key(key):
        raise StoreError(
            f"{key!r} is no object key: use A-Z a-z 0-9 . _ - and single slashes between, no . or .. alone"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, if some key can start with it. Raises StoreError."""
    if prefix:
        check_key(prefix + "x")
    return prefix


def joined(prefix: str, more: str) -> str:
    """``prefix`` ('' or ending in /) with the folder ``more`` below it, in the same form. Raises StoreError."""
    more = more.strip("/")
    return f"{prefix}{check_key(more)}/" if more else prefix


@dataclass(frozen=True)
class ObjectInfo:
    """key: relative to the store's prefix. etag: opaque, changes with the content, valid for ``if_match``.

    time_ms: UTC milliseconds since 1970 that it was given with ``put``, else when it was written, by the store's clock; None
    when not known. A listing of S3 tells the latter only.
    """

    key: str
    size_bytes: int
    etag: str
    time_ms: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Stream:
    """A body that is made while it is sent, so that it is nowhere as a whole.

    chunks: begins it anew, and gives the same bytes each time; what it raises ends the put, and nothing is stored.
    expected_bytes: about how long it is, for the size of the parts in which it is sent.
    """

    chunks: Callable[[], Iterator[bytes]]
    expected_bytes: int


Body = bytes | Path | Stream


class ObjectStore(Protocol):
    """Immutable-minded object storage. Every call has a time-out and raises only StoreError and its subclasses."""

    @property
    def url(self) -> str:
        """Where it is, without credentials; for messages."""
        ...

    def put(
        self,
        key: str,
        body: Body,
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
        time_ms: int | None = None,
    ) -> ObjectInfo:
        """Store ``body`` (bytes, the file at a path, or a stream) atomically: a reader sees all of it or nothing.

        if_none_match: only if no object has this key. if_match: only if the object there has this etag.
        time_ms: the moment that the object is to bear, for other programs: Litestream's metadata in S3, a file's time.
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


from replicator.store.url import open_store as open_store  # noqa: E402  (it needs the names above)
