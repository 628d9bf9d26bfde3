"""Who hears what happens to an app: deploys that wait for it, and the one deploy that may be under way.

Owns listeners and turns, in memory. Never decides anything.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minipaas.errors import TimedOut, TooManyClients

MAX_WAITING_LINES = 10_000


class Hub:
    """Lines about an app, for everyone who listens to it. '' only says: look again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, list[queue.Queue[str]]] = {}

    def publish(self, app: str, line: str) -> None:
        with self._lock:
            listeners = list(self._listeners.get(app, ()))
        for listener in listeners:
            if listener.qsize() < MAX_WAITING_LINES:
                listener.put(line)

    @contextmanager
    def listen(self, app: str) -> Iterator[queue.Queue[str]]:
        lines: queue.Queue[str] = queue.Queue()
        with self._lock:
            self._listeners.setdefault(app, []).append(lines)
        try:
            yield lines
        finally:
            with self._lock:
                self._listeners[app].remove(lines)
                if not self._listeners[app]:
                    del self._listeners[app]


class Turns:
    """One change of an app at a time; a few others wait, and are told for whom."""

    def __init__(self, waiting: int) -> None:
        self._most_waiting = waiting
        self._changed = threading.Condition()
        self._holders: dict[str, str] = {}
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def take(self, app: str, who: str, on_wait: Callable[[str], None], limit_s: float) -> Iterator[None]:
        """who: words for the others, such as 'a deploy by owner'. Raises TooManyClients at once when too many wait already,
        TimedOut after ``limit_s``."""
        with self._changed:
            if app in self._holders:
                self._wait(app, on_wait, time.monotonic() + limit_s)
            self._holders[app] = who
        try:
            yield
        finally:
            with self._changed:
                del self._holders[app]
                self._changed.notify_all()

    def _wait(self, app: str, on_wait: Callable[[str], None], deadline: float) -> None:
        if self._waiting[app] >= self._most_waiting:
            raise TooManyClients(
                f"{app} is busy with {self._holders[app]}, and {self._most_waiting} changes wait for it; try again later"
            )
        self._waiting[app] += 1
        try:
            told = ""
            while holder := self._holders.get(app):
                if holder != told:
                    told = holder
                    on_wait(holder)
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TimedOut(f"{app} is still busy with {holder}; nothing was changed, try again later")
        finally:
            self._waiting[app] -= 1
