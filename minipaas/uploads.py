"""Files that clients send before they deploy them, in parts: DATA/uploads.

Owns that directory: nothing in it outlives a restart or the time for it. Never looks into a file.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minipaas.errors import BadRequest, Conflict, NotFound, TooMuch, Unavailable

_ID = re.compile(r"up_[0-9a-f]{24}")


class Uploads:
    def __init__(self, directory: Path, *, max_bytes: int, keep_s: float) -> None:
        self._directory, self._max_bytes, self._keep_s = directory, max_bytes, keep_s

    def clean(self) -> None:
        """Remove all: whoever sent them has gone with the process before."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True, mode=0o700)

    def begin(self) -> str:
        """The id of a new upload, empty so far. Raises Unavailable when the disk has no room."""
        self._remove_old()
        upload = f"up_{secrets.token_hex(12)}"
        with _room(self._directory):
            os.close(os.open(self._directory / upload, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        return upload

    def write(self, upload: str, at: int, part: bytes) -> int:
        """Put ``part`` at byte ``at``, which is the end or before it, so that a part may be sent again; the size in bytes then.

        Raises NotFound; Conflict when a part before it is missing; TooMuch, and keeps nothing of the upload then; Unavailable
        when the disk has no room.
        """
        path = self.path(upload)
        if at + len(part) > self._max_bytes:
            path.unlink(missing_ok=True)
            raise TooMuch(
                f"the upload is larger than {self._max_bytes >> 20} MiB; leave out what the image does not need"
            )
        with _room(self._directory), path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if at > size:
                raise Conflict(f"upload {upload} has {size} bytes so far, so none can be put at {at}; send them first")
            file.seek(at)
            file.write(part)
            return max(size, file.tell())

    def path(self, upload: str) -> Path:
        """Raises NotFound."""
        if not _ID.fullmatch(upload):
            raise BadRequest(f"{upload!r} is not the id of an upload")
        path = self._directory / upload
        if not path.is_file():
            raise NotFound(f"upload {upload} is not there (any more); send it again")
        return path

    def remove(self, upload: str) -> None:
        """No error when it is gone, or was never one: what a client names is nothing else but an upload."""
        if _ID.fullmatch(upload):
            (self._directory / upload).unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A new empty directory, for unpacking."""
        directory = self._directory / f"tree_{secrets.token_hex(12)}"
        directory.mkdir(mode=0o700)
        return directory

    def _remove_old(self) -> None:
        oldest = time.time() - self._keep_s
        for path in self._directory.iterdir():
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


@contextmanager
def _room(directory: Path) -> Iterator[None]:
    """Raises Unavailable for what the disk refuses."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("the upload was removed while it was sent; send it again") from error
    except OSError as error:
        raise Unavailable(
            f"the upload could not be stored: {error.strerror}; make room on the disk of {directory}"
        ) from error
