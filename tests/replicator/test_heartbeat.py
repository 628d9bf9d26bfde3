"""The heartbeat: sent while everything is protected, withheld when it is not, and its URL kept to itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from replicator.errors import UsageError
from replicator.heartbeat import Heartbeat, check_heartbeat_url


class Monitor(HTTPServer):
    """Counts what it is asked for; answers with ``code``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[str] = []
        self.code = 200
        self.url = f"http://127.0.0.1:{self.server_port}/secret-token"


class _Answer(BaseHTTPRequestHandler):
    server: Monitor

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    found = Monitor()
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def test_it_is_sent_at_intervals_while_everything_is_protected(monitor: Monitor) -> None:
    heartbeat = Heartbeat(monitor.url, 300, lambda: True)
    assert heartbeat.step() == 300
    assert monitor.asked == ["/secret-token"]


def test_it_is_withheld_while_something_is_not_protected_and_sent_soon_after(
    monitor: Monitor, caplog: pytest.LogCaptureFixture
) -> None:
    protected = False
    heartbeat = Heartbeat(monitor.url, 300, lambda: protected)
    with caplog.at_level(logging.INFO, "replicator"):
        assert heartbeat.step() == heartbeat.step() == 5
        assert monitor.asked == []
        protected = True
        assert heartbeat.step() == 300
    assert [record.message for record in caplog.records] == [
        "the heartbeat is not sent: not every database is protected, see `replicator status`",
        "the heartbeat is sent again",
    ]


def test_a_failure_is_said_once_without_the_url_and_tried_again(
    monitor: Monitor, caplog: pytest.LogCaptureFixture
) -> None:
    monitor.code = 500
    heartbeat = Heartbeat(monitor.url, 300, lambda: True)
    assert heartbeat.step() == heartbeat.step() == 5
    assert [record.message for record in caplog.records] == ["the heartbeat is not sent: HTTP 500"]


def test_a_monitor_that_is_away_is_no_error_of_ours(monitor: Monitor, caplog: pytest.LogCaptureFixture) -> None:
    heartbeat = Heartbeat("http://127.0.0.1:1/secret-token", 300, lambda: True)
    assert heartbeat.step() == 5
    assert "Connection refused" in caplog.text and "secret" not in caplog.text


def test_the_thread_sends_the_first_one_at_once(monitor: Monitor) -> None:
    asked = threading.Event()
    heartbeat = Heartbeat(monitor.url, 300, lambda: bool(asked.set() or True))
    heartbeat.start()
    assert asked.wait(5)
    heartbeat.stop()


@pytest.mark.parametrize("url", ["ftp://h/x", "h/x", "https:///x", "https://h:x/", "file:///etc/passwd", "http://h/ x"])
def test_what_is_no_url_of_a_heartbeat_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(UsageError) as error:
        check_heartbeat_url(url)
    assert url not in str(error.value)
