"""The main promise, on real parts: a host dies while rows are written, and an empty one gives them back within seconds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from demo.lab import LAB_ROOT
from demo.screen import Screen
from demo.story import tell


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_empty_host_takes_the_place_of_a_lost_one_with_everything_up_to_the_last_second(tmp_path: Path) -> None:
    output = io.StringIO()
    before = set(LAB_ROOT.glob("lab-*"))
    summary = tell(Screen(Console(file=output)), writing_s=10.0, logs=tmp_path / "logs")
    told = output.getvalue()
    assert summary.problems == (), told
    assert summary.integrity == "ok"
    assert summary.gapless
    assert summary.acknowledged > 400
    assert 0 < summary.recovered <= summary.acknowledged + 4
    assert summary.rpo_s < 1.0
    assert summary.rto_s < 20.0
    assert set(LAB_ROOT.glob("lab-*")) == before
