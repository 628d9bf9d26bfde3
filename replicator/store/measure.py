"""A store that counts what is asked of it: requests, bytes and seconds, by operation and outcome.

Owns the counters. Never changes a request or an answer, never keeps keys.
"""

from __future__ import annotations

import threading
import time
from collections import deque
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


HOUR_S = 3600.0
MONTH_HOURS = 730.0
USD_PER_MILLION_PUTS = 5.0
"""What Amazon asks for PUT requests to the standard class in most regions; others ask less, or nothing."""
_BIN_S = 10.0


class Tally:
    """How often something happened in the last minute and hour, to 10 s. Any thread may use it."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._began = monotonic()
        self._bins: deque[tuple[int, int]] = deque()  # those in which there was something

    def note(self) -> None:
        with self._guard:
            now = int(self._monotonic() // _BIN_S)
            count = self._bins.pop()[1] if self._bins and self._bins[-1][0] == now else 0
            self._bins.append((now, count + 1))
            while self._bins[0][0] <= now - HOUR_S // _BIN_S:
                self._bins.popleft()

    def within(self, seconds: float) -> int:
        """seconds: up to an hour."""
        with self._guard:
            oldest = self._monotonic() // _BIN_S - seconds // _BIN_S
            return sum(count for at, count in self._bins if at > oldest)

    def per_hour(self) -> float:
        """As the last hour was; less than that when it is not so old yet."""
        known_s = min(HOUR_S, max(60.0, self._monotonic() - self._began))
        return self.within(HOUR_S) * HOUR_S / known_s

    def usd_per_month(self) -> float:
        """What a month of such hours costs, if each was a PUT."""
        return self.per_hour() * MONTH_HOURS * USD_PER_MILLION_PUTS / 1_000_000


@dataclass
class _Call:
    """One call that is under way; filled in by who makes it."""

    sent_bytes: int = 0
    received_bytes: int = 0
    paused_s: float = 0.0


class Meter:
    """The totals of one store and everything below it, and its puts of the last hour. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.puts = Tally(clock)
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
        if operation == "put":
            self.puts.note()
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
