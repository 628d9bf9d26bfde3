"""Platform: everything that a user can ask for. The one door for command line, API and pages.

Owns the order of a deploy up to the moment when it is desired; from there the reconciler goes on, with or without the client.
Every method takes a principal and passes ``access.authorise``. Never touches containers or routes itself.
"""

from __future__ import annotations

import hmac
import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from minipaas import manifest as manifests
from minipaas import views
from minipaas.access import Action, Principal, authenticate, authorise
from minipaas.engine import LogLine
from minipaas.errors import (
    BadRequest,
    Conflict,
    DeployFailed,
    EngineError,
    NotFound,
    SealBroken,
    TimedOut,
    Unavailable,
)
from minipaas.manifest import HttpService, Manifest
from minipaas.model import (
    App,
    Machine,
    Release,
    ReleaseStatus,
    Volume,
    check_name,
    new_machine_id,
    new_volume_id,
)
from minipaas.ops import World
from minipaas.progress import Hub, Turns
from minipaas.reconcile import Reconciler
from minipaas.report import Report
from minipaas.sources import Builder, Source, image_tag
from minipaas.state import NewRelease
from minipaas.uploads import Uploads
from minipaas.workload import check_variable, container_name, runs
from replicator import StoreError

MAX_SECRET_BYTES = 64 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One thing that happened in a deploy. kind: step, log, warning, done or failed. release: its number, None before it has one."""

    kind: str
    text: str
    release: int | None = None


OnProgress = Callable[[Progress], None]


def _silent(progress: Progress) -> None:
    """For callers who only want the outcome."""


@dataclass(frozen=True)
class DeployRequest:
    """manifest: text of minipaas.toml; file: its name, for messages. build_args: win over [build] args.

    manifest None: the configuration of the last release that was live, or the usual one for an app that never had one.
    """

    source: Source
    manifest: str | None
    file: str = "minipaas.toml"
    build_args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SecretsChange:
    """changed: names of secrets that are not as they were, or not as the app that runs has them. release: the number of the one
    that runs with them now; None when nothing changed, or nothing runs."""

    changed: tuple[str, ...] = ()
    release: int | None = None


@dataclass(frozen=True)
class Parts:
    """What the platform is made of. push_image: from the engine to the bucket, the digest there. now_ms: wall clock."""

    world: World
    reconciler: Reconciler
    hub: Hub
    uploads: Uploads
    builder: Builder
    push_image: Callable[[str], str]
    now_ms: Callable[[], int]
    engine_words: str
    edge_words: str


class Platform:
    """Thread-safe."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._world, self._state = parts, parts.world, parts.world.state
        self._turns = Turns(self._world.limits.waiting_changes)
        self._report = Report(self._world, parts.engine_words, parts.edge_words)
        self._state.subscribe(lambda app: parts.hub.publish(app, ""))
        self._state.subscribe(lambda app: self._world.facts.touch())

    def authenticate(self, header: str) -> Principal:
        """Of the value of an Authorization header. Raises NotAuthorised."""
        return authenticate(self._state.tokens(), header)

    def principal_of(self, sha256: str) -> Principal | None:
        """Of a token that is known by its hash, as long as it is valid."""
        found = [token for token in self._state.tokens() if hmac.compare_digest(token.sha256, sha256)]
        return Principal(found[0].name, found[0].abilities) if found else None

    # -- apps

    def create_app(self, principal: Principal, name: str) -> views.AppView:
        authorise(principal, Action.CREATE, name)
        self._state.create_app(check_name(name))
        return self.app(principal, name)

    def apps(self, principal: Principal) -> Sequence[views.AppView]:
        authorise(principal, Action.READ)
        return self._report.apps()

    def app(self, principal: Principal, name: str) -> views.AppView:
        authorise(principal, Action.READ, name)
        return self._report.app(name)

    def destroy(self, principal: Principal, name: str) -> App:
        """The app stops; its volumes and databases stay until ``purge_after_ms``, and come back when it is created again."""
        authorise(principal, Action.DESTROY, name)
        self._existing(name)
        return self._state.destroy_app(name, round(self._world.limits.keep_destroyed_s * 1000))

    def restart(self, principal: Principal, name: str, on_progress: OnProgress = _silent) -> None:
        """Every machine is started anew, requests wait meanwhile; returns when all are healthy. Raises Unavailable, TimedOut."""
        authorise(principal, Action.RESTART, name)
        limit_s = self._world.limits.restart_wait_s
        with (
            self._turn(name, f"a restart by {principal.name}", on_progress, limit_s),
            self._parts.hub.listen(name) as lines,
        ):
            self._existing(name)
            if self._state.desired(name).live is None:
                raise Conflict(f"{name} has no release that runs; deploy one first")
            self._state.restart_machines(name)
            self._until(name, lines, on_progress, limit_s, lambda: self._restarted(name))

    # -- releases

    def releases(self, principal: Principal, name: str) -> Sequence[views.ReleaseView]:
        authorise(principal, Action.READ, name)
        self._state.app(name)
        return [views.release_view(release) for release in self._state.releases(name)]

    def deploy(
        self, principal: Principal, name: str, request: DeployRequest, on_progress: OnProgress = _silent
    ) -> views.ReleaseView:
        """A new release of the app, live when this returns; creates the app when it is not there.

        Raises ManifestError, BuildFailed, ImageRefused, DeployFailed (the old release goes on serving), TimedOut (it goes on
        in the background), Unavailable.
        """
        authorise(principal, Action.DEPLOY, name)
        try:
            check_name(name)
            manifest = self._read_manifest(name, request, on_progress)
            with self._turn(name, f"a deploy by {principal.name}", on_progress, self._world.limits.turn_wait_s):
                self._ensure_app(principal, name, on_progress)
                return self._deploy(name, request, manifest, on_progress)
        finally:
            if request.source.upload:
                self._parts.uploads.remove(request.source.upload)

    # -- secrets

    def secrets(self, principal: Principal, name: str) -> Mapping[str, int]:
        """Names, and when each was set. Values never leave."""
        authorise(principal, Action.READ, name)
        self._existing(name)
        return self._state.secret_times(name)

    def set_secrets(
        self, principal: Principal, name: str, values: Mapping[str, str], on_progress: OnProgress = _silent
    ) -> SecretsChange:
        """Sealed and kept; a running app gets what is new with a new release of the same image. Raises BadRequest for no values."""
        authorise(principal, Action.SECRETS, name)
        if not values:
            raise BadRequest("no secret is named; give at least one, with its value")
        for key, value in values.items():
            check_variable(key)
            if len(value.encode()) > MAX_SECRET_BYTES or "\0" in value:
                raise BadRequest(f"the value of {key} is longer than {MAX_SECRET_BYTES >> 10} KiB, or has a zero byte")
        return self._change_secrets(principal, name, values, (), on_progress)

    def unset_secrets(
        self, principal: Principal, name: str, names: Sequence[str], on_progress: OnProgress = _silent
    ) -> SecretsChange:
        """Raises NotFound when one of them is not there, BadRequest when none is named."""
        authorise(principal, Action.SECRETS, name)
        if not names:
            raise BadRequest("no secret is named; give the names of those that are to go")
        unknown = sorted(set(names) - set(self._state.secret_times(name)))
        if unknown:
            raise NotFound(f"{name} has no secret {', '.join(unknown)}; see: minipaas secrets list")
        return self._change_secrets(principal, name, {}, names, on_progress)

    # -- volumes, logs, status

    def volumes(self, principal: Principal) -> Sequence[views.VolumeView]:
        authorise(principal, Action.READ)
        return self._report.volumes()

    def logs(
        self, principal: Principal, name: str, *, tail: int | None, follow: bool, gone: Callable[[], bool]
    ) -> Iterator[tuple[str, LogLine]]:
        """(machine id, line). follow: goes on over swaps, until ``gone()``. Raises NotFound when nothing has run yet."""
        authorise(principal, Action.LOGS, name)
        self._existing(name)
        if not follow and not self._report.has_run(name):
            raise NotFound(f"nothing of {name} runs, so there are no logs; see: minipaas status")
        return self._report.logs(name, tail, follow, gone)

    def status(self, principal: Principal) -> views.NodeView:
        authorise(principal, Action.READ)
        return self._report.node()

    def snapshot(self, principal: Principal) -> views.Snapshot:
        authorise(principal, Action.READ)
        return views.Snapshot(
            node=self._report.node(), apps=list(self._report.apps()), events=list(self._state.events(20))
        )

    def wait_for_change(self, principal: Principal, after: int, timeout_s: float) -> int:
        """Returns when something that ``snapshot`` shows may have changed since version ``after``, or when the time is over."""
        authorise(principal, Action.READ)
        return self._world.facts.wait_for_change(after, timeout_s)

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than minipaas runs."""
        self._world.clock.wait(seconds)

    def begin_upload(self, principal: Principal) -> str:
        """The id of an upload, good for one deploy, whose bytes follow in parts."""
        authorise(principal, Action.DEPLOY)
        return self._parts.uploads.begin()

    def write_upload(self, principal: Principal, upload: str, at: int, part: bytes) -> int:
        """Put bytes at an offset, each part at once or again; the size so far. Raises Conflict when a part before is missing."""
        authorise(principal, Action.DEPLOY)
        return self._parts.uploads.write(upload, at, part)

    # -- a deploy, step by step

    def _read_manifest(self, name: str, request: DeployRequest, on_progress: OnProgress) -> Manifest:
        if request.manifest is None:
            return self._manifest_without_file(name, on_progress)
        manifest, warnings = manifests.parse(request.manifest, request.file)
        for warning in warnings:
            on_progress(Progress("warning", warning))
        if manifest.app is not None and manifest.app != name:
            raise BadRequest(
                f"{request.file} says app = {manifest.app!r}, but {name!r} is to be deployed; change one of them"
            )
        return manifest

    def _manifest_without_file(self, name: str, on_progress: OnProgress) -> Manifest:
        """Of the last release that was live: whoever sends no file means to change nothing in it, its volumes least of all."""
        served = (ReleaseStatus.LIVE, ReleaseStatus.SUPERSEDED)
        last = next((release for release in self._state.releases(name) if release.status in served), None)
        if last is not None:
            on_progress(Progress("step", f"configured as v{last.number}, since no file came with it"))
            return Manifest.from_json(last.config)
        on_progress(
            Progress(
                "warning",
                f"no minipaas.toml came with it: {name} is to listen on $PORT, and has no volume, so that what it writes is lost "
                "with its container",
            )
        )
        return Manifest(http_service=HttpService())

    def _ensure_app(self, principal: Principal, name: str, on_progress: OnProgress) -> None:
        try:
            known = self._state.app(name)
        except NotFound:
            known = None
        if known is None or known.destroyed_ms is not None:
            authorise(principal, Action.CREATE, name)
            self._state.create_app(name)
            back = ", with the volumes that were kept" if known is not None else ""
            on_progress(Progress("step", f"{'brought back' if known else 'created'} app {name}{back}"))

    def _deploy(
        self, name: str, request: DeployRequest, manifest: Manifest, on_progress: OnProgress
    ) -> views.ReleaseView:
        """An image that no release came to have is not left in the engine."""
        number = self._state.next_release(name)
        tag = image_tag(name, number)
        with self._parts.hub.listen(name) as lines:
            self._settled(name, lines, on_progress)
            try:
                digest = self._image(request, manifest, tag, number, on_progress)
                self._state.add_release(self._new_release(name, number, tag, digest, manifest.to_json()))
            except BaseException:
                self._drop_image(tag)
                raise
            return self._outcome(name, number, lines, self._world.limits.deploy_wait_s, on_progress)

    def _image(self, request: DeployRequest, manifest: Manifest, tag: str, number: int, on_progress: OnProgress) -> str:
        """The image is in the engine and in the bucket; the digest there."""
        on_progress(Progress("step", "making the image", number))
        self._parts.builder.make(
            request.source,
            manifest,
            request.build_args,
            tag,
            lambda line: on_progress(Progress("log", line, number)),
        )
        on_progress(Progress("step", "storing the image in the bucket", number))
        try:
            return self._parts.push_image(tag)
        except StoreError as error:
            raise Unavailable(f"the image cannot be stored in the bucket, so nothing was deployed: {error}") from error

    def _outcome(
        self, name: str, number: int, lines: queue.Queue[str], limit_s: float, on_progress: OnProgress
    ) -> views.ReleaseView:
        """Tell what happens until it is live or has failed."""
        self._until(name, lines, on_progress, limit_s, lambda: self._decided(name, number), number)
        release = self._state.release(name, number)
        self._drop_old_images(name)
        if release.status == ReleaseStatus.FAILED:
            raise DeployFailed(f"{name} v{number}: {release.message}{self._back(name, lines, on_progress)}")
        return views.release_view(release)

    def _new_release(self, name: str, number: int, tag: str, digest: str, config: str) -> NewRelease:
        now, node = self._parts.now_ms(), self._world.node.id
        known = {volume.name for volume in self._state.volumes(name)}
        mounts = Manifest.from_json(config).mounts
        release = Release(
            app=name,
            number=number,
            image=tag,
            image_digest=digest,
            config=config,
            created_ms=now,
            status=ReleaseStatus.DEPLOYING,
        )
        machine = Machine(id=new_machine_id(), app=name, release=number, group="app", node=node)
        volumes = tuple(
            Volume(id=new_volume_id(), app=name, name=mount.source, node=node, created_ms=now)
            for mount in mounts
            if mount.source not in known
        )
        return NewRelease(release, (machine,), volumes, self._state.secrets(name))

    def _settled(self, name: str, lines: queue.Queue[str], on_progress: OnProgress) -> None:
        """A release that was being deployed when minipaas was restarted has its outcome."""
        candidate = self._state.desired(name).candidate
        if candidate is not None:
            on_progress(Progress("step", f"waiting for v{candidate.number}, which is still being deployed"))
            limit_s = self._world.limits.deploy_wait_s
            self._until(name, lines, on_progress, limit_s, lambda: self._state.desired(name).candidate is None)

    def _decided(self, name: str, number: int) -> bool:
        return self._state.release(name, number).status != ReleaseStatus.DEPLOYING

    def _back(self, name: str, lines: queue.Queue[str], on_progress: OnProgress) -> str:
        """Wait until the release before a failed one serves; words for what is true by then."""
        live = self._state.desired(name).live
        if live is None:
            return ""
        limit_s = self._world.limits.restart_wait_s
        try:
            self._until(name, lines, on_progress, limit_s, lambda: self._restarted(name) and self._reached(name))
        except (TimedOut, Unavailable) as error:
            return f"; v{live.number} does not serve either: {error}"
        return f"; v{live.number} goes on serving" if self._state.desired(name).live else ""

    def _reached(self, name: str) -> bool:
        """Requests go to it, if any are to."""
        route = self._world.router.route(name)
        return route is None or (bool(route.upstreams) and not route.held)

    def _is_up(self, machine: Machine) -> bool:
        container = self._world.facts.container(container_name(machine))
        return container is not None and runs(container, machine) and container.id in self._world.facts.healthy()

    def _restarted(self, name: str) -> bool:
        """Every machine runs since the restart and is healthy. Raises Unavailable when one has failed."""
        facts = self._world.facts
        for machine in self._state.machines(name):
            if not self._is_up(machine):
                words = facts.words(machine.id)
                if words and facts.wait_before_start(machine) > 0:
                    raise Unavailable(f"{name} does not come up again: {words}; see: minipaas logs")
                return False
        return True

    def _until(
        self,
        name: str,
        lines: queue.Queue[str],
        on_progress: OnProgress,
        limit_s: float,
        done: Callable[[], bool],
        number: int | None = None,
    ) -> None:
        """Pass on what happens, until ``done()``. Raises TimedOut; the change itself goes on."""
        deadline, told = time.monotonic() + limit_s, ""
        self._parts.reconciler.wake()
        while not done():
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"{name} is not ready after {limit_s:g} s; it goes on in the background, see: minipaas status"
                )
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                line = ""
            if line:
                on_progress(Progress("step", line, number))
            trouble = self._world.facts.trouble(name) or self._world.facts.trouble("")
            if trouble is not None and trouble.words != told:
                told = trouble.words
                on_progress(Progress("warning", f"{told}; trying again", number))
        while not lines.empty():
            if line := lines.get_nowait():
                on_progress(Progress("step", line, number))

    def _turn(self, name: str, who: str, on_progress: OnProgress, limit_s: float) -> AbstractContextManager[None]:
        return self._turns.take(
            name, who, lambda holder: on_progress(Progress("step", f"waiting for {holder}")), limit_s
        )

    def _change_secrets(
        self,
        principal: Principal,
        name: str,
        put: Mapping[str, str],
        drop: Sequence[str],
        on_progress: OnProgress,
    ) -> SecretsChange:
        limit_s = self._world.limits.restart_wait_s
        with self._turn(name, f"a change of secrets by {principal.name}", on_progress, limit_s):
            self._existing(name)
            live = self._state.desired(name).live
            before = self._opened(self._state.secrets(name))
            after = {key: value for key, value in {**before, **put}.items() if key not in drop}
            running = self._opened(self._state.release_secrets(name, live.number)) if live else after
            names = sorted({*before, *after, *running})
            changed = tuple(key for key in names if not before.get(key) == after.get(key) == running.get(key))
            if not changed:
                return SecretsChange()
            sealed = {key: self._world.sealer.seal(put[key]) for key in put if key in changed}
            self._state.change_secrets(name, sealed, drop)
            if live is None:
                return SecretsChange(changed)
            number = self._state.next_release(name)
            with self._parts.hub.listen(name) as lines:
                self._settled(name, lines, on_progress)
                self._state.add_release(self._new_release(name, number, live.image, live.image_digest, live.config))
                self._outcome(name, number, lines, limit_s, on_progress)
            return SecretsChange(changed, number)

    def _opened(self, secrets: Mapping[str, bytes]) -> dict[str, str | bytes]:
        """Values; what cannot be opened stays as it is, so that it equals no value and can be set anew."""
        return {name: self._unsealed(sealed) for name, sealed in secrets.items()}

    def _unsealed(self, sealed: bytes) -> str | bytes:
        try:
            return self._world.sealer.unseal(sealed)
        except SealBroken:
            return sealed

    def _drop_image(self, tag: str) -> None:
        """Tidying up after a failure, which must stay the one that the user sees."""
        try:
            self._world.engine.images.remove(tag)
        except EngineError as error:
            log.warning(
                "an image of a deploy that failed is left in the engine", extra={"image": tag, "reason": str(error)}
            )

    def _drop_old_images(self, name: str) -> None:
        """The engine keeps what serves and the last few; older ones are in the bucket."""
        live = self._state.desired(name).live
        images = list(dict.fromkeys(release.image for release in self._state.releases(name)))
        for image in images[self._world.limits.engine_images :]:
            if live is None or image != live.image:
                self._drop_image(image)

    def _existing(self, name: str) -> App:
        app = self._state.app(name)
        if app.destroyed_ms is not None:
            raise NotFound(f"app {name} was destroyed; bring it back with its data by deploying it again")
        return app
