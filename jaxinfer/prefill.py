"""Which prompt rows the next mixed step computes, and who is admitted for it.

Hides the token budget, chunked prefill, the order of admission, and that the last chunk stops at the edge of a compiled
size where padding would cost more than another step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from jaxinfer.cache import PageCopy
from jaxinfer.config import EngineConfig
from jaxinfer.plan import Admission, Chunk, Sequence
from jaxinfer.running import RunningSet
from jaxinfer.waiting import WaitingQueue

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


def stop_at_bucket(shards: Seq[list[Chunk]], config: EngineConfig, *, alone: bool) -> None:
    """Shorten each data shard's last chunk to a bucket's edge where two smaller steps cost less than one padded one.

    A step of 264 tokens would run as one of 512; 256 now and 8 in the next one, with whoever comes by then, is half
    of that. All shards run the size that the fullest one needs, so they stop there together or not at all. Pages stay
    reserved: the next chunk needs them. alone: no decode row takes part.
    """
    if not config.chunked_prefill:
        return
    totals = [sum(chunk.length for chunk in chunks) for chunks in shards]
    num_tokens = unpadded(max(totals), config.prefill_buckets, LONE_STEP_TOKENS if alone else STEP_TOKENS)
    over = [(chunks, total - num_tokens) for chunks, total in zip(shards, totals, strict=True) if total > num_tokens]
    if any(chunks[-1].length <= excess for chunks, excess in over):
        return
    for chunks, excess in over:
        last = chunks[-1]
        last.sequence.prefill_planned -= excess
        chunks[-1] = last._replace(length=last.length - excess, final=False)


class PrefillPlanner:
    """Chunks for one step. What it plans counts as planned: the caller must issue it."""

    def __init__(self, config: EngineConfig, running: RunningSet, waiting: WaitingQueue):
        self._config = config
        self._running = running
        self._waiting = waiting

    @property
    def has_work(self) -> bool:
        """Whether somebody has rows to compute, or might be admitted."""
        return bool(self._running.prefilling()) or (
            self._running.num_free_slots > 0 and self._waiting.head() is not None
        )

    def plan(
        self, budget: int, *, may_preempt: bool, may_admit: bool
    ) -> tuple[list[Chunk], list[Admission], list[PageCopy]]:
        """Chunks for at most `budget` tokens: admitted sequences first, in order of admission, then new ones.

        Nobody is admitted unless `may_admit`, nor when a chunk's pages took a preemption.
        """
        chunks: list[Chunk] = []
        num_preemptions = self._running.num_preemptions
        for sequence in self._running.prefilling():
            if sequence.slot is None:  # preempted for an earlier one
                continue
            if len(chunks) == self._config.max_prefill_seqs:
                break
            length = self._chunk_length(sequence.prefill_end - sequence.prefill_planned, budget)
            if length == 0:
                break
            if not self._running.reserve_chunk(sequence, length, chunks, may_preempt=may_preempt):
                continue
            chunks.append(self._chunk(sequence, length))
            budget -= length
        admissions: list[Admission] = []
        copies: list[PageCopy] = []
        may_admit = may_admit and self._running.num_preemptions == num_preemptions
        while may_admit and len(chunks) < self._config.max_prefill_seqs:
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

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        assert sequence.slot is not None
        start = sequence.prefill_planned
        sequence.prefill_planned += length
        return Chunk(sequence.slot, sequence, start, length, sequence.prefill_planned == sequence.prefill_end)

    def _admit(self, budget: int) -> tuple[Admission, Chunk, tuple[PageCopy, ...]] | None:
        """Give the head of the queue a slot, its cached prefix, and a first chunk; None when it must wait."""
        sequence = self._waiting.head()
        if sequence is None or budget < 1 or not self._running.num_free_slots:
            return None
        admitted = self._running.admit(sequence, lambda num_left: self._chunk_length(num_left, budget))
        if admitted is None:
            return None
        admission, length, copies = admitted
        return admission, self._chunk(sequence, length), copies
