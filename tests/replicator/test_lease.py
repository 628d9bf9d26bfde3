"""Who may write: one holder at a time, and an epoch that only grows."""

from __future__ import annotations

import threading

import pytest

from replicator.errors import LeaseHeld, LeaseLost
from replicator.lease import Lease
from replicator.store.memory import MemoryStore

KEY = "fleet/lease.json"


def lease(store: MemoryStore, holder: str, ttl_s: float = 0.05) -> Lease:
    return Lease(store, KEY, holder=holder, label=f"node {holder}", ttl_s=ttl_s, now_s=lambda: 1)


def test_the_first_holder_gets_epoch_one_and_a_restart_of_it_the_next() -> None:
    store = MemoryStore()
    assert lease(store, "a").acquire() == 1
    assert lease(store, "a").acquire() == 2


def test_a_lease_that_was_deleted_begins_anew_above_every_epoch_before() -> None:
    store = MemoryStore()
    first = Lease(store, KEY, holder="a", label="node a", now_s=lambda: 1_000)
    assert first.acquire() == 1_000
    store.delete([KEY])
    assert Lease(store, KEY, holder="b", label="node b", now_s=lambda: 2_000).acquire() == 2_000


def test_a_holder_whose_lease_was_deleted_takes_it_again() -> None:
    store = MemoryStore()
    clock = [1_000]
    held = Lease(store, KEY, holder="a", label="node a", now_s=lambda: clock[0])
    held.acquire()
    store.delete([KEY])
    clock[0] = 2_000
    held.renew()
    assert held.token() == 2_000
    held.renew()


def test_one_who_takes_a_deleted_lease_first_is_its_holder() -> None:
    store = MemoryStore()
    first = lease(store, "a")
    first.acquire()
    store.delete([KEY])
    lease(store, "b").acquire()
    with pytest.raises(LeaseLost, match="node b"):
        first.renew()


def test_a_try_to_take_it_that_arrives_late_is_no_loss() -> None:
    store = MemoryStore()
    first = lease(store, "a")
    first.acquire()

    def late(operation: str, key: str) -> None:
        """Just before the put, one of the same holder that was given up for lost arrives."""
        if operation == "put":
            store.before = lambda operation, key: None
            lease(store, "a").acquire()

    store.before = late
    assert lease(store, "a").resume() == 3


def test_a_released_lease_is_taken_at_once() -> None:
    store = MemoryStore()
    first = lease(store, "a", ttl_s=3600)
    first.acquire()
    first.release()
    assert lease(store, "b").acquire() == 2


def test_a_silent_holder_is_taken_over_and_notices() -> None:
    store = MemoryStore()
    first = lease(store, "a")
    first.acquire()
    waited: list[str] = []
    assert lease(store, "b").acquire(on_wait=lambda record: waited.append(record.label)) == 2
    assert waited == ["node a"]
    with pytest.raises(LeaseLost, match="node b"):
        first.renew()
    assert first.epoch == 0


def test_a_holder_that_renews_is_not_taken_over() -> None:
    store = MemoryStore()
    stop = threading.Event()
    first = Lease(store, KEY, holder="a", label="node a", ttl_s=0.3, stop=stop)
    first.acquire()
    keeper = threading.Thread(target=first.keep, args=(pytest.fail,))
    keeper.start()
    try:
        with pytest.raises(LeaseHeld, match="node a"):
            lease(store, "b").acquire()
    finally:
        stop.set()
        keeper.join()


def test_told_so_it_is_taken_over_without_waiting() -> None:
    store = MemoryStore()
    lease(store, "a", ttl_s=3600).acquire()
    assert lease(store, "b").acquire(take_over=True) == 2


def test_of_many_that_take_over_at_once_one_wins() -> None:
    store = MemoryStore()
    lease(store, "a").acquire()
    won: list[int] = []
    lost: list[LeaseHeld] = []

    def contend(name: str) -> None:
        try:
            won.append(lease(store, name).acquire())
        except LeaseHeld as error:
            lost.append(error)

    threads = [threading.Thread(target=contend, args=(f"n{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [2]
    assert len(lost) == 7


def test_a_renewal_whose_acknowledgement_was_lost_is_no_loss() -> None:
    store = MemoryStore()
    held = lease(store, "a")
    held.acquire()
    stale_etag = held._etag
    held.renew()
    arrived = held._mine
    assert arrived is not None
    held._etag, held._mine = (
        stale_etag,
        type(arrived)(**{**{f: getattr(arrived, f) for f in arrived.__struct_fields__}, "beat": 0}),
    )
    held.renew()
    assert held.epoch == 1


def test_one_who_goes_on_never_takes_what_another_has_had_since() -> None:
    store = MemoryStore()
    assert lease(store, "a").resume() == 1
    assert lease(store, "a").resume() == 2
    taken = lease(store, "b")
    taken.acquire(take_over=True)
    taken.release()
    with pytest.raises(LeaseHeld, match="node b"):
        lease(store, "a").resume()
