"""Files that one process at a time has: locked with flock, as long as the descriptor is open. Never locks a live database."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def take(path: Path, flags: int = 0) -> int | None:
    """Descriptor of the file at the path, which is made if it is missing and is this process's alone until it is closed.

    None while another process has it. flags: for opening it, beside those that make it. Raises OSError when it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.fstat(descriptor).st_nlink > 0  # else its holder has removed it just now
    except OSError:
        is_ours = False
    if is_ours:
        return descriptor
    os.close(descriptor)
    return None
