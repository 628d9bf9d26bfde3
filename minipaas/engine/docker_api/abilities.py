"""What an engine on this host cannot do, found out by trying. Pure but for the limits of this process."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path

# What engines give a container where the host allows it, and what is too little for any server.
MAX_ULIMIT, MIN_ULIMIT = 1 << 20, 256


@dataclass(frozen=True)
class Abilities:
    """Found out by trying, and remembered. init: a small init runs as PID 1. ulimits: name and value to lower, () for the
    engine's own."""

    init: bool = True
    ulimits: tuple[tuple[str, int], ...] = ()

    def without(self, message: str) -> Abilities | None:
        """What is left after a failure with this message; None when it is about something else."""
        text = message.lower()
        if self.init and any(each in text for each in ("container-init binary", "docker-init", "catatonit")):
            return replace(self, init=False)
        if "rlimit" in text and (lower := _lower(self.ulimits)):
            return replace(self, ulimits=lower)
        return None


def _lower(ulimits: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """The next to try; () when there is nothing left that an app could live with."""
    if not ulimits:
        return host_ulimits()
    halved = tuple((name, value // 2) for name, value in ulimits)
    return halved if all(value >= MIN_ULIMIT for _, value in halved) else ()


def host_ulimits() -> tuple[tuple[str, int], ...]:
    """This process's hard limits, which a container on this host may have too. Podman lowers nproc to the kernel's pid_max."""
    found = []
    for name, which, top in (
        ("nofile", resource.RLIMIT_NOFILE, MAX_ULIMIT),
        ("nproc", resource.RLIMIT_NPROC, int(Path("/proc/sys/kernel/pid_max").read_text())),
    ):
        hard = resource.getrlimit(which)[1]
        found.append((name, top if hard == resource.RLIM_INFINITY else min(hard, top)))
    return tuple(found)
