"""A device without a model: executes Plans on dictionaries, checks every row a query sees, samples from its prefix.

The K/V row at a position is a hash of all tokens up to it, and the next token is a function of that row as read from
the page. So a lost token, a foreign page or a stale page-table cell changes the output or fails at once.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.cache import CacheManager
from jaxinfer.config import EngineConfig, KVShape, PageGroup
from jaxinfer.plan import Plan, Sequence, StepResult, Update
from jaxinfer.request import FinishReason, Priority, Request, SamplingParams
from jaxinfer.rope import LengthRule
from jaxinfer.scheduler import Scheduler
from jaxinfer.sharded_scheduler import ShardedScheduler
from jaxinfer.slots import max_cells_per_plan, max_copies_per_plan

VOCAB = 5
Call = tuple[Plan | None, ...]  # a device call: one plan per data shard


def row_hash(previous: int, token: int) -> int:
    return hash((previous, token))


def root_hash(request: Request, rule: LengthRule | None, num_tokens: int) -> int:
    """Where a sequence of `num_tokens` begins: tenants differ, and so may lengths."""
    length = rule.cache_salt(len(request.prompt_token_ids), num_tokens) if rule else ""
    return hash(("root", len(request.cache_salt), len(length)))


def last_row(request: Request, rule: LengthRule | None, tokens: list[int]) -> int:
    state = root_hash(request, rule, len(tokens))
    for token in tokens:
        state = row_hash(state, token)
    return state


def next_token(row: int, seed: int) -> int:
    return hash((row, seed)) % VOCAB


def expected_completion(
    request: Request, seed: int, max_total: int, rule: LengthRule | None
) -> tuple[list[int], FinishReason]:
    """What the fake model generates, and why it ends. Stop id and NaN are decided as the device does."""
    generated: list[int] = []
    while True:
        state = last_row(request, rule, [*request.prompt_token_ids, *generated])
        if is_nan(state, seed, request):
            return generated, FinishReason.ERROR
        token = next_token(state, seed)
        generated.append(token)
        if token in request.sampling.stop_token_ids:
            return generated, FinishReason.STOP
        if len(request.prompt_token_ids) + len(generated) == max_total:
            return generated, FinishReason.LENGTH


def is_nan(row: int, seed: int, request: Request) -> bool:
    """Requests named nan-* lose their logits at some rows."""
    return request.request_id.startswith("nan-") and hash((row, seed, "nan")) % 7 == 0


@dataclass
class Slot:
    sequence: Sequence
    tokens: list[int]
    tables: list[dict[int, int]]
    active: bool = False  # decodes


@dataclass
class FakeDevice:
    """Pages and slots of one data shard; pages lie on `context` shards. A call: `begin`, `step` by step, `end`."""

    config: EngineConfig
    groups: list[PageGroup]
    rule: LengthRule | None = None
    context: int = 1
    slots: dict[int, Slot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # per group: (context shard, page, offset) -> row
        self.pages: list[dict[tuple[int, int, int], int]] = [{} for _ in self.groups]

    def begin(self, plan: Plan) -> None:
        self.plan = plan
        self.tokens = np.full((plan.num_steps, self.config.max_num_seqs), -1, np.int32)
        self.finished = np.zeros(self.config.max_num_seqs, np.int8)
        self._edit(plan)

    @property
    def decoding(self) -> list[int]:
        """Slots that decode."""
        return [slot for slot, state in self.slots.items() if state.active]

    def step(self, index: int) -> None:
        decoding = self.decoding
        assert set(decoding) <= {slot for slot, _ in self.plan.running}, "a slot decodes that the plan does not know of"
        assert all(slot < self.plan.num_slots for slot in decoding), "a slot is over num_slots"
        for slot in decoding:
            state = self.slots[slot]
            self._sample(slot, state, len(state.tokens) - 1, self.tokens[index], self.finished)
        for chunk in self.plan.chunks:
            state = self.slots[chunk.slot]
            assert state.sequence is chunk.sequence and not state.active and chunk.length > 0
            for row in range(chunk.start, chunk.start + chunk.length - 1):
                self._write(state, row)
            last = chunk.start + chunk.length - 1
            assert chunk.final == (last == len(state.tokens) - 1)
            if chunk.final:
                state.active = True
                self._sample(chunk.slot, state, last, self.tokens[0], self.finished)
            else:
                self._write(state, last)

    def end(self) -> StepResult:
        return StepResult(self.tokens.T.tolist(), self.finished.tolist())

    def _edit(self, plan: Plan) -> None:
        for slot in plan.stops:
            assert slot < plan.num_slots
            self.slots.pop(slot, None)
        for admission in plan.admissions:
            assert admission.slot not in self.slots or not self.slots[admission.slot].active, "the slot is taken"
            sequence = admission.sequence
            tables = [{cell.index: cell.page for cell in cells} for cells in admission.pages]
            assert len(tables) == len(self.groups)
            self.slots[admission.slot] = Slot(sequence, list(sequence.tokens), tables)
        assert len({(slot, cell.group, cell.index) for slot, cell in plan.cells}) == len(plan.cells)
        for slot, cell in plan.cells:
            self.slots[slot].tables[cell.group][cell.index] = cell.page
        targets = {(copy.group, copy.shard, copy.target) for copy in plan.copies}
        assert not targets & {(copy.group, copy.shard, copy.source) for copy in plan.copies}
        for copy in plan.copies:
            pages = self.pages[copy.group]
            for offset in range(self.config.page_size):
                pages[copy.shard, copy.target, offset] = pages.get((copy.shard, copy.source, offset), -1)

    def _write(self, state: Slot, row: int) -> int:
        """Compute the row at this position from what the slot's own pages hold; returns it."""
        size = self.config.page_size
        result = 0
        for group, page_group in enumerate(self.groups):
            table, pages = state.tables[group], self.pages[group]
            assert table.get(row // size, 0) > 0, f"group {group}: row {row} has no page"
            window = page_group.window
            expected = root_hash(state.sequence.request, self.rule, len(state.tokens))
            first = 0 if window is None else max(0, row - window + 1)
            for seen in range(row + 1):
                expected = row_hash(expected, state.tokens[seen])
                if seen == row:
                    pages[self._place(table, row)] = expected
                if seen >= first:
                    assert table.get(seen // size, 0) > 0, f"group {group}: the page of row {seen} is gone at {row}"
                    held = pages.get(self._place(table, seen))
                    assert held == expected, f"group {group}: row {seen} is foreign at {row}"
            result = expected
        return result

    def _place(self, table: dict[int, int], row: int) -> tuple[int, int, int]:
        """The i-th page of a sequence is on context shard i % context."""
        index = row // self.config.page_size
        return index % self.context, table[index], row % self.config.page_size

    def _sample(self, slot: int, state: Slot, row: int, out: np.ndarray, finished: np.ndarray) -> None:
        value = self._write(state, row)
        sequence = state.sequence
        if is_nan(value, sequence.seed, sequence.request):
            finished[slot], state.active = 3, False
            return
        token = next_token(value, sequence.seed)
        out[slot] = token
        state.tokens.append(token)
        if token in sequence.request.sampling.stop_token_ids:
            finished[slot], state.active = 1, False
        elif len(state.tokens) == sequence.resident_max:
            finished[slot], state.active = 2, False


def run_call(devices: list[FakeDevice], plans: Call) -> list[StepResult | None]:
    """One call: all data shards in step. A shard without a plan stands still."""
    called = [(device, plan) for device, plan in zip(devices, plans, strict=True) if plan is not None]
    if any(plan.chunks for _, plan in called):
        assert all(plan.num_steps == 1 and not plan.exit_on_free for _, plan in called), "a mixed step is one step"
    for device, plan in called:
        device.begin(plan)
    index = 0
    while True:
        for device, plan in called:
            if index < plan.num_steps:
                device.step(index)
        index += 1
        if any(plan.exit_on_free and device.finished.any() for device, plan in called):
            break
        if not any(device.decoding and index < plan.num_steps for device, plan in called):
            break
    return [None if plan is None else device.end() for device, plan in zip(devices, plans, strict=True)]


class Driver:
    """The engine's loop: plan and dispatch call k + 1, then apply call k. data=None: a Scheduler without shards."""

    def __init__(
        self,
        config: EngineConfig,
        windows: tuple[int | None, ...],
        num_pages: list[int],
        max_model_len: int,
        rule: LengthRule | None = None,
        *,
        data: int | None = None,
        context: int = 1,
    ):
        self.rule, self.context = rule, context
        self.groups = [PageGroup(window, KVShape(1, 2), (index,)) for index, window in enumerate(windows)]
        self.caches = [
            CacheManager(
                self.groups, num_pages, config.page_size, prefix_caching=config.prefix_caching, context=context
            )
            for _ in range(data or 1)
        ]
        self.now_s = 0.0
        options = {"max_model_len": max_model_len, "length_rule": rule, "clock": lambda: self.now_s}
        if data is None:
            self.scheduler = Scheduler(config, self.caches[0], **options)
        else:
            self.scheduler = ShardedScheduler(config, self.caches, **options)
        self.is_sharded = data is not None
        self.config = dataclasses.replace(config, max_num_seqs=config.max_num_seqs // (data or 1))  # of one shard
        self._new_devices()
        self.flight: tuple[Call, list[StepResult | None]] | None = None
        self.got: dict[int, list[int]] = {}
        self.ended: dict[int, FinishReason] = {}
        self.sequences: list[Sequence] = []
        self.calls: list[Call] = []
        self.order: list[int] = []  # seq_ids in order of admission
        self.homes: dict[int, int] = {}  # by request object: the data shard of its admitted completions

    def _new_devices(self) -> None:
        self.devices = [FakeDevice(self.config, self.groups, self.rule, self.context) for _ in self.caches]

    @property
    def plans(self) -> list[Plan]:
        """Of all data shards, in order of calls."""
        return [plan for plans in self.calls for plan in plans if plan is not None]

    def add(self, request: Request, seed: int = 0) -> list[Sequence]:
        added = self.scheduler.add(request, seeds=[seed + index for index in range(request.sampling.n)])
        self.sequences += added
        self.got.update({sequence.seq_id: [] for sequence in added})
        return added

    def finish(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        if sequence.seq_id not in self.ended:
            self.ended[sequence.seq_id] = reason
        self.scheduler.finish(sequence, reason)

    def _plan(self, max_steps: int) -> Call | None:
        plan = self.scheduler.plan(max_steps=max_steps)
        return plan if plan is None or self.is_sharded else (plan,)

    def _apply(self, plans: Call, results: list[StepResult | None]) -> list[list[Update]]:
        if self.is_sharded:
            return self.scheduler.apply(plans, results)
        return [self.scheduler.apply(plans[0], results[0])]

    def step(self, max_steps: int = 16) -> list[Update]:
        """One turn of the engine's loop."""
        self.now_s += 0.01
        plans = self._plan(max_steps)
        if plans is None and self.flight is None and self.scheduler.has_work:
            deadline_s = self.scheduler.next_deadline()
            assert deadline_s is not None and deadline_s > self.now_s, "work waits, and nothing will start it"
        flight, self.flight = self.flight, None
        if plans is not None:
            self._check_call(plans, max_steps)
            self.calls.append(plans)
            self.flight = (plans, run_call(self.devices, plans))
        updates = [] if flight is None else self._apply(*flight)
        for shard, update in ((shard, update) for shard, news in enumerate(updates) for update in news):
            seq_id = update.sequence.seq_id
            assert seq_id not in self.ended, "an update after the end"
            assert update.sequence.data_shard == shard and (update.slot, update.sequence) in flight[0][shard].running
            self.got[seq_id] += update.token_ids
            if update.finish_reason is not None:
                self.ended[seq_id] = update.finish_reason
                assert (update.error is not None) == (update.finish_reason is FinishReason.ERROR)
        return [update for news in updates for update in news]

    def _check_call(self, plans: Call, max_steps: int) -> None:
        assert len(plans) == len(self.caches)
        for shard, plan in enumerate(plans):
            if plan is not None:
                self._check_plan(plan, max_steps)
                for admission in plan.admissions:
                    self.order.append(admission.sequence.seq_id)
                    home = self.homes.setdefault(id(admission.sequence.request), shard)
                    assert home == shard, "completions of a request on several shards, or one that moved"
                named = [*(sequence for _, sequence in plan.running), *(chunk.sequence for chunk in plan.chunks)]
                assert all(sequence.data_shard == shard for sequence in named)
        early = any(plan.exit_on_free for plan in plans if plan is not None)
        assert all(plan.least_steps == (0 if early else plan.num_steps) for plan in plans if plan is not None)

    def _check_plan(self, plan: Plan, max_steps: int) -> None:
        config = self.config
        assert plan.running or plan.chunks, "a plan that does nothing"
        assert 1 <= plan.num_steps <= (1 if plan.chunks else min(max_steps, config.loop_steps))
        final = sum(chunk.final for chunk in plan.chunks)
        used = sum(chunk.length for chunk in plan.chunks) + len(plan.running) - final
        assert not plan.chunks or used <= config.max_num_batched_tokens, "over the token budget"
        assert len(plan.chunks) <= config.max_prefill_seqs
        chunked = {chunk.slot for chunk in plan.chunks}
        assert len(chunked) == len(plan.chunks) and {a.slot for a in plan.admissions} <= chunked
        assert len(plan.cells) <= max_cells_per_plan(config, self.caches[0].windows, config.page_size)
        assert len(plan.copies) <= max_copies_per_plan(config, len(self.groups))
        slots = [slot for slot, _ in plan.running]
        assert len(set(slots)) == len(slots) and all(slot < plan.num_slots <= config.max_num_seqs for slot in slots)

    def reset(self) -> None:
        """A call failed: the device's state is gone, and with it the call in flight."""
        self._new_devices()
        lost, self.flight = self.flight, None
        self.scheduler.reset_device()
        if lost is not None:
            assert not any(self._apply(*lost))

    def drain(self, max_calls: int, max_steps: int = 16) -> None:
        """Run until nothing is left; AssertionError after `max_calls` turns: somebody starves."""
        for _ in range(max_calls):
            if not self.scheduler.has_work and self.flight is None:
                return
            self.step(max_steps)
            self.scheduler.check()
        raise AssertionError(f"work is left after {max_calls} calls")

    def check_answers(self) -> None:
        """Every sequence ended once, with the fake model's tokens (a prefix of them where the host ended it)."""
        for sequence in self.sequences:
            expected, reason = expected_completion(sequence.request, sequence.seed, sequence.max_total, self.rule)
            got = self.got[sequence.seq_id]
            if self.ended[sequence.seq_id] is FinishReason.ABORT:
                assert got == expected[: len(got)]
            else:
                assert (got, self.ended[sequence.seq_id]) == (expected, reason), f"sequence {sequence.seq_id}"
            assert sequence.finish_reason is self.ended[sequence.seq_id]
        self.scheduler.check()
        assert all(cache.num_sequences == 0 for cache in self.caches)
        assert all(usage.used == 0 for usage in self.scheduler.usage())


def least_pages(config: EngineConfig, window: int | None, max_model_len: int, context: int = 1) -> int:
    """Smallest pool of a context shard the engine would start with: its part of one longest sequence, a copy source,
    and the trash page."""
    rows = max_model_len
    if window is not None:
        rows = min(rows, window + 2 * max(config.max_num_batched_tokens, config.loop_steps))
    num_pages = -(-rows // config.page_size) + (0 if window is None else 1)
    return -(-num_pages // context) + 2


def make_request(rng: random.Random, index: int, max_prompt: int, *, kinds: tuple[str, ...] = ("req-",)) -> Request:
    """A random request; prompts share prefixes."""
    common = [[1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4, 1], [2] * 9, []]
    prompt = (rng.choice(common) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, max_prompt))])[:max_prompt]
    return Request(
        request_id=f"{rng.choice(kinds)}{index}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(
            max_tokens=rng.choice([1, 2, 7, 20, None]),
            stop_token_ids=rng.choice([(), (), (3,)]),
            n=rng.choice([1, 1, 1, 2, 3]),
        ),
        priority=rng.choice([Priority.ONLINE, Priority.ONLINE, Priority.BATCH]),
        cache_salt=rng.choice(["", "", "tenant"]),
    )
