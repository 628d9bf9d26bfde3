"""``restore`` of many databases: those of a folder's replica, or of a configuration. Owns which, in what order, and the summary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicator.cli.places import store_of
from replicator.cli.words import note
from replicator.errors import ReplicatorError, RestoreError, UsageError

if TYPE_CHECKING:
    from replicator.catalogue import Entry
    from replicator.config import Config, DatabaseConfig
    from replicator.restore import OnProgress
    from replicator.store import ObjectStore

AT_ONCE = 4
"""Databases that are restored side by side, so that a thousand small ones do not wait for each other's requests."""

Said = tuple[dict[str, Any], list[str]]
"""The document, the lines."""


@dataclass(frozen=True)
class Job:
    """One database to restore. entry: who owns it, if a folder's replica says so. configured: the entry that replicates it."""

    store: ObjectStore
    target: Path
    entry: Entry | None = None
    configured: DatabaseConfig | None = None


def of_folder(store: ObjectStore, folder: Path, configured: DatabaseConfig | None = None) -> list[Job]:
    """Every database of a folder's replica. Raises StoreError, FormatError, UsageError."""
    from replicator import catalogue

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is no folder, and {store.url} holds the databases of one; name a folder with -o")
    return [
        Job(catalogue.replica_of(store, name), folder / name, entry, configured)
        for name, entry in sorted(catalogue.entries(store).items())
    ]


def of_config(config: Config, identities: Sequence[str] = ()) -> list[Job]:
    """Every database that a configuration replicates, at its own place. identities: of age. Raises StoreError, FormatError, ConfigError."""
    jobs: list[Job] = []
    for entry in config.databases:
        if entry.folder is None:
            jobs.append(Job(store_of(entry, entry.path, identities), entry.path, None, entry))
        else:
            jobs += of_folder(entry.replica.open(identities=identities), entry.path, entry)
    return jobs


def run(
    jobs: list[Job], act: Callable[[Job, OnProgress, int], Said], parallelism: int, *, dry_run: bool
) -> tuple[dict[str, Any], list[str], bool]:
    """The document, the lines, and whether all went well. One that fails keeps no other from it.

    act: restores one, with a share of the downloads at once.
    """
    stopping = threading.Event()
    at_once = max(1, min(AT_ONCE, len(jobs), parallelism))

    def on_progress(done: int, total: int) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt

    def attempt(job: Job) -> Said | ReplicatorError:
        try:
            if not dry_run:
                _make_folders(job)
            said = act(job, on_progress, max(1, parallelism // at_once))
        except ReplicatorError as error:
            note(f"{job.target}: {error}")
            return error
        if not dry_run:
            note(said[1][0])
        return said

    with ThreadPoolExecutor(at_once, "restore-many") as pool:
        try:
            found = list(pool.map(attempt, jobs))
        except BaseException:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    documents = list(_documents(jobs, found))
    failed = sum(isinstance(each, ReplicatorError) for each in found)
    lines = [line for each in found if dry_run and not isinstance(each, ReplicatorError) for line in each[1]]
    done = "would be restored" if dry_run else "done"
    lines.append(f"{len(jobs) - failed} of {len(jobs)} databases {done}" + (f", {failed} FAILED" if failed else ""))
    return {"databases": documents, "failed": failed}, lines, not failed


def _documents(jobs: list[Job], found: list[Said | ReplicatorError]) -> Iterator[dict[str, Any]]:
    for job, each in zip(jobs, found, strict=True):
        if isinstance(each, ReplicatorError):
            yield {"restored": False, "target": str(job.target), "error": str(each)}
        else:
            yield each[0]


def _make_folders(job: Job) -> None:
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestoreError(f"the folder {job.target.parent} cannot be made: {error.strerror}") from error
