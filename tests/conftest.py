"""Fixtures of general use. Puts the repository and ``tests`` on the path, so that ``support`` and ``demo`` can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support.seaweed import SeaweedServer  # noqa: E402  (it needs the path set above)


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    """A real S3 server for the whole session; tests keep apart by a prefix of their own."""
    with SeaweedServer() as server:
        yield server
