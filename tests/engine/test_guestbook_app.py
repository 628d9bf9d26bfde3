"""The guestbook of the demo, as a process: what it acknowledges is committed, and it stops in order."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

APP = Path(__file__).parents[2] / "images" / "guestbook" / "app.py"
JSON = {"Content-Type": "application/json"}


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int
    database: Path

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        answer = response.status, response.read().decode()
        connection.close()
        return answer

    def sign(self, message: str) -> int:
        status, body = self.ask(
            "POST", "/", json.dumps({"name": "test", "message": message}), Content_Type=JSON["Content-Type"]
        )
        assert status == 200, body
        return int(json.loads(body)["id"])


@pytest.fixture
def guestbook(tmp_path: Path) -> Iterator[Running]:
    database = tmp_path / "guestbook.db"
    environment = {**os.environ, "GUESTBOOK_DB": str(database), "PORT": "0"}
    process = subprocess.Popen([sys.executable, str(APP)], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline().split("port ")[1].split()[0])
    yield Running(process, port, database)
    process.kill()
    process.wait()
    process.stdout.close()


def test_an_acknowledged_entry_is_committed(guestbook: Running) -> None:
    ids = [guestbook.sign(f"message {number}") for number in range(5)]
    guestbook.process.kill()
    guestbook.process.wait()
    with sqlite3.connect(guestbook.database) as connection:
        assert [row[0] for row in connection.execute("SELECT id FROM entries ORDER BY id")] == ids == [1, 2, 3, 4, 5]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_forms_json_and_pages_work_together(guestbook: Running) -> None:
    form = urlencode({"name": "<b>Ann</b>", "message": "hi & bye"})
    kind = "application/x-www-form-urlencoded"
    assert guestbook.ask("POST", "/", form, Content_Type=kind) == (200, '{"id": 1}\n')
    assert guestbook.ask("POST", "/", form, Content_Type=kind, Accept="text/html")[0] == 303
    status, page = guestbook.ask("GET", "/")
    assert status == 200 and "&lt;b&gt;Ann&lt;/b&gt;" in page and "<b>Ann" not in page
    entries = json.loads(guestbook.ask("GET", "/entries?after=1&limit=5")[1])["entries"]
    assert [(each["id"], each["name"], each["message"]) for each in entries] == [(2, "<b>Ann</b>", "hi & bye")]
    assert json.loads(guestbook.ask("GET", "/check")[1]) == {"integrity": "ok", "rows": 2, "max_id": 2}
    assert guestbook.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/", "name=only", 400),
        ("POST", "/", "name=a&message=" + "x" * 3000, 400),
        ("POST", "/", "x" * 70_000, 413),
        ("GET", "/nothing", None, 404),
        ("GET", "/entries?after=x", None, 400),
        ("GET", "/entries?after=-1", None, 400),
    ],
)
def test_requests_without_meaning_are_refused(
    guestbook: Running, method: str, path: str, body: str | None, status: int
) -> None:
    assert guestbook.ask(method, path, body)[0] == status
    assert json.loads(guestbook.ask("GET", "/check")[1])["rows"] == 0


def test_writers_at_once_get_each_an_id_of_their_own(guestbook: Running) -> None:
    ids: list[int] = []
    writers = [threading.Thread(target=lambda: ids.extend(guestbook.sign("x") for _ in range(10))) for _ in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert sorted(ids) == list(range(1, 41))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_it_in_order_even_with_idle_connections(guestbook: Running, sign: signal.Signals) -> None:
    idle = http.client.HTTPConnection("127.0.0.1", guestbook.port, timeout=10)
    idle.request("GET", "/health")
    idle.getresponse().read()
    guestbook.sign("last")
    started = time.monotonic()
    guestbook.process.send_signal(sign)
    assert guestbook.process.wait(timeout=10) == 0
    assert time.monotonic() - started < 2
    idle.close()
    assert not guestbook.database.with_name("guestbook.db-wal").exists()
