"""Source directories as tarballs: the client packs, the server unpacks.

Owns what is left out and what is refused. Never follows a link, never writes outside the directory it was given.
"""

from __future__ import annotations

import errno
import gzip
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from minipaas.errors import BadRequest, PlatformError, Unavailable

DEFAULT_IGNORED = (".git",)
CHUNK_BYTES = 256 * 1024
GZIP_LEVEL = 6
_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 512


# -- what to leave out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ignore:
    """Docker's .dockerignore rules, not git's: patterns start at the root, and the last one that matches decides.

    A pattern matches a path, or a directory above it. ``*`` and ``?`` stop at slashes, ``**`` does not, ``!`` takes back.
    Source: docs.docker.com/build/concepts/context, section ".dockerignore files".
    """

    rules: tuple[tuple[re.Pattern[str], bool], ...]

    @classmethod
    def parse(cls, text: str, name: str = ".dockerignore") -> Ignore:
        """Raises BadRequest with name and line of a pattern that has no meaning."""
        rules = []
        for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
            pattern = line.strip()
            if line.startswith("#") or not pattern:
                continue
            taken_back = pattern.startswith("!")
            cleaned = posixpath.normpath(pattern.removeprefix("!").strip().lstrip("/") or ".")
            if cleaned == "." and taken_back:
                raise BadRequest(f"{name}:{number}: {pattern!r} names nothing; write a path after the exclamation mark")
            try:
                rules.append((re.compile(_regex(cleaned), re.DOTALL), not taken_back))
            except re.error as error:
                raise BadRequest(f"{name}:{number}: {pattern!r} is not a pattern: {error}") from error
        return cls(tuple(rules))

    @property
    def takes_back(self) -> bool:
        return not all(ignored for _, ignored in self.rules)

    def ignores(self, path: str) -> bool:
        """path: relative to the root, with slashes."""
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        verdict = False
        for pattern, ignored in self.rules:
            if ignored != verdict and any(pattern.fullmatch(one) for one in above):
                verdict = ignored
        return verdict


def _regex(pattern: str) -> str:
    out, at = "", 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**/", at):
            piece, at = "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            piece, at = ".*", at + 2
        elif char == "\\" and at + 1 < len(pattern):
            piece, at = re.escape(pattern[at + 1]), at + 2
        elif char == "[":
            end = pattern.find("]", at + 2)
            piece, at = _char_class(pattern[at + 1 : end] if end > 0 else ""), end + 1
        else:
            piece, at = {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)), at + 1
        out += piece
    return out


def _char_class(content: str) -> str:
    negated = content.startswith("^")
    chars = "".join(char if char == "-" else re.escape(char) for char in content[negated:].replace("\\", ""))
    if not chars:
        raise re.error("a bracket is not closed, or holds nothing")
    return f"[{'^' if negated else ''}{chars}]"


# -- packing -----------------------------------------------------------------------------------------------------------


def pack(directory: Path, ignorefile: Path | None = None, *, keep: Sequence[str] = ()) -> Iterator[bytes]:
    """The directory as a gzipped tar stream, without what ``ignorefile`` (default: its .dockerignore) names, nor .git.

    keep: paths that travel even if they are ignored, such as the Dockerfile. Modes and links are kept, owners are not; sockets,
    pipes and devices are left out. Raises BadRequest for a link out of the directory, or a file that cannot be read.
    """
    ignore = _ignore_of(directory, ignorefile)
    gz = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for piece in _tar(directory, ignore, frozenset(keep)):
        if squeezed := gz.compress(piece):
            yield squeezed
    yield gz.flush()


def _ignore_of(directory: Path, ignorefile: Path | None) -> Ignore:
    path = ignorefile or directory / ".dockerignore"
    if ignorefile is None and not path.is_file():
        return Ignore(())
    try:
        return Ignore.parse(path.read_text(), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"the ignore file {path} cannot be read: {error}") from error


def _tar(directory: Path, ignore: Ignore, keep: frozenset[str]) -> Iterator[bytes]:
    try:
        for path in _walk(directory, "", ignore, keep):
            yield from _entry(directory, path)
    except OSError as error:
        raise BadRequest(f"{error.filename} cannot be packed: {error.strerror}") from error
    yield bytes(2 * _BLOCK)


def _walk(root: Path, below: str, ignore: Ignore, keep: frozenset[str]) -> Iterator[str]:
    """Paths to pack, parents first, in an order that does not depend on the file system."""
    for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
        path = f"{below}/{entry.name}" if below else entry.name
        wanted_below = any(one.startswith(f"{path}/") for one in keep)
        ignored = path in DEFAULT_IGNORED or (ignore.ignores(path) and path not in keep)
        is_directory = entry.is_dir(follow_symlinks=False)
        if not ignored or (is_directory and wanted_below):
            yield path
        if is_directory and path not in DEFAULT_IGNORED and (not ignored or ignore.takes_back or wanted_below):
            yield from _walk(root, path, ignore, keep)


def _entry(root: Path, path: str) -> Iterator[bytes]:
    full = root / path
    found = full.lstat()
    info = tarfile.TarInfo(path)
    info.mode, info.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    if stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
        yield _header(info)
    elif stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, str(full.readlink())
        if _leaves(path, info.linkname):
            raise BadRequest(
                f"{path} is a link to {info.linkname}, outside the directory that is deployed; ignore it in .dockerignore, "
                "or replace it by a copy"
            )
        yield _header(info)
    elif stat.S_ISREG(found.st_mode):
        yield from _file(full, info)


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _file(full: Path, info: tarfile.TarInfo) -> Iterator[bytes]:
    with full.open("rb") as file:
        left = info.size = os.fstat(file.fileno()).st_size
        yield _header(info)
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise BadRequest(
                    f"{info.name} became shorter while it was packed; deploy again when nothing writes to it"
                )
            left -= len(chunk)
            yield chunk
    yield bytes(-info.size % _BLOCK)


def _leaves(path: str, target: str) -> bool:
    """Whether a link points out of the root, by its text."""
    if target.startswith("/"):
        return True
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target)).split("/")[0] == ".."


# -- unpacking ---------------------------------------------------------------------------------------------------------


def unpack(stream: BinaryIO, into: Path, *, max_bytes: int, max_files: int) -> None:
    """Make the directory ``into`` (which must not exist, or be empty) from a tar stream, gzipped or not.

    max_bytes: of all files together. max_files: entries of any kind. Raises BadRequest for whatever is unsafe, too large or cut
    short, Unavailable when the disk does not take it; nothing is left behind then.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
    try:
        _Unpacking(work, max_bytes, max_files).run(stream)
        work.chmod(0o755)
        work.replace(into)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        raise _translated(error) from error


def _translated(error: BaseException) -> BaseException:
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, tarfile.TarError | EOFError | zlib.error | gzip.BadGzipFile):
        return BadRequest(f"the tarball is damaged or was cut short: {error or 'unexpected end'}; send it again")
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
        return BadRequest(f"the tarball has a name that this file system does not take: {str(error.filename)[:200]!r}")
    if isinstance(error, OSError):
        return Unavailable(f"the tarball cannot be unpacked: {error.strerror or error}")
    return error


class _Unpacking:
    """One archive on its way into an empty directory that nobody else knows."""

    def __init__(self, root: Path, max_bytes: int, max_files: int) -> None:
        self._root, self._max_bytes, self._max_files = root, max_bytes, max_files
        self._seen: set[str] = set()
        self._links: dict[str, str] = {}
        self._bytes = 0

    def run(self, stream: BinaryIO) -> None:
        source = _plain(stream, self._max_bytes + self._max_files * 4 * _BLOCK + 1024 * 1024, self._too_large)
        with tarfile.open(fileobj=cast(BinaryIO, source), mode="r|", errorlevel=2) as tar:
            for member in tar:
                self._take(tar, member)
            # tarfile ends in silence at a header that is cut short or damaged: only the end mark tells that all is there.
            if source.seen(tar.offset, _BLOCK) != bytes(_BLOCK):
                raise EOFError("the end mark is missing")
        # To the end, so that gzip compares its checksum.
        while source.read(CHUNK_BYTES):
            pass
        self._make_links()

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = _safe_path(member.name)
        if path == "." and member.isdir():
            return
        if path in self._seen:
            raise BadRequest(f"the tarball has {path!r} twice")
        self._seen.add(path)
        if len(self._seen) > self._max_files:
            raise BadRequest(f"the tarball has more than {self._max_files} files; ignore what the build does not need")
        if member.isdir():
            self._directory(path, member.mode)
        elif member.issym():
            self._link(path, member.linkname)
        elif member.isreg() and not member.issparse():
            self._file(tar, path, member)
        else:
            raise BadRequest(f"{path!r} in the tarball is neither a file, a directory nor a symbolic link")

    def _directory(self, path: str, mode: int) -> None:
        full = self._root / path
        full.mkdir(parents=True, exist_ok=True)
        full.chmod(mode & 0o777 | 0o700)

    def _link(self, path: str, target: str) -> None:
        """Noted only: links are made when nothing more is written, so that nothing is written through one."""
        if not target or "\0" in target or _leaves(path, target):
            raise BadRequest(f"{path!r} in the tarball is a link out of it, to {target!r}")
        self._links[path] = target

    def _file(self, tar: tarfile.TarFile, path: str, member: tarfile.TarInfo) -> None:
        self._bytes += member.size
        if self._bytes > self._max_bytes:
            self._too_large()
        full, content = self._root / path, tar.extractfile(member)
        assert content is not None
        full.parent.mkdir(parents=True, exist_ok=True)
        with content, full.open("xb") as file:
            shutil.copyfileobj(content, file, CHUNK_BYTES)
        if full.stat().st_size != member.size:
            raise EOFError(f"{path} is incomplete")
        full.chmod(mode=member.mode & 0o777 | 0o400)

    def _make_links(self) -> None:
        for path, target in self._links.items():
            full = self._root / path
            full.parent.mkdir(parents=True, exist_ok=True)
            full.symlink_to(target)
        # Links that pass through other links may lead elsewhere than their text says.
        root = os.path.realpath(self._root)
        for path in self._links:
            if os.path.commonpath([root, os.path.realpath(self._root / path)]) != root:
                raise BadRequest(f"{path!r} in the tarball is a link out of it, through other links")

    def _too_large(self) -> None:
        raise BadRequest(
            f"the tarball holds more than {self._max_bytes // (1024 * 1024)} MiB; ignore what the build does not need"
        )


def _safe_path(name: str) -> str:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or not name:
        raise BadRequest(f"the tarball has the path {name[:200]!r}, which leaves it")
    return posixpath.normpath(name)


def _plain(stream: BinaryIO, limit: int, too_large: Callable[[], None]) -> _Limited:
    """The stream unzipped, if it is gzipped, and no longer than ``limit``."""
    start = stream.read(2)
    plain = cast(BinaryIO, _Prefixed(start, stream))
    if start == _GZIP_MAGIC:
        plain = cast(BinaryIO, gzip.GzipFile(mode="rb", fileobj=plain))
    return _Limited(plain, limit, too_large)


class _Prefixed:
    """A stream with the bytes that were read ahead put back."""

    def __init__(self, prefix: bytes, stream: BinaryIO) -> None:
        self._prefix, self._stream = prefix, stream

    def read(self, size: int = -1) -> bytes:
        if not self._prefix:
            return self._stream.read(size)
        first, self._prefix = (self._prefix, b"") if size < 0 else (self._prefix[:size], self._prefix[size:])
        return first


class _Limited:
    """Ends a stream that is too long: headers count as well. Remembers what it gave last."""

    def __init__(self, stream: BinaryIO, limit: int, too_large: Callable[[], None]) -> None:
        self._stream, self._limit, self._too_large = stream, limit, too_large
        self._given, self._last = 0, b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._given += len(data)
        if self._given > self._limit:
            self._too_large()
        self._last = (self._last + data)[-4 * tarfile.RECORDSIZE :]
        return data

    def seen(self, offset: int, size: int) -> bytes:
        """Bytes given a short while ago."""
        start = offset - (self._given - len(self._last))
        return self._last[start : start + size] if start >= 0 else b""
