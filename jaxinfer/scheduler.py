"""Scheduler: what the next device call does with one data shard's slots, planned while earlier calls still run.

Hides what calls in flight may yet do: the host knows a running sequence's length only up to them, until `apply` tells.
Prompts' share of a call is planned in prefill.py; slots, pages and preemption are in running.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from jaxinfer.arrivals import Arrivals
from jaxinfer.cache import CacheManager, PageCopy, PoolUsage
from jaxinfer.config import EngineConfig
from jaxinfer.plan import (
    FINISHED_LENGTH,
    FINISHED_NAN,
    FINISHED_STOP,
    RUNS,
    Admission,
    Chunk,
    Plan,
    Sequence,
    StepResult,
    Update,
)
from jaxinfer.prefill import PrefillPlanner, stop_at_bucket
from jaxinfer.request import FinishReason, Request
from jaxinfer.rope import LengthRule
from jaxinfer.running import RunningSet
from jaxinfer.slots import MAX_IN_FLIGHT
from jaxinfer.waiting import WaitingQueue

_FINISH_REASONS = {
    FINISHED_STOP: FinishReason.STOP,
    FINISHED_LENGTH: FinishReason.LENGTH,
    FINISHED_NAN: FinishReason.ERROR,
}
_NAN_ERROR = "the model produced NaN or infinite logits for this sequence, or its masks left no token to choose"


def plan_call(schedulers: Seq[Scheduler], *, max_steps: int) -> list[Plan | None]:
    """One plan per data shard for one device call, None where a shard has nothing to do in it.

    All shards run one program. Where one of them prefills it is a mixed step, which is one step for all; else a decode
    loop in which each has its own number of steps, up to `max_steps`. When a slot of a shard frees for which somebody
    waits there, the loop ends for all.
    """
    drafts = [scheduler.draft() for scheduler in schedulers]
    prefills = [draft.chunks for draft in drafts if draft.chunks]
    if prefills:
        alone = not any(draft.decoding for draft in drafts)
        stop_at_bucket(prefills, schedulers[0].config, alone=alone)
        max_steps = 1
    is_held_up = may_end_early = False
    for scheduler, draft in zip(schedulers, drafts, strict=True):
        scheduler.reserve(draft, max_steps)
        is_held_up |= draft.is_held_up
        may_end_early |= draft.exit_on_free and not prefills
    if is_held_up:  # the shard goes on once calls in flight were applied, so the others start no long loop
        for draft in drafts:
            draft.num_steps = min(draft.num_steps, 1)
    return [scheduler.issue(draft, may_end_early) for scheduler, draft in zip(schedulers, drafts, strict=True)]


@dataclass(slots=True)
class Draft:
    """What one data shard would do in the next call, while the shards settle what kind of call it is."""

    decoding: list[Sequence]  # may still be running on the device
    most_steps: int  # that the longest of them can yet take
    chunks: list[Chunk] | tuple[()] = ()
    admissions: Seq[Admission] = ()
    copies: Seq[PageCopy] = ()
    num_steps: int = 0  # 0: takes no part
    exit_on_free: bool = False
    is_held_up: bool = False  # takes no part although somebody could go on, were calls in flight applied


class Scheduler:
    """Owns the sequences of one data shard, their slots and (through the cache) their pages. One thread.

    Calls must be dispatched in the order of `plan` and applied in that order, at most MAX_IN_FLIGHT at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: CacheManager,
        *,
        max_model_len: int,
        length_rule: LengthRule | None = None,
        clock: Callable[[], float] = time.monotonic,
        data_shard: int = 0,
        arrivals: Arrivals | None = None,
    ):
        """config: its `max_num_seqs` are the slots of this shard. arrivals: what all data shards have in common."""
        self.config = config
        self._cache = cache
        self._clock = clock
        self._data_shard = data_shard
        self._arrivals = Arrivals(config.max_queue, max_model_len, clock) if arrivals is None else arrivals
        self._waiting = WaitingQueue(config.batching, config.max_num_seqs, config.max_batch_wait_s)
        self._running = RunningSet(config, cache, self._waiting, length_rule)
        self._prefill = PrefillPlanner(config, self._running, self._waiting)
        self._outgrown: list[Sequence] = []  # left their slots to be computed anew; calls in flight may name them
        self._in_flight: deque[Plan] = deque()
        self._generation = 0

    # ---- requests -----------------------------------------------------------------------------------------------

    def add(self, request: Request, *, seeds: Seq[int]) -> list[Sequence]:
        """Queue one sequence per completion. seeds: one per completion.

        Raises QueueFullError (all completions or none), RequestError when they could never fit the queue.
        """
        sequences = self._arrivals.receive(request, seeds, self.num_waiting)
        self.enqueue(sequences)
        return sequences

    def enqueue(self, sequences: Seq[Sequence], *, num_cached: int = 0) -> None:
        """Let all completions of a request wait for slots of this shard. num_cached: prompt rows in its prefix cache.

        Later completions of a prompt of at least a page wait (parked) until the first one's prefill was applied, and
        then share its pages; not in static and dynamic mode, where they belong to the same batch.
        """
        leader, *siblings = sequences
        for sequence in sequences:
            sequence.data_shard, sequence.prefill_planned = self._data_shard, num_cached
        self._waiting.push(leader)
        share = self._cache.prefix_caching and self.config.batching == "continuous"
        if share and leader.num_prompt >= self._cache.page_size:
            leader.siblings = siblings
            for sibling in siblings:
                sibling.prefill_planned = leader.num_prompt - 1
                self._waiting.park(sibling)
        else:
            for sibling in siblings:
                self._waiting.push(sibling)

    def stuck_head(self) -> Sequence | None:
        """Who is next, where slots or pages are short: it cannot be admitted yet."""
        head = self._waiting.head()
        stuck = head is not None and (not self.num_free_slots or self._running.is_short_for(head))
        return head if stuck else None

    def withdraw(self, leader: Sequence) -> list[Sequence] | None:
        """Take a waiting request out, all completions; None, and nothing done, where one ran or is on its own."""
        if leader.was_admitted or len(leader.siblings) != leader.request.sampling.n - 1:
            return None
        sequences = [leader, *(sibling for sibling in leader.siblings if sibling.finish_reason is None)]
        leader.siblings = []
        for sequence in sequences:
            self._waiting.remove(sequence)
        return sequences

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from the host (abort, stop string): its pages and slot are free now; no-op once it ended."""
        if sequence.finish_reason is not None:
            return
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.leave(sequence, stop=True)
        self._end(sequence, reason)

    # ---- planning -----------------------------------------------------------------------------------------------

    def plan(self, *, max_steps: int) -> Plan | None:
        """The next call, or None when there is nothing to do before calls in flight are applied or someone arrives.

        A plan returned is a plan in flight: dispatch it, then `apply` its result. max_steps bounds a decode loop.
        None with work left and nothing in flight: dynamic batching waits, until `next_deadline()`.
        """
        return plan_call([self], max_steps=max_steps)[0]

    def draft(self) -> Draft:
        """First of three parts of a plan: the chunks, if anybody has a prompt to compute and pages are there."""
        self._cache.end_copies()
        if not len(self._running):
            self._waiting.open_batch(self._clock())
        decoding, most_steps = self._running.decoding()
        draft = Draft(decoding, most_steps)
        if not self._prefill.has_work:
            return draft
        may_preempt, num_preemptions = not self._in_flight, self.num_preemptions
        if not self._running.reserve_steps(decoding, 1, may_preempt=may_preempt):
            draft.most_steps = 0
            return draft
        draft.chunks, draft.admissions, draft.copies = self._prefill.plan(
            self.config.max_num_batched_tokens - len(decoding),
            may_preempt=may_preempt,
            may_admit=self.num_preemptions == num_preemptions,
        )
        return draft

    def reserve(self, draft: Draft, max_steps: int) -> None:
        """Second: how many steps have pages."""
        if draft.chunks:
            draft.num_steps = 1
            return
        decoding = draft.decoding
        num_steps = min(max_steps, self.config.loop_steps, draft.most_steps)
        if num_steps > 0:
            num_steps = self._running.reserve_steps(decoding, num_steps, may_preempt=not self._in_flight)
        somebody_waits = self._waiting.head() is not None
        if num_steps <= 0 or all(sequence.slot is None for sequence in decoding):
            draft.is_held_up = somebody_waits or bool(decoding or self._running.prefilling())
        else:
            draft.num_steps, draft.exit_on_free = num_steps, somebody_waits

    def issue(self, draft: Draft, may_end_early: bool) -> Plan | None:
        """Third: make the plan and count its tokens as pending. may_end_early: some shard leaves on a free slot."""
        num_steps = draft.num_steps
        if num_steps == 0:
            return None
        assert len(self._in_flight) < MAX_IN_FLIGHT, f"{MAX_IN_FLIGHT} calls are in flight; apply one first"
        least_steps = 0 if may_end_early else num_steps
        running = []
        for sequence in draft.decoding:
            if sequence.slot is not None:
                sequence.most_pending += num_steps
                sequence.least_pending += least_steps
                running.append((sequence.slot, sequence))
        for chunk in draft.chunks:
            if chunk.final:
                sequence = chunk.sequence
                sequence.most_pending += 1
                sequence.least_pending += 1
                self._running.start_decoding(sequence)
                running.append((chunk.slot, sequence))
        cells, stops, num_slots = self._running.take_edits()
        plan = Plan(
            chunks=tuple(draft.chunks),
            admissions=tuple(draft.admissions),
            cells=cells,
            copies=tuple(draft.copies),
            stops=stops,
            num_steps=num_steps,
            exit_on_free=may_end_early and draft.exit_on_free,
            running=tuple(running),
            num_slots=num_slots,
            least_steps=least_steps,
            generation=self._generation,
        )
        self._in_flight.append(plan)
        return plan

    # ---- results ------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan, result: StepResult) -> list[Update]:
        """Take over what a call did. Sequences that ended meanwhile are left out (none was preempted meanwhile)."""
        if plan.generation != self._generation:
            return []
        assert self._in_flight and self._in_flight[0] is plan, "results must be applied in the order of the plans"
        self._in_flight.popleft()
        for chunk in plan.chunks:
            if chunk.sequence.finish_reason is None:
                self._running.commit(chunk.sequence, chunk.start + chunk.length)
                if chunk.final:
                    self._unpark_siblings(chunk.sequence)
        updates = []
        for slot, sequence in plan.running:
            if sequence.finish_reason is not None or sequence.slot is None:  # it ended, or has outgrown its K/V
                continue
            sequence.most_pending -= plan.num_steps
            sequence.least_pending -= plan.least_steps
            drawn, code = result.tokens[slot], result.finished[slot]
            token_ids = tuple(drawn[: drawn.index(-1)] if -1 in drawn else drawn)
            sequence.tokens += token_ids
            num_rows_written = len(sequence.tokens) - 1
            if num_rows_written >= sequence.commit_at and code != FINISHED_NAN:
                self._running.commit(sequence, num_rows_written)
            if code == FINISHED_LENGTH and len(sequence.tokens) < sequence.max_total:
                self._running.leave(sequence, stop=False)
                self._waiting.park(sequence)
                self._outgrown.append(sequence)
                updates.append(Update(sequence, slot, token_ids, None, None))
            elif code != RUNS:
                updates.append(self._end_on_device(sequence, slot, token_ids, code))
            elif token_ids:
                updates.append(Update(sequence, slot, token_ids, None, None))
        self._requeue_outgrown()
        return updates

    def _requeue_outgrown(self) -> None:
        """Sequences whose rotation changed with their length queue again once no call in flight names them."""
        if not self._outgrown:
            return
        named = {sequence.seq_id for plan in self._in_flight for _, sequence in plan.running}
        for sequence in self._outgrown:
            if sequence.seq_id not in named:
                self._waiting.unpark(sequence)
        self._outgrown = [sequence for sequence in self._outgrown if sequence.seq_id in named]

    def _end_on_device(self, sequence: Sequence, slot: int, token_ids: tuple[int, ...], code: int) -> Update:
        reason = _FINISH_REASONS[code]
        self._running.leave(sequence, stop=False, trusted=code != FINISHED_NAN)
        self._end(sequence, reason)
        return Update(sequence, slot, token_ids, reason, _NAN_ERROR if code == FINISHED_NAN else None)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._unpark_siblings(sequence)
        self._arrivals.one_ended()

    def _unpark_siblings(self, leader: Sequence) -> None:
        for sibling in leader.siblings:
            self._waiting.unpark(sibling)
        leader.siblings = []

    def reset_device(self) -> None:
        """The device state is lost: running sequences queue again, to be recomputed; calls in flight are void."""
        self._running.reset()
        self._in_flight.clear()
        self._requeue_outgrown()
        self._generation += 1

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Completions without a slot, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Completions with a slot."""
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        return self._running.num_free_slots

    @property
    def num_page_returns(self) -> int:
        """Rises whenever pages became available."""
        return self._cache.num_returns

    @property
    def num_preemptions(self) -> int:
        return self._running.num_preemptions

    @property
    def owed_rows(self) -> int:
        """Rows of waiting and running sequences still to be planned."""
        return self._waiting.owed_rows + self._running.owed_rows

    def outlook(self, sequence: Sequence) -> tuple[int, bool]:
        """What a new sequence would find here: rows in the prefix cache, and whether there are pages for the others."""
        return self._running.outlook(sequence)

    def usage(self) -> tuple[PoolUsage, ...]:
        """Pages per group, of all context shards."""
        return self._cache.usage()

    @property
    def has_work(self) -> bool:
        return len(self._running) > 0 or len(self._waiting) > 0

    def next_deadline(self) -> float | None:
        """Clock time at which a dynamic batch opens although it is not full; None when nothing waits for time."""
        return None if self.num_running else self._waiting.next_deadline()

    def check(self) -> None:
        """AssertionError names a slot or page that leaked or has two owners. Any time between calls."""
        self._running.check()
        self._waiting.check()
