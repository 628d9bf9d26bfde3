"""The first process of a Host: gives it file systems of its own, then reaps. Never runs outside of them.

Owns what a host sees of this machine: state that belongs to the machine is covered, the programs are shared.
Imports only the standard library: it runs by its path, before anything of ours can be found.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

READY = b"ready\n"

EMPTY = ("/run", "/dev/shm")
"""Sockets, locks, named namespaces and shared memory of the machine: an engine would find another host's."""

FROM_DISK = {"/var/lib/containers": "containers", "/var/tmp": "tmp"}
"""Folders where an engine keeps images and layers unless it is told otherwise: they are on the host's own disk."""


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, stdin=subprocess.DEVNULL)


def furnish(disk: Path, lab_root: Path) -> None:
    """Cover this machine's state. ``disk`` goes over the folder of all labs, so that no other host can even be seen."""
    for folder in EMPTY:
        mount("-t", "tmpfs", "-o", "mode=0755", "demo", folder)
    for folder, name in FROM_DISK.items():
        (disk / name).mkdir(parents=True, exist_ok=True)
        if Path(folder).is_dir():
            mount("--bind", str(disk / name), folder)
    mount("--bind", str(disk), str(lab_root))


def reap_for_ever() -> None:
    """Collect the children that nobody else waits for. Only SIGKILL from outside ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            continue


def main(disk: str, lab_root: str, hostname: str) -> None:
    socket.sethostname(hostname)
    furnish(Path(disk), Path(lab_root))
    os.chdir("/")
    os.write(1, READY)
    reap_for_ever()


if __name__ == "__main__":
    main(*sys.argv[1:])
