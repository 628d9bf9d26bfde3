"""Claims about folders that are deleted and made anew while they are watched."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledger_support import wait_for
from watchdog.observers.api import BaseObserver

from replicator.watch import Folder, Watch


def make_anew(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}-away"))
    folder.mkdir()


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.real
@pytest.mark.parametrize("below", [False, True])
def test_a_disk_that_is_mounted_again_is_watched_again(tmp_path: Path, below: bool) -> None:
    """It has the same folders by number, and an end of the watch that only one event tells."""
    image, folder = tmp_path / "disk", tmp_path / "folder"
    place = folder / "disk" if below else folder
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    touched: set[Path] = set()
    lost: list[bool] = []
    watch = Watch(lambda path, gone: touched.add(path), lambda folder, path: None, lambda: lost.append(True))
    watch.start()
    try:
        with mounted(image, place):
            inode = place.stat().st_ino
            watch.add_folder(Folder(folder))
        with mounted(image, place):
            assert place.stat().st_ino == inode
            wait_for(lambda: lost)
            watch.renew()
            (place / "app.db").touch()
            wait_for(lambda: place / "app.db" in touched)
    finally:
        watch.stop()


def test_a_folder_that_cannot_be_watched_again_keeps_no_other_from_it_and_is_tried_at_every_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    touched: set[Path] = set()
    refused: set[str] = set()
    schedule = BaseObserver.schedule

    def limited(observer: BaseObserver, handler: Any, path: str, **more: Any) -> Any:
        """As the kernel is when somebody else has used up its watches."""
        if path in refused:
            raise OSError(28, "inotify watch limit reached")
        return schedule(observer, handler, path, **more)

    monkeypatch.setattr(BaseObserver, "schedule", limited)
    watch = Watch(lambda path, gone: touched.add(path), lambda folder, path: None)
    watch.start()
    try:
        for folder in (one, other):
            folder.mkdir()
            watch.add_folder(Folder(folder))
            make_anew(folder)
        refused.add(str(one))
        watch.renew()
        watch.renew()
        failures = [record.message for record in caplog.records if "cannot be watched" in record.message]
        assert len(failures) == 2 and f"{one} cannot be watched: the limit of watches is reached" in failures[0]
        (other / "app.db").touch()
        wait_for(lambda: other / "app.db" in touched)
        refused.clear()
        one.rmdir()
        one.with_name("one-away").rename(one)  # the folder that was watched at first
        watch.renew()
        (one / "app.db").touch()
        wait_for(lambda: one / "app.db" in touched)
    finally:
        watch.stop()
