"""Images in the bucket, between fake engines and a store in memory."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from image_tars import tar_of

from minipaas import bundle
from minipaas.engine.archive import machine_architecture
from minipaas.engine.fake import FakeEngine, FakeImage, make_image
from minipaas.errors import ImageMissing, ImageRefused
from replicator.store.memory import MemoryStore

TAG = "localhost/minipaas/app:1"
BASE = tar_of({"base": random.Random(1).randbytes(3_000_000)})
APP = tar_of({"app": b"print('hello')\n" * 1000})
IMAGE = make_image([BASE, APP])


def engine_with(image: FakeImage, tag: str = TAG) -> FakeEngine:
    engine = FakeEngine()
    engine.images.put(tag, image)
    return engine


def keys(store: MemoryStore) -> list[str]:
    return [each.key for each in store.list()]


def test_an_image_that_was_pushed_comes_back_with_the_same_id(tmp_path: Path) -> None:
    store, other = MemoryStore(), FakeEngine()
    digest = bundle.push(engine_with(IMAGE).images, TAG, store, scratch=tmp_path)
    assert bundle.pull(store, digest, other.images, "localhost/minipaas/app:9", scratch=tmp_path) == IMAGE.id
    assert other.images.exists("localhost/minipaas/app:9")
    assert b"".join(other.images.save(IMAGE.id)).count(APP) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_the_image_is_made_of(tmp_path: Path) -> None:
    store = MemoryStore()
    manifest = bundle.read_manifest(store, bundle.push(engine_with(IMAGE).images, TAG, store, scratch=tmp_path))
    assert (manifest.config, manifest.architecture) == (IMAGE.id, machine_architecture())
    assert [layer.size for layer in manifest.layers] == [len(BASE), len(APP)]
    assert len(keys(store)) == 4


def test_pushing_again_writes_nothing_and_gives_the_same_digest(tmp_path: Path) -> None:
    store, engine = MemoryStore(), engine_with(IMAGE)
    first = bundle.push(engine.images, TAG, store, scratch=tmp_path)
    before = [(each.key, each.etag) for each in store.list()]
    assert bundle.push(engine.images, TAG, store, scratch=tmp_path) == first
    assert [(each.key, each.etag) for each in store.list()] == before


def test_a_layer_that_two_images_share_is_stored_once(tmp_path: Path) -> None:
    store = MemoryStore()
    bundle.push(engine_with(IMAGE).images, TAG, store, scratch=tmp_path)
    before = set(keys(store))
    bundle.push(engine_with(make_image([BASE, tar_of({"app": b"2"})])).images, TAG, store, scratch=tmp_path)
    assert sorted(key.rpartition(".")[2] for key in set(keys(store)) - before) == ["json", "json", "zst"]


def test_two_pushes_at_once_agree(tmp_path: Path) -> None:
    store = MemoryStore()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(bundle.push, engine_with(IMAGE).images, TAG, store, scratch=tmp_path) for _ in range(4)]
    assert len({each.result() for each in running}) == 1 and len(keys(store)) == 4


def test_pushing_an_image_that_is_not_there_leaves_the_store_empty(tmp_path: Path) -> None:
    store = MemoryStore()
    with pytest.raises(ImageMissing):
        bundle.push(FakeEngine().images, TAG, store, scratch=tmp_path)
    assert keys(store) == []


def replace_object(store: MemoryStore, key: str, body: bytes) -> None:
    store.delete([key])
    store.put(key, body)


def test_any_blob_that_is_missing_or_damaged_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    store = MemoryStore()
    digest = bundle.push(engine_with(IMAGE).images, TAG, store, scratch=tmp_path)
    for key in keys(store):
        whole = store.get(key)
        flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
        for body in (None, b"", whole[:-1], flipped, zstandard.compress(b"other")):
            store.delete([key])
            if body is not None:
                store.put(key, body)
            other = FakeEngine()
            with pytest.raises(ImageRefused, match=key):
                bundle.pull(store, digest, other.images, TAG, scratch=tmp_path)
            assert not other.images.exists(TAG) and list(tmp_path.iterdir()) == []
        replace_object(store, key, whole)
    assert bundle.pull(store, digest, FakeEngine().images, TAG, scratch=tmp_path) == IMAGE.id


def test_an_image_for_another_machine_is_refused_before_its_layers_are_fetched(tmp_path: Path) -> None:
    store = MemoryStore()
    stored = bundle.StoredImage(1, IMAGE.id, (), "s390x")
    digest = bundle.write_manifest(store, stored)
    with pytest.raises(ImageRefused, match="for s390x; this machine is"):
        bundle.pull(store, digest, FakeEngine().images, TAG, scratch=tmp_path)
