"""Which directories ``recover`` works on, and beside whom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from minipaas.backups import BucketBackups, open_bucket
from minipaas.data_directory import data_lock
from minipaas.errors import AlreadyRunning, NodeNotEmpty, NotFound
from minipaas.fleet import read_fleet
from minipaas.recover import Marker, Recovery, recover
from minipaas.settings import LOST, RECOVERING, Settings, read_settings
from minipaas.setup import SetupRequest, setup
from minipaas.state import State


@dataclass
class Fleet:
    """A bucket that holds one, and what its owner asks for to have it back."""

    id: str
    request: Recovery

    @property
    def data_dir(self) -> Path:
        return self.request.data_dir

    def recover(self) -> Settings:
        return recover(self.request, lambda text: None, now_ms=lambda: 2000)

    def interrupt(self) -> None:
        """What a recovery that was killed after its first write has left."""
        self.data_dir.mkdir()
        (self.data_dir / RECOVERING).write_bytes(msgspec.json.encode(Marker(self.id, "b" * 16)))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    url = f"file://{tmp_path}/bucket"
    bucket = open_bucket(url, None)
    made = setup(SetupRequest(tmp_path / "a", tmp_path / "run", url, "a", "ams"), bucket, 1000)
    backups = BucketBackups(made.settings, bucket, bucket, lambda: 0)
    backups.start()
    backups.sync_state(10)
    backups.stop(5)
    request = Recovery(
        data_dir=tmp_path / "b",
        run_dir=tmp_path / "run",
        bucket=url,
        node="b",
        region="syd",
        http_listen="0.0.0.0:80",
        api_listen="127.0.0.1:7070",
        recovery_key=made.recovery_key,
        credentials=None,
    )
    return Fleet(read_fleet(bucket).id, request)


def test_a_recovery_that_was_interrupted_goes_on_as_the_same_node(fleet: Fleet) -> None:
    fleet.interrupt()
    settings = fleet.recover()
    assert settings == read_settings(fleet.data_dir)
    assert settings.node_id == "b" * 16
    assert not (fleet.data_dir / RECOVERING).exists()


def test_a_marker_that_comes_back_with_the_power_does_not_make_a_node_half_recovered(fleet: Fleet) -> None:
    settings = fleet.recover()
    state = State(settings.state_path, lambda: 3000)
    state.create_app("made-later")
    (fleet.data_dir / RECOVERING).write_bytes(msgspec.json.encode(Marker(fleet.id, settings.node_id)))
    with pytest.raises(NodeNotEmpty, match="go on with: minipaas serve"):
        fleet.recover()
    assert not (fleet.data_dir / RECOVERING).exists()
    assert [app.name for app in state.apps()] == ["made-later"]
    state.close()


def test_two_recoveries_never_work_on_one_directory(fleet: Fleet) -> None:
    fleet.interrupt()
    settings = Settings(data_dir=fleet.data_dir, node_id="b" * 16, node="b", region="syd", bucket="")
    before = (fleet.data_dir / RECOVERING).read_bytes()
    with data_lock(settings), pytest.raises(AlreadyRunning, match="another minipaas works on"):
        fleet.recover()
    assert (fleet.data_dir / RECOVERING).read_bytes() == before
    assert {path.name for path in fleet.data_dir.iterdir()} == {RECOVERING, settings.lock_path.name}


def test_a_directory_that_holds_nothing_but_a_lock_is_empty(fleet: Fleet) -> None:
    fleet.data_dir.mkdir()
    (fleet.data_dir / "serve.lock").touch()
    assert fleet.recover().node == "b"


def test_a_marker_does_not_hide_that_a_node_has_lost_its_fleet(fleet: Fleet) -> None:
    fleet.interrupt()
    (fleet.data_dir / LOST).write_text("node c has it")
    with pytest.raises(NodeNotEmpty, match="had not shipped"):
        fleet.recover()


def test_a_half_recovered_directory_is_not_served(fleet: Fleet) -> None:
    fleet.interrupt()
    with pytest.raises(NotFound, match=r"is half recovered; give the same minipaas recover again"):
        read_settings(fleet.data_dir)
