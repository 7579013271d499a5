"""Prefix tree over full pages: which pages hold the K/V of which token prefix.

Hides keys (SHA-256 chained over parent key and tokens, the salt at the root), longest-prefix search with holes in
windowed groups, and removal. It holds page numbers; references and the eviction order are the pools'.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from operator import attrgetter
from typing import NamedTuple

BYTES_PER_TOKEN = 4


class Node:
    """One full page of tokens after its parent's. `pages[group]` is 0 where that group's page is gone."""

    __slots__ = ("alive", "children", "index", "key", "num_tips", "pages", "parent", "tokens")

    def __init__(self, key: bytes, parent: Node | None, tokens: bytes, pages: list[int]):
        self.key = key
        self.parent = parent
        self.index: int = -1 if parent is None else parent.index + 1  # its page is the index-th of a sequence
        self.tokens = tokens
        self.pages = pages
        self.children: list[Node] = []  # sorted by tokens: neighbours share the longest prefix
        self.num_tips = 0  # sequences that will insert below this node
        self.alive = True


_BY_TOKENS = attrgetter("tokens")


class Match(NamedTuple):
    """Cached rows: the full pages of `path`, then `partial_rows` rows of `partial`'s page."""

    root: Node
    path: list[Node]
    partial: Node | None
    partial_rows: int


class PrefixTree:
    """windows: per page group, the tokens a query sees (None = all)."""

    def __init__(self, windows: Seq[int | None], page_size: int, forget_page: Callable[[Node, int, int], None]):
        """`forget_page(node, group, page)` is called for every page the tree lets go of."""
        self._windows = tuple(windows)
        self._unwindowed = tuple(group for group, window in enumerate(windows) if window is None)
        self._windowed = tuple((group, window) for group, window in enumerate(windows) if window is not None)
        self._page_size = page_size
        self._forget_page = forget_page
        self._pack_page = struct.Struct(f">{page_size}I").pack
        self._nodes: dict[bytes, Node] = {}  # roots included

    def root(self, salt: str) -> Node:
        """The root for this salt; made on demand, gone again when it has neither children nor tips."""
        key = hashlib.sha256(b"jaxinfer prefix root\0" + salt.encode()).digest()
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(key, None, b"", [0] * len(self._windows))
        return node

    def encode_page(self, tokens: Seq[int]) -> bytes:
        """`encode_tokens` of exactly one page."""
        return self._pack_page(*tokens)

    def child(self, parent: Node, tokens: bytes, pages: list[int]) -> tuple[Node, bool]:
        """The child of `parent` for one more full page of encoded tokens, and whether it is new: then it got `pages`.

        pages: per group, 0 = none.
        """
        key = hashlib.sha256(parent.key + tokens).digest()
        node = self._nodes.get(key)
        if node is not None:
            return node, False
        node = self._nodes[key] = Node(key, parent, tokens, pages)
        if parent.children:
            insort(parent.children, node, key=_BY_TOKENS)
        else:
            parent.children.append(node)
        return node, True

    def match(self, data: bytes, salt: str) -> Match:
        """The longest usable cached prefix of `data` (encoded tokens).

        r rows are usable when every unwindowed group has all their pages, and every windowed one those with the
        rows (r - window, r) that a query at position r sees.
        """
        root = self.root(salt)
        page_bytes = self._page_size * BYTES_PER_TOKEN
        node, num_usable = root, 0
        path: list[Node] = []
        run_start = [0] * len(self._windows)  # first page of the unbroken run that ends at the current depth
        key = root.key
        while len(data) - len(path) * page_bytes >= page_bytes:
            key = hashlib.sha256(key + data[len(path) * page_bytes : (len(path) + 1) * page_bytes]).digest()
            found = self._nodes.get(key)
            if found is None or any(not found.pages[group] for group in self._unwindowed):
                break
            node = found
            path.append(node)
            for group, _ in self._windowed:
                if not node.pages[group]:
                    run_start[group] = len(path)
            if self._covers(len(path) * self._page_size, run_start):
                num_usable = len(path)
        if num_usable == len(path):
            for child, rows in self._closest_children(node, data[len(path) * page_bytes :]):
                if all(child.pages) and self._covers(len(path) * self._page_size + rows, run_start):
                    return Match(root, path, child, rows)
        return Match(root, path[:num_usable], None, 0)

    def _covers(self, num_rows: int, run_start: list[int]) -> bool:
        return all(
            run_start[group] * self._page_size <= max(0, num_rows - window + 1) for group, window in self._windowed
        )

    def _closest_children(self, node: Node, data: bytes) -> Iterator[tuple[Node, int]]:
        """Children that share leading tokens with `data`, with how many (at most a page less one); best first."""
        children = node.children
        at = bisect_left(children, data, key=_BY_TOKENS)
        shared = [(_common_tokens(children[i].tokens, data), i) for i in (at, at - 1) if 0 <= i < len(children)]
        for rows, i in sorted(shared, reverse=True):
            if rows:
                yield children[i], rows

    def drop_page(self, node: Node, group: int) -> None:
        """Let go of one page. Without its page of an unwindowed group no hit passes a node: it and all below it go."""
        if self._windows[group] is None:
            self.remove(node)
            return
        page, node.pages[group] = node.pages[group], 0
        self._forget_page(node, group, page)
        self.prune(node)

    def remove(self, node: Node) -> None:
        """Take a node and everything below it out of the tree."""
        parent = node.parent
        self._unlink(node)
        stack = [node]
        while stack:
            gone = stack.pop()
            gone.alive = False
            self._nodes.pop(gone.key, None)
            stack += gone.children
            for group, page in enumerate(gone.pages):
                if page:
                    gone.pages[group] = 0
                    self._forget_page(gone, group, page)
        if parent is not None:
            self.prune(parent)

    def prune(self, node: Node | None) -> None:
        """Remove nodes that hold nothing, from here towards the root."""
        while node is not None and node.alive and not node.children and not node.num_tips and not any(node.pages):
            parent = node.parent
            self._unlink(node)
            node.alive = False
            del self._nodes[node.key]
            node = parent

    @staticmethod
    def _unlink(node: Node) -> None:
        if node.parent is not None:
            siblings = node.parent.children
            del siblings[bisect_left(siblings, node.tokens, key=_BY_TOKENS)]

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included."""
        return iter(self._nodes.values())

    def check(self) -> None:
        """AssertionError names the node that is out of order."""
        for key, node in self._nodes.items():
            where = f"prefix node {key.hex()[:12]}"
            assert node.alive and node.key == key, f"{where}: dead or misfiled"
            assert node.children or node.num_tips or any(node.pages), f"{where}: holds nothing"
            order = [child.tokens for child in node.children]
            assert order == sorted(set(order)), f"{where}: order of children"
            for child in node.children:
                assert child.parent is node and self._nodes.get(child.key) is child, f"{where}: a child not filed"
                assert child.index == node.index + 1, f"{where}: a child's depth"
                assert child.key == hashlib.sha256(key + child.tokens).digest(), f"{where}: a child's key"
            if node.parent is not None:
                assert node in node.parent.children, f"{where}: not its parent's child"
                for group in self._unwindowed:
                    assert node.pages[group] or node.num_tips, f"{where}: no page of unwindowed group {group}"


def encode_tokens(tokens: Seq[int]) -> bytes:
    """Token ids (0 to 2^32 - 1) as big-endian 32-bit words."""
    return struct.pack(f">{len(tokens)}I", *tokens)


def _common_tokens(a: bytes, b: bytes) -> int:
    """Leading tokens that two encodings share."""
    num_bytes = min(len(a), len(b))
    if a[:num_bytes] == b[:num_bytes]:
        return num_bytes // BYTES_PER_TOKEN
    first = next(i for i in range(num_bytes) if a[i] != b[i])
    return first // BYTES_PER_TOKEN
