"""Claims about restore: what was committed comes back byte for byte, or nothing does."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import apsw
import pytest
from restore_support import DATABASE, STEP_MS, T0_MS, ReplicaBuilder, SourceDatabase, state_checksum

from replicator.errors import (
    ChainBroken,
    FormatError,
    IntegrityCheckFailed,
    NothingToRestore,
    ObjectMissing,
    RestoreError,
    SegmentDamaged,
    SegmentVersionUnknown,
    StateMismatch,
    StoreUnavailable,
    TargetExists,
    UsageError,
)
from replicator.layout import SegmentRef, timeline_key
from replicator.replica import Replica, decode_timeline, encode_timeline
from replicator.restore import RestoreOptions, plan_restore, restore
from replicator.store.memory import MemoryStore
from replicator.values import Position, Timeline

LAST = 12


def committed_states(path: Path, page_size: int = 4096) -> list[bytes]:
    """States 1 to LAST of a database that grows, shrinks (vacuum) and grows again."""
    source = SourceDatabase(path, page_size)
    states = [source.commit("CREATE TABLE t (id INTEGER PRIMARY KEY, body BLOB)")]
    for n in range(2, 6):
        states.append(source.insert(n * 100, n * 100 + 79, 900))
    states.append(source.commit("DELETE FROM t WHERE id % 3 = 0"))
    states.append(source.commit("DELETE FROM t WHERE id > 250"))
    states.append(source.vacuum())
    for n in range(9, LAST + 1):
        states.append(source.insert(n * 100, n * 100 + 99, 1100))
    source.close()
    return states


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    found = committed_states(tmp_path_factory.mktemp("source") / "app.db")
    sizes = [len(state) for state in found]
    assert sizes[7] < sizes[6] < sizes[11]
    return found


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def replica(store: MemoryStore, states: list[bytes]) -> ReplicaBuilder:
    """Timeline 1: a snapshot at 1, then each commit as it was shipped."""
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    builder.snapshot(Position(1, 1), states[0])
    for txid in range(2, LAST + 1):
        builder.commit(Position(1, txid), states[txid - 1])
    return builder


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where a test restores to; afterwards nothing but that file may be in the folder."""
    folder = tmp_path / "restored"
    folder.mkdir()
    yield folder / "app.db"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def level0(txid: int, timeline: int = 1) -> SegmentRef:
    return SegmentRef(timeline, 0, txid, txid)


def flip(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


# -- every position, by txid and by time -------------------------------------------------------------------------------


@pytest.mark.parametrize("parallelism", [1, 8])
def test_every_position_comes_back_byte_for_byte(replica: ReplicaBuilder, tmp_path: Path, parallelism: int) -> None:
    for position, state in replica.states.items():
        target = tmp_path / f"{position.txid}.db"
        report = restore(replica.store, target, RestoreOptions(position=position, parallelism=parallelism))
        assert target.read_bytes() == state
        assert (report.position, report.reached_ms) == (position, replica.time_of(position))
        assert report.state_checksum == report.hashes.checksum == state_checksum(state, 4096)
        assert (report.size_bytes, report.page_count) == (len(state), len(state) // 4096)


@pytest.mark.parametrize("page_size", [512, 65536])
def test_every_page_size_comes_back(store: MemoryStore, tmp_path: Path, target: Path, page_size: int) -> None:
    states = committed_states(tmp_path / "source.db", page_size)
    builder = ReplicaBuilder(store, page_size)
    builder.snapshot(Position(1, 1), states[0])
    for txid in range(2, LAST + 1):
        builder.commit(Position(1, txid), states[txid - 1])
    assert restore(store, target).page_size == page_size
    assert target.read_bytes() == states[-1]


def test_merged_and_overlapping_segments_give_the_same_bytes(replica: ReplicaBuilder, tmp_path: Path) -> None:
    replica.increment(Position(1, 6), 2)
    replica.increment(Position(1, 10), 5)
    for position, state in replica.states.items():
        target = tmp_path / f"{position.txid}.db"
        restore(replica.store, target, RestoreOptions(position=position))
        assert target.read_bytes() == state


def test_pages_cut_off_by_a_shrink_do_not_come_back(replica: ReplicaBuilder, target: Path, states: list[bytes]) -> None:
    restore(replica.store, target, RestoreOptions(txid=8))
    assert target.read_bytes() == states[7]


def test_an_empty_database_is_an_empty_file(store: MemoryStore, target: Path) -> None:
    ReplicaBuilder(store).snapshot(Position(1, 1), b"")
    assert restore(store, target).page_count == 0
    assert target.read_bytes() == b""


def test_a_database_that_was_emptied_and_grew_again_comes_back(
    store: MemoryStore, target: Path, states: list[bytes]
) -> None:
    builder = ReplicaBuilder(store)
    builder.snapshot(Position(1, 1), states[5])
    builder.commit(Position(1, 2), b"")
    builder.commit(Position(1, 3), states[2])
    restore(store, target)
    assert target.read_bytes() == states[2]


def test_the_newest_position_is_the_default(replica: ReplicaBuilder, target: Path, states: list[bytes]) -> None:
    assert restore(replica.store, target).position == Position(1, LAST)
    assert target.read_bytes() == states[-1]


def test_the_restored_database_opens_in_sqlite_and_takes_writes(replica: ReplicaBuilder, target: Path) -> None:
    restore(replica.store, target)
    connection = apsw.Connection(str(target))
    assert connection.execute("PRAGMA journal_mode").get == "wal"
    connection.execute("INSERT INTO t VALUES (1, 'new')")
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    connection.close()


@pytest.mark.parametrize(
    ("at_ms", "txid"),
    [
        (T0_MS + 1 * STEP_MS, 1),
        (T0_MS + 5 * STEP_MS, 5),
        (T0_MS + 5 * STEP_MS + 1, 5),
        (T0_MS + 6 * STEP_MS - 1, 5),
        (T0_MS + LAST * STEP_MS, LAST),
        (T0_MS + 99 * STEP_MS, LAST),
    ],
)
def test_a_time_gives_the_last_commit_at_or_before_it(
    replica: ReplicaBuilder, target: Path, states: list[bytes], at_ms: int, txid: int
) -> None:
    report = restore(replica.store, target, RestoreOptions(at_ms=at_ms))
    assert (report.position, report.reached_ms) == (Position(1, txid), T0_MS + txid * STEP_MS)
    assert target.read_bytes() == states[txid - 1]


def test_a_time_before_the_first_commit_is_refused_with_the_first(replica: ReplicaBuilder, target: Path) -> None:
    with pytest.raises(NothingToRestore, match=r"its first moment is 2026-09-21T"):
        restore(replica.store, target, RestoreOptions(at_ms=T0_MS))


def position_at(replica: Replica, at_ms: int, timeline: int | None = None) -> tuple[Position, int]:
    return replica.find_position(replica.timelines(), replica.segments(), at_ms, timeline)


def test_of_commits_in_the_same_millisecond_the_last_is_taken(store: MemoryStore, states: list[bytes]) -> None:
    builder = ReplicaBuilder(store, times={Position(1, txid): T0_MS for txid in (1, 2, 3)})
    builder.snapshot(Position(1, 1), states[0])
    for txid in (2, 3, 4):
        builder.commit(Position(1, txid), states[txid - 1])
    assert position_at(Replica(store), T0_MS) == (Position(1, 3), T0_MS)


def test_a_time_is_found_with_few_requests(store: MemoryStore, states: list[bytes]) -> None:
    builder = ReplicaBuilder(store)
    builder.snapshot(Position(1, 1), states[0])
    for txid in range(2, 1001):
        builder.commit(Position(1, txid), states[txid % 2])
    before = Counter(operation for operation, _ in store.calls)
    assert position_at(Replica(store), T0_MS + 700 * STEP_MS)[0] == Position(1, 700)
    asked = Counter(operation for operation, _ in store.calls) - before
    assert asked["get"] <= 12 and asked["list"] == 2


# -- timelines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def forked(replica: ReplicaBuilder, states: list[bytes]) -> ReplicaBuilder:
    """Timeline 2 leaves 1 at 6, timeline 3 leaves 2 at 8."""
    replica.timeline(2, Position(1, 6))
    for txid in (7, 8, 9):
        replica.times[Position(2, txid)] = T0_MS + (100 + txid) * STEP_MS
        replica.commit(Position(2, txid), states[txid - 6])
    replica.timeline(3, Position(2, 8))
    replica.times[Position(3, 9)] = T0_MS + 200 * STEP_MS
    replica.commit(Position(3, 9), states[10])
    return replica


def test_every_position_of_three_timelines_comes_back(forked: ReplicaBuilder, tmp_path: Path) -> None:
    for position, state in forked.states.items():
        target = tmp_path / f"{position.timeline}-{position.txid}.db"
        restore(forked.store, target, RestoreOptions(position=position))
        assert target.read_bytes() == state


def test_the_abandoned_tail_of_the_parent_comes_back(forked: ReplicaBuilder, target: Path, states: list[bytes]) -> None:
    assert restore(forked.store, target, RestoreOptions(timeline=1)).position == Position(1, LAST)
    assert target.read_bytes() == states[-1]


def test_the_last_timeline_is_the_default(forked: ReplicaBuilder, target: Path, states: list[bytes]) -> None:
    assert restore(forked.store, target).position == Position(3, 9)
    assert target.read_bytes() == states[10]


def test_a_time_follows_the_path_of_the_timeline(forked: ReplicaBuilder) -> None:
    replica = Replica(forked.store)
    assert position_at(replica, T0_MS + 4 * STEP_MS)[0] == Position(1, 4)
    assert position_at(replica, T0_MS + 10 * STEP_MS)[0] == Position(1, 6)
    assert position_at(replica, T0_MS + 10 * STEP_MS, timeline=1)[0] == Position(1, 10)
    assert position_at(replica, T0_MS + 150 * STEP_MS)[0] == Position(2, 8)
    assert position_at(replica, T0_MS + 200 * STEP_MS)[0] == Position(3, 9)


def test_a_new_timeline_without_commits_is_at_its_fork(forked: ReplicaBuilder, states: list[bytes]) -> None:
    forked.timeline(4, Position(1, 3))
    assert plan_restore(forked.store, RestoreOptions()).position == Position(1, 3)
    with pytest.raises(ChainBroken):
        plan_restore(forked.store, RestoreOptions(txid=5))


def test_a_timeline_number_is_given_once(store: MemoryStore) -> None:
    timeline = Timeline(1, DATABASE, None, None, T0_MS, "here", "first")
    assert Replica(store).write_timeline(timeline)
    assert not Replica(store).write_timeline(Timeline(1, DATABASE, None, None, T0_MS, "there", "first"))
    assert Replica(store).timelines() == {1: timeline}


def test_a_timeline_record_survives_encoding() -> None:
    timeline = Timeline(3, DATABASE, 2, 17, T0_MS, "host:1", "takeover")
    assert decode_timeline(encode_timeline(timeline)) == timeline


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b'"version":1', b'"version":2', SegmentVersionUnknown),
        (b'"version":1', b'"version":0', FormatError),
        (b'"parent":2', b'"parent":3', FormatError),
        (b'"parent":2', b'"parent":null', FormatError),
        (b'"fork_txid":17', b'"fork_txid":-1', FormatError),
        (DATABASE.encode(), b"0123", FormatError),
        (b'"reason"', b'"season"', FormatError),
        (b'"writer":"host:1"', b'"writer":1', FormatError),
        (b"takeover", b"take\xff\xfe", FormatError),
        (b"}", b"", FormatError),
        (b"}", b',"more":1}', FormatError),
    ],
)
def test_a_timeline_record_that_breaks_the_format_is_refused(old: bytes, new: bytes, error: type[FormatError]) -> None:
    body = encode_timeline(Timeline(3, DATABASE, 2, 17, T0_MS, "host:1", "takeover"))
    assert old in body
    with pytest.raises(error):
        decode_timeline(body.replace(old, new))


def test_a_damaged_record_is_named(replica: ReplicaBuilder, target: Path) -> None:
    replica.store.put(timeline_key(2), b"{}")
    with pytest.raises(FormatError, match=r"timelines/00000002\.json"):
        restore(replica.store, target)


def test_two_databases_in_one_place_are_refused(replica: ReplicaBuilder, target: Path) -> None:
    other = Timeline(2, "f" * 32, None, None, T0_MS, "there", "mistake")
    assert Replica(replica.store).write_timeline(other)
    with pytest.raises(FormatError, match="timelines 1 and 2 belong to different databases"):
        restore(replica.store, target)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_missing_segment_is_named_and_leaves_nothing(replica: ReplicaBuilder, target: Path) -> None:
    replica.store.delete([level0(7).key])
    with pytest.raises(ChainBroken, match=r"transaction 7 of timeline 1 is missing; .* is 1:6$"):
        restore(replica.store, target, RestoreOptions(txid=9))
    assert list(target.parent.iterdir()) == []


def test_segments_stranded_behind_a_gap_are_mentioned(
    replica: ReplicaBuilder, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica.store.delete([level0(7).key])
    assert restore(replica.store, target).position == Position(1, 6)
    assert "5 segments after 1:6 do not follow from it" in caplog.text


def quarter(body: bytes) -> bytes:
    return body[: len(body) // 4]


@pytest.mark.parametrize(
    "change",
    [
        *(lambda body, at=at: flip(body, at) for at in (0, 50, 90, 300, -20, -60)),
        lambda body: body[:-1],
        lambda body: body + b"\0",
        quarter,
        lambda body: b"",
    ],
)
@pytest.mark.parametrize("txid", [1, 5, LAST])
def test_a_damaged_segment_is_named_and_leaves_nothing(
    replica: ReplicaBuilder, target: Path, change: Callable[[bytes], bytes], txid: int
) -> None:
    ref = SegmentRef(1, 9, 1, 1) if txid == 1 else level0(txid)
    replica.damage(ref, change)
    with pytest.raises(SegmentDamaged, match=ref.key):
        restore(replica.store, target, RestoreOptions(txid=txid))
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_a_flipped_bit_anywhere_gives_the_same_bytes_or_an_error(
    replica: ReplicaBuilder, tmp_path: Path, states: list[bytes], bit: int
) -> None:
    intact = replica.store.get(level0(5).key)
    for at in range(bit, len(intact), len(intact) // 40):
        replica.damage(level0(5), lambda body, at=at: intact[:at] + bytes([intact[at] ^ 1 << bit]) + intact[at + 1 :])  # type: ignore[misc]
        target = tmp_path / f"{at}.db"
        try:
            restore(replica.store, target)
        except SegmentDamaged:
            assert not target.exists()
        else:
            assert target.read_bytes() == states[-1]


def test_a_damaged_segment_tells_what_can_be_restored(replica: ReplicaBuilder, target: Path) -> None:
    replica.damage(level0(LAST), quarter)
    with pytest.raises(SegmentDamaged, match=rf"the nearest position before that can be is 1:{LAST - 1}"):
        restore(replica.store, target)


def test_another_way_around_a_damaged_segment_is_taken(
    replica: ReplicaBuilder, target: Path, states: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = replica.snapshot(Position(1, 10))
    replica.damage(snapshot, lambda body: flip(body, 5000))
    merged = replica.increment(Position(1, 9), 2)
    replica.damage(merged, quarter)
    restore(replica.store, target)
    assert target.read_bytes() == states[-1]
    assert snapshot.key in caplog.text and merged.key in caplog.text


def test_a_segment_under_the_key_of_another_is_not_used(replica: ReplicaBuilder, target: Path) -> None:
    stolen = replica.store.get(level0(5).key)
    replica.damage(level0(6), lambda body: stolen)
    with pytest.raises(SegmentDamaged, match="0000000000000006-.*holds segment 1:5-5"):
        restore(replica.store, target)


def test_a_segment_of_another_database_is_not_used(store: MemoryStore, target: Path, states: list[bytes]) -> None:
    builder = ReplicaBuilder(store)
    builder.timeline(1)
    builder.snapshot(Position(1, 1), states[0])
    builder.commit(Position(1, 2), states[1], database="f" * 32)
    with pytest.raises(SegmentDamaged, match="belongs to another database"):
        restore(store, target)
    builder.commit(Position(1, 3), states[2])
    with pytest.raises(ChainBroken, match="another database or page size"):
        restore(store, target)


def test_a_segment_for_another_state_breaks_the_chain(
    replica: ReplicaBuilder, target: Path, states: list[bytes]
) -> None:
    replica.store.delete([level0(7).key])
    replica.commit(Position(1, 7), states[6], state_before=12345)
    with pytest.raises(ChainBroken, match="0000000000000007-.* does not follow from .*0000000000000006-"):
        restore(replica.store, target)


def test_a_snapshot_with_another_state_is_left_for_the_increments(
    replica: ReplicaBuilder, target: Path, states: list[bytes]
) -> None:
    replica.snapshot(Position(1, 8), state_after=12345)
    restore(replica.store, target)
    assert target.read_bytes() == states[-1]


def test_pages_that_do_not_have_the_recorded_state_are_thrown_away(
    store: MemoryStore, target: Path, states: list[bytes]
) -> None:
    ReplicaBuilder(store).snapshot(Position(1, 1), states[3], state_after=12345)
    with pytest.raises(StateMismatch, match="0000000000003039"):
        restore(store, target)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_header_does_not_hide_another_moment(replica: ReplicaBuilder) -> None:
    for txid in range(5, 9):
        replica.damage(level0(txid), lambda body: flip(body, 70))
    at_9 = T0_MS + 9 * STEP_MS
    assert position_at(Replica(replica.store), at_9)[0] == Position(1, 9)
    with pytest.raises(SegmentDamaged):
        position_at(Replica(replica.store), at_9 - 1)


def test_a_database_that_was_corrupt_at_its_source_is_refused_unless_unchecked(
    store: MemoryStore, target: Path, states: list[bytes]
) -> None:
    corrupt = states[4][:8192] + bytes(4096) + states[4][12288:]
    ReplicaBuilder(store).snapshot(Position(1, 1), corrupt)
    with pytest.raises(IntegrityCheckFailed, match="quick_check finds"):
        restore(store, target)
    assert list(target.parent.iterdir()) == []
    restore(store, target, RestoreOptions(integrity_check="none"))
    assert target.read_bytes() == corrupt


def test_a_file_that_is_no_database_fails_the_check(store: MemoryStore, target: Path) -> None:
    ReplicaBuilder(store).snapshot(Position(1, 1), b"x" * 8192)
    with pytest.raises(IntegrityCheckFailed, match="not a database"):
        restore(store, target, RestoreOptions(integrity_check="full"))


def test_a_collation_that_only_the_app_has_does_not_stop_a_restore(
    store: MemoryStore, tmp_path: Path, target: Path
) -> None:
    connection = apsw.Connection(str(tmp_path / "own.db"))
    connection.create_collation("own", lambda a, b: (a > b) - (a < b))
    connection.execute("CREATE TABLE t (name TEXT COLLATE own); CREATE INDEX i ON t (name)")
    connection.execute("INSERT INTO t VALUES ('b'), ('a')")
    connection.close()
    ReplicaBuilder(store).snapshot(Position(1, 1), state := (tmp_path / "own.db").read_bytes())
    restore(store, target, RestoreOptions(integrity_check="full"))
    assert target.read_bytes() == state


# -- what changes under a restore --------------------------------------------------------------------------------------


class Vanishing:
    """A hook for MemoryStore: when the first of ``gone`` is asked for, all of them have been deleted, as by retention."""

    def __init__(self, store: MemoryStore, *gone: SegmentRef, then: Callable[[], object] = lambda: None) -> None:
        self.asked = 0
        self._store = store
        self._keys = [ref.key for ref in gone]
        self._then = then
        self._lock = threading.RLock()

    def __call__(self, operation: str, key: str) -> None:
        with self._lock:
            if operation == "get" and key in self._keys:
                self.asked += 1
                if self.asked == 1:
                    self._store.delete(self._keys)
                    self._then()


def test_a_snapshot_that_vanishes_is_replaced_by_what_took_its_place(
    store: MemoryStore, replica: ReplicaBuilder, target: Path, states: list[bytes]
) -> None:
    old = SegmentRef(1, 9, 1, 1)
    store.before = vanishing = Vanishing(store, old, level0(2), then=lambda: replica.snapshot(Position(1, 9)))
    restore(store, target)
    assert target.read_bytes() == states[-1]
    assert vanishing.asked >= 1


def test_a_vanished_object_without_replacement_is_named(
    store: MemoryStore, replica: ReplicaBuilder, target: Path
) -> None:
    store.before = Vanishing(store, level0(5))
    with pytest.raises((ObjectMissing, ChainBroken), match=r"0000000000000005-|transaction 5 of timeline 1 is missing"):
        restore(store, target, RestoreOptions(txid=LAST))
    assert list(target.parent.iterdir()) == []


def test_an_object_that_is_listed_but_never_there_is_an_error(
    store: MemoryStore, replica: ReplicaBuilder, target: Path
) -> None:
    def deny(operation: str, key: str) -> None:
        if operation == "get" and key == level0(LAST).key:
            raise ObjectMissing(f"{key} does not exist")

    store.before = deny
    with pytest.raises(ObjectMissing, match=rf"{level0(LAST).key}.*is 1:{LAST - 1}$"):
        restore(store, target)


def test_a_store_that_fails_leaves_nothing(store: MemoryStore, replica: ReplicaBuilder, target: Path) -> None:
    def fail(operation: str, key: str) -> None:
        if key == level0(3).key:
            raise StoreUnavailable("the store is away")

    store.before = fail
    with pytest.raises(StoreUnavailable):
        restore(store, target)
    assert list(target.parent.iterdir()) == []


def test_an_interrupt_leaves_neither_file_nor_thread(replica: ReplicaBuilder, target: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(replica.store, target, on_progress=interrupt)
    assert list(target.parent.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("restore", "read-back"))]


def test_a_target_that_appears_meanwhile_is_not_overwritten(replica: ReplicaBuilder, target: Path) -> None:
    def create(done: int, total: int) -> None:
        target.write_bytes(b"somebody else's")

    with pytest.raises(TargetExists):
        restore(replica.store, target, on_progress=create)
    assert target.read_bytes() == b"somebody else's"


# -- the target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "-wal", "-journal", "-shm"])
def test_an_existing_target_is_refused_before_any_request(
    store: MemoryStore, replica: ReplicaBuilder, target: Path, suffix: str
) -> None:
    there = target.with_name(target.name + suffix)
    there.write_bytes(b"precious")
    before = len(store.calls)
    with pytest.raises(TargetExists, match=f"{there} exists"):
        restore(store, target)
    assert len(store.calls) == before
    assert there.read_bytes() == b"precious"


def test_a_dangling_link_is_an_existing_target(replica: ReplicaBuilder, target: Path) -> None:
    target.symlink_to(target.parent / "nowhere")
    with pytest.raises(TargetExists):
        restore(replica.store, target)


def test_a_missing_directory_is_refused(replica: ReplicaBuilder, target: Path) -> None:
    with pytest.raises(RestoreError, match="does not exist; create it first"):
        restore(replica.store, target.parent / "sub" / "app.db")


def test_a_full_file_system_is_refused_before_the_download(
    store: MemoryStore, replica: ReplicaBuilder, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2, f_frsize=4096))
    with pytest.raises(RestoreError, match=r"needs \d+\.\d KiB in .*, where 8.0 KiB are free; make room"):
        restore(store, target)
    assert list(target.parent.iterdir()) == []


def test_the_file_is_private_unless_a_mode_is_given(replica: ReplicaBuilder, target: Path) -> None:
    restore(replica.store, target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    shared = target.with_name("shared.db")
    restore(replica.store, shared, RestoreOptions(mode=0o640))
    assert stat.S_IMODE(shared.stat().st_mode) == 0o640


def test_a_file_system_without_hard_links_gets_the_file_as_well(
    replica: ReplicaBuilder, target: Path, states: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, destination: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    restore(replica.store, target)
    assert target.read_bytes() == states[-1]


def test_files_left_by_a_killed_restore_are_mentioned_and_kept(
    replica: ReplicaBuilder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".app.db.restoring-0123"
    left.write_bytes(b"half")
    restore(replica.store, tmp_path / "app.db")
    assert left.name in caplog.text and left.exists()


# -- what is asked of the store ----------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_a_restore_does(replica: ReplicaBuilder, target: Path, states: list[bytes]) -> None:
    plan = plan_restore(replica.store, RestoreOptions(txid=5))
    report = restore(replica.store, target, RestoreOptions(txid=5))
    assert [ref.last for ref in plan.segments] == [1, 2, 3, 4, 5]
    assert (plan.position, plan.reached_ms, plan.page_size) == (report.position, report.reached_ms, 4096)
    assert (plan.size_bytes, plan.state_checksum) == (len(states[4]), report.state_checksum)
    assert report.downloaded_bytes == plan.download_bytes


def test_progress_ends_at_the_total(replica: ReplicaBuilder, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    restore(replica.store, target, on_progress=lambda done, total: seen.append((done, total)))
    total = plan_restore(replica.store, RestoreOptions()).download_bytes
    assert seen == sorted(seen) and seen[-1] == (total, total)


def test_superseded_groups_of_a_large_snapshot_are_not_fetched(store: MemoryStore, target: Path) -> None:
    size = 4096
    old = os.urandom(size * 2000)
    new = old[: size * 100] + os.urandom(size * 1800) + old[size * 1900 :]
    builder = ReplicaBuilder(store)
    snapshot = builder.snapshot(Position(1, 1), old)
    increment = builder.commit(Position(1, 2), new)
    report = restore(store, target, RestoreOptions(integrity_check="none", parallelism=2))
    assert target.read_bytes() == new
    assert report.downloaded_bytes < increment.size_bytes + snapshot.size_bytes // 5


def test_a_large_segment_damaged_in_its_middle_is_named(store: MemoryStore, target: Path) -> None:
    builder = ReplicaBuilder(store)
    snapshot = builder.snapshot(Position(1, 1), os.urandom(4096 * 1500))
    builder.damage(snapshot, lambda body: flip(body, len(body) // 2))
    with pytest.raises(SegmentDamaged, match=snapshot.key):
        restore(store, target)


@pytest.mark.parametrize(
    "options",
    [
        RestoreOptions(txid=1, at_ms=1),
        RestoreOptions(position=Position(1, 1), timeline=1),
        RestoreOptions(parallelism=0),
    ],
)
def test_contradictory_options_are_refused(store: MemoryStore, target: Path, options: RestoreOptions) -> None:
    with pytest.raises(UsageError):
        restore(store, target, options)


def test_an_empty_store_is_nothing_to_restore(store: MemoryStore, target: Path) -> None:
    with pytest.raises(NothingToRestore, match="the replica holds no segment"):
        restore(store, target)


def test_a_quiet_restore_logs_nothing(replica: ReplicaBuilder, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        restore(replica.store, target)
    assert caplog.records == []
