"""Files that survive a crash: temporary name in the same folder, write, fsync, rename, fsync of the folder.

Owns every durable write outside live databases. Never opens a database, never translates OSError: callers know its
meaning.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

TEMPORARY_PREFIX = "~tmp-"
STALE_AFTER_S = 86400.0

_CHUNK_BYTES = 1 << 20


def fsync_dir(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(folder: Path, mode: int = 0o700) -> None:
    """Create ``folder`` and its missing parents, durably. No error when it is there."""
    if folder.is_dir():
        return
    make_dirs(folder.parent, mode)
    try:
        folder.mkdir(mode)
    except FileExistsError:
        if not folder.is_dir():
            raise
    fsync_dir(folder.parent)


def write_temporary(folder: Path, data: bytes | Path | Iterator[bytes], mode: int = 0o600) -> Path:
    """A new file in ``folder``, on disk, with the bytes, the pieces, or the content of the file at the path.

    The caller renames it. What the pieces raise leaves no file behind.
    """
    path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            _fill(file.fileno(), data)
            os.fsync(file.fileno())
    except BaseException:
        with suppress(FileNotFoundError):
            path.unlink()
        raise
    return path


def write_file(path: Path, data: bytes | Path, mode: int = 0o600) -> None:
    """Write ``path`` so that after a crash it holds the old content or the new, whole. Replaces what is there."""
    temporary = write_temporary(path.parent, data, mode)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def replace(source: Path, target: Path) -> None:
    """Rename ``source``, whose content is on disk already, over ``target``, durably. Both are on one file system."""
    source.replace(target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def remove_stale_temporary(path: Path, now: Callable[[], float] = time.time) -> bool:
    """Remove a temporary file that a killed writer left more than a day ago. True when it was removed."""
    with suppress(FileNotFoundError):
        if path.name.startswith(TEMPORARY_PREFIX) and now() - path.stat().st_mtime > STALE_AFTER_S:
            path.unlink()
            return True
    return False


def _fill(descriptor: int, data: bytes | Path | Iterator[bytes]) -> None:
    if isinstance(data, Path):
        with data.open("rb") as source, open(descriptor, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
        return
    for piece in (data,) if isinstance(data, bytes) else data:
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
