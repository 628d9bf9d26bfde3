"""Who works on a node's data directory: one process at a time.

Owns its lock. Never looks at what is in it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from minipaas.errors import AlreadyRunning, NotFound
from minipaas.settings import Settings


@contextmanager
def data_lock(settings: Settings) -> Iterator[None]:
    """Only one process works on a data directory. Raises AlreadyRunning, NotFound."""
    try:
        descriptor = os.open(settings.lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        raise NotFound(f"{settings.data_dir} does not exist; make it a node with: minipaas setup") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"another minipaas works on {settings.data_dir}; stop it first") from None
    try:
        yield
    finally:
        os.close(descriptor)
