"""The page: signing in and out, and what an old cookie is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from platform_support import QUICK, Live

from minipaas.access import new_token, token_hash
from minipaas.errors import Unavailable
from minipaas.model import Token
from minipaas.web import create_app, pages
from minipaas.web.sessions import MAX_SESSIONS, SESSION_DAYS, Sessions

HASH = token_hash("mp_x")


class Browser:
    """At a page of a running platform. open(): another one, which knows nothing."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.sessions = Sessions(live.stage.directory / "sessions.json", lambda: live.stage.now_ms)
        app = create_app(live.platform, QUICK)
        pages.install(app, live.platform, QUICK, self.sessions)
        self.open: Callable[[], FlaskClient] = app.test_client
        self.client = self.open()
        self.token = new_token()
        self.give(self.token)

    def give(self, token: str) -> None:
        self.live.stage.state.replace_token(
            Token(name="owner", sha256=token_hash(token), abilities=("*",), created_ms=1)
        )

    def sign_in(self) -> str:
        """The cookie."""
        assert self.client.post("/login", data={"token": self.token}).status_code == 302
        cookie = self.client.get_cookie("minipaas")
        assert cookie is not None
        assert (cookie.http_only, cookie.same_site) == (True, "Strict")
        return cookie.value

    def status_with(self, cookie: str) -> int:
        """Of the page, for somebody who shows only this: 200, or 302 to the login."""
        client = self.open()
        client.set_cookie("minipaas", cookie)
        return client.get("/").status_code


@pytest.fixture
def browser(live: Live) -> Iterator[Browser]:
    yield Browser(live)


def test_who_signs_in_sees_the_page(browser: Browser) -> None:
    assert browser.client.get("/").status_code == 302
    browser.sign_in()
    assert browser.client.get("/").status_code == 200


def test_a_wrong_token_signs_nobody_in(browser: Browser) -> None:
    for token in ("mp_wrong", "", "\0", "ü" * 600):
        assert browser.client.post("/login", data={"token": token}).status_code == 401
    assert browser.client.get_cookie("minipaas") is None


def test_after_signing_out_an_old_cookie_is_worth_nothing(browser: Browser) -> None:
    cookie = browser.sign_in()
    assert browser.status_with(cookie) == 200
    assert browser.client.post("/logout").status_code == 302
    assert browser.status_with(cookie) == 302


def test_signing_out_ends_what_another_tab_follows(browser: Browser) -> None:
    browser.sign_in()
    stream = browser.client.get("/events", buffered=False)
    next(stream.response)  # type: ignore[call-overload]
    browser.client.post("/logout")
    assert not list(stream.response)


def test_signing_in_again_ends_the_session_before(browser: Browser) -> None:
    first = browser.sign_in()
    second = browser.sign_in()
    assert (browser.status_with(first), browser.status_with(second)) == (302, 200)


def test_a_token_that_is_replaced_ends_its_sessions(browser: Browser) -> None:
    cookie = browser.sign_in()
    browser.give(new_token())
    assert browser.status_with(cookie) == 302


def test_another_site_signs_nobody_in_or_out(browser: Browser) -> None:
    cookie = browser.sign_in()
    evil = {"Origin": "http://evil.example"}
    assert browser.client.post("/login", data={"token": browser.token}, headers=evil).status_code == 403
    browser.client.post("/logout", headers=evil)
    assert browser.status_with(cookie) == 200


@pytest.mark.parametrize("cookie", ["", "x", "ü", "\x7f" * 500])
def test_cookies_that_are_none_are_nobody(browser: Browser, cookie: str) -> None:
    assert browser.status_with(cookie) == 302


def test_sessions_outlive_a_restart_and_are_kept_as_hashes(tmp_path: Path) -> None:
    path = tmp_path / "sessions.json"
    sessions = Sessions(path, lambda: 1000)
    shown, ended = sessions.begin(HASH), sessions.begin(HASH)
    sessions.end(ended)
    assert (Sessions(path, lambda: 2000).token(shown), Sessions(path, lambda: 2000).token(ended)) == (HASH, "")
    assert shown not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_session_ends_by_itself(tmp_path: Path) -> None:
    now = [0]
    sessions = Sessions(tmp_path / "sessions.json", lambda: now[0])
    shown = sessions.begin(HASH)
    now[0] = SESSION_DAYS * 86_400_000
    assert sessions.token(shown) == ""


def test_the_oldest_of_too_many_sessions_ends(tmp_path: Path) -> None:
    now = [0]
    sessions = Sessions(tmp_path / "sessions.json", lambda: now[0])
    shown = []
    for now[0] in range(MAX_SESSIONS + 1):
        shown.append(sessions.begin(HASH))
    assert [sessions.token(each) for each in shown] == ["", *[HASH] * MAX_SESSIONS]


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[]", "\xff"])
def test_a_file_that_makes_no_sense_signs_all_out(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sessions.json"
    path.write_text(content, encoding="latin-1")
    sessions = Sessions(path, lambda: 0)
    assert sessions.token(sessions.begin(HASH)) == HASH


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "gone" / "sessions.json", lambda: 0)
    with pytest.raises(Unavailable, match="cannot be written"):
        sessions.begin(HASH)
