"""How far a download is: a bar with rate and time left on a terminal, a plain line now and then anywhere else. Owns nothing but stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from replicator.cli.words import note
from replicator.values import format_size

if TYPE_CHECKING:
    from replicator.restore import OnProgress

FIRST_LINE_S = 5.0
EVERY_S = 10.0


@contextmanager
def shown(title: str) -> Iterator[OnProgress]:
    if not sys.stderr.isatty():
        yield lines(title, time.monotonic, note)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def lines(title: str, clock: Callable[[], float], say: Callable[[str], None]) -> OnProgress:
    """What is quick stays silent. clock: monotonic seconds."""
    began = clock()
    due = began + FIRST_LINE_S

    def on_progress(done: int, total: int) -> None:
        nonlocal due
        now = clock()
        if now >= due:
            due = now + EVERY_S
            say(words(title, done, total, now - began))

    return on_progress


def words(title: str, done: int, total: int, elapsed_s: float) -> str:
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    text = f"{title}: {format_size(done)} of {format_size(total)} ({100 * done // max(1, total)} %), {format_size(int(rate))}/s"
    if done >= total:
        return f"{text}; all is there, and is verified"
    return f"{text}, about {(total - done) / rate:.0f} s left" if rate else text
