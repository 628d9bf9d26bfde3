"""Object storage in a dictionary, for tests and trials; whatever it holds ends with the process.

Owns its objects and the hooks with which a test makes it fail. Never touches a disk or the network.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from replicator.errors import ObjectMissing, PreconditionFailed, StoreError
from replicator.store import Body, ObjectInfo, Stream, check_key, check_prefix, joined

Hook = Callable[[str, str], None]


def _nothing(operation: str, key: str) -> None:
    pass


@dataclass
class _Fault:
    operation: str
    error: StoreError
    times: int
    after: bool


@dataclass
class _Shared:
    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, bytes] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    faults: list[_Fault] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)


_named: dict[str, MemoryStore] = {}
_named_lock = threading.Lock()


def named(name: str) -> MemoryStore:
    """The one store of this name in the process."""
    with _named_lock:
        return _named.setdefault(name, MemoryStore(name))


class MemoryStore:
    """before, after: called with operation ("put", "get", …) and full key, outside the lock; they may block or raise.

    ``calls`` lists operations and full keys. ``sub`` shares objects, faults and calls, and takes the hooks as they are.
    """

    def __init__(self, name: str = "", *, before: Hook = _nothing, after: Hook = _nothing) -> None:
        self.before = before
        self.after = after
        self._name = name
        self._prefix = ""
        self._shared = _Shared()

    @property
    def url(self) -> str:
        return f"memory://{self._name}/{self._prefix}".rstrip("/")

    @property
    def calls(self) -> list[tuple[str, str]]:
        with self._shared.lock:
            return list(self._shared.calls)

    def fail_next(self, operation: str, error: StoreError, *, times: int = 1, after: bool = False) -> None:
        """Raise ``error`` from the next calls of ``operation``; after: once it has taken effect (a lost answer)."""
        with self._shared.lock:
            self._shared.faults.append(_Fault(operation, error, times, after))

    def put(
        self,
        key: str,
        body: Body,
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
        time_ms: int | None = None,
    ) -> ObjectInfo:
        full = self._begin("put", key)
        data = _read(body)
        with self._shared.lock:
            current = self._shared.objects.get(full)
            if if_none_match and current is not None:
                raise PreconditionFailed(f"{self.url}/{key} exists already")
            if if_match is not None and (current is None or _etag(current) != if_match):
                raise PreconditionFailed(f"{self.url}/{key} has changed")
            self._shared.objects[full] = data
            self._shared.times[full] = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        self._end("put", full)
        return ObjectInfo(key, len(data), _etag(data))

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        full = self._begin("get", key)
        data = self._object(full)
        start = max(0, len(data) + offset) if offset < 0 else offset
        self._end("get", full)
        return data[start : None if length is None else start + length]

    def head(self, key: str) -> ObjectInfo:
        full = self._begin("head", key)
        data = self._object(full)
        self._end("head", full)
        return ObjectInfo(key, len(data), _etag(data), self._shared.times[full])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        full = self._begin("list", check_prefix(prefix), is_key=False)
        with self._shared.lock:
            found = sorted(item for item in self._shared.objects.items() if item[0].startswith(full))
        self._end("list", full)
        skip = len(self._prefix)
        yield from (ObjectInfo(key[skip:], len(data), _etag(data), self._shared.times[key]) for key, data in found)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            full = self._begin("delete", key)
            with self._shared.lock:
                self._shared.objects.pop(full, None)
            self._end("delete", full)

    def sub(self, prefix: str) -> MemoryStore:
        below = MemoryStore(self._name, before=self.before, after=self.after)
        below._shared = self._shared
        below._prefix = joined(self._prefix, prefix)
        return below

    def _object(self, full: str) -> bytes:
        with self._shared.lock:
            try:
                return self._shared.objects[full]
            except KeyError:
                raise ObjectMissing(f"memory://{self._name}/{full} does not exist") from None

    def _begin(self, operation: str, key: str, *, is_key: bool = True) -> str:
        full = self._prefix + (check_key(key) if is_key else key)
        with self._shared.lock:
            self._shared.calls.append((operation, full))
        self.before(operation, full)
        self._raise_fault(operation, after=False)
        return full

    def _end(self, operation: str, full: str) -> None:
        self._raise_fault(operation, after=True)
        self.after(operation, full)

    def _raise_fault(self, operation: str, *, after: bool) -> None:
        with self._shared.lock:
            for fault in self._shared.faults:
                if fault.operation == operation and fault.after == after and fault.times > 0:
                    fault.times -= 1
                    raise fault.error


def _read(body: Body) -> bytes:
    if isinstance(body, bytes):
        return body
    if isinstance(body, Stream):
        return b"".join(body.chunks())
    try:
        return body.read_bytes()
    except OSError as error:
        raise StoreError(f"{body} cannot be read: {error.strerror}") from error


def _etag(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
