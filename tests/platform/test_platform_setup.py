"""What ``setup`` and ``recover`` refuse before anything is written, and what they say while somebody waits."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from minipaas import cli
from minipaas.errors import BadName, BadRequest
from minipaas.model import check_domain, check_name
from minipaas.sealing import Identity
from minipaas.settings import check_listens, listen_address, read_credentials, read_settings, write_private
from minipaas.setup import SetupRequest, disk_warning, setup
from replicator import ObjectInfo
from replicator.store.memory import MemoryStore

Run = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``setup`` or ``recover`` with options over good ones; what it says. Nothing is left behind."""
    for name in ("MINIPAAS_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MINIPAAS_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(sys, "stdin", StringIO(Identity.generate().secret))

    def run(command: str, *options: str, code: int = 2) -> str:
        usual = [
            "--bucket",
            f"file://{tmp_path}/bucket",
            "--name",
            "a",
            "--region",
            "ams",
            "--data",
            f"{tmp_path}/data",
        ]
        assert cli.run([command, *usual, "--run", f"{tmp_path}/run", *options]) == code
        assert not (tmp_path / "data").exists()
        out, err = capsys.readouterr()
        return out + err

    return run


@pytest.mark.parametrize("command", ["setup", "recover"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bucket", "memory://x"), "Error: memory://x ends with the process, and everything in it"),
        (("--http", "0.0.0.0:80", "--api", "127.0.0.1:80"), "http_listen and api_listen are the same port, 80"),
        (("--api", "127.0.0.1:0"), "--api 127.0.0.1:0: there is no port 0"),
        (("--api", "127.0.0.1:70000"), "api_listen '127.0.0.1:70000': there is no port 70000"),
        (("--api", "foo"), "api_listen 'foo' is not an address; write HOST:PORT"),
        (("--domain", "https://Apps.Example.com:443/"), "is not a domain for apps; did you mean apps.example.com?"),
        (("--region", "Ams Terdam"), "is not a name for a region"),
    ],
)
def test_what_cannot_work_is_refused_on_one_line(
    refused: Run, command: str, options: tuple[str, ...], words: str
) -> None:
    said = refused(command, *options)
    assert words in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ["setup", "recover"])
@pytest.mark.slow
def test_a_bucket_that_cannot_be_reached_is_named_soon_with_its_endpoint(
    refused: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("MINIPAAS_ACCESS_KEY", "x")
        monkeypatch.setenv("MINIPAAS_SECRET_KEY", "x")
        began = time.monotonic()
        said = refused(command, "--bucket", f"s3://b/f?endpoint={endpoint}", code=1)
        assert time.monotonic() - began < 10
    first, last = said.splitlines()[0], said.splitlines()[-1]
    assert first == f"reaching s3://b/f?endpoint={endpoint}"
    assert f"s3://b/f?endpoint={endpoint} cannot be reached: " in last
    assert "check the endpoint in --bucket, and that this host gets there; nothing was changed" in last


def test_without_keys_every_place_for_them_is_named(refused: Run) -> None:
    said = refused("setup", "--bucket", "s3://b/f?endpoint=http://127.0.0.1:1", code=1)
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "~/.aws/credentials",
        "MINIPAAS_ACCESS_KEY",
        "MINIPAAS_SECRET_KEY",
    ):
        assert name in said


def test_temporary_keys_are_left_to_boto3_and_never_kept(tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    assert read_credentials(tmp_path, keys) is not None
    assert read_credentials(tmp_path, {**keys, "AWS_SESSION_TOKEN": "c"}) is None


# -- a bucket that is lost with the node


def test_a_folder_on_the_same_disk_is_warned_of_and_one_within_the_node_refused(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert "who loses that disk loses both" in disk_warning(f"file://{tmp_path}/bucket", data_dir)
    assert disk_warning("file:///dev/shm/bucket", data_dir) == ""
    assert disk_warning("s3://bucket/fleet", data_dir) == ""
    with pytest.raises(BadRequest, match="name a folder on another disk"):
        disk_warning(f"file://{data_dir}/bucket", data_dir)


# -- a bucket that does not keep its word


def request_for(directory: Path) -> SetupRequest:
    return SetupRequest(
        data_dir=directory / "data",
        run_dir=directory,
        bucket="s3://b",
        node="a",
        region="ams",
        api_listen="127.0.0.1:0",
    )


class Forgetful:
    """A store that takes no notice of one condition."""

    def __init__(self, ignored: str) -> None:
        self._inner, self._ignored = MemoryStore(), ignored
        self.url = "s3://forgetful"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, body: bytes | Path, **conditions: Any) -> ObjectInfo:
        conditions.pop(self._ignored, None)
        return self._inner.put(key, body, **conditions)


@pytest.mark.parametrize(("ignored", "named"), [("if_none_match", "If-None-Match"), ("if_match", "If-Match")])
def test_a_store_that_ignores_a_condition_is_refused_by_its_name(tmp_path: Path, ignored: str, named: str) -> None:
    bucket = Forgetful(ignored)
    with pytest.raises(BadRequest, match=f"s3://forgetful ignores {named},"):
        setup(request_for(tmp_path), bucket, 1000)
    assert list(bucket.list()) == []
    assert not (tmp_path / "data").exists()


# -- files of a node


def test_a_file_that_several_write_at_once_holds_what_one_of_them_wrote(tmp_path: Path) -> None:
    path = tmp_path / "private"
    texts = [letter * 1000 for letter in "abc"]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: [write_private(path, text) for _ in range(30)], texts))
    assert path.read_text() in texts
    assert [each.name for each in tmp_path.iterdir()] == ["private"]
    assert (path.stat().st_mode & 0o777) == 0o600


# -- names and addresses


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Apps.Example.com", "did you mean apps.example.com?"),
        ("apps.example.com.", "did you mean apps.example.com?"),
        ("http://apps.example.com/x", "did you mean apps.example.com?"),
        ("apps.example.com:443", "did you mean apps.example.com?"),
        ("bücher.example", "did you mean xn--bcher-kva.example?"),
        ("apps example.com", "write a bare name such as"),
        ("*.example.com", "write a bare name such as"),
        ("-a.example", "write a bare name such as"),
        ("a..b", "write a bare name such as"),
        ("203.0.113.7", "write a bare name such as"),
        ("", "write a bare name such as"),
        ("a\nb", "write a bare name such as"),
        (".".join(["a" * 63] * 3), "write a bare name such as"),
    ],
)
def test_what_is_no_domain_is_refused_with_what_was_meant(text: str, hint: str) -> None:
    with pytest.raises(BadName) as error:
        check_domain(text)
    assert hint in str(error.value)


@pytest.mark.parametrize("text", ["localhost", "example.com", "xn--bcher-kva.example", "a.203.example"])
def test_domains_are_taken_as_they_are(text: str) -> None:
    assert check_domain(text) == text


def test_no_app_takes_the_name_of_the_host_itself() -> None:
    with pytest.raises(BadName, match="is reserved"):
        check_name("localhost")


@pytest.mark.parametrize("text", ["h:", ":80", "a b:80", "h:-1", "h:99999", "h:١", "[::1:80", "h\n:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        listen_address(text, "http_listen")


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("0.0.0.0:80", "127.0.0.1:80", True),
        ("[::1]:80", "[::]:80", True),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("0.0.0.0:80", "0.0.0.0:81", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
    ],
)
def test_two_addresses_clash_when_they_are_one_port(first: str, second: str, clash: bool) -> None:
    if not clash:
        return check_listens(http_listen=first, api_listen=second)
    with pytest.raises(BadRequest, match="http_listen and api_listen are the same port"):
        check_listens(http_listen=first, api_listen=second)
    return None


def test_a_node_toml_that_was_edited_is_checked_alike(tmp_path: Path) -> None:
    setup(replace(request_for(tmp_path), domain="apps.test"), MemoryStore(), 1000)
    path = tmp_path / "data" / "node.toml"
    path.write_text(path.read_text().replace("apps.test", "Apps Test"))
    with pytest.raises(BadRequest, match=r"node.toml: 'Apps Test' is not a domain"):
        read_settings(tmp_path / "data")
