"""A local folder as object storage: one file an object, durable before ``put`` returns.

Owns the folder's layout: a key is a relative path; names with ``~`` are its own (temporary files, locks). Never keeps a
file open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from replicator import durable
from replicator.errors import ObjectMissing, PreconditionFailed, StoreDenied, StoreError, StoreUnavailable
from replicator.store import Body, ObjectInfo, Stream, check_key, check_prefix, is_key, joined

LOCK_NAME = "~lock"
LOCK_TIMEOUT_S = 10.0

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FileStore:
    """Objects are files below ``root``, which is created with the first one.

    A key may not continue another key ("a" and "a/b"): one would be a file and a folder. Raises StoreError then.
    An etag names one write: it changes with every put, also of the same content.
    """

    def __init__(self, root: Path, *, now: Callable[[], float] = time.time) -> None:
        self._root = root
        self._prefix = ""
        self._now = now

    @property
    def url(self) -> str:
        return f"file://{self._root}/{self._prefix}".rstrip("/")

    def put(
        self,
        key: str,
        body: Body,
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
        time_ms: int | None = None,
    ) -> ObjectInfo:
        path = self._path(key)
        with _translated("write", path):
            temporary = self._write_temporary(path.parent, _openable(body))
            try:
                info = _info(key, _stamp(temporary, time_ms))
                if if_none_match:
                    self._create(temporary, path)
                else:
                    self._replace(temporary, path, if_match)
            finally:
                temporary.unlink(missing_ok=True)
            durable.fsync_dir(path.parent)
        return info

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        with _translated("read", path), path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size + offset) if offset < 0 else offset
            wanted = max(0, size - start) if length is None else min(length, max(0, size - start))
            return _read_range(file.fileno(), start, wanted)

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with _translated("read", path):
            return _info(key, _stat_object(path))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        base = self._root / self._prefix
        with _translated("list", base):
            yield from self._walk(base, "", check_prefix(prefix))

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self._path(key)
            with _translated("delete", path), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                _stat_object(path)
                with _locked(path.parent):
                    path.unlink()
                    durable.fsync_dir(path.parent)
                self._remove_empty_folders(path.parent)

    def sub(self, prefix: str) -> FileStore:
        below = FileStore(self._root, now=self._now)
        below._prefix = joined(self._prefix, prefix)
        return below

    def _path(self, key: str) -> Path:
        return self._root / f"{self._prefix}{check_key(key)}"

    def _write_temporary(self, folder: Path, body: Body) -> Path:
        while True:
            durable.make_dirs(folder)
            try:
                return durable.write_temporary(folder, body.chunks() if isinstance(body, Stream) else body)
            except FileNotFoundError:
                # A delete removed the folder as empty in between; one that holds a temporary file is not empty.
                if folder.is_dir():
                    raise

    def _create(self, temporary: Path, path: Path) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            _stat_object(path)
            raise PreconditionFailed(f"{path} exists already") from None
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            with _locked(path.parent):
                if path.exists():
                    raise PreconditionFailed(f"{path} exists already") from None
                temporary.replace(path)

    def _replace(self, temporary: Path, path: Path, if_match: str | None) -> None:
        # Every overwrite and delete takes the lock, so that nothing changes between comparing the etag and the rename.
        with _locked(path.parent):
            if if_match is not None and _etag_at(path) != if_match:
                raise PreconditionFailed(f"{path} has changed or is gone")
            temporary.replace(path)

    def _walk(self, folder: Path, at: str, prefix: str) -> Iterator[ObjectInfo]:
        for entry in self._entries(folder):
            key = at + entry.name
            if entry.is_dir(follow_symlinks=False):
                below = f"{key}/"
                if below.startswith(prefix) or prefix.startswith(below):
                    yield from self._walk(Path(entry.path), below, prefix)
            elif key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield _info(key, entry.stat(follow_symlinks=False))

    def _entries(self, folder: Path) -> Sequence[os.DirEntry[str]]:
        """What is in a folder, in the order of whole keys: a folder sorts as its name with the slash."""
        try:
            with os.scandir(folder) as found:
                entries = [*found]
        except FileNotFoundError:
            return []
        for entry in entries:
            if entry.name.startswith(durable.TEMPORARY_PREFIX):
                durable.remove_stale_temporary(Path(entry.path), self._now)
        legal = [entry for entry in entries if is_key(entry.name)]
        return sorted(legal, key=lambda entry: entry.name + ("/" if entry.is_dir(follow_symlinks=False) else ""))

    def _remove_empty_folders(self, folder: Path) -> None:
        with suppress(OSError):
            while folder != self._root:
                if (folder / LOCK_NAME).exists():
                    _remove_idle_lock(folder)
                folder.rmdir()
                folder = folder.parent


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among those who overwrite or delete in the folder, in all processes of this host."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for_lock(descriptor, folder, deadline)
            # Who empties a folder removes its lock file too; a lock on a file without a name locks nobody out.
            if os.fstat(descriptor).st_nlink:
                yield
                return
        finally:
            os.close(descriptor)


def _wait_for_lock(descriptor: int, folder: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"{folder / LOCK_NAME} has been locked for {LOCK_TIMEOUT_S:.0f} s; see by whom with fuser"
                ) from None
            time.sleep(0.002)


def _remove_idle_lock(folder: Path) -> None:
    """Remove the lock file of a folder that holds nothing else. Writers have a temporary file there before they lock."""
    with _locked(folder):
        if [path.name for path in folder.iterdir()] == [LOCK_NAME]:
            (folder / LOCK_NAME).unlink()


def _stamp(path: Path, time_ms: int | None) -> os.stat_result:
    """Give the file a modification time of its own, to the nanosecond, which together with its inode makes its etag."""
    moment = time.time_ns() if time_ms is None else time_ms * 1_000_000
    os.utime(path, ns=(moment, moment))
    return path.stat()


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    etag = f"{found.st_mtime_ns:x}-{found.st_ino:x}-{found.st_size:x}"
    return ObjectInfo(key, found.st_size, etag, found.st_mtime_ns // 1_000_000)


def _etag_at(path: Path) -> str | None:
    try:
        return _info("", _stat_object(path)).etag
    except FileNotFoundError:
        return None


def _stat_object(path: Path) -> os.stat_result:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder of other objects", str(path))
    return found


def _read_range(descriptor: int, start: int, length: int) -> bytes:
    """Fewer bytes than ``length`` only when the file ends before; one read gives at most 2 GiB."""
    chunks = []
    while length > 0 and (chunk := os.pread(descriptor, length, start)):
        chunks.append(chunk)
        start += len(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def _openable(body: Body) -> Body:
    """The body itself. Raises StoreError, so that a body that is missing is not taken for a failure of the store."""
    if isinstance(body, Path):
        try:
            body.open("rb").close()
        except OSError as error:
            raise StoreError(f"{body}, which was to be stored, cannot be read: {error.strerror}") from error
    return body


@contextmanager
def _translated(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _error(verb, path, error) from error


def _error(verb: str, path: Path, error: OSError) -> StoreError:
    if error.errno in _FULL:
        return StoreUnavailable(f"cannot {verb} {path}: {_FULL[error.errno]}; make room")
    if error.errno == errno.EROFS:
        return StoreUnavailable(f"cannot {verb} {path}: the file system is read-only; mount it for writing")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StoreDenied(f"cannot {verb} {path}: {error.strerror}; give this user access to the folder")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) and verb == "read":
        return ObjectMissing(f"{path} does not exist")
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return StoreError(
            f"cannot {verb} {path}: it, or a part of it, is an object and a folder at once; use another key"
        )
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
        return StoreError(f"cannot {verb} {path}: {error.strerror}")
    return StoreUnavailable(f"cannot {verb} {path}: {error.strerror or error}")
