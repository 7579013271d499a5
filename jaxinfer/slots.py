"""SlotTable: the device's slots as the host sees them, and the edits that the next plan must bring to them.

Hides which slot is free, page-table cells and stops that wait for a plan, and the bound on their number.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from jaxinfer.cache import Cell
from jaxinfer.config import EngineConfig
from jaxinfer.plan import Sequence

MAX_IN_FLIGHT = 2  # calls dispatched and not yet applied


def max_cells_per_plan(config: EngineConfig, windows: Seq[int | None], page_size: int) -> int:
    """Most entries `Plan.cells` can have; cells of admissions are not among them.

    New pages: `loop_steps` rows per slot and the chunks' rows. Per applied call (at most MAX_IN_FLIGHT between two
    plans) as many pages may be swapped for the prefix tree's, and in windowed groups as many slide out, and one more:
    slides wait for a page boundary. windows: one per page group.
    """
    num_sequences = config.max_num_seqs + config.max_prefill_seqs
    decode_pages = config.max_num_seqs * -(-config.loop_steps // page_size)
    per_call = decode_pages + config.max_num_batched_tokens // page_size + config.max_prefill_seqs
    num_cells = 0
    for window in windows:
        changed = per_call if window is None else 2 * per_call + num_sequences
        num_cells += per_call + MAX_IN_FLIGHT * changed
    return num_cells


def max_copies_per_plan(config: EngineConfig, num_groups: int) -> int:
    """Most entries `Plan.copies` can have: one page per admission and group."""
    return config.max_prefill_seqs * num_groups


class SlotTable:
    """Slots 0 .. num_slots - 1, each free or held by one sequence."""

    def __init__(self, num_slots: int, max_cells: int):
        self._max_cells = max_cells
        self._sequences: list[Sequence | None] = [None] * num_slots
        self._free = list(range(num_slots))  # a heap: lowest first
        self._stops: set[int] = set()
        self._cells: dict[tuple[int, int, int], Cell] = {}  # (slot, group, index)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def sequences(self) -> list[Sequence]:
        """Who holds a slot, by slot."""
        return [sequence for sequence in self._sequences if sequence is not None]

    def take(self, sequence: Sequence) -> int:
        """Give the lowest free slot to a sequence."""
        slot = sequence.slot = heapq.heappop(self._free)
        self._sequences[slot] = sequence
        return slot

    def leave(self, sequence: Sequence, *, stop: bool) -> None:
        """Free the sequence's slot.

        stop: the device does not know that the sequence is over; the next plan tells it.
        """
        slot = sequence.slot
        assert slot is not None and self._sequences[slot] is sequence, f"sequence {sequence.seq_id} holds no slot"
        self._sequences[slot] = None
        heapq.heappush(self._free, slot)
        if stop:
            self._stops.add(slot)
        if self._cells:
            self._cells = {key: cell for key, cell in self._cells.items() if key[0] != slot}
        sequence.slot = None
        sequence.most_pending = sequence.least_pending = sequence.prefill_planned = 0

    def change_cells(self, sequence: Sequence, cells: Iterable[Cell]) -> None:
        """Page-table cells of a sequence for the next plan; a later change of a cell replaces an earlier one."""
        slot = sequence.slot
        assert slot is not None, f"sequence {sequence.seq_id} holds no slot"
        for cell in cells:
            self._cells[slot, cell.group, cell.index] = cell

    def take_edits(self) -> tuple[tuple[tuple[int, Cell], ...], tuple[int, ...], int]:
        """(slot, cell) changes and stops for the plan that is made now, and 1 + the highest slot it concerns."""
        assert len(self._cells) <= self._max_cells, f"{len(self._cells)} cells are over the bound of {self._max_cells}"
        cells = tuple([(key[0], cell) for key, cell in self._cells.items()])
        stops = tuple(sorted(self._stops))
        used = [slot for slot, sequence in enumerate(self._sequences) if sequence is not None]
        self._cells = {}
        self._stops = set()
        return cells, stops, 1 + max(used[-1:] + list(stops[-1:]), default=0)

    def clear(self) -> list[Sequence]:
        """The device state is lost: every slot is free, no edit waits. Returns who held a slot."""
        holders = self.sequences()
        for sequence in holders:
            self.leave(sequence, stop=False)
        self._cells, self._stops = {}, set()
        return holders

    def check(self, running: Seq[Sequence]) -> None:
        """AssertionError unless exactly `running` hold slots, and every other slot is free once."""
        holders = {slot: sequence for slot, sequence in enumerate(self._sequences) if sequence is not None}
        both = holders.keys() & set(self._free)
        assert not both, f"slots in use are free: {sorted(both)}"
        assert len(holders) + len(set(self._free)) == len(self._sequences), "a slot is lost"
        assert len(self._free) == len(set(self._free)), "a slot is free twice"
        for slot, sequence in holders.items():
            assert sequence.slot == slot, f"slot {slot}: sequence {sequence.seq_id} believes it is in {sequence.slot}"
        assert {s.seq_id for s in holders.values()} == {s.seq_id for s in running}, "slots and running sequences differ"
        assert len(running) == len(holders), "a sequence is both prefilling and decoding"
