"""Asks for a URL at intervals as long as every database is protected, so that its other end notices when that ends.

Owns when it is asked for. The URL often is a secret and is in no message.
"""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from replicator.errors import UsageError

log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""While it must not be sent, or could not be, it is looked at so often: protection that is back is told at once."""
TIMEOUT_S = 10.0


class Heartbeat:
    """Runs from ``start`` to ``stop``. is_protected: whether everything is."""

    def __init__(
        self, url: str, interval_s: float, is_protected: Callable[[], bool], *, again_s: float = AGAIN_S
    ) -> None:
        self._url = url
        self._interval_s = interval_s
        self._again_s = min(again_s, interval_s)
        self._is_protected = is_protected
        self._stopping = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """A request that is under way is not waited for."""
        self._stopping.set()

    def step(self) -> float:
        """Ask for it if that is right now. Seconds until the next time."""
        if not self._is_protected():
            self._note("not every database is protected, see `replicator status`")
            return self._again_s
        problem = self._send()
        self._note(problem)
        return self._again_s if problem else self._interval_s

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = self.step()

    def _send(self) -> str:
        """What went wrong, '' for nothing."""
        request = urllib.request.Request(self._url, headers={"User-Agent": "replicator"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                answer.read(1)
        except (OSError, ValueError) as error:  # an HTTPError is an OSError, and names no URL
            code = getattr(error, "code", None)
            return f"HTTP {code}" if code else str(getattr(error, "reason", None) or type(error).__name__)
        except Exception as error:  # http.client has failures of its own; their text may have the URL in it
            return type(error).__name__
        return ""

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            if problem:
                log.warning("the heartbeat is not sent: %s", problem)
            else:
                log.info("the heartbeat is sent again")
        self._problem = problem


def check_heartbeat_url(url: str) -> None:
    """Raises UsageError, which does not show it."""
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_web = False
    if not is_web or any(each <= " " for each in url):
        raise UsageError("is not a URL that begins with https:// or http://")
