"""Where nothing can be overwritten, a step is plain lines without control characters; the summary ends with the verdict."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from demo.screen import Screen


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def screen(output: io.StringIO) -> Screen:
    return Screen(Console(file=output, width=80))


def test_a_step_says_when_it_begins_and_how_it_ended(screen: Screen, output: io.StringIO) -> None:
    with screen.step("Node a [starts]") as step:
        step.detail("on 10.0.0.1")
    first, last = output.getvalue().splitlines()
    assert first == "… Node a [starts]"
    assert last.startswith("✓ Node a [starts]  on 10.0.0.1  0.")


def test_a_step_that_fails_is_marked_and_the_error_goes_on(screen: Screen, output: io.StringIO) -> None:
    with pytest.raises(RuntimeError), screen.step("Node a starts"):
        raise RuntimeError
    assert output.getvalue().splitlines()[-1].startswith("✗ Node a starts")


def test_the_summary_is_a_line_for_each_row_and_then_the_verdict(screen: Screen, output: io.StringIO) -> None:
    screen.summary([("RPO", "0.20 s", "a"), ("RTO", "3.1 s", "b")], "Good: all is back.", good=True)
    lines = output.getvalue().splitlines()
    assert [line.split() for line in lines[:2]] == [["RPO", "0.20", "s", "a"], ["RTO", "3.1", "s", "b"]]
    assert lines[2] == "Good: all is back."


def test_a_terminal_gets_the_same_words() -> None:
    output = io.StringIO()
    screen = Screen(Console(file=output, width=80, force_terminal=True))
    with screen.step("Node a starts") as step:
        step.detail("on 10.0.0.1")
    screen.summary([("RPO", "0.20 s", "a")], "Good: all is back.", good=True)
    assert all(words in output.getvalue() for words in ("Node a starts", "on 10.0.0.1", "0.20 s", "Good: all is back."))
