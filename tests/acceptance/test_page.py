"""The page, as a person sees it: a real browser, a real node."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.node import Node

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


def test_the_page_shows_apps_and_databases_and_follows_what_happens(node: Node, browser: Browser) -> None:
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
    expect(page.locator("#safety")).to_have_text("All 2 databases protected", timeout=20_000)
    expect(page.locator("#apps article")).to_contain_text("guestbook")
    expect(page.locator("#apps article")).to_contain_text("started")
    row = page.locator("#databases tr", has_text="guestbook.db")
    position = row.locator("code")
    expect(row).to_contain_text("ago")
    before = position.text_content()
    assert node.request("POST", "/", json.dumps({"name": "a", "message": "b"}).encode())[0] == 200
    expect(position).not_to_have_text(str(before), timeout=10_000)

    node.done("destroy", "guestbook", "-y")
    expect(page.locator("#apps article")).to_contain_text("kept until", timeout=10_000)
    assert complaints == []
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.context.request.get(f"http://127.0.0.1:{node.api}/events").status == 401


def test_what_apps_say_is_never_taken_for_markup(node: Node, browser: Browser) -> None:
    evil = node.root / "evil"
    evil.mkdir()
    (evil / "Containerfile").write_text(
        'FROM localhost/minipaas/debian-python:bookworm\nCMD ["sh", "-c", "echo \\"<img src=x onerror=alert(1)>\\"; exit 3"]\n'
    )
    (evil / "minipaas.toml").write_text('app = "evil"\n[http_service]\ninternal_port = 8080\n')
    assert node.command("deploy", str(evil)).returncode == 1
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"http://127.0.0.1:{node.api}/login")
    page.get_by_label("Token").fill((node.data / "token").read_text().strip())
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#apps article")).to_contain_text("evil")
    assert dialogs == []
    assert page.locator("img").count() == 0
