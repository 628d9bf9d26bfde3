"""A folder as a store survives crashes, full disks and other programs' files."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import durable
from replicator.errors import ObjectMissing, PreconditionFailed, StoreError, StoreUnavailable
from replicator.store.file import LOCK_NAME, FileStore

DAY_S = 86400


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_an_object_is_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    FileStore(tmp_path).put("a/b/c", b"x", if_none_match=True)
    assert files(tmp_path) == ["a/b/c"]
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o600


def test_a_failed_put_leaves_nothing_behind(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a/b", b"x", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put("a/b", b"y", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put("a/c", b"y", if_match="1-2-3")
    assert [name for name in files(tmp_path) if not name.endswith(LOCK_NAME)] == ["a/b"]


def test_the_same_content_put_again_is_another_state(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    etags = {store.put("key", b"same").etag for _ in range(50)}
    assert len(etags) == 50


def test_what_killed_writers_left_is_not_listed_and_goes_after_a_day(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a/b", b"x")
    left = durable.write_temporary(tmp_path / "a", b"half")
    assert [info.key for info in store.list()] == ["a/b"]
    assert left.exists()
    later = FileStore(tmp_path, now=lambda: time.time() + DAY_S + 60)
    assert [info.key for info in later.list()] == ["a/b"]
    assert not left.exists()


def test_files_that_no_key_can_name_are_not_listed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a", b"x")
    for name in ("with space", "a~", "ü"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert [info.key for info in store.list()] == ["a"]


def test_deleting_the_last_object_of_a_folder_removes_the_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "root")
    store.put("a/b/c", b"1")
    store.put("a/b/c", b"2")
    store.put("d", b"3")
    store.delete(["a/b/c"])
    assert not (tmp_path / "root/a").exists()
    store.delete(["d"])
    assert (tmp_path / "root").is_dir()


def test_an_object_cannot_be_a_folder_too(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a/b", b"x")
    for conditional in (False, True):
        with pytest.raises(StoreError, match="object and a folder at once") as caught:
            store.put("a", b"x", if_none_match=conditional)
        assert type(caught.value) is StoreError
        with pytest.raises(StoreError, match="object and a folder at once"):
            store.put("a/b/c", b"x", if_none_match=conditional)
    with pytest.raises(ObjectMissing):
        store.get("a/b/c")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.real
def test_a_full_disk_is_unavailable_and_heals(tiny_disk: Path) -> None:
    store = FileStore(tiny_disk)
    store.put("a", b"x" * 400_000)
    with pytest.raises(StoreUnavailable, match="disk is full; make room"):
        store.put("b", b"x" * 900_000)
    assert [info.key for info in store.list()] == ["a"]
    assert not [name for name in files(tiny_disk) if durable.TEMPORARY_PREFIX in name]
    store.delete(["a"])
    store.put("b", b"x" * 900_000)


@pytest.mark.real
def test_a_read_only_disk_is_unavailable(tiny_disk: Path) -> None:
    store = FileStore(tiny_disk)
    store.put("a", b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StoreUnavailable, match="read-only"):
        store.put("b", b"x")
    assert store.get("a") == b"x"


def test_a_durable_write_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "state"
    durable.write_file(target, b"one")
    durable.write_file(target, b"two", mode=0o640)
    assert target.read_bytes() == b"two"
    assert target.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError):
        durable.write_file(target, tmp_path / "missing")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["state"]  # noqa: PTH208


def test_a_durable_write_copies_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_001))
    durable.write_file(tmp_path / "copy", source)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    durable.make_dirs(tmp_path / "a/b/c")
    durable.make_dirs(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        durable.make_dirs(tmp_path / "file/x")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
