"""What travels when a directory is deployed, and what a server refuses to unpack."""

from __future__ import annotations

import gzip
import io
import os
import socket
import stat
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaas.errors import BadRequest, PlatformError
from minipaas.tarball import Ignore, pack, unpack

LIMITS = {"max_bytes": 10_000_000, "max_files": 1000}


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    for name in ("Dockerfile", "app.py", "docs/a.md", "docs/deep/b.md", "docs/README.md", ".git/config", "node/x/y.js"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def travel(source, into, **kwargs):
    unpack(io.BytesIO(b"".join(pack(source, **kwargs))), into, **LIMITS)
    return sorted(str(path.relative_to(into)) for path in into.rglob("*") if not path.is_dir() or path.is_symlink())


def test_everything_but_git_travels(source, tmp_path):
    assert travel(source, tmp_path / "t") == [
        "Dockerfile", "app.py", "docs/README.md", "docs/a.md", "docs/deep/b.md", "node/x/y.js",
    ]  # fmt: skip


def test_modes_and_links_travel_owners_and_sockets_do_not(source, tmp_path):
    (source / "app.py").chmod(0o750)
    (source / "link").symlink_to("docs/a.md")
    (source / "empty").mkdir(mode=0o700)
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(source / "sock"))
    names = travel(source, tmp_path / "t")
    assert "link" in names and "pipe" not in names and "sock" not in names
    assert stat.S_IMODE((tmp_path / "t/app.py").stat().st_mode) == 0o750
    assert (tmp_path / "t/link").readlink().name == "a.md"
    assert (tmp_path / "t/empty").is_dir()
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(source)))) as tar:
        assert {(m.uid, m.gid, m.uname) for m in tar} == {(0, 0, "")}


def test_the_ignore_file_is_heeded_and_the_dockerfile_is_kept(source, tmp_path):
    (source / ".dockerignore").write_text("*\n!docs\ndocs/*.md\n!docs/README.md\n")
    assert travel(source, tmp_path / "t", keep=["Dockerfile"]) == ["Dockerfile", "docs/README.md", "docs/deep/b.md"]


def test_another_ignore_file_takes_its_place(source, tmp_path):
    (source / ".dockerignore").write_text("*")
    (tmp_path / "other").write_text("docs\nnode\n.dockerignore")
    assert travel(source, tmp_path / "t", ignorefile=tmp_path / "other") == ["Dockerfile", "app.py"]


@pytest.mark.parametrize(
    ("rules", "ignored", "kept"),
    [
        ("foo", ["foo", "foo/bar"], ["a/foo", "food"]),
        ("/foo/", ["foo", "foo/x"], ["a/foo"]),
        ("*/temp*", ["a/temp", "a/temporary.txt"], ["temp", "a/b/temp"]),
        ("**/temp", ["temp", "a/temp", "a/b/temp/c"], ["a/temps"]),
        ("temp?", ["tempa"], ["temp", "tempab", "temp/"]),
        ("**/*.go", ["x.go", "a/b/x.go"], ["x.gone"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b"]),
        ("a/**/z", ["a/z", "a/b/c/z"], ["z"]),
        ("[ab].txt", ["a.txt"], ["c.txt"]),
        ("[^ab].txt", ["c.txt"], ["a.txt"]),
        (r"a\*b", ["a*b"], ["axb"]),
        ("a.c", ["a.c"], ["abc"]),
        ("# foo\n\n  bar  ", ["bar"], ["# foo", "foo"]),
        ("*.md\n!README*.md\nREADME-secret.md", ["x.md", "README-secret.md"], ["README.md"]),
        ("*.md\nREADME-secret.md\n!README*.md", ["x.md"], ["README-secret.md"]),
        ("./a/../b", ["b"], ["a"]),
    ],
)
def test_patterns_mean_what_docker_says(rules, ignored, kept):
    ignore = Ignore.parse(rules)
    assert [path for path in ignored + kept if ignore.ignores(path)] == ignored


def test_a_pattern_without_meaning_is_named_with_its_line():
    with pytest.raises(BadRequest, match=r"\.dockerignore:2: '\[z-a\]' is not a pattern"):
        Ignore.parse("a\n[z-a]")


@given(st.text(alphabet="ab*?[]!\\/.^-#", max_size=12))
def test_any_pattern_has_a_meaning_or_is_refused(pattern):
    try:
        Ignore.parse(pattern).ignores("a/b")
    except BadRequest:
        pass


def test_a_link_out_of_the_directory_is_refused_before_it_is_sent(source):
    (source / "out").symlink_to("/usr/bin/python3")
    with pytest.raises(BadRequest, match="out is a link to /usr/bin/python3.*ignore it"):
        list(pack(source))


def test_a_large_file_is_packed_in_pieces(source):
    (source / "big").write_bytes(os.urandom(3_000_000))
    assert max(map(len, pack(source))) < 1_000_000


# -- evil archives -----------------------------------------------------------------------------------------------------


def entry(name, content=b"", type=tarfile.REGTYPE, linkname=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), type, linkname
    return info, content


def archive(*entries):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def refuse(raw, tmp_path, message, **limits):
    with pytest.raises(BadRequest, match=message):
        unpack(io.BytesIO(raw), tmp_path / "into", **(LIMITS | limits))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("/etc/passwd", b"x")], "leaves it"),
        ([entry("a/../../x", b"x")], "leaves it"),
        ([entry("..", type=tarfile.DIRTYPE)], "leaves it"),
        ([entry("l", type=tarfile.SYMTYPE, linkname="/etc")], "link out of it"),
        ([entry("d/l", type=tarfile.SYMTYPE, linkname="../../etc")], "link out of it"),
        (
            [entry("x", type=tarfile.SYMTYPE, linkname="."), entry("y", type=tarfile.SYMTYPE, linkname="x/../etc")],
            "through other links",
        ),
        ([entry("h", type=tarfile.LNKTYPE, linkname="/etc/passwd")], "neither a file"),
        ([entry("dev", type=tarfile.CHRTYPE)], "neither a file"),
        ([entry("p", type=tarfile.FIFOTYPE)], "neither a file"),
        ([entry("a", b"1"), entry("./a", b"2")], "twice"),
        ([entry("n" * 300, b"1")], "name that this file system does not take"),
        ([entry("a", b"x" * 2000)], "more than 0 MiB"),
        ([entry(str(n)) for n in range(30)], "more than 20 files"),
    ],
)
def test_an_unsafe_archive_is_refused_and_leaves_nothing(entries, message, tmp_path):
    refuse(archive(*entries), tmp_path, message, max_bytes=1000, max_files=20)


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "victim").mkdir()
    raw = archive(entry("d", type=tarfile.SYMTYPE, linkname="e"), entry("d/file", b"x"))
    with pytest.raises(PlatformError):
        unpack(io.BytesIO(raw), tmp_path / "into", **LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_bomb_is_stopped(tmp_path):
    refuse(gzip.compress(archive(entry("zeros", bytes(50_000_000)))), tmp_path, "more than 9 MiB")


WHOLE = archive(entry("a", b"x" * 700), entry("b", b"y" * 100))[: 512 * 7]


@pytest.mark.parametrize("raw", [WHOLE, gzip.compress(WHOLE)], ids=["plain", "gzip"])
def test_an_archive_cut_anywhere_is_refused(raw, tmp_path):
    last = len(raw) - (1 if raw is not WHOLE else 513)  # one block of zeros is mark enough
    for end in range(0, last + 1, 7 if raw is WHOLE else 1):
        refuse(raw[:end], tmp_path, "damaged")


@settings(max_examples=200)
@given(st.integers(0, len(WHOLE) * 8 - 1))
def test_a_damaged_archive_is_refused_or_holds_every_file(tmp_path_factory, bit):
    raw = bytearray(WHOLE)
    raw[bit // 8] ^= 1 << bit % 8
    into = tmp_path_factory.mktemp("t") / "into"
    try:
        unpack(io.BytesIO(bytes(raw)), into, **LIMITS)
    except PlatformError:
        assert not into.exists()
    else:
        assert len(list(into.iterdir())) == 2


def test_garbage_is_refused(tmp_path):
    refuse(os.urandom(5000), tmp_path, "damaged")
    refuse(b"", tmp_path, "damaged")


def test_a_directory_that_is_not_empty_is_not_overwritten(tmp_path, source):
    (tmp_path / "into").mkdir()
    (tmp_path / "into/mine").write_text("")
    with pytest.raises(PlatformError, match="unpacked"):
        unpack(io.BytesIO(b"".join(pack(source))), tmp_path / "into", **LIMITS)
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["mine"]
