"""Fixtures of the platform's tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture
def mount() -> Iterator[Callable[[Path], None]]:
    """Mounts an empty file system at a directory, until the end of the test."""
    mounted: list[Path] = []

    def mount(directory: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(directory)], check=True)
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture
def unmount() -> Callable[[Path], None]:
    return lambda directory: subprocess.run(["umount", str(directory)], check=True) and None
