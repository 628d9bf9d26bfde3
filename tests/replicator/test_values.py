"""Times, ages and names at their bounds."""

from __future__ import annotations

import pytest

from replicator.errors import UsageError
from replicator.values import parse_duration, parse_time, printable

NOW_MS = 1_795_000_000_000


@pytest.mark.parametrize(
    "text", ["99999999999d", "9" * 400 + "w", "0001-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "60y", "99y"]
)
def test_a_time_that_cannot_be_meant_is_refused_in_words(text: str) -> None:
    with pytest.raises(UsageError, match="nothing is as old as that|longer than 100 years|is not a time"):
        parse_time(text, NOW_MS)


def test_times_and_ages_within_reach_are_moments() -> None:
    assert parse_time("1970-01-01T00:00:00Z", NOW_MS) == 0
    assert parse_time("1h30m", NOW_MS) == NOW_MS - 5_400_000
    assert parse_time("9999-12-31T23:59:59Z", NOW_MS) > NOW_MS


def test_a_duration_has_a_bound_that_every_wait_can_bear() -> None:
    assert parse_duration("36500d") == 36500 * 86400
    with pytest.raises(UsageError, match="longer than 100 years"):
        parse_duration("36601d")


def test_nothing_that_a_terminal_obeys_is_left_in_a_name() -> None:
    assert printable("a\x1b[2J\nb\u202e\udcff\x9b") == "a\\x1b[2J\\nb\\u202e\\udcff\\x9b"
    assert printable("Zürich 🗄 \\n") == "Zürich 🗄 \\n"
