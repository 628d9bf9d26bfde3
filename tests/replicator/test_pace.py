"""When a segment may leave: at once after a pause, in small steps in a burst, about once an interval in an endless stream."""

from __future__ import annotations

from replicator.pace import Allowance, Budget, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def departures(seconds: float, pace: Pace, clock: Clock) -> list[float]:
    """When segments leave, if there is always one to send."""
    left = []
    until = clock.now + seconds
    while clock.now < until:
        wait_s = pace.wait_s()
        if wait_s <= 1e-9:
            pace.spend()
            left.append(clock.now)
        else:
            clock.now += wait_s
    return left


def test_the_first_after_a_pause_goes_at_once() -> None:
    clock = Clock()
    assert Pace(1.0, 10, clock).wait_s() == 0


def test_an_endless_stream_falls_back_to_one_an_interval() -> None:
    clock = Clock()
    pace = Pace(1.0, 100, clock)
    departures(60, pace, clock)
    left = departures(100, pace, clock)
    assert 99 <= len(left) <= 101


def test_a_burst_goes_in_small_steps() -> None:
    clock = Clock()
    left = departures(2, Pace(1.0, 100, clock, step_s=0.05), clock)
    assert 39 <= len(left) <= 41
    assert all(later - earlier >= 0.049 for earlier, later in zip(left, left[1:], strict=False))


def test_a_commit_now_and_then_never_waits() -> None:
    clock = Clock()
    pace = Pace(1.0, 100, clock)
    for _ in range(60):
        assert pace.wait_s() == 0
        pace.spend()
        clock.now += 0.4


def test_without_an_interval_nothing_waits() -> None:
    clock = Clock()
    pace = Pace(0.0, 1, clock)
    for _ in range(5):
        assert pace.wait_s() == 0
        pace.spend()


# -- a budget that several databases share -----------------------------------------------------------------------------


def test_a_budget_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    budget = Budget(Allowance(per_hour=360, burst=5), clock)
    for _ in range(5):
        assert budget.wait_s() == 0
        budget.spend()
    assert budget.wait_s() == 10
    clock.now += 10
    assert budget.wait_s() == 0


def test_what_could_not_wait_is_waited_for_by_the_others_within_bounds() -> None:
    clock = Clock()
    budget = Budget(Allowance(per_hour=3600, burst=3), clock)
    for _ in range(5):
        budget.spend()
    assert budget.wait_s() == 3
    for _ in range(50):
        budget.spend()
    assert budget.wait_s() == 4


def test_over_a_day_the_rate_is_kept() -> None:
    clock = Clock()
    budget = Budget(Allowance(per_hour=60, burst=100), clock)
    begin, left = clock.now, 0
    while clock.now < begin + 86400:
        clock.now += budget.wait_s() + 1e-6
        budget.spend()
        left += 1
    assert 1440 <= left <= 1541
