"""Who hears what happens to an app: deploys that wait for it, and the one deploy that may be under way.

Owns listeners and turns, in memory. Never decides anything.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """One change of an app at a time; the others wait, and are told for whom."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: dict[str, str] = {}

    @contextmanager
    def take(self, app: str, who: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        """who: words for the others, such as 'a deploy by owner'."""
        told = ""
        with self._changed:
            while app in self._holders:
                if self._holders[app] != told:
                    told = self._holders[app]
                    on_wait(told)
                self._changed.wait()
            self._holders[app] = who
        try:
            yield
        finally:
            with self._changed:
                del self._holders[app]
                self._changed.notify_all()
