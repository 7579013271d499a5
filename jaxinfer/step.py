"""The two compiled drivers around the one forward pass: `mixed_step` and `decode_loop`.

Both take (parameters, donated DeviceState, edits) and give (DeviceState, Outcome). What they hide: that a packed
batch is decode rows followed by prefill chunks, and that sampling, stop detection and history are on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer import sampling
from jaxinfer.batch import (
    NO_TOKEN,
    DeviceState,
    Limits,
    Record,
    SlotState,
    admission_record,
    control_record,
)
from jaxinfer.config import ModelConfig, page_groups
from jaxinfer.edits import admit, apply_control, chunk_layout, copy_pages
from jaxinfer.forward import Batch, Forward
from jaxinfer.models.transformer import Decoder
from jaxinfer.outcome import Outcome, Trace, empty_trace, pack, put_step
from jaxinfer.plan import FINISHED_LENGTH, FINISHED_NAN, FINISHED_STOP, RUNS
from pallas_kernels.attention import Ragged
from sharding.parallel import Parallel

Parameters = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Drivers:
    """`mixed_step` and `decode_loop` for one model and one set of limits, as plain functions to be jitted.

    On a mesh each is what one device does with its own parts of the arguments: `sharding.mesh.DeviceMesh.run` makes it
    one program of whole arrays. Slots are those of a data shard.
    """

    model: ModelConfig
    limits: Limits
    merge: Callable[[Parameters], Decoder]
    parallel: Parallel
    merge_prefill: Callable[[Parameters], Decoder]  # a decoder whose layers may split tokens between them

    def decode_loop(
        self, parameters: Parameters, state: DeviceState, control: jax.Array, *, num_slots: int
    ) -> tuple[DeviceState, Outcome]:
        """Up to `num_steps` decode steps over the first `num_slots` slots in one while loop."""
        edits = self._control.unpack(control)
        state = replace(state, slots=apply_control(state.slots, edits))
        decoder = self.merge(parameters)
        trace = empty_trace(self.limits.loop_steps, num_slots)
        if self.parallel.stages > 1:
            state, trace, steps, busy = self._circulate(decoder, state, trace, edits, num_slots)
            return state, self._told(trace, steps, busy)
        goes_on = _goes_on(state.slots, trace, edits, num_slots, jnp.int32(0), edits["num_steps"])

        def body(carry: tuple[jax.Array, DeviceState, Trace, jax.Array]) -> Any:
            step, state, trace, _ = carry
            active = ~state.slots.done[:num_slots]
            if self.parallel.data > 1:  # another data shard may have more steps to make
                active &= step < edits["num_steps"]
            state, trace = self._decode_step(decoder, state, trace, step, active)
            more = _goes_on(state.slots, trace, edits, num_slots, step + 1, edits["num_steps"])
            return step + 1, state, trace, self._in_step(more, trace, edits)

        start = (jnp.int32(0), state, trace, self._in_step(goes_on, trace, edits))
        steps, state, trace, _ = lax.while_loop(lambda carry: carry[-1], body, start)
        return state, self._told(trace, steps)

    def mixed_step(
        self,
        parameters: Parameters,
        state: DeviceState,
        control: jax.Array,
        admission: jax.Array,
        *,
        num_slots: int,
        prefill_tokens: int,
    ) -> tuple[DeviceState, Outcome]:
        """One step over a decode row per slot plus up to `prefill_tokens` tokens of prefill chunks."""
        edits = self._admission.unpack(admission)
        control_edits = self._control.unpack(control)
        slots = apply_control(state.slots, control_edits)
        slots = admit(slots, edits, self.parallel.vocabulary)
        group_of = [self._forward.group_of[layer] for layer in sorted(self._forward.group_of)]
        cache = copy_pages(state.cache, edits, group_of, self.parallel.on_context_shard)
        decoder = self.merge_prefill(parameters)

        chunks = chunk_layout(edits, prefill_tokens, num_slots)
        decoding = ~slots.done[:num_slots]
        if self.parallel.data > 1:  # a data shard without a plan has no pages for another step
            decoding &= control_edits["num_steps"] > 0
        position = jnp.where(decoding, slots.num_tokens[:num_slots] - 1, 0)
        chunk_tokens = slots.tokens[chunks.token_slot, chunks.position]
        positions = jnp.concatenate([position, chunks.position])
        kv_len = jnp.concatenate([jnp.where(decoding, position + 1, 0), chunks.kv_len])
        q_start = jnp.concatenate([jnp.arange(num_slots, dtype=jnp.int32), chunks.q_start])
        ragged = tuple(
            Ragged(
                q_start=q_start,
                kv_len=kv_len,
                page_table=jnp.concatenate([table[:num_slots], table[chunks.slot]]),
                q_position=positions,
                width=1,
                num_decode_seqs=num_slots,
            )
            for table in slots.page_table
        )
        batch = Batch(
            tokens=jnp.concatenate([_last_tokens(slots, num_slots), jnp.where(chunks.used, chunk_tokens, 0)]),
            positions=positions,
            lengths=jnp.concatenate(
                [
                    _lengths(self.model, slots, jnp.arange(num_slots), position),
                    _lengths(self.model, slots, chunks.token_slot, chunks.position),
                ]
            ),
            ragged=ragged,
        )
        hidden, cache = self._forward.whole(decoder, cache, batch)

        # each slot samples from one row: its decode row, or the last token of its final chunk
        row = jnp.arange(num_slots, dtype=jnp.int32)
        nobody = slots.done.shape[0]  # a slot from num_slots on is there, and nobody's
        final_slot = jnp.where(chunks.final, chunks.slot, nobody)
        row = row.at[final_slot].set(chunks.last_row, mode="drop")
        ends_prefill = jnp.zeros(num_slots, bool).at[final_slot].set(True, mode="drop")
        slots = replace(slots, done=slots.done.at[final_slot].set(False, mode="drop"))
        logits = decoder.unembed(hidden[row])
        trace = empty_trace(1, num_slots)
        slots, trace = self._advance(slots, trace, jnp.int32(0), logits, decoding | ends_prefill)
        return DeviceState(cache, slots), self._told(trace, jnp.int32(1))._replace(hidden=hidden[num_slots:])

    @property
    def _control(self) -> Record:
        return control_record(self.limits)

    @property
    def _admission(self) -> Record:
        return admission_record(self.limits, len(page_groups(self.model)))

    @cached_property
    def _forward(self) -> Forward:
        return Forward(stage_model(self.model, self.parallel.stages), self.parallel)

    def _in_step(self, more: jax.Array, trace: Trace, edits: dict[str, jax.Array]) -> jax.Array:
        """Whether the loop goes on, the same for all data shards: as long as one does, until one has freed a slot."""
        if self.parallel.data == 1:
            return more
        freed = jnp.any(trace.finished != RUNS) & (edits["exit_on_free"] != 0)
        return self.parallel.any_data(more) & ~self.parallel.any_data(freed)

    def _told(self, trace: Trace, steps: jax.Array, busy: jax.Array | None = None) -> Outcome:
        """What every host hears: all data shards' slots, in order."""
        outcome, parallel = pack(trace, steps), self.parallel
        return Outcome(
            parallel.all_data(outcome.main, 0),
            parallel.all_data(outcome.top_ids, 1),
            parallel.all_data(outcome.top_logprobs, 1),
            busy=busy,
        )

    def _rows(self, slots: SlotState, active: jax.Array, first: jax.Array | int) -> tuple[Batch, SlotState]:
        """A decode step's batch over the slots from `first` on that are `active: bool[n]`, and their rows."""
        n = active.shape[0]
        mine = slot_rows(slots, first, n)
        position = jnp.where(active, mine.num_tokens - 1, 0)
        ragged = tuple(
            Ragged(
                q_start=jnp.arange(n + 1, dtype=jnp.int32),
                kv_len=jnp.where(active, position + 1, 0),
                page_table=table,
                q_position=position,
                width=1,
                num_decode_seqs=n,
            )
            for table in mine.page_table
        )
        lengths = _lengths(self.model, mine, jnp.arange(n), position)
        return Batch(_last_tokens(mine, n), position, lengths, ragged), mine

    def _decode_step(
        self, decoder: Decoder, state: DeviceState, trace: Trace, step: jax.Array, active: jax.Array
    ) -> tuple[DeviceState, Trace]:
        batch, _ = self._rows(state.slots, active, 0)
        stream, cache = self._forward.layers(decoder, decoder.begin(batch.tokens), state.cache, batch)
        logits = decoder.unembed(decoder.finish(stream))
        slots, trace = self._advance(state.slots, trace, step, logits, active)
        return DeviceState(cache, slots), trace

    def _circulate(
        self, decoder: Decoder, state: DeviceState, trace: Trace, edits: dict[str, jax.Array], num_slots: int
    ) -> tuple[DeviceState, Trace, jax.Array, jax.Array]:
        """Decode steps through a pipeline: as many micro-batches of slots as stages, each always in one of them.

        What leaves the last stage is sampled and enters the first at the next tick, so stages idle only while the loop
        fills and drains. Also returns how many steps were made, and i32[2]: ticks times stages, and those with work.
        """
        pipeline = self.parallel.pipeline
        n = num_slots // pipeline.stages
        num_ticks = edits["num_steps"] * pipeline.stages + pipeline.fill_ticks()

        def active(slots: SlotState, index: jax.Array, passes: jax.Array) -> jax.Array:
            alive = ~lax.dynamic_slice_in_dim(slots.done, index * n, n)
            return alive & (passes >= 0) & (passes < edits["num_steps"])

        def tick(carry: Any) -> Any:
            t, state, trace, received, steps, busy, _ = carry
            slots = state.slots
            entering = lax.rem(t, pipeline.stages)
            begun = decoder.begin(_last_tokens(slot_rows(slots, entering * n, n), n))
            index, passes = pipeline.micro_batch(t)
            alive = active(slots, index, passes)
            batch, _ = self._rows(slots, alive, index * n)
            begun = pipeline.first_or(begun, received)
            stream, cache = self._forward.layers(decoder, begun, state.cache, batch)
            busy += jnp.any(alive)

            index, passes = pipeline.leaving(t)
            alive = active(slots, index, passes)
            logits = decoder.unembed(decoder.finish(pipeline.of_last(stream)))
            slots, trace = self._advance(slots, trace, jnp.maximum(passes, 0), logits, alive, index * n)
            steps = jnp.maximum(steps, jnp.where(jnp.any(alive), passes + 1, 0))
            more = _goes_on(slots, trace, edits, num_slots, t + 1, num_ticks)
            more = self._in_step(more, trace, edits)
            return t + 1, DeviceState(cache, slots), trace, pipeline.pass_on(stream), steps, busy, more

        stream = jax.eval_shape(decoder.begin, jax.ShapeDtypeStruct((n,), jnp.int32))
        received = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stream)
        more = self._in_step(_goes_on(state.slots, trace, edits, num_slots, jnp.int32(0), num_ticks), trace, edits)
        zero = jnp.int32(0)
        ticks, state, trace, _, steps, busy, _ = lax.while_loop(
            lambda carry: carry[-1], tick, (zero, state, trace, received, zero, zero, more)
        )
        return state, trace, steps, jnp.stack([ticks * pipeline.stages * self.parallel.data, self.parallel.sum(busy)])

    def _advance(
        self,
        slots: SlotState,
        trace: Trace,
        step: jax.Array,
        logits: jax.Array,
        active: jax.Array,
        first: jax.Array | int = 0,
    ) -> tuple[SlotState, Trace]:
        """Sample a token for each active slot from `first` on, append it to its history, and see which slots end."""
        n = active.shape[0]
        mine = slot_rows(slots, first, n)
        position, stop_ids = mine.num_tokens, mine.stop_ids
        counts = slots.counts if isinstance(first, int) else mine.counts
        drawn = sampling.sample(
            logits,
            sampling.unpack_rows(mine.sampling),
            counts,
            mine.allowed,
            stop_ids,
            position,
            position - mine.num_prompt,
            active,
            self.parallel.vocabulary,
        )
        drawn = replace(drawn, **self.parallel.of_first_context({"tokens": drawn.tokens, "bad": drawn.bad}))
        token = jnp.where(active & ~drawn.bad, drawn.tokens, NO_TOKEN)
        remaining = mine.remaining - active
        finished = jnp.where(
            drawn.bad,
            FINISHED_NAN,
            jnp.where(
                jnp.any(drawn.tokens[:, None] == stop_ids, axis=1),
                FINISHED_STOP,
                jnp.where(remaining <= 0, FINISHED_LENGTH, RUNS),
            ),
        )
        finished = jnp.where(active, finished, RUNS).astype(jnp.int32)
        row = first + jnp.arange(n, dtype=jnp.int32)
        at = jnp.where(active, position, self.limits.max_len)
        counts = sampling.update_counts(counts, drawn.tokens, active, self.parallel.vocabulary)
        if not isinstance(first, int):
            counts = jax.tree.map(lambda whole, part: put_rows(whole, part, first), slots.counts, counts)
        slots = replace(
            slots,
            tokens=slots.tokens.at[row, at].set(token, mode="drop"),
            num_tokens=put_rows(slots.num_tokens, position + active.astype(jnp.int32), first),
            counts=counts,
            remaining=put_rows(slots.remaining, remaining, first),
            done=put_rows(slots.done, mine.done | (active & (finished != RUNS)), first),
        )
        step = jnp.where(jnp.any(active), step, trace.tokens.shape[0]) if not isinstance(first, int) else step
        trace = Trace(
            tokens=put_step(trace.tokens, step, token, first),
            logprobs=put_step(trace.logprobs, step, drawn.logprobs, first),
            top_ids=put_step(trace.top_ids, step, drawn.top_ids, first),
            top_logprobs=put_step(trace.top_logprobs, step, drawn.top_logprobs, first),
            finished=put_rows(trace.finished, jnp.where(active, finished, slot_part(trace.finished, first, n)), first),
        )
        return slots, trace


def stage_model(model: ModelConfig, stages: int) -> ModelConfig:
    """With the layers of a pipeline's first stage, which all others are like."""
    return model if stages == 1 else replace(model, layers=model.layers[: len(model.layers) // stages])


def slot_part(array: jax.Array, first: jax.Array | int, n: int) -> jax.Array:
    """Rows [first, first + n)."""
    if isinstance(first, int):
        return array[first : first + n]
    return lax.dynamic_slice_in_dim(array, first, n)


def slot_rows(slots: SlotState, first: jax.Array | int, n: int) -> SlotState:
    """The slots [first, first + n)."""
    return jax.tree.map(lambda array: slot_part(array, first, n), slots)


def put_rows(array: jax.Array, rows: jax.Array, first: jax.Array | int) -> jax.Array:
    """`array` with `rows` from its row `first` on."""
    if rows.shape == array.shape:  # a scatter over all of it, inside a shard_map's loop, crashes XLA:CPU's compiler
        return rows
    return lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), first, axis=0)


def _goes_on(
    slots: SlotState, trace: Trace, edits: dict[str, jax.Array], num_slots: int, turn: jax.Array, turns: jax.Array
) -> jax.Array:
    """Whether another turn of a decode loop is due."""
    freed = jnp.any(trace.finished != RUNS) & (edits["exit_on_free"] != 0)
    return (turn < turns) & jnp.any(~slots.done[:num_slots]) & ~freed


def _last_tokens(slots: SlotState, n: int) -> jax.Array:
    return slots.tokens[jnp.arange(n), jnp.maximum(slots.num_tokens[:n] - 1, 0)]


def _lengths(model: ModelConfig, slots: SlotState, slot: jax.Array, position: jax.Array) -> jax.Array:
    """i32[tokens]: the sequence length by which rotation picks frequencies, for tokens of `slot` at `position`."""
    rule = model.length_rule
    if rule is not None and rule.whole:
        return slots.num_tokens[slot]
    return jnp.maximum(slots.num_prompt[slot], position + 1)
