"""A store that tries again when it is unavailable: the one layer of retries.

Owns back-off, budget and the question whether a write whose answer was lost took effect. Never talks to storage itself.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from replicator.errors import ObjectMissing, PreconditionFailed, StoreError, StoreUnavailable
from replicator.store import Body, ObjectInfo, ObjectStore, Stream

_COMPARE_BYTES = 8 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Retrying:
    """How to try again: full jitter (a random part of a pause that doubles), ``budget_s`` from the first failure.

    first_s, longest_s: bounds of the pause before jitter. stop: when set, no further pause is made and the failure is
    raised; the first attempt is always made. sleep: replaces waiting, for tests. random: gives 0.0 to 1.0.
    """

    budget_s: float = 60.0
    first_s: float = 0.1
    longest_s: float = 5.0
    stop: threading.Event | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] | None = None
    random: Callable[[], float] = random.random

    def run(self, attempt: Callable[[], T]) -> T:
        """The result of the first attempt that does not raise StoreUnavailable. Raises it when the budget is spent."""
        return self.run_numbered(lambda number: attempt())

    def run_numbered(self, attempt: Callable[[int], T]) -> T:
        """As ``run``; the attempt is told its number, from 1."""
        number, deadline = 1, None
        while True:
            try:
                return attempt(number)
            except StoreUnavailable as error:
                now = self.clock()
                deadline = now + self.budget_s if deadline is None else deadline
                pause = self.random() * min(self.longest_s, self.first_s * 2.0 ** min(number - 1, 30))
                if now + pause > deadline or self._stopped_while_waiting(pause):
                    if number == 1:
                        raise
                    raise StoreUnavailable(f"{error} (tried {number} times)") from error
                number += 1

    def _stopped_while_waiting(self, pause_s: float) -> bool:
        if self.stop is not None and self.stop.is_set():
            return True
        if self.sleep is not None:
            self.sleep(pause_s)
            return self.stop is not None and self.stop.is_set()
        return (self.stop or threading.Event()).wait(pause_s)


class RetryStore:
    """``inner`` with StoreUnavailable tried again as ``retrying`` says.

    A conditional put that is tried again, and then finds its condition broken, may have broken it itself: the answer to
    an earlier attempt was lost. It counts as done when the object there has the content that was to be written; content
    for which it matters who wrote it (a lease) must therefore name its writer.
    """

    def __init__(self, inner: ObjectStore, retrying: Retrying | None = None) -> None:
        self._inner = inner
        self._retrying = retrying or Retrying()

    @property
    def url(self) -> str:
        return self._inner.url

    def put(
        self,
        key: str,
        body: Body,
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
        time_ms: int | None = None,
    ) -> ObjectInfo:
        def attempt(number: int) -> ObjectInfo:
            try:
                return self._inner.put(key, body, if_none_match=if_none_match, if_match=if_match, time_ms=time_ms)
            except PreconditionFailed:
                written = self._find_written(key, body) if number > 1 else None
                if written is None:
                    raise
                return written

        return self._retrying.run_numbered(attempt)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._retrying.run(lambda: self._inner.get(key, offset=offset, length=length))

    def head(self, key: str) -> ObjectInfo:
        return self._retrying.run(lambda: self._inner.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """A listing that fails on the way is begun again, and what was given already is left out."""
        last = ""
        listing = self._inner.list(prefix)

        def following(number: int) -> ObjectInfo | None:
            nonlocal listing
            if number > 1:
                listing = (info for info in self._inner.list(prefix) if info.key > last)
            return next(listing, None)

        while (info := self._retrying.run_numbered(following)) is not None:
            last = info.key
            yield info

    def delete(self, keys: Sequence[str]) -> None:
        self._retrying.run(lambda: self._inner.delete(keys))

    def sub(self, prefix: str) -> RetryStore:
        return RetryStore(self._inner.sub(prefix), self._retrying)

    def _find_written(self, key: str, body: Body) -> ObjectInfo | None:
        """What is stored at ``key``, if its content is ``body``. Raises StoreUnavailable: the put is then tried again."""
        try:
            info = self._inner.head(key)
            if isinstance(body, Path):
                same = self._equals_file(info, body)
            elif isinstance(body, Stream):
                same = self._equals_stream(info, body)
            else:
                same = self._equals_bytes(info, body)
        except ObjectMissing:
            return None
        return info if same else None

    def _equals_bytes(self, info: ObjectInfo, body: bytes) -> bool:
        return info.size_bytes == len(body) and self._inner.get(info.key) == body

    def _equals_stream(self, info: ObjectInfo, body: Stream) -> bool:
        offset = 0
        for chunk in body.chunks():
            if chunk != self._inner.get(info.key, offset=offset, length=len(chunk)):
                return False
            offset += len(chunk)
        return offset == info.size_bytes

    def _equals_file(self, info: ObjectInfo, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                if path.stat().st_size != info.size_bytes:
                    return False
                for offset in range(0, info.size_bytes, _COMPARE_BYTES):
                    if file.read(_COMPARE_BYTES) != self._inner.get(info.key, offset=offset, length=_COMPARE_BYTES):
                        return False
                return True
        except OSError as error:
            raise StoreError(f"{path}, which was to be stored, cannot be read: {error.strerror}") from error
