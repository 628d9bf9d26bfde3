"""Page hashes and the state checksum made of them. Pure.

Owns docs/format.md, sections 4 and 5. Never reads a file: whoever has the pages hands them in.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from replicator.errors import LocalStateDamaged

_LOCK_BYTE = 0x40000000
_CHECKSUM_BYTES = 8


def lock_page(page_size: int) -> int:
    """Number of the page that SQLite never uses; no segment holds it, and it counts nothing in a state checksum.

    Source: docs/format.md, section 5; sqlite.org/fileformat2.html, section 1.4.
    """
    return _LOCK_BYTE // page_size + 1


def page_hash(page_no: int, data: bytes | bytearray | memoryview) -> int:
    """Hash of one whole page; 0 for the lock page, so that nobody can count it by mistake.

    Source: docs/format.md, section 4.
    """
    if page_no == lock_page(len(data)):
        return 0
    return xxhash.xxh3_64_intdigest(data, page_no)


def hash_pages(first_page_no: int, data: bytes | bytearray | memoryview, page_size: int) -> NDArray[np.uint64]:
    """Hashes of consecutive pages, the first of them ``first_page_no``; the same as ``page_hash`` of each.

    data: whole pages. Raises ValueError when a page is cut off.
    """
    view = memoryview(data).cast("B")
    count, rest = divmod(len(view), page_size)
    if rest:
        raise ValueError(f"{len(view)} bytes are not whole pages of {page_size} bytes")
    digest = xxhash.xxh3_64_intdigest
    hashes = np.fromiter(
        (digest(view[at : at + page_size], first_page_no + i) for i, at in enumerate(range(0, len(view), page_size))),
        dtype=np.uint64,
        count=count,
    )
    lock = lock_page(page_size) - first_page_no
    if 0 <= lock < count:
        hashes[lock] = 0
    return hashes


class StateHashes:
    """The hash of every page of one state of a database, and their XOR, which is its state checksum.

    A page that was added by ``resize`` counts as 0 until it is set, so set every new page before ``checksum`` is used.
    The lock page stays 0, which is what ``page_hash`` gives for it. Not for use by two threads at once.
    """

    def __init__(self, page_count: int = 0) -> None:
        self._hashes: NDArray[np.uint64] = np.zeros(
            page_count, dtype=np.uint64
        )  # has spare room beyond page_count, all 0
        self._page_count = page_count
        self._checksum = 0

    @property
    def page_count(self) -> int:
        return self._page_count

    @property
    def checksum(self) -> int:
        """The state checksum, kept up with every change."""
        return self._checksum

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """Read-only view of all hashes, page 1 first; valid until the next ``resize``."""
        view = self._hashes[: self._page_count]
        view.flags.writeable = False
        return view

    def get(self, page_no: int) -> int:
        """Raises IndexError for a page that the database does not have."""
        return int(self._hashes[self._index(page_no)])

    def set(self, page_no: int, page_hash: int) -> None:
        """Raises IndexError for a page that the database does not have: ``resize`` first."""
        index = self._index(page_no)
        self._checksum ^= int(self._hashes[index]) ^ page_hash
        self._hashes[index] = page_hash

    def set_range(self, first_page_no: int, hashes: NDArray[np.uint64]) -> None:
        """Set consecutive pages at once. Raises IndexError when one of them is not in the database."""
        if not len(hashes):
            return
        place = slice(self._index(first_page_no), self._index(first_page_no + len(hashes) - 1) + 1)
        self._checksum ^= _xor(self._hashes[place]) ^ _xor(hashes)
        self._hashes[place] = hashes

    def set_many(self, page_nos: NDArray[np.uint32], hashes: NDArray[np.uint64]) -> None:
        """Set these pages, each named once. Raises IndexError when one of them is not in the database."""
        if not len(page_nos):
            return
        self._index(int(page_nos.min()))
        self._index(int(page_nos.max()))
        places = page_nos - 1
        self._checksum ^= _xor(self._hashes[places]) ^ _xor(hashes)
        self._hashes[places] = hashes

    def resize(self, page_count: int) -> None:
        """Grow (new pages count as 0 until they are set) or shrink (dropped pages no longer count)."""
        if page_count < self._page_count:
            dropped = self._hashes[page_count : self._page_count]
            self._checksum ^= _xor(dropped)
            dropped[:] = 0
        elif page_count > len(self._hashes):
            roomier = np.zeros(max(page_count, len(self._hashes) * 5 // 4), dtype=np.uint64)
            roomier[: self._page_count] = self._hashes[: self._page_count]
            self._hashes = roomier
        self._page_count = page_count

    def copy(self) -> StateHashes:
        twin = StateHashes()
        twin._hashes = self._hashes[: self._page_count].copy()
        twin._page_count = self._page_count
        twin._checksum = self._checksum
        return twin

    def to_bytes(self) -> bytes:
        """The form that is kept in the local state: docs/format.md, section 4."""
        body = self._hashes[: self._page_count].astype("<u8").tobytes()
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> StateHashes:
        """Raises LocalStateDamaged when a byte is missing or wrong."""
        body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if len(data) % 8 or int.from_bytes(checksum, "little") != xxhash.xxh3_64_intdigest(body) or not data:
            raise LocalStateDamaged(
                f"the page hashes ({len(data)} bytes) are damaged; remove the file and a new snapshot is taken"
            )
        state = cls()
        state._hashes = np.frombuffer(body, dtype="<u8").astype(np.uint64)
        state._page_count = len(state._hashes)
        state._checksum = _xor(state._hashes)
        return state

    def _index(self, page_no: int) -> int:
        if not 1 <= page_no <= self._page_count:
            raise IndexError(f"page {page_no} is not one of the {self._page_count} pages of the database")
        return page_no - 1


def _xor(hashes: NDArray[np.uint64]) -> int:
    return int(np.bitwise_xor.reduce(hashes)) if len(hashes) else 0
