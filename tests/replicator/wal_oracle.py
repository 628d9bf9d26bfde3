"""What a WAL means, written slowly and plainly, and by SQLite itself: the oracle for the tests of replicator.wal.

Shares no code with it: the checksum is the loop of sqlite.org/fileformat2.html, section 4.2, word by word.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import apsw

from replicator import wal

SALTS = (0x9E3779B9, 0xDEADBEEF)


@dataclass(frozen=True)
class Frame:
    page_no: int
    page_count: int  # 0: not a commit
    data: bytes


@dataclass(frozen=True)
class Commit:
    """images: page number -> offset of its data, pages above page_count left out."""

    end: int
    page_count: int
    images: dict[int, int] = field(default_factory=dict)


def checksum(data: bytes, big_endian: bool, s0: int = 0, s1: int = 0) -> tuple[int, int]:
    order: Literal["big", "little"] = "big" if big_endian else "little"
    for at in range(0, len(data), 8):
        s0 = (s0 + int.from_bytes(data[at : at + 4], order) + s1) % 2**32
        s1 = (s1 + int.from_bytes(data[at + 4 : at + 8], order) + s0) % 2**32
    return s0, s1


def build(frames: Iterable[Frame], page_size: int, big_endian: bool, salts: tuple[int, int] = SALTS) -> bytes:
    head = struct.pack(">6I", 0x377F0683 if big_endian else 0x377F0682, 3007000, page_size, 7, *salts)
    sums = checksum(head, big_endian)
    parts = [head, struct.pack(">2I", *sums)]
    for frame in frames:
        assert len(frame.data) == page_size
        summed = struct.pack(">2I", frame.page_no, frame.page_count)
        sums = checksum(summed + frame.data, big_endian, *sums)
        parts += [summed, struct.pack(">4I", *salts, *sums), frame.data]
    return b"".join(parts)


def frames_of(data: bytes) -> list[Frame]:
    """All whole frames, unchecked."""
    page_size = int.from_bytes(data[8:12], "big")
    found = []
    for at in range(32, len(data) - page_size - 23, page_size + 24):
        page_no, page_count = struct.unpack_from(">2I", data, at)
        found.append(Frame(page_no, page_count, data[at + 24 : at + 24 + page_size]))
    return found


def to_big_endian(data: bytes) -> bytes:
    """The same frames and salts, as a big-endian machine sums them."""
    page_size, _, salt1, salt2 = struct.unpack_from(">4I", data, 8)
    return build(frames_of(data), page_size, True, (salt1, salt2))


def commits(data: bytes) -> list[Commit]:
    """The committed transactions of a WAL with a good header."""
    big_endian = data[3] == 0x83
    page_size = int.from_bytes(data[8:12], "big")
    sums = checksum(data[:24], big_endian)
    found: list[Commit] = []
    images: dict[int, int] = {}
    at = 32
    while at + 24 + page_size <= len(data):
        page_no, page_count, salt1, salt2, *stored = struct.unpack_from(">6I", data, at)
        sums = checksum(data[at : at + 8] + data[at + 24 : at + 24 + page_size], big_endian, *sums)
        if data[at + 8 : at + 16] != data[16:24] or page_no == 0 or tuple(stored) != sums:
            break
        images[page_no] = at + 24
        at += 24 + page_size
        if page_count:
            found.append(Commit(at, page_count, {p: o for p, o in sorted(images.items()) if p <= page_count}))
            images = {}
    return found


def as_commits(transactions: Iterable[wal.Transaction]) -> list[Commit]:
    """What replicator.wal found, in the same form."""
    return [
        Commit(t.end.offset, t.page_count, dict(zip(t.page_nos.tolist(), t.offsets.tolist(), strict=True)))
        for t in transactions
    ]


def apply(db: bytes, data: bytes, transactions: Sequence[wal.Transaction]) -> bytes:
    """The database file after the transactions, one by one."""
    pages = bytearray(db)
    for t in transactions:
        size = t.end.page_size
        pages = pages[: t.page_count * size].ljust(t.page_count * size, b"\0")
        for page_no, offset in zip(t.page_nos.tolist(), t.offsets.tolist(), strict=True):
            pages[(page_no - 1) * size : page_no * size] = data[offset : offset + size]
    return bytes(pages)


def checkpointed(folder: Path, db: bytes, data: bytes) -> bytes:
    """The database file after SQLite itself recovered this WAL and moved it into the database."""
    path = folder / "checkpointed.db"
    for suffix, content in (("", db), ("-wal", data)):
        Path(f"{path}{suffix}").write_bytes(content)
    connection = apsw.Connection(str(path))
    assert connection.pragma("integrity_check") == "ok"
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    after = path.read_bytes()
    connection.close()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return after


class Source:
    """A real database in WAL mode that never checkpoints by itself; its files are read while it is open."""

    def __init__(self, folder: Path, page_size: int = 512, before: str = "") -> None:
        self._path = folder / "source.db"
        self._connection = apsw.Connection(str(self._path))
        self.run(f"PRAGMA page_size={page_size}; {before}; PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0")
        self.run("PRAGMA synchronous=OFF")
        self._observer = apsw.Connection(str(self._path))
        self.commit_ends: list[int] = []

    def run(self, sql: str) -> None:
        self._connection.execute(sql).fetchall()

    def commit(self, sql: str) -> None:
        """Runs what makes one transaction, and notes where it ended in the WAL."""
        self.run(sql)
        self.commit_ends.append(len(self.wal))

    @property
    def db(self) -> bytes:
        return self._path.read_bytes()

    @property
    def wal(self) -> bytes:
        return Path(f"{self._path}-wal").read_bytes()

    def committed_frames(self) -> int:
        """By SQLite's own account."""
        self._observer.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        frames: int = self._observer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0]
        return frames

    def close(self) -> None:
        self._observer.close()
        self._connection.close()
