"""Calls ``step`` of many workers, each by one thread at a time, when they asked to be called or were woken.

Owns the threads. A worker that is idle costs nothing: no timer, no polling. A step that raises is logged, and called again later.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

AFTER_CRASH_S = 5.0


class Stepping(Protocol):
    def step(self) -> float | None:
        """Do what can be done now. Seconds until the next call, None to wait for a wake."""
        ...


W = TypeVar("W", bound=Stepping)


class Scheduler(Generic[W]):
    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._turn = threading.Condition()
        self._due: list[tuple[float, int, W]] = []
        self._next_due: dict[W, float] = {}
        self._running: set[W] = set()
        self._again: set[W] = set()
        self._forgotten: set[W] = set()
        self._order = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-clock", daemon=True)
        self._thread.start()

    def wake(self, worker: W, delay_s: float = 0.0) -> None:
        """Have it called soon: at once, or again right after the step that runs now."""
        with self._turn:
            if worker in self._running:
                self._again.add(worker)
            elif worker not in self._forgotten:
                self._schedule(worker, time.monotonic() + delay_s)

    def forget(self, worker: W, timeout_s: float) -> bool:
        """Never call it again; waits for a step that runs now. False when that did not end in time."""
        with self._turn:
            self._forgotten.add(worker)
            self._next_due.pop(worker, None)
            return self._turn.wait_for(lambda: worker not in self._running, timeout_s)

    def stop(self) -> None:
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _schedule(self, worker: W, due: float) -> None:
        known = self._next_due.get(worker)
        if known is not None and known <= due:
            return
        self._next_due[worker] = due
        heapq.heappush(self._due, (due, next(self._order), worker))
        self._turn.notify_all()

    def _run(self) -> None:
        with self._turn:
            while not self._stopping:
                now = time.monotonic()
                while self._due and self._due[0][0] <= now:
                    due, _, worker = heapq.heappop(self._due)
                    if self._next_due.get(worker) == due:
                        del self._next_due[worker]
                        self._running.add(worker)
                        self._pool.submit(self._call, worker)
                self._turn.wait(self._due[0][0] - now if self._due else None)

    def _call(self, worker: W) -> None:
        try:
            wait_s = worker.step()
        except Exception:
            log.exception("a step failed in a way that nobody foresaw; it is tried again")
            wait_s = AFTER_CRASH_S
        with self._turn:
            self._running.discard(worker)
            if worker in self._again:
                self._again.discard(worker)
                wait_s = 0.0
            if wait_s is not None and worker not in self._forgotten:
                self._schedule(worker, time.monotonic() + wait_s)
            self._turn.notify_all()
