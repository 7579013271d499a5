"""The two compiled drivers around the one forward pass: `mixed_step` and `decode_loop`.

Both take (parameters, donated DeviceState, edits) and give (DeviceState, Outcome). What they hide: that a packed
batch is decode rows followed by prefill chunks, and that sampling, stop detection and history are on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import sampling
from jaxinfer.batch import (
    NO_TOKEN,
    DeviceState,
    Limits,
    PagedCache,
    Record,
    SlotState,
    admission_record,
    control_record,
)
from jaxinfer.config import ModelConfig, page_groups
from jaxinfer.models.transformer import Decoder
from jaxinfer.plan import FINISHED_LENGTH, FINISHED_NAN, FINISHED_STOP, RUNS, StepResult
from jaxinfer.request import MAX_TOP_LOGPROBS
from pallas_kernels import attention
from pallas_kernels.attention import Ragged

Parameters = tuple[jax.Array, ...]


class Outcome(NamedTuple):
    """What a call tells the host. `main` is one buffer, so that one transfer answers the common case."""

    main: jax.Array  # i32[slots, 2 * steps + 2]: steps made, finished, tokens, log-probabilities (f32 bits)
    top_ids: jax.Array  # i32[steps, slots, MAX_TOP_LOGPROBS]
    top_logprobs: jax.Array  # f32[steps, slots, MAX_TOP_LOGPROBS]
    hidden: jax.Array | None = None  # of a mixed step: normed states [prefill_tokens, embed] of its prefill rows


class Report(NamedTuple):
    """`Outcome.main` on the host; the count comes first in every row, so that one slice holds all that is common."""

    steps: int  # steps made
    result: StepResult
    logprob_bits: np.ndarray  # i32[slots, steps]

    @classmethod
    def read(cls, main: np.ndarray) -> Report:
        steps, room = int(main[0, 0]), (main.shape[1] - 2) // 2
        rows = main[:, 1 : 2 + steps].tolist()
        finished = [row.pop(0) for row in rows]
        return cls(steps, StepResult(rows, finished), main[:, 2 + room :])


class Trace(NamedTuple):
    """The outcome while it is being gathered."""

    tokens: jax.Array  # i32[steps, slots]
    logprobs: jax.Array  # f32[steps, slots]
    top_ids: jax.Array
    top_logprobs: jax.Array
    finished: jax.Array  # i32[slots]


@dataclass(frozen=True)
class Drivers:
    """`mixed_step` and `decode_loop` for one model and one set of limits, as plain functions to be jitted."""

    model: ModelConfig
    limits: Limits
    merge: Callable[[Parameters], Decoder]

    def decode_loop(
        self, parameters: Parameters, state: DeviceState, control: jax.Array, *, num_slots: int
    ) -> tuple[DeviceState, Outcome]:
        """Up to `num_steps` decode steps over the first `num_slots` slots in one while loop."""
        edits = self._control.unpack(control)
        state = replace(state, slots=_apply_control(state.slots, edits))
        model = self.merge(parameters)

        def goes_on(carry: tuple[jax.Array, DeviceState, Trace]) -> jax.Array:
            step, state, trace = carry
            freed = jnp.any(trace.finished != RUNS) & (edits["exit_on_free"] != 0)
            return (step < edits["num_steps"]) & jnp.any(~state.slots.done[:num_slots]) & ~freed

        def body(carry: tuple[jax.Array, DeviceState, Trace]) -> tuple[jax.Array, DeviceState, Trace]:
            step, state, trace = carry
            state, trace = self._decode_step(model, state, trace, step, num_slots)
            return step + 1, state, trace

        start = (jnp.int32(0), state, _empty_trace(self.limits.loop_steps, num_slots))
        steps, state, trace = lax.while_loop(goes_on, body, start)
        return state, _pack(trace, steps)

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
        slots = _apply_control(state.slots, self._control.unpack(control))
        slots = _admit(slots, edits)
        cache = self._copy_pages(state.cache, edits)
        model = self.merge(parameters)

        chunks = _chunk_layout(edits, prefill_tokens, num_slots)
        decoding = ~slots.done[:num_slots]
        position = jnp.where(decoding, slots.num_tokens[:num_slots] - 1, 0)
        chunk_tokens = slots.tokens[chunks.token_slot, chunks.position]
        tokens = jnp.concatenate([_last_tokens(slots, num_slots), jnp.where(chunks.used, chunk_tokens, 0)])
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
        lengths = jnp.concatenate(
            [
                _lengths(self.model, slots, jnp.arange(num_slots), position),
                _lengths(self.model, slots, chunks.token_slot, chunks.position),
            ]
        )
        hidden, cache = self._forward(model, cache, tokens, positions, lengths, ragged)

        # each slot samples from one row: its decode row, or the last token of its final chunk
        row = jnp.arange(num_slots, dtype=jnp.int32)
        final_slot = jnp.where(chunks.final, chunks.slot, num_slots)
        row = row.at[final_slot].set(chunks.last_row, mode="drop")
        ends_prefill = jnp.zeros(num_slots, bool).at[final_slot].set(True, mode="drop")
        slots = replace(slots, done=slots.done.at[final_slot].set(False, mode="drop"))
        logits = model.unembed(hidden[row])
        trace = _empty_trace(1, num_slots)
        slots, trace = self._advance(slots, trace, jnp.int32(0), logits, decoding | ends_prefill)
        return DeviceState(cache, slots), _pack(trace, jnp.int32(1))._replace(hidden=hidden[num_slots:])

    @property
    def _control(self) -> Record:
        return control_record(self.limits)

    @property
    def _admission(self) -> Record:
        return admission_record(self.limits, len(page_groups(self.model)))

    def _decode_step(
        self, model: Decoder, state: DeviceState, trace: Trace, step: jax.Array, num_slots: int
    ) -> tuple[DeviceState, Trace]:
        slots = state.slots
        active = ~slots.done[:num_slots]
        position = jnp.where(active, slots.num_tokens[:num_slots] - 1, 0)
        ragged = tuple(
            Ragged(
                q_start=jnp.arange(num_slots + 1, dtype=jnp.int32),
                kv_len=jnp.where(active, position + 1, 0),
                page_table=table[:num_slots],
                q_position=position,
                width=1,
                num_decode_seqs=num_slots,
            )
            for table in slots.page_table
        )
        lengths = _lengths(self.model, slots, jnp.arange(num_slots), position)
        tokens = _last_tokens(slots, num_slots)
        hidden, cache = self._forward(model, state.cache, tokens, position, lengths, ragged)
        slots, trace = self._advance(slots, trace, step, model.unembed(hidden), active)
        return DeviceState(cache, slots), trace

    def _forward(
        self,
        model: Decoder,
        cache: PagedCache,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        ragged: tuple[Ragged, ...],
    ) -> tuple[jax.Array, PagedCache]:
        """Hidden states `[tokens, embed]` of the packed batch, and the cache with its K/V written."""
        layers = list(cache.layers)
        home: dict[int, int] = {}  # K/V-owning layer -> its page group
        for g, group in enumerate(page_groups(self.model)):
            home |= dict.fromkeys(group.layers, g)
        place = {layer: i for i, layer in enumerate(sorted(home))}

        def attend(
            index: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None, sinks: jax.Array | None
        ) -> jax.Array:
            owner = self.model.kv_owner(index)
            at = place[owner]
            out, _, layers[at] = attention.attend(
                q,
                k,
                v,
                layers[at],
                ragged[home[owner]],
                window=self.model.layers[index].window,
                softcap=self.model.attention_softcap,
                sinks=sinks,
                scale=self.model.attention_scale,
            )
            return out

        hidden = model(tokens, positions, attend, lengths)
        return hidden, PagedCache(tuple(layers))

    def _advance(
        self, slots: SlotState, trace: Trace, step: jax.Array, logits: jax.Array, active: jax.Array
    ) -> tuple[SlotState, Trace]:
        """Sample a token for each active slot, append it to the slot's history, and see which slots end."""
        n = active.shape[0]
        position = slots.num_tokens[:n]
        stop_ids = slots.stop_ids[:n]
        drawn = sampling.sample(
            logits,
            sampling.unpack_rows(slots.sampling[:n]),
            slots.counts,
            slots.allowed[:n],
            stop_ids,
            position,
            position - slots.num_prompt[:n],
            active,
        )
        token = jnp.where(active & ~drawn.bad, drawn.tokens, NO_TOKEN)
        remaining = slots.remaining[:n] - active
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
        row = jnp.arange(n, dtype=jnp.int32)
        at = jnp.where(active, position, self.limits.max_len)
        slots = replace(
            slots,
            tokens=slots.tokens.at[row, at].set(token, mode="drop"),
            num_tokens=slots.num_tokens.at[:n].add(active.astype(jnp.int32)),
            counts=sampling.update_counts(slots.counts, drawn.tokens, active),
            remaining=slots.remaining.at[:n].set(remaining),
            done=slots.done.at[:n].set(slots.done[:n] | (active & (finished != RUNS))),
        )
        trace = Trace(
            tokens=trace.tokens.at[step].set(token),
            logprobs=trace.logprobs.at[step].set(drawn.logprobs),
            top_ids=trace.top_ids.at[step].set(drawn.top_ids),
            top_logprobs=trace.top_logprobs.at[step].set(drawn.top_logprobs),
            finished=jnp.where(active, finished, trace.finished),
        )
        return slots, trace

    def _copy_pages(self, cache: PagedCache, edits: dict[str, jax.Array]) -> PagedCache:
        """Copy-on-write copies; every layer of a group copies the same pages."""
        group_of = {layer: g for g, group in enumerate(page_groups(self.model)) for layer in group.layers}

        def copy(i: jax.Array, layers: tuple) -> tuple:
            group, source, target = edits["copies"][i]
            copied = []
            for layer, kv in zip(sorted(group_of), layers, strict=True):
                mine = group == group_of[layer]
                copied.append(
                    attention.copy_pages(kv, jnp.where(mine, source, 0)[None], jnp.where(mine, target, 0)[None])
                )
            return tuple(copied)

        return PagedCache(lax.fori_loop(0, edits["num_copies"], copy, cache.layers))


class Chunks(NamedTuple):
    """The packed prefill tokens of a mixed step."""

    slot: jax.Array  # i32[rows], clipped into range
    final: jax.Array  # bool[rows]: the sequence's last known token is in the chunk
    kv_len: jax.Array  # i32[rows]: K/V rows after the chunk; 0 = unused
    q_start: jax.Array  # i32[rows + 1]: packed token ranges, after the decode rows
    last_row: jax.Array  # i32[rows]: packed row of the chunk's last token
    token_slot: jax.Array  # i32[prefill_tokens]
    position: jax.Array  # i32[prefill_tokens]
    used: jax.Array  # bool[prefill_tokens]


def _chunk_layout(edits: dict[str, jax.Array], prefill_tokens: int, num_slots: int) -> Chunks:
    length = edits["chunk_length"]
    used = length > 0
    end = jnp.cumsum(length, dtype=jnp.int32)
    slot = jnp.where(used, jnp.minimum(edits["chunk_slot"], num_slots - 1), 0)
    token = jnp.arange(prefill_tokens, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.sum(token[:, None] >= end[None, :], axis=1, dtype=jnp.int32), length.shape[0] - 1)
    token_used = token < end[-1]
    position = edits["chunk_start"][chunk] + token - (end - length)[chunk]
    return Chunks(
        slot=slot,
        final=used & (edits["chunk_final"] != 0),
        kv_len=jnp.where(used, edits["chunk_start"] + length, 0),
        q_start=num_slots + jnp.concatenate([jnp.zeros(1, jnp.int32), end]),
        last_row=num_slots + end - 1,
        token_slot=slot[chunk],
        position=jnp.where(token_used, position, 0),
        used=token_used,
    )


def _last_tokens(slots: SlotState, n: int) -> jax.Array:
    return slots.tokens[jnp.arange(n), jnp.maximum(slots.num_tokens[:n] - 1, 0)]


def _lengths(model: ModelConfig, slots: SlotState, slot: jax.Array, position: jax.Array) -> jax.Array:
    """i32[tokens]: the sequence length by which rotation picks frequencies, for tokens of `slot` at `position`."""
    rule = model.length_rule
    if rule is not None and rule.whole:
        return slots.num_tokens[slot]
    return jnp.maximum(slots.num_prompt[slot], position + 1)


def _apply_control(slots: SlotState, edits: dict[str, jax.Array]) -> SlotState:
    def set_cell(i: jax.Array, tables: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, slot, index, page = edits["cells"][i]
        outside = slots.done.shape[0]
        return tuple(
            table.at[jnp.where(group == g, slot, outside), index].set(page, mode="drop")
            for g, table in enumerate(tables)
        )

    tables = lax.fori_loop(0, edits["num_cells"], set_cell, slots.page_table)
    return replace(slots, page_table=tables, done=slots.done | (edits["stop"] != 0))


def _admit(slots: SlotState, edits: dict[str, jax.Array]) -> SlotState:
    """Set the rows of newly admitted sequences; they stay `done` until their final chunk."""
    at = edits["slot"]

    def put(array: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[at].set(rows.astype(array.dtype), mode="drop")

    return SlotState(
        tokens=put(slots.tokens, edits["tokens"]),
        num_tokens=put(slots.num_tokens, edits["num_tokens"]),
        page_table=tuple(put(table, edits["page_table"][:, g]) for g, table in enumerate(slots.page_table)),
        num_prompt=put(slots.num_prompt, edits["num_prompt"]),
        sampling=put(slots.sampling, edits["sampling"]),
        counts=sampling.reset_counts(
            slots.counts, edits["count_slot"], edits["tokens"], edits["num_prompt"], edits["num_tokens"]
        ),
        allowed=put(slots.allowed, edits["allowed"]),
        remaining=put(slots.remaining, edits["remaining"]),
        stop_ids=put(slots.stop_ids, edits["stop_ids"]),
        done=put(slots.done, jnp.ones(at.shape, bool)),
    )


def _empty_trace(steps: int, slots: int) -> Trace:
    return Trace(
        tokens=jnp.full((steps, slots), NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros((steps, slots), jnp.float32),
        top_ids=jnp.zeros((steps, slots, MAX_TOP_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((steps, slots, MAX_TOP_LOGPROBS), jnp.float32),
        finished=jnp.zeros(slots, jnp.int32),
    )


def _pack(trace: Trace, steps: jax.Array) -> Outcome:
    bits = lax.bitcast_convert_type(trace.logprobs, jnp.int32)
    rows = jnp.stack([jnp.full_like(trace.finished, steps), trace.finished])
    return Outcome(jnp.concatenate([rows, trace.tokens, bits]).T, trace.top_ids, trace.top_logprobs)
