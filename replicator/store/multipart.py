"""A large file sent to S3 in parts, several at a time, in bounded memory.

Owns the order of the calls and the cutting of the file. Never speaks to a server itself, never shows a part as an object.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from replicator.errors import ObjectMissing, PreconditionFailed, StoreError
from replicator.store.retry import Retrying

MAX_PARTS = 10_000


@dataclass(frozen=True)
class Multipart:
    """When and how a file is sent in parts. part_bytes: at least 5 MiB on AWS; more where 10,000 parts are too few."""

    threshold_bytes: int = 64 << 20
    part_bytes: int = 16 << 20
    parallel: int = 4


class Bucket(Protocol):
    """What sends the requests: S3's operations by their names in boto3, with full keys; raises StoreError."""

    def call(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]: ...

    def store(self, operation: str, key: str, **parameters: Any) -> str:
        """A call that stores something; its etag."""
        ...

    def head(self, key: str) -> dict[str, Any]: ...

    def url(self, key: str) -> str: ...


class Upload:
    """One file sent in parts: all of it appears at once, when the last call succeeds, or nothing does.

    The server judges the condition in that call. SeaweedFS (4.48) judges and stores in two steps there, so that of writers
    who finish at the same moment more than one may be told that it won. What decides who may write (a lease) is small,
    goes in one request, and is judged in one step.
    """

    def __init__(
        self, bucket: Bucket, key: str, descriptor: int, size_bytes: int, multipart: Multipart, retrying: Retrying
    ) -> None:
        self._bucket = bucket
        self._key = key
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._part_bytes = max(multipart.part_bytes, -(-size_bytes // MAX_PARTS))
        self._parallel = multipart.parallel
        self._retrying = retrying

    def run(self, condition: dict[str, str], metadata: dict[str, Any]) -> str:
        """The etag of the whole. metadata: of the object, as boto3 takes it."""
        self._refuse_early(condition)
        upload = {"UploadId": self._bucket.call("create_multipart_upload", self._key, **metadata)["UploadId"]}
        try:
            parts = {"Parts": self._send_all(upload)}
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

    def _send_all(self, upload: dict[str, str]) -> list[dict[str, Any]]:
        numbers = range(1, -(-self._size_bytes // self._part_bytes) + 1)
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="s3-part") as pool:
            futures = [pool.submit(self._send_part, number, upload) for number in numbers]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                for future in futures:
                    future.cancel()
            for future in futures:
                if not future.cancelled() and (error := future.exception()) is not None:
                    raise error
            return [future.result() for future in futures]

    def _send_part(self, number: int, upload: dict[str, str]) -> dict[str, Any]:
        offset = (number - 1) * self._part_bytes
        length = min(self._part_bytes, self._size_bytes - offset)

        def attempt() -> str:
            body = _FileSlice(self._descriptor, offset, length)
            return quoted(self._bucket.store("upload_part", self._key, PartNumber=number, Body=body, **upload))

        return {"PartNumber": number, "ETag": self._retrying.run(attempt)}


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
