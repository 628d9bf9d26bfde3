"""Files that clients send before they deploy them: DATA/uploads.

Owns that directory: nothing in it outlives a restart or the time for it. Never looks into a file.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import IO

from minipaas.errors import BadRequest, NotFound, TooMuch, Unavailable

_ID = re.compile(r"up_[0-9a-f]{24}")
_CHUNK = 1 << 20


class Uploads:
    def __init__(self, directory: Path, *, max_bytes: int, keep_s: float) -> None:
        self._directory, self._max_bytes, self._keep_s = directory, max_bytes, keep_s

    def clean(self) -> None:
        """Remove all: whoever sent them has gone with the process before."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True, mode=0o700)

    def store(self, stream: IO[bytes]) -> str:
        """The id of what was sent. Raises TooMuch beyond the limit, Unavailable when the disk has no room; keeps nothing then."""
        self._remove_old()
        upload = f"up_{secrets.token_hex(12)}"
        path = self._directory / upload
        try:
            self._write(stream, path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise Unavailable(
                f"the upload could not be stored: {error.strerror}; make room on the disk of {path.parent}"
            ) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return upload

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

    def _write(self, stream: IO[bytes], path: Path) -> None:
        size = 0
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > self._max_bytes:
                    raise TooMuch(
                        f"the upload is larger than {self._max_bytes >> 20} MiB; leave out what the image does not need"
                    )
                file.write(chunk)

    def _remove_old(self) -> None:
        oldest = time.time() - self._keep_s
        for path in self._directory.iterdir():
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
