"""The reconciler over fakes: deploys, failures, crashes, and being killed after every single operation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from platform_support import GUESTBOOK, SITE, Killed, Stage

from minipaas.errors import StateUnavailable
from minipaas.workload import container_name


def test_a_first_deploy_serves(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    assert (stage.serving(), stage.routed_to(), stage.status_of(1)) == (["v1"], ["v1"], "live")


def test_an_idle_step_says_nothing_and_writes_nothing(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    before = stage.state.events(), len(stage.applied), stage.edge.applied
    wal = stage.settings.state_path.with_name("state.db-wal")
    size = wal.stat().st_size
    assert stage.reconciler.step().sentence == ""
    assert (stage.state.events(), len(stage.applied), stage.edge.applied) == before
    assert wal.stat().st_size == size


def test_a_second_release_takes_over_and_the_first_is_removed(stage: Stage) -> None:
    for _ in range(2):
        stage.want(GUESTBOOK)
        stage.settle()
    assert (stage.serving(), stage.routed_to()) == (["v2"], ["v2"])
    assert (stage.status_of(1), stage.status_of(2)) == ("superseded", "live")
    assert len(stage.engine.containers.list()) == 1


def test_a_release_that_crashes_fails_with_its_words_and_the_old_one_serves_again(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    number = stage.want(GUESTBOOK)
    stage.engine.fake.faults.crash["localhost/minipaas/guestbook:v2"] = 1
    stage.settle()
    assert (stage.serving(), stage.routed_to(), stage.status_of(number)) == (["v1"], ["v1"], "failed")
    assert stage.state.release("guestbook", number).message.startswith("exited with 1 after 0.0 s")


def test_a_release_that_is_never_healthy_fails_with_what_the_check_said(stage: Stage) -> None:
    stage.want(SITE, "site")
    stage.settle()
    stage.want(SITE, "site")
    stage.prober.failing["localhost/minipaas/site:v2"] = "GET /health gave 500"
    stage.settle()
    assert (stage.serving("site"), stage.status_of(2, "site")) == (["v1"], "failed")
    assert "not healthy after 45 s: GET /health gave 500" in stage.state.release("site", 2).message


def test_a_release_that_listens_on_loopback_only_is_told_so(stage: Stage) -> None:
    table = "  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n"
    stage.engine.fake.containers.exec_answer = lambda name, command: (0, table)
    stage.prober.failing["localhost/minipaas/guestbook:v1"] = "nothing listens on port 8080"
    stage.want(GUESTBOOK)
    stage.settle()
    assert "listens on 127.0.0.1:8080 only" in stage.state.release("guestbook", 1).message
    assert stage.routed_to() == []


def test_a_start_that_the_engine_refuses_fails_the_release(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.engine.fake.faults.refuse_start["localhost/minipaas/guestbook:v1"] = "exec: nope: not found"
    stage.settle()
    assert "exec: nope: not found" in stage.state.release("guestbook", 1).message


def test_a_crashed_container_is_started_again_and_the_journal_says_so(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    machine = stage.state.machines("guestbook")[0]
    stage.engine.fake.containers.end(container_name(machine), exit_code=3)
    stage.settle()
    assert (stage.serving(), stage.routed_to()) == (["v1"], ["v1"])
    assert "exited with 3; starting it again" in stage.state.events(1)[0].text


def test_a_container_that_vanished_is_made_again(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.engine.fake.containers.remove(container_name(stage.state.machines("guestbook")[0]))
    stage.settle()
    assert stage.routed_to() == ["v1"]


def test_a_crash_loop_is_slowed_down(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.engine.fake.faults.crash["localhost/minipaas/guestbook:v1"] = 1
    stage.engine.fake.containers.end(container_name(stage.state.machines("guestbook")[0]), exit_code=1)
    begin, starts = stage.clock.time, len(stage.engine.witness.runs)
    while stage.clock.time < begin + 600:
        stage.clock.time += stage.reconciler.step().wait_s
    assert 5 < len(stage.engine.witness.runs) - starts < 25
    assert stage.routed_to() == []


def test_a_user_restart_swaps_the_container(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    before = stage.engine.running()[0].id
    stage.state.restart_machines("guestbook")
    stage.settle()
    assert stage.routed_to() == ["v1"]
    assert stage.engine.running()[0].id != before


def test_an_engine_that_is_away_is_waited_for(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.engine.fake.faults.unavailable = True
    assert "cannot look after the apps" in stage.reconciler.step().sentence
    assert "not reachable" in stage.world.facts.troubles()[""].words
    stage.engine.fake.faults.unavailable = False
    stage.settle()
    assert stage.routed_to() == ["v1"]
    assert not stage.world.facts.troubles()


def test_an_edge_that_died_gets_its_routes_again(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.edge.stop()
    stage.edge._routes = ()
    stage.settle()
    assert [route.app for route in stage.edge._routes] == ["guestbook"]


def test_a_bucket_that_is_away_does_not_stop_a_swap(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.backups.unreachable = True
    stage.want(GUESTBOOK)
    stage.settle()
    assert stage.routed_to() == ["v2"]
    assert any("not shipped yet" in event.text for event in stage.state.events())


def test_the_volume_is_shipped_between_stop_and_start(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.backups.synced.clear()
    stage.want(GUESTBOOK)
    stage.settle()
    assert stage.backups.synced == ["vol_guestbook_data"]


def test_the_directory_of_a_volume_that_held_data_is_never_made_anew(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    directory = stage.settings.volume_dir("guestbook", "data")
    shutil.rmtree(directory)
    stage.engine.fake.containers.end(container_name(stage.state.machines("guestbook")[0]), exit_code=1)
    stage.reconciler.step()
    assert not directory.exists()
    assert "is gone" in stage.world.facts.troubles()["guestbook"].words
    assert stage.serving() == []


def test_an_image_that_the_engine_lost_comes_from_the_bucket(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    image = "localhost/minipaas/guestbook:v1"
    stage.engine.images.remove(image)
    stage.engine.fake.containers.remove(container_name(stage.state.machines("guestbook")[0]))
    stage.settle()
    assert stage.routed_to() == ["v1"]
    assert stage.engine.images.exists(image)


def test_a_node_that_is_recovered_restores_volumes_and_starts_apps(stage: Stage) -> None:
    stage.want(GUESTBOOK, secrets={"KEY": "s3cret"})
    stage.settle()
    for container in stage.engine.containers.list():
        stage.engine.fake.containers.remove(container.name)
    shutil.rmtree(stage.settings.volumes_dir)
    stage.backups.lost["vol_guestbook_data"] = {"app.db": b"rows"}
    stage.state.set_volume_state("vol_guestbook_data", "restoring")
    stage.reboot()
    stage.settle()
    assert (stage.settings.volume_dir("guestbook", "data") / "app.db").read_bytes() == b"rows"
    assert stage.routed_to() == ["v1"]
    assert stage.engine.witness.runs[-1].env["KEY"] == "s3cret"


def test_destroy_stops_the_app_and_keeps_its_files_until_the_time_is_over(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    directory = stage.settings.volume_dir("guestbook", "data")
    (directory / "app.db").write_bytes(b"rows")
    stage.state.destroy_app("guestbook", 1000)
    stage.settle()
    assert (stage.engine.containers.list(), stage.routed_to(), directory.exists()) == ((), [], True)
    stage.now_ms += 1001
    stage.settle()
    assert not directory.exists()
    assert (stage.state.apps(), stage.state.volumes()) == ([], [])


def test_nothing_is_known_of_an_app_that_was_purged(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.world.facts.set_trouble("guestbook", "its volume is another disk, which is not deleted")
    stage.state.destroy_app("guestbook", 0)
    stage.now_ms += 1
    stage.settle()
    assert stage.state.apps() == []
    assert (stage.world.facts.troubles(), stage.world.facts.subjects()) == ({}, frozenset())


def test_starts_and_words_of_machines_that_were_replaced_are_forgotten(stage: Stage) -> None:
    for _ in range(3):
        stage.want(GUESTBOOK)
        stage.engine.fake.faults.crash["localhost/minipaas/guestbook:v2"] = 1
        stage.settle()
    assert stage.world.facts.subjects() == {machine.id for machine in stage.state.machines("guestbook")}


def test_an_app_that_is_destroyed_and_deployed_again_has_its_data(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    (stage.settings.volume_dir("guestbook", "data") / "app.db").write_bytes(b"rows")
    stage.state.destroy_app("guestbook", 1000)
    stage.settle()
    stage.state.create_app("guestbook")
    stage.want(GUESTBOOK)
    stage.settle()
    assert stage.routed_to() == ["v2"]
    assert [str(mount.source) for mount in stage.engine.witness.runs[-1].mounts] == [
        str(stage.settings.volume_dir("guestbook", "data"))
    ]
    assert (stage.settings.volume_dir("guestbook", "data") / "app.db").read_bytes() == b"rows"


def test_apps_get_their_environment(stage: Stage) -> None:
    stage.want(GUESTBOOK, secrets={"COLOUR": "red"})
    stage.settle()
    env = stage.engine.witness.runs[-1].env
    assert env["COLOUR"] == "red"
    assert (env["PORT"], env["FLY_APP_NAME"], env["FLY_REGION"]) == ("8080", "guestbook", "ams")
    assert (env["MINIPAAS_RELEASE"], env["MINIPAAS_VOLUME_DATA"]) == ("v1", "/data")
    assert len(env["FLY_MACHINE_VERSION"]) == 26


def test_a_restart_of_minipaas_is_not_noticed(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    before = stage.engine.running()[0].id, stage.edge.applied
    stage.reboot()
    stage.settle()
    assert (stage.engine.running()[0].id, stage.edge.applied) == before


def test_a_full_disk_does_not_keep_a_crashed_app_from_starting_again(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.engine.fake.containers.end(container_name(stage.state.machines("guestbook")[0]), exit_code=1)
    fill(stage)
    stage.settle()
    assert stage.routed_to() == ["v1"]


def test_a_deploy_on_a_full_disk_is_finished_when_there_is_room(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    fill(stage)
    stage.reconciler.step()
    assert "is full" in stage.world.facts.troubles()["guestbook"].words
    stage.state._db.pragma("max_page_count", 2**31)
    stage.settle()
    assert (stage.routed_to(), stage.status_of(1)) == (["v1"], "live")


def fill(stage: Stage) -> None:
    """No page can be added to the state any more, and none in it is free."""
    stage.state._db.pragma("max_page_count", 1)
    for size in (9000, 1):
        with pytest.raises(StateUnavailable):
            for _ in range(500):
                stage.state.add_event("", "x" * size)


# -- killed anywhere


def first_deploy(stage: Stage) -> None:
    stage.want(GUESTBOOK)


def second_deploy(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.want(GUESTBOOK)


def rolling_deploy(stage: Stage) -> None:
    stage.want(SITE)
    stage.settle()
    stage.want(SITE)


def failing_deploy(stage: Stage) -> None:
    second_deploy(stage)
    stage.engine.fake.faults.crash["localhost/minipaas/guestbook:v2"] = 1


def user_restart(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.state.restart_machines("guestbook")


def destruction(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.state.destroy_app("guestbook", 10**9)


def crash(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    stage.engine.fake.containers.end(container_name(stage.state.machines("guestbook")[0]), exit_code=1)


@pytest.mark.parametrize(
    ("story", "serving", "statuses"),
    [
        (first_deploy, ["v1"], ["live"]),
        (second_deploy, ["v2"], ["live", "superseded"]),
        (rolling_deploy, ["v2"], ["live", "superseded"]),
        (failing_deploy, ["v1"], ["failed", "live"]),
        (user_restart, ["v1"], ["live"]),
        (destruction, [], ["superseded"]),
        (crash, ["v1"], ["live"]),
    ],
)
def test_killed_after_any_operation_it_comes_to_the_same_end(
    tmp_path: Path, story: Callable[[Stage], None], serving: list[str], statuses: list[str]
) -> None:
    kill_at, killed = 1, True
    while killed:
        directory = tmp_path / str(kill_at)
        directory.mkdir()
        stage = Stage(directory)
        story(stage)
        stage.applied.clear()
        stage.kill_after = kill_at
        try:
            stage.settle()
            killed = False
        except Killed:
            stage.reboot()
            stage.settle()
        assert (stage.serving(), stage.routed_to()) == (serving, serving), (
            f"killed after {stage.applied[kill_at - 1 : kill_at]}"
        )
        assert [str(release.status) for release in stage.state.releases("guestbook")] == statuses
        assert len(stage.engine.containers.list()) == len(serving)
        stage.state.close()
        kill_at += 1
    assert kill_at > 3
