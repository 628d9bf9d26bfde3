"""Claims about page hashes and the state checksum: docs/format.md, sections 4 and 5."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import LocalStateDamaged
from replicator.pagehash import StateHashes, hash_pages, lock_page, page_hash


@pytest.mark.parametrize(("page_size", "page_no"), [(512, 2097153), (4096, 262145), (65536, 16385)])
def test_the_lock_page_is_the_one_that_holds_byte_0x40000000(page_size: int, page_no: int) -> None:
    assert lock_page(page_size) == page_no
    assert (page_no - 1) * page_size <= 0x40000000 < page_no * page_size


def test_the_page_hash_is_xxh3_of_the_content_seeded_with_the_page_number() -> None:
    data = bytes(range(256)) * 2
    assert page_hash(3, data) == xxhash.xxh3_64_intdigest(data, seed=3)
    assert page_hash(3, memoryview(data)) != page_hash(4, data)


def test_the_page_hash_of_one_known_page_never_changes() -> None:
    assert page_hash(1, bytes(512)) == 0x8A3B11577F6F69DB


def test_the_lock_page_counts_nothing() -> None:
    assert page_hash(lock_page(65536), b"x" * 65536) == 0
    hashes = hash_pages(lock_page(65536) - 1, b"x" * (3 * 65536), 65536)
    assert [bool(h) for h in hashes] == [True, False, True]


@given(st.integers(1, 5000), st.integers(0, 20), st.sampled_from([512, 1024, 4096]))
def test_hashing_pages_in_bulk_is_the_same_as_hashing_each(first: int, count: int, page_size: int) -> None:
    data = random.Random(first).randbytes(count * page_size)
    each = [page_hash(first + i, data[i * page_size : (i + 1) * page_size]) for i in range(count)]
    assert hash_pages(first, data, page_size).tolist() == each


def test_a_page_that_is_cut_off_is_refused() -> None:
    with pytest.raises(ValueError, match="513 bytes"):
        hash_pages(1, bytes(513), 512)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("resize"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("set"), st.integers(1, 40), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("set_range"), st.integers(1, 40), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("copy"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(CHANGES)
def test_the_checksum_is_the_xor_of_all_hashes_after_any_changes(changes: list[tuple[str, int, int]]) -> None:
    state, model = StateHashes(), list[int]()
    for what, number, value in changes:
        if what == "resize":
            state.resize(number)
            model = (model + [0] * number)[:number]
        elif what == "set" and number <= len(model):
            state.set(number, value)
            model[number - 1] = value
        elif what == "set_range" and number <= len(model):
            values = [value ^ i for i in range(len(model) - number + 1)]
            state.set_range(number, np.array(values, dtype=np.uint64))
            model[number - 1 :] = values
        elif what == "copy":
            state = state.copy()
        assert state.hashes.tolist() == model
        assert state.page_count == len(model)
        assert state.checksum == int(np.bitwise_xor.reduce(np.array([0, *model], dtype=np.uint64)))


def test_pages_outside_the_database_are_refused() -> None:
    state = StateHashes(3)
    for page_no in (0, -1, 4):
        with pytest.raises(IndexError):
            state.get(page_no)
        with pytest.raises(IndexError):
            state.set(page_no, 1)
    with pytest.raises(IndexError):
        state.set_range(3, np.array([1, 2], dtype=np.uint64))
    assert state.checksum == 0


def test_a_copy_does_not_follow_its_original() -> None:
    state = StateHashes(2)
    twin = state.copy()
    state.set(1, 5)
    assert (twin.get(1), twin.checksum) == (0, 0)


def test_hashes_cannot_be_changed_past_the_checksum() -> None:
    with pytest.raises(ValueError, match="read-only"):
        StateHashes(2).hashes[0] = 1


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30))
def test_the_stored_form_gives_the_same_hashes_back(hashes: list[int]) -> None:
    state = StateHashes(len(hashes))
    state.set_range(1, np.array(hashes, dtype=np.uint64))
    again = StateHashes.from_bytes(state.to_bytes())
    assert again.hashes.tolist() == hashes
    assert again.checksum == state.checksum
    again.resize(len(hashes) + 1)
    again.set(len(hashes) + 1, 9)
    assert again.checksum == state.checksum ^ 9


def test_every_truncation_and_bit_flip_of_the_stored_form_is_noticed() -> None:
    state = StateHashes(4)
    state.set_range(1, np.array([11, 22, 33, 44], dtype=np.uint64))
    data = state.to_bytes()
    broken = [data[:n] for n in range(len(data))] + [data + b"\0" * 8]
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    for damaged in broken:
        with pytest.raises(LocalStateDamaged):
            StateHashes.from_bytes(damaged)
