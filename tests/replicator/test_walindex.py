"""Claims about frames and wal-indexes that are written here: SQLite and the reader of WALs take them for SQLite's own."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import DatabaseNotReplicable, FormatError
from replicator.followed import FollowedCopy, WrittenByOthers
from replicator.wal import Scanner, encode_frames, encode_header, parse_header
from replicator.walindex import BLOCK_BYTES, HEADER_BYTES, IndexHeader, Stretch, entered, stretches

FIRST = 4062
"""Frames that the first block of a wal-index knows."""


@given(st.lists(st.tuples(st.integers(1, 2**32 - 2), st.binary(min_size=512, max_size=512)), min_size=1), st.booleans())
def test_frames_that_are_written_are_read_as_one_commit(pages: list[tuple[int, bytes]], big_endian: bool) -> None:
    head, cursor = encode_header(512, 0xFFFFFFFF, 7, big_endian)
    assert parse_header(head).cursor() == cursor
    half = len(pages) // 2
    frames = b""
    if half:
        frames, cursor = encode_frames(cursor, pages[:half], 0)
    more, end = encode_frames(cursor, pages[half:], 2**32 - 2)
    (transaction,) = Scanner(parse_header(head).cursor()).feed(frames + more)
    assert transaction.end == end
    last = dict(pages)
    assert transaction.page_nos.tolist() == sorted(last)
    for page_no, offset in zip(transaction.page_nos.tolist(), transaction.offsets.tolist(), strict=True):
        assert (frames + more)[offset - 32 : offset - 32 + 512] == last[page_no]


def sqlite_index(path: Path, transactions: int, rows: int) -> bytes:
    """The wal-index that SQLite makes; the last transaction is as large as all before it."""
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode=wal; PRAGMA page_size=512").fetchall()
    connection.wal_autocheckpoint(0)
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body BLOB)")
    for _ in range(transactions):
        connection.execute(
            "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO t(body) SELECT randomblob(400) FROM n",
            (rows,),
        )
    index = Path(f"{path}-shm").read_bytes()
    connection.close()
    return index


@pytest.mark.parametrize("transactions, rows", [(3, 20), (2, 1500), (3, 3000)])
def test_the_tables_are_those_that_sqlite_makes(tmp_path: Path, transactions: int, rows: int) -> None:
    index = sqlite_index(tmp_path / "app.db", transactions, rows)
    header = IndexHeader.decode(index[:HEADER_BYTES])
    assert header.encode() * 2 == index[:HEADER_BYTES]
    numbers = struct.unpack(f"={len(index) // 4}I", index)
    page_nos = [*numbers[34:4096]]
    for block in range(1, len(index) // BLOCK_BYTES):
        page_nos += numbers[block * 8192 : block * 8192 + 4096]
    page_nos = page_nos[: header.frames]
    for known in (0, header.frames // 3, header.frames - 1):
        for stretch in stretches(known, page_nos[known:]):
            at = stretch.block * BLOCK_BYTES
            skip = 136 if stretch.block == 0 else 0
            ours = entered(index[at : at + BLOCK_BYTES], stretch)
            assert ours[skip:] == index[at + skip : at + BLOCK_BYTES]


def test_a_block_forgets_what_a_writer_left_that_never_committed() -> None:
    empty = bytes(BLOCK_BYTES)
    block = entered(empty, Stretch(1, 0, [5, 6, 7]))
    assert entered(entered(block, Stretch(1, 3, [8, 9])), Stretch(1, 3, [10])) == entered(block, Stretch(1, 3, [10]))


@pytest.mark.parametrize("frames, blocks", [(0, [0]), (FIRST - 1, [0, 1]), (FIRST, [1]), (FIRST + 4095, [1, 2])])
def test_frames_go_to_the_block_they_belong_to(frames: int, blocks: list[int]) -> None:
    found = list(stretches(frames, range(1, 3)))
    assert [stretch.block for stretch in found] == blocks
    assert sum(len(stretch.page_nos) for stretch in found) == 2
    assert found[0].known == (frames if frames < FIRST else frames - FIRST)


@pytest.mark.parametrize("at", [0, 8, 12, 16, 40, 48, 90])
def test_a_header_that_is_being_written_is_not_believed(tmp_path: Path, at: int) -> None:
    index = bytearray(sqlite_index(tmp_path / "app.db", 1, 5)[:HEADER_BYTES])
    index[at] ^= 1
    with pytest.raises(FormatError):
        IndexHeader.decode(bytes(index))


def copy_of(folder: Path, journal_mode: str = "wal") -> Path:
    path = folder / "copy.db"
    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA journal_mode={journal_mode}; CREATE TABLE t (x); INSERT INTO t VALUES (1)").fetchall()
    connection.close()
    return path


def test_an_error_while_pages_come_leaves_the_copy_as_it_was(tmp_path: Path) -> None:
    path = copy_of(tmp_path)
    before = path.read_bytes()
    copy = FollowedCopy(path)
    copy.hashes()

    def pages() -> object:
        for page_no in range(1, 600):
            yield page_no, os.urandom(4096)
        raise KeyError("the store is away")

    with pytest.raises(KeyError):
        copy.put(pages(), 600)  # type: ignore[arg-type]
    reader = apsw.Connection(str(path))
    assert reader.execute("SELECT x FROM t").get == 1 and reader.execute("PRAGMA integrity_check").get == "ok"
    copy.put([(1, before[:4096]), (2, before[4096:])], 2)
    assert reader.execute("SELECT x FROM t").get == 1
    reader.execute("INSERT INTO t VALUES (2)")
    with pytest.raises(WrittenByOthers):
        copy.put([(1, before[:4096])], 2)
    reader.close()
    copy.close()


def test_a_copy_without_a_wal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotReplicable, match="not in WAL mode"):
        FollowedCopy(copy_of(tmp_path, "delete"))
