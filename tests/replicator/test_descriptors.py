"""How many files a process may have open: of a process of its own, since the limit is the process's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, resource
from replicator import raise_descriptor_limit
from replicator.descriptors import shortage
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 100))
assert raise_descriptor_limit() == 100
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)
assert shortage(3) == ""
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(80)]
print(shortage(12))
"""


def test_a_process_may_have_as_many_files_as_the_system_allows_and_says_when_they_run_short() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(
        "12 databases take almost all of the 100 files that this process may have open; allow more"
    )
