"""The page, as a person sees it: a real browser, a real node."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.node import Node

from images.make_base import TAG as BASE_TAG

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET)
        yield browser
        browser.close()


def complaints_of(page: Page) -> list[str]:
    """Errors that the browser's console shows, filled as they come."""
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


def test_the_page_shows_apps_and_databases_and_follows_what_happens(shared_node: Node, browser: Browser) -> None:
    node = shared_node
    assert node.deploy().returncode == 0
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"http://127.0.0.1:{node.api}/")
    expect(page).to_have_url(f"http://127.0.0.1:{node.api}/login")
    page.get_by_label("Token").fill("mp_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not known")

    complaints = complaints_of(page)
    page.get_by_label("Token").fill((node.data / "token").read_text().strip())
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("status")).to_have_text("live")
    expect(page.locator("#safety")).to_have_text(re.compile(r"All \d databases protected"), timeout=20_000)
    expect(page.locator("#apps article", has_text="guestbook")).to_have_count(1)
    expect(page.locator("#apps article", has_text="guestbook")).to_contain_text("started")
    row = page.locator("#databases tr", has_text="guestbook.db")
    position = row.locator("code")
    expect(row).to_contain_text("ago")
    before = position.text_content()
    assert node.request("POST", "/", json.dumps({"name": "a", "message": "b"}).encode())[0] == 200
    expect(position).not_to_have_text(str(before), timeout=10_000)

    node.done("destroy", "guestbook", "-y")
    expect(page.locator("#apps article", has_text="guestbook")).to_contain_text("kept until", timeout=10_000)
    assert complaints == []
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.context.request.get(f"http://127.0.0.1:{node.api}/events").status == 401


MARKUP = "<img src=x onerror=alert(1)>"
EVIL = f"""
import http.server, sqlite3
sqlite3.connect("/data/{MARKUP}.db").execute("CREATE TABLE t (n)")
print("{MARKUP}", flush=True)
http.server.test(http.server.SimpleHTTPRequestHandler, port=8080)
"""


def test_what_apps_say_is_never_taken_for_markup(shared_node: Node, browser: Browser) -> None:
    node = shared_node
    evil = node.root / "evil"
    evil.mkdir()
    (evil / "evil.py").write_text(EVIL)
    (evil / "Containerfile").write_text(f'FROM {BASE_TAG}\nCOPY evil.py /\nCMD ["python3", "/evil.py"]\n')
    (evil / "minipaas.toml").write_text(
        'app = "evil"\n[http_service]\ninternal_port = 8080\n[[mounts]]\nsource = "data"\ndestination = "/data"\n'
    )
    node.done("deploy", str(evil))
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"http://127.0.0.1:{node.api}/login")
    page.get_by_label("Token").fill((node.data / "token").read_text().strip())
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#databases")).to_contain_text(f"{MARKUP}.db", timeout=20_000)
    assert dialogs == []
    assert page.locator("img").count() == 0
