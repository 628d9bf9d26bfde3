"""A store that encrypts what is put into another one, and opens what comes out of it; ``sealed`` makes it.

Owns the ciphers of docs/format.md, section 7, and which ranges of an object a read needs. It never gives a byte that was not
authenticated, never stores one that is readable, and takes nothing that is not encrypted.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from replicator.age import Keys, NoMatch
from replicator.envelope import (
    BOUND,
    CHUNK_SIZE,
    HEAD_SIZE,
    SEALED_CHUNK_SIZE,
    TAG_SIZE,
    content_size,
    damaged,
    encode_head,
    is_sealed,
    sealed_size,
    wrapped_key,
)
from replicator.errors import IdentityMissing, NotEncrypted, SealDamaged, StoreError
from replicator.store import Body, ObjectInfo, ObjectStore, Stream, check_key

KNOWN_KEYS = 4096
"""Object keys that are kept in memory, so that further ranges of an object need no further look at its head."""

_KEY_SIZE = 32
_IN_MEMORY_BYTES = 8 << 20  # a file up to this size is sealed in memory
_NEAR_CHUNKS = 4  # a range that begins within these is fetched together with the head


def sealed(store: ObjectStore, *, recipients: Sequence[str] = (), identities: Sequence[str] = ()) -> SealedStore:
    """``store`` with everything in it encrypted to ``recipients`` (``age1…``), and opened with ``identities``.

    Without recipients it can only be read. ``identities`` are secret: ``AGE-SECRET-KEY-1…``. Raises UsageError for keys that
    are none, or that cannot open what they write. What is stored already must be encrypted too: a read raises NotEncrypted
    otherwise, IdentityMissing when it is encrypted to others, SealDamaged when it was altered.
    """
    return SealedStore(store, Keys.parse(recipients, identities), KnownKeys(KNOWN_KEYS))


def bare(store: ObjectStore) -> ObjectStore:
    """The store without encryption, if it has any: for what other programs keep there."""
    return store.bare if isinstance(store, SealedStore) else store


class KnownKeys:
    """Object keys by the place of the object, those that were used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._keys: OrderedDict[str, bytes] = OrderedDict()

    def get(self, place: str) -> bytes | None:
        with self._lock:
            if place in self._keys:
                self._keys.move_to_end(place)
            return self._keys.get(place)

    def remember(self, place: str, object_key: bytes) -> None:
        with self._lock:
            self._keys[place] = object_key
            self._keys.move_to_end(place)
            if len(self._keys) > self._limit:
                self._keys.popitem(last=False)

    def forget(self, place: str) -> None:
        with self._lock:
            self._keys.pop(place, None)


class SealedStore:
    """Sizes are those of the contents. The order of puts, conditions, retries and times are the inner store's.

    A large file is sealed into a nameless one beside it, which needs as much room while it is put.
    """

    def __init__(self, inner: ObjectStore, keys: Keys, known: KnownKeys) -> None:
        self.bare = inner
        self._keys = keys
        self._known = known

    @property
    def url(self) -> str:
        return self.bare.url

    def put(
        self,
        key: str,
        body: Body,
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
        time_ms: int | None = None,
    ) -> ObjectInfo:
        if not self._keys.recipients:
            raise StoreError(f"{self.url} is open for reading only: there is no age recipient to encrypt {key} to")
        if isinstance(body, Stream):
            sealed_stream = Stream(partial(self._seal_stream, key, body), sealed_size(body.expected_bytes))
            info = self.bare.put(key, sealed_stream, if_none_match=if_none_match, if_match=if_match, time_ms=time_ms)
            return _of_content(info)
        object_key = secrets.token_bytes(_KEY_SIZE)
        head = encode_head(self._keys.wrap(object_key))
        chunks = _Chunks(object_key, check_key(key), self._place(key))
        with _sealed_body(body, partial(chunks.seal, head)) as sealed_body:
            info = self.bare.put(key, sealed_body, if_none_match=if_none_match, if_match=if_match, time_ms=time_ms)
        self._known.remember(self._place(key), object_key)
        return _of_content(info)

    def _seal_stream(self, key: str, body: Stream) -> Iterator[bytes]:
        """Begun anew, it has another key: should the content differ, after all, no key seals two."""
        object_key = secrets.token_bytes(_KEY_SIZE)
        chunks = _Chunks(object_key, check_key(key), self._place(key))
        return chunks.seal(encode_head(self._keys.wrap(object_key)), _cut(body.chunks()))

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            self.bare.head(key)
            return b""
        if offset < 0:
            start = max(0, self.head(key).size_bytes + offset)
            return self._range(key, start, None)[:length]  # with the end, to know that it is one
        return self._range(key, offset, length)

    def head(self, key: str) -> ObjectInfo:
        return _of_content(self.bare.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return map(_of_content, self.bare.list(prefix))

    def delete(self, keys: Sequence[str]) -> None:
        self.bare.delete(keys)
        for key in keys:
            self._known.forget(self._place(key))

    def sub(self, prefix: str) -> SealedStore:
        return SealedStore(self.bare.sub(prefix), self._keys, self._known)

    def _place(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _range(self, key: str, offset: int, length: int | None) -> bytes:
        first = offset // CHUNK_SIZE
        count = None if length is None else (offset + length - 1) // CHUNK_SIZE - first + 1
        data = self._read(key, first, count)
        start = offset - first * CHUNK_SIZE
        if start == 0 and (length is None or length >= len(data)):
            return data
        return data[start : None if length is None else start + length]

    def _read(self, key: str, first: int, count: int | None) -> bytes:
        """The contents of ``count`` chunks from the one numbered ``first``, of those that are there; all that follow, if None."""
        object_key = self._known.get(self._place(key))
        if object_key is not None:
            try:
                return self._open(key, object_key, first, count, self._fetch(key, first, count))
            except SealDamaged:
                self._known.forget(self._place(key))  # another object may have this name by now
        if first >= _NEAR_CHUNKS:
            object_key = self._object_key(key, self.bare.get(key, offset=0, length=HEAD_SIZE))
            return self._open(key, object_key, first, count, self._fetch(key, first, count))
        end = None if count is None else HEAD_SIZE + (first + count) * SEALED_CHUNK_SIZE
        together = memoryview(self.bare.get(key, offset=0, length=end))
        object_key = self._object_key(key, bytes(together[:HEAD_SIZE]))
        return self._open(key, object_key, first, count, together[HEAD_SIZE + first * SEALED_CHUNK_SIZE :])

    def _fetch(self, key: str, first: int, count: int | None) -> memoryview:
        length = None if count is None else count * SEALED_CHUNK_SIZE
        return memoryview(self.bare.get(key, offset=HEAD_SIZE + first * SEALED_CHUNK_SIZE, length=length))

    def _object_key(self, key: str, head: bytes) -> bytes:
        place = self._place(key)
        if not is_sealed(head):
            raise NotEncrypted(
                f"{place} is not encrypted, but was to be opened with an age identity; a replica is encrypted as a whole or not at all: "
                "to read this one leave the identity out, to encrypt from now on replicate to another place"
            )
        try:
            object_key = self._keys.unwrap(wrapped_key(head, place))
        except NoMatch:
            raise IdentityMissing(
                f"{place} is encrypted, and none of the age identities given opens it; give the one that it was encrypted to"
            ) from None
        if len(object_key) != _KEY_SIZE:
            raise damaged(place, "its key has another length")
        self._known.remember(place, object_key)
        return object_key

    def _open(self, key: str, object_key: bytes, first: int, count: int | None, body: memoryview) -> bytes:
        if not body and first > 0:
            self._check_end(key, first)
            return b""
        chunks = _Chunks(object_key, key, self._place(key))
        return chunks.open(first, body, goes_on=count is not None and len(body) == count * SEALED_CHUNK_SIZE)

    def _check_end(self, key: str, first: int) -> None:
        """What was asked for begins after the end. Raises SealDamaged unless the object really ends before it."""
        last = max(0, content_size(self.bare.head(key).size_bytes) - 1) // CHUNK_SIZE
        if last >= first:
            raise damaged(self._place(key), "it changed while it was read")
        self._read(key, last, None)


class _Chunks:
    """The chunks of one object. Source: docs/format.md, section 7.2."""

    def __init__(self, object_key: bytes, key: str, place: str) -> None:
        # Its import takes longer than everything else here together, and most commands need none of it.
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        self._cipher = ChaCha20Poly1305(object_key)
        self._invalid = InvalidTag
        self._bound = BOUND + key.rpartition("/")[2].encode()
        self._place = place

    def seal(self, head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """pieces: the content, each of CHUNK_SIZE bytes but the last."""
        yield head
        number, piece = 0, next(pieces, b"")
        for following in pieces:
            yield self._cipher.encrypt(_nonce(number, last=False), piece, self._bound)
            number, piece = number + 1, following
        yield self._cipher.encrypt(_nonce(number, last=True), piece, self._bound)

    def open(self, first: int, body: memoryview, *, goes_on: bool) -> bytes:
        """The content of consecutive chunks. goes_on: more of them may follow; else the object must end here."""
        starts = range(0, max(1, len(body)), SEALED_CHUNK_SIZE)
        opened = [
            self._open_one(first + number, body[at : at + SEALED_CHUNK_SIZE], last=False)
            for number, at in enumerate(starts[:-1])
        ]
        number, rest = first + len(opened), body[starts[-1] :]
        if goes_on:
            try:
                opened.append(self._open_one(number, rest, last=False))
                return b"".join(opened)
            except SealDamaged:
                pass  # it is the last one, if it is one at all
        opened.append(self._open_one(number, rest, last=True))
        return b"".join(opened)

    def _open_one(self, number: int, chunk: memoryview, *, last: bool) -> bytes:
        if len(chunk) < TAG_SIZE or (len(chunk) == TAG_SIZE and number > 0):
            raise damaged(self._place, f"it is truncated in chunk {number}")
        try:
            return self._cipher.decrypt(_nonce(number, last=last), chunk, self._bound)
        except self._invalid:
            raise damaged(self._place, f"chunk {number} was altered, or belongs to another object") from None


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _of_content(info: ObjectInfo) -> ObjectInfo:
    return replace(info, size_bytes=content_size(info.size_bytes))


# -- bodies ------------------------------------------------------------------------------------------------------------

Seal = Callable[[Iterator[bytes]], Iterator[bytes]]
"""From the pieces of a content, CHUNK_SIZE bytes each but the last, to those of the sealed object."""


@contextmanager
def _sealed_body(body: bytes | Path, seal: Seal) -> Iterator[bytes | Path]:
    """What is to be stored of a content. That of a large file is on the disk for the time of the block, without a name."""
    if isinstance(body, bytes):
        yield b"".join(seal(body[at : at + CHUNK_SIZE] for at in range(0, len(body), CHUNK_SIZE)))
        return
    with ExitStack() as stack:
        try:
            whole = _seal_file(body, seal, stack)
        except OSError as error:
            raise StoreError(f"{body}, which was to be stored, cannot be encrypted: {error.strerror}") from error
        yield whole


def _cut(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, CHUNK_SIZE at a time; the last piece is what is left."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= CHUNK_SIZE:
            yield bytes(waiting[:CHUNK_SIZE])
            del waiting[:CHUNK_SIZE]
    if waiting:
        yield bytes(waiting)


def _seal_file(path: Path, seal: Seal, stack: ExitStack) -> bytes | Path:
    with path.open("rb") as file:
        pieces = iter(partial(file.read, CHUNK_SIZE), b"")
        if os.fstat(file.fileno()).st_size <= _IN_MEMORY_BYTES:
            return b"".join(seal(pieces))
        out = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115  (the stack closes it)
        out.writelines(seal(pieces))
        out.flush()
        return Path(f"/proc/self/fd/{out.fileno()}")
