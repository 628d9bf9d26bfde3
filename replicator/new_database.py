"""A database file that is being made: under another name beside its target, until it is finished and gets its name.

Owns the name: it never overwrites a file, and leaves nothing that is not finished but what is kept on purpose for the next restore.
Never knows what is in the file.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from replicator.durable import fsync_dir
from replicator.errors import FormatError, NoRoom, ReplicatorError, RestoreError, StoreError, TargetExists
from replicator.partial import JOURNAL_SUFFIX, Partial, take_journal
from replicator.values import format_size

log = logging.getLogger(__name__)

_SIDE_FILES = ("", "-wal", "-journal", "-shm")


def check_target(target: Path) -> None:
    """Raises TargetExists when something is there or beside it, RestoreError when its folder is not there.

    Mentions what other restores to it have left behind.
    """
    _check_free(target)
    _mention_leftovers(target)


def _check_free(target: Path) -> None:
    if not target.parent.is_dir():
        raise RestoreError(f"the directory {target.parent} does not exist; create it first")
    for suffix in _SIDE_FILES:
        there = target.with_name(target.name + suffix)
        if os.path.lexists(there):
            raise TargetExists(f"{there} exists; move it away, or restore to another path")


def _temporary_prefix(target: Path) -> str:
    return f".{target.name[:200]}.restoring-"


def _kept_file(target: Path) -> Path:
    """What a restore that may be resumed writes, until it has its name; its journal is beside it."""
    return target.with_name(f"{_temporary_prefix(target)}partial")


def _journal_of(kept: Path) -> Path:
    return kept.with_name(kept.name + JOURNAL_SUFFIX)


def _mention_leftovers(target: Path) -> None:
    prefix, kept = _temporary_prefix(target), _kept_file(target)
    ours = {kept.name, _journal_of(kept).name}
    left = sorted(
        path.name for path in target.parent.iterdir() if path.name.startswith(prefix) and path.name not in ours
    )
    if left:
        log.warning(
            "files of other restores that run or were killed are in %s: %s; remove those that no process writes",
            target.parent,
            ", ".join(left),
        )


def check_space(folder: Path, needed_bytes: int, there_bytes: int = 0) -> None:
    """there_bytes: what of it is on the disk already. Raises NoRoom."""
    found = os.statvfs(folder)
    available_bytes = found.f_bavail * found.f_frsize
    if needed_bytes - there_bytes > available_bytes:
        raise NoRoom(
            f"the restored database needs {format_size(needed_bytes)} in {folder}, where {format_size(available_bytes)} are free; "
            "make room, or restore to another file system"
        )


@dataclass(frozen=True)
class NewDatabase:
    """What becomes the restored database. partial: which of its pages are there."""

    fd: int
    path: Path
    partial: Partial


@contextmanager
def kept_database(target: Path, mode: int | None, owner: tuple[int, int] | None) -> Iterator[NewDatabase]:
    """As ``new_database``; but when the store fails, the disk is full or somebody interrupts, what is there is left for the next."""
    path = _kept_file(target)
    journal = _journal_of(path)
    is_begun = False
    try:
        journal_fd = take_journal(journal)
        try:
            with _given_name(target, path, mode, owner) as fd:
                partial = Partial(fd, journal_fd)
                if partial.is_inherited:
                    log.warning("going on with what an interrupted restore left in %s", path)
                try:
                    yield NewDatabase(fd, path, partial)
                finally:
                    is_begun = partial.is_begun
        except BaseException as error:
            is_for_now = isinstance(error, (StoreError, NoRoom)) and not isinstance(error, FormatError)
            is_final = isinstance(error, ReplicatorError) and not is_for_now
            if is_final or not is_begun:
                _remove(path, journal)
            else:
                log.warning(
                    "what was downloaded is kept in %s; the same restore goes on from there, or remove it", path
                )
            raise
        finally:
            if not path.exists():
                _remove(journal)
            os.close(journal_fd)
    except OSError as error:
        raise _unwritable(target, error) from error


@contextmanager
def new_database(target: Path, mode: int | None, owner: tuple[int, int] | None = None) -> Iterator[tuple[int, Path]]:
    """Descriptor and path of an empty file that is given the name ``target``, durably, when the block ends without an error.

    Otherwise nothing is left of it. Raises TargetExists, and RestoreError for any OSError.
    """
    temporary = target.with_name(_temporary_prefix(target) + secrets.token_hex(8))
    try:
        with _given_name(target, temporary, mode, owner, os.O_EXCL) as fd:
            yield fd, temporary
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        _remove(temporary)


@contextmanager
def _given_name(
    target: Path, temporary: Path, mode: int | None, owner: tuple[int, int] | None, flags: int = 0
) -> Iterator[int]:
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        yield fd
        _give_to(fd, target, 0o600 if mode is None else mode, owner)
        os.fsync(fd)
    finally:
        os.close(fd)
    _publish(temporary, target)


def _give_to(fd: int, target: Path, mode: int, owner: tuple[int, int] | None) -> None:
    """Rights that were meant for another owner's group are not given to this process's."""
    found = os.fstat(fd)
    if owner is not None and owner != (found.st_uid, found.st_gid):
        try:
            os.fchown(fd, *owner)
        except PermissionError:
            log.warning(
                "%s cannot be given to %d:%d, which owned it, by this user; only its owner may read it", target, *owner
            )
            mode &= 0o700
    os.fchmod(fd, mode)


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()


def _unwritable(target: Path, error: OSError) -> RestoreError:
    return RestoreError(f"{target} cannot be written: {error.strerror or error}")


def _publish(temporary: Path, target: Path) -> None:
    """Give the file its name, durably, unless something took the name meanwhile."""
    _check_free(target)
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise TargetExists(f"{target} was created by somebody else during the restore; it was left as it is") from None
    except OSError:
        _publish_without_links(temporary, target)
    else:
        temporary.unlink()
    fsync_dir(target.parent)


def _publish_without_links(temporary: Path, target: Path) -> None:
    """For file systems that have no hard links: reserve the name, then rename over it."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise TargetExists(f"{target} was created by somebody else during the restore; it was left as it is") from None
    try:
        temporary.replace(target)
    except OSError:
        target.unlink()
        raise
