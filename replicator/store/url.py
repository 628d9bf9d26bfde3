"""Store URLs: ``s3://bucket/prefix?endpoint=…``, ``file:///folder``, ``memory://name``.

Owns their syntax and how a store is put together from its parts. Never holds a secret in a URL, never does I/O.
"""

from __future__ import annotations

import difflib
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from replicator.errors import StoreError, UsageError
from replicator.store import ObjectStore, joined
from replicator.store.file import FileStore
from replicator.store.measure import MeasuredStore, Meter
from replicator.store.memory import named
from replicator.store.retry import Retrying, RetryStore

_S3_KEYS = {
    "endpoint": "endpoint",
    "region": "region",
    "force-path-style": "force-path-style",
    "forcePathStyle": "force-path-style",
    "max-connections": "max-connections",
}
"""Keys of an S3 URL and the one name of each; Litestream writes forcePathStyle."""


@dataclass(frozen=True)
class Credentials:
    """access_key None: from the environment, the user's AWS files or the instance's role."""

    access_key: str | None = None
    secret_key: str | None = None
    session_token: str | None = None

    def __post_init__(self) -> None:
        if (self.access_key is None) != (self.secret_key is None):
            given = "an access key without a secret key" if self.access_key else "a secret key without an access key"
            raise UsageError(
                f"{given} was given for object storage; give both, or none to take AWS_* from the environment"
            )

    def __repr__(self) -> str:
        return f"Credentials({'given' if self.access_key else 'from the environment'})"


def open_store(
    url: str,
    *,
    access_key: str | None = None,
    secret_key: str | None = None,
    session_token: str | None = None,
    retry_budget_s: float = 60.0,
    stop: threading.Event | None = None,
    meter: Meter | None = None,
) -> ObjectStore:
    """The store at ``url``, with retries and counting around it. Nothing is sent before its first use.

    retry_budget_s: how long an unavailable store is tried again; 0 for one attempt. stop: ends that waiting when set.
    meter: where requests are counted. Raises UsageError.
    """
    parts = _split(url)
    credentials = Credentials(access_key or None, secret_key or None, session_token or None)
    retrying = Retrying(budget_s=retry_budget_s, stop=stop)
    try:
        bare = _open_bare(parts, credentials, retrying)
    except StoreError as error:
        raise UsageError(f"{url}: {error}") from error
    return RetryStore(MeasuredStore(bare, meter or Meter()), retrying)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        has_credentials = parts.username is not None or parts.password is not None
    except ValueError as error:
        raise UsageError(f"a store URL is malformed: {error}") from None
    if has_credentials:
        raise UsageError(
            f"the {parts.scheme}:// URL of {parts.hostname or 'a store'} has credentials in it, where process lists and logs "
            "show them; give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in the configuration"
        )
    if parts.fragment:
        raise UsageError(f"{url} has a # in it; write it as %23")
    return parts


def _open_bare(parts: SplitResult, credentials: Credentials, retrying: Retrying) -> ObjectStore:
    if parts.scheme == "s3":
        return _open_s3(parts, credentials, retrying)
    if parts.scheme == "file":
        _options(parts, {})
        return _open_file(parts)
    if parts.scheme == "memory":
        _options(parts, {})
        return named(_required(unquote(parts.netloc), parts, "memory://NAME")).sub(unquote(parts.path))
    raise UsageError(
        f"{parts.geturl()!r} is not the URL of a store; write s3://BUCKET/PREFIX?endpoint=https://HOST or file:///FOLDER"
    )


def _open_file(parts: SplitResult) -> FileStore:
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise UsageError(f"{parts.geturl()} has no absolute path; write three slashes: file:///folder")
    path = Path(unquote(parts.path))
    if ".." in path.parts or path == Path("/"):
        raise UsageError(f"{parts.geturl()} is no folder for a store; name one without .. that is not the root")
    return FileStore(path)


def _open_s3(parts: SplitResult, credentials: Credentials, retrying: Retrying) -> ObjectStore:
    # Its import brings boto3, which takes longer than everything else together.
    from replicator.store.s3 import S3Access, S3Store

    options = _options(parts, _S3_KEYS)
    bucket = _required(unquote(parts.netloc), parts, "s3://BUCKET/PREFIX")
    access = S3Access(
        endpoint=_endpoint(options.get("endpoint")),
        region=options.get("region") or None,
        path_style=_flag("force-path-style", options.get("force-path-style")),
        max_connections=_count("max-connections", options.get("max-connections", "16")),
        access_key=credentials.access_key,
        secret_key=credentials.secret_key,
        session_token=credentials.session_token,
    )
    return S3Store(bucket, joined("", unquote(parts.path)), access, part_retrying=retrying)


def _options(parts: SplitResult, known: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]}?" if near else f"known are: {', '.join(sorted(set(known.values()))) or 'none'}"
            )
            raise UsageError(
                f"unknown key {key!r} in the {parts.scheme}:// URL of {parts.netloc or parts.path}; {hint}"
            )
        if known[key] in found:
            raise UsageError(f"the key {key!r} is twice in the {parts.scheme}:// URL of {parts.netloc or parts.path}")
        found[known[key]] = value
    return found


def _endpoint(text: str | None) -> str | None:
    """With its scheme; https when it has none, as Litestream takes it. Some have a path. Raises UsageError."""
    if not text:
        return None
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        is_server = parts.scheme in ("http", "https") and parts.hostname and not parts.query and parts.port != 0
    except ValueError:
        is_server = False
    if not is_server:
        raise UsageError("the endpoint of an s3:// URL is not a server; write it as https://HOST or http://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"the endpoint {parts.hostname} has credentials in it; give them as AWS_ACCESS_KEY_ID and so on"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _flag(key: str, text: str | None) -> bool | None:
    if text is None:
        return None
    if text.lower() not in ("true", "false", "1", "0"):
        raise UsageError(f"{key}={text} in an s3:// URL is neither true nor false")
    return text.lower() in ("true", "1")


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise UsageError(f"{key}={text} in an s3:// URL is not a number from 1 to 1000")
    return int(text)


def _required(name: str, parts: SplitResult, form: str) -> str:
    if not name:
        raise UsageError(f"{parts.geturl()} does not name a store; write {form}")
    return name
