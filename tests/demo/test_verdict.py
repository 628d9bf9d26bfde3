"""The verdict is good only when the rows that came back are a gapless, unchanged prefix that ends less than a second early."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demo.verdict import Recovery, Row, judge
from demo.writer import Acknowledged, Ledger

RATE = 50


def ledger(count: int, unanswered: frozenset[str] = frozenset()) -> Ledger:
    """Row n was acknowledged n/50 s after the start; the wall clock shows 1000 s more."""
    rows = (Acknowledged(n, f"entry {n}", n / RATE, 1000 + n / RATE) for n in range(1, count + 1))
    return Ledger(tuple(rows), unanswered)


def recovery(count: int, power_off_s: float = 10.0) -> Recovery:
    rows = [Row(n, f"entry {n}") for n in range(1, count + 1)]
    return Recovery(power_off_s, command_s=20.0, first_answer_s=27.5, integrity="ok", rows=rows)


def test_losing_the_last_half_second_is_good() -> None:
    summary = judge(ledger(500), recovery(475))
    assert summary.good
    assert (summary.acknowledged, summary.recovered, summary.gapless) == (500, 475, True)
    assert summary.rpo_s == pytest.approx(0.5)
    assert summary.rto_s == 7.5
    assert summary.last_moment_s == 1009.5


def test_a_committed_row_that_was_never_acknowledged_may_come_back() -> None:
    came_back = replace(recovery(500), rows=[*recovery(500).rows, Row(501, "entry x")])
    assert judge(ledger(500, frozenset({"entry x"})), came_back).good


@pytest.mark.parametrize(
    ("came_back", "reason"),
    [
        (recovery(400), "2.00 s of rows were lost"),
        (recovery(0), "no row was recovered"),
        (replace(recovery(500), integrity="row 3 missing from index"), "row 3 missing from index"),
        (replace(recovery(500), first_answer_s=41.0), "recovery took 21.0 s"),
        (replace(recovery(500), rows=recovery(500).rows[1:]), "without a gap"),
        (replace(recovery(500), rows=[Row(1, "entry 2"), *recovery(500).rows[1:]]), "1 rows came back with another"),
        (replace(recovery(500), rows=[*recovery(500).rows, Row(501, "who?")]), "1 rows came back that nobody sent"),
    ],
)
def test_everything_else_is_bad_and_says_why(came_back: Recovery, reason: str) -> None:
    summary = judge(ledger(500), came_back)
    assert not summary.good
    assert any(reason in problem for problem in summary.problems)


def test_a_ledger_without_a_row_is_bad() -> None:
    assert "no row was acknowledged" in judge(ledger(0), recovery(0)).problems
