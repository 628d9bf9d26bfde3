"""Plans by table: what is wanted and seen, and the operations in order."""

from __future__ import annotations

from dataclasses import replace

from minipaas.edge import Route
from minipaas.engine import Container
from minipaas.health import Probe
from minipaas.model import App, Machine, Volume
from minipaas.plan import Seen, Wanted, plan, presumed_route
from minipaas.workload import Workload

HOSTS = ("guestbook.localhost",)
VOLUME = Volume(id="vol_1", app="guestbook", name="data", node="n", created_ms=1, state="created")
APP = App(name="guestbook", created_ms=1)


def workload(number: int, *, volume: bool = True) -> Workload:
    return Workload(
        app="guestbook", release=number, image=f"image:v{number}", image_digest="d", port=8080, hosts=HOSTS,
        mounts=(("data", "/data"),) if volume else (), probes=(Probe("tcp", 8080),),
    )  # fmt: skip


def machine(number: int, restarts: int = 0) -> Machine:
    return Machine(id=f"m{number}", app="guestbook", release=number, group="app", node="n", restarts=restarts)


def container(number: int, *, state: str = "running", restarts: int = 0, volume: bool = True) -> Container:
    labels = {
        "minipaas.app": "guestbook", "minipaas.machine": f"m{number}", "minipaas.release": str(number),
        "minipaas.restarts": str(restarts), "minipaas.volume": "vol_1" if volume else "",
    }  # fmt: skip
    address = f"10.0.0.{number}" if state == "running" else ""
    return Container(f"c{number}", f"minipaas-guestbook-m{number}", f"image:v{number}", labels, state, address)


def wanted(live: int | None, candidate: int | None = None, *, volume: bool = True, restarts: int = 0) -> Wanted:
    numbers = [number for number in (live, candidate) if number]
    return Wanted(
        app=APP,
        hosts=HOSTS,
        live=workload(live, volume=volume) if live else None,
        candidate=workload(candidate, volume=volume) if candidate else None,
        machines=tuple(machine(number, restarts) for number in numbers),
        volumes=(VOLUME,) if volume else (),
    )


def route(*numbers: int, held: bool = False) -> Route:
    return Route("guestbook", HOSTS, tuple(f"10.0.0.{number}:8080" for number in numbers), held)


SEEN = Seen(watched=frozenset({"vol_1"}), present=frozenset({"vol_1"}), images=frozenset({"image:v1", "image:v2"}))


def words(want: Wanted, seen: Seen) -> list[str]:
    return [type(operation).__name__ for operation in plan(want, seen)]


def test_nothing_to_do_is_an_empty_plan() -> None:
    seen = replace(SEEN, containers=(container(1),), healthy=frozenset({"c1"}), route=route(1))
    assert plan(wanted(1), seen) == []


def test_the_swap_of_a_single_writer_holds_drains_stops_ships_starts_checks_and_lets_go() -> None:
    seen = replace(SEEN, containers=(container(1),), healthy=frozenset({"c1"}), route=route(1))
    assert words(wanted(1, 2), seen) == [
        "HoldRoute", "DrainUpstream", "StopMachine", "SyncVolume", "StartMachine", "AwaitHealthy",
        "RouteTo", "MarkLive", "RemoveContainer",
    ]  # fmt: skip


def test_an_app_without_a_volume_starts_the_new_before_it_stops_the_old() -> None:
    seen = replace(SEEN, containers=(container(1, volume=False),), healthy=frozenset({"c1"}), route=route(1))
    assert words(wanted(1, 2, volume=False), seen) == [
        "StartMachine", "AwaitHealthy", "RouteTo", "MarkLive", "DrainUpstream", "StopMachine", "RemoveContainer",
    ]  # fmt: skip


def test_a_first_deploy_makes_the_volume_and_fetches_the_image() -> None:
    creating = replace(
        wanted(None, 1), volumes=(Volume(id="vol_1", app="guestbook", name="data", node="n", created_ms=1),)
    )
    assert words(creating, Seen()) == [
        "EnsureVolume", "EnsureImage", "HoldRoute", "StartMachine", "AwaitHealthy", "RouteTo", "MarkLive",
    ]  # fmt: skip


def test_a_volume_is_restored_before_it_is_watched_or_used() -> None:
    restoring = Volume(id="vol_1", app="guestbook", name="data", node="n", created_ms=1, state="restoring")
    assert words(replace(wanted(1), volumes=(restoring,)), Seen())[:2] == ["RestoreVolume", "EnsureVolume"]


def test_after_a_failed_release_its_container_is_stopped_before_the_old_one_starts() -> None:
    seen = replace(SEEN, containers=(container(1, state="exited"), container(2)), route=route(held=True))
    assert words(wanted(1), seen) == [
        "DrainUpstream", "StopMachine", "SyncVolume", "StartMachine", "AwaitHealthy", "RouteTo", "RemoveContainer",
    ]  # fmt: skip


def test_a_crashed_machine_is_started_again_with_requests_held() -> None:
    seen = replace(SEEN, containers=(container(1, state="exited"),), route=route(1))
    assert words(wanted(1), seen) == ["HoldRoute", "StartMachine", "AwaitHealthy", "RouteTo"]


def test_a_machine_that_crashed_again_and_again_rests_and_requests_get_an_answer() -> None:
    seen = replace(SEEN, containers=(container(1, state="exited"),), route=route(held=True), resting=frozenset({"m1"}))
    assert words(wanted(1), seen) == ["RouteTo"]


def test_a_restart_that_was_asked_for_replaces_the_container() -> None:
    seen = replace(SEEN, containers=(container(1),), healthy=frozenset({"c1"}), route=route(1))
    assert words(wanted(1, restarts=1), seen) == [
        "HoldRoute", "DrainUpstream", "StopMachine", "SyncVolume", "StartMachine", "AwaitHealthy", "RouteTo",
    ]  # fmt: skip


def test_a_release_whose_container_is_unhealthy_is_never_marked_live_unchecked() -> None:
    seen = replace(SEEN, containers=(container(2),), unhealthy=frozenset({"c2"}), route=route(held=True))
    assert words(wanted(1, 2), seen)[:2] == ["AwaitHealthy", "RouteTo"]


def test_a_destroyed_app_stops_and_keeps_its_volume() -> None:
    destroyed = Wanted(app=App(name="guestbook", created_ms=1, destroyed_ms=2), hosts=HOSTS, volumes=(VOLUME,))
    seen = replace(SEEN, containers=(container(1),), route=route(1))
    assert words(destroyed, seen) == ["DropRoute", "StopMachine", "SyncVolume", "RemoveContainer"]
    assert words(destroyed, SEEN) == []


def test_a_destroyed_app_is_purged_when_its_time_is_over() -> None:
    destroyed = Wanted(app=App(name="guestbook", created_ms=1, destroyed_ms=2), hosts=HOSTS, volumes=(VOLUME,))
    assert words(destroyed, replace(SEEN, purge_due=True)) == ["PurgeVolume", "PurgeApp"]


def test_what_serves_when_minipaas_starts_goes_on_serving() -> None:
    assert presumed_route(wanted(1), replace(SEEN, containers=(container(1),))) == route(1)


def test_a_swap_that_was_under_way_stays_held_when_minipaas_starts() -> None:
    stopped = (container(1, state="exited"),)
    assert presumed_route(wanted(1, 2), replace(SEEN, containers=stopped)) == route(held=True)
    assert presumed_route(wanted(1, 2), replace(SEEN, containers=(*stopped, container(2)))) == route(held=True)


def test_operations_describe_themselves_on_one_line() -> None:
    seen = replace(SEEN, containers=(container(1),), healthy=frozenset({"c1"}), route=route(1))
    described = [operation.describe() for operation in plan(wanted(1, 2), seen)]
    assert described[0] == "hold requests for guestbook.localhost"
    assert all("\n" not in text for text in described)
