"""How many files this process may have open, and when it has almost as many.

Owns RLIMIT_NOFILE. Never opens or closes anything.
"""

from __future__ import annotations

import os
import resource

NEARLY = 0.8


def raise_descriptor_limit() -> int:
    """Have as many as the system allows, instead of the 1024 that are usual; each database takes about seven. The limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def shortage(databases: int) -> str:
    """Words for a process that has almost as many as it may, '' when there are plenty. databases: how many it replicates."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with os.scandir("/proc/self/fd") as found:
        used = sum(1 for _ in found)
    if limit == resource.RLIM_INFINITY or used < NEARLY * limit:
        return ""
    return (
        f"{databases} databases take almost all of the {limit} files that this process may have open; allow more with `ulimit -n`, "
        "or LimitNOFILE= in its systemd unit"
    )
