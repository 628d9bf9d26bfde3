"""Replicas of our own written out for Litestream, and which of two replicas at one URL is restored."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from restore_support import T0_MS, ReplicaBuilder, SourceDatabase

from replicator import cli
from replicator.config import DatabaseConfig, ReplicaConfig
from replicator.daemon import restore_if_missing
from replicator.errors import ChainBroken, ReplicatorError, SegmentDamaged, UsageError
from replicator.litestream.choice import choose
from replicator.litestream.export import NOTE_KEY, export, plan_export
from replicator.litestream.restore import restore
from replicator.restore import RestoreOptions
from replicator.store.file import FileStore
from replicator.store.memory import MemoryStore
from replicator.store.s3 import S3Access, S3Store
from replicator.values import Position, format_time

GOLDEN = Path(__file__).parent / "golden"


class Made:
    """A native replica: snapshots at 1 and 4, transactions up to 6."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = SourceDatabase(folder / "source.db", 1024)
        self.native = ReplicaBuilder(FileStore(folder / "native"), 1024)
        self.to = FileStore(folder / "export")
        self.native.timeline(1)
        self.native.snapshot(Position(1, 1), self.source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"))
        for txid in (2, 3, 4, 5, 6):
            self.commit(txid)
        self.native.snapshot(Position(1, 4))

    def commit(self, txid: int, timeline: int = 1) -> None:
        self.native.commit(Position(timeline, txid), self.source.insert(txid * 10, txid * 10 + 5, 300))

    def forget_single_segments(self) -> None:
        shutil.rmtree(self.folder / "native/segments/00000001/0")

    def export(self, from_ms: int | None = None) -> int:
        """How many files were written."""
        return export(self.native.store, self.to, from_ms).files

    def restored(self, txid: int | None = None, at_ms: int | None = None) -> bytes:
        target = self.folder / "restored.db"
        restore(self.to, target, RestoreOptions(txid=txid, at_ms=at_ms, integrity_check="full"))
        data = target.read_bytes()
        target.unlink()
        return data

    def state(self, txid: int, timeline: int = 1) -> bytes:
        return self.native.states[Position(timeline, txid)]

    def files(self) -> list[str]:
        return sorted(
            f"{path.parent.name}/{int(path.stem[:16], 16)}-{int(path.stem[17:], 16)}" for path in self.paths()
        )

    def paths(self) -> list[Path]:
        return list((self.folder / "export/ltx").rglob("*.ltx"))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_an_export_begins_with_the_newest_snapshot(made: Made) -> None:
    assert made.export() == 3
    assert made.files() == ["0/5-5", "0/6-6", "9/1-4"]
    assert [made.restored(txid) == made.state(txid) for txid in (4, 5, 6)] == [True] * 3


def test_an_export_from_a_moment_has_every_moment_since(made: Made) -> None:
    assert made.export(from_ms=made.native.time_of(Position(1, 3))) == 6
    for txid in range(1, 7):
        assert made.restored(txid) == made.state(txid)
        assert made.restored(at_ms=made.native.time_of(Position(1, txid))) == made.state(txid)


def test_files_bear_the_time_of_their_last_commit(made: Made) -> None:
    made.export()
    newest = next(path for path in made.paths() if path.stem.startswith("0000000000000006"))
    assert newest.stat().st_mtime_ns == made.native.time_of(Position(1, 6)) * 1_000_000


def test_a_second_export_writes_what_was_added(made: Made) -> None:
    made.export()
    assert made.export() == 0
    made.commit(7)
    assert made.export() == 1
    assert made.restored() == made.state(7)


def test_a_merged_segment_keeps_its_range_and_the_newest_transaction_is_at_level_0(made: Made) -> None:
    made.forget_single_segments()
    made.native.increment(Position(1, 6), 5, level=2)
    made.export()
    assert made.files() == ["0/6-6", "2/5-6", "9/1-4"]
    assert made.restored() == made.state(6)


def test_single_transactions_are_exported_although_they_have_been_merged(made: Made) -> None:
    made.native.increment(Position(1, 6), 5, level=1)
    made.export()
    assert made.files() == ["0/5-5", "0/6-6", "9/1-4"]


def test_a_snapshot_leads_on_where_segments_have_been_deleted_since(made: Made) -> None:
    made.export()
    made.forget_single_segments()
    made.native.states[Position(1, 8)] = made.source.insert(500, 510, 300)
    made.native.snapshot(Position(1, 8))
    made.commit(9)
    assert made.export() == 2
    assert made.files() == ["0/5-5", "0/6-6", "0/9-9", "9/1-4", "9/1-8"]
    assert made.restored() == made.state(9)


def test_a_fork_goes_on_where_the_export_ended(made: Made) -> None:
    made.export()
    made.native.timeline(2, Position(1, 6))
    made.commit(7, timeline=2)
    assert made.export() == 1
    assert made.restored() == made.state(7, timeline=2)


def test_a_fork_that_leaves_exported_transactions_behind_is_refused(made: Made) -> None:
    made.export()
    made.native.timeline(2, Position(1, 5))
    made.native.commit(Position(2, 6), made.source.insert(700, 705, 300))
    with pytest.raises(UsageError, match="up to 6 of timeline 1, which the newest timeline 2 shares up to 5 only"):
        made.export()


def test_an_interrupted_export_is_completed_by_the_next(made: Made) -> None:
    made.export(from_ms=0)
    gone = next(path for path in made.paths() if path.stem.startswith("0000000000000003"))
    gone.unlink()
    plan = plan_export(made.native.store, made.to)
    assert (plan.begins, [step.last for step in plan.steps]) == (2, [3, 4, 5, 6])
    assert made.export() == 4
    assert made.restored(3) == made.state(3)


def test_a_place_with_a_replica_of_litestreams_own_is_refused(made: Made) -> None:
    shutil.copytree(GOLDEN / "litestream-0.5.17/ltx", made.folder / "export/ltx")
    with pytest.raises(UsageError, match="is no export; export to an empty place"):
        made.export()


def test_a_place_where_litestream_goes_on_is_refused(made: Made) -> None:
    made.export()
    shutil.copy(made.paths()[0], made.folder / f"export/ltx/0/{7:016x}-{7:016x}.ltx")
    with pytest.raises(UsageError, match="Litestream goes on there"):
        made.export()


def test_another_database_is_refused(made: Made) -> None:
    made.export()
    note = json.loads(made.to.get(NOTE_KEY))
    made.to.put(NOTE_KEY, json.dumps(note | {"database": "f" * 32}).encode())
    with pytest.raises(UsageError, match="another database"):
        made.export()


def test_a_file_that_holds_something_else_is_not_overwritten(made: Made) -> None:
    made.export()
    five, six = sorted(path for path in made.paths() if path.parent.name == "0")
    five.unlink()
    six.write_bytes(made.to.get(NOTE_KEY))
    with pytest.raises(ReplicatorError, match="0000000000000006.ltx"):
        made.export()


def test_damaged_segments_are_not_exported(made: Made) -> None:
    ref = next(ref for ref in plan_export(made.native.store, made.to).steps if ref.last == 6).source
    made.native.damage(ref, lambda body: body[:200] + bytes([body[200] ^ 1]) + body[201:])
    with pytest.raises(SegmentDamaged):
        made.export()


def test_segments_that_do_not_follow_are_not_exported(made: Made) -> None:
    made.native.commit(Position(1, 7), made.source.insert(900, 905, 300), state_before=1)
    with pytest.raises(ChainBroken, match="does not follow"):
        made.export()


def test_in_a_bucket_files_have_other_names_and_their_time_as_metadata(made: Made) -> None:
    with mock_aws():
        client = boto3.client("s3", "us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
        client.create_bucket(Bucket="bucket")
        to = S3Store("bucket", "app/", S3Access(region="us-east-1", access_key="k", secret_key="s"))
        export(made.native.store, to)
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="bucket")["Contents"]]
        newest = f"app/0000/{6:016x}-{6:016x}.ltx"
        assert newest in keys
        assert f"app/0009/{1:016x}-{4:016x}.ltx" in keys
        metadata = client.head_object(Bucket="bucket", Key=newest)["Metadata"]
        assert metadata == {"litestream-timestamp": format_time(T0_MS + 6000)}
        report = restore(to, made.folder / "restored.db", RestoreOptions(at_ms=T0_MS + 5999))
        assert report.position == "0000000000000005"
        assert (made.folder / "restored.db").read_bytes() == made.state(5)


# -- the commands ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """stdout, or stderr when a failure is expected."""
    assert cli.run([*map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def test_export_restore_and_history_as_commands(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    native, to = f"file://{made.folder}/native", f"file://{made.folder}/export"
    assert "3 files would be written" in run(capsys, "export", "--format", "litestream", "--dry-run", native, to)
    assert made.paths() == [], "a dry run writes nothing"
    assert "exported 3 files" in run(capsys, "export", "--format", "litestream", native, to)
    assert "has everything, up to 1:6 (0000000000000006)" in run(capsys, "export", native, to)
    assert run(capsys, "history", to) == (
        f"Litestream 0.5: 0000000000000004 to 0000000000000006, {format_time(T0_MS + 4000)} to {format_time(T0_MS + 6000)}; "
        "3 transactions\n"
    )
    target = made.folder / "out.db"
    restoring = ["restore", "-o", target, "--txid", "0000000000000005", to]
    assert "would be restored from the replica of Litestream 0.5" in run(capsys, *restoring, "--dry-run")
    assert not target.exists()
    assert "from the replica of Litestream 0.5 to 0000000000000005" in run(capsys, *restoring)
    assert target.read_bytes() == made.state(5)
    assert "exists; move it away" in run(capsys, *restoring, code=1)


def test_a_transaction_of_litestream_is_named_by_16_digits(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.export()
    said = run(capsys, "restore", "-o", made.folder / "x", "--txid", "5", made.to.url, code=2)
    assert "write its 16 hex digits" in said


def test_a_replica_of_0_3_is_said_to_be_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"file://{GOLDEN}/litestream-0.3.13"
    assert "Litestream 0.3: generation c855cd869fc94939" in run(capsys, "history", url)
    assert "from the replica of Litestream 0.3" in run(capsys, "restore", "-o", tmp_path / "x", url)


def test_a_moment_before_a_replica_of_litestream_is_no_missing_replica(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = f"file://{GOLDEN}/litestream-0.5.17"
    early = ["--if-replica-exists", "--timestamp", "2020-01-01T00:00:00Z"]
    assert "its first moment is" in run(capsys, "restore", "-o", tmp_path / "x", *early, url, code=1)


# -- two replicas at one URL -------------------------------------------------------------------------------------------


def test_the_replica_that_reaches_the_later_moment_is_restored(made: Made) -> None:
    store = made.native.store
    assert choose(store).is_litestream is False
    shutil.copytree(GOLDEN / "litestream-0.5.17/ltx", made.folder / "native/ltx")
    chosen = choose(store)
    assert chosen.is_litestream, "the golden replica is from November 2026, this one from September"
    assert "an older replica of ours is there as well; --format native" in chosen.besides
    chosen = choose(store, at_ms=T0_MS + 5000)
    assert not chosen.is_litestream, "at that moment there was nothing of Litestream's"
    made.native.times[Position(1, 7)] = 1_800_000_000_000
    made.commit(7)
    chosen = choose(store)
    assert not chosen.is_litestream
    assert "a replica by Litestream is there as well, up to 2026-11-24" in chosen.besides


def test_the_kind_of_replica_can_be_named(made: Made) -> None:
    shutil.copytree(GOLDEN / "litestream-0.5.17/ltx", made.folder / "native/ltx")
    assert not choose(made.native.store, "native").is_litestream
    assert choose(made.native.store, "litestream").is_litestream
    with pytest.raises(UsageError, match="say which with --format"):
        choose(made.native.store, names_transaction=True)


@pytest.mark.parametrize("named", [None, "native"])
def test_an_empty_place_is_taken_for_ours(named: str | None) -> None:
    assert not choose(MemoryStore("empty"), named).is_litestream


def test_naming_litestream_where_it_is_not_is_an_error(made: Made) -> None:
    with pytest.raises(ReplicatorError, match="there is no replica of Litestream"):
        choose(made.native.store, "litestream")


def test_a_database_that_is_missing_at_the_start_comes_back_from_litestreams_replica(tmp_path: Path) -> None:
    entry = DatabaseConfig(tmp_path / "app.db", ReplicaConfig("memory://unused"))
    restore_if_missing(entry, FileStore(GOLDEN / "litestream-0.5.17"))
    states = json.loads((GOLDEN / "litestream-0.5.17/states.json").read_text())
    assert hashlib.sha256(entry.path.read_bytes()).hexdigest() == states[""]
