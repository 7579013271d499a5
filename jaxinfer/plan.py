"""What the scheduler tells the device to do (`Plan`) and hears back (`StepResult`, `Update`).

Types only. Policy is in scheduler.py; the engine turns a Plan into arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.cache import Cell, PageCopy
from jaxinfer.request import FinishReason, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion of a request: the host's state, equal only to itself. Below the line: the scheduler's own."""

    seq_id: int  # rises with arrival, so it is the order of arrival too
    request: Request
    index: int  # which of the request's n completions
    seed: int
    arrival_s: float
    tokens: list[int]  # prompt and generated tokens, as applied
    num_prompt: int
    max_total: int  # prompt plus completion may not become longer
    data_shard: int = 0  # whose slots and pages it uses
    slot: int | None = None
    num_cached: int = 0  # prompt tokens whose K/V came from the prefix cache at the first admission
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    # ----
    resident_max: int = 0  # it keeps its slot up to this many tokens: max_total, or fewer where K/V must be made anew
    rank: int = 0  # 0: online, or batch promoted by age; 1: batch
    prefill_end: int = 0  # tokens known at admission: the rows of all of them come from the cache or from chunks
    prefill_planned: int = 0  # rows that planned chunks cover; while it waits: that may come from the prefix cache
    most_pending: int = 0  # tokens that planned calls, not yet applied, produce at most
    least_pending: int = 0  # and at least, unless the sequence stops early
    page_rows: int = 0  # rows that its pages can hold
    commit_at: int = 0  # the next number of rows worth a commit: a page boundary
    was_admitted: bool = False
    num_scored: int = 0  # leading prompt rows whose predictions the host has; counted where `rows_to_score`
    siblings: list[Sequence] = field(default_factory=list)  # held back until this one's prefill was applied

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def rows_to_score(self) -> int:
        """Leading prompt rows whose predictions the caller wants: of the first completion, which stands for all."""
        if self.index > 0:
            return 0
        if self.request.on_prompt_logits is not None:
            return self.num_prompt
        return 0 if self.request.sampling.prompt_logprobs is None else self.num_prompt - 1

    @property
    def reusable_rows(self) -> int:
        """Leading rows that may come from the prefix cache: what is still to be scored has to be computed."""
        most = len(self.tokens) - 1
        return most if self.num_scored >= self.rows_to_score else min(self.num_scored, most)


class Chunk(NamedTuple):
    """K/V rows [start, start + length) of a sequence, computed in one mixed step."""

    slot: int
    sequence: Sequence
    start: int
    length: int
    final: bool  # the last known token is in it, so a new token is sampled


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot; the device first resets the slot's page-table rows to page 0."""

    slot: int
    sequence: Sequence
    num_cached_rows: int
    pages: tuple[tuple[Cell, ...], ...]  # per page group: every cell of the row that is not 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a device call does with the slots of one data shard. Edits come first: stops, cells, admissions, copies.

    Beside it may stand plans of other data shards, or None: then no row of that shard may advance. Where one of them
    has chunks, the call is a mixed_step, and every plan has one step.
    """

    chunks: tuple[Chunk, ...]  # computed in a mixed_step (exactly one step); all plans without: decode_loop
    admissions: tuple[Admission, ...]  # each has a chunk in the same plan
    cells: tuple[tuple[int, Cell], ...]  # (slot, cell) of sequences admitted earlier; each at most once
    copies: tuple[PageCopy, ...]
    stops: tuple[int, ...]  # slots to stop before anything else; an admission may reuse one in the same plan
    num_steps: int  # decode_loop: most steps of this shard's rows; 1 for a mixed step
    exit_on_free: bool  # somebody waits: when a slot of this shard frees, all shards leave the loop
    running: tuple[tuple[int, Sequence], ...]  # may produce tokens: decode rows, then final chunks
    num_slots: int  # 1 + highest slot in use or stopped
    least_steps: int = 1  # steps the call makes for certain where a row is alive
    generation: int = 0  # device resets before this plan


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a call produced, on the host.

    tokens: per slot, what each step made drew; -1 from the step on at which the slot was not running.
    finished: per slot, a FINISHED_* code.
    """

    tokens: list[list[int]]
    finished: list[int]


RUNS, FINISHED_STOP, FINISHED_LENGTH, FINISHED_NAN = 0, 1, 2, 3


class Update(NamedTuple):
    """What one sequence gained from an applied call."""

    sequence: Sequence
    slot: int  # where it ran; it may have left it since
    token_ids: tuple[int, ...]  # the i-th came from the call's i-th step
    finish_reason: FinishReason | None
    error: str | None
