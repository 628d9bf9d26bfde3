"""Writes to the guestbook as many visitors would, and keeps the ledger: which rows were acknowledged, and when.

Owns the load: an open-loop schedule over a few keep-alive connections. Never retries and never judges.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass

CONNECTIONS = 4
TIMEOUT_S = 2.0
NAME = "a visitor"


@dataclass(frozen=True)
class Acknowledged:
    """A row whose id the app returned, hence committed. at_s: monotonic, when the answer came. wall_s: since 1970."""

    id: int
    text: str
    at_s: float
    wall_s: float


@dataclass(frozen=True)
class Ledger:
    """acknowledged: in order of arrival. unanswered: texts that were sent and may or may not have been committed."""

    acknowledged: tuple[Acknowledged, ...]
    unanswered: frozenset[str]


class Writer:
    """Posts an entry every ``1 / rate`` seconds, whether or not earlier ones have been answered."""

    def __init__(self, address: str, port: int, hostname: str, *, rate: float = 50.0) -> None:
        self._address = address
        self._port = port
        self._hostname = hostname
        self._interval_s = 1 / rate
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._next = 0
        self._started_s = 0.0
        self._acknowledged: list[Acknowledged] = []
        self._sent: set[str] = set()
        self._threads = [threading.Thread(target=self._work, name=f"writer-{n}") for n in range(CONNECTIONS)]

    def start(self) -> None:
        self._started_s = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> Ledger:
        """End the load; what is on its way is waited for, at most TIMEOUT_S."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        return self.ledger()

    def ledger(self) -> Ledger:
        with self._lock:
            answered = {row.text for row in self._acknowledged}
            return Ledger(tuple(self._acknowledged), frozenset(self._sent - answered))

    @property
    def count(self) -> int:
        """Rows acknowledged so far."""
        return len(self._acknowledged)

    def _take(self) -> tuple[int, float]:
        """The next number, and the moment at which it is due."""
        with self._lock:
            number = self._next
            self._next += 1
        return number, self._started_s + number * self._interval_s

    def _work(self) -> None:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=TIMEOUT_S)
        while True:
            number, due_s = self._take()
            if self._stopped.wait(max(0.0, due_s - time.monotonic())):
                connection.close()
                return
            self._post(connection, f"entry {number}")

    def _post(self, connection: http.client.HTTPConnection, text: str) -> None:
        with self._lock:
            self._sent.add(text)
        try:
            row_id = post_entry(connection, self._hostname, text)
        except (OSError, http.client.HTTPException, ValueError):
            connection.close()
            return
        now_s, wall_s = time.monotonic(), time.time()
        with self._lock:
            self._acknowledged.append(Acknowledged(row_id, text, now_s, wall_s))


def post_entry(connection: http.client.HTTPConnection, hostname: str, text: str) -> int:
    """The id of the row that was committed. Raises OSError, HTTPException; ValueError for any answer but 200."""
    body = json.dumps({"name": NAME, "message": text})
    connection.request("POST", "/", body, {"Host": hostname, "Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise ValueError(f"{hostname} answered {response.status} to a new entry: {content[:200]!r}")
    return int(json.loads(content)["id"])


def get_json(address: str, port: int, hostname: str, path: str, timeout_s: float = 5.0) -> object:
    """The JSON that a host's app answers. Raises OSError, HTTPException; ValueError for any other status than 200."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Host": hostname})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{hostname} answered {response.status} to {path}: {content[:200]!r}")
    answer: object = json.loads(content)
    return answer
