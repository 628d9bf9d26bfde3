"""When a segment may leave: a token bucket, so that requests are spent where they help. Pure but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Callable

BURST_STEP_S = 0.05


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
