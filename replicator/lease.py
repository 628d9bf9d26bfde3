"""The right to write, as one object in the store: who has it, and an epoch that only grows.

Owns the lease's JSON form and the rule for taking over. Clocks of different hosts are never compared: a lease is silent
when the object has not changed for its time to live, as the one who watches it measures. Every change is conditional
on what was read before. The one use of the clock: when there is no object, new or because somebody deleted it, the epoch begins with
the seconds since 1970, so that it is higher than any that was given out before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from replicator.errors import LeaseHeld, LeaseLost, ObjectMissing, PreconditionFailed, StoreError
from replicator.store import ObjectInfo, ObjectStore

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
WATCH_EVERY_S = 1.0


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """holder: an id that survives a restart. label: the holder for people.

    epoch: fencing token, grows with every holder. beat: grows with every renewal.
    """

    holder: str
    label: str
    epoch: int
    beat: int
    ttl_s: float
    released: bool = False
    version: int = 1


class Lease:
    """One lease, seen by one who wants it or has it."""

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        holder: str,
        label: str,
        ttl_s: float = 60.0,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
        stop: threading.Event | None = None,
    ) -> None:
        self._store = store
        self._key = key
        self._holder = holder
        self._label = label
        self._ttl_s = ttl_s
        self._monotonic = monotonic
        self._now_s = now_s
        self._stop = stop or threading.Event()
        self._mine: LeaseRecord | None = None
        self._etag = ""

    @property
    def epoch(self) -> int:
        """0 while it is not held."""
        return self._mine.epoch if self._mine else 0

    def token(self) -> int:
        """The epoch, for what is written under it. Raises LeaseLost while it is not held."""
        return self._held().epoch

    def look(self) -> tuple[LeaseRecord, str] | None:
        """The record and its etag; None when nobody ever had it. Raises StoreError."""
        try:
            info = self._store.head(self._key)
            return msgspec.json.decode(self._store.get(self._key), type=LeaseRecord), info.etag
        except ObjectMissing:
            return None
        except msgspec.MsgspecError as error:
            raise StoreError(f"{self._store.url}/{self._key} is not a lease: {error}") from error

    def acquire(self, *, take_over: bool = False, on_wait: Callable[[LeaseRecord], None] | None = None) -> int:
        """Take it, and return the epoch. At once when nobody has it, it was released, or it is ours from before a restart.

        Held by another: watch it for its time to live, and take it over if it stayed silent; ``take_over`` does so without watching.
        Raises LeaseHeld when its holder is alive, or another was quicker.
        """
        found = self.look()
        if found is not None and not take_over and not self._is_free(found[0]):
            if on_wait:
                on_wait(found[0])
            self._watch(*found)
        while True:
            epoch = found[0].epoch + 1 if found else int(self._now_s())
            record = LeaseRecord(holder=self._holder, label=self._label, epoch=epoch, beat=0, ttl_s=self._ttl_s)
            try:
                info = self._write(record, found[1] if found else None)
            except PreconditionFailed:
                found = self.look()
                if found is not None and found[0].holder == self._holder:
                    continue  # a try of ours that was given up for lost has arrived late
                raise LeaseHeld(
                    f"another took the lease {self._key} at this moment; look who it was, and try again"
                ) from None
            self._mine, self._etag = record, info.etag
            return epoch

    def resume(self) -> int:
        """Take it as one who goes on: if nobody ever had it, or it is ours from before a restart. The epoch.

        Raises LeaseHeld when another has had it since, alive or not: what this one knows is old then.
        """
        found = self.look()
        if found is not None and found[0].holder != self._holder:
            raise LeaseHeld(f"{found[0].label} has the lease {self._key} now, since it took over")
        return self.acquire()

    def renew(self) -> None:
        """Raises LeaseLost when another has it, StoreError when the store cannot be asked."""
        mine = self._held()
        record = msgspec.structs.replace(mine, beat=mine.beat + 1)
        try:
            info = self._write(record, self._etag)
        except PreconditionFailed:
            self._reconsider(record)
            return
        self._mine, self._etag = record, info.etag

    def release(self) -> None:
        """Let go of it, so that the next holder need not wait. No error when it is lost already."""
        if self._mine is None:
            return
        try:
            self._write(msgspec.structs.replace(self._mine, released=True), self._etag)
        except PreconditionFailed:
            log.warning("the lease %s was taken by another before it was released", self._key)
        self._mine = None

    def keep(self, on_lost: Callable[[LeaseLost], None]) -> None:
        """Renew until ``stop`` is set; for a thread of its own.

        An unreachable store is no loss: that another, who reaches it, has taken the lease is noticed when it answers again.
        """
        while not self._stop.wait(self._ttl_s / RENEWALS_PER_TTL):
            try:
                self.renew()
            except LeaseLost as lost:
                on_lost(lost)
                return
            except StoreError as error:
                log.warning("the lease %s could not be renewed: %s", self._key, error)
            except Exception:  # the loop of a thread: it must not end in silence
                log.exception("the lease %s could not be renewed; it is tried again", self._key)

    def _held(self) -> LeaseRecord:
        if self._mine is None:
            raise LeaseLost(f"the lease {self._key} is not held")
        return self._mine

    def _is_free(self, record: LeaseRecord) -> bool:
        return record.released or record.holder == self._holder

    def _watch(self, record: LeaseRecord, etag: str) -> None:
        deadline = self._monotonic() + record.ttl_s
        while (left_s := deadline - self._monotonic()) > 0:
            if self._stop.wait(min(WATCH_EVERY_S, left_s)):
                raise LeaseHeld(f"stopped while waiting for {record.label} to be silent")
            now = self.look()
            if now is None or now[1] != etag:
                raise LeaseHeld(f"{record.label} holds the lease {self._key} and is alive: it has just renewed it")

    def _write(self, record: LeaseRecord, etag: str | None) -> ObjectInfo:
        return self._store.put(self._key, msgspec.json.encode(record), if_none_match=etag is None, if_match=etag)

    def _reconsider(self, intended: LeaseRecord) -> None:
        """A renewal was refused: its acknowledgement was lost before, or the object was deleted, or another has the lease."""
        found = self.look()
        if found is None:
            log.warning("the lease %s was deleted; it is written again", self._key)
        elif found[0] == intended:
            self._mine, self._etag = found
            return
        elif found[0].holder != self._holder:
            self._mine = None
            raise LeaseLost(f"the lease {self._key} is lost: {found[0].label} has it now")
        try:
            self.acquire()
        except LeaseHeld as held:
            self._mine = None
            raise LeaseLost(str(held)) from held
