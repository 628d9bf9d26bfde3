"""The operations that make the world agree with desired state: values that can be compared, shown and applied.

Owns the effect of each. Never decides which are needed: ``plan`` does. Each is idempotent, so that a process that is killed
between or within any two of them only has to plan again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minipaas import volumes
from minipaas.engine import Container, Engine
from minipaas.errors import (
    ContainerMissing,
    EngineError,
    EngineUnavailable,
    PlatformError,
    StateUnavailable,
    Unavailable,
    VolumeGone,
)
from minipaas.facts import Facts
from minipaas.health import Listener, Prober, explain, first_failure, listeners
from minipaas.model import Machine, Node, Volume
from minipaas.protection import Backups
from minipaas.router import Router
from minipaas.sealing import Sealer
from minipaas.settings import Limits, Settings
from minipaas.state import State
from minipaas.workload import (
    LABEL_RESTARTS,
    Workload,
    container_name,
    container_spec,
    runs,
    volume_ids,
)
from replicator import StoreError

log = logging.getLogger(__name__)


class MachineFailed(PlatformError):
    """A machine did not start or did not become healthy; the message says why, with its last lines."""

    http_status = 422


class Overtaken(PlatformError):
    """What was being waited for is not wanted any more, or minipaas stops; nothing is wrong."""


class Clock(Protocol):
    """Monotonic time, waiting, and the end of it all."""

    def now(self) -> float: ...

    def wait(self, seconds: float) -> bool:
        """True when minipaas stops."""
        ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class World:
    """All that operations act on. pull_image: (digest, tag) from the bucket into the engine."""

    settings: Settings
    limits: Limits
    node: Node
    state: State
    engine: Engine
    router: Router
    backups: Backups
    sealer: Sealer
    facts: Facts
    prober: Prober
    clock: Clock
    pull_image: Callable[[str, str], None]

    def directory(self, volume: Volume) -> Path:
        return self.settings.volume_dir(volume.app, volume.name)

    def missing(self, volume: Volume) -> str:
        """Why a volume that was made is not in its directory; '' when it is. Changes nothing."""
        return volumes.look(self.settings, volume).missing


class Operation(Protocol):
    @property
    def app(self) -> str: ...

    def describe(self) -> str:
        """One line for people."""
        ...

    def apply(self, world: World) -> None: ...


# -- volumes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnsureVolume:
    """Its directory is there, and every database in it is replicated."""

    volume: Volume

    @property
    def app(self) -> str:
        return self.volume.app

    def describe(self) -> str:
        if self.volume.state == "creating":
            return f"create volume {self.volume.name}"
        return f"watch volume {self.volume.name}"

    def apply(self, world: World) -> None:
        if self.volume.state == "creating":
            volumes.make(world.settings, self.volume)
            volumes.mark(world.settings, self.volume)
        else:
            volumes.put_back(world.settings, self.volume)
            self._check_present(world)
        world.backups.watch_volume(self.volume.id, world.directory(self.volume))
        world.facts.set_watched(self.volume.id, True)
        if self.volume.state == "creating":
            world.state.set_volume_state(self.volume.id, "created")

    def _check_present(self, world: World) -> None:
        """What is replicated of a volume that is not there would look like a deletion of all its databases."""
        if why := world.missing(self.volume):
            world.backups.forget_volume(self.volume.id)
            world.facts.set_watched(self.volume.id, False)
            raise _gone(self.volume, why)


@dataclass(frozen=True)
class RestoreVolume:
    """What the bucket holds of it is in its directory, before anything uses it."""

    volume: Volume

    @property
    def app(self) -> str:
        return self.volume.app

    def describe(self) -> str:
        return f"restore volume {self.volume.name} from the bucket"

    def apply(self, world: World) -> None:
        directory = volumes.make(world.settings, self.volume)
        world.backups.restore_volume(
            self.volume.id, directory, lambda text: world.facts.set_words(self.volume.id, text)
        )
        volumes.mark(world.settings, self.volume)
        world.facts.clear_words(self.volume.id)
        world.state.set_volume_state(self.volume.id, "created")


@dataclass(frozen=True)
class SyncVolume:
    """What was committed in it is durable. Within a swap on one node that is a wish: the data stay on this disk anyway."""

    volume: Volume

    @property
    def app(self) -> str:
        return self.volume.app

    def describe(self) -> str:
        return f"ship the last commits of volume {self.volume.name}"

    def apply(self, world: World) -> None:
        try:
            world.backups.sync_volume(self.volume.id, world.limits.swap_sync_s)
        except (
            PlatformError,
            StoreError,
        ) as error:  # one file that cannot be replicated must not keep the app from running
            words = f"volume {self.volume.name} is not shipped yet, it follows from this disk: {error}"
            _journal(world, self.app, words)


@dataclass(frozen=True)
class PurgeVolume:
    """The time after destroy is over: its directory goes. What is in the bucket is left to retention.

    It is set aside before the state forgets it, and deleted after, so that an app that is brought back in this very moment has
    its volume, and a new volume of the same name has nothing of the old one. What replication kept of it goes before that, since
    nobody knows its id after; in a volume that comes back it begins anew with a snapshot.
    """

    volume: Volume

    @property
    def app(self) -> str:
        return self.volume.app

    def describe(self) -> str:
        return f"delete volume {self.volume.name}"

    def apply(self, world: World) -> None:
        world.backups.forget_volume(self.volume.id)
        world.facts.set_watched(self.volume.id, False)
        volumes.set_aside(world.settings, self.volume)
        world.backups.discard_volume(self.volume.id)
        if world.state.purge_volume(self.volume.id):
            volumes.discard(world.settings, self.volume)
        else:
            volumes.put_back(world.settings, self.volume)


def _gone(volume: Volume, why: str) -> VolumeGone:
    return VolumeGone(f"volume {volume.name} of {volume.app} is missing: {why}")


# -- images and machines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnsureImage:
    """The engine has the image; else it comes from the bucket."""

    app: str
    image: str
    digest: str

    def describe(self) -> str:
        return f"fetch image {self.image} from the bucket"

    def apply(self, world: World) -> None:
        if not world.engine.images.exists(self.image):
            world.pull_image(self.digest, self.image)


@dataclass(frozen=True)
class StartMachine:
    workload: Workload
    machine: Machine
    volumes: tuple[Volume, ...] = ()

    @property
    def app(self) -> str:
        return self.machine.app

    def describe(self) -> str:
        return f"start v{self.workload.release} as machine {self.machine.id}"

    def apply(self, world: World) -> None:
        name = container_name(self.machine)
        containers = world.engine.containers.list()
        self._check_sole_writer(containers, name)
        self._note_crash(world, next((each for each in containers if each.name == name), None))
        sealed = world.state.release_secrets(self.app, self.workload.release)
        secrets = {key: world.sealer.unseal(value) for key, value in sealed.items()}
        for volume in self.volumes:
            if why := world.missing(volume):
                raise _gone(volume, why)
        directories = {volume.id: world.directory(volume) for volume in self.volumes}
        spec = container_spec(self.workload, self.machine, world.node, self.volumes, directories, secrets)
        world.facts.note_start(self.machine)
        try:
            world.facts.put_container(world.engine.containers.run(spec))
        except EngineUnavailable:
            raise
        except EngineError as error:
            world.facts.set_words(self.machine.id, str(error))
            raise MachineFailed(str(error)) from error

    def _check_sole_writer(self, containers: Sequence[Container], name: str) -> None:
        """The plan stops other writers first; this is the last line of defence, next to the act."""
        wanted = {volume.id for volume in self.volumes}
        for other in containers:
            if other.name != name and other.state != "exited" and volume_ids(other) & wanted:
                raise Unavailable(f"{other.name} still uses a volume of {name}; it is stopped first")

    def _note_crash(self, world: World, before: Container | None) -> None:
        if (
            before is None
            or before.state != "exited"
            or before.labels.get(LABEL_RESTARTS) != str(self.machine.restarts)
        ):
            return
        _journal(world, self.app, f"machine {self.machine.id} {_ended(before, None)}; starting it again")


@dataclass(frozen=True)
class StopMachine:
    app: str
    container: str

    def describe(self) -> str:
        return f"stop {self.container}"

    def apply(self, world: World) -> None:
        world.engine.containers.stop(self.container)


@dataclass(frozen=True)
class RemoveContainer:
    app: str
    container: str

    def describe(self) -> str:
        return f"remove {self.container}"

    def apply(self, world: World) -> None:
        world.engine.containers.remove(self.container)


@dataclass(frozen=True)
class AwaitHealthy:
    """Every check passes once; without checks, a connection to the port; without a port, it stays up for a second."""

    workload: Workload
    machine: Machine

    @property
    def app(self) -> str:
        return self.machine.app

    def describe(self) -> str:
        return f"wait until v{self.workload.release} is healthy"

    def apply(self, world: World) -> None:
        clock, limits = world.clock, world.limits
        begin = clock.now()
        generation = world.state.generation(self.app)
        within_s = self.workload.wait_s or limits.healthy_within_s
        deadline = begin + within_s + max((probe.grace_s for probe in self.workload.probes), default=0.0)
        container = world.facts.container(container_name(self.machine))
        while True:
            words = self._check(world, container, clock.now() - begin)
            if words:
                container = self._running(world)
            elif container is not None:
                world.facts.set_healthy(self.machine.id, container.id)
                return
            if container is not None and clock.now() >= deadline:
                self._give_up(world, container, words, within_s)
            if clock.wait(limits.health_poll_s) or world.state.generation(self.app) != generation:
                raise Overtaken(f"what is wanted of {self.app} has changed")

    def _check(self, world: World, container: Container | None, since_s: float) -> str:
        if container is None or not runs(container, self.machine):
            return "it does not run yet"
        if not self.workload.probes:
            return "" if since_s >= 1.0 else "it has just started"
        if not container.address:
            return "it has no address yet"
        return first_failure(world.prober, container.address, self.workload.probes)

    def _running(self, world: World) -> Container:
        """The machine's container, while it runs. Raises MachineFailed when it has ended or is gone."""
        containers = world.engine.containers.list()
        world.facts.set_containers(containers)
        name = container_name(self.machine)
        container = next((each for each in containers if each.name == name), None)
        if container is None:
            raise MachineFailed(f"the container {name} is gone; somebody removed it")
        if runs(container, self.machine):
            return container
        words = _ended(container, world.facts.ran_s(self.machine))
        world.facts.set_words(self.machine.id, words)
        raise MachineFailed(words + _last_lines(world, name))

    def _give_up(self, world: World, container: Container, words: str, within_s: float) -> None:
        if self.workload.port is not None:
            words = explain(words, self.workload.port, _listeners(world, container.name))
        world.facts.set_unhealthy(self.machine.id, container.id, words)
        raise MachineFailed(f"not healthy after {within_s:g} s: {words}" + _last_lines(world, container.name))


def _journal(world: World, app: str, text: str) -> None:
    """A line for people. A disk that is full must not keep an app from being started again."""
    try:
        world.state.add_event(app, text)
    except StateUnavailable as error:
        log.warning("a line of the journal is lost", extra={"app": app, "text": text, "reason": str(error)})


def _ended(container: Container, ran_s: float | None) -> str:
    if container.oom_killed:
        return "ran out of memory and was killed; give it more, or make it use less"
    if container.exit_code is None:
        return f"is {container.state}"
    return f"exited with {container.exit_code}" + ("" if ran_s is None else f" after {ran_s:.1f} s")


def _last_lines(world: World, name: str) -> str:
    try:
        lines = [line.text for line in world.engine.containers.logs(name, tail=world.limits.log_tail)]
    except ContainerMissing:
        return ""
    return "".join(f"\n  {line}" for line in lines)


def _listeners(world: World, name: str) -> frozenset[Listener] | None:
    """What listens inside; None when the image has nothing to look with."""
    try:
        _, text = world.engine.containers.exec(name, ("cat", "/proc/net/tcp", "/proc/net/tcp6"), timeout_s=5.0)
    except EngineError:
        return None
    return listeners(text) if "local_address" in text else None


# -- traffic -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoldRoute:
    app: str
    hosts: tuple[str, ...]

    def describe(self) -> str:
        return f"hold requests for {', '.join(self.hosts)}"

    def apply(self, world: World) -> None:
        world.router.hold(self.app, self.hosts)


@dataclass(frozen=True)
class DrainUpstream:
    """Requests under way have been answered, or the time for that is over."""

    app: str
    upstream: str

    def describe(self) -> str:
        return f"let {self.upstream} answer what it has begun"

    def apply(self, world: World) -> None:
        deadline = world.clock.now() + world.limits.drain_s
        while world.router.in_flight(self.upstream) and world.clock.now() < deadline:
            if world.clock.wait(0.02):
                raise Overtaken("minipaas stops")


@dataclass(frozen=True)
class RouteTo:
    """Requests go to these machines, as far as they run and are healthy; with none, the edge answers 503."""

    app: str
    hosts: tuple[str, ...]
    machines: tuple[Machine, ...]
    port: int

    def describe(self) -> str:
        names = ", ".join(machine.id for machine in self.machines) or "nobody"
        return f"route {', '.join(self.hosts)} to {names}"

    def apply(self, world: World) -> None:
        upstreams = []
        for machine in self.machines:
            container = world.facts.container(container_name(machine))
            if container and runs(container, machine) and container.id in world.facts.healthy() and container.address:
                upstreams.append(f"{container.address}:{self.port}")
        world.router.set(self.app, self.hosts, tuple(upstreams))


@dataclass(frozen=True)
class DropRoute:
    app: str

    def describe(self) -> str:
        return f"drop the route of {self.app}"

    def apply(self, world: World) -> None:
        world.router.drop(self.app)


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MarkLive:
    app: str
    release: int

    def describe(self) -> str:
        return f"v{self.release} is live"

    def apply(self, world: World) -> None:
        world.state.mark_live(self.app, self.release)


@dataclass(frozen=True)
class MarkFailed:
    app: str
    release: int
    message: str

    def describe(self) -> str:
        return f"v{self.release} failed: {self.message}"

    def apply(self, world: World) -> None:
        world.state.mark_failed(self.app, self.release, self.message)


@dataclass(frozen=True)
class PurgeApp:
    app: str

    def describe(self) -> str:
        return f"forget {self.app}"

    def apply(self, world: World) -> None:
        """Its images leave the engine first, as nobody knows their names after; should the app be brought back, they are in the bucket."""
        for image in {release.image for release in world.state.releases(self.app)}:
            try:
                world.engine.images.remove(image)
            except EngineUnavailable:
                raise
            except EngineError as error:  # a container of somebody else uses it
                log.warning("an image stays in the engine", extra={"image": image, "reason": str(error)})
        world.state.purge_app(self.app)
