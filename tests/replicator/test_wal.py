"""replicator.wal against real WALs, and against the slow oracle."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import wal_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from wal_oracle import Frame, Source, as_commits

from replicator import wal
from replicator.errors import WalHeaderDamaged
from replicator.wal import Cursor, Scanner, Stop, Transaction

MakeSource = Callable[..., Source]


class Scan(NamedTuple):
    transactions: list[Transaction]
    cursor: Cursor
    stopped: Stop


def scan(frames: bytes | memoryview, at: Cursor) -> Scan:
    scanner = Scanner(at)
    return Scan(scanner.feed(frames), scanner.cursor, scanner.stopped)


def scan_all(data: bytes) -> Scan:
    return scan(data[wal.HEADER_SIZE :], wal.parse_header(data).cursor())


def scanner_of(data: bytes) -> Scanner:
    return Scanner(wal.parse_header(data).cursor())


def last_header(scanner: Scanner, data: bytes) -> bytes:
    at = scanner.offset - scanner.cursor.frame_size
    return data[at : at + wal.FRAME_HEADER_SIZE]


def fill(rows: int, size: int = 200) -> str:
    """Statement that adds rows of that many bytes."""
    return (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) "
        f"INSERT INTO t(v) SELECT randomblob({size}) FROM n;"
    )


@pytest.fixture
def make_source(tmp_path: Path) -> Iterator[MakeSource]:
    made: list[Source] = []

    def make(page_size: int = 512, before: str = "") -> Source:
        made.append(Source(tmp_path, page_size, before))
        made[-1].commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
        return made[-1]

    yield make
    for source in made:
        source.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """A few dozen frames of 512 bytes in several transactions of different size."""
    source = Source(tmp_path_factory.mktemp("small"))
    source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    for rows in (1, 4, 2, 9):
        source.commit(fill(rows))
    source.commit("UPDATE t SET v = randomblob(150) WHERE id % 3 = 0")
    source.commit("DELETE FROM t WHERE id = 2")
    yield source
    source.close()


# -- the committed prefix ----------------------------------------------------------------------------------------------


def test_a_wal_cut_at_any_byte_gives_exactly_the_committed_prefix(small: Source) -> None:
    data, whole = small.wal, oracle.commits(small.wal)
    assert [c.end for c in whole] == small.commit_ends
    assert len(data) > 24 * 536
    for cut in range(wal.HEADER_SIZE, len(data) + 1):
        found = scan_all(data[:cut])
        prefix = sum(end <= cut for end in small.commit_ends)
        assert [t.end.offset for t in found.transactions] == small.commit_ends[:prefix]
        assert found.stopped is Stop.END
        assert found.cursor.offset == (small.commit_ends[prefix - 1] if prefix else wal.HEADER_SIZE)
    assert as_commits(scan_all(data).transactions) == whole


def test_a_cut_wal_means_the_same_as_to_sqlite(small: Source, tmp_path: Path) -> None:
    data = small.wal
    cuts = [c for end in small.commit_ends for c in (end - 1, end, end + 100)] + [len(data) * 2 // 3]
    for cut in cuts:
        ours = oracle.apply(small.db, data, scan_all(data[:cut]).transactions)
        assert ours == oracle.checkpointed(tmp_path, small.db, data[:cut])


def test_the_last_images_give_the_same_database_as_the_transactions_one_by_one(make_source: MakeSource) -> None:
    source = make_source()
    for sql in (fill(40), "DELETE FROM t WHERE id < 30", "VACUUM", fill(3), "UPDATE t SET v = 1"):
        source.commit(sql)
    data, db = source.wal, source.db
    transactions = scan_all(data).transactions
    for first in range(len(transactions)):
        for last in range(first + 1, len(transactions) + 1):
            base = oracle.apply(db, data, transactions[:first])
            page_nos, offsets = wal.last_image(transactions[first:last])
            end = transactions[last - 1]
            merged = wal.Transaction(end.page_count, end.end, page_nos, offsets)
            assert oracle.apply(base, data, [merged]) == oracle.apply(db, data, transactions[:last])
            assert page_nos.tolist() == sorted(set(page_nos.tolist()))


def test_the_last_image_of_nothing_is_empty() -> None:
    page_nos, offsets = wal.last_image([])
    assert (len(page_nos), len(offsets)) == (0, 0)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("page_size", [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536])
def test_every_page_size_and_byte_order_means_the_same_as_to_sqlite(
    make_source: MakeSource, tmp_path: Path, page_size: int, big_endian: bool
) -> None:
    source = make_source(page_size)
    source.commit(fill(6, page_size // 2))
    source.commit("DELETE FROM t WHERE id = 3")
    data = oracle.to_big_endian(source.wal) if big_endian else source.wal
    header = wal.parse_header(data)
    assert (header.page_size, header.big_endian) == (page_size, big_endian)
    found = scan_all(data)
    assert [t.end.offset for t in found.transactions] == source.commit_ends
    assert oracle.apply(source.db, data, found.transactions) == oracle.checkpointed(tmp_path, source.db, data)


def test_a_transaction_of_thousands_of_frames_is_one_transaction(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    source.commit(fill(3000, 300))
    data = source.wal
    found = scan_all(data)
    assert len(found.transactions[-1].page_nos) > 2000
    assert as_commits(found.transactions) == oracle.commits(data)
    assert oracle.apply(source.db, data, found.transactions) == oracle.checkpointed(tmp_path, source.db, data)


def test_vacuum_drops_the_pages_that_it_cut_off(make_source: MakeSource) -> None:
    source = make_source()
    source.commit(fill(60))
    source.commit("DELETE FROM t WHERE id > 2")
    source.commit("VACUUM")
    *_, grown, _, shrunk = scan_all(source.wal).transactions
    assert shrunk.page_count < grown.page_count
    page_nos, _ = wal.last_image([grown, shrunk])
    assert page_nos.max() <= shrunk.page_count


def test_pages_spilled_and_cut_off_in_one_transaction_are_dropped(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(before="PRAGMA auto_vacuum=FULL")
    source.run("PRAGMA cache_size=5")
    source.commit(f"BEGIN; {fill(100)} DELETE FROM t WHERE id > 2; COMMIT")
    data = source.wal
    found = scan_all(data)
    count = found.transactions[-1].page_count
    assert max(f.page_no for f in oracle.frames_of(data)) > count
    assert found.transactions[-1].page_nos.max() <= count
    assert oracle.apply(source.db, data, found.transactions) == oracle.checkpointed(tmp_path, source.db, data)


# -- what never counts -------------------------------------------------------------------------------------------------


def test_rolled_back_frames_are_never_returned(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    source.run(f"PRAGMA cache_size=5; BEGIN; {fill(50)}")
    spilled = scanner_of(source.wal)
    assert [t.end.offset for t in spilled.feed(source.wal[32:])] == source.commit_ends
    assert spilled.pending_frames > 20
    source.run("ROLLBACK")
    source.run("INSERT INTO t(v) VALUES ('kept')")
    data = source.wal
    found = scan_all(data)
    assert (len(found.transactions), found.stopped) == (2, Stop.CHECKSUM)
    assert oracle.apply(source.db, data, found.transactions) == oracle.checkpointed(tmp_path, source.db, data)


def test_a_rolled_back_savepoint_is_never_returned(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    source.run("PRAGMA cache_size=5")
    source.run(f"BEGIN; {fill(30)} SAVEPOINT s; {fill(80)} UPDATE t SET v = 'lost'; ROLLBACK TO s; {fill(2)} COMMIT")
    data = source.wal
    found = scan_all(data)
    assert len(found.transactions) == 2
    after = oracle.apply(source.db, data, found.transactions)
    assert after == oracle.checkpointed(tmp_path, source.db, data)
    assert b"lost" not in after


def test_a_spilled_transaction_is_returned_once_when_it_commits(make_source: MakeSource) -> None:
    source = make_source()
    source.run(f"PRAGMA cache_size=5; BEGIN; {fill(30, 480)}")
    scanner = scanner_of(source.wal)
    assert len(scanner.feed(source.wal[32:])) == 1
    assert scanner.pending_frames > 0
    source.run("COMMIT")
    data = source.wal
    if not scanner.still_there(last_header(scanner, data)):
        scanner = Scanner(scanner.cursor)
    assert as_commits(scanner.feed(data[scanner.offset :])) == oracle.commits(data)[1:]
    assert scanner.feed(data[scanner.offset :]) == []


def test_frames_rewritten_in_place_by_their_own_transaction_are_noticed(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source()
    source.commit(fill(60))
    source.run("PRAGMA cache_size=5; BEGIN; UPDATE t SET v = randomblob(200)")
    scanner = scanner_of(source.wal)
    scanner.feed(source.wal[32:])
    assert scanner.pending_frames > 20
    source.run("UPDATE t SET v = randomblob(200); COMMIT")
    data = source.wal
    assert scanner.feed(data[scanner.offset :]) == []
    assert not scanner.still_there(last_header(scanner, data))
    again = Scanner(scanner.cursor).feed(data[scanner.cursor.offset :])
    transactions = scan_all(data).transactions
    assert as_commits(again) == as_commits(transactions[2:])
    assert len(again) == 1
    assert oracle.apply(source.db, data, transactions) == oracle.checkpointed(tmp_path, source.db, data)


def test_still_there_notices_that_pending_frames_were_overwritten_after_a_rollback(make_source: MakeSource) -> None:
    source = make_source()
    source.run(f"PRAGMA cache_size=5; BEGIN; {fill(20)}")
    scanner = scanner_of(source.wal)
    scanner.feed(source.wal[32:])
    assert scanner.pending_frames > 5
    assert scanner.still_there(last_header(scanner, source.wal))
    source.run("ROLLBACK")
    assert scanner.still_there(last_header(scanner, source.wal))
    source.run(fill(60))
    assert not scanner.still_there(last_header(scanner, source.wal))
    assert len(Scanner(scanner.cursor).feed(source.wal[scanner.cursor.offset :])) == 1


def test_overtaken_notices_a_commit_shorter_than_the_pending_frames_that_it_overwrote(make_source: MakeSource) -> None:
    source = make_source()
    source.run(f"PRAGMA cache_size=5; BEGIN; {fill(50)}")
    scanner = scanner_of(source.wal)
    scanner.feed(source.wal[32:])
    assert not scanner.overtaken(source.committed_frames())
    source.run("ROLLBACK")
    assert not scanner.overtaken(source.committed_frames())
    source.run("INSERT INTO t(v) VALUES ('short')")
    assert scanner.feed(source.wal[scanner.offset :]) == []
    assert scanner.still_there(last_header(scanner, source.wal))
    assert scanner.overtaken(source.committed_frames())
    fresh = Scanner(scanner.cursor)
    assert len(fresh.feed(source.wal[fresh.offset :])) == 1
    assert not fresh.overtaken(source.committed_frames())


def test_still_there_with_nothing_pending_compares_with_the_commit_frame(small: Source) -> None:
    data = small.wal
    scanner = scanner_of(data)
    assert scanner.still_there(b"")
    scanner.feed(data[32:])
    header = last_header(scanner, data)
    for known in (scanner, Scanner(scanner.cursor)):
        assert known.still_there(header)
        assert not known.still_there(header[:-1])
        assert not known.still_there(bytes(24))
        assert not known.still_there(data[32:56])


def test_frames_of_an_older_generation_behind_the_new_ones_stop_with_salt(make_source: MakeSource) -> None:
    source = make_source()
    source.commit(fill(30))
    old = source.wal
    source.run("PRAGMA wal_checkpoint(RESTART)")
    source.run("INSERT INTO t(v) VALUES (1)")
    data = source.wal
    assert len(data) == len(old)
    scanner = scanner_of(data)
    assert len(scanner.feed(data[32:])) == 1
    assert (scanner.stopped, scanner.pending_frames) == (Stop.SALT, 0)
    source.run("INSERT INTO t(v) VALUES (2)")
    assert len(scanner.feed(source.wal[scanner.offset :])) == 1
    assert not scanner_of(old).feed(data[32:])


def test_flipping_any_bit_stops_before_the_transaction_that_holds_it(small: Source) -> None:
    data, whole = small.wal, oracle.commits(small.wal)

    @settings(max_examples=300, deadline=None)
    @given(st.integers(8 * wal.HEADER_SIZE, 8 * len(data) - 1))
    def check(bit: int) -> None:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        found = scan_all(bytes(damaged))
        frame_start = bit // 8 - (bit // 8 - wal.HEADER_SIZE) % 536
        assert as_commits(found.transactions) == [c for c in whole if c.end <= frame_start]
        assert found.stopped is not Stop.END

    check()


def test_a_frame_for_page_zero_stops() -> None:
    frames = [Frame(1, 1, bytes(512)), Frame(0, 1, bytes(512)), Frame(1, 1, bytes(512))]
    found = scan_all(oracle.build(frames, 512, False))
    assert (len(found.transactions), found.stopped) == (1, Stop.PAGE_ZERO)


def test_frames_far_behind_the_one_that_stopped_the_scan_do_not_matter() -> None:
    frames = [Frame(1, 1, bytes(512)), Frame(0, 1, bytes(512))] + [Frame(1, 1, bytes(512))] * 2200
    found = scan_all(oracle.build(frames, 512, False))
    assert (len(found.transactions), found.stopped) == (1, Stop.PAGE_ZERO)


# -- feeding -----------------------------------------------------------------------------------------------------------


def test_feeding_in_pieces_of_any_size_gives_what_one_scan_gives(small: Source) -> None:
    data, whole = small.wal, scan_all(small.wal)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 3000), max_size=30))
    def check(sizes: list[int]) -> None:
        scanner = scanner_of(data)
        transactions: list[wal.Transaction] = []
        for size in [*sizes, len(data)]:
            transactions += scanner.feed(data[scanner.offset : scanner.offset + size])
            resumed = Scanner(scanner.cursor)
            resumed.feed(data[resumed.offset : scanner.offset])
            assert (resumed.offset, resumed.pending_frames) == (scanner.offset, scanner.pending_frames)
        assert as_commits(transactions) == as_commits(whole.transactions)
        assert [t.end for t in transactions] == [t.end for t in whole.transactions]
        assert (scanner.cursor, scanner.stopped) == (whole.cursor, whole.stopped)

    check()


@pytest.mark.parametrize("big_endian", [False, True])
def test_a_view_at_an_odd_address_is_read_as_well(small: Source, big_endian: bool) -> None:
    data = oracle.to_big_endian(small.wal) if big_endian else small.wal
    view = memoryview(b"xyz" + data)[3:]
    found = scan(view[wal.HEADER_SIZE :], wal.parse_header(view).cursor())
    assert as_commits(found.transactions) == oracle.commits(data)


def frame_data(seed: int) -> bytes:
    """512 bytes; the small seeds are the extremes of the arithmetic."""
    extremes = [bytes(512), b"\xff" * 512, b"\x80\0\0\0" * 128, b"\0\0\0\x80" * 128]
    return extremes[seed] if seed < len(extremes) else random.Random(seed).randbytes(512)


frames_strategy = st.lists(
    st.builds(
        Frame,
        st.sampled_from([1, 2, 3, 4, 5, 9, 0xFFFFFFFE]),
        st.sampled_from([0, 0, 1, 3, 9, 0xFFFFFFFE]),
        st.integers(0, 40).map(frame_data),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(frames_strategy, st.booleans(), st.integers(0, 8191), st.integers(0, 255))
def test_any_frames_mean_what_the_slow_oracle_says(
    frames: list[Frame], big_endian: bool, position: int, change: int
) -> None:
    data = bytearray(oracle.build(frames, 512, big_endian))
    if wal.HEADER_SIZE <= position < len(data):
        data[position] ^= change
    assert as_commits(scan_all(bytes(data)).transactions) == oracle.commits(bytes(data))


def test_the_cursor_carries_the_cumulative_checksum(small: Source) -> None:
    data = small.wal
    salts = struct.unpack_from(">2I", data, 16)
    for t in scan_all(data).transactions:
        sums = struct.unpack_from(">2I", data, t.end.offset - 536 + 16)
        assert t.end == Cursor(t.end.offset, 512, False, *salts, *sums)


# -- the header --------------------------------------------------------------------------------------------------------


def test_the_header_of_a_real_wal_is_read(small: Source) -> None:
    data = small.wal
    header = wal.parse_header(data)
    assert (header.big_endian, header.page_size, header.frame_size) == (False, 512, 536)
    assert (header.salt1, header.salt2, header.checksum1, header.checksum2) == struct.unpack_from(">4I", data, 16)
    assert header.cursor().offset == wal.HEADER_SIZE
    assert wal.parse_header(oracle.to_big_endian(data)).salt1 == header.salt1


@pytest.mark.parametrize("big_endian", [False, True])
def test_every_truncation_and_every_flipped_bit_of_the_header_is_refused(big_endian: bool) -> None:
    good = oracle.build([], 4096, big_endian)
    wal.parse_header(good)
    damaged = [good[:size] for size in range(len(good))]
    damaged += [(int.from_bytes(good, "big") ^ 1 << bit).to_bytes(32, "big") for bit in range(256)]
    for data in damaged:
        with pytest.raises(WalHeaderDamaged):
            wal.parse_header(data)


@pytest.mark.parametrize("page_size", [0, 1, 256, 513, 4095, 131072, 2**31])
def test_a_page_size_that_sqlite_does_not_have_is_refused(page_size: int) -> None:
    with pytest.raises(WalHeaderDamaged, match="page size"):
        wal.parse_header(oracle.build([], page_size, False))


def test_an_empty_scan_stays_where_it_was() -> None:
    cursor = wal.parse_header(oracle.build([], 1024, False)).cursor()
    assert scan(b"", cursor) == Scan([], cursor, Stop.END)
