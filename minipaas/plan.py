"""From what is wanted and what is seen to the operations that bring the two together. Pure.

Owns the order of a swap: hold, drain, stop, ship, start, check, let go; a volume never has two writers. Never acts, and
never looks at a clock. Executing a part of a plan and planning again gives the rest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minipaas.edge import Route
from minipaas.engine import Container
from minipaas.model import App, Machine, Volume
from minipaas.ops import (
    AwaitHealthy,
    DrainUpstream,
    DropRoute,
    EnsureImage,
    EnsureVolume,
    HoldRoute,
    MarkLive,
    Operation,
    PurgeApp,
    PurgeVolume,
    RemoveContainer,
    RestoreVolume,
    RouteTo,
    StartMachine,
    StopMachine,
    SyncVolume,
)
from minipaas.workload import LABEL_MACHINE, Workload, container_name, runs, volume_ids


@dataclass(frozen=True)
class Wanted:
    """Desired state of one app, as far as one node is concerned: machines and volumes of that node only.

    hosts: names that the app answers to while it has no release.
    """

    app: App
    hosts: tuple[str, ...]
    live: Workload | None = None
    candidate: Workload | None = None
    machines: tuple[Machine, ...] = ()
    volumes: tuple[Volume, ...] = ()


@dataclass(frozen=True)
class Seen:
    """Facts about one app on one node.

    containers: all of the app, running or not. healthy, unhealthy: container ids; a container in neither was not checked yet.
    watched: ids of volumes that are in their directory and replicated. present: ids of volumes that are in their directory.
    images: references that the engine has. route: in force at the edge. resting: ids of machines that crashed and may not
    be started yet. purge_due: the time to keep a destroyed app is over.
    """

    containers: tuple[Container, ...] = ()
    healthy: frozenset[str] = frozenset()
    unhealthy: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()
    present: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    route: Route | None = None
    resting: frozenset[str] = frozenset()
    purge_due: bool = False


def plan(wanted: Wanted, seen: Seen) -> list[Operation]:
    """Operations in order; empty when the world is as wanted. Each needs those before it to have succeeded."""
    if wanted.app.destroyed_ms is not None:
        return _plan_destroyed(wanted, seen)
    planner = _Planner(wanted, seen)
    if wanted.candidate is not None:
        planner.deploy(wanted.candidate)
    elif wanted.live is not None:
        planner.keep(wanted.live)
    else:
        planner.idle()
    return planner.operations


def presumed_route(wanted: Wanted, seen: Seen) -> Route | None:
    """The route to put in force when this process begins, before anything was checked: what served goes on serving, and
    what is in the middle of a swap stays held. None for an app that has no route."""
    if wanted.app.destroyed_ms is not None:
        return None
    name = wanted.app.name
    if any(isinstance(operation, HoldRoute) for operation in plan(wanted, seen)):
        return Route(name, wanted.hosts, (), held=True)
    serving = wanted.live or wanted.candidate
    if serving is None or serving.port is None:
        return None
    machines = [machine for machine in wanted.machines if machine.release == serving.release]
    containers = [each for each in seen.containers if any(runs(each, machine) for machine in machines)]
    return Route(name, serving.hosts, tuple(f"{each.address}:{serving.port}" for each in containers if each.address))


def _plan_destroyed(wanted: Wanted, seen: Seen) -> list[Operation]:
    app = wanted.app.name
    operations: list[Operation] = []
    if seen.route is not None:
        operations.append(DropRoute(app))
    running = [each for each in seen.containers if each.state != "exited"]
    operations += [StopMachine(app, each.name) for each in running]
    kept = [volume for volume in wanted.volumes if volume.state == "created" and volume.id in seen.present]
    if not seen.purge_due:
        operations += [EnsureVolume(volume) for volume in kept if volume.id not in seen.watched]
        operations += [SyncVolume(volume) for volume in kept if running]
    operations += [RemoveContainer(app, each.name) for each in seen.containers]
    if seen.purge_due:
        operations += [PurgeVolume(volume) for volume in wanted.volumes]
        operations.append(PurgeApp(app))
    return operations


@dataclass
class _Planner:
    """Collects the operations of one plan. stopped: names of containers that an operation before has stopped."""

    wanted: Wanted
    seen: Seen
    operations: list[Operation] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    held: bool = False

    # -- the three situations

    def deploy(self, candidate: Workload) -> None:
        """A new release is to take over."""
        self._prepare_volumes()
        machines = self._machines_of(candidate)
        for machine in machines:
            if not self._is(machine, self.seen.healthy):
                self._bring_up(candidate, machine, hold=not self._live_serves(), ship=True)
        if machines:
            self._route(candidate, machines)
            self.operations.append(MarkLive(self.wanted.app.name, candidate.release))
            self._retire(machines)

    def keep(self, live: Workload) -> None:
        """The live release is to run."""
        self._prepare_volumes()
        machines = self._machines_of(live)
        for machine in machines:
            known = self._is(machine, self.seen.healthy | self.seen.unhealthy)
            runs_now = self._container_of(machine) is not None
            if not known and (runs_now or machine.id not in self.seen.resting):
                self._bring_up(live, machine, hold=not runs_now, ship=False)
        self._route(live, machines)
        self._retire(machines)

    def idle(self) -> None:
        """No release has ever been live, or none is any more."""
        self._prepare_volumes()
        nobody = Route(self.wanted.app.name, self.wanted.hosts, ())
        if self.seen.route is None or not _same_route(self.seen.route, nobody):
            self.operations.append(RouteTo(self.wanted.app.name, self.wanted.hosts, (), 0))
        self._retire(())

    # -- parts

    def _prepare_volumes(self) -> None:
        for volume in self.wanted.volumes:
            if volume.state == "restoring":
                self.operations.append(RestoreVolume(volume))
            if volume.id not in self.seen.watched:
                self.operations.append(EnsureVolume(volume))

    def _bring_up(self, workload: Workload, machine: Machine, *, hold: bool, ship: bool) -> None:
        """hold: although nothing has to be stopped. ship: although no writer has to be stopped."""
        container = self._container_of(machine)
        volumes = self._volumes_of(workload)
        blockers = self._blockers(machine, volumes)
        if container is None:
            self._ensure_image(workload)
        if hold or blockers:
            self._hold(workload)
        for blocker in blockers:
            self._stop(blocker)
        if container is None:
            if ship or blockers:
                self.operations += [SyncVolume(volume) for volume in volumes if volume.state == "created"]
            self.operations.append(StartMachine(workload, machine, volumes))
        self.operations.append(AwaitHealthy(workload, machine))

    def _ensure_image(self, workload: Workload) -> None:
        if workload.image not in self.seen.images:
            self.operations.append(EnsureImage(workload.app, workload.image, workload.image_digest))

    def _hold(self, workload: Workload) -> None:
        in_force = self.seen.route is not None and self.seen.route.held
        if workload.port is not None and not self.held and not in_force:
            self.operations.append(HoldRoute(workload.app, workload.hosts))
        self.held = True

    def _stop(self, container: Container) -> None:
        upstream = self._upstream(container)
        if upstream:
            self.operations.append(DrainUpstream(self.wanted.app.name, upstream))
        self.operations.append(StopMachine(self.wanted.app.name, container.name))
        self.stopped.add(container.name)

    def _route(self, workload: Workload, machines: Sequence[Machine]) -> None:
        """Let go of held requests, and send them to what is, or by then will be, healthy."""
        app = self.wanted.app.name
        if workload.port is None:
            if self.seen.route is not None:
                self.operations.append(DropRoute(app))
            return
        healthy = [self._container_of(machine) for machine in machines]
        upstreams = [f"{each.address}:{workload.port}" for each in healthy if each and each.id in self.seen.healthy]
        wanted = Route(app, workload.hosts, tuple(upstreams))
        awaited = any(isinstance(operation, AwaitHealthy) for operation in self.operations)
        if awaited or self.seen.route is None or not _same_route(self.seen.route, wanted):
            self.operations.append(RouteTo(app, workload.hosts, tuple(machines), workload.port))

    def _retire(self, machines: Sequence[Machine]) -> None:
        """Containers of machines that nobody wants any more go, after the routes have left them."""
        wanted = {machine.id for machine in machines}
        for container in self.seen.containers:
            if container.labels.get(LABEL_MACHINE) in wanted:
                continue
            if container.state != "exited" and container.name not in self.stopped:
                self._stop(container)
            self.operations.append(RemoveContainer(self.wanted.app.name, container.name))

    # -- questions

    def _machines_of(self, workload: Workload) -> tuple[Machine, ...]:
        return tuple(
            machine
            for machine in self.wanted.machines
            if machine.release == workload.release and machine.desired == "started"
        )

    def _volumes_of(self, workload: Workload) -> tuple[Volume, ...]:
        names = {name for name, _ in workload.mounts}
        return tuple(volume for volume in self.wanted.volumes if volume.name in names)

    def _live_serves(self) -> bool:
        live = self.wanted.live
        return live is not None and any(self._container_of(machine) for machine in self._machines_of(live))

    def _is(self, machine: Machine, states: frozenset[str]) -> bool:
        container = self._container_of(machine)
        return container is not None and container.id in states

    def _container_of(self, machine: Machine) -> Container | None:
        return next((each for each in self.seen.containers if runs(each, machine)), None)

    def _blockers(self, machine: Machine, volumes: Sequence[Volume]) -> list[Container]:
        """Containers that must have ended before the machine may start: other users of its volumes, and its older self."""
        wanted = {volume.id for volume in volumes}
        return [
            each
            for each in self.seen.containers
            if each.state != "exited"
            and not runs(each, machine)
            and (volume_ids(each) & wanted or each.name == container_name(machine))
        ]

    def _upstream(self, container: Container) -> str:
        """'' when requests never went to it."""
        live = self.wanted.live or self.wanted.candidate
        return f"{container.address}:{live.port}" if live and live.port and container.address else ""


def _same_route(first: Route, second: Route) -> bool:
    return (first.hosts, first.upstreams, first.held) == (second.hosts, second.upstreams, second.held)
