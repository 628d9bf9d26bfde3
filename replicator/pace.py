"""When a segment may leave: a token bucket, so that requests are spent where they help. Pure but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Callable


class Pace:
    """The first commits after a pause go at once, an endless stream about once every ``interval_s``.

    burst: how many may go without waiting after a long pause.
    """

    def __init__(self, interval_s: float, burst: int, monotonic: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._burst = burst
        self._monotonic = monotonic
        self._tokens = float(burst)
        self._at = monotonic()

    def wait_s(self) -> float:
        """Seconds until one may go; 0 for now."""
        self._refill()
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) * self._interval_s

    def spend(self) -> None:
        """One goes. Waiting is not enforced here: what must not wait may go into debt of one."""
        self._refill()
        self._tokens = max(self._tokens - 1, -1.0)

    def _refill(self) -> None:
        now = self._monotonic()
        if self._interval_s > 0:
            self._tokens = min(self._burst, self._tokens + (now - self._at) / self._interval_s)
        else:
            self._tokens = float(self._burst)
        self._at = now
