"""A real S3 server behind a line that breaks: nothing is lost, nothing is written twice, nothing damaged gets through."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.faultproxy import FaultProxy
from support.seaweed import SeaweedServer

from replicator.errors import BucketMissing, PreconditionFailed, StoreDenied, StoreUnavailable
from replicator.store import ObjectStore, open_store
from replicator.store.multipart import Multipart
from replicator.store.retry import Retrying, RetryStore
from replicator.store.s3 import S3Access, S3Store

pytestmark = pytest.mark.real

SMALL_PARTS = Multipart(threshold_bytes=5 << 20, part_bytes=5 << 20, parallel=2)


@pytest.fixture
def proxy(seaweed: SeaweedServer) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as running:
        yield running


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4().hex}/"


@pytest.fixture
def bare(seaweed: SeaweedServer, proxy: FaultProxy, prefix: str) -> S3Store:
    """One attempt each."""
    access = S3Access(
        endpoint=proxy.endpoint,
        access_key=seaweed.access_key,
        secret_key=seaweed.secret_key,
        connect_timeout_s=2.0,
        read_timeout_s=2.0,
    )
    retrying = Retrying(budget_s=20, first_s=0.02, longest_s=0.2)
    return S3Store(seaweed.bucket, prefix, access, multipart=SMALL_PARTS, part_retrying=retrying)


@pytest.fixture
def store(bare: S3Store) -> RetryStore:
    return RetryStore(bare, Retrying(budget_s=30, first_s=0.02, longest_s=0.2))


@pytest.fixture
def direct(seaweed: SeaweedServer, prefix: str) -> ObjectStore:
    """Past the proxy."""
    return open_store(seaweed.url(prefix), access_key=seaweed.access_key, secret_key=seaweed.secret_key)


def test_signed_requests_pass_the_proxy_unchanged(store: RetryStore, proxy: FaultProxy) -> None:
    store.put("a", b"x" * 100)
    assert store.get("a") == b"x" * 100
    assert [(r.method, r.status, r.sent_bytes, r.received_bytes) for r in proxy.log] == [
        ("PUT", 200, 100, 0),
        ("GET", 200, 0, 100),
    ]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_storm_of_errors_is_outlived(store: RetryStore, proxy: FaultProxy, status: int) -> None:
    proxy.answer(status, times=12)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.put(f"k{number}", b"v", if_none_match=True), range(8)))
    assert len(list(store.list())) == 8
    assert sum(request.status == status for request in proxy.log) == 12


def test_a_server_that_comes_back_is_used_again(store: RetryStore, proxy: FaultProxy) -> None:
    store.put("before", b"x")
    proxy.refuse()
    timer = threading.Timer(0.5, proxy.heal)
    timer.start()
    store.put("during", b"x", if_none_match=True)
    timer.join()
    assert store.get("during") == b"x"


def test_a_refusing_server_is_unavailable(bare: S3Store, proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(StoreUnavailable, match="refused"):
        bare.get("key")


def test_a_hanging_server_is_unavailable_and_then_used_again(bare: S3Store, proxy: FaultProxy) -> None:
    proxy.hang()
    with pytest.raises(StoreUnavailable, match="no answer in time"):
        bare.put("key", b"x")
    proxy.heal()
    bare.put("key", b"x")


@pytest.mark.parametrize("after_bytes", [0, 1, 70_000])
def test_an_answer_cut_in_the_middle_is_never_taken_for_whole(
    bare: S3Store, store: RetryStore, proxy: FaultProxy, after_bytes: int
) -> None:
    body = os.urandom(100_000)
    bare.put("key", body)
    proxy.cut_response(after_bytes)
    with pytest.raises(StoreUnavailable, match="key"):
        bare.get("key")
    proxy.cut_response(after_bytes)
    with pytest.raises(StoreUnavailable):
        bare.get("key", offset=10, length=80_000)
    proxy.cut_response(after_bytes, times=3)
    assert store.get("key") == body


@pytest.mark.parametrize("after_bytes", [1, 70_000, 2_500_000])
def test_a_put_cut_in_the_middle_stores_nothing(
    bare: S3Store, store: RetryStore, proxy: FaultProxy, tmp_path: Path, after_bytes: int
) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(3_000_000))
    proxy.cut_request(after_bytes)
    with pytest.raises(StoreUnavailable):
        bare.put("key", body, if_none_match=True)
    assert list(bare.list()) == []
    proxy.cut_request(after_bytes, times=2)
    store.put("key", body, if_none_match=True)
    assert store.get("key") == body.read_bytes()


def test_a_body_damaged_on_the_way_is_refused_and_sent_again(
    bare: S3Store, store: RetryStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(6 << 20))
    for key, content in (("bytes", b"important" * 100), ("file", body)):
        proxy.damage_request()
        with pytest.raises(StoreUnavailable, match="BadDigest"):
            RetryStore(bare, Retrying(budget_s=0)).put("key", b"important" * 100, if_none_match=True)
        assert list(bare.list(key)) == []
        proxy.damage_request(times=2)
        store.put(key, content, if_none_match=True)
        assert store.get(key) == (content if isinstance(content, bytes) else content.read_bytes())


def test_a_lost_answer_to_a_conditional_put_is_success(store: RetryStore, proxy: FaultProxy) -> None:
    proxy.swallow(methods=("PUT",))
    info = store.put("key", b"mine", if_none_match=True)
    assert store.head("key") == info
    assert [(r.forwarded, r.status) for r in proxy.log if r.method == "PUT"] == [(200, 0), (412, 412)]


def test_a_lost_answer_to_an_overwrite_is_success(store: RetryStore, proxy: FaultProxy) -> None:
    etag = store.put("key", b"before").etag
    proxy.swallow(methods=("PUT",))
    store.put("key", b"after", if_match=etag)
    assert store.get("key") == b"after"


def test_another_writer_who_came_first_is_not_overwritten(
    store: RetryStore, direct: ObjectStore, proxy: FaultProxy
) -> None:
    direct.put("key", b"theirs")
    proxy.answer(500, methods=("PUT",))
    with pytest.raises(PreconditionFailed):
        store.put("key", b"mine", if_none_match=True)
    assert direct.get("key") == b"theirs"


def test_a_large_file_repeats_only_the_parts_that_failed(
    store: RetryStore, direct: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(21 << 20))
    proxy.cut_request(1_000_000, path_part="partNumber=2")
    proxy.answer(503, path_part="partNumber=3")
    proxy.swallow(methods=("PUT",), path_part="partNumber=5")
    store.put("large", body, if_none_match=True)
    assert direct.get("large") == body.read_bytes()
    assert sum("partNumber=" in request.path for request in proxy.log) == 5 + 3
    assert sum(request.path.endswith("uploads") for request in proxy.log) == 1


def test_a_lost_answer_to_the_end_of_a_large_file_is_success(
    store: RetryStore, direct: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(6 << 20))
    proxy.swallow(methods=("POST",), path_part="?uploadId=")
    store.put("large", body, if_none_match=True)
    assert direct.get("large") == body.read_bytes()


def test_a_large_file_that_fails_leaves_no_parts(
    seaweed: SeaweedServer, bare: S3Store, proxy: FaultProxy, prefix: str, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(11 << 20))
    proxy.answer(403, code="AccessDenied", path_part="partNumber=2")
    with pytest.raises(StoreDenied):
        bare.put("large", body, if_none_match=True)
    assert list(bare.list()) == []
    uploads = seaweed.client().list_multipart_uploads(Bucket=seaweed.bucket, Prefix=prefix)
    assert uploads.get("Uploads", []) == []


def test_wrong_keys_and_buckets_are_told_apart(seaweed: SeaweedServer) -> None:
    def opened(bucket: str, access_key: str, secret_key: str) -> ObjectStore:
        url = f"s3://{bucket}/x?endpoint={seaweed.endpoint}"
        return open_store(url, access_key=access_key, secret_key=secret_key, retry_budget_s=0)

    for store in (
        opened(seaweed.bucket, "nobody", seaweed.secret_key),
        opened(seaweed.bucket, seaweed.access_key, "wrong-secret"),
    ):
        with pytest.raises(StoreDenied) as caught:
            store.put("key", b"x")
        assert "wrong-secret" not in str(caught.value)
    missing = opened("no-such-bucket", seaweed.access_key, seaweed.secret_key)
    for call in (lambda: missing.head("k"), lambda: missing.get("k"), lambda: missing.put("k", b"")):
        with pytest.raises(BucketMissing, match="no-such-bucket"):
            call()


def test_the_delay_is_added_to_each_request(store: RetryStore, proxy: FaultProxy) -> None:
    store.put("key", b"x")
    proxy.delay_ms = 150
    store.get("key")
    assert proxy.log[-1].ended_s - proxy.log[-1].at_s >= 0.15


def test_a_server_that_was_killed_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    with SeaweedServer() as server:
        store = open_store(server.url(), access_key=server.access_key, secret_key=server.secret_key)
        for number in range(20):
            store.put(f"k/{number:02d}", b"v" * 1000, if_none_match=True)
        server.halt()
        server.resume()
        assert [store.get(info.key) for info in store.list("k/")] == [b"v" * 1000] * 20
        store.put("after", b"x", if_none_match=True)
