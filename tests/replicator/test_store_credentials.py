"""Credentials that expire: said in one clear line, and taken anew from where they come from, without a restart."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import apsw
import pytest
from ledger_support import wait_for

from replicator.errors import StoreDenied, StoreUnavailable
from replicator.service import Replicator
from replicator.store.s3 import S3Access, S3Store
from replicator.worker import Protection

_places = count()


class Bucket(ThreadingHTTPServer):
    """Keeps what is put there by those who have the key that is ``valid``; to others their token has expired."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.valid = "AKIDNEW"
        self.objects: dict[str, bytes] = {}
        self.requests = 0

    def store(self, **given: str) -> S3Store:
        """Of a region of its own, since clients are kept for each."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return S3Store("bucket", "", S3Access(endpoint=endpoint, region=f"place-{next(_places)}", **given))


class _Answer(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def _do(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
        path, _, query = self.path.partition("?")
        if key is None or key[1] != self.server.valid:
            self._send(
                400, b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            )
        elif self.command == "PUT":
            self.server.objects[path] = body
            self._send(200, b"")
        elif "list-type" in query:
            self._send(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        elif path in self.server.objects:
            self._send(200, self.server.objects[path])
        else:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_GET = do_PUT = _do

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"etag"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    found = Bucket()
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's AWS files; nothing else of the environment gives credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


def write_keys(home: Path, key: str) -> None:
    (home / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n"
    )


def write_process(home: Path, key: str, expires: datetime) -> None:
    """A program that gives these."""
    answer = {
        "Version": 1,
        "AccessKeyId": key,
        "SecretAccessKey": "s",
        "SessionToken": "t",
        "Expiration": expires.isoformat(),
    }
    (home / "answer.json").write_text(json.dumps(answer))
    (home / "config").write_text(f"[default]\ncredential_process = /bin/cat {home}/answer.json\n")


def test_keys_of_a_file_that_expired_are_read_again_at_the_next_try(bucket: Bucket, home: Path) -> None:
    write_keys(home, "AKIDOLD")
    store = bucket.store()
    with pytest.raises(
        StoreDenied, match="ExpiredToken.*: the credentials have expired; renew them where they come from"
    ):
        store.put("a", b"1")
    write_keys(home, "AKIDNEW")
    store.put("a", b"1")
    assert bucket.objects == {"/bucket/a": b"1"}


def test_keys_that_are_given_later_are_found(bucket: Bucket, home: Path) -> None:
    store = bucket.store()
    with pytest.raises(StoreDenied, match="no access keys"):
        store.put("a", b"1")
    write_keys(home, "AKIDNEW")
    store.put("a", b"1")


def test_keys_of_the_configuration_are_not_looked_for_elsewhere(bucket: Bucket, home: Path) -> None:
    write_keys(home, "AKIDNEW")
    store = bucket.store(access_key="AKIDOLD", secret_key="s")
    for _ in range(2):
        with pytest.raises(StoreDenied, match="the credentials have expired"):
            store.put("a", b"1")


def test_credentials_that_bear_an_end_are_renewed_before_it(bucket: Bucket, home: Path) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=8)  # within the time in which boto3 renews
    write_process(home, "AKIDNEW", soon)
    store = bucket.store()
    store.put("a", b"1")
    bucket.valid = "AKIDNEXT"
    write_process(home, "AKIDNEXT", soon)
    store.put("b", b"2")
    assert len(bucket.objects) == 2


def test_a_source_that_gives_only_expired_ones_is_named(bucket: Bucket, home: Path) -> None:
    write_process(home, "AKIDOLD", datetime.now(UTC) - timedelta(hours=1))
    store = bucket.store()
    with pytest.raises(StoreDenied, match="their source gives none that are valid; renew them there"):
        store.put("a", b"1")
    write_process(home, "AKIDNEW", datetime.now(UTC) + timedelta(hours=1))
    store.put("a", b"1")


def test_a_source_that_fails_is_named(bucket: Bucket, home: Path) -> None:
    (home / "config").write_text("[default]\ncredential_process = /bin/false\n")
    with pytest.raises(StoreUnavailable, match="the credentials could not be had from their source"):
        bucket.store().put("a", b"1")


def test_expired_credentials_show_soon_after_a_commit_cost_nothing_before_and_are_outlived(
    bucket: Bucket, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_keys(home, "AKIDNEW")
    path = home / "app.db"
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode=wal; CREATE TABLE t(v)").fetchall()
    replicator = Replicator(sweep_s=3600)
    replicator.start()
    try:
        replicator.add(path, bucket.store())
        replicator.sync(path, 20)
        bucket.valid, before = "AKIDNEXT", bucket.requests
        assert replicator.status()[0].protection is Protection.PROTECTED
        assert bucket.requests == before  # nothing asks while nothing is committed
        connection.execute("INSERT INTO t VALUES (1)")
        began = time.monotonic()
        wait_for(lambda: replicator.status()[0].protection is Protection.NOT_PROTECTED)
        assert time.monotonic() - began < 5
        assert "the credentials have expired" in replicator.status()[0].reason
        (said,) = [record for record in caplog.records if "uploads stand still" in record.message]
        assert said.levelname == "ERROR"
        write_keys(home, "AKIDNEXT")
        replicator.sync(path, 20)
        assert replicator.status()[0].protection is Protection.PROTECTED
    finally:
        replicator.stop(5)
        connection.close()
