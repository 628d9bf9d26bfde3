"""The directory that an image is built from, as a tar stream.

Owns which files are sent (.dockerignore, .containerignore) and how. Links are sent as links, never followed; nothing outside
the directory is read, and no file is held in memory as a whole.
Source: docs.docker.com/build/concepts/context, section ".dockerignore files".
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minipaas.errors import BuildFailed

CHUNK = 1 << 20
_END = b"\0" * 1024


@dataclass(frozen=True)
class IgnoreRule:
    pattern: re.Pattern[str]
    negated: bool


def parse_ignore(text: str) -> tuple[IgnoreRule, ...]:
    """The rules of an ignore file, in order; the last that matches a path or a folder above it decides."""
    rules = []
    for raw in text.lstrip("\ufeff").splitlines():
        line = raw.strip()
        if not line or raw.startswith("#"):
            continue
        negated = line.startswith("!")
        cleaned = os.path.normpath(line.removeprefix("!").strip()).lstrip("/")
        if cleaned in ("", ".."):
            continue
        rules.append(IgnoreRule(re.compile(_regex(cleaned)), negated))
    return tuple(rules)


def _regex(pattern: str) -> str:
    """Go's filepath.Match, with ``**`` for any number of folders; a match of a folder takes what is below it."""
    out, at = "", 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**/", at):
            out, at = out + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif char == "[" and (end := pattern.find("]", at + 2)) > 0:
            out, at = out + pattern[at : end + 1].replace("[!", "[^"), end + 1
        elif char == "\\" and at + 1 < len(pattern):
            out, at = out + re.escape(pattern[at + 1]), at + 2
        else:
            out, at = out + {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)), at + 1
    return f"(?:{out})(?:/.*)?" if pattern != "." else ".*"


def is_ignored(path: str, rules: Sequence[IgnoreRule]) -> bool:
    """path: from the context's root, with ``/``."""
    ignored = False
    for rule in rules:
        if rule.negated is ignored and rule.pattern.fullmatch(path):
            ignored = not rule.negated
    return ignored


def check_containerfile(root: Path, containerfile: str) -> None:
    """Raises BuildFailed when it is not a file inside the context."""
    path = root / containerfile
    if not path.resolve().is_relative_to(root.resolve()):
        raise BuildFailed(f"{containerfile} is outside {root}; move it into the directory that is built")
    if not path.is_file():
        raise BuildFailed(f"{path} does not exist; add a Containerfile or name one in [build] of minipaas.toml")


def context_stream(root: Path, containerfile: str) -> Iterator[bytes]:
    """The context as a tar, owned by root, without what its ignore file names. Raises BuildFailed."""
    rules, ignore_file = _rules(root, containerfile)
    always = {os.path.normpath(containerfile), ignore_file}
    try:
        for relative in _walk(root, "", rules, always):
            yield from _entry(root / relative, relative)
    except (OSError, tarfile.TarError, UnicodeError) as error:
        raise BuildFailed(f"{root} cannot be read for the build: {error}") from error
    yield _END


def _rules(root: Path, containerfile: str) -> tuple[tuple[IgnoreRule, ...], str]:
    for name in (
        f"{containerfile}.dockerignore",
        f"{containerfile}.containerignore",
        ".containerignore",
        ".dockerignore",
    ):
        path = root / name
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            return parse_ignore(path.read_text(errors="replace")), os.path.normpath(name)
    return (), ""


def _walk(root: Path, folder: str, rules: Sequence[IgnoreRule], always: set[str]) -> Iterator[str]:
    """Paths to send, in name order, so that the same directory gives the same stream."""
    below = any(rule.negated for rule in rules)
    for name in sorted(each.name for each in (root / folder).iterdir()):
        relative = f"{folder}/{name}" if folder else name
        ignored = is_ignored(relative, rules) and relative not in always
        is_folder = stat.S_ISDIR((root / relative).lstat().st_mode)
        if not ignored:
            yield relative
        if is_folder and (not ignored or below or any(each.startswith(f"{relative}/") for each in always)):
            yield from _walk(root, relative, rules, always)


def _entry(path: Path, relative: str) -> Iterator[bytes]:
    """Header and content. Sockets, pipes and devices are left out, as they mean nothing in an image."""
    info = tarfile.TarInfo(relative)
    found = path.lstat()
    info.mode, info.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    if stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
        yield info.tobuf(tarfile.PAX_FORMAT)
    elif stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
        yield info.tobuf(tarfile.PAX_FORMAT)
    elif stat.S_ISREG(found.st_mode):
        yield from _file(path, info)


def _file(path: Path, info: tarfile.TarInfo) -> Iterator[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        left = info.size = os.fstat(descriptor).st_size
        yield info.tobuf(tarfile.PAX_FORMAT)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise BuildFailed(f"{path} became shorter while it was read; build again")
            left -= len(chunk)
            yield chunk
    yield bytes(-info.size % 512)
