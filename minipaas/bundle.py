"""Images in the bucket: content-addressed, so that a layer is sent once and a recovery needs neither registry nor builder.

Owns the keys ``blobs/sha256/<hex>.zst`` (a layer, named by the sha256 of its uncompressed tar), ``blobs/sha256/<hex>.json``
(an image's config) and ``manifests/<hex>.json``. Never deletes anything, and trusts nothing that it reads back.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import msgspec
import zstandard

from minipaas.engine import Images
from minipaas.engine.archive import (
    TAR_END,
    ImageTar,
    check_room,
    config_name,
    docker_manifest,
    inflated,
    layer_name,
    machine_architecture,
    open_image,
    spool,
    tar_header,
    tar_padding,
)
from minipaas.errors import ImageRefused
from replicator import ObjectInfo, ObjectMissing, ObjectStore, PreconditionFailed

VERSION = 1
MAX_METADATA = 4 << 20
PART = 8 << 20
_PARALLEL = 4
_AHEAD = 2


class StoredLayer(msgspec.Struct, frozen=True):
    """digest: of the uncompressed tar, sha256:…. size, stored_size: bytes, uncompressed and as stored."""

    digest: str
    size: int
    stored_size: int


class StoredImage(msgspec.Struct, frozen=True):
    """The manifest. Its canonical bytes are its JSON with the fields in this order and no spaces."""

    version: int
    config: str
    layers: tuple[StoredLayer, ...]
    architecture: str


def _blob_key(digest: str, ending: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}.{ending}"


def manifest_key(digest: str) -> str:
    return f"manifests/{digest.removeprefix('sha256:')}.json"


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# -- engine -> bucket --------------------------------------------------------------------------------------------------


def push(images: Images, reference: str, store: ObjectStore, *, scratch: Path) -> str:
    """Store an image of the engine; the digest of its manifest, sha256:….

    What is in the store already is not sent. The manifest is written last, so that a digest names a whole image.
    scratch: a folder with room for the image. Raises ImageMissing, EngineError, StoreError.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="push-", suffix=".tar") as saved:
        spool(iter(images.save(reference)), saved, scratch, reference)
        with open_image(Path(saved.name), scratch=scratch, name=reference) as image:
            layers = tuple(_push_layer(image, index, store, scratch) for index in range(len(image.diff_ids)))
            _ensure(store, _blob_key(image.image_id, "json"), lambda: image.config)
            manifest = StoredImage(VERSION, image.image_id, layers, image.architecture)
    return write_manifest(store, manifest)


def write_manifest(store: ObjectStore, manifest: StoredImage) -> str:
    """Store a manifest, whose blobs must be there; its digest."""
    data = msgspec.json.encode(manifest)
    _ensure(store, manifest_key(_digest(data)), lambda: data)
    return _digest(data)


def _push_layer(image: ImageTar, index: int, store: ObjectStore, scratch: Path) -> StoredLayer:
    digest, size = image.diff_ids[index], 0
    key = _blob_key(digest, "zst")
    stored = _head(store, key)
    if stored is not None:
        size = sum(len(chunk) for chunk in image.read_layer(index))
        return StoredLayer(digest, size, stored.size_bytes)
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="push-", suffix=".zst") as packed:
        compressor = zstandard.ZstdCompressor(level=3, threads=-1, write_checksum=True)
        with compressor.stream_writer(packed, closefd=False) as into:
            for chunk in image.read_layer(index):
                size += into.write(chunk) and len(chunk)
        packed.flush()
        stored = _ensure(store, key, lambda: Path(packed.name))
    return StoredLayer(digest, size, stored.size_bytes)


def _head(store: ObjectStore, key: str) -> ObjectInfo | None:
    try:
        return store.head(key)
    except ObjectMissing:
        return None


def _ensure(store: ObjectStore, key: str, body: Callable[[], bytes | Path]) -> ObjectInfo:
    """Put it unless it is there; losing against another writer of the same content is as good."""
    found = _head(store, key)
    if found is not None:
        return found
    try:
        return store.put(key, body(), if_none_match=True)
    except PreconditionFailed:
        return store.head(key)


# -- bucket -> engine --------------------------------------------------------------------------------------------------


def pull(store: ObjectStore, digest: str, images: Images, tag: str, *, scratch: Path) -> str:
    """Load a stored image into the engine under ``tag``; the engine's id of it.

    Every blob is verified before the engine sees any. scratch: a folder with room for the image. Raises ImageRefused naming
    the blob that is missing or damaged, EngineError, StoreError.
    """
    manifest, config = _read_manifest(store, digest)
    scratch.mkdir(parents=True, exist_ok=True)
    check_room(scratch, sum(layer.size for layer in manifest.layers), f"image {digest[:19]}…")
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="pull-", suffix=".tar") as archive:
        _assemble(store, manifest, config, tag, archive)
        return images.load(Path(archive.name), tag=tag)


def read_manifest(store: ObjectStore, digest: str) -> StoredImage:
    """What an image in the store is made of. Raises ImageRefused."""
    return _read_manifest(store, digest)[0]


def _read_manifest(store: ObjectStore, digest: str) -> tuple[StoredImage, bytes]:
    data = _small(store, manifest_key(digest), digest)
    try:
        manifest = msgspec.json.decode(data, type=StoredImage)
    except msgspec.MsgspecError as error:
        raise ImageRefused(f"{manifest_key(digest)} in {store.url} is not a manifest: {error}") from error
    if manifest.version != VERSION:
        raise ImageRefused(f"image {digest[:19]}… was stored by a newer minipaas (version {manifest.version}); upgrade")
    if manifest.architecture not in ("", machine_architecture()):
        raise ImageRefused(
            f"image {digest[:19]}… is for {manifest.architecture}; this machine is {machine_architecture()}. Build it again here"
        )
    return manifest, _small(store, _blob_key(manifest.config, "json"), manifest.config)


def _small(store: ObjectStore, key: str, digest: str) -> bytes:
    data = _get(store, key, 0, MAX_METADATA)
    if _digest(data) != digest:
        raise ImageRefused(f"{key} in {store.url} is damaged: its sha256 is not its name")
    return data


def _get(store: ObjectStore, key: str, offset: int, length: int) -> bytes:
    try:
        return store.get(key, offset=offset, length=length)
    except ObjectMissing as error:
        raise ImageRefused(f"{key} is missing in {store.url}; deploy the app again from its source") from error


def _assemble(store: ObjectStore, manifest: StoredImage, config: bytes, tag: str, into: IO[bytes]) -> None:
    """A docker-archive. Sizes are known beforehand, so that layers are written at their places in parallel."""
    descriptor, at = into.fileno(), 0
    digests = [layer.digest for layer in manifest.layers]
    with ThreadPoolExecutor(_PARALLEL) as layers, ThreadPoolExecutor(_PARALLEL) as parts:
        running: list[Future[None]] = []
        for layer in {each.digest: each for each in manifest.layers}.values():
            os.pwrite(descriptor, tar_header(layer_name(layer.digest), layer.size), at)
            running.append(layers.submit(_fetch_layer, store, layer, descriptor, at + 512, parts))
            at += 512 + layer.size + tar_padding(layer.size)
        _finish(running)
    os.pwrite(descriptor, _tail(manifest.config, config, digests, tag), at)


def _finish(running: Sequence[Future[None]]) -> None:
    """Wait for all; the first failure ends the rest that has not begun."""
    try:
        for each in running:
            each.result()
    finally:
        for each in running:
            each.cancel()


def _tail(image_id: str, config: bytes, digests: Sequence[str], tag: str) -> bytes:
    parts = ((config_name(image_id), config), ("manifest.json", docker_manifest(image_id, digests, tag)))
    packed = [tar_header(name, len(data)) + data + bytes(tar_padding(len(data))) for name, data in parts]
    return b"".join(packed) + TAR_END


def _fetch_layer(store: ObjectStore, layer: StoredLayer, into: int, at: int, pool: ThreadPoolExecutor) -> None:
    """Raises ImageRefused; never writes beyond the layer's place."""
    key = _blob_key(layer.digest, "zst")
    what, content, done = f"{key} in {store.url}", hashlib.sha256(), 0
    for chunk in inflated(_stored_parts(store, key, layer.stored_size, pool), what):
        if done + len(chunk) > layer.size:
            raise ImageRefused(f"{what} is damaged: it is longer than its manifest says")
        content.update(chunk)
        os.pwrite(into, chunk, at + done)
        done += len(chunk)
    if done != layer.size or f"sha256:{content.hexdigest()}" != layer.digest:
        raise ImageRefused(f"{what} is damaged: its sha256 is not its name")


def _stored_parts(store: ObjectStore, key: str, size: int, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """The object in order, with the next parts on their way while one is being used."""
    waiting: deque[Future[bytes]] = deque()
    for offset in range(0, size, PART):
        waiting.append(pool.submit(_get, store, key, offset, min(PART, size - offset)))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
