"""Sequences with a slot: the slots and pages they hold, who of them is preempted, and whether a newcomer has room.

Hides reservation of pages for decode steps and chunks, their return, and the slot table's edits. Pages are reserved for
the most that calls in flight can write; while any is in flight nobody is preempted, since its result may free pages.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from jaxinfer.cache import CacheManager, Cell, PageCopy
from jaxinfer.config import EngineConfig
from jaxinfer.plan import Admission, Chunk, Sequence
from jaxinfer.rope import LengthRule
from jaxinfer.slots import MAX_IN_FLIGHT, SlotTable, max_cells_per_plan
from jaxinfer.waiting import PREEMPTIONS_TO_PROMOTE, WaitingQueue

_POOL_TOO_SMALL = "the page pool cannot hold one sequence of max_model_len"


class RunningSet:
    """Every running sequence is prefilling or decoding. Preempted ones go back to the waiting queue."""

    def __init__(
        self, config: EngineConfig, cache: CacheManager, waiting: WaitingQueue, length_rule: LengthRule | None = None
    ):
        self._cache = cache
        self._waiting = waiting
        self._rows_ahead = MAX_IN_FLIGHT * config.max_num_batched_tokens
        self._length_rule = length_rule
        self._slots = SlotTable(config.max_num_seqs, max_cells_per_plan(config, cache.windows, cache.page_size))
        self._prefilling: list[Sequence] = []  # in order of admission; still without planned chunks for some rows
        self._decoding: list[Sequence] = []  # the others with a slot
        self._blocked: tuple[int, int] | None = None  # (sequence, page returns) of the last admission without pages
        self.num_preemptions = 0

    def __len__(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    def prefilling(self) -> list[Sequence]:
        """Those with rows that no planned chunk covers, in order of admission."""
        return list(self._prefilling)

    def decoding(self) -> tuple[list[Sequence], int]:
        """Decoding sequences that may still be running on the device, and the most steps one of them can yet take."""
        alive, most_left = [], 0
        for sequence in self._decoding:
            left = sequence.resident_max - len(sequence.tokens)
            if left > sequence.least_pending:
                alive.append(sequence)
                left -= sequence.most_pending
                if left > most_left:
                    most_left = left
        return alive, most_left

    # ---- reservation --------------------------------------------------------------------------------------------

    def reserve_steps(self, decoding: list[Sequence], num_steps: int, *, may_preempt: bool) -> int:
        """Pages for `num_steps` more steps of each; fewer steps when pages are short, then preemption.

        Returns the steps that have pages; 0: wait for the calls in flight, whose results may free pages.
        """
        for sequence in decoding:
            if sequence.slot is None:  # preempted for an earlier one
                continue
            while True:
                num_tokens = len(sequence.tokens) + sequence.most_pending + num_steps
                num_rows = (num_tokens if num_tokens < sequence.resident_max else sequence.resident_max) - 1
                if num_rows <= sequence.page_rows or self._extend(sequence, num_rows):
                    break
                if num_steps > 1:
                    num_steps //= 2
                elif not may_preempt:
                    return 0
                else:
                    victim = self._last_in_order()
                    self._preempt(victim)
                    if victim is sequence:
                        break
        return num_steps

    def reserve_chunk(self, sequence: Sequence, length: int, chunks: Seq[Chunk], *, may_preempt: bool) -> bool:
        """Pages for the next `length` rows of a prefill; False: it waits for others to give pages back.

        chunks: those of the same plan so far; their sequences are not preempted.
        """
        num_rows = sequence.prefill_planned + length
        while num_rows > sequence.page_rows and not self._extend(sequence, num_rows):
            if not may_preempt:
                return False
            victim = self._last_in_order(but_not=[chunk.sequence for chunk in chunks])
            if victim is sequence:
                assert len(self) > 1, _POOL_TOO_SMALL
                return False
            self._preempt(victim)
        return True

    def _extend(self, sequence: Sequence, num_rows: int) -> bool:
        """Pages for rows < num_rows; their cells go into the next plan."""
        cells = self._cache.extend(sequence.seq_id, num_rows)
        if cells is None:
            return False
        page_size = self._cache.page_size
        sequence.page_rows = -(-num_rows // page_size) * page_size
        self._slots.change_cells(sequence, cells)
        return True

    def _last_in_order(self, but_not: Seq[Sequence] = ()) -> Sequence:
        """Who is preempted first: the lowest class, then the latest arrival. So the oldest one always runs on."""
        return max((s for s in self._slots.sequences() if s not in but_not), key=lambda s: (s.rank, s.seq_id))

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot and pages; it queues again. Only when no call in flight computes tokens for it."""
        assert len(self) > 1, _POOL_TOO_SMALL
        self.leave(sequence, stop=True)
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        if sequence.num_preemptions >= PREEMPTIONS_TO_PROMOTE:
            sequence.rank = 0
        self._waiting.push(sequence)

    # ---- coming and going ---------------------------------------------------------------------------------------

    def admit(
        self, sequence: Sequence, first_chunk: Callable[[int], int]
    ) -> tuple[Admission, int, tuple[PageCopy, ...]] | None:
        """Give the head of the queue a free slot, its cached prefix, and pages for its first chunk; None: it must wait.

        first_chunk: rows left to compute -> rows computed now, 0 for none. The second result is what it answered.
        """
        if self.is_short_for(sequence):
            return None
        num_tokens = len(sequence.tokens)
        acquired = self._cache.acquire(
            sequence.seq_id, sequence.tokens, salt=self._salt(sequence), most_rows=sequence.reusable_rows
        )
        num_cached = acquired.num_cached_tokens
        length = first_chunk(num_tokens - num_cached)
        cells = None
        if length and self._has_room(num_tokens, self._cache.page_rows(sequence.seq_id)):
            cells = self._cache.extend(sequence.seq_id, num_cached + length)
        if cells is None:
            self._cache.cancel(sequence.seq_id)
            if length:
                self._blocked = (sequence.seq_id, self._cache.num_returns)
            assert not length or len(self), _POOL_TOO_SMALL
            return None
        self._waiting.pop()
        slot = self._slots.take(sequence)
        rule = self._length_rule
        limit = None if rule is None else rule.resident_limit(num_tokens)
        sequence.resident_max = sequence.max_total if limit is None else min(limit, sequence.max_total)
        sequence.prefill_end = num_tokens
        sequence.prefill_planned = num_cached
        sequence.page_rows = self._cache.page_rows(sequence.seq_id)
        sequence.commit_at = (num_cached // self._cache.page_size + 1) * self._cache.page_size
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached = num_cached
        self._prefilling.append(sequence)
        pages: list[list[Cell]] = [[] for _ in self._cache.windows]
        for cell in (*acquired.cells, *cells):
            pages[cell.group].append(cell)
        return Admission(slot, sequence, num_cached, tuple(tuple(group) for group in pages)), length, acquired.copies

    def is_short_for(self, sequence: Sequence) -> bool:
        """Whether its admission failed for want of pages, and none came back since."""
        return self._blocked == (sequence.seq_id, self._cache.num_returns)

    def _salt(self, sequence: Sequence) -> str:
        """Sequences with equal tokens and salt have equal K/V, and may know of each other."""
        rule = self._length_rule
        length = "" if rule is None else rule.cache_salt(sequence.num_prompt, len(sequence.tokens))
        return f"{length}\0{sequence.request.cache_salt}"

    def _has_room(self, num_tokens: int, held_rows: int) -> bool:
        """Whether rows [held_rows, num_tokens) fit beside what others need soon, so as not to be preempted at once."""
        if not len(self):
            return True
        owed_rows = sum(max(0, s.prefill_end - s.page_rows) for s in self._prefilling)
        spare_pages = -(-owed_rows // self._cache.page_size) + len(self)
        return self._cache.fits(num_tokens, held_rows=held_rows, rows_ahead=self._rows_ahead, spare_pages=spare_pages)

    def outlook(self, sequence: Sequence) -> tuple[int, bool]:
        """What a new sequence would find here: rows in the prefix cache, and whether there are pages for the others."""
        num_cached = min(
            sequence.reusable_rows, self._cache.num_cached_rows(sequence.tokens, salt=self._salt(sequence))
        )
        return num_cached, self._has_room(len(sequence.tokens), num_cached)

    @property
    def owed_rows(self) -> int:
        """Rows known at admission that no planned chunk covers."""
        return sum(s.prefill_end - s.prefill_planned for s in self._prefilling)

    def start_decoding(self, sequence: Sequence) -> None:
        """Planned chunks cover all its rows."""
        self._prefilling.remove(sequence)
        self._decoding.append(sequence)

    def commit(self, sequence: Sequence, num_rows: int) -> None:
        """Rows < num_rows are written. Worth a look at the cache only when a page is full."""
        if num_rows >= sequence.commit_at:
            page_size = self._cache.page_size
            sequence.commit_at = (num_rows // page_size + 1) * page_size
            cells = self._cache.commit(sequence.seq_id, sequence.tokens, num_rows)
            self._slots.change_cells(sequence, cells)

    def leave(self, sequence: Sequence, *, stop: bool, trusted: bool = True) -> None:
        """Slot and pages are free. stop: the device must be told; trusted: its K/V may stay in the prefix tree."""
        self._slots.leave(sequence, stop=stop)
        (self._prefilling if sequence in self._prefilling else self._decoding).remove(sequence)
        if trusted:
            self._cache.release(sequence.seq_id)
        else:
            self._cache.discard(sequence.seq_id)

    def take_edits(self) -> tuple[tuple[tuple[int, Cell], ...], tuple[int, ...], int]:
        """(slot, cell) changes and stops for the plan that is made now, and 1 + the highest slot it concerns."""
        return self._slots.take_edits()

    def reset(self) -> None:
        """The device lost its slots and pages: everybody queues again."""
        for sequence in self._slots.clear():
            self._waiting.push(sequence)
        self._prefilling, self._decoding = [], []
        self._cache.reset()
        self._blocked = None

    def check(self) -> None:
        """AssertionError names a slot or page that leaked or has two owners."""
        self._cache.check()
        assert self._cache.num_sequences == len(self), "the cache holds a sequence without a slot"
        self._slots.check([*self._prefilling, *self._decoding])
