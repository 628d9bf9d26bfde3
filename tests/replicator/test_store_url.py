"""Store URLs: what they mean, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.faultproxy import FaultProxy

from replicator.errors import StoreUnavailable, UsageError
from replicator.store import open_store
from replicator.store.measure import Meter


def opened_url(url: str) -> str:
    return open_store(url, access_key="k", secret_key="s").url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a%2Db", "s3://bucket/a-b"),
        ("s3://b/p?endpoint=http://127.0.0.1:8333&region=eu-1", "s3://b/p?endpoint=http://127.0.0.1:8333"),
        ("s3://b/p?endpoint=http%3A%2F%2Flocalhost%3A9000%2F", "s3://b/p?endpoint=http://localhost:9000"),
        ("s3://b/p?endpoint=s3.example.com", "s3://b/p?endpoint=https://s3.example.com"),
        ("s3://b/p?endpoint=nas:9000&forcePathStyle=true", "s3://b/p?endpoint=https://nas:9000"),
        ("s3://b/p?endpoint=https://x.example/storage/v1/s3", "s3://b/p?endpoint=https://x.example/storage/v1/s3"),
        ("s3://b/p?region=eu-1&force-path-style=false&max-connections=4", "s3://b/p"),
        ("file:///srv/backup/", "file:///srv/backup"),
        ("file:///srv/my%20backup", "file:///srv/my backup"),
        ("file://localhost/srv", "file:///srv"),
        ("memory://url-test/a/b", "memory://url-test/a/b"),
    ],
)
def test_urls_that_name_a_store(url: str, expected: str) -> None:
    assert opened_url(url) == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "not the URL of a store"),
        ("/srv/backup", "not the URL of a store"),
        ("gs://bucket/x", "'gs://bucket/x' is not the URL"),
        ("s3:///prefix", "s3://BUCKET/PREFIX"),
        ("s3://bucket/a/../b", "'a/../b' is no object key"),
        ("s3://bucket/a b", "'a b' is no object key"),
        ("s3://bucket/x?endpont=h", "unknown key 'endpont'.*did you mean endpoint"),
        ("s3://bucket/x?qqqq=1", "unknown key 'qqqq'.*known are: endpoint"),
        ("s3://bucket/x?region=a&region=b", "'region' is twice"),
        ("s3://bucket/x?force-path-style=perhaps", "force-path-style=perhaps"),
        ("s3://bucket/x?max-connections=0", "max-connections=0"),
        ("s3://bucket/x?endpoint=ftp://host", "the endpoint"),
        ("s3://bucket/x?endpoint=http://", "the endpoint"),
        ("s3://bucket/x?endpoint=http://host:99999", "the endpoint"),
        ("s3://bucket/x#part", "%23"),
        ("file://folder/x", "three slashes"),
        ("file:///", "not the root"),
        ("file:///srv/../etc", r"without \.\."),
        ("file:///srv?region=x", "unknown key 'region'"),
        ("memory://", "memory://NAME"),
        ("s3://[bad/x", "malformed"),
    ],
)
def test_what_is_no_store_is_refused_by_name(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        opened_url(url)


@pytest.mark.parametrize("url", ["s3://AKID:hush@bucket/x", "s3://b/x?endpoint=http://AKID:hush@host:9000"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="credentials in it") as caught:
        opened_url(url)
    assert "hush" not in str(caught.value)


def test_half_of_the_credentials_is_refused() -> None:
    with pytest.raises(UsageError, match="without a secret key"):
        open_store("s3://bucket/x", access_key="k")
    with pytest.raises(UsageError, match="without an access key"):
        open_store("s3://bucket/x", secret_key="s")


def test_a_memory_store_is_the_same_in_the_whole_process() -> None:
    open_store("memory://shared/a").put("b", b"x")
    assert open_store("memory://shared").get("a/b") == b"x"


def test_a_folder_is_made_when_something_is_stored(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/new/folder")
    assert list(store.list()) == []
    assert not (tmp_path / "new").exists()
    store.put("a/b", b"x")
    assert (tmp_path / "new/folder/a/b").read_bytes() == b"x"


def test_each_attempt_is_counted_and_the_budget_holds() -> None:
    meter = Meter()
    with FaultProxy("http://127.0.0.1:9") as proxy:
        url = f"s3://bucket/x?endpoint={proxy.endpoint}"
        proxy.answer(503, times=2)
        proxy.answer(200)
        open_store(url, access_key="k", secret_key="s", meter=meter).put("key", b"x")
        proxy.answer(503, times=None)
        with pytest.raises(StoreUnavailable):
            open_store(url, access_key="k", secret_key="s", meter=meter, retry_budget_s=0).put("key", b"x")
    assert [(m.outcome, m.requests) for m in meter.snapshot()] == [("ok", 1), ("unavailable", 3)]


def test_a_store_that_is_not_s3_does_not_load_boto3() -> None:
    program = "import sys; from replicator.store import open_store; open_store('file:///srv/x'); print('boto3' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "False\n"
