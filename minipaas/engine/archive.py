"""Image tarballs: read with suspicion, and turned into the one form that every engine loads.

Owns docker-archive (as ``docker save``, Podman and Nix write it) and the OCI image layout in a tar, plain, gzip or zstd.
Never talks to an engine and never unpacks a path of a tarball onto the disk. Memory stays bounded; big data goes through
files in the scratch folder that the caller gives.
Sources: github.com/moby/docker-image-spec (v1.2), github.com/opencontainers/image-spec (v1.1, image-layout.md).
"""

from __future__ import annotations

import hashlib
import platform
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar

import msgspec
import zstandard

from minipaas.errors import EngineError, ImageRefused

_T = TypeVar("_T")

CHUNK = 1 << 20
MAX_METADATA = 4 << 20
MAX_MEMBERS = 10_000
KEEP_FREE = 256 << 20

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER_COMPRESSIONS = {b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "lz4"}
# How much compressed input is given at once; bounds what one call can blow up to (zstd: 128 KiB from 4 bytes).
_GZIP_STEP, _ZSTD_STEP = 16 << 10, 2 << 10
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST_NAME = re.compile(r"(?:.*/)?(?:sha256:)?([0-9a-f]{64})(?:\.json)?")
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "loongarch64": "loong64",
}


def machine_architecture() -> str:
    """This machine's architecture in OCI's words (GOARCH)."""
    name = platform.machine().lower()
    return _ARCHITECTURES.get(name, name)


# -- JSON of the two formats -------------------------------------------------------------------------------------------


class _RootFs(msgspec.Struct):
    diff_ids: list[str]


class _Config(msgspec.Struct):
    rootfs: _RootFs
    architecture: str = ""
    os: str = "linux"


class _DockerManifest(msgspec.Struct):
    config: str = msgspec.field(name="Config")
    layers: list[str] | None = msgspec.field(name="Layers", default=None)
    repo_tags: list[str] | None = msgspec.field(name="RepoTags", default=None)


class _Platform(msgspec.Struct):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: _Platform | None = None


class _OciManifest(msgspec.Struct):
    """An image manifest (config and layers) or an index (manifests)."""

    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None


# -- compression -------------------------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def inflated(chunks: Iterator[bytes], what: str) -> Iterator[bytes]:
    """The plain bytes of a stream that is gzip, zstd or plain already, told by its first bytes.

    what: names the stream in messages. Raises ImageRefused: truncated, damaged, or compressed in another way.
    """
    first = next(chunks, b"")
    for magic, name in _OTHER_COMPRESSIONS.items():
        if first.startswith(magic):
            raise ImageRefused(f"{what} is compressed with {name}; use gzip, zstd or none")
    rest = _chain(first, chunks)
    if first.startswith(_GZIP):
        return _decompressed(rest, lambda: zlib.decompressobj(31), _GZIP_STEP, what)
    if first.startswith(_ZSTD):
        return _decompressed(rest, lambda: zstandard.ZstdDecompressor().decompressobj(), _ZSTD_STEP, what)
    return rest


def is_compressed(head: bytes) -> bool:
    return head.startswith((_GZIP, _ZSTD, *_OTHER_COMPRESSIONS))


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _decompressed(chunks: Iterator[bytes], new: Callable[[], _Decompressor], step: int, what: str) -> Iterator[bytes]:
    """Several gzip members or zstd frames in a row are one stream; zeros after the last are padding."""
    machine = new()
    try:
        for chunk in chunks:
            for at in range(0, len(chunk), step):
                piece = chunk[at : at + step]
                while piece:
                    if machine.eof:
                        piece = piece.lstrip(b"\0")
                        if not piece:
                            break
                        machine = new()
                    if data := machine.decompress(piece):
                        yield data
                    piece = machine.unused_data if machine.eof else b""
    except (zlib.error, zstandard.ZstdError) as error:
        raise ImageRefused(f"{what} is damaged: {error}") from error
    if not machine.eof:
        raise ImageRefused(f"{what} is truncated; copy it again")


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blob:
    """A layer as it lies in the tar. stored_digest: of the bytes there, '' when the format does not say."""

    member: tarfile.TarInfo
    stored_digest: str
    diff_id: str
    compressed: bool


class ImageTar:
    """One image in an uncompressed tar. Made by ``open_image``; valid inside its ``with``."""

    def __init__(self, tar: tarfile.TarFile, path: Path, name: str, architecture: str) -> None:
        self.path = path
        self._tar, self._name, self._wanted = tar, name, architecture
        self._members = self._index()
        if "manifest.json" in self._members:
            self.layout, stored = "docker", self._read_docker()
        elif "index.json" in self._members:
            self.layout, stored = "oci", self._read_oci()
        else:
            raise ImageRefused(
                f"{name} is not an image: it has neither manifest.json (docker save) nor index.json (OCI layout)"
            )
        self._blobs = self._match_layers(stored)

    config: bytes
    architecture: str
    repo_tags: tuple[str, ...] = ()

    @property
    def image_id(self) -> str:
        return f"sha256:{hashlib.sha256(self.config).hexdigest()}"

    @property
    def diff_ids(self) -> tuple[str, ...]:
        return tuple(blob.diff_id for blob in self._blobs)

    @property
    def has_plain_layers(self) -> bool:
        return self.layout == "docker" and not any(blob.compressed for blob in self._blobs)

    def read_layer(self, index: int) -> Iterator[bytes]:
        """The uncompressed bytes of a layer. Raises ImageRefused, at the latest after the last byte, when they are not
        those that the image names."""
        blob = self._blobs[index]
        what = f"layer {blob.diff_id[:19]} of {self._name}"
        plain, total = hashlib.sha256(), 0
        for chunk in inflated(self._verified(blob.member, blob.stored_digest, what), what):
            plain.update(chunk)
            total += len(chunk)
            yield chunk
        if f"sha256:{plain.hexdigest()}" != blob.diff_id:
            raise ImageRefused(f"{what} is damaged: its content has sha256:{plain.hexdigest()[:12]}…; copy it again")

    # -- the outer tar

    def _index(self) -> dict[str, tarfile.TarInfo]:
        members: dict[str, tarfile.TarInfo] = {}
        try:
            for info in self._tar:
                if len(members) >= MAX_MEMBERS:
                    raise ImageRefused(f"{self._name} is not an image: it has more than {MAX_MEMBERS} entries")
                members[self._safe_name(info)] = info
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise ImageRefused(f"{self._name} is truncated or not a tar ({error}); copy it again") from error
        return members

    def _safe_name(self, info: tarfile.TarInfo) -> str:
        if not (info.isfile() or info.isdir() or info.issym() or info.islnk()):
            raise ImageRefused(f"{self._name} is refused: {info.name!r} is neither file, folder nor link")
        name = _inside(info.name)
        if name is None:
            raise ImageRefused(f"{self._name} is refused: the path {info.name!r} leaves the archive")
        if (info.issym() or info.islnk()) and self._link_target(name, info) is None:
            raise ImageRefused(
                f"{self._name} is refused: {info.name!r} links to {info.linkname!r}, outside the archive"
            )
        return name

    @staticmethod
    def _link_target(name: str, info: tarfile.TarInfo) -> str | None:
        return _inside(info.linkname, posixpath.dirname(name) if info.issym() else "")

    def _member(self, name: str) -> tarfile.TarInfo:
        """The file of a name; links are followed inside the archive. Raises ImageRefused."""
        at: str | None = _inside(name)
        for _ in range(8):
            info = self._members.get(at) if at is not None else None
            if info is None or at is None or info.isdir():
                raise ImageRefused(f"{self._name} is incomplete: {name!r} is missing; save or copy it again")
            if info.isfile():
                return info
            at = self._link_target(at, info)
        raise ImageRefused(f"{self._name} is refused: the links from {name!r} go round in a circle")

    def _chunks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        file = self._tar.extractfile(member)
        if file is None:
            raise ImageRefused(f"{self._name} is damaged: {member.name!r} cannot be read")
        left = member.size
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ImageRefused(f"{self._name} is truncated in {member.name!r}; copy it again")
            left -= len(chunk)
            yield chunk

    def _verified(self, member: tarfile.TarInfo, digest: str, what: str) -> Iterator[bytes]:
        stored = hashlib.sha256()
        for chunk in self._chunks(member):
            stored.update(chunk)
            yield chunk
        if digest and f"sha256:{stored.hexdigest()}" != digest:
            raise ImageRefused(f"{what} is damaged: it should be {digest[:19]}…; copy it again")

    def _metadata(self, name: str, digest: str = "") -> bytes:
        member = self._member(name)
        if member.size > MAX_METADATA:
            raise ImageRefused(f"{self._name} is refused: {name!r} is larger than {MAX_METADATA} bytes")
        return b"".join(self._verified(member, digest, f"{name} of {self._name}"))

    def _decode(self, data: bytes, kind: type[_T], name: str) -> _T:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise ImageRefused(f"{self._name} is damaged: {name} is not what it should be ({error})") from error

    # -- the two layouts; each sets config and gives the layers' members and stored digests

    def _read_docker(self) -> list[tuple[tarfile.TarInfo, str]]:
        manifests = self._decode(self._metadata("manifest.json"), list[_DockerManifest], "manifest.json")
        if len(manifests) != 1:
            names = ", ".join(tag for each in manifests for tag in each.repo_tags or ["(no name)"])
            raise ImageRefused(f"{self._name} holds {len(manifests)} images ({names}); save one image only")
        manifest = manifests[0]
        named = _DIGEST_NAME.fullmatch(manifest.config)
        self.config = self._metadata(manifest.config, f"sha256:{named[1]}" if named else "")
        self.repo_tags = tuple(manifest.repo_tags or ())
        return [(self._member(name), "") for name in manifest.layers or ()]

    def _read_oci(self) -> list[tuple[tarfile.TarInfo, str]]:
        index = self._decode(self._metadata("index.json"), _OciManifest, "index.json")
        manifest = self._choose(index, depth=0)
        if manifest.config is None:
            raise ImageRefused(f"{self._name} is damaged: its manifest names no config")
        self.config = self._blob_bytes(manifest.config)
        return [(self._sized(layer), layer.digest) for layer in manifest.layers or ()]

    def _choose(self, index: _OciManifest, depth: int) -> _OciManifest:
        """The one image of an index for this machine; an index inside an index is followed once."""
        entries = [each for each in index.manifests or () if not _is_attestation(each)]
        fitting = [each for each in entries if self._fits(each)]
        if not fitting:
            found = ", ".join(each.platform.architecture for each in entries if each.platform) or "nothing"
            raise ImageRefused(
                f"{self._name} is for {found}; this machine is {self._wanted}. Build it for {self._wanted}"
            )
        if len(fitting) > 1:
            raise ImageRefused(f"{self._name} holds {len(fitting)} images for {self._wanted}; save one image only")
        chosen = self._decode(self._blob_bytes(fitting[0]), _OciManifest, fitting[0].digest)
        if chosen.manifests is None:
            return chosen
        if depth:
            raise ImageRefused(f"{self._name} is refused: its indexes are nested more than once")
        return self._choose(chosen, depth + 1)

    def _fits(self, entry: _Descriptor) -> bool:
        if entry.platform is None or not entry.platform.architecture:
            return True
        return entry.platform.architecture == self._wanted and entry.platform.os in ("linux", "")

    def _sized(self, descriptor: _Descriptor) -> tarfile.TarInfo:
        if not _DIGEST.fullmatch(descriptor.digest):
            raise ImageRefused(f"{self._name} is refused: {descriptor.digest!r} is not a sha256 digest")
        member = self._member(f"blobs/sha256/{descriptor.digest[7:]}")
        if member.size != descriptor.size:
            raise ImageRefused(
                f"{self._name} is damaged: {descriptor.digest[:19]}… has another size than its manifest says"
            )
        return member

    def _blob_bytes(self, descriptor: _Descriptor) -> bytes:
        self._sized(descriptor)
        return self._metadata(f"blobs/sha256/{descriptor.digest[7:]}", descriptor.digest)

    def _match_layers(self, stored: list[tuple[tarfile.TarInfo, str]]) -> tuple[_Blob, ...]:
        config = self._decode(self.config, _Config, "its config")
        self.architecture = config.architecture
        if config.os not in ("linux", "") or config.architecture not in (self._wanted, ""):
            raise ImageRefused(
                f"{self._name} is for {config.os}/{config.architecture}; this machine is linux/{self._wanted}. "
                f"Build it for linux/{self._wanted}"
            )
        diff_ids = config.rootfs.diff_ids
        if len(diff_ids) != len(stored):
            raise ImageRefused(
                f"{self._name} is damaged: it has {len(stored)} layers, its config names {len(diff_ids)}"
            )
        bad = next((each for each in diff_ids if not _DIGEST.fullmatch(each)), None)
        if bad is not None:
            raise ImageRefused(f"{self._name} is refused: {bad!r} is not a sha256 digest")
        return tuple(
            _Blob(member, digest, diff_id, is_compressed(next(self._chunks(member), b"")))
            for (member, digest), diff_id in zip(stored, diff_ids, strict=True)
        )


def _inside(path: str, folder: str = "") -> str | None:
    """The path from the archive's root, normalised; None when it is absolute or leaves the root."""
    if path.startswith("/") or "\0" in path:
        return None
    whole = posixpath.normpath(posixpath.join(folder, path))
    return None if whole == ".." or whole.startswith("../") else whole


def _is_attestation(entry: _Descriptor) -> bool:
    """BuildKit lists provenance beside images, for the platform unknown/unknown."""
    return entry.platform is not None and entry.platform.os == "unknown"


@contextmanager
def open_image(
    path: Path, *, scratch: Path, architecture: str | None = None, name: str | None = None
) -> Iterator[ImageTar]:
    """The image in a tarball: docker-archive or OCI layout, the whole plain, gzip or zstd.

    scratch: an existing folder for a decompressed copy. architecture: what the image must be for; this machine's if None.
    name: what to call it in messages. Raises ImageRefused, with the reason, before anything is given.
    """
    name = name or path.name
    if not path.is_file():
        raise ImageRefused(f"{path} is not a file; give the path of an image tarball")
    with _plain_tar(path, scratch, name) as plain, _tar_file(plain, name) as tar:
        yield ImageTar(tar, plain, name, architecture or machine_architecture())


def _tar_file(plain: Path, name: str) -> tarfile.TarFile:
    try:
        return tarfile.open(plain, "r:")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ImageRefused(f"{name} is not a tarball of an image ({error})") from error


@contextmanager
def _plain_tar(path: Path, scratch: Path, name: str) -> Iterator[Path]:
    with path.open("rb") as source:
        compressed = is_compressed(source.read(8))
        source.seek(0)
        if not compressed:
            yield path
            return
        with tempfile.NamedTemporaryFile(dir=scratch, prefix="image-", suffix=".tar") as plain:
            spool(inflated(iter(lambda: source.read(CHUNK), b""), name), plain, scratch, name)
            yield Path(plain.name)


def check_room(folder: Path, size_bytes: int, what: str) -> None:
    """Raises EngineError when a file of this size would leave too little room for everything else."""
    if shutil.disk_usage(folder).free < size_bytes + KEEP_FREE:
        raise EngineError(f"no room for {what} in {folder}: free {(size_bytes + KEEP_FREE) >> 20} MB and try again")


def spool(chunks: Iterator[bytes], into: IO[bytes], folder: Path, what: str) -> None:
    """Write a stream to a file in ``folder``, stopping before the disk is full. Raises EngineError."""
    unchecked = KEEP_FREE
    for chunk in chunks:
        if unchecked >= KEEP_FREE // 4:
            check_room(folder, 0, what)
            unchecked = 0
        into.write(chunk)
        unchecked += len(chunk)
    into.flush()


# -- writing docker-archive --------------------------------------------------------------------------------------------


def tar_header(name: str, size_bytes: int) -> bytes:
    """One header block of 512 bytes for a regular file; the same bytes for the same arguments, always."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_padding(size_bytes: int) -> int:
    """Zero bytes between the end of a file of this size and the next header."""
    return -size_bytes % 512


TAR_END = b"\0" * 1024


def layer_name(diff_id: str) -> str:
    return f"{diff_id.removeprefix('sha256:')}.tar"


def config_name(image_id: str) -> str:
    return f"{image_id.removeprefix('sha256:')}.json"


def docker_manifest(image_id: str, diff_ids: Sequence[str], tag: str) -> bytes:
    """The bytes of manifest.json."""
    layers = [layer_name(each) for each in diff_ids]
    return msgspec.json.encode([{"Config": config_name(image_id), "RepoTags": [tag], "Layers": layers}])


@contextmanager
def normalised(path: Path, *, tag: str, scratch: Path, architecture: str | None = None) -> Iterator[tuple[Path, str]]:
    """A verified docker-archive with uncompressed layers and ``tag`` as its only name, and the image's id.

    The file itself when it is that already, else a copy in ``scratch`` that goes with the ``with``. Names inside a tarball
    are never kept, as they could replace the image of another app. Raises ImageRefused.
    """
    with open_image(path, scratch=scratch, architecture=architecture) as image:
        if image.path == path and image.has_plain_layers and image.repo_tags == (tag,):
            for index in range(len(image.diff_ids)):
                for _ in image.read_layer(index):
                    pass
            yield path, image.image_id
            return
        with tempfile.NamedTemporaryFile(dir=scratch, prefix="image-", suffix=".tar") as copy:
            _write(image, tag, copy, scratch)
            yield Path(copy.name), image.image_id


def _write(image: ImageTar, tag: str, into: IO[bytes], scratch: Path) -> None:
    for index, diff_id in enumerate(image.diff_ids):
        if diff_id not in image.diff_ids[:index]:
            _write_layer(into, layer_name(diff_id), image.read_layer(index), scratch)
    for name, data in (
        (config_name(image.image_id), image.config),
        ("manifest.json", docker_manifest(image.image_id, image.diff_ids, tag)),
    ):
        into.write(tar_header(name, len(data)) + data + bytes(tar_padding(len(data))))
    into.write(TAR_END)
    into.flush()


def _write_layer(into: IO[bytes], name: str, chunks: Iterator[bytes], scratch: Path) -> None:
    """The size is known only after the layer is decompressed, so that its header is written last."""
    start = into.tell()
    into.write(bytes(512))
    spool(chunks, into, scratch, name)
    end = into.tell()
    size = end - start - 512
    into.write(bytes(tar_padding(size)))
    into.seek(start)
    into.write(tar_header(name, size))
    into.seek(0, 2)
