"""Claims about encrypted objects: what is stored tells nothing, what was altered is never given, ranges cost what they must."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyrage
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.age import Keys
from replicator.envelope import CHUNK_SIZE, HEAD_SIZE, SEALED_CHUNK_SIZE, content_size, sealed_size
from replicator.errors import (
    IdentityMissing,
    NotEncrypted,
    SealDamaged,
    SealVersionUnknown,
    StoreError,
    StoreUnavailable,
    UsageError,
)
from replicator.store import ObjectStore
from replicator.store.memory import MemoryStore
from replicator.store.retry import Retrying, RetryStore
from replicator.store.seal import KnownKeys, SealedStore, bare, sealed

GOLDEN = Path(__file__).with_name("golden")
KEY = "segments/00000001/0/0000000000000001-0000000000000001.seg"
SIZES = [0, 1, 15, 16, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE, 3 * CHUNK_SIZE + 77]


def new_identity() -> tuple[str, str]:
    pair = pyrage.x25519.Identity.generate()
    return str(pair), str(pair.to_public())


IDENTITY, RECIPIENT = new_identity()
OTHER_IDENTITY, OTHER_RECIPIENT = new_identity()


def opened(inner: ObjectStore) -> ObjectStore:
    return sealed(inner, recipients=[RECIPIENT], identities=[IDENTITY])


def content_of(size: int) -> bytes:
    return os.urandom(size) if size < 64 else (b"row of a customer " * (size // 18 + 1))[:size]


def stored(content: bytes, key: str = KEY) -> bytes:
    inner = MemoryStore()
    opened(inner).put(key, content)
    return inner.get(key)


def holding(body: bytes, key: str = KEY) -> ObjectStore:
    """An encrypted store that finds ``body`` at the key, and knows nothing of it."""
    inner = MemoryStore()
    inner.put(key, body)
    return opened(inner)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_ranges_are_those_of_the_content(size: int) -> None:
    content = content_of(size)
    store = holding(stored(content))
    assert store.head(KEY).size_bytes == next(store.list()).size_bytes == size
    assert len(stored(content)) == sealed_size(size)
    edges = sorted({0, 1, size // 2, max(0, size - 1), size, size + 1, CHUNK_SIZE - 1, CHUNK_SIZE, 9 * CHUNK_SIZE})
    for start in edges:
        assert store.get(KEY, offset=start) == content[start:]
        for length in (1, 16, CHUNK_SIZE, CHUNK_SIZE + 1, 5 * CHUNK_SIZE):
            assert store.get(KEY, offset=start, length=length) == content[start : start + length]
            assert holding(stored(content)).get(KEY, offset=start, length=length) == content[start : start + length]
        if start:
            assert store.get(KEY, offset=-start) == content[-start:]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_of_any_content_is_what_was_put(data: st.DataObject) -> None:
    size = data.draw(st.one_of(st.sampled_from(SIZES), st.integers(0, 4 * CHUNK_SIZE)))
    content = content_of(size)
    store = holding(stored(content))
    for _ in range(3):
        offset = data.draw(st.integers(-size - 10, size + 2 * CHUNK_SIZE))
        length = data.draw(st.one_of(st.none(), st.integers(0, size + CHUNK_SIZE)))
        start = max(0, size + offset) if offset < 0 else offset
        expected = content[start:] if length is None else content[start : start + length]
        assert store.get(KEY, offset=offset, length=length) == expected


def assert_original_or_error(body: bytes, content: bytes, start: int, length: int) -> None:
    """Every way to read the object gives what was put, or an error."""
    wishes: list[tuple[int, int | None]] = [(0, None), (start, length), (start, None), (-length, None), (-length, 1)]
    for offset, count in wishes:
        begin = max(0, len(content) + offset) if offset < 0 else offset
        try:
            found = holding(body).get(KEY, offset=offset, length=count)
        except StoreError:
            continue
        assert found == (content[begin:] if count is None else content[begin : begin + count]), (offset, count)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_was_altered_gives_an_error_or_the_same_and_never_anything_else(data: st.DataObject) -> None:
    content = content_of(data.draw(st.sampled_from([0, 1, 700, CHUNK_SIZE, 2 * CHUNK_SIZE + 9])))
    body = bytearray(stored(content))
    match data.draw(st.sampled_from(["flip", "cut", "append", "swap", "drop", "repeat"])):
        case "flip":
            at = data.draw(st.one_of(st.integers(0, HEAD_SIZE - 1), st.integers(0, len(body) - 1)))
            body[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            edges = [HEAD_SIZE + n * SEALED_CHUNK_SIZE for n in range(4)]
            del body[data.draw(st.one_of(st.integers(0, len(body) - 1), st.sampled_from(edges))) :]
        case "append":
            body += data.draw(st.binary(min_size=1, max_size=40))
        case "swap":
            first, second = slice(HEAD_SIZE, HEAD_SIZE + SEALED_CHUNK_SIZE), slice(-SEALED_CHUNK_SIZE, None)
            body[first], body[second] = body[second], body[first]
        case "drop":
            del body[HEAD_SIZE : HEAD_SIZE + SEALED_CHUNK_SIZE]
        case "repeat":
            body += body[HEAD_SIZE : HEAD_SIZE + SEALED_CHUNK_SIZE]
    start = data.draw(st.integers(0, 3 * CHUNK_SIZE))
    assert_original_or_error(bytes(body), content, start, data.draw(st.integers(1, CHUNK_SIZE + 2)))


def test_every_single_flipped_bit_of_a_small_object_is_damage() -> None:
    body = stored(b"one row")
    for at in range(0, len(body), 1 if len(body) < 1100 else 3):
        altered = bytearray(body)
        altered[at] ^= 1 << (at % 8)
        with pytest.raises(SealDamaged, match="damaged"):
            holding(bytes(altered)).get(KEY)


@pytest.mark.parametrize("size", [1, CHUNK_SIZE, 2 * CHUNK_SIZE + 5])
def test_every_truncation_is_damage(size: int) -> None:
    body = stored(content_of(size))
    cuts = {9, HEAD_SIZE - 1, HEAD_SIZE, HEAD_SIZE + 15, HEAD_SIZE + SEALED_CHUNK_SIZE, len(body) - 1}
    for cut in sorted(cut for cut in cuts if cut < len(body)):
        with pytest.raises(SealDamaged):
            holding(body[:cut]).get(KEY)
        with pytest.raises(SealDamaged):
            holding(body[:cut]).get(KEY, offset=-1)


def test_a_read_beyond_an_end_that_was_cut_off_is_damage() -> None:
    body = stored(content_of(3 * CHUNK_SIZE))[: HEAD_SIZE + SEALED_CHUNK_SIZE]
    for offset in (CHUNK_SIZE, 2 * CHUNK_SIZE, 7 * CHUNK_SIZE):
        with pytest.raises(SealDamaged):
            holding(body).get(KEY, offset=offset, length=10)


def test_the_body_of_another_object_is_damage_also_where_both_are_whole() -> None:
    inner = MemoryStore()
    store = opened(inner)
    store.put("timelines/00000001.json", b"one")
    store.put("timelines/00000002.json", b"two")
    inner.put("timelines/00000001.json", inner.get("timelines/00000002.json"))
    for reader in (store, opened(inner)):
        with pytest.raises(SealDamaged, match="timelines/00000001.json"):
            reader.get("timelines/00000001.json")


def test_a_replica_that_was_copied_to_another_place_opens() -> None:
    inner = MemoryStore()
    opened(inner).sub("db/a.db").put(KEY, b"content")
    inner.put(f"elsewhere/{KEY}", inner.get(f"db/a.db/{KEY}"))
    assert opened(inner.sub("elsewhere")).get(KEY) == b"content"
    assert opened(inner).get(f"elsewhere/{KEY}") == b"content"


def test_an_object_that_was_replaced_is_read_as_it_is_now() -> None:
    inner = MemoryStore()
    store, other = opened(inner), opened(inner)
    store.put(KEY, b"before")
    assert store.get(KEY, offset=2, length=2) == b"fo"
    other.put(KEY, b"after")
    assert store.get(KEY, offset=2, length=2) == b"te"


@pytest.mark.parametrize("recipients", [1, 6])
def test_each_recipient_opens_what_was_stored_alone(recipients: int) -> None:
    pairs = [new_identity() for _ in range(recipients)]
    inner = MemoryStore()
    sealed(inner, recipients=[public for _, public in pairs], identities=[pairs[0][0]]).put(KEY, b"content")
    for identity, _ in pairs:
        assert sealed(inner, identities=[OTHER_IDENTITY, identity]).get(KEY) == b"content"


def test_new_recipients_apply_to_new_objects() -> None:
    inner = MemoryStore()
    opened(inner).put("timelines/00000001.json", b"old")
    rotated = sealed(inner, recipients=[OTHER_RECIPIENT], identities=[OTHER_IDENTITY, IDENTITY])
    rotated.put("timelines/00000002.json", b"new")
    assert [rotated.get(info.key) for info in rotated.list()] == [b"old", b"new"]
    with pytest.raises(IdentityMissing, match=r"00000002.json is encrypted, and none"):
        opened(inner).get("timelines/00000002.json")


def test_what_is_readable_by_anybody_is_refused() -> None:
    inner = MemoryStore()
    for key, body in (("small", b"{}"), ("large", bytes(100_000)), ("empty", b"")):
        inner.put(key, body)
        for offset, length in ((0, None), (7, 9)):
            with pytest.raises(NotEncrypted, match=f"{key} is not encrypted"):
                opened(inner).get(key, offset=offset, length=length)


def test_without_recipients_nothing_is_written() -> None:
    inner = MemoryStore()
    with pytest.raises(StoreError, match="reading only"):
        sealed(inner, identities=[IDENTITY]).put(KEY, b"content")
    assert list(inner.list()) == []


@pytest.mark.parametrize(
    ("recipients", "identities", "words"),
    [
        ([], [], "needs an age identity"),
        ([RECIPIENT], [], "needs an age identity"),
        ([RECIPIENT], [OTHER_IDENTITY], "no age identity belongs to one of the recipients"),
        (["age1x"], [IDENTITY], "'age1x' is not an age recipient"),
        ([IDENTITY], [IDENTITY], "is given as a recipient"),
        ([RECIPIENT], [IDENTITY[:-1]], "this is not an age identity"),
        ([new_identity()[1] for _ in range(6)] + [RECIPIENT], [IDENTITY], "at most 6"),
    ],
)
def test_keys_that_cannot_work_are_refused_without_being_shown(
    recipients: list[str], identities: list[str], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        sealed(MemoryStore(), recipients=recipients, identities=identities)
    assert "AGE-SECRET-KEY-1" not in str(caught.value).replace("begins with AGE-SECRET-KEY-1 and", "")


def test_a_version_that_is_not_known_is_not_guessed() -> None:
    body = bytearray(stored(b"content"))
    body[8] = 2
    body[HEAD_SIZE - 8 : HEAD_SIZE] = xxhash.xxh3_64_intdigest(bytes(body[8 : HEAD_SIZE - 8])).to_bytes(8, "little")
    with pytest.raises(SealVersionUnknown, match="version 2"):
        holding(bytes(body)).get(KEY)


def test_a_large_file_is_encrypted_without_a_second_name_beside_it(tmp_path: Path) -> None:
    body = tmp_path / "snapshot.seg"
    body.write_bytes(os.urandom(9 << 20))
    seen: list[list[str]] = []
    inner = MemoryStore(before=lambda operation, key: seen.append([path.name for path in tmp_path.iterdir()]))
    info = opened(inner).put(KEY, body, if_none_match=True)
    assert info.size_bytes == 9 << 20
    assert content_size(inner.head(KEY).size_bytes) == 9 << 20
    assert opened(inner).get(KEY) == body.read_bytes()
    assert {name for names in seen for name in names} == {"snapshot.seg"}


@pytest.mark.parametrize("size", [1000, 9 << 20])
def test_an_answer_that_was_lost_is_found_by_the_retry_below(size: int, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(os.urandom(size))
    inner = MemoryStore()
    inner.fail_next("put", StoreUnavailable("the answer was lost"), after=True)
    store = opened(RetryStore(inner, Retrying(sleep=lambda s: None)))
    assert store.put(KEY, body, if_none_match=True).size_bytes == size
    assert store.get(KEY) == body.read_bytes()


def requests(inner: MemoryStore, act: Callable[[], object]) -> int:
    before = len(inner.calls)
    act()
    return len(inner.calls) - before


def test_the_head_is_fetched_once_and_with_what_is_near() -> None:
    body = stored(content_of(9 * CHUNK_SIZE))
    inner = MemoryStore()
    inner.put(KEY, body)
    store = opened(inner)
    assert requests(inner, lambda: store.get(KEY, offset=0, length=160)) == 1
    assert requests(inner, lambda: store.get(KEY, offset=8 * CHUNK_SIZE, length=160)) == 1
    fresh = opened(inner)
    assert requests(inner, lambda: fresh.get(KEY, offset=8 * CHUNK_SIZE, length=160)) == 2
    assert requests(inner, lambda: fresh.get(KEY, offset=8 * CHUNK_SIZE, length=160)) == 1
    assert requests(inner, lambda: opened(inner).get(KEY)) == 1


def test_keys_in_memory_are_bounded_and_those_used_last_stay() -> None:
    inner = MemoryStore()
    store = SealedStore(inner, Keys.parse([RECIPIENT], [IDENTITY]), KnownKeys(2))
    for name in "abc":
        store.put(name, content_of(9 * CHUNK_SIZE))
        store.get("a", offset=8 * CHUNK_SIZE, length=1)
    far = partial(store.get, offset=8 * CHUNK_SIZE, length=1)
    assert [requests(inner, partial(far, name)) for name in "acb"] == [1, 1, 2]


def test_what_other_programs_keep_there_is_read_without_encryption() -> None:
    inner = MemoryStore()
    assert bare(opened(inner)) is inner
    assert bare(inner) is inner


def test_identities_are_in_no_repr() -> None:
    store = opened(MemoryStore())
    assert "AGE-SECRET" not in repr(vars(store)) + repr(store)


def test_an_object_of_version_1_opens_in_every_later_release() -> None:
    about = json.loads((GOLDEN / "sealed-v1.json").read_text())
    inner = MemoryStore()
    inner.put(about["key"], (GOLDEN / "sealed-v1.bin").read_bytes())
    store = sealed(inner, identities=[about["identity"]])
    expected = (about["pattern"].encode() * CHUNK_SIZE)[: about["size_bytes"]]
    assert store.get(about["key"]) == expected
    assert store.get(about["key"], offset=-10) == expected[-10:]
    assert store.head(about["key"]).size_bytes == about["size_bytes"]
