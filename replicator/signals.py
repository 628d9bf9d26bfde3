"""Signals to this process, heard whatever its main thread waits for. Owns the thread that acts on them; decides nothing.

Python runs a handler in the main thread, and only when that runs: a signal that the kernel gave to another thread, or that came just before
the main thread began to wait for a lock, would be heard when the wait is over. A byte in a pipe is there at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

_END = 0


@contextmanager
def heard(numbers: Collection[int], act: Callable[[int], object]) -> Iterator[None]:
    """Inside, ``act`` is called with each of these signals that comes, by one thread. For the main thread only."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while (number := os.read(reader, 1)[0]) != _END:
            if number in numbers:
                act(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda received, frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        os.set_blocking(writer, True)
        os.write(writer, bytes([_END]))
        thread.join()
        os.close(reader)
        os.close(writer)
