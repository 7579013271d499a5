"""CacheManager: which K/V pages each sequence owns, shares and may reuse.

Hides page pools per group and context shard, the prefix tree, copy-on-write, eviction and the return of pages that
slid out of a window. Rows are K/V rows of a sequence; row i is the token at position i.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from jaxinfer.cache.pages import Cell, PageCopy, PagePool, PoolUsage
from jaxinfer.cache.prefix_tree import Node, PrefixTree, encode_tokens
from jaxinfer.config import PageGroup


@dataclass(frozen=True, slots=True)
class Acquired:
    """A registered sequence's cached prefix."""

    num_cached_tokens: int
    cells: tuple[Cell, ...]
    copies: tuple[PageCopy, ...]


class _Holding:
    """What one sequence holds."""

    __slots__ = ("num_committed", "num_slid", "tables", "tip")

    def __init__(self, tables: list[list[int]], num_slid: list[int], num_committed: int, tip: Node | None):
        self.tables = tables  # per group: page of each index, 0 = slid out
        self.num_slid = num_slid  # per group: leading cells that are 0
        self.num_committed = num_committed  # full pages offered to the tree
        self.tip = tip  # tree node of the last of them; None = this sequence offers no (more) pages


class CacheManager:
    """Pages for running sequences, and what is left of finished ones.

    A copy's source page stays as it is until `end_copies`, which the caller calls once the call that performs the
    copies was dispatched. Device calls run in dispatch order, so a page that came back may be handed out at once.
    """

    def __init__(
        self,
        groups: Seq[PageGroup],
        num_pages: Seq[int],
        page_size: int,
        *,
        prefix_caching: bool = True,
        context: int = 1,
    ):
        """num_pages: per group, of each context shard, page 0 (trash) included.

        context: the number of context shards. The i-th page of a sequence is on shard `i % context`, under a number
        that counts in that shard's pool alone.
        """
        if len(groups) != len(num_pages) or not groups or min(num_pages) < 2:
            raise ValueError(f"num_pages={tuple(num_pages)} must give at least 2 pages to each of {len(groups)} groups")
        if context < 1:
            raise ValueError(f"context={context} must be at least 1")
        self.page_size = page_size
        self.windows = tuple(group.window for group in groups)
        self.prefix_caching = prefix_caching
        self.context = context
        self._pools = [  # by context shard, then by group
            [
                PagePool(f"group {group}" + (f" shard {shard}" if context > 1 else ""), group, count, self._evict)
                for group, count in enumerate(num_pages)
            ]
            for shard in range(context)
        ]
        self._every_pool = [pool for pools in self._pools for pool in pools]
        self._windowed = [group for group, window in enumerate(self.windows) if window is not None]
        self._clear()

    def _clear(self) -> None:
        self._tree = PrefixTree(self.windows, self.page_size, self._forget_page)
        self._holdings: dict[int, _Holding] = {}
        self._pins: list[tuple[int, int, int, int]] = []  # (sequence, shard, group, page) of copy sources

    def _evict(self, node: Node, group: int) -> None:
        self._tree.drop_page(node, group)

    def _forget_page(self, node: Node, group: int, page: int) -> None:
        self._pools[node.index % self.context][group].forget(page)

    def acquire(self, seq_id: int, tokens: Seq[int], *, salt: str = "", most_rows: int | None = None) -> Acquired:
        """Register a sequence and give it the longest cached prefix of its tokens, at most len(tokens) - 1 rows.

        most_rows: a lower limit, for who needs the later rows computed.
        Full pages are shared. The page in which the match ends is copied, unless the pool has no page for the copy.
        """
        assert seq_id not in self._holdings, f"sequence {seq_id} is registered already"
        num_groups = len(self.windows)
        if not self.prefix_caching:
            self._holdings[seq_id] = _Holding([[] for _ in range(num_groups)], [0] * num_groups, 0, None)
            return Acquired(0, (), ())
        limit = len(tokens) - 1 if most_rows is None else min(most_rows, len(tokens) - 1)
        match = self._tree.match(encode_tokens(tokens[:limit]), salt)
        num_full = len(match.path)
        tip = match.path[-1] if match.path else match.root
        tip.num_tips += 1
        holding = _Holding([], [0] * num_groups, num_full, tip)
        for group in range(num_groups):
            num_slid = holding.num_slid[group] = self._num_slid(group, num_full * self.page_size)
            table = [0] * num_slid
            for node in match.path[num_slid:]:
                self._pools[node.index % self.context][group].reference(node.pages[group])
                table.append(node.pages[group])
            holding.tables.append(table)
        copies = () if match.partial is None else self._copy_page(seq_id, match.partial, holding.tables)
        num_rows = num_full * self.page_size + (match.partial_rows if copies else 0)
        self._return_slid(holding, num_rows)
        self._holdings[seq_id] = holding
        tables = enumerate(holding.tables)
        cells = tuple(Cell(group, i, page) for group, table in tables for i, page in enumerate(table) if page)
        return Acquired(num_rows, cells, copies)

    def _num_slid(self, group: int, num_rows: int) -> int:
        """Leading pages that no query at a position >= num_rows sees: it sees rows (position - window, position]."""
        window = self.windows[group]
        return 0 if window is None or num_rows < window else (num_rows - window + 1) // self.page_size

    def _return_slid(self, holding: _Holding, num_rows: int) -> list[Cell]:
        """Give back the pages that slid out of their windows, now that num_rows rows are written."""
        cells = []
        for group in self._windowed:
            first, num_slid = holding.num_slid[group], self._num_slid(group, num_rows)
            if num_slid > first:
                holding.num_slid[group] = num_slid
                table = holding.tables[group]
                for index in range(first, num_slid):
                    self._pools[index % self.context][group].unreference(table[index])
                    table[index] = 0
                    cells.append(Cell(group, index, 0))
        return cells

    def _copy_page(self, seq_id: int, node: Node, tables: list[list[int]]) -> tuple[PageCopy, ...]:
        """Append to each table a page that will be a copy of the node's; nothing when a pool has none left."""
        shard = node.index % self.context
        pools = self._pools[shard]
        for pool, source in zip(pools, node.pages, strict=True):
            pool.reference(source)
        pins = [(seq_id, shard, group, page) for group, page in enumerate(node.pages)]
        if any(pool.num_available == 0 for pool in pools):
            self._unpin(pins)
            return ()
        self._pins += pins
        copies = tuple(
            PageCopy(pool.group, source, pool.take(), shard) for pool, source in zip(pools, node.pages, strict=True)
        )
        for copy in copies:
            tables[copy.group].append(copy.target)
        return copies

    def _unpin(self, pins: list[tuple[int, int, int, int]]) -> None:
        for _, shard, group, page in pins:
            self._pools[shard][group].unreference(page)

    def end_copies(self) -> None:
        """The copies handed out so far were dispatched: their source pages may be evicted again."""
        if self._pins:
            self._unpin(self._pins)
            self._pins = []

    def extend(self, seq_id: int, num_rows: int) -> list[Cell] | None:
        """Pages for rows < num_rows: the new cells, or None (and nothing changed) when a pool cannot give them."""
        tables = self._holdings[seq_id].tables
        first, end = len(tables[0]), -(-num_rows // self.page_size)
        for shard, num_pages in self._per_shard(first, end):
            for pool in self._pools[shard]:
                if num_pages > len(pool.free) and num_pages > pool.num_available:
                    return None
        cells = []
        for index in range(first, end):
            for pool, table in zip(self._pools[index % self.context], tables):  # noqa: B905 (equal, and called often)
                page = pool.take()
                table.append(page)
                cells.append(Cell(pool.group, index, page))
        return cells

    def _per_shard(self, first: int, end: int) -> list[tuple[int, int]]:
        """(context shard, how many of a sequence's pages [first, end) are there), where there are any."""
        if self.context == 1:
            return [(0, end - first)]
        return [
            ((first + offset) % self.context, -(-(end - first - offset) // self.context))
            for offset in range(min(self.context, end - first))
        ]

    def page_rows(self, seq_id: int) -> int:
        """Rows that the sequence's pages can hold."""
        return len(self._holdings[seq_id].tables[0]) * self.page_size

    def fits(self, num_rows: int, *, held_rows: int, rows_ahead: int, spare_pages: int) -> bool:
        """Whether there are pages for a sequence's rows [held_rows, num_rows) and `spare_pages` beside them.

        held_rows: those that its pages, or cached ones it may use, hold. A windowed group is charged for its window
        and `rows_ahead` rows, since pages come back as the window moves. Spare pages are even over context shards.
        """
        first, end = held_rows // self.page_size, -(-num_rows // self.page_size)
        spare_per_shard = -(-spare_pages // self.context)
        for group, window in enumerate(self.windows):
            num_pages = end - first
            if window is not None:
                num_pages = min(num_pages, (window + rows_ahead) // self.page_size + 2)
            for offset in range(self.context):
                pool = self._pools[(first + offset) % self.context][group]
                if -(-(num_pages - offset) // self.context) + spare_per_shard > pool.num_available:
                    return False
        return True

    def num_cached_rows(self, tokens: Seq[int], *, salt: str = "") -> int:
        """Rows that `acquire` would find cached now. Registers nothing."""
        if not self.prefix_caching:
            return 0
        match = self._tree.match(encode_tokens(tokens[:-1]), salt)
        self._tree.prune(match.root)
        return len(match.path) * self.page_size + match.partial_rows

    def commit(self, seq_id: int, tokens: Seq[int], num_rows: int) -> list[Cell]:
        """Rows < num_rows are known to be written (by applied calls), with these tokens.

        Full pages enter the prefix tree; one that the tree holds already is swapped for the tree's. Pages of
        windowed groups that no query at a position >= num_rows sees go back. Returns the cells that changed, in
        order: a page swapped and then slid out comes twice.
        """
        holding = self._holdings[seq_id]
        cells: list[Cell] = []
        page_size = self.page_size
        num_full = num_rows // page_size
        for index in range(holding.num_committed, num_full):
            if holding.tip is None:
                break
            if not holding.tip.alive:  # dropped from the tree: what follows could not be found
                holding.tip = None
                break
            self._commit_page(holding, index, tokens[index * page_size : (index + 1) * page_size], cells)
        if num_full > holding.num_committed:
            holding.num_committed = num_full
        if self._windowed:
            cells += self._return_slid(holding, num_rows)
        return cells

    def _commit_page(self, holding: _Holding, index: int, page_tokens: Seq[int], cells: list[Cell]) -> None:
        tip = holding.tip
        assert tip is not None
        pages = [table[index] for table in holding.tables]
        node, is_new = self._tree.child(tip, self._tree.encode_page(page_tokens), pages)
        if is_new:
            for pool, page in zip(self._pools[index % self.context], pages, strict=True):
                if page:
                    pool.nodes[page] = node
        else:
            self._merge_page(holding, index, node, cells)
        node.num_tips += 1
        tip.num_tips -= 1
        holding.tip = node

    def _merge_page(self, holding: _Holding, index: int, node: Node, cells: list[Cell]) -> None:
        """Another sequence computed the same page: keep one of the two in each group."""
        for pool, table in zip(self._pools[index % self.context], holding.tables, strict=True):
            group = pool.group
            page, held = table[index], node.pages[group]
            if page == 0 or page == held:
                continue
            if held == 0:
                node.pages[group] = page
                pool.nodes[page] = node
            else:
                pool.reference(held)
                pool.unreference(page)
                table[index] = held
                cells.append(Cell(group, index, held))

    def release(self, seq_id: int) -> None:
        """The sequence is over. Its pages in the tree stay cached, the others are free."""
        holding = self._holdings.pop(seq_id)
        for group, table in enumerate(holding.tables):
            for index in range(len(table) - 1, holding.num_slid[group] - 1, -1):  # the end of a chain is evicted first
                self._pools[index % self.context][group].unreference(table[index])
        if holding.tip is not None:
            holding.tip.num_tips -= 1
            self._tree.prune(holding.tip)

    def cancel(self, seq_id: int) -> None:
        """Undo an `acquire` whose copies will not be made."""
        self._unpin([pin for pin in self._pins if pin[0] == seq_id])
        self._pins = [pin for pin in self._pins if pin[0] != seq_id]
        self.release(seq_id)

    def discard(self, seq_id: int) -> None:
        """Release a sequence whose rows cannot be trusted: nothing of its prefix may be found again."""
        node = self._holdings[seq_id].tip
        while node is not None and node.parent is not None and node.parent.parent is not None:
            node = node.parent
        if node is not None and node.alive and node.parent is not None:
            self._tree.remove(node)
        self.release(seq_id)

    def reset(self) -> None:
        """The device lost its pages: forget every sequence and all cached content."""
        for pool in self._every_pool:
            pool.clear()
        self._clear()

    @property
    def num_returns(self) -> int:
        """Rises whenever pages became available: a failed `extend` is worth another try."""
        return sum(pool.num_returns for pool in self._every_pool)

    def usage(self) -> tuple[PoolUsage, ...]:
        """Per group: total, free, used and cached pages, of all context shards."""
        return PoolUsage.add(self.shard_usage())

    def shard_usage(self) -> tuple[tuple[PoolUsage, ...], ...]:
        """The same per context shard and group."""
        return tuple(tuple(pool.usage() for pool in pools) for pools in self._pools)

    @property
    def num_sequences(self) -> int:
        return len(self._holdings)

    def check(self) -> None:
        """Every page is exactly one of free, used, cached; references are right. AssertionError names the page."""
        self._tree.check()
        references = [[[0] * pool.num_pages for pool in pools] for pools in self._pools]
        for _, shard, group, page in self._pins:
            references[shard][group][page] += 1
        tips: dict[Node, int] = {}
        for holding in self._holdings.values():
            for group, table in enumerate(holding.tables):
                for index, page in enumerate(table):
                    if page:
                        references[index % self.context][group][page] += 1
            if holding.tip is not None:
                tips[holding.tip] = tips.get(holding.tip, 0) + 1
        nodes: list[list[list[Node | None]]] = [[[None] * pool.num_pages for pool in pools] for pools in self._pools]
        for node in self._tree.nodes():
            assert node.num_tips == tips.get(node, 0), f"prefix node {node.key.hex()[:12]}: {node.num_tips} tips"
            shard = node.index % self.context
            for group, page in enumerate(node.pages):
                if page:
                    where = f"{self._pools[shard][group].name} page {page}"
                    assert nodes[shard][group][page] is None, f"{where} is in two prefix nodes"
                    nodes[shard][group][page] = node
        for shard, pools in enumerate(self._pools):
            for group, pool in enumerate(pools):
                pool.check(references[shard][group], nodes[shard][group])
        for seq_id, holding in self._holdings.items():
            self._check_holding(seq_id, holding)

    def _check_holding(self, seq_id: int, holding: _Holding) -> None:
        for group, table in enumerate(holding.tables):
            num_slid = holding.num_slid[group]
            for index, page in enumerate(table):
                pool = self._pools[index % self.context][group]
                where = f"{pool.name} page {page} (sequence {seq_id}, index {index})"
                assert (page == 0) == (index < num_slid), f"{where}: slid-out cells are the first {num_slid}"
                if page and index >= holding.num_committed:
                    alone = pool.references[page] == 1 and pool.nodes[page] is None
                    assert alone, f"{where}: shared, yet still written"
