"""Replicas that released Litestreams made, restored here: the same bytes as theirs, or an error that says what is missing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import (
    ChainBroken,
    FormatError,
    LtxDamaged,
    NothingToRestore,
    ReplicatorError,
    TargetExists,
    UsageError,
)
from replicator.litestream.chain import LtxRef, parse_txid, plan, restorable, txid_text
from replicator.litestream.replica import list_files, read_header
from replicator.litestream.restore import LitestreamReport, plan_restore, restore
from replicator.ltx import LtxHeader, LtxWriter
from replicator.restore import RestoreOptions
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore

GOLDEN = Path(__file__).parent / "golden"
MODERN = ["litestream-0.5.17", "litestream-0.5.5"]


@pytest.fixture(params=MODERN)
def modern(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A replica of 0.5 that a test may damage."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "replica"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The replica of 0.3 that a test may damage; its objects have the times of the order in which they were written."""
    root = Path(shutil.copytree(GOLDEN / "litestream-0.3.13", tmp_path / "replica"))
    written = sorted(root.rglob("*.lz4"), key=lambda path: (path.name.split(".")[0].split("_"), path.parent.name))
    for second, path in enumerate(written):
        os.utime(path, (1_700_000_000 + second, 1_700_000_000 + second))
    return root


class Target:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def restore(self, root: Path, options: RestoreOptions | None = None) -> LitestreamReport:
        self.count += 1
        return restore(FileStore(root), self.path, options or RestoreOptions())

    @property
    def path(self) -> Path:
        return self.folder / f"restored-{self.count}.db"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Target:
    folder = tmp_path / "out"
    folder.mkdir()
    return Target(folder)


def states(root: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((root / "states.json").read_text())
    return found


def file_of(root: Path, level: int, first: int, last: int) -> Path:
    return root / f"ltx/{level}/{txid_text(first)}-{txid_text(last)}.ltx"


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- 0.5 ---------------------------------------------------------------------------------------------------------------


def test_every_transaction_is_restored_as_litestream_restores_it(modern: Path, target: Target) -> None:
    for txid, digest in states(modern).items():
        report = target.restore(modern, RestoreOptions(txid=int(txid, 16) if txid else None, integrity_check="full"))
        assert target.digest == digest, txid
        assert report.version == "0.5"
        assert report.position == (txid or max(states(modern)))


def test_a_moment_gives_the_last_transaction_at_or_before_it(modern: Path, target: Target) -> None:
    store = FileStore(modern)
    for ref in list_files(store):
        if ref.level == 0:
            at_ms = read_header(store, ref).time_ms
            report = target.restore(modern, RestoreOptions(at_ms=at_ms))
            assert (report.position, report.reached_ms) == (txid_text(ref.last), at_ms)
            assert target.digest == states(modern)[txid_text(ref.last)]


def test_a_moment_before_the_first_transaction_is_refused_with_the_first_moment(modern: Path, target: Target) -> None:
    store = FileStore(modern)
    with pytest.raises(NothingToRestore, match=r"its first moment is 2026-11-24T\d\d:\d\d:\d\d\.\d\d\dZ"):
        restore(store, target.path, RestoreOptions(at_ms=1_000))


def test_a_restore_from_the_layout_in_buckets_is_the_same(modern: Path, target: Target) -> None:
    (modern / "ltx").rename(modern / "levels")
    for folder in (modern / "levels").iterdir():
        folder.rename(modern / f"000{folder.name}")
    assert target.restore(modern).position == max(states(modern))
    assert target.digest == states(modern)[""]


def test_a_missing_file_in_the_middle_is_named(modern: Path, target: Target) -> None:
    for path in [*(modern / "ltx/1").iterdir(), *(modern / "ltx/2").iterdir(), *(modern / "ltx/9").iterdir()]:
        path.unlink()
    file_of(modern, 0, 5, 5).unlink()
    gone = "transaction 0000000000000005 is missing; the nearest before that can be is 0000000000000004"
    with pytest.raises(ChainBroken, match=gone):
        target.restore(modern)
    with pytest.raises(ChainBroken, match=gone):
        target.restore(modern, RestoreOptions(txid=7))
    at_ms = read_header(FileStore(modern), LtxRef(f"ltx/0/{txid_text(7)}-{txid_text(7)}.ltx", 0, 7, 7)).time_ms
    with pytest.raises(ChainBroken, match=gone):
        target.restore(modern, RestoreOptions(at_ms=at_ms))
    assert list(target.folder.iterdir()) == []
    target.restore(modern, RestoreOptions(txid=4))


def test_a_damaged_file_is_passed_over_when_another_has_the_same_transactions(modern: Path, target: Target) -> None:
    flip(file_of(modern, 0, 2, 2))
    target.restore(modern, RestoreOptions(txid=3))
    assert target.digest == states(modern)[txid_text(3)]
    with pytest.raises(LtxDamaged, match=r"0002\.ltx is damaged.*without it.*Litestream has merged"):
        target.restore(modern, RestoreOptions(txid=2))


def test_a_damaged_newest_file_is_an_error_and_not_an_older_state(modern: Path, target: Target) -> None:
    newest = int(max(states(modern)), 16)
    for path in (modern / "ltx").rglob(f"*-{txid_text(newest)}.ltx"):
        flip(path, 20)
    with pytest.raises(LtxDamaged, match=f"{txid_text(newest)}.ltx is damaged"):
        target.restore(modern)
    assert list(target.folder.iterdir()) == []


def test_a_truncated_file_leaves_nothing_at_the_target(modern: Path, target: Target) -> None:
    for path in (modern / "ltx").rglob("*.ltx"):
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(LtxDamaged, match="before it is complete"):
        target.restore(modern)
    assert list(target.folder.iterdir()) == []


def test_a_file_under_the_name_of_another_is_refused(modern: Path, target: Target) -> None:
    for path in [*(modern / "ltx/1").iterdir(), *(modern / "ltx/2").iterdir(), *(modern / "ltx/9").iterdir()]:
        path.unlink()
    shutil.copy(file_of(modern, 0, 4, 4), file_of(modern, 0, 5, 5))
    with pytest.raises(LtxDamaged, match="it was copied or renamed"):
        target.restore(modern)


def test_a_file_that_lacks_a_page_by_which_the_database_grew_is_refused(target: Target, tmp_path: Path) -> None:
    """Also where the database was as large before, so that there is an older image of the page."""
    store = FileStore(tmp_path / "replica")
    for first, last, page_count, page_nos in [(1, 1, 4, [1, 2, 3, 4]), (2, 2, 2, [1]), (3, 3, 4, [1, 4])]:
        out = io.BytesIO()
        writer = LtxWriter(out, LtxHeader(512, page_count, first, last, 1_700_000_000_000))
        for page_no in page_nos:
            writer.add(page_no, bytes(512))
        writer.finish()
        store.put(f"ltx/0/{txid_text(first)}-{txid_text(last)}.ltx", out.getvalue())
    with pytest.raises(ChainBroken, match="lacks 1 of the pages 3 to 4, by which the database grew; restore up to 0+2"):
        restore(store, target.path, RestoreOptions())
    assert list(target.folder.iterdir()) == []


def test_a_file_that_exists_is_not_overwritten(modern: Path, target: Target) -> None:
    target.path.write_text("mine")
    with pytest.raises(TargetExists):
        restore(FileStore(modern), target.path, RestoreOptions())
    assert target.path.read_text() == "mine"


def test_a_plan_says_what_a_restore_would_do(modern: Path) -> None:
    found = plan_restore(FileStore(modern), RestoreOptions(txid=3))
    assert (found.version, found.position, len(found.keys)) == ("0.5", txid_text(3), 1)
    assert found.size_bytes == 9 * 512


def test_timelines_are_not_litestreams(modern: Path) -> None:
    with pytest.raises(UsageError, match="no timelines"):
        plan_restore(FileStore(modern), RestoreOptions(timeline=1))


def test_two_layouts_at_one_place_are_two_replicas(modern: Path) -> None:
    shutil.copytree(modern / "ltx/0", modern / "0000")
    with pytest.raises(FormatError, match="two replicas"):
        plan_restore(FileStore(modern), RestoreOptions())


# -- which files -------------------------------------------------------------------------------------------------------


def refs(*ranges: tuple[int, int, int]) -> list[LtxRef]:
    return [LtxRef(f"{level}/{first}-{last}", level, first, last) for level, first, last in ranges]


def chosen(found: list[LtxRef], target: int | None = None) -> list[str]:
    return [ref.key for ref in plan(found, target)]


def test_the_farthest_file_is_taken() -> None:
    found = refs((9, 1, 4), (0, 5, 5), (0, 6, 6), (1, 5, 6), (1, 3, 7), (0, 8, 8))
    assert chosen(found) == ["9/1-4", "1/3-7", "0/8-8"]
    assert chosen(found, 5) == ["9/1-4", "0/5-5"]
    assert chosen(found, 6) == ["9/1-4", "1/5-6"]
    assert restorable(found) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("found", "target", "words"),
    [
        (refs((9, 1, 4), (0, 6, 6)), None, "transaction 0000000000000005 is missing"),
        (refs((9, 1, 4), (0, 9, 9)), 9, "transactions 0000000000000005 to 0000000000000008 are missing"),
        (refs((9, 1, 4), (1, 5, 8)), 6, "merged 0000000000000005 to 0000000000000008 into one file"),
        (refs((9, 1, 4), (1, 5, 8)), 6, "the nearest before that can be is 0000000000000004, the nearest after it 0+8"),
        (refs((0, 3, 3), (0, 4, 4)), None, "no snapshot, transactions 0+1 to 0+2 are missing"),
        (refs((9, 1, 4)), 2, "the first transaction that can be restored is 0+4"),
        (refs((9, 1, 4)), 5, "ends at 0+4, before 0+5"),
        ([], None, "holds no file"),
    ],
)
def test_what_is_missing_is_named(found: list[LtxRef], target: int | None, words: str) -> None:
    with pytest.raises((ChainBroken, NothingToRestore), match=words):
        plan(found, target)


@given(
    ranges=st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 4)).map(lambda pair: (0, pair[0], sum(pair))), max_size=12
    ),
    target=st.integers(1, 16),
)
def test_a_chain_is_found_whenever_there_is_one(ranges: list[tuple[int, int, int]], target: int) -> None:
    found = refs(*ranges)
    reachable = {ref.last for ref in found if ref.is_snapshot}
    for _ in found:
        reachable |= {ref.last for ref in found if any(ref.first - 1 <= at < ref.last for at in reachable)}
    assert restorable(found) == sorted(reachable)
    if target not in reachable:
        with pytest.raises((ChainBroken, NothingToRestore)):
            plan(found, target)
        return
    chain = plan(found, target)
    assert chain[0].is_snapshot
    assert chain[-1].last == target
    assert all(after.first - 1 <= before.last < after.last for before, after in pairwise(chain))


@pytest.mark.parametrize("text", ["10", "000000000000000g", "", "0000000000000000"])
def test_a_transaction_of_litestream_has_16_hex_digits(text: str) -> None:
    with pytest.raises(UsageError, match="16 hex digits"):
        parse_txid(text)
    assert parse_txid("00000000000000FF") == 255


# -- 0.3 ---------------------------------------------------------------------------------------------------------------


def test_the_newest_state_of_a_0_3_replica_is_what_litestream_restores(old: Path, target: Target) -> None:
    report = target.restore(old, RestoreOptions(integrity_check="full"))
    assert target.digest == states(old)[""]
    assert report.version == "0.3"
    assert report.position.endswith("/00000002:000012f8")


def test_every_snapshot_of_a_0_3_replica_leads_to_the_same_state(old: Path, target: Target) -> None:
    for newest in ("00000002", "00000001"):
        (old / next(iter(old.rglob(f"{newest}.snapshot.lz4"))).relative_to(old)).unlink()
        target.restore(old)
        assert target.digest == states(old)[""]


def test_a_moment_of_a_0_3_replica_is_that_of_its_objects(old: Path, target: Target) -> None:
    pieces = sorted(old.rglob("*.wal.lz4"))
    at_ms = pieces[3].stat().st_mtime_ns // 1_000_000
    report = target.restore(old, RestoreOptions(at_ms=at_ms + 999))
    assert report.reached_ms == at_ms
    assert report.position.endswith("/00000000:000021a0")
    with pytest.raises(NothingToRestore, match="its first moment is 2023-11-14T22:13:20.000Z"):
        target.restore(old, RestoreOptions(at_ms=1))


def test_times_that_contradict_the_order_are_not_trusted(old: Path, target: Target) -> None:
    os.utime(sorted(old.rglob("*.wal.lz4"))[2], (1_800_000_000, 1_800_000_000))
    with pytest.raises(ChainBroken, match="they were copied"):
        target.restore(old, RestoreOptions(at_ms=1_750_000_000_000))
    target.restore(old)


def only_first_snapshot(root: Path) -> None:
    for number in (1, 2):
        next(iter(root.rglob(f"0000000{number}.snapshot.lz4"))).unlink()


def remove(pattern: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for path in [*root.rglob(pattern)]:
            path.unlink()

    return act


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("00000001_*"), "WAL 00000001 is missing"),
        (remove("00000001_00000000*"), "the beginning of WAL 00000001 is missing"),
        (remove("00000000_00000ec8*"), "of WAL 00000000, bytes 00000ec8 to 00001510 are missing"),
        (remove("*.snapshot.lz4"), "there is no snapshot before"),
        (lambda root: flip(sorted(root.rglob("*.wal.lz4"))[1]), "damaged"),
        (lambda root: flip(next(iter(root.rglob("00000000.snapshot.lz4"))), 40), "damaged"),
        (lambda root: os.truncate(sorted(root.rglob("*.wal.lz4"))[1], 50), "ends before it is complete"),
    ],
)
def test_a_0_3_replica_with_a_hole_is_refused(
    old: Path, target: Target, damage: Callable[[Path], None], words: str
) -> None:
    only_first_snapshot(old)
    damage(old)
    with pytest.raises(ReplicatorError, match=words):
        target.restore(old)
    assert list(target.folder.iterdir()) == []


def test_an_encrypted_0_3_replica_is_refused(old: Path, target: Target) -> None:
    for path in old.rglob("*.snapshot.lz4"):
        path.write_bytes(b"age-encryption.org/v1\n-> X25519 x\n")
    with pytest.raises(UsageError, match="encrypted with age"):
        target.restore(old)


def test_a_0_3_replica_knows_no_transactions(old: Path, target: Target) -> None:
    with pytest.raises(UsageError, match="numbers no transactions"):
        target.restore(old, RestoreOptions(txid=3))


def test_of_two_versions_at_one_place_the_later_is_restored(old: Path, target: Target) -> None:
    shutil.copytree(GOLDEN / MODERN[0] / "ltx", old / "ltx")
    assert target.restore(old).version == "0.5"
    assert target.restore(old, RestoreOptions(at_ms=1_700_000_008_000)).version == "0.3"


def test_an_empty_place_holds_nothing() -> None:
    with pytest.raises(NothingToRestore, match="no replica of Litestream"):
        plan_restore(MemoryStore("empty"), RestoreOptions())
