"""Every call to a store is counted, with its bytes, seconds and outcome."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from replicator.errors import ObjectMissing, PreconditionFailed, StoreUnavailable
from replicator.store.measure import MeasuredStore, Measurement, Meter, Tally
from replicator.store.memory import MemoryStore


def ticking() -> Meter:
    """Each look at the clock is one second after the last."""
    ticks = count()
    return Meter(clock=lambda: float(next(ticks)))


def test_calls_are_counted_by_operation_and_outcome() -> None:
    inner, meter = MemoryStore(), ticking()
    store = MeasuredStore(inner, meter)
    store.put("a", b"12345", if_none_match=True)
    store.get("a", length=3)
    store.head("a")
    inner.fail_next("get", StoreUnavailable("down"))
    with pytest.raises(StoreUnavailable):
        store.get("a")
    with pytest.raises(ObjectMissing):
        store.get("b")
    with pytest.raises(PreconditionFailed):
        store.put("a", b"1", if_none_match=True)
    store.sub("x").put("c", b"123")
    store.delete(["a", "b"])
    assert meter.snapshot() == (
        Measurement("delete", "ok", 1, 0, 0, 1.0),
        Measurement("get", "missing", 1, 0, 0, 1.0),
        Measurement("get", "ok", 1, 0, 3, 1.0),
        Measurement("get", "unavailable", 1, 0, 0, 1.0),
        Measurement("head", "ok", 1, 0, 0, 1.0),
        Measurement("put", "ok", 2, 8, 0, 2.0),
        Measurement("put", "precondition_failed", 1, 0, 0, 1.0),
    )


def test_the_time_of_a_listing_is_without_that_of_its_reader() -> None:
    meter = ticking()
    store = MeasuredStore(MemoryStore(), meter)
    for name in "abc":
        store.sub("x").put(name, b"")
    for _ in store.list():
        for _ in range(100):
            meter.clock()
    assert meter.snapshot()[0] == Measurement("list", "ok", 1, 0, 0, 4.0)


def test_calls_under_way_are_known() -> None:
    meter = Meter()
    seen: list[int] = []
    store = MeasuredStore(MemoryStore(before=lambda operation, key: seen.append(meter.in_flight)), meter)
    store.put("a", b"")
    assert seen == [1]
    assert meter.in_flight == 0


def test_threads_do_not_lose_counts() -> None:
    meter = Meter()
    store = MeasuredStore(MemoryStore(), meter)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"k{number}", b"12"), range(400)))
    assert [(m.requests, m.sent_bytes) for m in meter.snapshot()] == [(400, 800)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_tally_forgets_what_is_older_than_an_hour() -> None:
    clock = Clock()
    tally = Tally(clock)
    for _ in range(400):
        tally.note()
        clock.now += 10
    assert (tally.within(60), tally.within(3600)) == (5, 359)
    clock.now += 3600
    assert tally.within(3600) == 0


def test_a_month_of_one_put_a_second_costs_13_dollars() -> None:
    clock = Clock()
    tally = Tally(clock)
    for _ in range(1800):  # half an hour is all that is known
        tally.note()
        clock.now += 1
    assert tally.per_hour() == pytest.approx(3600)
    assert tally.usd_per_month() == pytest.approx(13.14)


def test_what_is_known_for_seconds_is_not_taken_for_a_rate() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.note()
    clock.now += 1
    assert tally.per_hour() == 60


def test_puts_are_tallied_and_nothing_else() -> None:
    meter = Meter()
    store = MeasuredStore(MemoryStore(), meter)
    store.put("a", b"1")
    store.sub("b").put("c", b"1")
    store.get("a")
    assert meter.puts.within(60) == 2
