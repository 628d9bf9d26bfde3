"""Calls ``step`` of many workers, each by one thread at a time, when they asked to be called or were woken.

Owns the threads. A worker that is idle costs nothing: no timer, no polling. A step that raises is logged, and called again later.
No thread keeps the process from ending, not even one that hangs in a call to a store.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, ParamSpec, Protocol, TypeVar

log = logging.getLogger(__name__)

AFTER_CRASH_S = 5.0
_STALE = 64


class Stepping(Protocol):
    def step(self) -> float | None:
        """Do what can be done now. Seconds until the next call, None to wait for a wake."""
        ...


W = TypeVar("W", bound=Stepping)
P = ParamSpec("P")


class Crew:
    """A few daemon threads that run what they are given, in order. They are started when there is work for them."""

    def __init__(self, threads: int, name: str) -> None:
        self._most = threads
        self._name = name
        self._turn = threading.Condition()
        self._work: deque[Callable[[], object]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._stopping = False

    def submit(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Has no effect after ``stop``."""
        with self._turn:
            if self._stopping:
                return
            self._work.append(lambda: function(*args, **kwargs))
            if self._idle < len(self._work) and len(self._threads) < self._most:
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
            self._turn.notify()

    def stop(self, timeout_s: float) -> bool:
        """Drop what has not begun, and wait for what has. False when that did not end in time."""
        with self._turn:
            self._stopping = True
            self._work.clear()
            self._turn.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            with self._turn:
                self._idle += 1
                self._turn.wait_for(lambda: self._work or self._stopping)
                self._idle -= 1
                if self._stopping:
                    return
                work = self._work.popleft()
            try:
                work()
            except Exception:
                log.exception("work failed in a way that nobody foresaw")


class Scheduler(Generic[W]):
    def __init__(self, threads: int, name: str) -> None:
        self._crew = Crew(threads, name)
        self._turn = threading.Condition()
        self._due: list[tuple[float, int, W]] = []
        self._next_due: dict[W, float] = {}
        self._running: set[W] = set()
        self._again: set[W] = set()
        self._forgotten: weakref.WeakSet[W] = weakref.WeakSet()
        self._order = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-clock", daemon=True)
        self._thread.start()

    def wake(self, worker: W, delay_s: float = 0.0) -> None:
        """Have it called soon: at once, or again right after the step that runs now."""
        with self._turn:
            if worker in self._forgotten:
                return
            if worker in self._running:
                self._again.add(worker)
            else:
                self._schedule(worker, time.monotonic() + delay_s)

    def forget(self, worker: W, timeout_s: float) -> bool:
        """Never call it again; waits for a step that runs now. False when that did not end in time."""
        with self._turn:
            self._forgotten.add(worker)
            self._next_due.pop(worker, None)
            return self._turn.wait_for(lambda: worker not in self._running, timeout_s)

    def is_alive(self, within_s: float) -> bool:
        """Whether the thread runs that has workers called, and nothing holds it up."""
        if not self._turn.acquire(timeout=within_s):
            return False
        self._turn.release()
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> bool:
        """False when a step did not end in time; its thread ends with the process."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        self._thread.join()
        return self._crew.stop(timeout_s)

    def _schedule(self, worker: W, due: float) -> None:
        known = self._next_due.get(worker)
        if known is not None and known <= due:
            return
        self._next_due[worker] = due
        heapq.heappush(self._due, (due, next(self._order), worker))
        if (
            len(self._due) > 2 * len(self._next_due) + _STALE
        ):  # entries of workers that were woken earlier than they asked for
            self._due = [entry for entry in self._due if self._next_due.get(entry[2]) == entry[0]]
            heapq.heapify(self._due)
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
                        self._crew.submit(self._call, worker)
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
            if self._stopping:
                wait_s = None
            if wait_s is not None and worker not in self._forgotten:
                self._schedule(worker, time.monotonic() + wait_s)
            self._turn.notify_all()
