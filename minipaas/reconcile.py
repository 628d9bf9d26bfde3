"""The reconciler: makes the world agree with desired state, one worker for each app that has work.

Owns the order of reading, planning, applying and recording, and when to try again. It can be killed at any point: all that it
knows comes from desired state and from the labels of containers. Never decides what is wanted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipaas import volumes
from minipaas.engine import Container
from minipaas.errors import (
    EdgeError,
    EngineError,
    EngineUnavailable,
    ManifestError,
    NotFound,
    PlatformError,
    VolumeGone,
)
from minipaas.model import App, Volume
from minipaas.ops import MachineFailed, MarkFailed, Operation, Overtaken, World
from minipaas.plan import Seen, Wanted, plan, presumed_route
from minipaas.workload import LABEL_APP, default_host, runs, workload_of
from replicator import ReplicatorError

MAX_ROUNDS = 50
EXPECTED = (PlatformError, ReplicatorError, OSError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What a step did, '' for nothing; and how long to wait for the next, unless woken."""

    sentence: str
    wait_s: float


class StopClock:
    """``ops.Clock`` of a running platform: waiting ends when ``stop`` is called."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        return self._stopping.wait(seconds)

    def stop(self) -> None:
        self._stopping.set()


def in_thread(name: str, work: Callable[[], None]) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()


class Reconciler:
    """``step`` finds the apps that have work and gives each to a worker; one worker an app at any time.

    on_event: (app, operation) before each operation, for progress. on_applied: after each; tests end the process there.
    spawn: runs a worker; in tests, in the same thread. now_ms: wall clock, for the time until a purge only.
    """

    def __init__(
        self,
        world: World,
        now_ms: Callable[[], int],
        *,
        on_event: Callable[[str, Operation], None] = lambda app, operation: None,
        on_applied: Callable[[Operation], None] = lambda operation: None,
        spawn: Callable[[str, Callable[[], None]], None] = in_thread,
    ) -> None:
        self._world, self._now_ms = world, now_ms
        self._on_event, self._on_applied, self._spawn = on_event, on_applied, spawn
        self._idle = threading.Condition()
        self._busy: set[str] = set()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._seeded = False
        world.state.subscribe(lambda app: self.wake())

    # -- running

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float) -> bool:
        """True when all workers have ended. One that has not waits for the engine; what it was at is planned anew at the next start."""
        self._stopping.set()
        self._world.clock.stop()
        self.wake()
        deadline = time.monotonic() + timeout_s
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._idle:
            return self._idle.wait_for(lambda: not self._busy, max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            wait_s = self.step().wait_s
            self._wake.wait(wait_s)

    # -- one step

    def step(self) -> Step:
        """Look at everything once. Never raises: what is wrong becomes a trouble of the node, with a time to try again."""
        try:
            return self._step()
        except EXPECTED as error:
            return Step(f"cannot look after the apps now: {error}", self._world.facts.set_trouble("", str(error)))
        except Exception as error:  # a fault of ours must not end the loop that looks after everything
            log.exception("the reconciler failed")
            return Step(f"internal error: {error!r}", self._world.facts.set_trouble("", f"internal error: {error!r}"))

    def _step(self) -> Step:
        world = self._world
        known = (
            world.facts.subjects()
        )  # first, since what is learned meanwhile can be of what nobody had asked for by then
        containers = world.engine.containers.list()
        world.facts.set_containers(containers)
        apps = world.state.apps()
        world.facts.drop(known - self._subjects(apps))
        if not self._seeded:
            self._seed(apps, containers)
        self._refresh_edge()
        begun = [app.name for app in apps if self._begin(app, containers)]
        waits = [world.limits.sweep_s, *(wait for app in apps if (wait := self._next_try(app)) is not None)]
        return Step(f"working on {', '.join(begun)}" if begun else "", max(0.05, min(waits)))

    def _subjects(self, apps: Sequence[App]) -> set[str]:
        """All that somebody wants, as ``Facts`` calls it."""
        machines = {machine.id for app in apps for machine in self._world.state.machines(app.name)}
        return {*machines, *(app.name for app in apps), *(volume.id for volume in self._world.state.volumes())}

    def _seed(self, apps: Sequence[App], containers: Sequence[Container]) -> None:
        """Routes for what runs already, before any worker changes one: a restart of minipaas is not noticed by users."""
        routes = []
        for app in apps:
            try:
                wanted = self._wanted(app.name)
                route = presumed_route(wanted, self._seen(wanted, containers))
            except ManifestError as error:
                self._world.facts.set_trouble(app.name, str(error))
                continue
            if route is not None:
                routes.append(route)
        self._world.router.seed(routes)
        self._seeded = True

    def _refresh_edge(self) -> None:
        """A dead edge is no reason to leave crashed containers as they are."""
        try:
            self._world.router.refresh()
        except EdgeError as error:
            self._world.facts.set_trouble("", str(error))
        else:
            self._world.facts.clear_trouble("")

    def _begin(self, app: App, containers: Sequence[Container]) -> bool:
        """Give the app to a worker, if it has work and none has it. True when it was given."""
        with self._idle:
            if app.name in self._busy or self._resting(app.name):
                return False
            self._busy.add(app.name)
        needed = False
        try:
            wanted = self._wanted(app.name)
            needed = bool(plan(wanted, self._seen(wanted, containers)))
            if not needed:
                self._world.facts.clear_trouble(app.name)
        except EXPECTED as error:
            self._world.facts.set_trouble(app.name, str(error), self._world.state.generation(app.name))
        finally:
            if not needed:
                self._release(app.name)
        if needed:
            self._spawn(f"app-{app.name}", lambda: self._work(app.name))
        return needed

    def _release(self, app: str) -> None:
        with self._idle:
            self._busy.discard(app)
            self._idle.notify_all()

    def _resting(self, app: str) -> bool:
        """It is in trouble, the time to try again has not come, and nobody changed what is wanted of it."""
        trouble = self._world.facts.trouble(app)
        return (
            trouble is not None
            and self._world.clock.now() < trouble.until
            and trouble.generation == self._world.state.generation(app)
        )

    def _next_try(self, app: App) -> float | None:
        trouble = self._world.facts.trouble(app.name)
        waits = [trouble.until - self._world.clock.now()] if trouble else []
        for machine in self._world.state.machines(app.name):
            if (wait := self._world.facts.wait_before_start(machine)) > 0:
                waits.append(wait)
        return min(waits) if waits else None

    # -- the worker of one app

    def _work(self, app: str) -> None:
        try:
            self._settle(app)
        finally:
            self._release(app)
            self.wake()

    def _settle(self, app: str) -> None:
        """Plan and apply until nothing is left to do, or something has to wait."""
        facts, state = self._world.facts, self._world.state
        for _ in range(MAX_ROUNDS):
            if self._stopping.is_set():
                return
            try:
                if not self._round(app):
                    facts.clear_trouble(app)
                    return
            except Overtaken:
                continue
            except NotFound:
                return
            except EXPECTED as error:
                log.warning("an app has to wait", extra={"app": app, "reason": str(error)})
                facts.set_trouble(app, str(error), state.generation(app))
                return
            except Exception as error:  # the worker's loop: a fault of ours is shown and tried again, later and later
                log.exception("the worker of an app failed", extra={"app": app})
                facts.set_trouble(app, f"internal error: {error!r}", state.generation(app))
                return
        facts.set_trouble(app, f"{app} does not settle; see: minipaas status", state.generation(app))

    def _round(self, app: str) -> bool:
        """One plan, applied as far as it is still right. False when there was nothing to do."""
        state = self._world.state
        generation = state.generation(app)
        containers = self._world.engine.containers.list()
        self._world.facts.set_containers(containers)
        wanted = self._wanted(app)
        operations = plan(wanted, self._seen(wanted, containers))
        for operation in operations:
            if self._stopping.is_set() or state.generation(app) != generation:
                break
            self._apply(operation, wanted)
        return bool(operations)

    def _apply(self, operation: Operation, wanted: Wanted) -> None:
        self._on_event(operation.app, operation)
        try:
            operation.apply(self._world)
        except (EngineError, MachineFailed, VolumeGone) as error:
            if isinstance(error, EngineUnavailable) or not self._fail_candidate(wanted, error):
                raise
            return
        log.info("applied", extra={"app": operation.app, "operation": operation.describe()})
        self._on_applied(operation)

    def _fail_candidate(self, wanted: Wanted, error: PlatformError) -> bool:
        """A release that does not come up has failed, and the one before serves again. A live one is tried again instead."""
        if wanted.candidate is None:
            if isinstance(error, MachineFailed):
                raise Overtaken(str(error)) from error
            return False
        failed = MarkFailed(wanted.app.name, wanted.candidate.release, str(error))
        self._on_event(failed.app, failed)
        failed.apply(self._world)
        self._on_applied(failed)
        return True

    # -- reading

    def _wanted(self, app: str) -> Wanted:
        desired = self._world.state.desired(app)
        domain, node = self._world.settings.domain, self._world.node.id
        live = workload_of(desired.live, domain) if desired.live else None
        candidate = workload_of(desired.candidate, domain) if desired.candidate else None
        target = candidate or live
        return Wanted(
            app=desired.app,
            hosts=target.hosts if target else (default_host(app, domain),),
            live=live,
            candidate=candidate,
            machines=tuple(machine for machine in desired.machines if machine.node == node),
            volumes=tuple(volume for volume in desired.volumes if volume.node == node),
        )

    def _seen(self, wanted: Wanted, containers: Sequence[Container]) -> Seen:
        world, facts = self._world, self._world.facts
        present = frozenset(volume.id for volume in wanted.volumes if self._is_present(volume))
        purge_after_ms = wanted.app.purge_after_ms
        return Seen(
            containers=tuple(each for each in containers if each.labels.get(LABEL_APP) == wanted.app.name),
            healthy=facts.healthy(),
            unhealthy=facts.unhealthy(),
            watched=facts.watched() & present,
            present=present,
            images=self._images(wanted, containers),
            route=world.router.route(wanted.app.name),
            resting=frozenset(m.id for m in wanted.machines if facts.wait_before_start(m) > 0),
            purge_due=purge_after_ms is not None and self._now_ms() >= purge_after_ms,
        )

    def _is_present(self, volume: Volume) -> bool:
        """It is in its directory; what that is now is what the next look compares with."""
        sight = volumes.look(self._world.settings, volume)
        if sight.seen is not None:
            volumes.adopt(self._world.settings, volume, sight.seen)
        return sight.seen is not None

    def _images(self, wanted: Wanted, containers: Sequence[Container]) -> frozenset[str]:
        """Those that the engine has; it is not asked about images of machines that run."""
        known = {each.image for m in wanted.machines for each in containers if runs(each, m)}
        images = {workload.image for workload in (wanted.live, wanted.candidate) if workload is not None}
        return frozenset(image for image in images if image in known or self._world.engine.images.exists(image))
