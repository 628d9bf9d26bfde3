"""SQLite's b-trees as far as a comparison needs them: which tree a page belongs to, and which rowids are below it. Pure.

Owns the reading of b-tree pages. Never decodes a record, never writes a page.
Source: sqlite.org/fileformat2.html, sections 1.3, 1.5, 1.6 and 1.8.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replicator.pagehash import lock_page

MOST_TOLD_APART = 1 << 25
"""Pages of a database in which the first byte of a page on which a row goes on is never that of a b-tree page."""

ReadPage = Callable[[int], bytes | memoryview]
"""page number -> the page."""

_INDEX_INTERIOR, _TABLE_INTERIOR, _INDEX_LEAF, _TABLE_LEAF = 2, 5, 10, 13
_KINDS = frozenset((_INDEX_INTERIOR, _TABLE_INTERIOR, _INDEX_LEAF, _TABLE_LEAF))
_HEADER_BYTES = 100
_MOST_LEVELS = 20


class TreeDamaged(Exception):
    """The pages are not those of a b-tree."""


@dataclass(frozen=True)
class Span:
    """A page of a table's tree: rows with a rowid above ``low`` and up to ``high`` are below it, and nowhere else; None: no bound."""

    page_no: int
    low: int | None = None
    high: int | None = None


class DatabasePages:
    """The pages of one database image, read by ``read``. Every method raises TreeDamaged for pages that make no sense."""

    def __init__(self, read: ReadPage, page_count: int) -> None:
        """The database has at least one page."""
        self._read = read
        self.page_count = page_count
        header = bytes(read(1)[:_HEADER_BYTES])
        self._page_size = len(read(1))
        self._usable = self._page_size - header[20]
        self._first_trunk = int.from_bytes(header[32:36], "big")
        self._auto_vacuum = any(header[52:56])
        self._inner: dict[int, Node] = {}
        self._depths: dict[int, int] = {}

    def pages_of(self, root: int) -> set[int]:
        """All pages of a tree but those on which rows go on. Reads the inner pages only: all leaves are equally deep."""
        level, found = [root], {root}
        for _ in range(self._depth(root)):
            level = [child for page_no in level for child in self._inner_node(page_no).children]
            _require(len(found) + len(level) <= self.page_count, root)
            found.update(level)
        return found

    def node(self, page_no: int) -> Node | None:
        """The page as one of a tree; None when it does not begin like one."""
        page = bytes(self._page(page_no))
        at = _HEADER_BYTES if page_no == 1 else 0
        if page[at] not in _KINDS:
            return None
        try:
            return Node.parse(page, at, self._usable)
        except (IndexError, struct.error):
            raise TreeDamaged(f"page {page_no} is not a page of a b-tree") from None

    def find(self, root: int, page_no: int, rowid: int) -> Span | None:
        """The page in the tree of a table, if it is on the way to ``rowid``. Reads the inner pages on that way only."""
        depth, place = self._depth(root), Span(root)
        for _ in range(depth):
            if place.page_no == page_no:
                return place
            node = self._inner_node(place.page_no)
            if not node.by_rowid:
                return None
            place = node.spans(place)[bisect_left(node.keys, rowid)]
        return place if place.page_no == page_no else None

    def _depth(self, root: int) -> int:
        """How many inner pages are on the way to a leaf."""
        if root not in self._depths:
            depth, node = 0, self._known_node(root)
            while not node.leaf:
                depth += 1
                _require(depth < _MOST_LEVELS, root)
                node = self._known_node(node.children[0])
            self._depths[root] = depth
        return self._depths[root]

    def _inner_node(self, page_no: int) -> Node:
        if page_no not in self._inner:
            node = self._known_node(page_no)
            _require(not node.leaf, page_no)
            self._inner[page_no] = node
        return self._inner[page_no]

    def _known_node(self, page_no: int) -> Node:
        node = self.node(page_no)
        if node is None:
            raise TreeDamaged(f"page {page_no} is not a page of a b-tree")
        return node

    def overflow_of(self, node: Node) -> Iterator[int]:
        """The pages on which rows or keys of a page go on."""
        for following in node.overflow:
            for _ in range(self.page_count):
                if not following:
                    break
                yield following
                following = int.from_bytes(self._page(following)[:4], "big")

    def free(self) -> Iterator[int]:
        """The pages that are not in use, and those that list them."""
        trunk = self._first_trunk
        for _ in range(self.page_count):
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
            yield from (page_no + (page_no == lock) for page_no in range(2, self.page_count + 1, step))

    def _page(self, page_no: int) -> bytes | memoryview:
        _require(1 <= page_no <= self.page_count, page_no)
        return self._read(page_no)


@dataclass(frozen=True)
class Node:
    """One page of a tree. by_rowid: of a table with rowids, else of an index or of a table without them.

    children: pages; keys: the rowids of a table's page, in an inner one the highest below each child but the last; overflow:
    the pages on which its rows or keys go on, the first of each.
    """

    leaf: bool
    by_rowid: bool
    children: tuple[int, ...]
    keys: tuple[int, ...]
    overflow: tuple[int, ...]

    @classmethod
    def parse(cls, page: bytes, at: int, usable: int) -> Node:
        """at: where the header of the b-tree page is. Raises IndexError, struct.error."""
        kind, _, cells = struct.unpack_from(">BHH", page, at)
        leaf, by_rowid = kind in (_INDEX_LEAF, _TABLE_LEAF), kind in (_TABLE_INTERIOR, _TABLE_LEAF)
        children: list[int] = []
        keys: list[int] = []
        overflow: list[int] = []
        for start in struct.unpack_from(f">{cells}H", page, at + (8 if leaf else 12)):
            place = start
            if not leaf:
                children.append(_u32(page, start))
                place += 4
            size = 0
            if kind != _TABLE_INTERIOR:
                size, place = _varint(page, place)
            if by_rowid:
                key, place = _varint(page, place)
                keys.append(key)
            local = _local(size, usable, by_rowid)
            if local < size:
                overflow.append(_u32(page, place + local))
        if not leaf:
            children.append(_u32(page, at + 8))
        return cls(leaf, by_rowid, tuple(children), tuple(keys), tuple(overflow))

    def spans(self, place: Span) -> list[Span]:
        """The children of an inner page of a table, that is at ``place``."""
        bounds = [place.low, *self.keys, place.high]
        return [Span(child, low, high) for child, low, high in zip(self.children, bounds, bounds[1:], strict=False)]


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
