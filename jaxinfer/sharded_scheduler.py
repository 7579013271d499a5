"""ShardedScheduler: one scheduler and cache per data shard, behind the interface of one.

Hides which shard a request goes to. Once admitted a sequence stays there: slots, pages and cached prefixes are that
shard's alone. What the shards' plans for one call must agree on is settled by `scheduler.plan_call`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from jaxinfer.arrivals import Arrivals
from jaxinfer.cache import CacheManager, PoolUsage
from jaxinfer.config import EngineConfig
from jaxinfer.plan import Plan, Sequence, StepResult, Update
from jaxinfer.request import FinishReason, Request
from jaxinfer.rope import LengthRule
from jaxinfer.scheduler import Scheduler, plan_call

# What a shard's load costs a newcomer, in prompt rows it might compute instead. Estimates, not measurements.
SEQUENCE_ROWS = 128  # one more sequence on a shard: a row in some hundred steps, which all shards wait for
NO_SLOT_ROWS = 1024  # one more place in the queue for a slot, or too few pages: the steps until another sequence ends


class ShardedScheduler:
    """Schedulers of len(caches) data shards. One thread.

    Calls must be dispatched in the order of `plan` and applied in that order, at most MAX_IN_FLIGHT at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        caches: Seq[CacheManager],
        *,
        max_model_len: int,
        length_rule: LengthRule | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """caches: one per data shard. `max_num_seqs` and `max_queue` of config are those of all shards together,
        `max_num_batched_tokens` and `max_prefill_seqs` those of each.
        """
        num_shards, num_slots = len(caches), config.max_num_seqs
        if num_slots % num_shards:
            near = num_slots // num_shards * num_shards
            choices = " or ".join(str(choice) for choice in (near, near + num_shards) if choice)
            raise ValueError(
                f"max_num_seqs={num_slots} must be a multiple of {num_shards} data shards, such as {choices}"
            )
        self._slots_per_shard = num_slots // num_shards
        self._shares_out = num_shards > 1 and config.batching == "continuous"  # other modes keep their batches
        self._refused: dict[
            tuple[int, int], tuple[int, int]
        ] = {}  # (giver, taker): what `_move_head` need not ask again
        own = dataclasses.replace(config, max_num_seqs=self._slots_per_shard)
        self._arrivals = Arrivals(config.max_queue, max_model_len, clock)
        self._schedulers = [
            Scheduler(
                own,
                cache,
                max_model_len=max_model_len,
                length_rule=length_rule,
                clock=clock,
                data_shard=shard,
                arrivals=self._arrivals,
            )
            for shard, cache in enumerate(caches)
        ]

    # ---- requests -----------------------------------------------------------------------------------------------

    def add(self, request: Request, *, seeds: Seq[int]) -> list[Sequence]:
        """Queue one sequence per completion, all on one data shard. seeds: one per completion.

        Raises QueueFullError (all completions or none), RequestError when they could never fit the queue.
        """
        sequences = self._arrivals.receive(request, seeds, self.num_waiting)
        if len(self._schedulers) == 1:
            self._schedulers[0].enqueue(sequences)
        else:
            _, shard, num_cached = min(self._offer(shard, sequences) for shard in range(len(self._schedulers)))
            self._schedulers[shard].enqueue(sequences, num_cached=num_cached)
        return sequences

    def _offer(self, shard: int, sequences: Seq[Sequence]) -> tuple[int, int, int]:
        """What a request would cost on that shard (in prompt rows), the shard, and prompt rows cached there.

        The cost is what is computed there before and for the newcomers, and the worth of who is there already.
        """
        scheduler, num_prompt = self._schedulers[shard], sequences[0].num_prompt
        num_cached, has_pages = scheduler.outlook(sequences[0])
        num_present = scheduler.num_running + scheduler.num_waiting
        num_held_up = max(0 if has_pages else 1, num_present + len(sequences) - self._slots_per_shard)
        rows = num_prompt - num_cached + scheduler.owed_rows
        return rows + SEQUENCE_ROWS * num_present + NO_SLOT_ROWS * num_held_up, shard, num_cached

    def _share_out(self) -> None:
        """Let shards with free slots take over requests that are next elsewhere and find no slot or pages there.

        Whatever was guessed when a request came, no shard idles while another one's queue stands still; but for a head
        that has to stay (it was preempted, say), which nobody overtakes.
        """
        givers = [shard for shard, scheduler in enumerate(self._schedulers) if scheduler.stuck_head() is not None]
        for taker in range(len(self._schedulers)) if givers else ():
            scheduler = self._schedulers[taker]
            while scheduler.num_waiting < scheduler.num_free_slots and scheduler.stuck_head() is None:
                if not any(self._move_head(giver, taker) for giver in givers):
                    break

    def _move_head(self, giver: int, taker: int) -> bool:
        """Move the request that is stuck at the head of a queue, unless a prefix cached there is worth the wait."""
        old, new = self._schedulers[giver], self._schedulers[taker]
        head = old.stuck_head()
        if head is None:
            return False
        asked = (head.seq_id, new.num_page_returns)
        if self._refused.get((giver, taker)) == asked:
            return False
        num_cached, has_pages = new.outlook(head)
        if has_pages and old.outlook(head)[0] - num_cached <= NO_SLOT_ROWS:
            sequences = old.withdraw(head)
            if sequences is not None:
                new.enqueue(sequences, num_cached=num_cached)
                return True
        self._refused[giver, taker] = asked
        return False

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from the host (abort, stop string): its pages and slot are free now; no-op once it ended."""
        self._schedulers[sequence.data_shard].finish(sequence, reason)

    # ---- planning and results -----------------------------------------------------------------------------------

    def plan(self, *, max_steps: int) -> tuple[Plan | None, ...] | None:
        """The next call: a plan per data shard, None where no row of the shard may advance in it.

        None instead of all plans: nothing to do before calls in flight are applied, someone arrives, or
        `next_deadline()`. Otherwise it is in flight: dispatch it, then `apply` its results. Where any plan has chunks
        it is a mixed step, and every plan has one step; else a decode loop, in which max_steps bounds all.
        """
        if self._shares_out:
            self._share_out()
        plans = tuple(plan_call(self._schedulers, max_steps=max_steps))
        return plans if any(plan is not None for plan in plans) else None

    def apply(self, plans: Seq[Plan | None], results: Seq[StepResult | None]) -> list[list[Update]]:
        """Take over what a call did to each data shard: what `Scheduler.apply` says, nothing where it had no plan."""
        updates = []
        for scheduler, plan, result in zip(self._schedulers, plans, results, strict=True):
            assert (plan is None) == (result is None), "a result without a plan, or the other way round"
            updates.append([] if plan is None or result is None else scheduler.apply(plan, result))
        return updates

    def reset_device(self) -> None:
        """The device state is lost: running sequences queue again, to be recomputed; calls in flight are void."""
        for scheduler in self._schedulers:
            scheduler.reset_device()

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Completions without a slot, preempted ones included."""
        return sum(scheduler.num_waiting for scheduler in self._schedulers)

    @property
    def num_running(self) -> int:
        """Completions with a slot."""
        return sum(scheduler.num_running for scheduler in self._schedulers)

    @property
    def num_preemptions(self) -> int:
        return sum(scheduler.num_preemptions for scheduler in self._schedulers)

    @property
    def has_work(self) -> bool:
        return any(scheduler.has_work for scheduler in self._schedulers)

    def next_deadline(self) -> float | None:
        """Clock time at which a dynamic batch opens although it is not full; None when nothing waits for time, or
        some shard runs sequences."""
        if self.num_running:
            return None
        deadlines = [scheduler.next_deadline() for scheduler in self._schedulers]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def usage(self) -> tuple[PoolUsage, ...]:
        """Pages per group, of all data and context shards."""
        return PoolUsage.add(scheduler.usage() for scheduler in self._schedulers)

    def check(self) -> None:
        """AssertionError names a slot or page that leaked or has two owners. Any time between calls."""
        for scheduler in self._schedulers:
            scheduler.check()
