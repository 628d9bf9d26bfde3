"""``restore --follow``: runs until it is told to stop. Owns its signals and its words."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from replicator.cli import progress
from replicator.values import format_time, printable

if TYPE_CHECKING:
    from replicator.follow import Followed
    from replicator.restore_plan import RestoreOptions
    from replicator.store import ObjectStore

SAY_EVERY_S = 5.0


def run(store: ObjectStore, target: Path, options: RestoreOptions, interval_s: float, as_json: bool) -> int:
    from replicator.daemon import set_up_logging
    from replicator.follow import Follower, follow, words

    stop = threading.Event()
    set_up_logging("info", "text")
    said_at = -SAY_EVERY_S

    def on_signal(number: int, _: FrameType | None) -> None:
        """The second ends it at once."""
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    def tell(found: Followed) -> None:
        """A line for a change, and not more than one in a few seconds."""
        nonlocal said_at
        if found.changed and time.monotonic() - said_at >= SAY_EVERY_S:
            said_at = time.monotonic()
            say(found)

    def say(found: Followed) -> None:
        if as_json:
            document = {
                "target": str(target),
                "position": str(found.position),
                "last_commit": format_time(found.commit_ms),
                "lag_s": round(found.lag_s, 3),
            }
            click.echo(json.dumps(document))
        else:
            click.echo(printable(words(found, target)))

    follower = Follower(store, target, options)
    try:
        with progress.shown(str(target)) as on_progress:
            position = follower.open(on_progress)
        click.echo(printable(f"{target} follows {store.url}" + (f" from {position} on" if position else "")), err=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        follow(follower, interval_s, stop.wait, tell)
    finally:
        follower.close()
    return 0
