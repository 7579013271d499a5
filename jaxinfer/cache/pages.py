"""Page pools: which page is free, used by sequences, or kept only by the prefix tree. One per group and context shard.

Hides reference counts, the free list and the least-recently-used order of evictable pages. Every operation is O(1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxinfer.cache.prefix_tree import Node


@dataclass(slots=True, unsafe_hash=True)  # not frozen: that trebles the time to make one, and plans make many
class Cell:
    """A sequence's index-th page of that group, on context shard `index % context`; page 0: slid out of the window."""

    group: int
    index: int
    page: int


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy-on-write: the target page gets the source page's content before anything is written to it."""

    group: int
    source: int
    target: int
    shard: int = 0  # the context shard that both pages are on


class PoolUsage(NamedTuple):
    """Pages of one pool or more; `total` leaves out page 0 of each, the trash page: free + used + cached = total."""

    total: int
    free: int
    used: int  # referenced by a running sequence, or pinned
    cached: int  # held by the prefix tree alone; evicted when a page is needed

    @classmethod
    def add(cls, shards: Iterable[Iterable[PoolUsage]]) -> tuple[PoolUsage, ...]:
        """Per group, the sums over shards. shards: one PoolUsage per group each."""
        groups = zip(*shards, strict=True)
        return tuple(cls(*(sum(counts) for counts in zip(*group, strict=True))) for group in groups)


class PagePool:
    """Pages 1 .. num_pages - 1 of one group on one context shard. Page 0 is the trash page and is never handed out.

    A page is in exactly one state: free; used (`references[page]` > 0, with or without a tree node);
    cached (no reference, but `nodes[page]` is a tree node; then it is in the eviction order).
    """

    __slots__ = ("_evict", "_evictable", "free", "group", "name", "nodes", "num_pages", "num_returns", "references")

    def __init__(self, name: str, group: int, num_pages: int, evict: Callable[[Node, int], None]):
        """`evict(node, group)` must detach every page it drops through `forget`, the asked one included."""
        self.name = name
        self.group = group
        self.num_pages = num_pages
        self._evict = evict
        self.num_returns = 0  # how often a page became available; lets a caller see that a retry is worth it
        self.clear()

    def clear(self) -> None:
        """All pages free."""
        self.references = [0] * self.num_pages
        self.nodes: list[Node | None] = [None] * self.num_pages
        self.free = list(range(self.num_pages - 1, 0, -1))  # a stack
        self._evictable: dict[int, None] = {}  # insertion order is eviction order
        self.num_returns += 1

    @property
    def num_available(self) -> int:
        """Pages that `take` could hand out: free ones and evictable ones."""
        return len(self.free) + len(self._evictable)

    def take(self) -> int:
        """A page with one reference; evicts the least recently used cached page when none is free."""
        if not self.free:
            victim = next(iter(self._evictable))
            node = self.nodes[victim]
            assert node is not None, f"{self.name}: evictable page {victim} has no tree node"
            self._evict(node, self.group)
        page = self.free.pop()
        self.references[page] = 1
        return page

    def reference(self, page: int) -> None:
        """One more user of a used or cached page."""
        if self.references[page] == 0:
            del self._evictable[page]
        self.references[page] += 1

    def unreference(self, page: int) -> None:
        """One user less; the last one leaves the page to the tree (most recently used) or frees it."""
        left = self.references[page] - 1
        assert left >= 0, f"{self.name}: page {page} has no reference to give back"
        self.references[page] = left
        if left == 0:
            self.num_returns += 1
            if self.nodes[page] is None:
                self.free.append(page)
            else:
                self._evictable[page] = None

    def forget(self, page: int) -> None:
        """The tree lets go of this page; it is freed when nobody uses it."""
        self.nodes[page] = None
        if self.references[page] == 0:
            del self._evictable[page]
            self.free.append(page)
            self.num_returns += 1

    def usage(self) -> PoolUsage:
        total, free, cached = self.num_pages - 1, len(self.free), len(self._evictable)
        return PoolUsage(total, free, total - free - cached, cached)

    def check(self, references: list[int], nodes: list[Node | None]) -> None:
        """Compare with counts taken from the sequences, pins and the tree; AssertionError names the page."""
        free = set(self.free)
        assert len(free) == len(self.free), f"{self.name}: a page is free twice"
        for page in range(self.num_pages):
            where = f"{self.name} page {page}"
            expected, node = references[page], nodes[page]
            assert self.references[page] == expected, f"{where}: {self.references[page]} references, {expected} users"
            assert self.nodes[page] is node, f"{where}: the pool and the tree disagree about its node"
            in_use, cached = expected > 0, expected == 0 and node is not None
            if page == 0:
                assert not in_use and node is None and page not in free, f"{where}: the trash page was handed out"
                continue
            assert (page in self._evictable) == cached, f"{where}: cached is {cached}, evictable is {not cached}"
            assert (page in free) == (not in_use and not cached), f"{where}: lost, or free while in use"
