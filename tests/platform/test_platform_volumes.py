"""The life of a volume: its mark, a disk that is not mounted, deletion that is overtaken, and what status says meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import apsw
import pytest
from platform_support import GUESTBOOK, NODE, OWNER, Killed, Live, Stage, until

from minipaas import volumes
from minipaas.backups import BucketBackups
from minipaas.errors import Unavailable
from minipaas.model import Volume
from minipaas.ops import PurgeVolume
from minipaas.settings import Settings
from minipaas.workload import container_name
from replicator.store.memory import MemoryStore

VOLUME = Volume(id="vol_1", app="guestbook", name="data", node=NODE.id, created_ms=1, state="created")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, node_id=NODE.id, node="a", region="ams", bucket="memory://")


@pytest.fixture
def directory(settings: Settings) -> Path:
    """Of a volume that has its mark and holds a file."""
    made = volumes.make(settings, VOLUME)
    volumes.mark(settings, VOLUME)
    (made / "app.db").write_bytes(b"rows")
    assert missing(settings) == ""
    return made


def missing(settings: Settings) -> str:
    """What a look says; as at every step of the reconciler, what was found is adopted."""
    sight = volumes.look(settings, VOLUME)
    if sight.seen is not None:
        volumes.adopt(settings, VOLUME, sight.seen)
    return sight.missing


# -- the mark


def test_a_look_writes_nothing(settings: Settings, directory: Path) -> None:
    (mark,) = directory.parent.glob(".*.volume")
    mark.unlink()
    assert volumes.look(settings, VOLUME).missing == ""
    assert not mark.exists()


def test_a_disk_that_goes_after_the_look_is_missing_at_the_next(
    settings: Settings, directory: Path, mount: Callable[[Path], None], unmount: Callable[[Path], None]
) -> None:
    (directory / "app.db").unlink()
    mount(directory)
    (directory / "app.db").write_bytes(b"on the disk")
    sight = volumes.look(settings, VOLUME)
    unmount(directory)
    assert sight.seen is not None
    volumes.adopt(settings, VOLUME, sight.seen)
    assert "its disk is not mounted" in volumes.look(settings, VOLUME).missing


def test_a_volume_leaves_nothing_in_its_own_directory(directory: Path) -> None:
    assert [path.name for path in directory.iterdir()] == ["app.db"]


def test_a_volume_whose_app_deleted_everything_is_not_missing(settings: Settings, directory: Path) -> None:
    (directory / "app.db").unlink()
    assert missing(settings) == ""


def test_an_empty_directory_in_the_place_of_a_volume_is_not_the_volume(settings: Settings, directory: Path) -> None:
    directory.rename(directory.with_name("away"))
    assert "is gone" in missing(settings)
    directory.mkdir()
    (directory / "lost+found").mkdir()
    assert "another directory" in missing(settings)
    shutil.rmtree(directory)
    directory.with_name("away").rename(directory)
    assert missing(settings) == ""


def test_the_files_of_a_volume_may_be_copied_to_another_directory(settings: Settings, directory: Path) -> None:
    shutil.copytree(directory, directory.with_name("copy"))
    shutil.rmtree(directory)
    directory.with_name("copy").rename(directory)
    assert missing(settings) == ""


def test_a_volume_from_before_marks_is_taken_when_it_holds_something(settings: Settings, directory: Path) -> None:
    for mark in directory.parent.glob(".*.volume"):
        mark.unlink()
    (directory / "app.db").rename(directory.parent / "app.db")
    assert "has no mark" in missing(settings)
    (directory.parent / "app.db").rename(directory / "app.db")
    assert missing(settings) == ""
    (directory / "app.db").unlink()
    assert missing(settings) == ""


def test_what_was_on_a_disk_of_its_own_is_missing_without_it_whatever_lies_below(
    settings: Settings, directory: Path, mount: Callable[[Path], None], unmount: Callable[[Path], None]
) -> None:
    mount(directory)
    assert "another directory" in missing(settings)  # a new disk over the files that are there
    (directory / "app.db").write_bytes(b"moved here")
    assert missing(settings) == ""
    unmount(directory)
    assert (directory / "app.db").read_bytes() == b"rows"
    assert "its disk is not mounted" in missing(settings)
    with pytest.raises(Unavailable, match="another disk"):
        mount(directory)
        volumes.set_aside(settings, VOLUME)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"volume":"vol_other","inode":1,"mounted":true,"held":true}'])
def test_a_mark_that_is_damaged_or_of_another_volume_counts_for_nothing(
    settings: Settings, directory: Path, damage: bytes
) -> None:
    next(directory.parent.glob(".*.volume")).write_bytes(damage)
    assert missing(settings) == ""


# -- an app whose volume is missing


def lose_disk(stage: Stage) -> Path:
    directory = stage.settings.volume_dir("guestbook", "data")
    (directory / "app.db").write_bytes(b"rows")
    stage.reconciler.step()
    directory.rename(directory.with_name("disk"))
    directory.mkdir()
    return directory


def test_an_app_is_not_started_on_an_empty_directory_and_starts_when_its_disk_is_back(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    directory = lose_disk(stage)
    stage.engine.fake.containers.end(container_name(stage.state.machines("guestbook")[0]), exit_code=1)
    stage.reboot()
    stage.reconciler.step()
    assert stage.serving() == []
    assert "is missing" in stage.world.facts.troubles()["guestbook"].words
    assert stage.backups.watched == {}
    directory.rmdir()
    directory.with_name("disk").rename(directory)
    stage.settle()
    assert (stage.serving(), stage.routed_to()) == (["v1"], ["v1"])
    assert list(stage.backups.watched) == ["vol_guestbook_data"]


def test_a_disk_that_goes_while_the_app_runs_ends_the_watching_and_the_app_goes_on(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    lose_disk(stage)
    stage.reconciler.step()
    assert stage.backups.watched == {}
    assert stage.serving() == ["v1"]


def test_a_volume_that_was_restored_has_its_mark(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    for container in stage.engine.containers.list():
        stage.engine.fake.containers.remove(container.name)
    shutil.rmtree(stage.settings.volumes_dir)
    stage.backups.lost["vol_guestbook_data"] = {"app.db": b"rows"}
    stage.state.set_volume_state("vol_guestbook_data", "restoring")
    stage.reboot()
    stage.settle()
    lose_disk(stage)
    assert "another directory" in stage.world.missing(stage.state.volumes()[0])


# -- what status says


def test_a_volume_that_is_not_watched_is_never_called_protected(stage: Stage) -> None:
    with Live(stage) as live:
        live.reconciler.wake = lambda: None  # type: ignore[method-assign]
        until(lambda: live.world.facts.watched() == frozenset())
        volume = replace_volume(stage)
        shown = live.platform.status(OWNER)
        assert not shown.durable
        assert [(each.volume, each.words) for each in shown.databases] == [(volume.id, "catching up")]


def replace_volume(stage: Stage) -> Volume:
    stage.state.create_app("other")
    release = stage.new_release("other", 1, "image", "", GUESTBOOK.replace("guestbook", "other"), {})
    stage.state.add_release(replace(release, machines=()))
    return stage.state.volumes("other")[0]


def test_a_node_that_knows_of_no_database_is_not_durable(live: Live) -> None:
    assert not live.platform.status(OWNER).durable


def test_a_missing_volume_is_shown_instead_of_the_databases_it_had(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.backups.watched.clear()
    with Live(stage) as live:
        until(lambda: live.platform.status(OWNER).durable)
        lose_disk(stage)
        shown = live.platform.status(OWNER)
        assert [each.words for each in shown.databases] == ["NOT PROTECTED"]
        assert "the volume is missing" in shown.databases[0].reason


# -- deletion


def destroyed(stage: Stage) -> Path:
    stage.want(GUESTBOOK)
    stage.settle()
    directory = stage.settings.volume_dir("guestbook", "data")
    (directory / "app.db").write_bytes(b"rows")
    stage.state.destroy_app("guestbook", 1000)
    stage.settle()
    stage.now_ms += 1001
    return directory


def test_an_app_that_is_brought_back_while_its_volume_is_deleted_keeps_it(stage: Stage) -> None:
    directory = destroyed(stage)
    volume = stage.state.volumes()[0]
    stage.state.create_app("guestbook")  # after the deletion was planned
    PurgeVolume(volume).apply(stage.world)
    stage.world.state.purge_app("guestbook")
    assert (directory / "app.db").read_bytes() == b"rows"
    assert [each.id for each in stage.state.volumes()] == [volume.id]
    stage.want(GUESTBOOK)
    stage.settle()
    assert stage.routed_to() == ["v2"]


def test_nothing_of_a_volume_that_is_deleted_stays_on_the_disk(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    volume, bucket = stage.state.volumes()[0], MemoryStore()
    directory = stage.world.directory(volume)
    backups = BucketBackups(stage.settings, bucket, bucket, lambda: 0)
    backups.start()
    backups.watch_volume(volume.id, directory)
    connection = apsw.Connection(str(directory / "app.db"))
    connection.execute(
        "PRAGMA journal_mode=wal; CREATE TABLE entries (text); INSERT INTO entries VALUES ('dear diary')"
    )
    backups.sync_volume(volume.id, 10)
    connection.close()
    assert places_of(volume.id, stage.directory) != []
    stage.state.destroy_app("guestbook", 0)
    stage.now_ms += 1
    PurgeVolume(volume).apply(replace(stage.world, backups=backups))
    backups.stop(5)
    assert (stage.state.volumes(), directory.exists(), places_of(volume.id, stage.directory)) == ([], False, [])
    assert any(volume.id in each.key for each in bucket.list())


def places_of(volume_id: str, directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.name == volume_id]


def test_killed_before_the_state_forgets_the_volume_it_comes_back_whole_or_goes_whole(stage: Stage) -> None:
    directory = destroyed(stage)
    volumes.set_aside(stage.settings, stage.state.volumes()[0])
    stage.reboot()
    stage.state.create_app("guestbook")
    stage.want(GUESTBOOK)
    stage.settle()
    assert (directory / "app.db").read_bytes() == b"rows"
    stage.state.destroy_app("guestbook", 0)
    volumes.set_aside(stage.settings, stage.state.volumes()[0])
    stage.reboot()
    stage.settle()
    assert (stage.state.volumes(), [path.name for path in stage.settings.volumes_dir.rglob("app.db")]) == ([], [])


def test_killed_after_the_state_forgot_the_volume_the_rest_goes_at_the_next_start(stage: Stage) -> None:
    directory = destroyed(stage)
    volume = stage.state.volumes()[0]
    volumes.set_aside(stage.settings, volume)
    assert stage.state.purge_volume(volume.id)
    stage.reboot()
    stage.settle()
    stage.state.create_app("guestbook")
    stage.want(GUESTBOOK)
    stage.settle()
    assert list(directory.iterdir()) == []  # a new volume of the same name has nothing of the old one
    volumes.clean(stage.settings, {volume.id})
    assert list(stage.settings.volumes_dir.rglob("app.db")) != []
    volumes.clean(stage.settings, ())
    assert list(stage.settings.volumes_dir.rglob("app.db")) == []


def test_the_images_of_an_app_leave_the_engine_with_it(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.want(GUESTBOOK)
    stage.settle()
    destroyed(stage)
    images = {release.image for release in stage.state.releases("guestbook")}
    assert len(images) == 3 and all(stage.engine.images.exists(image) for image in images)
    stage.settle()
    assert stage.state.apps() == []
    assert not any(stage.engine.images.exists(image) for image in images)


def test_a_purge_that_is_killed_after_any_operation_comes_to_the_same_end(tmp_path: Path) -> None:
    kill_at, killed = 1, True
    while killed:
        (tmp_path / str(kill_at)).mkdir()
        stage = Stage(tmp_path / str(kill_at))
        destroyed(stage)
        stage.applied.clear()
        stage.kill_after = kill_at
        try:
            stage.settle()
            killed = False
        except Killed:
            stage.reboot()
            stage.settle()
        assert (stage.state.apps(), stage.state.volumes()) == ([], [])
        assert [path for path in stage.settings.volumes_dir.rglob("*") if path.name != ".aside"] == []
        stage.state.close()
        kill_at += 1
