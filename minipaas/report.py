"""What is so now, as people are told it: apps, volumes, databases, the node, logs. Put together from desired state and facts.

Owns no state. Never changes anything, and never asks who wants to know.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from minipaas import views
from minipaas.engine import Container, LogLine
from minipaas.errors import ContainerMissing
from minipaas.model import Volume
from minipaas.ops import World
from minipaas.settings import listen_address
from minipaas.workload import LABEL_APP, LABEL_MACHINE, default_host, workload_of


class Report:
    """Thread-safe. engine_words, edge_words: what these call themselves."""

    def __init__(self, world: World, engine_words: str, edge_words: str) -> None:
        self._world, self._state = world, world.state
        self._engine_words, self._edge_words = engine_words, edge_words
        self._http_port = listen_address(world.settings.http_listen, "http_listen")[1]

    def apps(self) -> Sequence[views.AppView]:
        volumes = self._volumes()
        return [self._app(app.name, volumes) for app in self._state.apps()]

    def app(self, name: str) -> views.AppView:
        """Raises NotFound."""
        return self._app(name, self._volumes())

    def volumes(self) -> Sequence[views.VolumeView]:
        return list(self._volumes().values())

    def has_run(self, name: str) -> bool:
        """A container of the app is there, whether it runs or not."""
        return self._newest(name, unlike="") is not None

    def node(self) -> views.NodeView:
        settings, facts = self._world.settings, self._world.facts
        databases = self._databases({volume.id: volume for volume in self._state.volumes()})
        troubles = [f"{app}: {each.words}" if app else each.words for app, each in sorted(facts.troubles().items())]
        troubles += _disk_troubles((settings.data_dir, settings.volumes_dir), self._world.limits.low_disk_bytes)
        return views.NodeView(
            id=settings.node_id,
            name=settings.node,
            region=settings.region,
            engine=self._engine_words,
            edge=self._edge_words,
            fleet=self._state.fleet().id,
            bucket=settings.bucket,
            troubles=troubles,
            durable=bool(databases) and all(each.words.startswith("protected") for each in databases),
            databases=databases,
        )

    def logs(
        self, name: str, tail: int | None, follow: bool, gone: Callable[[], bool]
    ) -> Iterator[tuple[str, LogLine]]:
        """Of the newest container; when it is replaced, of its successor from its first line."""
        followed = ""
        while True:
            newest = self._newest(name, unlike=followed)
            if newest is not None:
                followed = newest.id
                yield from self._lines_of(newest, tail, follow, gone)
                tail = None
            if not follow or gone() or self._world.clock.wait(0.5):
                return

    def _app(self, name: str, volumes: Mapping[str, views.VolumeView]) -> views.AppView:
        desired, settings = self._state.desired(name), self._world.settings
        releases = self._state.releases(name)
        hosts: Sequence[str] = (default_host(name, settings.domain),)
        if desired.live is not None:
            workload = workload_of(desired.live, settings.domain)
            hosts = workload.hosts if workload.port is not None else ()
        own = [view for view in volumes.values() if view.app == name]
        route = self._world.router.route(name)
        return views.app_view(
            desired, releases[0] if releases else None, hosts, self._http_port, own, route, self._world.facts
        )

    def _volumes(self) -> Mapping[str, views.VolumeView]:
        volumes = {volume.id: volume for volume in self._state.volumes()}
        databases = self._databases(volumes)
        return {
            key: views.volume_view(volume, str(self._world.directory(volume)), databases, self._world.facts)
            for key, volume in volumes.items()
        }

    def _databases(self, volumes: Mapping[str, Volume]) -> list[views.DatabaseView]:
        """Of what is replicated; and of each volume that is not, so that what nobody looks at is never called protected."""
        found = [views.database_view(database, volumes) for database in self._world.backups.databases()]
        for volume in volumes.values():
            missing = self._world.missing(volume) if volume.state == "created" else ""
            at_risk = views.volume_at_risk(volume, str(self._world.directory(volume)), missing, self._world.facts)
            if at_risk is not None:
                found = [each for each in found if each.volume != volume.id or not missing]
                found.append(at_risk)
        return found

    def _lines_of(
        self, container: Container, tail: int | None, follow: bool, gone: Callable[[], bool]
    ) -> Iterator[tuple[str, LogLine]]:
        try:
            for line in self._world.engine.containers.logs(container.name, tail=tail, follow=follow, gone=gone):
                yield container.labels.get(LABEL_MACHINE, ""), line
                if gone():
                    return
        except ContainerMissing:
            return

    def _newest(self, name: str, unlike: str) -> Container | None:
        own = [each for each in self._world.facts.containers() if each.labels.get(LABEL_APP) == name]
        newest = max(own, key=lambda each: (each.started_ms or 0, each.id), default=None)
        return None if newest is None or newest.id == unlike else newest


def _disk_troubles(directories: Sequence[Path], low_bytes: int) -> list[str]:
    """One sentence for each disk that is full, or nearly so. It holds no number that changes, as pages are sent what changed."""
    by_disk = {each.stat().st_dev: each for each in reversed(directories) if each.exists()}
    return [
        f"the disk of {each} has less than {low_bytes >> 20} MiB free: apps can soon write nothing, or not be protected; make room"
        for each in by_disk.values()
        if shutil.disk_usage(each).free < low_bytes
    ]
