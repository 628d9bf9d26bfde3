"""Named points at which a test can have the process die. Owns the names; does nothing unless REPLICATOR_FAILPOINT is set.

``REPLICATOR_FAILPOINT=name`` kills the process with SIGKILL when it first comes past that point; ``name:3`` the third time.
"""

from __future__ import annotations

import os
import signal

NAMES = (
    "before-spool-write",
    "after-spool-write",
    "before-upload",
    "after-upload",
    "after-upload-recorded",
    "before-base-write",
    "after-base-write",
    "before-checkpoint",
    "under-barrier",
    "after-checkpoint",
)
FOLLOW_NAMES = (
    "before-followed-restore",
    "after-followed-restore",
    "before-followed-frames",
    "before-followed-commit",
    "before-followed-index",
    "after-followed-index",
)
"""Those of a copy that follows, which no replicator comes past."""
UPKEEP_NAMES = (
    "before-merge-upload",
    "after-merge-upload",
    "after-merge-verified",
    "before-delete",
    "after-delete",
)
"""Those that a replicator comes past only once in a while, unless it is told to be quick about it."""

_name, _, _count = os.environ.get("REPLICATOR_FAILPOINT", "").partition(":")
_left = int(_count or 1)


def reach(name: str) -> None:
    """Die here, if this is the point that the environment names."""
    global _left
    assert name in (*NAMES, *FOLLOW_NAMES, *UPKEEP_NAMES), name
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
