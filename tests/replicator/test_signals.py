"""Claims about signals: one that comes is heard, whoever the kernel gives it to and whatever the main thread waits for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from replicator.signals import heard


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_signal_that_another_thread_gets_is_heard_at_once() -> None:
    found: list[int] = []
    came, leave = threading.Event(), threading.Event()

    def note(number: int) -> None:
        found.append(number)
        came.set()

    other = threading.Thread(target=leave.wait)
    other.start()
    try:
        with heard([signal.SIGUSR1, signal.SIGUSR2], note):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                came.clear()
                assert other.ident is not None
                threading.Timer(0.05, signal.pthread_kill, (other.ident, number)).start()
                assert came.wait(20)
    finally:
        leave.set()
        other.join()
    assert found == [signal.SIGUSR1, signal.SIGUSR2]


def test_a_main_thread_that_waits_without_end_is_told_of_a_signal_to_another() -> None:
    program = """
import signal, threading
from replicator.signals import heard
told = threading.Event()
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
threading.Timer(0.2, signal.pthread_kill, (other.ident, signal.SIGTERM)).start()
with heard([signal.SIGTERM], lambda number: told.set()):
    told.wait()
print("heard")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, "heard\n"), ended.stderr


def test_afterwards_everything_is_as_it_was() -> None:
    handler, threads, descriptors = signal.getsignal(signal.SIGUSR1), threading.active_count(), open_descriptors()
    with heard([signal.SIGUSR1], lambda number: None):
        assert threading.active_count() == threads + 1
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors
