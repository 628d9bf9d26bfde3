"""What every object store promises, claim by claim, over memory, a folder, moto and a real S3 server, encrypted and not."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pyrage
import pytest
from moto import mock_aws

from replicator.errors import ObjectMissing, PreconditionFailed, StateMismatch, StoreError
from replicator.store import ObjectInfo, ObjectStore, Stream
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore
from replicator.store.multipart import Multipart
from replicator.store.s3 import S3Access, S3Store
from replicator.store.seal import sealed

SMALL_PARTS = Multipart(threshold_bytes=5 << 20, part_bytes=5 << 20, parallel=2, streamed_part_bytes=5 << 20)
IDENTITY = pyrage.x25519.Identity.generate()
KEYS = {"recipients": [str(IDENTITY.to_public())], "identities": [str(IDENTITY)]}

SEALED = "sealed-"
KINDS = [
    *("memory", "file", "moto", "sealed-file"),
    *(pytest.param(kind, marks=pytest.mark.real) for kind in ("seaweed", "sealed-seaweed")),
]


def memory_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    yield MemoryStore("contract")


def file_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    yield FileStore(tmp_path / "store")


@pytest.fixture(scope="module")
def moto_bucket() -> Iterator[str]:
    with mock_aws():
        boto3.client("s3", "us-east-1", aws_access_key_id="k", aws_secret_access_key="s").create_bucket(Bucket="bucket")
        yield "bucket"


def moto_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    bucket = request.getfixturevalue("moto_bucket")
    access = S3Access(region="us-east-1", access_key="k", secret_key="s")
    yield S3Store(bucket, f"{uuid.uuid4().hex}/prefix/", access, multipart=SMALL_PARTS)


def seaweed_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    server = request.getfixturevalue("seaweed")
    access = S3Access(endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key)
    yield S3Store(server.bucket, f"{uuid.uuid4().hex}/prefix/", access, multipart=SMALL_PARTS)


def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    make = {"memory": memory_store, "file": file_store, "moto": moto_store, "seaweed": seaweed_store}
    for store in make[request.param.removeprefix(SEALED)](tmp_path, request):
        yield sealed(store, **KEYS) if request.param.startswith(SEALED) else store


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    yield from opened(request, tmp_path)


@pytest.fixture(params=["memory", "file", "sealed-file"])
def large_judge(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """A store that does so for what S3 gets in parts, too. SeaweedFS checks the condition of the last call in two steps."""
    yield from opened(request, tmp_path)


@pytest.fixture(params=[kind for kind in KINDS if kind != "moto"])
def judge(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """A store that judges concurrent writes one by one. Moto checks a condition and writes in two steps, so it cannot."""
    yield from opened(request, tmp_path)


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def race(attempts: int, act: Callable[[int], object]) -> list[object]:
    """The result or the exception of each of ``attempts`` calls that begin at the same time."""
    start = threading.Barrier(attempts)

    def run(number: int) -> object:
        start.wait()
        try:
            return act(number)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(attempts) as pool:
        return list(pool.map(run, range(attempts)))


def test_what_was_put_is_what_is_got(store: ObjectStore) -> None:
    body = bytes(range(256)) * 40
    store.put("a/b.seg", body)
    assert store.get("a/b.seg") == body


def test_put_and_head_and_list_describe_the_object_alike(store: ObjectStore) -> None:
    put = store.put("a/b", b"hello")
    assert (put.key, put.size_bytes) == ("a/b", 5)
    assert put.etag
    assert store.head("a/b") == put
    assert list(store.list()) == [put]


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.put("empty", b"").size_bytes == 0
    assert store.get("empty") == b""
    assert store.get("empty", offset=-4) == b""
    assert store.get("empty", offset=0, length=4) == b""
    assert store.head("empty").size_bytes == 0
    assert keys(store) == ["empty"]


def test_an_overwrite_replaces_the_content_and_changes_the_etag(store: ObjectStore) -> None:
    before = store.put("key", b"one")
    after = store.put("key", b"two!")
    assert store.get("key") == b"two!"
    assert before.etag != after.etag
    assert store.head("key") == after


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (0, 4, b"0123"),
        (3, 4, b"3456"),
        (7, None, b"789"),
        (7, 100, b"789"),
        (9, 1, b"9"),
        (10, None, b""),
        (10, 5, b""),
        (1000, 5, b""),
        (5, 0, b""),
        (-3, None, b"789"),
        (-3, 2, b"78"),
        (-10, None, b"0123456789"),
        (-100, None, b"0123456789"),
        (-100, 3, b"012"),
    ],
)
def test_a_range_gives_the_bytes_that_are_there(
    store: ObjectStore, offset: int, length: int | None, expected: bytes
) -> None:
    store.put("digits", b"0123456789")
    assert store.get("digits", offset=offset, length=length) == expected


def test_what_is_not_there_is_missing(store: ObjectStore) -> None:
    store.put("there", b"x")
    reads: list[Callable[[], object]] = [
        lambda: store.get("gone"),
        lambda: store.get("gone", offset=5, length=5),
        lambda: store.get("gone", length=0),
        lambda: store.get("gone", offset=-5),
        lambda: store.get("the"),
        lambda: store.head("gone"),
    ]
    for read in reads:
        with pytest.raises(ObjectMissing, match="gone|the"):
            read()


def test_a_folder_of_objects_is_no_object(store: ObjectStore) -> None:
    store.put("folder/a", b"x")
    with pytest.raises(ObjectMissing):
        store.get("folder")
    with pytest.raises(ObjectMissing):
        store.head("folder")
    store.delete(["folder"])
    assert keys(store) == ["folder/a"]


def test_listing_is_in_the_order_of_keys_and_not_of_folders(store: ObjectStore) -> None:
    names = ["b", "a/b", "a-b", "a.b", "a0", "B", "a/b-c", "a/c/d", "a/c-d", "a_b", "0", "-", ".x", "..y/z", "_"]
    for name in names:
        store.put(name, name.encode())
    assert keys(store) == sorted(names)


def test_the_prefix_of_a_listing_is_a_string_and_not_a_folder(store: ObjectStore) -> None:
    for name in ["ab", "abc/d", "abc/e/f", "abd", "b"]:
        store.put(name, b"")
    assert keys(store, "abc") == ["abc/d", "abc/e/f"]
    assert keys(store, "ab") == ["ab", "abc/d", "abc/e/f", "abd"]
    assert keys(store, "abc/") == ["abc/d", "abc/e/f"]
    assert keys(store, "abc/e/f") == ["abc/e/f"]
    assert keys(store, "zzz") == []
    assert keys(store, "abc/d/") == []


def test_a_listing_of_nothing_is_empty(store: ObjectStore) -> None:
    assert keys(store) == []
    assert keys(store.sub("nothing"), "here") == []


def test_a_listing_goes_beyond_one_page(store: ObjectStore) -> None:
    count = 1005 if isinstance(store, S3Store) else 205
    names = [f"segments/{number:05d}" for number in range(count)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert keys(store, "segments/") == names
    store.delete(names)
    assert keys(store) == []


def test_delete_removes_what_is_named_and_nothing_else(store: ObjectStore) -> None:
    for name in ["a/1", "a/2", "a/3", "a/33"]:
        store.put(name, b"x")
    store.delete(["a/1", "a/3"])
    assert keys(store) == ["a/2", "a/33"]


def test_deleting_what_is_not_there_is_no_error(store: ObjectStore) -> None:
    store.delete([])
    store.delete(["never"])
    store.delete(["never", "ever/was"])
    store.put("a", b"x")
    store.delete(["a", "b", "a"])
    assert keys(store) == []


def test_a_key_can_be_used_again_after_its_deletion(store: ObjectStore) -> None:
    store.put("a/b", b"1", if_none_match=True)
    store.delete(["a/b"])
    store.put("a/b", b"2", if_none_match=True)
    assert store.get("a/b") == b"2"
    store.delete(["a/b"])
    store.put("a", b"a folder before, an object now")
    assert keys(store) == ["a"]


def test_if_none_match_keeps_what_is_there(store: ObjectStore) -> None:
    store.put("key", b"first", if_none_match=True)
    with pytest.raises(PreconditionFailed, match="key"):
        store.put("key", b"second", if_none_match=True)
    assert store.get("key") == b"first"


def test_if_match_overwrites_only_what_was_read(store: ObjectStore) -> None:
    first = store.put("key", b"first")
    second = store.put("key", b"second", if_match=first.etag)
    with pytest.raises(PreconditionFailed, match="key"):
        store.put("key", b"third", if_match=first.etag)
    assert store.get("key") == b"second"
    listed = next(store.list("key"))
    store.put("key", b"fourth", if_match=listed.etag)
    assert listed == second
    assert store.get("key") == b"fourth"


def test_if_match_on_a_missing_object_fails(store: ObjectStore) -> None:
    etag = store.put("other", b"x").etag
    with pytest.raises(PreconditionFailed, match="key"):
        store.put("key", b"x", if_match=etag)
    assert keys(store) == ["other"]


def test_of_16_who_create_a_key_one_wins(judge: ObjectStore) -> None:
    results = race(16, lambda number: judge.put("lease", b"writer %d" % number, if_none_match=True))
    winners = [number for number, result in enumerate(results) if isinstance(result, ObjectInfo)]
    assert len(winners) == 1
    assert sum(isinstance(result, PreconditionFailed) for result in results) == 15
    assert judge.get("lease") == b"writer %d" % winners[0]


def test_of_16_who_overwrite_the_same_state_one_wins(judge: ObjectStore) -> None:
    etag = judge.put("lease", b"nobody").etag
    results = race(16, lambda number: judge.put("lease", b"writer %d" % number, if_match=etag))
    winners = [number for number, result in enumerate(results) if isinstance(result, ObjectInfo)]
    assert len(winners) == 1
    assert judge.get("lease") == b"writer %d" % winners[0]


def test_sub_is_the_same_storage_below_a_prefix(store: ObjectStore) -> None:
    below = store.sub("x").sub("y/z/")
    info = below.put("key", b"v")
    store.put("x/yy", b"")
    assert info.key == "key"
    assert store.get("x/y/z/key") == b"v"
    assert keys(below) == ["key"]
    assert keys(store.sub("x/y")) == ["z/key"]
    assert below.url.split("?")[0] == store.url.split("?")[0] + "/x/y/z"
    with pytest.raises(ObjectMissing):
        store.get("key")
    below.delete(["key"])
    assert keys(store) == ["x/yy"]


def test_a_file_is_stored_as_its_content(store: ObjectStore, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(3_000_000))
    info = store.put("file", body, if_none_match=True)
    assert info.size_bytes == 3_000_000
    assert store.get("file") == body.read_bytes()
    assert store.head("file") == info
    with pytest.raises(PreconditionFailed):
        store.put("file", body, if_none_match=True)


def test_an_empty_file_is_stored(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "body").touch()
    store.put("file", tmp_path / "body")
    assert store.get("file") == b""


def test_a_file_that_is_missing_is_the_callers_failure(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing-here") as caught:
        store.put("file", tmp_path / "nothing-here")
    assert type(caught.value) is StoreError
    assert keys(store) == []


def test_a_large_file_is_stored_whole_and_under_its_condition(store: ObjectStore, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom((11 << 20) + 7))
    info = store.put("large", body, if_none_match=True)
    assert store.head("large") == info
    assert info.size_bytes == (11 << 20) + 7
    assert store.get("large") == body.read_bytes()
    assert store.get("large", offset=(5 << 20) - 3, length=6) == body.read_bytes()[(5 << 20) - 3 :][:6]
    with pytest.raises(PreconditionFailed):
        store.put("large", body, if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put("large", body, if_match="0123456789abcdef0123456789abcdef")
    assert store.head("large") == info
    body.write_bytes(os.urandom(6 << 20))
    assert store.put("large", body, if_match=info.etag).etag != info.etag
    assert store.get("large") == body.read_bytes()


def test_of_4_who_create_a_large_object_one_wins(large_judge: ObjectStore, tmp_path: Path) -> None:
    bodies = [tmp_path / f"body{number}" for number in range(4)]
    for number, body in enumerate(bodies):
        body.write_bytes(bytes([number]) * (6 << 20))
    results = race(4, lambda number: large_judge.put("large", bodies[number], if_none_match=True))
    winners = [number for number, result in enumerate(results) if isinstance(result, ObjectInfo)]
    assert len(winners) == 1
    assert large_judge.get("large") == bodies[winners[0]].read_bytes()


@pytest.mark.parametrize(
    "key", ["..a/..b", "a..", "-", ".hidden", "A/a", "a--b__c..d", "0" * 200, "/".join("abcdefgh" * 4)]
)
def test_odd_but_legal_keys_work(store: ObjectStore, key: str) -> None:
    store.put(key, b"odd", if_none_match=True)
    assert store.get(key) == b"odd"
    assert keys(store) == [key]
    store.delete([key])
    assert keys(store) == []


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/.", "a b", "é", "a\n", "a\0", "k" * 901]
)
def test_illegal_keys_are_refused(store: ObjectStore, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(key, b""),
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.delete([key]),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="key"):
            call()
    assert keys(store) == []


def test_illegal_prefixes_are_refused(store: ObjectStore) -> None:
    for prefix in ["../", "/", "a//", "a b"]:
        with pytest.raises(StoreError):
            list(store.list(prefix))
    with pytest.raises(StoreError):
        store.sub("../above")


def test_many_threads_share_one_store(store: ObjectStore) -> None:
    def work(number: int) -> bool:
        key = f"t/{number:03d}"
        store.put(key, key.encode(), if_none_match=True)
        return store.get(key) == key.encode() and store.head(key).size_bytes == len(key)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert len(keys(store, "t/")) == 64


# -- streams -----------------------------------------------------------------------------------------------------------


def stream_of(*chunks: bytes) -> Stream:
    return Stream(lambda: iter(chunks), sum(map(len, chunks)))


def test_a_stream_is_stored_as_one_object(store: ObjectStore) -> None:
    info = store.put("stream", stream_of(b"one ", b"", b"two"), if_none_match=True)
    assert (info.size_bytes, store.get("stream")) == (7, b"one two")
    with pytest.raises(PreconditionFailed):
        store.put("stream", stream_of(b"other"), if_none_match=True)
    assert store.put("empty-stream", stream_of()).size_bytes == len(store.get("empty-stream")) == 0


def test_a_stream_of_several_parts_is_stored_once_under_its_condition(store: ObjectStore) -> None:
    chunks = [os.urandom(700_001) for _ in range(17)]
    info = store.put("stream", stream_of(*chunks), if_none_match=True)
    assert info.size_bytes == sum(map(len, chunks))
    assert store.get("stream") == b"".join(chunks)
    with pytest.raises(PreconditionFailed):
        store.put("stream", stream_of(*chunks), if_none_match=True)


@pytest.mark.parametrize("pieces", [1, 17])
def test_of_a_stream_that_breaks_off_nothing_is_stored(store: ObjectStore, pieces: int) -> None:
    def broken() -> Iterator[bytes]:
        yield from (bytes(700_001) for _ in range(pieces))
        raise StateMismatch("it broke off")

    with pytest.raises(StateMismatch):
        store.put("stream", Stream(broken, 700_001 * pieces), if_none_match=True)
    assert keys(store) == []


def test_an_object_bears_the_time_that_it_was_given(store: ObjectStore, tmp_path: Path) -> None:
    store.put("then", b"x", time_ms=1_700_000_000_123, if_none_match=True)
    large = tmp_path / "large"
    large.write_bytes(bytes(6 << 20))
    store.put("large", large, time_ms=1_700_000_000_500)
    assert [store.head(key).time_ms for key in ("then", "large")] == [1_700_000_000_123, 1_700_000_000_500]
    store.put("stream", stream_of(b"x"), time_ms=1_700_000_000_777)
    store.put("large-stream", stream_of(*[bytes(1 << 20)] * 6), time_ms=1_700_000_000_999)
    assert [store.head(key).time_ms for key in ("stream", "large-stream")] == [1_700_000_000_777, 1_700_000_000_999]


def test_an_object_bears_the_time_of_its_writing_when_it_was_given_none(store: ObjectStore) -> None:
    before = time.time_ns() // 1_000_000
    store.put("now", b"x")
    listed = next(store.list("now"))
    for info in (store.head("now"), listed):
        assert info.time_ms is not None
        assert before - 1000 <= info.time_ms <= time.time_ns() // 1_000_000 + 1000, "S3 tells whole seconds"
