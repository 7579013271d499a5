"""CacheManager against a model of the pages' content: every row a sequence may read holds its own prefix."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxinfer.cache import CacheManager, Cell
from jaxinfer.config import KVShape, PageGroup

PAGE_SIZE = 4


def groups_of(*windows: int | None) -> list[PageGroup]:
    return [PageGroup(window, KVShape(1, 2), (index,)) for index, window in enumerate(windows)]


def manager(*windows: int | None, num_pages: int = 64, **options: int) -> CacheManager:
    return CacheManager(groups_of(*windows), [num_pages] * len(windows), PAGE_SIZE, **options)


def run_through(cache: CacheManager, seq_id: int, tokens: list[int], salt: str = "") -> int:
    """A whole life: acquire, write all rows, commit, release. Returns the cached tokens."""
    acquired = cache.acquire(seq_id, tokens, salt=salt)
    assert cache.extend(seq_id, len(tokens)) is not None
    cache.end_copies()
    cache.commit(seq_id, tokens, len(tokens))
    cache.release(seq_id)
    cache.check()
    return acquired.num_cached_tokens


def prefix_hashes(tokens: list[int], salt: str) -> list[int]:
    """What the K/V row at each position depends on: all tokens up to it (and the salt that keeps tenants apart)."""
    hashes, state = [], hash(salt)
    for token in tokens:
        state = hash((state, token))
        hashes.append(state)
    return hashes


@dataclass
class Running:
    """The oracle's view of one sequence."""

    tokens: list[int]
    salt: str
    tables: list[dict[int, int]]  # per group: index -> page, as the device's page table
    num_written: int
    num_committed: int = 0
    planned: int = 0  # rows that the next dispatch writes up to
    hashes: list[int] = field(default_factory=list)


class CacheMachine(RuleBasedStateMachine):
    """Plans (acquire, extend) are dispatched later, copies first; commits come later still, as in the engine."""

    windows: tuple[int | None, ...] = (None,)
    context = 1

    @initialize(data=st.data(), prefix_caching=st.sampled_from([True, True, True, False]))
    def start(self, data: st.DataObject, prefix_caching: bool) -> None:
        num_pages = [data.draw(st.integers(4, 24)) // self.context + 1 for _ in self.windows]
        self.cache = CacheManager(
            groups_of(*self.windows), num_pages, PAGE_SIZE, prefix_caching=prefix_caching, context=self.context
        )
        # per group: (context shard, page, offset) -> prefix hash
        self.content: list[dict[tuple[int, int, int], int]] = [{} for _ in self.windows]
        self.running: dict[int, Running] = {}
        self.copies: list = []
        self.handed_out: set[tuple[int, int, int]] = set()  # pages that the pending plan may write
        self.next_id = 0

    def _apply(self, sequence: Running, cells: list[Cell] | tuple[Cell, ...]) -> None:
        for cell in cells:
            sequence.tables[cell.group][cell.index] = cell.page

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30), salt=st.sampled_from(["", "", "", "other"]))
    def acquire(self, tokens: list[int], salt: str) -> None:
        if len(self.running) >= 5:
            return
        seq_id, self.next_id = self.next_id, self.next_id + 1
        acquired = self.cache.acquire(seq_id, tokens, salt=salt)
        num_cached = acquired.num_cached_tokens
        assert 0 <= num_cached < len(tokens)
        sequence = Running(list(tokens), salt, [{} for _ in self.windows], num_cached, planned=num_cached)
        sequence.hashes = prefix_hashes(tokens, salt)
        self._apply(sequence, acquired.cells)
        self.copies += acquired.copies
        self.handed_out |= {(copy.group, copy.shard, copy.target) for copy in acquired.copies}
        sources = {(copy.group, copy.shard, copy.source) for copy in self.copies}
        assert not sources & self.handed_out, "a page is copied from and written in one plan"
        self.running[seq_id] = sequence

    @rule(data=st.data())
    @precondition(lambda self: self.running and not self.copies)
    def acquire_again_and_cancel(self, data: st.DataObject) -> None:
        sequence = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        before = self.cache.usage()
        foreseen = self.cache.num_cached_rows(sequence.tokens, salt=sequence.salt)
        found = self.cache.acquire(10**6, sequence.tokens, salt=sequence.salt).num_cached_tokens
        assert foreseen == found or foreseen > found == foreseen // PAGE_SIZE * PAGE_SIZE, "no page for a copy at most"
        self.cache.cancel(10**6)
        after = self.cache.usage()
        assert [usage.used for usage in before] == [usage.used for usage in after]

    @rule(data=st.data(), num_rows=st.integers(1, 12))
    @precondition(lambda self: self.running)
    def extend(self, data: st.DataObject, num_rows: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.running)))
        sequence = self.running[seq_id]
        target = sequence.planned + num_rows
        before = self.cache.usage()
        cells = self.cache.extend(seq_id, target)
        if cells is None:
            assert self.cache.usage() == before, "a refused extend changed something"
            assert any(
                sum(index % self.context == shard for index in range(len(table), -(-target // PAGE_SIZE)))
                > usage.free + usage.cached
                for shard, usages in enumerate(self.cache.shard_usage())
                for table, usage in zip(sequence.tables, usages, strict=True)
            ), "refused although pages are there"
            return
        new = {(cell.group, cell.index % self.context, cell.page) for cell in cells}
        assert len(new) == len(cells) and all(cell.page != 0 for cell in cells)
        assert not new & {(copy.group, copy.shard, copy.source) for copy in self.copies}, "a copy source was handed out"
        self.handed_out |= new
        self._apply(sequence, cells)
        sequence.planned = target

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=30, max_size=30))
    @precondition(lambda self: self.running or self.copies)
    def dispatch(self, data: st.DataObject, tokens: list[int]) -> None:
        """The device runs what was planned: copies, then every sequence's new rows, each reading all it sees."""
        for copy in self.copies:
            for offset in range(PAGE_SIZE):
                source = self.content[copy.group].get((copy.shard, copy.source, offset))
                self.content[copy.group][copy.shard, copy.target, offset] = -1 if source is None else source
        self.copies, self.handed_out = [], set()
        self.cache.end_copies()
        for sequence in self.running.values():
            while len(sequence.tokens) < sequence.planned:  # decoding: new tokens
                sequence.tokens.append(tokens[len(sequence.tokens) % len(tokens)])
            sequence.hashes = prefix_hashes(sequence.tokens, sequence.salt)
            for row in range(sequence.num_written, sequence.planned):
                self._write_and_read(sequence, row)
            sequence.num_written = sequence.planned

    def _write_and_read(self, sequence: Running, row: int) -> None:
        for group, window in enumerate(self.windows):
            table, content = sequence.tables[group], self.content[group]
            assert table.get(row // PAGE_SIZE), f"group {group}: row {row} has no page"
            content[self._place(table, row)] = sequence.hashes[row]
            for seen in range(0 if window is None else max(0, row - window + 1), row + 1):
                page = table.get(seen // PAGE_SIZE, 0)
                assert page, f"group {group}: a query at {row} needs row {seen}, whose page is gone"
                held = content.get(self._place(table, seen))
                assert held == sequence.hashes[seen], f"group {group}: row {seen} is foreign"

    def _place(self, table: dict[int, int], row: int) -> tuple[int, int, int]:
        """Context shard, page and offset of a row: page i of a sequence lies on shard i % context."""
        index = row // PAGE_SIZE
        return index % self.context, table[index], row % PAGE_SIZE

    @rule(data=st.data())
    @precondition(lambda self: any(s.num_written > s.num_committed for s in self.running.values()))
    def commit(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.running)))
        sequence = self.running[seq_id]
        if sequence.num_written <= sequence.num_committed:
            return
        sequence.num_committed = data.draw(st.integers(sequence.num_committed + 1, sequence.num_written))
        self._apply(sequence, self.cache.commit(seq_id, sequence.tokens, sequence.num_committed))

    @rule(data=st.data(), trusted=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.running and not self.copies)
    def release(self, data: st.DataObject, trusted: bool) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.running)))
        sequence = self.running.pop(seq_id)
        if trusted:
            self.cache.release(seq_id)
        else:
            had_tree_pages = sequence.num_committed >= PAGE_SIZE
            self.cache.discard(seq_id)
            if had_tree_pages:
                again = self.cache.acquire(10**6, sequence.tokens + [0], salt=sequence.salt)
                self.cache.cancel(10**6)
                assert again.num_cached_tokens < PAGE_SIZE, "a discarded prefix was found again"

    @rule()
    @precondition(lambda self: self.next_id > 12)
    def reset(self) -> None:
        self.cache.reset()
        self.running.clear()
        self.copies, self.handed_out, self.next_id = [], set(), 0
        self.content = [{} for _ in self.windows]
        assert all(usage.free == usage.total for usage in self.cache.usage())

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.end_copies()
        for seq_id in self.running:
            self.cache.release(seq_id)
        self.cache.check()
        assert all(usage.used == 0 for usage in self.cache.usage()), "pages are used although nobody runs"


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("windows", [(None,), (6,), (None, 5), (7, 1), (None, 9, 4)], ids=str)
def test_random_operations_keep_every_row(windows: tuple[int | None, ...], context: int) -> None:
    machine = type("Machine", (CacheMachine,), {"windows": windows, "context": context})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40 if context == 1 else 15,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data(), windows=st.sampled_from([(None,), (None, 5), (6,)]))
def test_hits_are_the_longest_prefix_when_nothing_was_evicted(
    data: st.DataObject, windows: tuple[int | None, ...]
) -> None:
    """Any earlier prompt's full pages count, and within the page where the match ends every common token counts."""
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24)
    cache = manager(*windows, num_pages=400)
    earlier: list[list[int]] = []
    for seq_id in range(data.draw(st.integers(1, 12))):
        tokens = data.draw(prompts)
        longest = 0
        for other in earlier:
            full = other[: len(other) // PAGE_SIZE * PAGE_SIZE]
            shared = 0
            while shared < min(len(full), len(tokens)) and full[shared] == tokens[shared]:
                shared += 1
            longest = max(longest, min(shared, len(tokens) - 1))
        assert run_through(cache, seq_id, tokens) == longest
        earlier.append(tokens)


def test_full_pages_are_shared_and_the_last_one_is_copied() -> None:
    cache = manager(None)
    tokens = list(range(12))
    run_through(cache, 0, tokens)
    first = cache.acquire(1, [*tokens[:10], 99, 99])
    assert first.num_cached_tokens == 10
    assert [cell.index for cell in first.cells] == [0, 1, 2]
    (copy,) = first.copies
    assert copy.target == first.cells[2].page != copy.source
    second = cache.acquire(2, [*tokens[:8], 98])
    assert second.num_cached_tokens == 8 and second.copies == ()
    assert [cell.page for cell in second.cells] == [cell.page for cell in first.cells[:2]]
    cache.check()


def test_the_same_prompt_again_leaves_one_row_to_compute() -> None:
    cache = manager(None)
    run_through(cache, 0, list(range(8)))
    again = cache.acquire(1, list(range(8)))
    assert again.num_cached_tokens == 7 and len(again.copies) == 1


@pytest.mark.parametrize("most_rows", [0, 3, 4, 5, 11, 99])
def test_a_hit_can_be_limited(most_rows: int) -> None:
    """Who needs later rows computed takes no more, and its pages still become those that are cached."""
    cache = manager(None)
    run_through(cache, 0, list(range(12)))
    acquired = cache.acquire(1, list(range(12)), most_rows=most_rows)
    assert acquired.num_cached_tokens == min(most_rows, 11)
    assert cache.extend(1, 12) is not None
    cache.end_copies()
    cache.commit(1, list(range(12)), 12)
    cache.check()
    cache.release(1)
    assert run_through(cache, 2, list(range(12))) == 11


def test_salts_do_not_share() -> None:
    cache = manager(None)
    run_through(cache, 0, list(range(9)), salt="a")
    assert run_through(cache, 1, list(range(9)), salt="b") == 0
    assert run_through(cache, 2, list(range(9)), salt="a") == 8


def test_without_prefix_caching_pages_are_free_at_once() -> None:
    cache = manager(None, prefix_caching=False)
    assert run_through(cache, 0, list(range(12))) == 0
    assert run_through(cache, 1, list(range(12))) == 0
    assert cache.usage()[0].free == cache.usage()[0].total


def test_only_committed_rows_are_found() -> None:
    cache = manager(None)
    cache.acquire(0, list(range(12)))
    cache.extend(0, 12)
    cache.commit(0, list(range(12)), 7)
    assert cache.acquire(1, list(range(12))).num_cached_tokens == 4
    cache.check()


def test_least_recently_used_goes_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    cache = manager(None, num_pages=1 + 6)
    old, recent = [1] * 12, [2] * 12
    run_through(cache, 0, old)
    run_through(cache, 1, recent)
    cache.acquire(2, [3] * 4)
    assert cache.extend(2, 8) is not None  # takes two pages: the last two of `old`
    cache.check()
    cached = {}
    for seq_id, tokens in ((3, old), (4, recent)):
        cached[seq_id] = cache.acquire(seq_id, [*tokens, 9]).num_cached_tokens
    assert cached == {3: 4, 4: 12}


def test_a_page_in_use_is_not_evicted() -> None:
    cache = manager(None, num_pages=1 + 4)
    run_through(cache, 0, [1] * 8)
    cache.acquire(1, [1] * 9)  # holds both pages
    cache.acquire(2, [5])
    assert cache.extend(2, 12) is None
    assert cache.extend(2, 8) is not None
    cache.check()


def test_a_copy_source_stays_until_the_copies_were_made() -> None:
    cache = manager(None, num_pages=1 + 3)
    run_through(cache, 0, [1] * 8)
    (copy,) = cache.acquire(1, [1] * 6).copies  # shares one page, copies the other into the last free one
    cache.acquire(2, [7])
    assert cache.extend(2, 1) is None, "the only page left is the copy's source"
    cache.end_copies()
    assert [cell.page for cell in cache.extend(2, 1) or ()] == [copy.source]
    cache.check()


def test_no_copy_where_no_page_is_left_for_it() -> None:
    cache = manager(None, num_pages=1 + 2)
    run_through(cache, 0, [1] * 8)
    acquired = cache.acquire(1, [1] * 7)
    assert (acquired.num_cached_tokens, acquired.copies) == (4, ())
    cache.check()


def test_cancel_gives_everything_back() -> None:
    cache = manager(None, num_pages=1 + 3)
    run_through(cache, 0, [1] * 8)
    cache.acquire(1, [1] * 6)
    cache.cancel(1)
    cache.check()
    assert cache.usage()[0].used == 0


def test_equal_pages_of_two_running_sequences_become_one() -> None:
    cache = manager(None)
    tokens = list(range(9))
    for seq_id in (0, 1):
        cache.acquire(seq_id, tokens)
        cache.extend(seq_id, 9)
    assert cache.usage()[0].used == 6
    assert cache.commit(0, tokens, 9) == []
    swapped = cache.commit(1, tokens, 9)
    assert [(cell.index, cell.page) for cell in swapped] == [(0, 1), (1, 2)]
    assert cache.usage()[0].used == 4
    cache.check()


@pytest.mark.parametrize(
    ("window", "num_rows", "num_slid"), [(6, 8, 0), (6, 9, 1), (6, 12, 1), (6, 13, 2), (1, 8, 2), (4, 7, 1)]
)
def test_pages_that_slid_out_go_back(window: int, num_rows: int, num_slid: int) -> None:
    """A query at position p sees rows p - window + 1 to p; the next one is at num_rows."""
    cache = manager(window, prefix_caching=False)
    cache.acquire(0, [1] * num_rows)
    cache.extend(0, num_rows)
    used = cache.usage()[0].used
    cells = cache.commit(0, [1] * num_rows, num_rows)
    assert cells == [Cell(0, index, 0) for index in range(num_slid)]
    assert cache.usage()[0].used == used - num_slid
    cache.check()


def test_a_hit_needs_only_the_window_of_a_windowed_group() -> None:
    cache = manager(None, 5)
    tokens = list(range(17))
    run_through(cache, 0, tokens)
    acquired = cache.acquire(1, tokens)
    assert acquired.num_cached_tokens == 16
    assert [cell.index for cell in acquired.cells if cell.group == 0] == [0, 1, 2, 3]
    assert [cell.index for cell in acquired.cells if cell.group == 1] == [3]  # rows 12 to 15; 16 is computed
    cache.check()


def test_a_hole_in_a_windowed_group_shortens_the_hit() -> None:
    """Group 1's pool is so small that the pages of the first prompt's end are evicted there, but not in group 0."""
    cache = CacheManager(groups_of(None, 5), [40, 1 + 4], PAGE_SIZE)
    tokens = list(range(16))
    run_through(cache, 0, tokens)
    cache.acquire(1, [99] * 13)
    assert cache.extend(1, 13) is not None
    cache.release(1)
    cache.check()
    assert cache.acquire(2, [*tokens, 0]).num_cached_tokens == 0


def test_discarded_rows_are_not_found_again() -> None:
    cache = manager(None)
    run_through(cache, 0, [1] * 12)
    cache.acquire(1, [1] * 13)
    cache.acquire(2, [1] * 13)
    cache.extend(2, 20)
    cache.discard(1)
    cache.check()
    assert cache.acquire(3, [1] * 13).num_cached_tokens == 0
    cache.commit(2, [1] * 20, 20)  # still runs on the same pages, but offers nothing
    cache.check()
    assert cache.acquire(4, [1] * 13).num_cached_tokens == 0
    for seq_id in (2, 3, 4):
        cache.release(seq_id)
    cache.check()


@pytest.mark.parametrize("num_pages", [[1], [4, 4]])
def test_pools_must_match_the_groups(num_pages: list[int]) -> None:
    with pytest.raises(ValueError, match="num_pages"):
        CacheManager(groups_of(None), num_pages, PAGE_SIZE)


def test_check_names_a_leaked_page() -> None:
    cache = manager(None)
    cache.acquire(0, [1] * 5)
    cache.extend(0, 5)
    cache._holdings[0].tables[0].pop()
    with pytest.raises(AssertionError, match="group 0 page 2"):
        cache.check()


# ---- context shards ---------------------------------------------------------------------------------------------


def used_pages(cache: CacheManager) -> list[tuple[int, ...]]:
    """Per context shard, the used pages of each group."""
    return [tuple(usage.used for usage in usages) for usages in cache.shard_usage()]


def test_page_i_of_a_sequence_is_on_shard_i_modulo_context() -> None:
    cache = manager(None, 5, num_pages=5, context=3)
    cache.acquire(0, [1] * 29)
    cells = cache.extend(0, 29)  # pages 0 to 7
    assert cells is not None and [cell.index for cell in cells] == [index for index in range(8) for _ in range(2)]
    assert used_pages(cache) == [(3, 3), (3, 3), (2, 2)]
    assert [cell.page for cell in cells if cell.group == 0] == [1, 1, 1, 2, 2, 2, 3, 3], "numbers are local to a shard"
    assert cache.usage()[0] == (12, 4, 8, 0)
    cache.commit(0, [1] * 29, 28)  # of the windowed group, pages 0 to 5 slid out
    assert used_pages(cache) == [(3, 1), (3, 1), (2, 0)]
    cache.check()


def test_a_prompt_longer_than_one_shards_pool_fits_all_together() -> None:
    cache = manager(None, num_pages=1 + 3, context=4)
    tokens = list(range(48))
    assert run_through(cache, 0, tokens) == 0
    assert cache.usage()[0] == (12, 0, 0, 12)
    assert run_through(cache, 1, [*tokens[:40], *tokens[:4]]) == 40
    cache.acquire(2, tokens)
    assert cache.extend(2, 49) is None, "shard 0 would need a fourth page"


def test_a_copy_stays_on_its_shard() -> None:
    cache = manager(None, num_pages=8, context=2)
    run_through(cache, 0, list(range(12)))
    for num_shared, shard in ((6, 1), (9, 0)):
        (copy,) = cache.acquire(num_shared, [*range(num_shared), 99]).copies
        assert copy.shard == shard
    cache.check()
    # shard 0: page 0, page 2 (copied from) and its copy; shard 1: page 1 (shared, and copied from) and its copy
    assert used_pages(cache) == [(3,), (2,)]


def test_a_page_is_evicted_where_one_is_needed_and_what_follows_it_goes_too() -> None:
    cache = manager(None, num_pages=1 + 2, context=2)
    run_through(cache, 0, [1] * 16)  # two pages on each shard
    cache.acquire(1, [2] * 4)
    assert cache.extend(1, 4) is not None  # takes page 2's place on shard 0; page 3 on shard 1 cannot be found any more
    cache.check()
    assert cache.shard_usage() == (((2, 0, 1, 1),), ((2, 1, 0, 1),))
    assert cache.num_cached_rows([1] * 16) == 8


def test_room_is_counted_on_every_shard() -> None:
    cache = manager(None, num_pages=1 + 3, context=2)
    cache.acquire(0, [1] * 5)
    cache.extend(0, 5)  # a page on each shard, so two are left
    assert cache.fits(24, held_rows=8, rows_ahead=0, spare_pages=0)
    assert not cache.fits(25, held_rows=8, rows_ahead=0, spare_pages=0), "shard 0 lacks a page"
    assert cache.fits(16, held_rows=8, rows_ahead=0, spare_pages=2)
    assert not cache.fits(16, held_rows=8, rows_ahead=0, spare_pages=3)
    assert not cache.fits(24, held_rows=8, rows_ahead=0, spare_pages=1)


def test_looking_for_a_prefix_leaves_nothing_behind() -> None:
    cache = manager(None)
    assert cache.num_cached_rows([1] * 9, salt="nobody's") == 0
    cache.check()
    run_through(cache, 0, [1] * 12)
    assert cache.num_cached_rows([1] * 12) == 11
    assert cache.num_cached_rows([1] * 12, salt="nobody's") == 0
    assert manager(None, prefix_caching=False).num_cached_rows([1] * 12) == 0
    cache.check()


def test_there_is_at_least_one_context_shard() -> None:
    with pytest.raises(ValueError, match="context=0"):
        manager(None, context=0)


def test_check_names_the_shard_of_a_leaked_page() -> None:
    cache = manager(None, context=2)
    cache.acquire(0, [1] * 5)
    cache.extend(0, 5)
    cache._holdings[0].tables[0].pop()
    with pytest.raises(AssertionError, match="group 0 shard 1 page 1"):
        cache.check()
