"""An unavailable store is tried again within a budget, and a write whose answer was lost is recognised."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from replicator.errors import ObjectMissing, PreconditionFailed, StoreDenied, StoreUnavailable
from replicator.store import Stream
from replicator.store.memory import MemoryStore
from replicator.store.retry import Retrying, RetryStore

DOWN = StoreUnavailable("down")


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def retrying(clock: Clock, *, budget_s: float = 60.0, luck: float = 1.0) -> Retrying:
    return Retrying(budget_s=budget_s, clock=clock, sleep=clock.sleep, random=lambda: luck)


def test_what_fails_for_a_while_succeeds() -> None:
    inner, clock = MemoryStore(), Clock()
    store = RetryStore(inner, retrying(clock))
    for operation in ("put", "get", "head", "list", "delete"):
        inner.fail_next(operation, DOWN, times=3)
    store.put("key", b"x")
    assert store.get("key") == b"x"
    assert store.head("key").size_bytes == 1
    assert [info.key for info in store.list()] == ["key"]
    store.delete(["key"])
    assert list(inner.list()) == []


def test_pauses_double_up_to_the_longest_and_end_with_the_budget() -> None:
    inner, clock = MemoryStore(), Clock()
    inner.fail_next("get", DOWN, times=1000)
    with pytest.raises(StoreUnavailable, match=r"down \(tried 9 times\)"):
        RetryStore(inner, retrying(clock, budget_s=20)).get("key")
    assert clock.pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_pauses_are_a_random_part_of_that() -> None:
    inner, clock = MemoryStore(), Clock()
    inner.put("key", b"")
    inner.fail_next("get", DOWN, times=3)
    RetryStore(inner, retrying(clock, luck=0.5)).get("key")
    assert clock.pauses == pytest.approx([0.05, 0.1, 0.2])


def test_no_budget_means_one_attempt() -> None:
    inner, clock = MemoryStore(), Clock()
    inner.fail_next("get", DOWN)
    with pytest.raises(StoreUnavailable, match="^down$"):
        RetryStore(inner, retrying(clock, budget_s=0)).get("key")
    assert len(inner.calls) == 1


def test_a_call_that_took_longer_than_the_budget_is_still_tried_again() -> None:
    clock = Clock()
    slow = MemoryStore(before=lambda operation, key: clock.sleep(300))
    slow.put("key", b"x")
    slow.fail_next("get", DOWN)
    assert RetryStore(slow, retrying(clock, budget_s=60)).get("key") == b"x"


def test_only_unavailability_is_tried_again() -> None:
    inner, clock = MemoryStore(), Clock()
    store = RetryStore(inner, retrying(clock))
    inner.fail_next("put", StoreDenied("no"))
    with pytest.raises(StoreDenied):
        store.put("key", b"x")
    with pytest.raises(ObjectMissing):
        store.get("key")
    assert clock.pauses == []


def test_stop_ends_the_waiting_at_once() -> None:
    inner, stop = MemoryStore(), threading.Event()
    inner.before = lambda operation, key: stop.set()
    inner.fail_next("get", DOWN, times=1000)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        RetryStore(inner, Retrying(stop=stop, first_s=60, longest_s=60)).get("key")
    assert time.monotonic() - started < 5
    assert len(inner.calls) == 1


def test_stop_wakes_who_is_waiting() -> None:
    inner, stop = MemoryStore(), threading.Event()
    inner.fail_next("get", DOWN, times=1000)
    threading.Timer(0.05, stop.set).start()
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        RetryStore(inner, Retrying(stop=stop, first_s=30, longest_s=30, random=lambda: 1.0)).get("key")
    assert time.monotonic() - started < 5


def test_a_created_object_whose_answer_was_lost_is_ours() -> None:
    inner = MemoryStore()
    inner.fail_next("put", DOWN, after=True)
    info = RetryStore(inner, retrying(Clock())).put("key", b"mine", if_none_match=True)
    assert info == inner.head("key")
    assert inner.get("key") == b"mine"


def test_an_overwrite_whose_answer_was_lost_is_ours() -> None:
    inner = MemoryStore()
    before = inner.put("key", b"before")
    inner.fail_next("put", DOWN, after=True)
    assert RetryStore(inner, retrying(Clock())).put("key", b"mine", if_match=before.etag) == inner.head("key")


def test_an_object_of_another_writer_is_not_ours() -> None:
    inner = MemoryStore()
    inner.put("key", b"them")
    inner.fail_next("put", DOWN)
    with pytest.raises(PreconditionFailed):
        RetryStore(inner, retrying(Clock())).put("key", b"mine", if_none_match=True)
    assert inner.get("key") == b"them"


def test_without_a_retry_the_same_content_is_no_excuse() -> None:
    inner = MemoryStore()
    inner.put("key", b"mine")
    with pytest.raises(PreconditionFailed):
        RetryStore(inner, retrying(Clock())).put("key", b"mine", if_none_match=True)


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1])
def test_a_file_whose_answer_was_lost_is_compared_whole(tmp_path: Path, size: int) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"x" * size)
    inner = MemoryStore()
    store = RetryStore(inner, retrying(Clock()))
    inner.fail_next("put", DOWN, after=True)
    assert store.put("key", body, if_none_match=True).size_bytes == size
    body.write_bytes(b"x" * size + b"!")
    inner.fail_next("put", DOWN)
    with pytest.raises(PreconditionFailed):
        store.put("key", body, if_none_match=True)


def test_a_file_that_differs_in_its_last_byte_is_not_ours(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"x" * (9 << 20) + b"a")
    inner = MemoryStore()
    inner.put("key", b"x" * (9 << 20) + b"b")
    inner.fail_next("put", DOWN)
    with pytest.raises(PreconditionFailed):
        RetryStore(inner, retrying(Clock())).put("key", body, if_none_match=True)


def test_a_comparison_that_fails_is_tried_again() -> None:
    inner = MemoryStore()
    inner.fail_next("put", DOWN, after=True)
    inner.fail_next("head", DOWN)
    inner.fail_next("get", DOWN)
    assert RetryStore(inner, retrying(Clock())).put("key", b"mine", if_none_match=True).size_bytes == 4


def test_a_listing_that_breaks_goes_on_where_it_was() -> None:
    class Breaking(MemoryStore):
        breaks = 2

        def list(self, prefix=""):  # type: ignore[no-untyped-def]
            for number, info in enumerate(super().list(prefix)):
                if number == 2 and self.breaks:
                    self.breaks -= 1
                    raise DOWN
                yield info

    inner = Breaking()
    for name in "abcdef":
        inner.put(name, b"")
    assert [info.key for info in RetryStore(inner, retrying(Clock())).list()] == list("abcdef")


def test_below_a_prefix_the_same_rules_hold() -> None:
    inner = MemoryStore()
    inner.fail_next("put", DOWN, after=True)
    RetryStore(inner, retrying(Clock())).sub("a/b").put("key", b"x", if_none_match=True)
    assert inner.get("a/b/key") == b"x"


def test_a_stream_is_begun_anew_for_each_attempt_and_recognised_when_its_answer_was_lost() -> None:
    inner, clock = MemoryStore(), Clock()
    store = RetryStore(inner, retrying(clock))
    stream = Stream(lambda: iter([b"one ", b"two"]), 7)
    inner.fail_next("put", DOWN)
    store.put("begun-twice", stream, if_none_match=True)
    assert inner.get("begun-twice") == b"one two"
    inner.fail_next("put", DOWN, after=True)
    assert store.put("lost-answer", stream, if_none_match=True).size_bytes == 7
    inner.put("taken", b"one tw0")
    inner.fail_next("put", DOWN)
    with pytest.raises(PreconditionFailed):
        store.put("taken", stream, if_none_match=True)
