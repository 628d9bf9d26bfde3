"""A guestbook: a small web app that keeps its entries in SQLite, and says an entry is stored only when it is.

Owns one file, /data/guestbook.db (GUESTBOOK_DB), and one port (PORT). Needs nothing but Python.

    GET  /                     page with the newest entries and a form
    POST /                     name, message as a form or JSON; {"id": N} of the committed row
    GET  /entries?after=&limit=  {"entries": [...]} in order of id
    GET  /health               200 when the database answers
    GET  /check                {"integrity": "ok", "rows": N, "max_id": N}
"""

from __future__ import annotations

import html
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

MAX_BODY = 64 << 10
MAX_NAME, MAX_MESSAGE = 80, 2000
MAX_ENTRIES = 1000
SHUTDOWN_S = 4.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    message TEXT NOT NULL,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #3b6fd4; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem; }}
  h1 {{ margin-bottom: .2rem; }}
  small, time {{ opacity: .65; }}
  form {{ display: grid; gap: .6rem; margin: 1.5rem 0; padding: 1rem; background: var(--soft); border-radius: .6rem; }}
  input, textarea {{ font: inherit; padding: .5rem; border: 1px solid var(--line); border-radius: .4rem; }}
  button {{ font: inherit; padding: .5rem; border: 0; border-radius: .4rem; background: var(--accent); color: white; }}
  article {{ border-top: 1px solid var(--line); padding: .8rem 0; }}
  article p {{ margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<small>{count} entries, served from {region}</small>
<form method="post" action="/">
  <input name="name" placeholder="Your name" maxlength="{max_name}" required>
  <textarea name="message" placeholder="Your message" rows="3" maxlength="{max_message}" required></textarea>
  <button>Sign the guestbook</button>
</form>
{entries}
</html>
"""
ENTRY = "<article><strong>{name}</strong> <time>{created_at}</time><p>{message}</p></article>"


class Refused(Exception):
    """A request that has no meaning; the text goes to the client."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guestbook:
    """The database: one connection that writes, behind a lock, and one for each reading request."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._writer = self._connect()
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute(SCHEMA)

    def _connect(self) -> sqlite3.Connection:
        """synchronous = FULL: a commit is on the disk before it is acknowledged."""
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = self._connect()
        try:
            yield connection
        finally:
            connection.close()

    def add(self, name: str, message: str) -> int:
        """The id of the row; it is committed when this returns."""
        with self._lock:
            cursor = self._writer.execute("INSERT INTO entries (name, message) VALUES (?, ?)", (name, message))
            return int(cursor.lastrowid or 0)

    def entries(self, after: int, limit: int, newest_first: bool = False) -> list[dict[str, object]]:
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT id, name, message, created_at FROM entries WHERE id > ? ORDER BY id {order} LIMIT ?"
        with self._reading() as connection:
            rows = connection.execute(query, (after, limit)).fetchall()
        return [dict(zip(("id", "name", "message", "created_at"), row, strict=True)) for row in rows]

    def count(self) -> int:
        with self._reading() as connection:
            return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    def check(self) -> dict[str, object]:
        with self._reading() as connection:
            integrity = "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
            rows, max_id = connection.execute("SELECT count(*), coalesce(max(id), 0) FROM entries").fetchone()
        return {"integrity": integrity, "rows": rows, "max_id": max_id}

    def close(self) -> None:
        with self._lock:
            self._writer.close()


class Server(ThreadingHTTPServer):
    """Counts the requests under way, so that a stop can let them finish."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], guestbook: Guestbook) -> None:
        super().__init__(address, Handler)
        self.guestbook = guestbook
        self.stopping = False
        self._busy = 0
        self._idle = threading.Condition()

    @contextmanager
    def request_under_way(self) -> Iterator[None]:
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def finish(self, limit_s: float) -> None:
        """Accept no more, wait for the requests under way, close the database."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, timeout=limit_s)
        self.guestbook.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "guestbook"
    timeout = 120
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/entries": self._entries, "/health": self._health, "/check": self._check})

    def do_POST(self) -> None:
        self._answer({"/": self._sign})

    def _answer(self, routes: dict[str, object]) -> None:
        with self.server.request_under_way():
            try:
                action = routes.get(urlsplit(self.path).path)
                if not callable(action):
                    raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
                action()
            except Refused as refused:
                self.close_connection = True
                self._json({"error": str(refused)}, refused.status)
            except sqlite3.Error as error:
                self._json({"error": f"database: {error}"}, HTTPStatus.SERVICE_UNAVAILABLE)
            self.wfile.flush()

    # -- pages

    def _page(self) -> None:
        book = self.server.guestbook
        newest = book.entries(0, 50, newest_first=True)
        escaped = [{key: html.escape(str(value)) for key, value in entry.items()} for entry in newest]
        page = PAGE.format(
            title=html.escape(os.environ.get("GUESTBOOK_TITLE", "Guestbook")),
            region=html.escape(os.environ.get("MINIPAAS_REGION") or os.environ.get("FLY_REGION") or "here"),
            count=book.count(),
            max_name=MAX_NAME,
            max_message=MAX_MESSAGE,
            entries="\n".join(ENTRY.format_map(entry) for entry in escaped),
        )
        self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")

    def _sign(self) -> None:
        fields = self._fields()
        name, message = str(fields.get("name", "")).strip(), str(fields.get("message", "")).strip()
        if not name or not message or len(name) > MAX_NAME or len(message) > MAX_MESSAGE:
            raise Refused(
                HTTPStatus.BAD_REQUEST, f"give a name (to {MAX_NAME} characters) and a message (to {MAX_MESSAGE})"
            )
        row = self.server.guestbook.add(name, message)
        if "text/html" in self.headers.get("Accept", ""):
            self._send(HTTPStatus.SEE_OTHER, b"", "text/plain", {"Location": "/"})
        else:
            self._json({"id": row})

    def _entries(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        try:
            after, limit = int(query.get("after", ["0"])[0]), int(query.get("limit", ["100"])[0])
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "after and limit are whole numbers") from None
        if not (0 <= after < 2**63 and limit > 0):
            raise Refused(HTTPStatus.BAD_REQUEST, "after is from 0, limit from 1")
        self._json({"entries": self.server.guestbook.entries(after, min(limit, MAX_ENTRIES))})

    def _health(self) -> None:
        self.server.guestbook.entries(0, 1)
        self._json({"status": "ok"})

    def _check(self) -> None:
        self._json(self.server.guestbook.check())

    # -- HTTP

    def _fields(self) -> dict[str, object]:
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length") from None
        if not 0 <= size <= MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {MAX_BODY} bytes")
        body = self.rfile.read(size)
        if len(body) < size:
            raise Refused(HTTPStatus.BAD_REQUEST, "the body ended early")
        try:
            return self._decode(body)
        except (ValueError, UnicodeError):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body is neither a form nor JSON") from None

    def _decode(self, body: bytes) -> dict[str, object]:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            decoded = json.loads(body)
            if not isinstance(decoded, dict):
                raise ValueError
            return decoded
        return {key: values[-1] for key, values in parse_qs(body.decode()).items()}

    def _json(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(value).encode() + b"\n", "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        if self.server.stopping:
            self.close_connection = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Successful requests are the edge's to log; what fails is worth a line."""
        status = code.value if isinstance(code, HTTPStatus) else code
        if str(status) >= "400":
            super().log_request(status, size)


def main() -> None:
    path = os.environ.get("GUESTBOOK_DB", "/data/guestbook.db")
    port = int(os.environ.get("PORT", "8080"))
    stop = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stop.set())
    server = Server(("0.0.0.0", port), Guestbook(path))
    threading.Thread(target=server.serve_forever, name="serve", kwargs={"poll_interval": 0.1}, daemon=True).start()
    print(f"guestbook listens on port {server.server_address[1]} and keeps its entries in {path}", flush=True)
    stop.wait()
    started = time.monotonic()
    server.finish(SHUTDOWN_S)
    print(f"guestbook stopped in {time.monotonic() - started:.2f} s", flush=True)


if __name__ == "__main__":
    main()
