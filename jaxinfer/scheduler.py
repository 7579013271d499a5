"""Scheduler: what the next device call does, planned while earlier calls still run.

Hides the token budget, chunked prefill, the order of admission, and what calls in flight may yet do: the host knows a
running sequence's length only up to them, until `apply` tells. Slots, pages and preemption are in running.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from jaxinfer.cache import CacheManager, PageCopy
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
from jaxinfer.request import FinishReason, QueueFullError, Request, RequestError
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


# What another step costs, in prefill tokens: measured on a CPU, the shipped model (docs/performance.md). Decode rows
# that take part use the step anyway.
STEP_TOKENS, LONE_STEP_TOKENS = 32, 128


def unpadded(num_tokens: int, buckets: Seq[int], step_tokens: int) -> int:
    """How many of `num_tokens` to compute now: all, or the largest bucket below where that saves over `step_tokens`.

    buckets: ascending sizes that steps are compiled for; the last one is at least `num_tokens`.
    """
    above = next(index for index, bucket in enumerate(buckets) if bucket >= num_tokens)
    if buckets[above] == num_tokens or above == 0:
        return num_tokens
    now = buckets[above - 1]
    later = next(bucket for bucket in buckets if bucket >= num_tokens - now)
    return now if buckets[above] - now - later > step_tokens else num_tokens


class Scheduler:
    """Owns all sequences, their slots and (through the cache) their pages. One thread.

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
    ):
        self._config = config
        self._cache = cache
        self._max_model_len = max_model_len
        self._clock = clock
        self._waiting = WaitingQueue(config.batching, config.max_num_seqs, config.max_batch_wait_s)
        self._running = RunningSet(config, cache, self._waiting, length_rule)
        self._outgrown: list[Sequence] = []  # left their slots to be computed anew; calls in flight may name them
        self._in_flight: deque[Plan] = deque()
        self._next_seq_id = 0
        self._generation = 0
        self._last_end_s: float | None = None
        self._seconds_per_end = 1.0

    # ---- requests -----------------------------------------------------------------------------------------------

    def add(self, request: Request, *, seeds: Seq[int]) -> list[Sequence]:
        """Queue one sequence per completion. seeds: one per completion.

        Later completions of a prompt of at least a page wait (parked) until the first one's prefill was applied, and
        then share its pages; not in static and dynamic mode, where they belong to the same batch.
        Raises QueueFullError (all completions or none), RequestError when they could never fit the queue.
        """
        num = request.sampling.n
        assert len(seeds) == num, f"{len(seeds)} seeds for n={num}"
        if num > self._config.max_queue:
            raise RequestError("n", f"{num} completions can never wait at once: max_queue is {self._config.max_queue}")
        if len(self._waiting) + num > self._config.max_queue:
            raise QueueFullError(self._config.max_queue, min(60.0, max(0.1, self._seconds_per_end * num)))
        now_s = self._clock()
        prompt = request.prompt_token_ids
        max_tokens = request.sampling.max_tokens
        wanted = self._max_model_len if max_tokens is None else len(prompt) + max_tokens
        sequences = [
            Sequence(
                seq_id=self._next_seq_id + index,
                request=request,
                index=index,
                seed=seed,
                arrival_s=now_s,
                tokens=list(prompt),
                num_prompt=len(prompt),
                max_total=min(wanted, self._max_model_len),
                rank=int(request.priority),
            )
            for index, seed in enumerate(seeds)
        ]
        self._next_seq_id += num
        share = self._cache.prefix_caching and self._config.batching == "continuous"
        if share and num > 1 and len(prompt) >= self._cache.page_size:
            self._waiting.push(sequences[0])
            sequences[0].siblings = sequences[1:]
            for sibling in sequences[1:]:
                self._waiting.park(sibling)
        else:
            for sequence in sequences:
                self._waiting.push(sequence)
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
        self._cache.end_copies()
        if not len(self._running):
            self._waiting.open_batch(self._clock())
        decoding, most_left = self._running.decoding()
        if self._running.prefilling() or (self._running.has_free_slot and self._waiting.head() is not None):
            num_preempted = self.num_preemptions
            if not self._running.reserve_steps(decoding, 1, may_preempt=not self._in_flight):
                return None
            chunks, admissions, copies = self._plan_prefill(
                self._config.max_num_batched_tokens - len(decoding), num_preempted
            )
            if chunks:
                self._stop_at_bucket(chunks, alone=not decoding)
                return self._issue(decoding, 1, chunks, admissions, copies)
        num_steps = min(max_steps, self._config.loop_steps, most_left)
        if num_steps > 0:
            num_steps = self._running.reserve_steps(decoding, num_steps, may_preempt=not self._in_flight)
        if num_steps <= 0 or all(sequence.slot is None for sequence in decoding):
            return None
        return self._issue(decoding, num_steps, [], [], [])

    def _plan_prefill(self, budget: int, num_preempted: int) -> tuple[list[Chunk], list[Admission], list[PageCopy]]:
        """Chunks for at most `budget` tokens: admitted sequences first, in order of admission, then new ones.

        Nobody is admitted when this plan preempted somebody: `num_preemptions` was `num_preempted` before it.
        """
        chunks: list[Chunk] = []
        for sequence in self._running.prefilling():
            if sequence.slot is None:  # preempted for an earlier one
                continue
            if len(chunks) == self._config.max_prefill_seqs:
                break
            length = self._chunk_length(sequence.prefill_end - sequence.prefill_planned, budget)
            if length == 0:
                break
            if not self._running.reserve_chunk(sequence, length, chunks, may_preempt=not self._in_flight):
                continue
            chunks.append(self._chunk(sequence, length))
            budget -= length
        admissions: list[Admission] = []
        copies: list[PageCopy] = []
        while self.num_preemptions == num_preempted and len(chunks) < self._config.max_prefill_seqs:
            admitted = self._admit(budget)
            if admitted is None:
                break
            admission, chunk, page_copies = admitted
            admissions.append(admission)
            chunks.append(chunk)
            copies += page_copies
            budget -= chunk.length
        return chunks, admissions, copies

    def _chunk_length(self, num_left: int, budget: int) -> int:
        """Rows to compute now, 0 for none. Without chunked prefill a prompt waits until it fits the step whole.

        What exceeds even an empty step (a long sequence recomputed after preemption) is split all the same.
        """
        if self._config.chunked_prefill or num_left > self._config.max_num_batched_tokens:
            return max(0, min(num_left, budget))
        return num_left if num_left <= budget else 0

    def _stop_at_bucket(self, chunks: list[Chunk], *, alone: bool) -> None:
        """Shorten the last chunk to a bucket's edge where two smaller steps cost less than one padded one.

        A step of 264 tokens would run as one of 512; 256 now and 8 in the next one, with whoever comes by then, is
        half of that. The pages stay reserved: the next chunk needs them.
        """
        last = chunks[-1]
        total = sum(chunk.length for chunk in chunks)
        kept = last.length - (
            total - unpadded(total, self._config.prefill_buckets, LONE_STEP_TOKENS if alone else STEP_TOKENS)
        )
        if kept == last.length or kept < 1 or not self._config.chunked_prefill:
            return
        last.sequence.prefill_planned -= last.length - kept
        chunks[-1] = last._replace(length=kept, final=False)

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        assert sequence.slot is not None
        start = sequence.prefill_planned
        sequence.prefill_planned += length
        return Chunk(sequence.slot, sequence, start, length, sequence.prefill_planned == sequence.prefill_end)

    def _admit(self, budget: int) -> tuple[Admission, Chunk, tuple[PageCopy, ...]] | None:
        """Give the head of the queue a slot, its cached prefix, and a first chunk; None when it must wait."""
        sequence = self._waiting.head()
        if sequence is None or budget < 1 or not self._running.has_free_slot:
            return None
        admitted = self._running.admit(sequence, lambda num_left: self._chunk_length(num_left, budget))
        if admitted is None:
            return None
        self._waiting.pop()
        admission, length, copies = admitted
        return admission, self._chunk(sequence, length), copies

    def _issue(
        self,
        decoding: list[Sequence],
        num_steps: int,
        chunks: list[Chunk],
        admissions: list[Admission],
        copies: list[PageCopy],
    ) -> Plan:
        """Make the plan and count its tokens as pending."""
        assert len(self._in_flight) < MAX_IN_FLIGHT, f"{MAX_IN_FLIGHT} calls are in flight; apply one first"
        exit_on_free = not chunks and self._waiting.head() is not None
        least_steps = 0 if exit_on_free else num_steps
        running = []
        for sequence in decoding:
            if sequence.slot is not None:
                sequence.most_pending += num_steps
                sequence.least_pending += least_steps
                running.append((sequence.slot, sequence))
        for chunk in chunks:
            if chunk.final:
                sequence = chunk.sequence
                sequence.most_pending += 1
                sequence.least_pending += 1
                self._running.start_decoding(sequence)
                running.append((chunk.slot, sequence))
        cells, stops, num_slots = self._running.take_edits()
        plan = Plan(
            chunks=tuple(chunks),
            admissions=tuple(admissions),
            cells=cells,
            copies=tuple(copies),
            stops=stops,
            num_steps=num_steps,
            exit_on_free=exit_on_free,
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
        now_s = self._clock()
        if self._last_end_s is not None:
            self._seconds_per_end += 0.1 * (now_s - self._last_end_s - self._seconds_per_end)
        self._last_end_s = now_s

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
    def num_preemptions(self) -> int:
        return self._running.num_preemptions

    @property
    def num_in_flight(self) -> int:
        """Plans handed out and not yet applied."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        return len(self._running) > 0 or len(self._waiting) > 0

    def next_deadline(self) -> float | None:
        """Clock time at which a dynamic batch opens although it is not full; None when nothing waits for time."""
        return None if self.num_running else self._waiting.next_deadline()

    def check(self) -> None:
        """AssertionError names a slot or page that leaked or has two owners. Any time between calls."""
        self._running.check()
