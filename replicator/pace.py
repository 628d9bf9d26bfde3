"""When a segment may leave: token buckets, so that requests are spent where they help. Pure but for the clock that it is given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

BURST_STEP_S = 0.05
HOUR_S = 3600.0


@dataclass(frozen=True)
class Allowance:
    """How many segments may leave: per_hour on average, burst at once after a pause."""

    per_hour: int
    burst: int = 100


class Budget:
    """An allowance that several databases share. Any thread may use it.

    Who may not wait (a barrier, the end) takes from it all the same; the others wait for that the longer.
    """

    def __init__(self, allowance: Allowance, monotonic: Callable[[], float]) -> None:
        self._per_s = allowance.per_hour / HOUR_S
        self._burst = allowance.burst
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._tokens = float(allowance.burst)
        self._at = monotonic()

    def wait_s(self) -> float:
        """Seconds until there may be one to take."""
        with self._guard:
            self._refill()
            return max(0.0, (1 - self._tokens) / self._per_s)

    def spend(self) -> None:
        with self._guard:
            self._refill()
            self._tokens = max(self._tokens - 1, -float(self._burst))

    def _refill(self) -> None:
        now = self._monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now


class Pace:
    """The first commits after a pause go at once, an endless stream about once every ``interval_s``.

    burst: how many may go after a long pause before that. step_s: the least time between two of a burst, so that it lasts.
    """

    def __init__(
        self, interval_s: float, burst: int, monotonic: Callable[[], float], *, step_s: float = BURST_STEP_S
    ) -> None:
        self._interval_s = interval_s
        self._step_s = min(step_s, interval_s)
        self._burst = burst
        self._monotonic = monotonic
        self._tokens = float(burst)
        self._at = monotonic()
        self._gone_at = self._at - self._step_s

    def wait_s(self) -> float:
        """Seconds until one may go; 0 for now."""
        self._refill()
        step_s = self._gone_at + self._step_s - self._at
        return max(0.0, step_s, (1 - self._tokens) * self._interval_s)

    def spend(self) -> None:
        """One goes. Waiting is not enforced here: what must not wait may go into debt of one."""
        self._refill()
        self._tokens = max(self._tokens - 1, -1.0)
        self._gone_at = self._at

    def _refill(self) -> None:
        now = self._monotonic()
        if self._interval_s > 0:
            self._tokens = min(self._burst, self._tokens + (now - self._at) / self._interval_s)
        else:
            self._tokens = float(self._burst)
        self._at = now
