"""What is known about the world, in memory only: containers, health, starts, troubles.

Owns facts of this process. Never written to disk: all of it is found out again after a restart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from minipaas.engine import Container
from minipaas.model import Machine


@dataclass(frozen=True)
class Trouble:
    """Something outside does not do what it should. until: monotonic second of the next try. generation: of the app then."""

    words: str
    until: float
    generation: int
    count: int


class Facts:
    """Thread-safe. now: a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float], *, max_backoff_s: float, steady_after_s: float) -> None:
        self._now, self._max_backoff_s, self._steady_after_s = now, max_backoff_s, steady_after_s
        self._changed = threading.Condition()
        self._version = 0
        self._containers: dict[str, Container] = {}
        self._healthy: set[str] = set()
        self._unhealthy: dict[str, tuple[str, float]] = {}
        self._watched: set[str] = set()
        self._starts: dict[tuple[str, int], list[float]] = {}
        self._words: dict[str, str] = {}
        self._troubles: dict[str, Trouble] = {}

    # -- changes, for whoever shows them

    def touch(self) -> None:
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def wait_for_change(self, after: int, timeout_s: float) -> int:
        """The version, as soon as it is not ``after`` any more, or when the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != after, timeout_s)
            return self._version

    # -- what it is all about

    def subjects(self) -> frozenset[str]:
        """Names of apps and ids of machines and volumes of which anything is known."""
        with self._changed:
            started = {machine for machine, _ in self._starts}
            return frozenset({*started, *self._words, *self._troubles} - {""})

    def drop(self, gone: Collection[str]) -> None:
        """Of these nothing is to be known any more, since nobody wants them."""
        with self._changed:
            self._starts = {key: value for key, value in self._starts.items() if key[0] not in gone}
            self._words = {key: value for key, value in self._words.items() if key not in gone}
            self._troubles = {key: value for key, value in self._troubles.items() if key not in gone}
        if gone:
            self.touch()

    # -- containers

    def containers(self) -> Sequence[Container]:
        return tuple(self._containers.values())

    def container(self, name: str) -> Container | None:
        return self._containers.get(name)

    def set_containers(self, containers: Sequence[Container]) -> None:
        seen = {container.name: container for container in containers}
        ids = {container.id for container in containers}
        with self._changed:
            changed = seen != self._containers
            self._containers = seen
            self._healthy &= ids
            self._unhealthy = {key: value for key, value in self._unhealthy.items() if key in ids}
        if changed:
            self.touch()

    def put_container(self, container: Container) -> None:
        """It has just been started; the next list says the same."""
        with self._changed:
            self._containers = {**self._containers, container.name: container}
        self.touch()

    # -- health, by container id: a container that is started anew has another

    def set_healthy(self, machine: str, container: str) -> None:
        with self._changed:
            self._healthy.add(container)
            self._unhealthy.pop(container, None)
            self._words.pop(machine, None)
        self.touch()

    def set_unhealthy(self, machine: str, container: str, words: str) -> None:
        with self._changed:
            self._healthy.discard(container)
            self._unhealthy[container] = (words, self._now() + self._max_backoff_s)
            self._words[machine] = words
        self.touch()

    def healthy(self) -> frozenset[str]:
        return frozenset(self._healthy)

    def unhealthy(self) -> frozenset[str]:
        """Those whose next check is not due yet."""
        now = self._now()
        return frozenset(container for container, (_, until) in list(self._unhealthy.items()) if until > now)

    def words(self, thing: str) -> str:
        """Why a machine is not well, or how far a volume is; '' when there is nothing to say."""
        return self._words.get(thing, "")

    def set_words(self, thing: str, words: str) -> None:
        with self._changed:
            self._words[thing] = words
        self.touch()

    def clear_words(self, thing: str) -> None:
        with self._changed:
            self._words.pop(thing, None)
        self.touch()

    # -- starts, for the back-off between them

    def note_start(self, machine: Machine) -> None:
        key, now = (machine.id, machine.restarts), self._now()
        with self._changed:
            recent = [at for at in self._starts.get(key, []) if now - at < self._steady_after_s]
            others = {other: starts for other, starts in self._starts.items() if other[0] != machine.id}
            self._starts = {**others, key: [*recent, now]}

    def ran_s(self, machine: Machine) -> float | None:
        """Seconds since this process started it; None when it did not."""
        starts = self._starts.get((machine.id, machine.restarts))
        return self._now() - starts[-1] if starts else None

    def wait_before_start(self, machine: Machine) -> float:
        """Seconds until it may be started again: twice as long after each of its recent starts."""
        starts = self._starts.get((machine.id, machine.restarts), [])
        recent = [at for at in starts if self._now() - at < self._steady_after_s]
        if not recent:
            return 0.0
        return max(0.0, recent[-1] + self._backoff(len(recent)) - self._now())

    # -- volumes that the replicator watches

    def set_watched(self, volume: str, watched: bool) -> None:
        with self._changed:
            (self._watched.add if watched else self._watched.discard)(volume)

    def watched(self) -> frozenset[str]:
        return frozenset(self._watched)

    # -- troubles, by app ('' for the node)

    def set_trouble(self, app: str, words: str, generation: int = 0) -> float:
        """Seconds until the next try."""
        with self._changed:
            known = self._troubles.get(app)
            count = known.count + 1 if known else 1
            wait = self._backoff(count)
            self._troubles[app] = Trouble(words, self._now() + wait, generation, count)
        self.touch()
        return wait

    def clear_trouble(self, app: str) -> None:
        with self._changed:
            cleared = self._troubles.pop(app, None)
        if cleared:
            self.touch()

    def trouble(self, app: str) -> Trouble | None:
        return self._troubles.get(app)

    def troubles(self) -> Mapping[str, Trouble]:
        return dict(self._troubles)

    def _backoff(self, count: int) -> float:
        return min(self._max_backoff_s, 2.0 ** min(count - 1, 10))
