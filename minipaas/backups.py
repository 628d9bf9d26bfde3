"""Keeps the platform's data in the bucket, through the replicator: the state database, and every SQLite database in volumes.

Owns the platform's places in the bucket (docs/architecture.md, "The bucket") and the replicator that runs in this process. Implements
``protection.Backups``. Never decides what is to be protected.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from minipaas.errors import BadRequest, PlatformError, TimedOut, Unavailable
from minipaas.protection import DatabaseState
from minipaas.settings import Credentials, Settings
from replicator import (
    DatabaseError,
    DatabaseStatus,
    Folder,
    FormatError,
    IntegrityCheckFailed,
    NothingToRestore,
    ObjectStore,
    Replica,
    Replicator,
    ReplicatorError,
    RestoreError,
    RestoreOptions,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    SyncTimeout,
    UsageError,
    WorkerSettings,
    catalogue,
    mark_restored,
    open_store,
    raise_descriptor_limit,
    restore,
)

log = logging.getLogger(__name__)

STATE = "state"
VOLUMES = "volumes"
IMAGES = "images"


PROBE_PATIENCE_S = 3.0
PATIENCE_S = 30.0
SHIPPING_PATIENCE_S = 8.0
"""How long a request is tried again. The first one, before a bucket has ever answered, gives up soon: somebody waits, and the URL
may be wrong. Shipping tries for ever, but says soon that it does not get through."""


MORE_KEYS = "; keys may also be in MINIPAAS_ACCESS_KEY and MINIPAAS_SECRET_KEY"


def open_bucket(url: str, credentials: Credentials | None, patience_s: float = PATIENCE_S) -> ObjectStore:
    """The fleet's bucket and prefix. Raises BadRequest for a URL that has no meaning, or keeps nothing; does not reach out."""
    if url.startswith("memory:"):
        raise BadRequest(f"{url} ends with the process, and everything in it; name a bucket, s3://BUCKET/PREFIX")
    try:
        return open_store(
            url,
            access_key=credentials.access_key if credentials else None,
            secret_key=credentials.secret_key if credentials else None,
            retry_budget_s=patience_s,
        )
    except UsageError as error:
        raise BadRequest(str(error)) from error


@contextmanager
def reaching(bucket: ObjectStore, keys_given: bool) -> Iterator[None]:
    """Around the first requests to a bucket. Raises Unavailable that says what to look at."""
    try:
        yield
    except StoreDenied as error:
        raise Unavailable(
            f"{bucket.url} refuses us: {error}{'' if keys_given else MORE_KEYS}; nothing was changed"
        ) from error
    except StoreUnavailable as error:
        raise Unavailable(
            f"{bucket.url} cannot be reached: {error}; check the endpoint in --bucket, and that this host gets there; nothing was changed"
        ) from error
    except StoreError as error:
        raise Unavailable(f"{bucket.url} cannot be used: {error}; nothing was changed") from error


class BucketBackups:
    """``protection.Backups`` over one bucket. Every method may be called from any thread.

    shipping: the same bucket with less patience, for what is tried again and again anyway. epoch: of this node's lease; raises LeaseLost
    while it has none.
    """

    def __init__(
        self, settings: Settings, bucket: ObjectStore, shipping: ObjectStore, epoch: Callable[[], int]
    ) -> None:
        self._bucket = bucket
        self._shipping = shipping
        self._state_path = settings.state_path
        self._local = local_state(settings)
        self._worker_settings = WorkerSettings(interval_s=settings.sync_interval_s)
        self._replicator = Replicator(writer=f"{settings.node} ({settings.node_id})", epoch=epoch)
        self._volumes: dict[str, Path] = {}

    @property
    def images(self) -> ObjectStore:
        return self._bucket.sub(IMAGES)

    def start(self) -> None:
        raise_descriptor_limit()
        with _translated():
            self._replicator.start()
            self._replicator.add(
                self._state_path, self._shipping.sub(STATE), state=self._local / STATE, settings=self._worker_settings
            )

    def stop(self, timeout_s: float) -> None:
        """Ships the last commits, within the time. What did not get there is logged by name, and goes on at the next start."""
        for late in self._replicator.stop(timeout_s):
            log.error("not durable at the stop: %s", late.reason)

    def watch_volume(self, volume_id: str, directory: Path) -> None:
        with _translated():
            self._volumes[volume_id] = directory
            self._replicator.add_folder(
                Folder(directory),
                self._shipping.sub(f"{VOLUMES}/{volume_id}"),
                state=self._local / VOLUMES / volume_id,
                settings=self._worker_settings,
            )

    def forget_volume(self, volume_id: str) -> None:
        directory = self._volumes.pop(volume_id, None)
        if directory is not None:
            self._replicator.remove_folder(directory)

    def discard_volume(self, volume_id: str) -> None:
        local = self._local / VOLUMES / volume_id
        if local.exists():
            shutil.rmtree(local)

    def sync_volume(self, volume_id: str, timeout_s: float) -> None:
        directory = self._volumes.get(volume_id)
        if directory is not None:
            with _translated():
                self._replicator.sync_folder(directory, timeout_s)

    def sync_state(self, timeout_s: float) -> None:
        with _translated():
            self._replicator.sync(self._state_path, timeout_s)

    def restore_volume(self, volume_id: str, directory: Path, on_progress: Callable[[str], None]) -> None:
        with _translated():
            restore_folder(
                self._bucket.sub(f"{VOLUMES}/{volume_id}"),
                directory,
                self._local / VOLUMES / volume_id,
                f"volume {directory.name}",
                on_progress,
            )

    def databases(self) -> Sequence[DatabaseState]:
        return [self._describe(status) for status in self._replicator.status()]

    def _describe(self, status: DatabaseStatus) -> DatabaseState:
        volume_id = next((id for id, path in list(self._volumes.items()) if status.path.is_relative_to(path)), "")
        durable = status.durable
        return DatabaseState(
            volume_id=volume_id,
            path=status.path,
            words=status.words,
            reason=status.reason or status.upkeep_problem,
            lag_s=status.lag_s,
            durable_txid=durable.txid if durable else 0,
            timeline=durable.timeline if durable else 0,
            durable_ms=status.durable_ms or None,
            size_bytes=status.page_size * status.page_count,
        )


def local_state(settings: Settings) -> Path:
    """Where the replicator of a node keeps what it knows and what waits for upload."""
    return settings.data_dir / "replicator"


def restore_state(bucket: ObjectStore, settings: Settings, on_progress: Callable[[str], None]) -> None:
    """The state database from the bucket, as it was last durable. Idempotent."""
    with _translated():
        _restore_database(
            bucket.sub(STATE), settings.state_path, local_state(settings) / STATE, "platform state", on_progress
        )


def restore_folder(
    store: ObjectStore, directory: Path, local: Path, what: str, on_progress: Callable[[str], None]
) -> None:
    """Every database of a folder's replica into ``directory``, with owner and mode; those that are there already stay.

    local: state of the folder's databases, where the restored positions are noted, so that each goes on as a fork from there.
    One of which nothing can be restored at all is left out, and said; one that fails keeps no other from coming back. One whose entry
    is lost gets the owner of the folder.
    """
    for leftover in directory.rglob(".*.restoring-*"):
        leftover.unlink()
    status = directory.stat()
    failures: list[ReplicatorError | PlatformError] = []
    for name, known in catalogue.recoverable(store).items():
        entry = known or catalogue.Entry(str(name), 0o600, status.st_uid, status.st_gid)
        target = directory / name
        try:
            _make_folders(directory, name, entry.uid, entry.gid)
            _restore_database(
                catalogue.replica_of(store, name),
                target,
                local / catalogue.encode(name),
                f"{name} of {what}",
                on_progress,
            )
        except NothingToRestore as nothing:
            log.warning("%s of %s is left out: %s", name, what, nothing)
            on_progress(f"{name} of {what}: nothing of it was ever whole in the bucket; it is left out")
            continue
        except (RestoreError, FormatError, PlatformError) as error:
            log.error(
                "a database could not be restored; put it there with replicator restore, and its app comes back",
                extra={"database": str(name), "volume": what, "path": target, "reason": str(error)},
            )
            failures.append(error)
            continue
        _give(target, entry)
    if failures:
        raise failures[0]


def _give(target: Path, entry: catalogue.Entry) -> None:
    """To the owner of the entry. What is no plain file there now is not what was restored."""
    descriptor = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            this = f"/proc/self/fd/{descriptor}"
            os.chown(this, entry.uid, entry.gid)
            Path(this).chmod(entry.mode)
    finally:
        os.close(descriptor)


def _make_folders(directory: Path, name: PurePosixPath, uid: int, gid: int) -> None:
    """Raises PlatformError for a link on the way: what an app has left in its volume must not lead a restore, or a chown, out of it."""
    here = directory
    for part in name.parts[:-1]:
        here = here / part
        if here.is_symlink():
            raise PlatformError(f"{directory / name} cannot be restored: {here} is a symbolic link; remove it")
        if not here.exists():
            here.mkdir(mode=0o755)
            os.chown(here, uid, gid)


def _restore_database(
    store: ObjectStore, target: Path, local: Path, what: str, on_progress: Callable[[str], None]
) -> None:
    if os.path.lexists(target):
        return
    began = time.monotonic()
    try:
        report = restore(store, target, RestoreOptions(integrity_check="quick"))
    except IntegrityCheckFailed as failed:
        # Every page is as it was: what SQLite complains of is so in the original, and its app has lived with it.
        log.warning("%s is restored as it was, though SQLite complains of it: %s", what, failed)
        on_progress(f"{what}: as it was, though SQLite complains of it; see the log")
        report = restore(store, target, RestoreOptions(integrity_check="none"))
    record = Replica(store).timelines().get(report.position.timeline)
    if record is not None:  # without it, replication begins with a snapshot
        mark_restored(local, report, record)
    on_progress(f"{what}: {report.size_bytes / 1048576:.1f} MiB at {report.position}, {time.monotonic() - began:.1f} s")


@contextmanager
def _translated() -> Iterator[None]:
    """The replicator's errors as the platform's."""
    try:
        yield
    except SyncTimeout as error:
        raise TimedOut(str(error)) from error
    except DatabaseError as error:
        raise PlatformError(str(error)) from error
    except ReplicatorError as error:
        raise Unavailable(str(error)) from error
