"""This node's right to the fleet's bucket, from its start to its loss; and the end of all that may write, once it is lost.

Owns the lease of a running node and the mark DATA/lost: a node that has lost its fleet stays so, even when the bucket cannot be asked.
Never takes the fleet from another; only ``recover`` does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from minipaas.edge import Edge
from minipaas.engine import Engine
from minipaas.errors import FleetHeld, PlatformError
from minipaas.settings import Settings, write_private
from replicator import ReplicatorError, StoreError

log = logging.getLogger(__name__)

STOPS_AT_ONCE = 8


class Lease(Protocol):
    """``replicator.Lease``. ``keep`` returns when the process stops; the others raise ReplicatorError."""

    def resume(self) -> int: ...

    def token(self) -> int: ...

    def keep(self, on_lost: Callable[[ReplicatorError], None]) -> None: ...

    def release(self) -> None: ...


class Tenure:
    """lease: None where nobody else can have the bucket. retry_s: between two tries while the bucket cannot be reached."""

    def __init__(self, settings: Settings, lease: Lease | None, leaving: threading.Event, retry_s: float) -> None:
        self._settings, self._lease, self._leaving, self._retry_s = settings, lease, leaving, retry_s
        self.lost = ""

    def begin(self, on_lost: Callable[[], None], on_held: Callable[[], None]) -> None:
        """Take it up where this node had it. Raises FleetHeld when another has had it since, now or in an earlier life of this node.

        A bucket that cannot be reached is no reason not to look after the apps that run here: it is asked again. Both are called in a
        thread: on_held once it is this node's, on_lost after ``lost`` says why.
        """
        self._refuse_if_lost()
        if self._lease is None:
            return
        held = True
        try:
            self._lease.resume()
        except StoreError as error:
            log.warning("the bucket cannot be reached", extra={"reason": str(error)})
            held = False
        except ReplicatorError as error:
            self._lose(error)
            raise FleetHeld(self.lost) from error
        threading.Thread(
            target=self._keep, args=(self._lease, held, on_lost, on_held), name="lease", daemon=True
        ).start()

    @contextmanager
    def borrowed(self, say: Callable[[str], None]) -> Iterator[None]:
        """For one short piece of work; released at the end, so that a recovery elsewhere need not watch whether this node lives."""
        try:
            self._refuse_if_lost()
            if self._lease is not None:
                self._lease.resume()
        except (FleetHeld, ReplicatorError) as error:
            say(f"the bucket could not be taken up: {error}")
        try:
            yield
        finally:
            try:
                if self._lease is not None:
                    self._lease.release()
            except ReplicatorError as error:
                say(f"the bucket could not be released, so a recovery will watch it first: {error}")

    def epoch(self) -> int:
        """Fencing token for what is begun in the bucket. Raises LeaseLost while this node has no right to it."""
        return self._lease.token() if self._lease is not None else 0

    def _keep(self, lease: Lease, held: bool, on_lost: Callable[[], None], on_held: Callable[[], None]) -> None:
        def lose(error: ReplicatorError) -> None:
            self._lose(error)
            on_lost()

        while not held:
            if self._leaving.wait(self._retry_s):
                return
            try:
                lease.resume()
                held = True
            except StoreError:
                continue
            except ReplicatorError as error:
                lose(error)
                return
            except Exception:  # the loop of a thread: it must not end in silence
                log.exception("the bucket could not be taken up; it is tried again")
        try:
            on_held()
        except (PlatformError, ReplicatorError) as error:
            log.warning("the fleet's record in the bucket could not be looked at", extra={"reason": str(error)})
        lease.keep(lose)

    def _refuse_if_lost(self) -> None:
        try:
            self.lost = self._settings.lost_path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return
        raise FleetHeld(self.lost)

    def _lose(self, error: ReplicatorError) -> None:
        log.error("another node has this fleet now; this one stops its apps", extra={"reason": str(error)})
        self.lost = (
            f"{error}; this node has stopped its apps for good. What it had not shipped is still in {self._settings.volumes_dir}; to "
            "use this host again, recover into another, empty directory"
        )
        try:
            write_private(self._settings.lost_path, f"{self.lost}\n")
        except OSError as failure:  # nothing is less useful now than not to go on with the stop
            log.error("the loss could not be noted", extra={"path": self._settings.lost_path, "reason": str(failure)})


def close_edge(edge: Edge) -> list[str]:
    """No request reaches an app of this node any more. What could not be done, as sentences."""
    try:
        edge.stop()
    except PlatformError as error:
        return [f"the edge could NOT be stopped, stop it by hand: {error}"]
    return []


def end_containers(engine: Engine) -> tuple[int, list[str]]:
    """Stop and remove all of this node; one that resists keeps no other. How many have ended, and sentences on those that have not."""

    def end(name: str) -> list[str]:
        try:
            engine.containers.stop(name)
            engine.containers.remove(name)
        except PlatformError as error:
            return [f"container {name} could NOT be stopped, stop it by hand: {error}"]
        return []

    try:
        names = [container.name for container in engine.containers.list()]
    except PlatformError as error:
        return 0, [f"the engine does not say what runs here, stop it by hand: {error}"]
    with ThreadPoolExecutor(STOPS_AT_ONCE, "end") as pool:
        failures = [sentence for sentences in pool.map(end, names) for sentence in sentences]
    return len(names) - len(failures), failures
