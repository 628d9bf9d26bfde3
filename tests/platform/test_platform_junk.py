"""Junk: whatever a client with all rights sends, the answer is one clear refusal, never a fault of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from platform_support import GUESTBOOK, OWNER, QUICK, Live

from minipaas.access import new_token, token_hash
from minipaas.model import Token
from minipaas.web import create_app, pages
from minipaas.web.sessions import Sessions

NAMES = [
    "guestbook", "nobody", "..", "%2e%2e", "%00", "a%00b", "%ff%fe", "%0a", "%ed%a0%80", "x" * 5000, "A", "-", "%20", "🙂",
]  # fmt: skip
QUERIES = [
    "", "tail=-1", "tail=%00", "tail=" + "9" * 30, "tail=" + "9" * 5000, "tail=1e9", "tail=%D9%A3", "tail=²", "at=-1",
    "at=" + "9" * 19, "at=0", "at=99999999", "follow=%ff", "tail=5&tail=6", "%ff=%ff", "a" * 8000,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, "", "x", "\0", "\ud800", "x" * 100_000, [], [[]], {}, {"": ""}, {"a": None},
    {"name": 1}, {"name": "\0"}, {"name": "x" * 5000}, {"name": "guestbook", "": 1}, {"KEY": 1}, {"KEY": "\ud800"},
    {"\0": "x"}, {"KEY": "\0"}, {"x" * 5000: "x"}, {"names": None}, {"names": [None]}, {"names": ["\0", "\ud800"]},
    {"names": "KEY"}, {"names": ["x" * 5000]}, {"names": [""]},
    {"source": None, "manifest": ""}, {"source": {"kind": "no"}, "manifest": ""},
    {"source": {"kind": "image", "ref": "\0"}, "manifest": GUESTBOOK},
    {"source": {"kind": "image", "ref": "\ud800"}, "manifest": "\ud800"},
    {"source": {"kind": "archive", "upload": "../../etc/passwd"}, "manifest": GUESTBOOK},
    {"source": {"kind": "source", "upload": "up_" + "0" * 24}, "manifest": "\0"},
    {"source": {"kind": "source"}, "manifest": GUESTBOOK, "file": "\0", "build_args": {"\0": "\0"}},
    {"source": {"kind": "source"}, "manifest": "[" * 20_000},
]  # fmt: skip
BODIES = [
    b"", b"\0", b"\xff\xfe", b"{", b'{"name": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"1e999",
    b'{"name": "a", "name": "b"}', *(json.dumps(value).encode() for value in VALUES),
]  # fmt: skip


@pytest.fixture
def client(live: Live) -> Iterator[FlaskClient]:
    app = create_app(live.platform, QUICK)
    pages.install(app, live.platform, QUICK, Sessions(live.stage.directory / "sessions.json", lambda: 1000))
    token = new_token()
    live.stage.state.replace_token(Token(name="owner", sha256=token_hash(token), abilities=("*",), created_ms=1))
    live.platform.create_app(OWNER, "guestbook")
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {token}"
    yield client


def targets(client: FlaskClient, name: str) -> list[tuple[str, str]]:
    """Method and path of every route, with that name; what destroys the app comes last."""
    found = [
        (method, re.sub("<.*?>", lambda match: name, rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods or ()
    ]
    return sorted(found, key=lambda target: (target == ("DELETE", "/v1/apps/guestbook"), target))


def fault(client: FlaskClient, method: str, path: str, body: bytes = b"", query: str = "") -> str:
    """'' when the answer is as it should be, else what was asked. Of events, only the first piece is read."""
    answer = client.open(path, method=method, data=body, query_string=query, buffered=False)
    said = next(iter(answer.response), b"") if path.endswith("events") else b"".join(answer.response)
    answer.close()
    wrong = answer.status_code >= 500 or b"internal error" in said
    return f"{method} {path[:60]} {query[:40]} {body[:80]!r}: {answer.status_code} {said[-300:]!r}" if wrong else ""


def test_no_name_is_a_fault(client: FlaskClient) -> None:
    asked = [fault(client, *target) for name in NAMES for target in targets(client, name)]
    assert [each for each in asked if each] == []


def test_no_parameter_is_a_fault(client: FlaskClient) -> None:
    asked = [fault(client, *target, query=query) for target in targets(client, "guestbook") for query in QUERIES]
    assert [each for each in asked if each] == []


def test_no_body_is_a_fault(client: FlaskClient) -> None:
    reading = [target for target in targets(client, "guestbook") if target[0] not in ("GET", "HEAD", "OPTIONS")]
    assert len(reading) >= 8
    asked = [fault(client, *target, body=body, query="at=0") for target in reading for body in BODIES]
    assert [each for each in asked if each] == []


@pytest.mark.parametrize("path", ["/v1/status", "/", "/login", "/logout", "/events"])
def test_no_header_is_a_fault(client: FlaskClient, path: str) -> None:
    for junk in (
        "",
        "Bearer",
        "Bearer \xff",
        "Bearer " + "x" * 5000,
        "Basic eDp5",
        "\xff",
        "http://[x",
        "minipaas=\xff",
    ):
        headers = {"Authorization": junk, "Cookie": junk, "Origin": junk, "Content-Type": junk}
        for method in ("GET", "POST"):
            assert client.open(path, method=method, headers=headers, data=b"a=b").status_code < 500, junk
