"""Failures of an S3 server are told apart, named in one line, and never show a secret."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faultproxy import FaultProxy

from replicator.errors import (
    BucketMissing,
    ObjectMissing,
    PreconditionFailed,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from replicator.store.s3 import S3Access, S3Store

SECRET = "very/secret+key"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """With no server behind it: every answer is one that the test asked for."""
    with FaultProxy(NOWHERE) as running:
        yield running


def store_at(endpoint: str, *, timeout_s: float = 5.0) -> S3Store:
    access = S3Access(
        endpoint=endpoint,
        access_key="AKIDEXAMPLE",
        secret_key=SECRET,
        connect_timeout_s=timeout_s,
        read_timeout_s=timeout_s,
    )
    return S3Store("bucket", "prefix/", access)


ANSWERS = [
    (500, "InternalError", StoreUnavailable),
    (502, "", StoreUnavailable),
    (503, "SlowDown", StoreUnavailable),
    (503, "ServiceUnavailable", StoreUnavailable),
    (429, "TooManyRequests", StoreUnavailable),
    (400, "RequestTimeout", StoreUnavailable),
    (400, "BadDigest", StoreUnavailable),
    (400, "XAmzContentSHA256Mismatch", StoreUnavailable),
    (409, "ConditionalRequestConflict", StoreUnavailable),
    (409, "OperationAborted", StoreUnavailable),
    (412, "PreconditionFailed", PreconditionFailed),
    (403, "AccessDenied", StoreDenied),
    (403, "InvalidAccessKeyId", StoreDenied),
    (403, "SignatureDoesNotMatch", StoreDenied),
    (403, "RequestTimeTooSkewed", StoreDenied),
    (400, "ExpiredToken", StoreDenied),
    (401, "Unauthorized", StoreDenied),
    (404, "NoSuchBucket", BucketMissing),
    (400, "InvalidArgument", StoreError),
    (501, "NotImplemented", StoreError),
    (405, "MethodNotAllowed", StoreError),
]


@pytest.mark.parametrize(("status", "code", "expected"), ANSWERS)
def test_each_answer_is_its_own_failure_in_one_line(
    proxy: FaultProxy, status: int, code: str, expected: type[StoreError]
) -> None:
    proxy.answer(status, code=code)
    with pytest.raises(StoreError) as caught:
        store_at(proxy.endpoint).put("a/key", b"x", if_none_match=True)
    message = str(caught.value)
    assert type(caught.value) is expected
    assert f"s3://bucket/prefix/a/key?endpoint={proxy.endpoint}" in message
    assert code in message or expected is BucketMissing
    assert "\n" not in message
    assert SECRET not in message
    assert len(proxy.log) == 1


def test_a_clock_that_is_wrong_is_named(proxy: FaultProxy) -> None:
    proxy.answer(403, code="RequestTimeTooSkewed")
    with pytest.raises(StoreDenied, match="clock"):
        store_at(proxy.endpoint).get("key")


def test_reading_what_is_missing_is_told_from_a_missing_bucket(proxy: FaultProxy) -> None:
    store = store_at(proxy.endpoint)
    proxy.answer(404, code="NoSuchKey")
    with pytest.raises(ObjectMissing):
        store.get("key")
    proxy.answer(404, code="NoSuchBucket")
    with pytest.raises(BucketMissing):
        store.get("key")
    proxy.answer(404, code="NoSuchBucket", times=2)
    with pytest.raises(BucketMissing):
        store.head("key")
    proxy.answer(404, code="NoSuchBucket")
    with pytest.raises(BucketMissing):
        list(store.list())


def test_overwriting_what_is_gone_is_a_broken_condition(proxy: FaultProxy) -> None:
    proxy.answer(404, code="NoSuchKey")
    with pytest.raises(PreconditionFailed):
        store_at(proxy.endpoint).put("key", b"x", if_match="etag")


def test_a_server_that_is_not_s3_is_no_empty_store(proxy: FaultProxy) -> None:
    proxy.answer(404, times=None, code="")
    store = store_at(proxy.endpoint)
    calls: list[Callable[[], object]] = [
        lambda: store.put("key", b"x", if_none_match=True),
        lambda: store.get("key"),
        lambda: store.head("key"),
        lambda: list(store.list()),
    ]
    for call in calls:
        with pytest.raises(BucketMissing):
            call()


def test_a_put_that_is_answered_with_404_did_not_lose_a_race(proxy: FaultProxy) -> None:
    proxy.answer(404, code="NoSuchKey")
    with pytest.raises(StoreError, match="endpoint") as caught:
        store_at(proxy.endpoint).put("key", b"x", if_none_match=True)
    assert type(caught.value) is StoreError


def test_a_range_of_a_missing_object_is_not_empty(proxy: FaultProxy) -> None:
    proxy.answer(416, code="InvalidRange")
    proxy.answer(404, code="NoSuchKey", times=2)
    with pytest.raises((ObjectMissing, BucketMissing)):
        store_at(proxy.endpoint).get("key", offset=10)


def test_a_server_without_batch_delete_gets_single_deletes(proxy: FaultProxy) -> None:
    store = store_at(proxy.endpoint)
    proxy.answer(501, code="NotImplemented", methods=("POST",))
    proxy.answer(204, methods=("DELETE",), times=5)
    store.delete(["a", "b", "c"])
    store.delete(["d", "e"])
    assert [(request.method, request.path) for request in proxy.log[1:]] == [
        ("DELETE", f"/bucket/prefix/{key}") for key in "abcde"
    ]


def test_a_refused_connection_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match="Connection refused"):
        store_at(NOWHERE).get("key")


def test_a_name_that_does_not_resolve_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match=r"name-that-is-not\.invalid"):
        store_at("http://name-that-is-not.invalid:9000").get("key")


def test_a_server_that_hangs_is_unavailable_after_the_time_out(proxy: FaultProxy) -> None:
    proxy.hang()
    with pytest.raises(StoreUnavailable, match="no answer in time"):
        store_at(proxy.endpoint, timeout_s=0.3).put("key", b"x")


def test_an_empty_answer_is_no_empty_bucket(proxy: FaultProxy) -> None:
    proxy.answer(200, methods=("GET",))
    with pytest.raises(StoreUnavailable, match="not that of an S3 server"):
        list(store_at(proxy.endpoint).list())


def test_without_keys_the_message_says_how_to_give_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = S3Store("bucket", "", S3Access(endpoint=NOWHERE, region="keyless-1"))
    with pytest.raises(StoreDenied, match="AWS_ACCESS_KEY_ID"):
        store.get("key")


def test_no_repr_shows_a_secret() -> None:
    access = S3Access(endpoint=NOWHERE, access_key="AKIDEXAMPLE", secret_key=SECRET, session_token="session-secret")
    shown = repr(access) + repr(S3Store("bucket", "", access)) + S3Store("bucket", "", access).url
    assert SECRET not in shown
    assert "session-secret" not in shown
    assert "AKIDEXAMPLE" not in shown


def test_only_large_bodies_wait_for_leave_to_be_sent(proxy: FaultProxy) -> None:
    proxy.answer(200, times=2)
    store_at(proxy.endpoint).put("small", b"x" * 1024)
    store_at(proxy.endpoint).put("large", b"x" * (2 << 20))
    assert [request.asked_leave for request in proxy.log] == [False, True]
