"""``python -m demo``: tells the story on this terminal; exit code 0 when everything came back, else 1. Owns the exit code."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from demo.lab import LabError
from demo.screen import Screen
from demo.seaweed import SeaweedError
from demo.story import StoryError, summary_rows, tell, verdict
from images.make_base import BaseImageFailed

INTERRUPTED = 130


def interrupt(number: int, frame: FrameType | None) -> None:
    """Being told to end takes everything down, as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    screen = Screen()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        summary = tell(screen)
    except (StoryError, LabError, SeaweedError, BaseImageFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; everything it started has been taken down", file=sys.stderr)
        return INTERRUPTED
    screen.summary(summary_rows(summary), verdict(summary), summary.good)
    return 0 if summary.good else 1


if __name__ == "__main__":
    sys.exit(main())
