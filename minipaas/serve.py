"""``minipaas serve``: builds all parts, starts them in order and stops them in order. The composition root.

Owns what a stop leaves running: apps, edge and engine go on without this process.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from minipaas import bundle, volumes
from minipaas.data_directory import data_lock
from minipaas.edge import Edge
from minipaas.edge.caddy import CaddyEdge
from minipaas.engine import Engine
from minipaas.engine.discover import connect
from minipaas.engine.podman_service import PodmanService
from minipaas.errors import FleetHeld, NotFound, PlatformError, Unavailable
from minipaas.facts import Facts
from minipaas.health import Prober, SocketProber
from minipaas.model import Fleet, Volume
from minipaas.ops import World
from minipaas.progress import Hub
from minipaas.protection import Backups
from minipaas.reconcile import Reconciler, StopClock
from minipaas.router import Router
from minipaas.sealing import Sealer, read_node_identity
from minipaas.service import Parts, Platform
from minipaas.settings import Limits, Settings, listen_address, settings_path
from minipaas.sources import Builder
from minipaas.state import State
from minipaas.tenure import Lease, Tenure, close_edge, end_containers
from minipaas.uploads import Uploads
from minipaas.web import create_app, pages
from minipaas.web.door import listening
from minipaas.web.sessions import Sessions
from replicator import ReplicatorError, heard

DURABLE = "everything that was committed is durable"

log = logging.getLogger(__name__)


def new_engine(settings: Settings) -> Engine:
    return connect(
        data_dir=settings.data_dir,
        run_dir=settings.run_dir,
        node=settings.node_id,
        engine_url=settings.engine or None,
    )


def new_edge(settings: Settings) -> Edge:
    listen = listen_address(settings.http_listen, "http_listen")
    return CaddyEdge(settings.data_dir / "edge", settings.run_dir, listen)


@dataclass(frozen=True)
class Wiring:
    """How the outer parts are made; the defaults are the real ones.

    backups: given the epoch of the node's lease, which raises LeaseLost while it is not held. lease: given the event that ends it; None
    for no lease. keep_fleet: sees to it that the bucket still says which fleet it holds.
    """

    backups: Callable[[Settings, Callable[[], int]], Backups]
    lease: Callable[[Settings, threading.Event], Lease] | None = None
    keep_fleet: Callable[[Settings, Fleet], None] = lambda settings, fleet: None
    engine: Callable[[Settings], Engine] = new_engine
    edge: Callable[[Settings], Edge] = new_edge
    prober: Prober = SocketProber()
    limits: Limits = Limits()


class Server:
    """All parts of one node, running between ``start`` and ``stop``."""

    def __init__(self, settings: Settings, wiring: Wiring) -> None:
        self.settings, self._wiring = settings, wiring
        self.ended = threading.Event()
        self._open = ExitStack()
        self._leaving = threading.Event()
        self._tenure = _tenure(settings, wiring, self._leaving)

    @property
    def lost(self) -> str:
        """Why this node has no right to its fleet any more; '' while it has."""
        return self._tenure.lost

    def start(self) -> None:
        """Raises AlreadyRunning, EngineMissing, EdgeError, FleetHeld …; nothing that it started is left then, but edge and engine."""
        with ExitStack() as undo:
            self._build(undo)
            self._open = undo.pop_all()

    def stop(self) -> list[str]:
        """Ends this process's part within a bounded time; sentences on what goes on, and whether everything is durable."""
        limits = self._wiring.limits
        self._leaving.set()
        if self.lost:
            self._fence()  # before anything that takes time
        settled = self.reconciler.stop(limits.stop_workers_s)
        if self.lost:  # again: a change was perhaps under way
            sentences = self._fence() or ["the apps and the edge of this node have ended"]
        else:
            names = [app.name for app in self.state.apps() if app.destroyed_ms is None]
            sentences = [f"left running: {', '.join([*names, 'the edge', 'the engine'])}"]
            if not settled:
                sentences.append("a change was under way; it goes on at the next start")
        found = [_Kept(each, self._unseen(each)) for each in self.state.volumes()]
        sentences += _ship(self.world.backups, found, limits.stop_sync_s) or [DURABLE]
        self._open.close()
        if self.lost:
            PodmanService(self.settings.data_dir, self.settings.run_dir).stop()
        return sentences

    def _build(self, undo: ExitStack) -> None:
        settings, limits = self.settings, self._wiring.limits
        _make_directories(settings)
        undo.enter_context(data_lock(settings))
        scratch = _emptied(settings.data_dir / "scratch")
        self.state = undo.enter_context(_closing(State(settings.state_path, now_ms)))
        sealer = Sealer(read_node_identity(settings.key_path), self.state.fleet().recovery_recipient)
        node = next((node for node in self.state.nodes() if node.id == settings.node_id), None)
        if node is None:
            raise NotFound(
                f"{settings.state_path} does not know node {settings.node_id}; recover on an empty directory"
            )
        volumes.clean(settings, {volume.id for volume in self.state.volumes()})
        undo.callback(self._leaving.set)
        try:
            self._tenure.begin(
                on_lost=self.ended.set,
                on_held=partial(self._wiring.keep_fleet, settings, self.state.fleet()),
            )
        except FleetHeld:
            self._fence_before_start()
            raise
        engine = undo.enter_context(_closing(self._wiring.engine(settings)))
        edge = self._wiring.edge(settings)
        edge.start()
        backups = self._wiring.backups(settings, self._tenure.epoch)
        undo.callback(backups.stop, limits.stop_sync_s)
        backups.start()
        clock = StopClock()
        hub = Hub()
        self.world = World(
            settings=settings,
            limits=limits,
            node=node,
            state=self.state,
            engine=engine,
            router=Router(edge, limits.hold_s),
            backups=backups,
            sealer=sealer,
            facts=Facts(clock.now, max_backoff_s=limits.max_backoff_s, steady_after_s=limits.steady_after_s),
            prober=self._wiring.prober,
            clock=clock,
            pull_image=lambda digest, tag: _quiet(
                bundle.pull(backups.images, digest, engine.images, tag, scratch=scratch)
            ),
        )
        self.reconciler = Reconciler(
            self.world, now_ms, on_event=lambda app, operation: hub.publish(app, operation.describe())
        )
        uploads = Uploads(settings.uploads_dir, max_bytes=limits.upload_bytes, keep_s=limits.upload_keep_s)
        uploads.clean()
        self.platform = Platform(
            Parts(
                world=self.world,
                reconciler=self.reconciler,
                hub=hub,
                uploads=uploads,
                builder=Builder(engine.images, uploads, limits),
                push_image=lambda tag: bundle.push(engine.images, tag, backups.images, scratch=scratch),
                now_ms=now_ms,
                engine_words=engine.describe(),
                edge_words=f"{type(edge).__name__} on {settings.http_listen}",
            )
        )
        undo.enter_context(_api(self.platform, settings, limits))
        self.reconciler.start()

    def _unseen(self, volume: Volume) -> str:
        if volume.id in self.world.facts.watched():
            return ""
        return self.world.missing(volume) or "nobody looked after it yet"

    def _fence(self) -> list[str]:
        """Nothing here may take writes any more. What could not be ended, as sentences."""
        return [*close_edge(self._wiring.edge(self.settings)), *end_containers(self.world.engine)[1]]

    def _fence_before_start(self) -> None:
        """What this node left running when it was up last must not go on taking writes either."""
        failures = close_edge(self._wiring.edge(self.settings))
        try:
            with _closing(self._wiring.engine(self.settings)) as engine:
                failures += end_containers(engine)[1]
        except PlatformError as error:
            failures.append(f"the engine could not be asked what runs here, stop it by hand: {error}")
        for failure in failures:
            log.error(failure)
        PodmanService(self.settings.data_dir, self.settings.run_dir).stop()


def serve(settings: Settings, wiring: Wiring, on_ready: Callable[[Server], None], say: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT. Raises FleetHeld when another node has taken the fleet over meanwhile."""
    server = Server(settings, wiring)
    with heard((signal.SIGTERM, signal.SIGINT), lambda number: server.ended.set()):
        server.start()
        try:
            on_ready(server)
            server.ended.wait()
        finally:
            for sentence in server.stop():
                say(sentence)
    if server.lost:
        raise FleetHeld(server.lost)


def stop_everything(settings: Settings, wiring: Wiring, say: Callable[[str], None]) -> None:
    """``minipaas down``: apps, edge and our engine service end, and the last commits are shipped. Raises AlreadyRunning."""
    limits = wiring.limits
    with ExitStack() as undo:
        undo.enter_context(data_lock(settings))
        state = undo.enter_context(_closing(State(settings.state_path, now_ms)))
        engine = undo.enter_context(_closing(wiring.engine(settings)))
        tenure = _tenure(settings, wiring, threading.Event())
        undo.enter_context(tenure.borrowed(say))
        backups = wiring.backups(settings, tenure.epoch)
        undo.callback(backups.stop, limits.stop_sync_s)
        backups.start()
        found = [_Kept(each, volumes.look(settings, each).missing) for each in state.volumes()]
        for kept in found:
            if kept.is_shipped:
                backups.watch_volume(kept.volume.id, settings.volume_dir(kept.volume.app, kept.volume.name))
        count, failures = end_containers(engine)
        late = _ship(backups, found, limits.stop_sync_s)
        for words in [f"stopped {count} containers", *failures, *late]:
            say(words)
    wiring.edge(settings).stop()
    podman = PodmanService(settings.data_dir, settings.run_dir)
    podman.stop()
    podman.unmount()
    say("the edge and the engine service have ended" + ("" if late else f"; {DURABLE}"))


def _tenure(settings: Settings, wiring: Wiring, leaving: threading.Event) -> Tenure:
    lease = wiring.lease(settings, leaving) if wiring.lease else None
    return Tenure(settings, lease, leaving, wiring.limits.sweep_s)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _make_directories(settings: Settings) -> None:
    for directory in (settings.run_dir, settings.volumes_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.data_dir.chmod(0o700)


def _emptied(directory: Path) -> Path:
    """What a process that was killed left in it is nobody's: whoever asks holds the lock on the data directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closable)


@contextmanager
def _closing(thing: _T) -> Iterator[_T]:
    try:
        yield thing
    finally:
        thing.close()


def _quiet(result: object) -> None:
    """Drops a result that the caller has no use for."""


@dataclass(frozen=True)
class _Kept:
    """A volume at the end. unseen: why nobody looks after what is in it; '' when somebody does."""

    volume: Volume
    unseen: str

    @property
    def is_shipped(self) -> bool:
        return self.volume.state == "created" and not self.unseen

    @property
    def name(self) -> str:
        return f"{self.volume.app}/{self.volume.name}"


def _ship(backups: Backups, found: Sequence[_Kept], timeout_s: float) -> list[str]:
    """[] when everything that was committed is durable; else a sentence on each thing that is not, or that nobody can vouch for."""
    deadline = time.monotonic() + timeout_s
    sentences = []
    for kept in found:
        if kept.is_shipped:
            sentences += _late(kept.name, partial(backups.sync_volume, kept.volume.id), deadline)
        elif kept.volume.state == "restoring":
            sentences.append(f"left out: {kept.name} is not yet restored from the bucket")
        elif kept.volume.state == "created":
            sentences.append(f"left out, and perhaps NOT durable: {kept.name}: {kept.unseen}")
    return sentences + _late("the state", backups.sync_state, deadline)


def _late(what: str, sync: Callable[[float], None], deadline: float) -> list[str]:
    """[] when it is durable before the deadline, else why not."""
    try:
        sync(max(0.1, deadline - time.monotonic()))
    except (PlatformError, ReplicatorError) as error:
        return [f"NOT durable yet: {what}: {error}"]
    return []


@contextmanager
def _api(platform: Platform, settings: Settings, limits: Limits) -> Iterator[None]:
    """The API answers while the context lasts. Raises Unavailable when the address cannot be had."""
    host, port = listen_address(settings.api_listen, "api_listen")
    app = create_app(platform, limits)
    pages.install(app, platform, limits, Sessions(settings.data_dir / "sessions.json", now_ms))
    with ExitStack() as undo:
        try:
            undo.enter_context(listening(app, host, port, limits, platform.authenticate))
        except OSError as error:
            raise Unavailable(
                f"the API cannot listen on {settings.api_listen}: {error.strerror}; stop what uses it, or set another api_listen in "
                f"{settings_path(settings.data_dir)}"
            ) from error
        yield
