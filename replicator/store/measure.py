"""A store that counts what is asked of it: requests, bytes and seconds, by operation and outcome.

Owns the counters. Never changes a request or an answer, never keeps keys.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from replicator.errors import (
    BucketMissing,
    ObjectMissing,
    PreconditionFailed,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from replicator.store import Body, ObjectInfo, ObjectStore

OUTCOMES: dict[type[StoreError], str] = {
    StoreUnavailable: "unavailable",
    StoreDenied: "denied",
    BucketMissing: "bucket_missing",
    ObjectMissing: "missing",
    PreconditionFailed: "precondition_failed",
    StoreError: "failed",
}
"""The text form of each failure in metrics; what succeeds is "ok"."""


@dataclass(frozen=True)
class Measurement:
    """Totals since the start. operation: put, get, head, list, delete. sent_bytes, received_bytes: of objects' content.

    A listing counts once whatever its pages, without the seconds that its reader took; so does a multi-part upload.
    """

    operation: str
    outcome: str
    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Call:
    """One call that is under way; filled in by who makes it."""

    sent_bytes: int = 0
    received_bytes: int = 0
    paused_s: float = 0.0


class Meter:
    """The totals of one store and everything below it. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._totals: dict[tuple[str, str], Measurement] = {}
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Calls that have not returned yet."""
        with self._lock:
            return self._in_flight

    def snapshot(self) -> tuple[Measurement, ...]:
        """All totals, in the order of operation and outcome."""
        with self._lock:
            return tuple(self._totals[name] for name in sorted(self._totals))

    @contextmanager
    def measuring(self, operation: str) -> Iterator[_Call]:
        call, outcome, started = _Call(), "ok", self._clock()
        with self._lock:
            self._in_flight += 1
        try:
            yield call
        except StoreError as error:
            outcome = next(name for kind, name in OUTCOMES.items() if isinstance(error, kind))
            raise
        finally:
            self._record(operation, outcome, call, self._clock() - started - call.paused_s)

    def clock(self) -> float:
        return self._clock()

    def _record(self, operation: str, outcome: str, call: _Call, seconds: float) -> None:
        with self._lock:
            self._in_flight -= 1
            old = self._totals.get((operation, outcome), Measurement(operation, outcome))
            self._totals[operation, outcome] = Measurement(
                operation,
                outcome,
                old.requests + 1,
                old.sent_bytes + call.sent_bytes,
                old.received_bytes + call.received_bytes,
                old.seconds + seconds,
            )


class MeasuredStore:
    """``inner`` with every call counted in ``meter``."""

    def __init__(self, inner: ObjectStore, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter

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
        with self._meter.measuring("put") as call:
            info = self._inner.put(key, body, if_none_match=if_none_match, if_match=if_match, time_ms=time_ms)
            call.sent_bytes = info.size_bytes
            return info

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._meter.measuring("get") as call:
            data = self._inner.get(key, offset=offset, length=length)
            call.received_bytes = len(data)
            return data

    def head(self, key: str) -> ObjectInfo:
        with self._meter.measuring("head"):
            return self._inner.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._meter.measuring("list") as call:
            for info in self._inner.list(prefix):
                given = self._meter.clock()
                yield info
                call.paused_s += self._meter.clock() - given

    def delete(self, keys: Sequence[str]) -> None:
        with self._meter.measuring("delete"):
            self._inner.delete(keys)

    def sub(self, prefix: str) -> MeasuredStore:
        return MeasuredStore(self._inner.sub(prefix), self._meter)
