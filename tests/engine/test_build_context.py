"""The stream that a build gets: what is in it, what is not."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from minipaas.engine.context import check_containerfile, context_stream, is_ignored, parse_ignore
from minipaas.errors import BuildFailed


def members(root: Path, containerfile: str = "Containerfile") -> dict[str, tarfile.TarInfo]:
    data = b"".join(context_stream(root, containerfile))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {each.name: each for each in tar}


def tree(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


@pytest.mark.parametrize(
    ("patterns", "path", "ignored"),
    [
        ("*.pyc", "a.pyc", True),
        ("*.pyc", "lib/a.pyc", False),
        ("**/*.pyc", "lib/deep/a.pyc", True),
        ("**/*.pyc", "a.pyc", True),
        ("node_modules", "node_modules/x/y.js", True),
        ("/build/", "build/out", True),
        ("docs/**", "docs/a/b", True),
        ("docs\n!docs/keep.md", "docs/keep.md", False),
        ("docs\n!docs/keep.md", "docs/other.md", True),
        ("!a\na", "a", True),
        ("# a\n\n", "a", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[ab].txt", "b.txt", True),
        ("*", "anything/below", True),
    ],
)
def test_ignore_patterns_mean_what_they_mean_to_docker(patterns: str, path: str, ignored: bool) -> None:
    assert is_ignored(path, parse_ignore(patterns)) is ignored


def test_ignored_files_are_left_out_but_the_containerfile_never(tmp_path: Path) -> None:
    tree(tmp_path, "Containerfile", "app.py", "data/big.bin", ".git/HEAD", "data/keep.txt")
    (tmp_path / ".dockerignore").write_text("*\n!app.py\n!data/keep.txt\n")
    assert set(members(tmp_path)) == {"Containerfile", ".dockerignore", "app.py", "data/keep.txt"}


def test_containerignore_comes_before_dockerignore(tmp_path: Path) -> None:
    tree(tmp_path, "Containerfile", "a", "b")
    (tmp_path / ".dockerignore").write_text("a")
    (tmp_path / ".containerignore").write_text("b")
    assert "a" in members(tmp_path) and "b" not in members(tmp_path)


def test_links_are_sent_as_links_and_special_files_not_at_all(tmp_path: Path) -> None:
    tree(tmp_path, "Containerfile", "lib/real.so")
    (tmp_path / "link").symlink_to("lib/real.so")
    (tmp_path / "outside").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    found = members(tmp_path)
    assert found["link"].issym() and found["link"].linkname == "lib/real.so"
    assert found["outside"].issym() and not any(name.startswith("outside/") for name in found)
    assert "pipe" not in found


def test_modes_are_kept_and_everything_belongs_to_root(tmp_path: Path) -> None:
    tree(tmp_path, "Containerfile", "run.sh")
    (tmp_path / "run.sh").chmod(0o755)
    run = members(tmp_path)["run.sh"]
    assert (run.mode, run.uid, run.gid, run.size) == (0o755, 0, 0, 6)


def test_the_same_directory_gives_the_same_stream(tmp_path: Path) -> None:
    tree(tmp_path, "Containerfile", "b/c", "a")
    assert list(context_stream(tmp_path, "Containerfile")) == list(context_stream(tmp_path, "Containerfile"))


def test_a_containerfile_outside_the_directory_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "app"
    tree(tmp_path, "Containerfile", "app/x")
    (root / "linked").symlink_to(tmp_path / "Containerfile")
    for name in ("../Containerfile", "linked"):
        with pytest.raises(BuildFailed, match="outside"):
            check_containerfile(root, name)
    with pytest.raises(BuildFailed, match="does not exist"):
        check_containerfile(root, "Containerfile")
