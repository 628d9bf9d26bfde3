"""The directories of this node's volumes: made, marked, checked, set aside and deleted.

Owns what is below DATA/volumes. Never looks into the files of a volume, and never decides what is to be deleted.

Beside the directory of each volume is its mark, which tells it from an empty directory in its place: where a disk is mounted, that is what
is left when it is not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container
from contextlib import suppress
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
    now = _look(settings, volume)
    if _read_mark(settings, volume) != now:
        write_private(_mark_path(settings, volume), msgspec.json.encode(now).decode() + "\n")


def missing(settings: Settings, volume: Volume) -> str:
    """Why what is at the place of a volume that was made is not the volume; '' when it is, and then the mark is brought up to date.

    An unmarked directory that holds something is taken for the volume.
    """
    try:
        why = _missing(settings, volume)
    except OSError as error:
        return f"{settings.volume_dir(volume.app, volume.name)} cannot be read: {error.strerror}; look after its disk"
    if not why:
        with suppress(OSError):  # a disk that is full keeps no app from its volume; the next look tries again
            mark(settings, volume)
    return why


def _missing(settings: Settings, volume: Volume) -> str:
    directory = settings.volume_dir(volume.app, volume.name)
    if not directory.is_dir():
        return f"its directory is gone: {directory}; mount its disk or put it back"
    known, now = _read_mark(settings, volume), _look(settings, volume)
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


def _look(settings: Settings, volume: Volume) -> Mark:
    directory = settings.volume_dir(volume.app, volume.name)
    with os.scandir(directory) as entries:
        held = any(entry.name not in _OF_THE_DISK for entry in entries)
    known = _read_mark(settings, volume)
    inode = directory.stat().st_ino
    was_held = known is not None and known.held and known.inode == inode
    return Mark(volume=volume.id, inode=inode, mounted=directory.is_mount(), held=held or was_held)


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
