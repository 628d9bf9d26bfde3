"""Image tarballs: what is accepted, what is refused and why."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest
import zstandard
from image_tars import config_of, digest, docker_archive, link, nix_archive, oci_archive, sha256, tar_of

from minipaas.engine.archive import machine_architecture, normalised, open_image
from minipaas.errors import ImageRefused

LAYERS = [tar_of({"etc/one": b"1" * 3000}), tar_of({"etc/two": b"2" * 70_000})]
TAG = "localhost/test/app:1"


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "image.tar"
    path.write_bytes(data)
    return path


def normal(tmp_path: Path, data: bytes, architecture: str | None = None) -> tuple[str, list[bytes], list[str]]:
    """Image id, layers and tags of what an engine would be given."""
    source = write(tmp_path, data)
    with (
        normalised(source, tag=TAG, scratch=tmp_path, architecture=architecture) as (path, image_id),
        tarfile.open(path) as tar,
    ):
        manifest = json.loads(tar.extractfile("manifest.json").read())[0]  # type: ignore[union-attr]
        layers = [tar.extractfile(name).read() for name in manifest["Layers"]]  # type: ignore[union-attr]
        assert sha256(tar.extractfile(manifest["Config"]).read()) == image_id.removeprefix("sha256:")  # type: ignore[union-attr]
    assert [each.name for each in tmp_path.iterdir()] == ["image.tar"]
    return image_id, layers, manifest["RepoTags"]


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize(
    "data",
    [
        docker_archive(LAYERS),
        gzip.decompress(nix_archive(LAYERS)),
        oci_archive(LAYERS, "gzip"),
        oci_archive(LAYERS, "zstd"),
        oci_archive(LAYERS, ""),
    ],
    ids=["docker", "nix", "oci-gzip", "oci-zstd", "oci-plain"],
)
def test_every_layout_and_compression_gives_the_same_image(tmp_path: Path, data: bytes, pack) -> None:  # type: ignore[no-untyped-def]
    assert normal(tmp_path, pack(data)) == (digest(config_of(LAYERS)), LAYERS, [TAG])


def test_an_archive_that_is_normal_already_is_not_copied(tmp_path: Path) -> None:
    path = write(tmp_path, docker_archive(LAYERS, TAG))
    with normalised(path, tag=TAG, scratch=tmp_path) as (given, _):
        assert given == path


def test_names_inside_an_archive_never_reach_the_engine(tmp_path: Path) -> None:
    assert normal(tmp_path, docker_archive(LAYERS, "localhost/minipaas/other:7"))[2] == [TAG]


def test_layers_that_are_links_inside_the_archive_are_followed(tmp_path: Path) -> None:
    config = config_of(LAYERS[:1])
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": ["abc/layer.tar"]}]
    files = {"real.tar": LAYERS[0], "c.json": config, "manifest.json": json.dumps(manifest).encode()}
    data = tar_of(files, [link("abc/layer.tar", "../real.tar")])
    assert normal(tmp_path, data)[1] == LAYERS[:1]


def test_the_archive_of_docker_25_with_packed_blobs_is_read(tmp_path: Path) -> None:
    config, packed = config_of(LAYERS), [gzip.compress(each) for each in LAYERS]
    names = [f"blobs/sha256/{sha256(each)}" for each in packed]
    manifest = [{"Config": f"blobs/sha256/{sha256(config)}", "RepoTags": ["x:1"], "Layers": names}]
    files = {f"blobs/sha256/{sha256(config)}": config, **dict(zip(names, packed, strict=True))}
    data = tar_of({**files, "index.json": b"{}", "manifest.json": json.dumps(manifest).encode()})
    assert normal(tmp_path, data) == (digest(config), LAYERS, [TAG])


def test_a_layer_that_occurs_twice_is_written_once(tmp_path: Path) -> None:
    assert normal(tmp_path, oci_archive([LAYERS[0], LAYERS[1], LAYERS[0]]))[1] == [LAYERS[0], LAYERS[1], LAYERS[0]]


def test_an_index_for_several_machines_gives_the_one_for_this(tmp_path: Path) -> None:
    assert normal(tmp_path, oci_archive(LAYERS, architecture="riscv64"), architecture="riscv64")[1] == LAYERS


@pytest.mark.parametrize("make", [docker_archive, nix_archive, oci_archive], ids=["docker", "nix", "oci"])
def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    whole = make(LAYERS)
    content = len(whole.rstrip(b"\0"))
    for cut in [0, 1, 100, 511, 512, 513, *range(1000, content, 4999), content - 1]:
        with pytest.raises(ImageRefused):
            normal(tmp_path, whole[:cut])
        (tmp_path / "image.tar").unlink()


@pytest.mark.parametrize("make", [docker_archive, oci_archive], ids=["docker", "oci"])
def test_a_flipped_bit_gives_the_same_image_or_is_refused(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    whole = make(LAYERS)
    for at in range(0, len(whole), 991):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        try:
            image_id, layers, _ = normal(tmp_path, bytes(damaged))
        except ImageRefused:
            continue
        assert (image_id, layers) == (digest(config_of(LAYERS)), LAYERS)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (link("evil", "../../etc/passwd"), "outside the archive"),
        (link("evil", "/etc/passwd"), "outside the archive"),
        (link("evil", "../outside", tarfile.LNKTYPE), "outside the archive"),
        (link("../evil", "x"), "leaves the archive"),
        (link("/evil", "x"), "leaves the archive"),
        (link("a/../../evil", "x"), "leaves the archive"),
        (link("evil", "", tarfile.CHRTYPE), "neither file, folder nor link"),
        (link("evil", "", tarfile.FIFOTYPE), "neither file, folder nor link"),
    ],
)
def test_paths_that_leave_the_archive_are_refused(tmp_path: Path, member: tarfile.TarInfo, reason: str) -> None:
    with pytest.raises(ImageRefused, match=reason):
        normal(tmp_path, tar_of({"manifest.json": b"[]"}, [member]))


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    manifest = json.dumps([{"Config": "a", "Layers": []}]).encode()
    with pytest.raises(ImageRefused, match="circle"):
        normal(tmp_path, tar_of({"manifest.json": manifest}, [link("a", "b"), link("b", "a")]))


def test_an_image_for_another_machine_is_refused_by_name(tmp_path: Path) -> None:
    other = "arm64" if machine_architecture() != "arm64" else "amd64"
    for data in (docker_archive(LAYERS, config=config_of(LAYERS, other)), oci_archive(LAYERS, architecture=other)):
        with pytest.raises(ImageRefused, match=f"{other}; this machine is .*{machine_architecture()}"):
            normal(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello, this is no tar" * 100, "not a tar"),
        (tar_of({"README": b"hello"}), "neither manifest.json"),
        (tar_of({"manifest.json": b"{}"}), "not what it should be"),
        (tar_of({"manifest.json": b'[{"Config":"c"},{"Config":"d"}]'}), "holds 2 images"),
        (tar_of({"manifest.json": b'[{"Config":"gone.json"}]'}), "'gone.json' is missing"),
        (b"\xfd7zXZ\x00" + b"\0" * 600, "compressed with xz"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ImageRefused, match=reason):
        normal(tmp_path, data)


def test_layers_other_than_those_of_the_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match="is damaged"):
        normal(tmp_path, docker_archive(LAYERS, config=config_of([LAYERS[1], LAYERS[0]])))
    with pytest.raises(ImageRefused, match="2 layers, its config names 1"):
        normal(tmp_path, docker_archive(LAYERS, config=config_of(LAYERS[:1])))


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match="is not a file"), open_image(tmp_path / "no", scratch=tmp_path):
        pass
