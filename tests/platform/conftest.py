"""Fixtures of the platform's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from platform_support import Live, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """One node in memory, whose reconciler steps only when the test says so."""
    stage = Stage(tmp_path)
    yield stage
    stage.state.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A whole platform with its threads."""
    with Live(Stage(tmp_path)) as live:
        yield live
