"""Browsers that are signed in: DATA/sessions.json, hashes only.

Owns how long a session lasts and that it ends when it is ended. Never says what its token may do.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from minipaas.errors import Unavailable
from minipaas.settings import write_private

SESSION_DAYS = 30
MAX_SESSIONS = 100

log = logging.getLogger(__name__)


class _Session(msgspec.Struct, frozen=True):
    """token: SHA-256 of the token that was given. ends_ms: wall clock."""

    token: str
    ends_ms: int


class Sessions:
    """Thread-safe. The file is written when somebody signs in or out, and outlives a restart of minipaas."""

    def __init__(self, path: Path, now_ms: Callable[[], int]) -> None:
        self._path, self._now_ms = path, now_ms
        self._lock = threading.Lock()
        self._sessions = _read(path)

    def begin(self, token_sha256: str) -> str:
        """What the browser is to show from now on. Beyond ``MAX_SESSIONS`` the oldest ends. Raises Unavailable."""
        shown, now_ms = secrets.token_urlsafe(32), self._now_ms()
        with self._lock:
            kept = [(key, each) for key, each in self._sessions.items() if each.ends_ms > now_ms]
            kept = sorted(kept, key=lambda item: item[1].ends_ms)[1 - MAX_SESSIONS :]
            self._sessions = dict(kept)
            self._sessions[_key(shown)] = _Session(token_sha256, now_ms + SESSION_DAYS * 86_400_000)
            self._write()
        return shown

    def token(self, shown: str) -> str:
        """SHA-256 of the token that the session was begun with; '' when there is no such session, or not any more."""
        with self._lock:
            session = self._sessions.get(_key(shown))
        return session.token if session is not None and session.ends_ms > self._now_ms() else ""

    def end(self, shown: str) -> None:
        """What the browser showed is worth nothing any more. No error when there is no such session. Raises Unavailable."""
        with self._lock:
            if self._sessions.pop(_key(shown), None) is not None:
                self._write()

    def _write(self) -> None:
        try:
            write_private(self._path, msgspec.json.encode(self._sessions).decode())
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be written: {error.strerror}; make room on its disk") from error


def _key(shown: str) -> str:
    return hashlib.sha256(shown.encode(errors="replace")).hexdigest()


def _read(path: Path) -> dict[str, _Session]:
    """Empty when there is no file, or none that makes sense: people sign in again then."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, _Session])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("nobody is signed in any more", extra={"file": str(path), "reason": str(error)})
        return {}
