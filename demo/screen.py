"""What the demo shows: live steps on a terminal, plain lines elsewhere, and the summary.

Owns the words' layout and nothing else; never starts or measures anything but its own clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 3.0
"""How often a detail that changes is printed where it cannot be overwritten."""


class Step:
    """The step under way; ``detail`` replaces what stands behind its title."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._detail = ""
        self._spinner = Spinner("dots", style="cyan")
        self._started_s = time.monotonic()
        self._printed_s = time.monotonic()

    def detail(self, text: str) -> None:
        self._detail = text
        now_s = time.monotonic()
        if text and not self._console.is_terminal and now_s - self._printed_s >= PLAIN_EVERY_S:
            self._printed_s = now_s
            self._console.print(f"    {text}", markup=False, highlight=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """What stands behind the title in the end."""
        self._detail = text

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started_s

    def __rich__(self) -> Table:
        """Drawn anew many times a second by Live, so that the clock runs."""
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_column(no_wrap=True)
        clock = Text(f"{self.seconds:.1f} s", style="dim")
        line.add_row(self._spinner, Text(self._title), Text(self._detail, style="cyan"), clock)
        return line

    def done_line(self, mark: str, style: str) -> Text:
        return Text.assemble(
            (f"{mark} ", style),
            self._title,
            (f"  {self._detail}" if self._detail else "", "cyan"),
            (f"  {self.seconds:.1f} s", "dim"),
        )


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show the step until the block ends; a mark tells whether it ended well."""
        step = Step(self.console, title)
        mark, style = "✗", "bold red"
        try:
            if self.console.is_terminal:
                with Live(step, console=self.console, refresh_per_second=12, transient=True):
                    yield step
            else:
                self.console.print(f"… {title}", markup=False, highlight=False, soft_wrap=True)
                yield step
            mark, style = "✓", "bold green"
        finally:
            self.console.print(step.done_line(mark, style), soft_wrap=True)

    def summary(self, rows: Sequence[tuple[str, str, str]], verdict: str, good: bool) -> None:
        """rows: what, value, what exactly was measured."""
        if not self.console.is_terminal:
            for what, value, meaning in rows:
                self.console.print(
                    f"{what:<20} {value:<26} {meaning}".rstrip(), markup=False, highlight=False, soft_wrap=True
                )
            self.console.print(verdict, markup=False, highlight=False, soft_wrap=True)
            return
        table = Table.grid(padding=(0, 2))
        for what, value, meaning in rows:
            table.add_row(Text(what), Text(value, style="bold"), Text(meaning, style="dim"))
        self.console.print(Panel(table, title="Summary", border_style="green" if good else "red", expand=False))
        self.console.print(Text(verdict, style="bold green" if good else "bold red"))
