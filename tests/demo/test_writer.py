"""The ledger holds what the app acknowledged and nothing else, and the load keeps its schedule when answers are slow."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from demo.lab import wait_until
from demo.writer import Writer, get_json

HOSTNAME = "guestbook.demo.test"


class App(ThreadingHTTPServer):
    """Commits entries to a list; refuses every ``refuse_every``-th."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.entries: list[str] = []
        self.requests = 0
        self.connections = 0
        self.refuse_every = 0
        self.delay_s = 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: App

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["message"]
        time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.requests += 1
            refused = self.server.refuse_every and self.server.requests % self.server.refuse_every == 0
            if not refused:
                self.server.entries.append(text)
            row_id = len(self.server.entries)
        if refused or self.headers["Host"] != HOSTNAME:
            self._answer(503, b"{}")
        else:
            self._answer(200, json.dumps({"id": row_id}).encode())

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/check" else 404, b'{"integrity": "ok"}')

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def app() -> Iterator[App]:
    with App() as app:
        thread = threading.Thread(target=app.serve_forever, args=(0.01,))
        thread.start()
        yield app
        app.shutdown()
        thread.join()


def test_every_acknowledged_row_is_in_the_ledger_with_its_id_and_text(app: App) -> None:
    writer = Writer("127.0.0.1", app.server_port, HOSTNAME, rate=500)
    writer.start()
    assert wait_until(lambda: writer.count >= 50, 10)
    ledger = writer.stop()
    assert ledger.unanswered == frozenset()
    assert sorted((row.id, row.text) for row in ledger.acknowledged) == list(enumerate(app.entries, 1))
    assert app.connections <= 4


def test_a_refused_row_is_unanswered_and_the_load_goes_on(app: App) -> None:
    app.refuse_every = 10
    writer = Writer("127.0.0.1", app.server_port, HOSTNAME, rate=500)
    writer.start()
    assert wait_until(lambda: writer.count >= 50, 10)
    ledger = writer.stop()
    assert len(ledger.unanswered) == app.requests // 10
    assert {row.text for row in ledger.acknowledged} == set(app.entries)


def test_slow_answers_do_not_slow_the_schedule_down(app: App) -> None:
    app.delay_s = 0.06
    writer = Writer("127.0.0.1", app.server_port, HOSTNAME, rate=50)
    started_s = time.monotonic()
    writer.start()
    assert wait_until(lambda: writer.count >= 40, 10)
    writer.stop()
    assert 0.75 < time.monotonic() - started_s < 1.6


def test_an_app_that_is_gone_leaves_only_unanswered_rows(app: App) -> None:
    port = app.server_port
    app.server_close()
    writer = Writer("127.0.0.1", port, HOSTNAME, rate=500)
    writer.start()
    assert wait_until(lambda: len(writer.ledger().unanswered) >= 20, 10)
    assert writer.stop().acknowledged == ()


def test_another_status_than_200_is_an_error_that_names_it(app: App) -> None:
    assert get_json("127.0.0.1", app.server_port, HOSTNAME, "/check") == {"integrity": "ok"}
    with pytest.raises(ValueError, match="answered 404 to /entries"):
        get_json("127.0.0.1", app.server_port, HOSTNAME, "/entries")
