"""The directories of this node's volumes: made, marked, checked, set aside and deleted.

Owns what is below DATA/volumes. Of what is in a volume it asks only whether there is anything; it opens no file there, and never decides
what is to be deleted.

Beside the directory of each volume is its mark, which tells it from an empty directory in its place: where a disk is mounted, that is what
is left when it is not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from minipaas.errors import Unavailable
from minipaas.model import Volume
from minipaas.settings import Settings, write_private
from replicator import fsync_dir

_ASIDE = ".aside"
"""No app has such a name."""
_OF_THE_DISK = frozenset({"lost+found"})


class Mark(msgspec.Struct, frozen=True):
    """What a volume's directory was when it was seen last. held: something was in it."""

    volume: str
    inode: int
    mounted: bool
    held: bool


@dataclass(frozen=True)
class Sight:
    """What is at the place of a volume. missing: why that is not the volume, '' when it is; seen: what it is then."""

    missing: str
    seen: Mark | None = None


def make(settings: Settings, volume: Volume) -> Path:
    """Its directory. Containers run as any user, so that it is open to all of them; the folder above keeps the host's users out."""
    directory = settings.volume_dir(volume.app, volume.name)
    settings.volumes_dir.mkdir(parents=True, exist_ok=True)
    settings.volumes_dir.chmod(0o700)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o777)
    return directory


def mark(settings: Settings, volume: Volume) -> None:
    """What is there now is the volume; durable when this returns."""
    _write_mark(settings, volume, _see(settings, volume))


def look(settings: Settings, volume: Volume) -> Sight:
    """Whether what is at the place of a volume that was made is the volume. Changes nothing.

    An unmarked directory that holds something is taken for the volume.
    """
    directory = settings.volume_dir(volume.app, volume.name)
    try:
        if not directory.is_dir():
            return Sight(f"its directory is gone: {directory}; mount its disk or put it back")
        seen = _see(settings, volume)
        why = _difference(settings, volume, seen)
    except OSError as error:
        return Sight(f"{directory} cannot be read: {error.strerror}; look after its disk")
    return Sight(why) if why else Sight("", seen)


def adopt(settings: Settings, volume: Volume, seen: Mark) -> None:
    """The mark becomes what a look judged to be the volume, and not what is there by now."""
    with suppress(OSError):  # a disk that is full keeps no app from its volume; the next look tries again
        _write_mark(settings, volume, seen)


def _difference(settings: Settings, volume: Volume, now: Mark) -> str:
    directory, known = settings.volume_dir(volume.app, volume.name), _read_mark(settings, volume)
    if known is None:
        explained = f"{directory} is empty and has no mark; mount its disk, or put a file there if it is right so"
        return "" if now.held else explained
    if known.mounted and not now.mounted:
        path = _mark_path(settings, volume)
        return f"its disk is not mounted at {directory}; mount it, or remove {path} if the data were moved here"
    if known.held and not now.held and known.inode != now.inode:
        return f"{directory} is another directory than it was, and empty; mount its disk, or put its files back"
    return ""


def set_aside(settings: Settings, volume: Volume) -> None:
    """Out of the way of a volume of the same name, to be deleted. Nothing to do when it is not there. Raises Unavailable."""
    directory, aside = settings.volume_dir(volume.app, volume.name), _aside(settings, volume.id)
    if not directory.exists():
        return
    if directory.is_symlink() or directory.is_mount():
        raise Unavailable(f"{directory} is another disk, which is not deleted; unmount it, and the volume is forgotten")
    if aside.exists():
        raise Unavailable(f"the volume is at {directory} and at {aside}; remove the one that is not wanted")
    aside.parent.mkdir(exist_ok=True, mode=0o700)
    _move(directory, aside)


def put_back(settings: Settings, volume: Volume) -> None:
    """Undo ``set_aside``, if it was done."""
    directory, aside = settings.volume_dir(volume.app, volume.name), _aside(settings, volume.id)
    if aside.exists() and not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        _move(aside, directory)


def discard(settings: Settings, volume: Volume) -> None:
    """Delete what was set aside, for a volume that is nobody's any more."""
    known = _read_mark(settings, volume)
    if known is not None:
        _mark_path(settings, volume).unlink()
    with suppress(OSError):  # it holds other volumes
        settings.volume_dir(volume.app, volume.name).parent.rmdir()
    if _aside(settings, volume.id).exists():
        shutil.rmtree(_aside(settings, volume.id))


def clean(settings: Settings, known: Container[str]) -> None:
    """Delete what was set aside of volumes that nobody knows any more; the process ended before it could. known: ids."""
    folder = settings.volumes_dir / _ASIDE
    for aside in folder.iterdir() if folder.is_dir() else ():
        if aside.name not in known:
            shutil.rmtree(aside)


def _aside(settings: Settings, volume_id: str) -> Path:
    return settings.volumes_dir / _ASIDE / volume_id


def _mark_path(settings: Settings, volume: Volume) -> Path:
    return settings.volumes_dir / volume.app / f".{volume.name}.volume"


def _see(settings: Settings, volume: Volume) -> Mark:
    """All of it of one open directory, since a disk can come or go between two looks at a path."""
    directory = settings.volume_dir(volume.app, volume.name)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        here, above = os.fstat(descriptor), directory.parent.stat()
        with os.scandir(descriptor) as entries:
            held = any(entry.name not in _OF_THE_DISK for entry in entries)
    finally:
        os.close(descriptor)
    known = _read_mark(settings, volume)
    was_held = known is not None and known.held and known.inode == here.st_ino
    return Mark(volume=volume.id, inode=here.st_ino, mounted=here.st_dev != above.st_dev, held=held or was_held)


def _write_mark(settings: Settings, volume: Volume, mark: Mark) -> None:
    if _read_mark(settings, volume) != mark:
        write_private(_mark_path(settings, volume), msgspec.json.encode(mark).decode() + "\n")


def _read_mark(settings: Settings, volume: Volume) -> Mark | None:
    """None when there is none, or that of another volume, or a damaged one."""
    try:
        found = msgspec.json.decode(_mark_path(settings, volume).read_bytes(), type=Mark)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    return found if found.volume == volume.id else None


def _move(source: Path, target: Path) -> None:
    source.rename(target)
    for folder in {source.parent, target.parent}:
        fsync_dir(folder)
