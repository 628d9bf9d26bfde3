"""The file that a restore is writing, and which segment each of its pages came from.

Owns what of it may be left alone: by a new plan after a segment vanished, and, when it is kept, by the next process after this one was
killed. It proves nothing: whoever uses what was left here verifies the finished file, as any other.

A kept file has a journal beside it: a line says which database it is, then ``= N`` how many pages it has from there on, and
``SEGMENT FIRST+COUNT …`` which pages were written from a segment. A line is written after its pages; one that is torn ends the journal.
"""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replicator import locks
from replicator.errors import RestoreError
from replicator.layout import SegmentRef

JOURNAL_SUFFIX = ".pages"

_LINE = re.compile(r"= (\d+)|(\S+\.seg)((?: \d+\+\d+)+)")


class Partial:
    """Pages may be noted by several threads at once; ``prepare`` and ``forget`` while none writes."""

    def __init__(self, fd: int, journal: int | None = None) -> None:
        """fd: of the file. journal: descriptor of its journal, None for a file that is not kept."""
        self._fd = fd
        self._journal = journal
        self._guard = threading.Lock()
        self._identity: tuple[str, int] | None = None  # the database, and the size of its pages
        self._names: dict[str, int] = {}
        self._owners: NDArray[np.uint32] = np.zeros(1, dtype=np.uint32)  # by page number; 0: not written
        self.is_inherited = False
        if journal is not None:
            self._inherit(journal)

    @property
    def is_begun(self) -> bool:
        """Whether it holds a page."""
        return bool(self._names)

    def prepare(self, database: str, page_size: int, page_count: int) -> None:
        """Make it a file of that size. What it holds of another database is gone. Raises OSError."""
        if self._identity != (database, page_size):
            self.forget()
            self._identity = (database, page_size)
            self._note(json.dumps({"database": database, "page_size": page_size}))
        os.ftruncate(self._fd, page_size * page_count)
        self._resize(page_count)
        self._note(f"= {page_count}")

    def forget(self) -> None:
        """Empty it. Raises OSError."""
        os.ftruncate(self._fd, 0)
        if self._journal is not None:
            os.ftruncate(self._journal, 0)
        self._identity = None
        self._names.clear()
        self._resize(0)
        self.is_inherited = False

    def has_of(self, ref: SegmentRef) -> bool:
        return ref.file_name in self._names

    def missing(self, ref: SegmentRef, page_nos: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Those of the pages that are not there as this segment has them."""
        number = self._names.get(ref.file_name)
        return page_nos if number is None else page_nos[self._owners[page_nos] != number]

    def wrote(self, ref: SegmentRef, page_nos: NDArray[np.uint32]) -> None:
        """These pages, ascending, were written as the segment has them. Raises OSError."""
        with self._guard:
            self._own(ref.file_name, page_nos)
            if self._journal is not None and len(page_nos):
                ends = np.flatnonzero(np.diff(page_nos) != 1)
                firsts = page_nos[np.concatenate(([0], ends + 1))]
                counts = np.diff(np.concatenate(([-1], ends, [len(page_nos) - 1])))
                runs = zip(firsts.tolist(), counts.tolist(), strict=True)
                self._note(" ".join((ref.file_name, *(f"{first}+{count}" for first, count in runs))))

    # -- the journal ---------------------------------------------------------------------------------------------------

    def _note(self, line: str) -> None:
        if self._journal is not None:
            data = line.encode() + b"\n"
            while data:
                data = data[os.write(self._journal, data) :]

    def _inherit(self, journal: int) -> None:
        """Take over what an earlier process left."""
        with open(os.dup(journal), "rb") as file:
            file.seek(0)
            whole, _, _ = file.read().rpartition(b"\n")
        head, *lines = whole.decode("ascii", "replace").split("\n")
        try:
            document = json.loads(head)
            self._identity = (str(document["database"]), int(document["page_size"]))
        except (ValueError, KeyError, TypeError):
            return
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None or not self._replay(match):
                break
        self.is_inherited = self.is_begun

    def _replay(self, match: re.Match[str]) -> bool:
        size, name, runs = match.groups()
        if size is not None:
            self._resize(int(size))
            return True
        for first, _, count in (run.partition("+") for run in runs.split()):
            page_nos = np.arange(int(first), int(first) + int(count), dtype=np.uint32)
            if not len(page_nos) or page_nos[-1] >= len(self._owners):
                return False
            self._own(name, page_nos)
        return True

    def _own(self, name: str, page_nos: NDArray[np.uint32]) -> None:
        self._owners[page_nos] = self._names.setdefault(name, len(self._names) + 1)

    def _resize(self, page_count: int) -> None:
        owners = np.zeros(page_count + 1, dtype=np.uint32)
        common = min(len(owners), len(self._owners))
        owners[:common] = self._owners[:common]
        self._owners = owners


def take_journal(path: Path) -> int:
    """Descriptor of the journal at the path, which is this process's alone until it is closed. Raises RestoreError, OSError."""
    descriptor = locks.take(path, os.O_APPEND | os.O_NOFOLLOW)
    if descriptor is None:
        raise RestoreError(f"another restore to this place is under way, and writes {path}; wait for it, or end it")
    return descriptor
