"""SQLite's b-trees as far as a comparison needs them: which pages belong to a tree, and which rowids a leaf may hold. Pure.

Owns the reading of b-tree pages. Never decodes a record, never writes a page.
Source: sqlite.org/fileformat2.html, sections 1.3, 1.5, 1.6 and 1.8.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replicator.pagehash import lock_page

ReadPage = Callable[[int], bytes | memoryview]
"""page number -> the page."""

_INDEX_INTERIOR, _TABLE_INTERIOR, _INDEX_LEAF, _TABLE_LEAF = 2, 5, 10, 13
_HEADER_BYTES = 100
_MOST_LEVELS = 20


class TreeDamaged(Exception):
    """The pages are not those of a b-tree."""


@dataclass(frozen=True)
class Leaf:
    """A leaf of a table: rows with a rowid above ``low`` and up to ``high`` are in it, and nowhere else; None: no bound."""

    page_no: int
    low: int | None
    high: int | None


@dataclass(frozen=True)
class Tree:
    """inner: the pages that lead to the leaves. by_rowid: a table with rowids; else an index, or a table without."""

    by_rowid: bool
    inner: tuple[int, ...]
    leaves: tuple[Leaf, ...]

    @property
    def page_nos(self) -> set[int]:
        """All but overflow pages."""
        return {*self.inner, *(leaf.page_no for leaf in self.leaves)}


class DatabasePages:
    """The pages of one database image, read by ``read``. Every method raises TreeDamaged for pages that make no sense."""

    def __init__(self, read: ReadPage, page_count: int) -> None:
        """The database has at least one page."""
        self._read = read
        self._page_count = page_count
        header = bytes(read(1)[:_HEADER_BYTES])
        self._page_size = len(read(1))
        self._usable = self._page_size - header[20]
        self._first_trunk = int.from_bytes(header[32:36], "big")
        self._auto_vacuum = any(header[52:56])

    def tree(self, root: int) -> Tree:
        """Reads the inner pages only: all leaves are equally deep."""
        depth = 0
        node = first = self._node(root)
        while not node.leaf:
            depth += 1
            node = self._node(node.children[0][0])
            _require(depth < _MOST_LEVELS, root)
        inner: list[int] = []
        leaves: list[Leaf] = []
        pending: list[tuple[Leaf, int]] = [(Leaf(root, None, None), depth)]
        while pending:
            place, level = pending.pop()
            if level == 0:
                leaves.append(place)
                continue
            inner.append(place.page_no)
            _require(len(inner) <= self._page_count, root)
            node = self._node(place.page_no)
            _require(not node.leaf and node.by_rowid == first.by_rowid, place.page_no)
            pending += [(leaf, level - 1) for leaf in reversed(list(_between(node.children, place)))]
        return Tree(first.by_rowid, tuple(inner), tuple(leaves))

    def overflow_of(self, page_no: int) -> Iterator[int]:
        """The pages on which rows or keys of this b-tree page go on."""
        for following in self._node(page_no).overflow:
            for _ in range(self._page_count):
                if not following:
                    break
                yield following
                following = int.from_bytes(self._page(following)[:4], "big")

    def free(self) -> Iterator[int]:
        """The pages that are not in use, and those that list them."""
        trunk = self._first_trunk
        for _ in range(self._page_count):
            if not trunk:
                return
            yield trunk
            page = self._page(trunk)
            following, count = struct.unpack_from(">II", page)
            _require(8 + 4 * count <= len(page), trunk)
            yield from struct.unpack_from(f">{count}I", page, 8)
            trunk = following

    def pointer_maps(self) -> Iterator[int]:
        """The pages that an auto-vacuum keeps up."""
        if self._auto_vacuum:
            lock = lock_page(self._page_size)
            step = self._usable // 5 + 1
            yield from (page_no + (page_no == lock) for page_no in range(2, self._page_count + 1, step))

    def _page(self, page_no: int) -> bytes | memoryview:
        _require(1 <= page_no <= self._page_count, page_no)
        return self._read(page_no)

    def _node(self, page_no: int) -> _Node:
        try:
            return _Node.parse(bytes(self._page(page_no)), _HEADER_BYTES if page_no == 1 else 0, self._usable)
        except (IndexError, struct.error):
            raise TreeDamaged(f"page {page_no} is not a page of a b-tree") from None


@dataclass(frozen=True)
class _Node:
    """children: page and the highest rowid below it; None for the last, and in an index. overflow: first pages of chains."""

    leaf: bool
    by_rowid: bool
    children: tuple[tuple[int, int | None], ...]
    overflow: tuple[int, ...]

    @classmethod
    def parse(cls, page: bytes, at: int, usable: int) -> _Node:
        kind, _, cells, _, _ = struct.unpack_from(">BHHHB", page, at)
        if kind not in (_INDEX_INTERIOR, _TABLE_INTERIOR, _INDEX_LEAF, _TABLE_LEAF):
            raise IndexError(kind)
        leaf = kind in (_INDEX_LEAF, _TABLE_LEAF)
        by_rowid = kind in (_TABLE_INTERIOR, _TABLE_LEAF)
        children: list[tuple[int, int | None]] = []
        overflow: list[int] = []
        for start in struct.unpack_from(f">{cells}H", page, at + (8 if leaf else 12)):
            if not leaf:
                key = _varint(page, start + 4)[0] if by_rowid else None
                children.append((_u32(page, start), key))
            if kind != _TABLE_INTERIOR:
                size, place = _varint(page, start if leaf else start + 4)
                place = _varint(page, place)[1] if by_rowid else place
                local = _local(size, usable, by_rowid)
                if local < size:
                    overflow.append(_u32(page, place + local))
        if not leaf:
            children.append((_u32(page, at + 8), None))
        return cls(leaf, by_rowid, tuple(children), tuple(overflow))


def _between(children: tuple[tuple[int, int | None], ...], parent: Leaf) -> Iterator[Leaf]:
    low = parent.low
    for page_no, key in children:
        yield Leaf(page_no, low, parent.high if key is None else key)
        low = key


def _local(size: int, usable: int, by_rowid: bool) -> int:
    """How much of a payload is on the page itself."""
    most = usable - 35 if by_rowid else (usable - 12) * 64 // 255 - 23
    if size <= most:
        return size
    least = (usable - 12) * 32 // 255 - 23
    local = least + (size - least) % (usable - 4)
    return local if local <= most else least


def _u32(page: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", page, at)[0])


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """The number, as a signed one of 64 bits, and where it ends."""
    value = 0
    for i in range(8):
        byte = page[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    value = value << 8 | page[at + 8]
    return value - (1 << 64) if value >> 63 else value, at + 9


def _require(condition: bool, page_no: int) -> None:
    if not condition:
        raise TreeDamaged(f"page {page_no} is not where a b-tree leads")
