"""The command ``minipaas`` as a user has it: its arguments, its words and its exit codes, against a server with fakes behind it."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from platform_support import GUESTBOOK, OWNER, QUICK, SITE, Live
from rich.console import Console
from werkzeug.serving import make_server

from minipaas import cli
from minipaas.access import new_token, token_hash
from minipaas.cli import text
from minipaas.engine.fake import make_image
from minipaas.model import Token
from minipaas.service import DeployRequest
from minipaas.sources import Source
from minipaas.web import create_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class Terminal:
    """Runs commands in this process; ``out`` and ``err`` hold what the last one said."""

    def __init__(self, live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.live, self._capsys, self._monkeypatch = live, capsys, monkeypatch
        self.out = self.err = ""
        self.changing = threading.Event()

    def watched(self, app: WSGIApplication) -> WSGIApplication:
        """Sets ``changing`` when a request that changes something has reached the server."""

        def called(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != "GET":
                self.changing.set()
            return app(environ, start_response)

        return called

    def run(self, *arguments: str, stdin: str = "", code: int = 0) -> None:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        found = cli.run(arguments)
        self.out, self.err = self._capsys.readouterr()
        assert found == code, self.err

    def refused(self, *arguments: str, stdin: str = "", code: int = 2) -> str:
        """The one line that it says."""
        self.run(*arguments, stdin=stdin, code=code)
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.err
        return lines[0]

    def deploy(self, manifest: str, app: str) -> None:
        self.live.stage.engine.images.remote[app] = make_image([bytes(1024)])
        self.live.platform.deploy(OWNER, app, DeployRequest(Source(kind="image", ref=app), manifest))


@pytest.fixture
def terminal(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Terminal]:
    token = new_token()
    live.stage.state.replace_token(Token(name="owner", sha256=token_hash(token), abilities=("*",), created_ms=1))
    terminal = Terminal(live, capsys, monkeypatch)
    server = make_server("127.0.0.1", 0, terminal.watched(create_app(live.platform, QUICK)), threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MINIPAAS_API", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MINIPAAS_TOKEN", token)
    yield terminal
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def interrupted_after(event: threading.Event) -> Iterator[None]:
    """Ctrl-C for the main thread, and again while nothing comes of it: one that arrives just before a system call is not noticed."""
    main, ended = threading.main_thread().ident, threading.Event()
    assert main is not None

    def press() -> None:
        event.wait(10.0)
        while not ended.is_set():
            signal.pthread_kill(main, signal.SIGINT)
            ended.wait(1.0)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have it ignored
    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


# -- secrets


@pytest.mark.parametrize("stdin", ["", "\n"])
@pytest.mark.parametrize("argument", ["KEY", "KEY=-"])
def test_a_failed_pipe_sets_no_secret(terminal: Terminal, argument: str, stdin: str) -> None:
    terminal.run("apps", "create", "guestbook")
    words = terminal.refused("secrets", "set", argument, "-a", "guestbook", stdin=stdin)
    assert "nothing came on standard input for KEY, so nothing was set" in words
    assert terminal.live.platform.secrets(OWNER, "guestbook") == {}


def test_an_empty_secret_has_to_be_meant(terminal: Terminal) -> None:
    terminal.run("apps", "create", "guestbook")
    terminal.run("secrets", "set", "EMPTY=", "PIPED", "-a", "guestbook", stdin="two\nlines\n")
    assert terminal.out == "2 set; the first release will run with them\n"
    state, sealer = terminal.live.stage.state, terminal.live.stage.sealer
    assert {name: sealer.unseal(each) for name, each in state.secrets("guestbook").items()} == {
        "EMPTY": "",
        "PIPED": "two\nlines",
    }


def test_standard_input_holds_one_value(terminal: Terminal) -> None:
    assert "for A or for B" in terminal.refused("secrets", "set", "A", "B", "-a", "guestbook", stdin="x")
    assert "named twice" in terminal.refused("secrets", "set", "A=1", "A=2", "-a", "guestbook")


# -- interrupted


@pytest.mark.parametrize(
    ("command", "change"),
    [(("restart", "site"), "the restart of site"), (("secrets", "set", "A=1", "-a", "site"), "the change of site's")],
)
def test_who_interrupts_a_change_is_told_that_it_goes_on(
    terminal: Terminal, command: tuple[str, ...], change: str
) -> None:
    terminal.deploy(SITE, "site")
    live = terminal.live
    with live.platform._turns.take("site", "a test", lambda holder: None, 30.0):
        with interrupted_after(terminal.changing):
            words = terminal.refused(*command, code=130)
    assert change in words
    assert words.endswith("goes on at the node; look with: minipaas status site")


def test_a_deploy_that_is_interrupted_says_that_it_goes_on(terminal: Terminal) -> None:
    terminal.deploy(SITE, "site")
    with terminal.live.platform._turns.take("site", "a test", lambda holder: None, 30.0):
        with interrupted_after(terminal.changing):
            terminal.run("deploy", "--image", "site", "-a", "site", code=130)
    assert "the deploy may be recorded by now and then goes on at the node" in terminal.err


# -- which app, which node


def test_a_deploy_without_a_file_keeps_the_configuration_and_the_volume(terminal: Terminal) -> None:
    terminal.deploy(GUESTBOOK, "guestbook")
    terminal.run("deploy", "--image", "guestbook", "-a", "guestbook")
    assert "configured as v1" in terminal.out
    first, second = (json.loads(release.config) for release in terminal.live.stage.state.releases("guestbook"))
    assert first == second


def test_a_first_deploy_without_a_file_says_what_the_app_gets(terminal: Terminal) -> None:
    terminal.live.stage.engine.images.remote["site"] = make_image([bytes(1024)])
    terminal.run("deploy", "--image", "site", "-a", "site")
    assert "is to listen on $PORT, and has no volume" in terminal.err


@pytest.mark.parametrize("command", ["logs", "restart", "secrets", "releases"])
def test_without_an_app_and_without_a_file_one_line_says_so(terminal: Terminal, command: str) -> None:
    words = terminal.refused(command)
    assert words == "Error: which app? say its name, or --app NAME; there is no minipaas.toml here"


def test_a_deploy_without_an_app_and_a_file_says_how_to_write_one(terminal: Terminal) -> None:
    assert "has neither minipaas.toml nor fly.toml" in terminal.refused("deploy")


@pytest.mark.parametrize("url", ["foo", "127.0.0.1:7070", "ftp://host", "http://", "http://host:99999"])
def test_an_api_that_is_no_url_is_named(terminal: Terminal, url: str) -> None:
    words = terminal.refused("apps", "--api", url)
    assert words == f"Error: --api (or MINIPAAS_API) {url!r} is not the URL of a node; write http://HOST:PORT"


# -- what reaches the terminal


def test_nothing_that_a_terminal_obeys_gets_out_of_names_and_errors(terminal: Terminal) -> None:
    assert "\x1b" not in terminal.refused("status", "x\x1b[31m", code=1)


def test_a_terminal_gets_colours_of_an_app_and_no_other_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "\x1b[31mred\x1b[0m\t\x1b]0;title\x07\rx"
    assert text.output_of_app(line) == line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert text.output_of_app(line) == "\x1b[31mred\x1b[0m\t\\x1b]0;title\\x07\\rx"


def test_a_table_that_is_too_wide_for_the_terminal_is_shown_one_below_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("guestbook", "/var/lib/app.db", "protected"), ("site", "", "failed")]
    text.table(("APP", "DATABASE", "STATE"), rows, "none")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["APP", "DATABASE", "STATE"],
        ["guestbook", "/var/lib/app.db", "protected"],
        ["site", "failed"],
    ]
    monkeypatch.setattr(text, "console", Console(width=20))
    text.table(("APP", "DATABASE", "STATE"), rows, "none")
    assert capsys.readouterr().out.splitlines() == [
        "APP       guestbook",
        "DATABASE  /var/lib/app.db",
        "STATE     protected",
        "",
        "APP       site",
        "STATE     failed",
        "",
    ]
