"""A bucket of any S3-compatible service as object storage.

Owns every use of boto3 and the translation of its failures. Never tries again (``retry`` does), never shows a secret.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserError
from botocore.utils import determine_content_length
from urllib3.exceptions import HTTPError

from replicator.errors import (
    BucketMissing,
    ObjectMissing,
    PreconditionFailed,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    UsageError,
)
from replicator.store import Body, ObjectInfo, Stream, check_key, check_prefix, is_key, joined
from replicator.store.multipart import FileUpload, Multipart, StreamUpload, etag_of, quoted
from replicator.store.retry import Retrying
from replicator.values import format_time, parse_time

KEYS_PER_DELETE = 1000
DEFAULT_REGION = "us-east-1"
USER_AGENT = f"minipaas-replicator boto3/{boto3.__version__}"

_EXPECT_ABOVE_BYTES = 1 << 20
_HASH_BYTES = 1 << 20
_MAX_DETAIL_CHARS = 200
_TIME_METADATA = "litestream-timestamp"

_UNAVAILABLE_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "ServiceUnavailable",
    "InternalError", "InternalFailure", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted",
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "NoSuchUpload",
}  # fmt: skip
"""Codes after which the same request may succeed. Those about digests: the body was damaged on the way.

ConditionalRequestConflict: two conditional writes met, and this one was not judged; AWS asks to send it again.
Source: docs.aws.amazon.com, "How to prevent object overwrites with conditional writes".
"""

_DENIED_CODES = {
    "AccessDenied", "AccountProblem", "AllAccessDisabled", "AuthorizationHeaderMalformed", "InvalidAccessKeyId",
    "InvalidToken", "SignatureDoesNotMatch", "Unauthorized",
}  # fmt: skip

_STALE_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"}
"""Credentials that were right once, or never; their source may have others by now."""

_NO_BATCH_DELETE_CODES = {"NotImplemented", "MethodNotAllowed", "MissingContentMD5", "InvalidRequest", "405", "501"}

_FOREIGN = (boto_errors.BotoCoreError, boto_errors.ClientError, ResponseParserError, HTTPError, OSError, RuntimeError)
"""RuntimeError: how botocore says that credentials are expired although it has just renewed them."""

_NO_KEYS = (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError)
_NO_SOURCE = (boto_errors.CredentialRetrievalError, boto_errors.MetadataRetrievalError, boto_errors.TokenRetrievalError)


@dataclass(frozen=True)
class S3Access:
    """How to reach a server. endpoint: with scheme; None for AWS, or what AWS_ENDPOINT_URL says.

    region: None for what the environment says. path_style: None for path style exactly when there is an endpoint.
    access_key: None for boto3's usual chain: environment, the user's AWS files, the instance's role.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    max_connections: int = 16
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0


class S3Store:
    """Objects below ``prefix`` ('' or ending in /) of a bucket. Nothing is sent, no client is made before the first call.

    part_retrying: how a part of a multi-part upload is tried again, so that one failure does not repeat the whole file.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        access: S3Access | None = None,
        *,
        multipart: Multipart | None = None,
        part_retrying: Retrying | None = None,
    ) -> None:
        self._bucket = _Bucket(bucket, access or S3Access())
        self._prefix = prefix
        self._multipart = multipart or Multipart()
        self._part_retrying = part_retrying or Retrying(budget_s=0)

    @property
    def url(self) -> str:
        return self._bucket.url(self._prefix.rstrip("/"))

    def put(
        self,
        key: str,
        body: Body,
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
        time_ms: int | None = None,
    ) -> ObjectInfo:
        full = self._full(key)
        condition = _condition(if_none_match, if_match)
        try:
            etag, size_bytes = self._send(full, body, condition, _metadata(time_ms))
        except ObjectMissing as error:
            if if_match is not None:
                # AWS answers a conditional overwrite of nothing with 404.
                raise PreconditionFailed(str(error)) from error
            raise StoreError(f"{error}, which is no answer to a PUT; is the endpoint right?") from error
        return ObjectInfo(key, size_bytes, etag)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        full = self._full(key)
        if length == 0:
            self._bucket.head(full)
            return b""
        try:
            partial, data = self._bucket.read(full, _range(offset, length))
        except StoreError as error:
            if _code(error) not in ("InvalidRange", "416"):
                raise
            self._bucket.head(full)
            return b""
        # A server that does not know ranges sends the whole object; a suffix reaches to the end whatever the length is.
        start = max(0, len(data) + offset) if offset < 0 else (0 if partial else offset)
        return data[start : None if length is None else start + length]

    def head(self, key: str) -> ObjectInfo:
        answer = self._bucket.head(self._full(key))
        return ObjectInfo(key, int(answer["ContentLength"]), etag_of(answer), _time_of(answer))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects with keys that break the rule for keys (other programs', markers of folders) are left out."""
        skip = len(self._prefix)
        items = self._bucket.contents(self._prefix + check_prefix(prefix))
        found = (ObjectInfo(item["Key"][skip:], int(item["Size"]), etag_of(item), _time_of(item)) for item in items)
        return _in_key_order((info for info in found if is_key(info.key)), prefix.rfind("/") + 1)

    def delete(self, keys: Sequence[str]) -> None:
        full = [self._full(key) for key in keys]
        for start in range(0, len(full), KEYS_PER_DELETE):
            self._bucket.delete(full[start : start + KEYS_PER_DELETE])

    def sub(self, prefix: str) -> S3Store:
        below = copy.copy(self)
        below._prefix = joined(self._prefix, prefix)
        return below

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _send(self, full: str, body: Body, condition: dict[str, str], metadata: dict[str, Any]) -> tuple[str, int]:
        """Etag and size."""
        if isinstance(body, bytes):
            return self._bucket.store("put_object", full, Body=body, **condition, **metadata), len(body)
        if isinstance(body, Stream):
            upload = StreamUpload(self._bucket, full, body, self._multipart, self._part_retrying)
            return upload.run(condition, metadata)
        with _open(body) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > self._multipart.threshold_bytes:
                file_upload = FileUpload(
                    self._bucket, full, file.fileno(), size_bytes, self._multipart, self._part_retrying
                )
                return file_upload.run(condition, metadata)
            return self._bucket.store("put_object", full, Body=file, **condition, **metadata), size_bytes


class _Bucket:
    """A bucket on a server: calls with full keys, answers as boto3 gives them, failures translated."""

    def __init__(self, name: str, access: S3Access) -> None:
        self.name = name
        self._access = access
        self._seen = False
        self._batch_delete = True

    def url(self, key: str = "") -> str:
        where = f"?endpoint={self._access.endpoint}" if self._access.endpoint else ""
        return f"s3://{self.name}/{key}".rstrip("/") + where

    def call(self, operation: str, key: str | None = None, **parameters: Any) -> dict[str, Any]:
        what = f"{operation} {self.url(key or '')}"
        if key is not None:
            parameters["Key"] = key
        client = None
        try:
            client = _client(self._access)
            answer: dict[str, Any] = getattr(client, operation)(Bucket=self.name, **parameters)
        except _FOREIGN as error:
            translated = _translated(error, what)
            if _code_of(error) in _STALE_CODES or isinstance(error, (*_NO_KEYS, RuntimeError)):
                _forget(self._access, client)
            if isinstance(translated, ObjectMissing):
                if key is None:
                    raise _bucket_missing(what) from error
                self._check_bucket(error)
            raise translated from error
        self._seen = True
        return answer

    def _check_bucket(self, error: Exception) -> None:
        """Raises BucketMissing. A 404 without S3's code, as for every HEAD, does not say what is missing."""
        if not self._seen and _code_of(error) != "NoSuchKey":
            self.call("head_bucket")

    def store(self, operation: str, key: str, **parameters: Any) -> str:
        """A call that stores the object; its etag, without which the answer is not taken for a success."""
        etag = etag_of(self.call(operation, key, **parameters))
        if not etag:
            raise StoreUnavailable(f"{operation} {self.url(key)}: the answer is not that of an S3 server")
        return etag

    def read(self, key: str, wanted: str | None) -> tuple[bool, bytes]:
        """Whether it is only the range, and the bytes."""
        answer = self.call("get_object", key, **({"Range": wanted} if wanted else {}))
        try:
            with closing(answer["Body"]) as body:
                data: bytes = body.read()
        except _FOREIGN as error:
            raise _translated(error, f"get_object {self.url(key)}") from error
        expected = answer.get("ContentLength", len(data))
        if len(data) != expected:
            raise StoreUnavailable(f"get_object {self.url(key)}: {len(data)} of {expected} bytes came")
        return answer["ResponseMetadata"]["HTTPStatusCode"] == 206, data

    def head(self, key: str) -> dict[str, Any]:
        answer = self.call("head_object", key)
        if "ContentLength" not in answer:
            raise StoreUnavailable(f"head_object {self.url(key)}: the answer is not that of an S3 server")
        return answer

    def contents(self, prefix: str) -> Iterator[dict[str, Any]]:
        parameters: dict[str, str] = {}
        while True:
            page = self.call("list_objects_v2", Prefix=prefix, **parameters)
            if "IsTruncated" not in page:
                # An empty page of something else (a proxy, a portal) must not pass for an empty bucket.
                raise StoreUnavailable(f"list_objects_v2 {self.url(prefix)}: the answer is not that of an S3 server")
            yield from page.get("Contents", ())
            if not page["IsTruncated"]:
                return
            if not page.get("NextContinuationToken"):
                raise StoreError(f"list_objects_v2 {self.url(prefix)}: the server sent a part and not how to go on")
            parameters = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Sequence[str]) -> None:
        if len(keys) > 1 and self._batch_delete:
            try:
                return self._delete_batch(keys)
            except StoreError as error:
                if _code(error) not in _NO_BATCH_DELETE_CODES:
                    raise
                self._batch_delete = False
        for key in keys:
            with suppress(ObjectMissing):
                self.call("delete_object", key)
        return None

    def _delete_batch(self, keys: Sequence[str]) -> None:
        answer = self.call("delete_objects", Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        errors = [error for error in answer.get("Errors", ()) if error.get("Code") != "NoSuchKey"]
        if errors:
            first, rest = errors[0], f" and {len(errors) - 1} more" if len(errors) > 1 else ""
            what = f"delete_objects {self.url(str(first.get('Key', '')))}{rest}"
            raise _of_code(str(first.get("Code", "")), 0, str(first.get("Message", "")), what)


# -- clients -----------------------------------------------------------------------------------------------------------

_clients: dict[S3Access, Any] = {}
_clients_lock = threading.Lock()


def _client(access: S3Access) -> Any:
    """The one client of the process for this access: making one takes some 100 ms, and it holds the connections."""
    client = _clients.get(access)
    if client is None:
        with _clients_lock:
            client = _clients.get(access)
            if client is None:
                client = _clients[access] = _new_client(access)
    return client


def _forget(access: S3Access, client: Any) -> None:
    """The next call looks for credentials anew. Calls of other threads that are under way keep the client they have."""
    with _clients_lock:
        if access.access_key is None and _clients.get(access) is client:
            _clients.pop(access, None)


def _new_client(access: S3Access) -> Any:
    session = boto3.session.Session(
        aws_access_key_id=access.access_key,
        aws_secret_access_key=access.secret_key,
        aws_session_token=access.session_token,
    )
    region = access.region or session.region_name or DEFAULT_REGION
    try:
        client = session.client("s3", region_name=region, endpoint_url=access.endpoint, config=_config(access))
    except ValueError as error:
        raise UsageError(f"the endpoint {access.endpoint} cannot be used: {error}") from error
    events = client.meta.events
    events.unregister("before-call.s3", add_expect_header)
    events.register("before-call.s3", _expect_for_large_bodies)
    for operation in ("PutObject", "UploadPart", "DeleteObjects"):
        events.register(f"before-call.s3.{operation}", _add_content_md5)
    return client


def _config(access: S3Access) -> Config:
    has_endpoint = access.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    path_style = bool(has_endpoint) if access.path_style is None else access.path_style
    return Config(
        signature_version="s3v4",
        connect_timeout=access.connect_timeout_s,
        read_timeout=access.read_timeout_s,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=access.max_connections,
        tcp_keepalive=True,
        # boto3's own, of a dozen parts, is put together and cleaned twice for every request.
        user_agent=USER_AGENT,
        parameter_validation=False,
        # Older servers refuse the checksum headers of newer boto3. All know Content-MD5, which is sent instead.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if path_style else "auto" if access.path_style is None else "virtual"},
    )


def _expect_for_large_bodies(params: dict[str, Any], **_: Any) -> None:
    """boto3 waits for leave to send every body, a round trip each; only large ones are worth it."""
    if params["method"] == "PUT" and (determine_content_length(params["body"]) or 0) > _EXPECT_ABOVE_BYTES:
        params["headers"]["Expect"] = "100-continue"


def _add_content_md5(params: dict[str, Any], **_: Any) -> None:
    """A server refuses a body that was damaged on the way. Over https boto3 then does not hash it once more to sign it.

    The signature alone is not enough: SeaweedFS stores a body whose SHA-256 is not the signed one.
    """
    body, digest = params["body"], hashlib.md5(usedforsecurity=False)
    if isinstance(body, bytes):
        digest.update(body)
    else:
        start = body.tell()
        while chunk := body.read(_HASH_BYTES):
            digest.update(chunk)
        body.seek(start)
    params["headers"]["Content-MD5"] = base64.b64encode(digest.digest()).decode()


# -- values and failures -----------------------------------------------------------------------------------------------


def _in_key_order(found: Iterator[ObjectInfo], folder_length: int) -> Iterator[ObjectInfo]:
    """The same in the order of keys. folder_length: of the folder that the listing is of, with its slash.

    Servers that keep folders (SeaweedFS) list "a/b" before "a-b". So what comes after the first key of a deeper folder is
    held back and sorted; a listing of a folder without folders passes as it comes.
    """
    held: list[ObjectInfo] = []
    for info in found:
        if held or "/" in info.key[folder_length:]:
            held.append(info)
        else:
            yield info
    yield from sorted(held, key=lambda info: info.key)


def _condition(if_none_match: bool, if_match: str | None) -> dict[str, str]:
    if if_none_match and if_match is not None:
        raise StoreError("if_none_match and if_match exclude each other")
    if if_none_match:
        return {"IfNoneMatch": "*"}
    return {} if if_match is None else {"IfMatch": quoted(if_match)}


def _metadata(time_ms: int | None) -> dict[str, Any]:
    """Litestream restores to a moment by this, and not by when the object was written."""
    return {} if time_ms is None else {"Metadata": {_TIME_METADATA: format_time(time_ms)}}


def _time_of(answer: dict[str, Any]) -> int | None:
    """Of a HEAD, or of an entry of a listing."""
    given = answer.get("Metadata", {}).get(_TIME_METADATA)
    if given is not None:
        with suppress(UsageError):
            return parse_time(given, 0)
    written: datetime | None = answer.get("LastModified")
    return None if written is None else round(written.timestamp() * 1000)


def _range(offset: int, length: int | None) -> str | None:
    if offset < 0:
        return f"bytes={offset}"
    if length is not None:
        return f"bytes={offset}-{offset + length - 1}"
    return f"bytes={offset}-" if offset else None


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise StoreError(f"{path}, which was to be stored, cannot be read: {error.strerror}") from error


def _code(error: StoreError) -> str:
    """S3's code of the answer that was translated; '' when there was none."""
    return _code_of(error.__cause__)


def _code_of(error: BaseException | None) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto_errors.ClientError) else ""


def _translated(error: Exception, what: str) -> StoreError:
    if isinstance(error, boto_errors.ClientError):
        answer = error.response.get("Error", {})
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _of_code(str(answer.get("Code", "")), status, str(answer.get("Message", "")), what)
    if isinstance(error, _NO_KEYS):
        return StoreDenied(
            f"{what}: no access keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or fill ~/.aws/credentials"
        )
    if isinstance(error, RuntimeError) and "credentials" in str(error):
        return StoreDenied(
            f"{what}: the credentials have expired, and their source gives none that are valid; renew them there"
        )
    detail = _one_line(_innermost(error))
    if isinstance(error, _NO_SOURCE):
        return StoreUnavailable(f"{what}: the credentials could not be had from their source: {detail}")
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        return StoreDenied(f"{what}: its certificate is not trusted; name its authority in AWS_CA_BUNDLE ({detail})")
    if isinstance(error, (boto_errors.ConnectTimeoutError, boto_errors.ReadTimeoutError)):
        return StoreUnavailable(f"{what}: no answer in time")
    if isinstance(error, _NETWORK_FAILURES):
        return StoreUnavailable(f"{what}: the connection failed: {detail}")
    return StoreError(f"{what}: {detail}")


_NETWORK_FAILURES = (
    boto_errors.HTTPClientError,
    boto_errors.ConnectionError,
    boto_errors.IncompleteReadError,
    ResponseParserError,
    HTTPError,
    OSError,
)


def _of_code(code: str, status: int, detail: str, what: str) -> StoreError:
    known = [code] if code and code != str(status) else []
    answer = f"{what}: " + ", ".join(known + ([f"HTTP {status}"] if status else []))
    if code == "NoSuchBucket":
        return _bucket_missing(what)
    if code == "RequestTimeTooSkewed":
        return StoreDenied(f"{answer}: the clock of this host differs too much from the server's; set it (NTP)")
    if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"):
        return StoreDenied(f"{answer}: the credentials have expired; renew them where they come from")
    if code in _UNAVAILABLE_CODES or status == 429 or (status >= 500 and status != 501):
        return StoreUnavailable(f"{answer}: the server is overloaded or failing")
    if code in _DENIED_CODES or status in (401, 403):
        return StoreDenied(f"{answer}: check the access key and what its policy allows")
    if code == "PreconditionFailed" or status == 412:
        return PreconditionFailed(f"{answer}: the object exists already or has changed")
    if code == "NoSuchKey" or status == 404:
        return ObjectMissing(f"{answer}: the object does not exist")
    if code in ("PermanentRedirect", "TemporaryRedirect") or 300 <= status < 400:
        return StoreError(f"{answer}: the bucket is elsewhere; correct the region or the endpoint")
    if status == 501 or code == "NotImplemented":
        return StoreError(f"{answer}: the server does not know this request; it has to know conditional writes")
    return StoreError(f"{answer}: {_one_line(detail)}")


def _bucket_missing(what: str) -> BucketMissing:
    return BucketMissing(f"{what}: the bucket does not exist; create it or correct its name")


def _innermost(error: BaseException) -> str:
    """What the operating system said, below the layers of two HTTP libraries that repeat the URL."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_DETAIL_CHARS]
