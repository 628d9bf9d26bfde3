"""A large file, or a stream, sent to S3 in parts, several at a time, in bounded memory.

Owns the order of the calls and the cutting into parts. Never speaks to a server itself, never shows a part as an object.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

from replicator.errors import ObjectMissing, PreconditionFailed, StoreError
from replicator.store import Stream
from replicator.store.retry import Retrying

MAX_PARTS = 10_000


@dataclass(frozen=True)
class Multipart:
    """When and how a file is sent in parts. part_bytes: at least 5 MiB on AWS; more where 10,000 parts are too few.

    streamed_part_bytes, streamed: the size of the parts of a stream, which are held in memory, and how many at a time.
    """

    threshold_bytes: int = 64 << 20
    part_bytes: int = 16 << 20
    parallel: int = 4
    streamed_part_bytes: int = 8 << 20
    streamed: int = 2


class Bucket(Protocol):
    """What sends the requests: S3's operations by their names in boto3, with full keys; raises StoreError."""

    def call(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]: ...

    def store(self, operation: str, key: str, **parameters: Any) -> str:
        """A call that stores something; its etag."""
        ...

    def head(self, key: str) -> dict[str, Any]: ...

    def url(self, key: str) -> str: ...


class _Upload:
    """One object sent in parts: all of it appears at once, when the last call succeeds, or nothing does.

    The server judges the condition in that call. SeaweedFS (4.48) judges and stores in two steps there, so that of writers
    who finish at the same moment more than one may be told that it won. What decides who may write (a lease) is small,
    goes in one request, and is judged in one step.
    """

    def __init__(self, bucket: Bucket, key: str, retrying: Retrying) -> None:
        self._bucket = bucket
        self._key = key
        self._retrying = retrying

    def _send_parts(
        self,
        bodies: Iterator[Callable[[], Any]],
        parallel: int,
        condition: dict[str, str],
        metadata: dict[str, Any],
    ) -> str:
        """The etag of the whole. bodies: of the parts in order, each made anew for every attempt to send it."""
        self._refuse_early(condition)
        upload = {"UploadId": self._bucket.call("create_multipart_upload", self._key, **metadata)["UploadId"]}
        try:
            parts = {"Parts": self._send_all(bodies, parallel, upload)}
            return self._bucket.store(
                "complete_multipart_upload", self._key, MultipartUpload=parts, **upload, **condition
            )
        except BaseException:
            # What was raised matters more than parts left behind, which a lifecycle rule of the bucket removes.
            with suppress(StoreError):
                self._bucket.call("abort_multipart_upload", self._key, **upload)
            raise

    def _refuse_early(self, condition: dict[str, str]) -> None:
        """The condition is judged at the end; who has lost already should not send gigabytes first."""
        if not condition:
            return
        try:
            etag = etag_of(self._bucket.head(self._key))
        except ObjectMissing:
            if "IfMatch" in condition:
                raise
            return
        if "IfNoneMatch" in condition or condition["IfMatch"] != quoted(etag):
            raise PreconditionFailed(f"{self._bucket.url(self._key)} exists already or has changed")

    def _send_all(
        self, bodies: Iterator[Callable[[], Any]], parallel: int, upload: dict[str, str]
    ) -> list[dict[str, Any]]:
        """At most ``parallel`` parts under way; the next body is taken when one has arrived."""
        sent: list[dict[str, Any]] = []
        running: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(parallel, thread_name_prefix="s3-part") as pool:
            try:
                for number, body in enumerate(bodies, 1):
                    running.append(pool.submit(self._send_part, number, body, upload))
                    if len(running) >= parallel:
                        sent.append(running.popleft().result())
                sent += [future.result() for future in running]
            finally:
                for future in running:
                    future.cancel()
        return sent

    def _send_part(self, number: int, body: Callable[[], Any], upload: dict[str, str]) -> dict[str, Any]:
        def attempt() -> str:
            return quoted(self._bucket.store("upload_part", self._key, PartNumber=number, Body=body(), **upload))

        return {"PartNumber": number, "ETag": self._retrying.run(attempt)}


class FileUpload(_Upload):
    """An open file."""

    def __init__(
        self, bucket: Bucket, key: str, descriptor: int, size_bytes: int, multipart: Multipart, retrying: Retrying
    ) -> None:
        super().__init__(bucket, key, retrying)
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._part_bytes = max(multipart.part_bytes, -(-size_bytes // MAX_PARTS))
        self._parallel = multipart.parallel

    def run(self, condition: dict[str, str], metadata: dict[str, Any]) -> tuple[str, int]:
        """The etag and the size of the whole. metadata: of the object, as boto3 takes it."""
        return self._send_parts(self._slices(), self._parallel, condition, metadata), self._size_bytes

    def _slices(self) -> Iterator[Callable[[], Any]]:
        for offset in range(0, self._size_bytes, self._part_bytes):
            length = min(self._part_bytes, self._size_bytes - offset)
            yield partial(_FileSlice, self._descriptor, offset, length)


class StreamUpload(_Upload):
    """A stream: in one request if it is short, else in parts. In memory are ``streamed`` parts and the one that is filled."""

    def __init__(self, bucket: Bucket, key: str, stream: Stream, multipart: Multipart, retrying: Retrying) -> None:
        super().__init__(bucket, key, retrying)
        # The length is not known: with parts of twice what is expected to be needed there are never too many.
        self._part_bytes = max(multipart.streamed_part_bytes, 2 * stream.expected_bytes // MAX_PARTS)
        self._parallel = multipart.streamed
        self._chunks = stream.chunks()
        self._size_bytes = 0

    def run(self, condition: dict[str, str], metadata: dict[str, Any]) -> tuple[str, int]:
        """The etag and the size of the whole. Raises what the stream raises, and nothing is stored."""
        parts = self._parts()
        first = next(parts, b"")
        if len(first) < self._part_bytes:
            return self._bucket.store("put_object", self._key, Body=first, **condition, **metadata), self._size_bytes
        bodies = (partial(_itself, part) for part in chain([first], parts))
        return self._send_parts(bodies, self._parallel, condition, metadata), self._size_bytes

    def _parts(self) -> Iterator[bytes]:
        """All of the same size but the last, which some servers insist on."""
        part = bytearray()
        for chunk in self._chunks:
            self._size_bytes += len(chunk)
            part += chunk
            while len(part) >= self._part_bytes:
                yield bytes(memoryview(part)[: self._part_bytes])
                del part[: self._part_bytes]
        if part:
            yield bytes(part)


def _itself(body: bytes) -> bytes:
    return body


class _FileSlice(io.RawIOBase):
    """A part of an open file as a file of its own, with its own position, so that parts are read at the same time."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._offset + self._at) if view else 0
        self._at += count
        return count


def etag_of(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def quoted(etag: str) -> str:
    return f'"{etag}"'
