"""A platform in memory for tests: fakes for every outside part, and a way to kill and restart its reconciler anywhere."""

from __future__ import annotations

import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from minipaas import bundle
from minipaas.access import Principal
from minipaas.edge.fake import FakeEdge
from minipaas.engine import Container, ContainerSpec, LogLine, nobody_leaves
from minipaas.engine.fake import FakeEngine, make_image
from minipaas.errors import EngineError, TimedOut
from minipaas.facts import Facts
from minipaas.health import Probe
from minipaas.manifest import parse
from minipaas.model import Fleet, Machine, Node, Release, ReleaseStatus, Volume
from minipaas.ops import Operation, World
from minipaas.progress import Hub
from minipaas.protection import DatabaseState
from minipaas.reconcile import Reconciler, StopClock, in_thread
from minipaas.router import Router
from minipaas.sealing import Identity, Sealer
from minipaas.service import Parts, Platform
from minipaas.settings import Limits, Settings
from minipaas.sources import Builder
from minipaas.state import NewRelease, State
from minipaas.uploads import Uploads
from minipaas.workload import volume_ids
from replicator import ObjectStore
from replicator.errors import StoreUnavailable
from replicator.store.memory import MemoryStore

OWNER = Principal("owner")
NODE = Node(id="a" * 16, name="a", region="ams", recipient="", joined_ms=1)
GUESTBOOK = """
app = "guestbook"
[env]
COLOUR = "green"
[http_service]
internal_port = 8080
[[mounts]]
source = "data"
destination = "/data"
"""
SITE = """
app = "site"
[http_service]
internal_port = 8080
"""
QUICK = Limits(
    sweep_s=0.2,
    drain_s=0.5,
    healthy_within_s=0.5,
    health_poll_s=0.01,
    deploy_wait_s=10.0,
    restart_wait_s=10.0,
    max_backoff_s=0.2,
    upload_bytes=1 << 20,
)


class Killed(BaseException):
    """The process ends here, as with kill -9: nothing after it runs."""


class FakeBackups:
    """``protection.Backups`` that remembers what it was asked. lost: what the bucket holds of a volume, as file name to bytes."""

    def __init__(self) -> None:
        self._store = MemoryStore()
        self.watched: dict[str, Path] = {}
        self.synced: list[str] = []
        self.unreachable = False
        self.on_sync: Callable[[], None] = lambda: None
        self.lost: dict[str, Mapping[str, bytes]] = {}

    @property
    def images(self) -> ObjectStore:
        return self._store

    def start(self) -> None:
        pass

    def stop(self, timeout_s: float) -> None:
        pass

    def watch_volume(self, volume_id: str, directory: Path) -> None:
        assert directory.is_dir()
        self.watched[volume_id] = directory

    def forget_volume(self, volume_id: str) -> None:
        self.watched.pop(volume_id, None)

    def discard_volume(self, volume_id: str) -> None:
        assert volume_id not in self.watched

    def sync_volume(self, volume_id: str, timeout_s: float) -> None:
        self.on_sync()
        if self.unreachable:
            raise TimedOut(f"not everything of {volume_id} is in the bucket")
        self.synced.append(volume_id)

    def sync_state(self, timeout_s: float) -> None:
        self.on_sync()
        if self.unreachable:
            raise TimedOut("not everything of the state is in the bucket")

    def restore_volume(self, volume_id: str, directory: Path, on_progress: Callable[[str], None]) -> None:
        for name, data in self.lost.get(volume_id, {}).items():
            (directory / name).write_bytes(data)
        on_progress("restored")

    def databases(self) -> Sequence[DatabaseState]:
        return [
            DatabaseState(key, path / "app.db", "protected (lag 0.0 s)", "", 0.0, 7, 1, 1000, 4096)
            for key, path in self.watched.items()
        ]


class SoleWriterContainers:
    """The fake's containers, and a witness: fails when two that run share a volume. runs: what was started, in order.

    resisting: name of a container that the engine cannot stop.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.runs: list[ContainerSpec] = []
        self.resisting = ""

    def run(self, spec: ContainerSpec) -> Container:
        container = self._engine.containers.run(spec)
        self.runs.append(spec)
        users = [
            other for other in self.list() if other.state != "exited" and volume_ids(other) & volume_ids(container)
        ]
        assert len(users) <= 1, f"two writers: {[user.name for user in users]}"
        return container

    def list(self) -> Sequence[Container]:
        return self._engine.containers.list()

    def stop(self, name: str) -> None:
        if name == self.resisting:
            raise EngineError(f"{name} does not end")
        self._engine.containers.stop(name)

    def remove(self, name: str) -> None:
        self._engine.containers.remove(name)

    def logs(
        self, name: str, *, tail: int | None = None, follow: bool = False, gone: Callable[[], bool] = nobody_leaves
    ) -> Iterator[LogLine]:
        return self._engine.containers.logs(name, tail=tail, follow=follow, gone=gone)

    def exec(self, name: str, command: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        return self._engine.containers.exec(name, command, timeout_s=timeout_s)


class WatchedEngine:
    """``Engine`` over the fake, with the witness."""

    def __init__(self) -> None:
        self.fake = FakeEngine()
        self.witness = SoleWriterContainers(self.fake)

    @property
    def containers(self) -> SoleWriterContainers:
        return self.witness

    @property
    def images(self):  # type: ignore[no-untyped-def]
        return self.fake.images

    def describe(self) -> str:
        return self.fake.describe()

    def close(self) -> None:
        pass

    def running(self) -> list[Container]:
        return [each for each in self.fake.containers.list() if each.state == "running"]


class FakeProber:
    """Passes, unless the image of the container at the address is in ``failing``: then for those words."""

    def __init__(self, engine: WatchedEngine) -> None:
        self._engine = engine
        self.failing: dict[str, str] = {}

    def probe(self, address: str, probe: Probe) -> str:
        image = next((each.image for each in self._engine.running() if each.address == address), "")
        return self.failing.get(image, "") if image else f"nothing listens on port {probe.port}"


class SteppedClock:
    """Waiting takes no time, but the clock goes on."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> bool:
        self.time += seconds
        return False

    def stop(self) -> None:
        pass


@dataclass
class Stage:
    """One node. ``reboot`` is a kill -9 and a new start: engine, edge, bucket and the state's file stay; facts are gone."""

    directory: Path
    limits: Limits = Limits()
    engine: WatchedEngine = field(default_factory=WatchedEngine)
    edge: FakeEdge = field(default_factory=FakeEdge)
    backups: FakeBackups = field(default_factory=FakeBackups)
    now_ms: int = 1_000_000
    applied: list[Operation] = field(default_factory=list)
    kill_after: int | None = None

    def __post_init__(self) -> None:
        owner, node = Identity.generate(), Identity.generate()
        self.owner = owner
        self.sealer = Sealer(node, owner.recipient)
        self.prober = FakeProber(self.engine)
        self.settings = Settings(
            data_dir=self.directory, node_id=NODE.id, node=NODE.name, region=NODE.region, bucket="memory://"
        )
        self.state = State(self.settings.state_path, lambda: self.now_ms)
        self.state.put_node(NODE)
        self.state.set_fleet(Fleet(id="f" * 32, recovery_recipient=owner.recipient))
        self._boot()

    def _boot(self) -> None:
        self.clock = SteppedClock()
        self.world = self._world(self.clock)
        self.reconciler = Reconciler(
            self.world, lambda: self.now_ms, on_applied=self._on_applied, spawn=lambda name, work: work()
        )

    def _world(self, clock: SteppedClock | StopClock) -> World:
        images, store = self.engine.images, self.backups.images
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        return World(
            settings=self.settings,
            limits=self.limits,
            node=NODE,
            state=self.state,
            engine=self.engine,
            router=Router(self.edge, self.limits.hold_s),
            backups=self.backups,
            sealer=self.sealer,
            facts=Facts(clock.now, max_backoff_s=self.limits.max_backoff_s, steady_after_s=300.0),
            prober=self.prober,
            clock=clock,
            pull_image=lambda digest, tag: bundle.pull(store, digest, images, tag, scratch=scratch) and None,
        )

    def _on_applied(self, operation: Operation) -> None:
        self.applied.append(operation)
        if self.kill_after is not None and len(self.applied) >= self.kill_after:
            self.kill_after = None
            raise Killed

    def reboot(self) -> None:
        self.state.close()
        self.state = State(self.settings.state_path, lambda: self.now_ms)
        self.backups.watched.clear()
        self._boot()

    def settle(self) -> None:
        """Steps until there is nothing to do; time passes between them."""
        for _ in range(20):
            self.clock.time += self.limits.max_backoff_s
            if not self.reconciler.step().sentence:
                return
        raise AssertionError(f"does not settle: {self.applied[-6:]}")

    # -- what users would do

    def want(self, manifest: str, app: str = "guestbook", secrets: Mapping[str, str] | None = None) -> int:
        """A new release is desired, with an image of its own in engine and bucket."""
        if app not in [each.name for each in self.state.apps()]:
            self.state.create_app(app)
        number = self.state.next_release(app)
        image = f"localhost/minipaas/{app}:v{number}"
        self.engine.images.put(image, make_image([tar_of({"v": str(number).encode()})]))
        digest = bundle.push(self.engine.images, image, self.backups.images, scratch=self.directory / "scratch")
        self.state.add_release(self.new_release(app, number, image, digest, manifest, secrets or {}))
        return number

    def new_release(
        self, app: str, number: int, image: str, digest: str, manifest: str, secrets: Mapping[str, str]
    ) -> NewRelease:
        value, _ = parse(manifest, "minipaas.toml")
        release = Release(
            app=app, number=number, image=image, image_digest=digest, config=value.to_json(),
            created_ms=self.now_ms, status=ReleaseStatus.DEPLOYING,
        )  # fmt: skip
        known = {volume.name for volume in self.state.volumes(app)}
        return NewRelease(
            release,
            (Machine(id=f"{number:014x}", app=app, release=number, group="app", node=NODE.id),),
            tuple(
                Volume(id=f"vol_{app}_{mount.source}", app=app, name=mount.source, node=NODE.id, created_ms=self.now_ms)
                for mount in value.mounts
                if mount.source not in known
            ),
            {name: self.sealer.seal(text) for name, text in secrets.items()},
        )

    def serving(self, app: str = "guestbook") -> list[str]:
        """Numbers of the releases whose containers run, as v1."""
        return [f"v{c.labels['minipaas.release']}" for c in self.engine.running() if c.labels["minipaas.app"] == app]

    def routed_to(self, app: str = "guestbook") -> list[str]:
        """The same of what requests go to; ['held'] while they wait."""
        route = self.world.router.route(app)
        if route is None:
            return []
        by_address = {f"{c.address}:8080": f"v{c.labels['minipaas.release']}" for c in self.engine.running()}
        return ["held"] if route.held else [by_address[upstream] for upstream in route.upstreams]

    def status_of(self, number: int, app: str = "guestbook") -> str:
        return str(self.state.release(app, number).status)


class Live:
    """A platform with its threads running, over a stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.clock = StopClock()
        self.world = replace(stage._world(self.clock), limits=QUICK)
        hub = Hub()
        self.reconciler = Reconciler(
            self.world,
            lambda: stage.now_ms,
            on_event=lambda app, operation: hub.publish(app, operation.describe()),
            spawn=in_thread,
        )
        self.uploads = Uploads(stage.directory / "uploads", max_bytes=QUICK.upload_bytes, keep_s=60.0)
        self.uploads.clean()
        self.bucket_away = False
        self.before_push: Callable[[], object] = lambda: None
        self.pushed: list[str] = []
        images = stage.engine.images
        self.platform = Platform(
            Parts(
                world=self.world,
                reconciler=self.reconciler,
                hub=hub,
                uploads=self.uploads,
                builder=Builder(images, self.uploads, QUICK),
                push_image=self._push_image,
                now_ms=lambda: stage.now_ms,
                engine_words="fake engine",
                edge_words="fake edge",
            )
        )

    def _push_image(self, tag: str) -> str:
        self.before_push()
        self.pushed.append(tag)
        if self.bucket_away:
            raise StoreUnavailable("the bucket does not answer")
        scratch = self.stage.directory / "scratch"
        return bundle.push(self.stage.engine.images, tag, self.stage.backups.images, scratch=scratch)

    def __enter__(self) -> Live:
        self.reconciler.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self.reconciler.stop(5.0)
        self.stage.state.close()

    def upload(self, files: Mapping[str, bytes]) -> str:
        upload = self.platform.begin_upload(OWNER)
        self.platform.write_upload(OWNER, upload, 0, tar_of(files))
        return upload


def tar_of(files: Mapping[str, bytes]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return buffer.getvalue()


def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come true in time")
        threading.Event().wait(0.01)
