"""What lies on the device between calls, and the one buffer by which the host changes it.

`Edits` are a fixed-shape record, packed into a single int32 array (one transfer per call) and applied first in the
same program that runs the step. Token history, lengths and page tables live on the device; the host never sends
a sequence's next token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import sampling
from jaxinfer.config import EngineConfig, KVShape, ModelConfig, PageGroup, page_groups
from jaxinfer.plan import Admission, Plan
from jaxinfer.request import MAX_STOP_TOKEN_IDS
from jaxinfer.sampling import TokenCounts
from jaxinfer.slots import max_cells_per_plan
from pallas_kernels import attention, devices
from pallas_kernels.attention import KVSpec, LayerKV
from sharding.mesh_config import kv_shards
from sharding.vocabulary import Vocabulary

NO_TOKEN = -1  # in a result: the slot produced nothing in that step


def _pytree(cls: type) -> Any:
    fields = tuple(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=())


@_pytree
@dataclass(frozen=True)
class PagedCache:
    """One opaque LayerKV per K/V-owning layer, in layer order; donated and aliased in place, never sliced."""

    layers: tuple[LayerKV, ...]


@_pytree
@dataclass(frozen=True)
class SlotState:
    """One row per running sequence."""

    tokens: jax.Array  # i32[slots, max_len]: prompt and completion so far
    num_tokens: jax.Array  # i32[slots]: the position of the next token
    page_table: tuple[jax.Array, ...]  # i32[slots, pages_per_seq] per page group
    num_prompt: jax.Array  # i32[slots]: how many of the tokens are the prompt
    sampling: jax.Array  # i32[slots, ROW_WORDS]: packed settings; one array, for each costs microseconds per call
    counts: TokenCounts
    allowed: jax.Array  # u32[slots, ceil(vocab / 32)]: bit set = the token may be sampled
    remaining: jax.Array  # i32[slots]: tokens it may still generate
    stop_ids: jax.Array  # i32[slots, MAX_STOP_TOKEN_IDS]; -1 = unused
    done: jax.Array  # bool[slots]: not to be stepped (ended, prefilling or empty)


@_pytree
@dataclass(frozen=True)
class DeviceState:
    """Everything a call takes and gives back, donated."""

    cache: PagedCache
    slots: SlotState


@dataclass(frozen=True)
class Limits:
    """The sizes that shape the device state and every program; of one data shard, where there are several."""

    slots: int  # rows of SlotState: max_num_seqs, at least 2 (a one-row dot has other bits than any other)
    max_len: int
    page_size: int
    pages_per_seq: int
    num_pages: tuple[int, ...]  # per page group, on each context shard, trash page included
    vocab_size: int
    max_rows: int  # sequences admitted, and prefilled, per mixed step
    max_cells: int
    loop_steps: int

    @property
    def mask_words(self) -> int:
        return math.ceil(self.vocab_size / 32)


def limits_of(model: ModelConfig, config: EngineConfig, max_len: int, num_pages: tuple[int, ...]) -> Limits:
    """The sizes an engine with this model, options and page pools runs at."""
    windows, page_size, mesh = [group.window for group in page_groups(model)], page_size_of(config), config.mesh_sizes
    least = 2 * mesh.pipe  # two in each micro-batch
    slots = max(2, config.max_num_seqs // mesh.data)
    return Limits(
        slots=slots if mesh.pipe == 1 else -(-slots // least) * least,
        max_len=max_len,
        page_size=page_size,
        pages_per_seq=math.ceil(max_len / page_size),
        num_pages=num_pages,
        vocab_size=model.vocab_size,
        max_rows=config.max_prefill_seqs,
        max_cells=max_cells_per_plan(config, windows, page_size),
        loop_steps=config.loop_steps,
    )


def page_size_of(config: EngineConfig) -> int:
    """Tokens per K/V page, of every layer."""
    return config.page_size or attention.default_page_size(devices.current())


def kv_spec(shape: KVShape, config: EngineConfig) -> KVSpec:
    """The pages of a K/V-owning layer of that shape, all its heads in one."""
    dtype = config.dtype if config.kv_dtype == "auto" else config.kv_dtype
    return KVSpec(shape.kv_heads, shape.head_dim, page_size_of(config), jnp.dtype(dtype))


def device_kv_spec(shape: KVShape, config: EngineConfig) -> KVSpec:
    """The pages of such a layer on one device of the mesh: some of the heads."""
    return replace(
        kv_spec(shape, config), kv_heads=shape.kv_heads // kv_shards(shape.kv_heads, config.mesh_sizes.group)
    )


def empty_state(
    model: ModelConfig, config: EngineConfig, limits: Limits, vocabulary: Vocabulary | None = None
) -> DeviceState:
    """Allocate the device state: no sequence, zeroed pages. On a mesh: one device's part of it.

    `model` has the layers of one pipeline stage; `vocabulary`: how it is split.
    """
    groups = page_groups(model)
    vocabulary = vocabulary or Vocabulary(limits.vocab_size)
    pages_of = {layer: limits.num_pages[g] for g, group in enumerate(groups) for layer in group.layers}
    layers = tuple(
        attention.allocate(
            device_kv_spec(model.kv_shape(layer), config),
            pages_of[layer],
            backend=config.attention_backend,
            q_heads=model.q_heads // config.mesh_sizes.group,
            invariant=config.invariant,
        )
        for layer in sorted(pages_of)
    )
    ints = partial(jnp.zeros, dtype=jnp.int32)
    slots = SlotState(
        tokens=ints((limits.slots, limits.max_len)),
        num_tokens=jnp.ones(limits.slots, jnp.int32),
        page_table=tuple(ints((limits.slots, limits.pages_per_seq)) for _ in groups),
        num_prompt=ints(limits.slots),
        sampling=sampling.empty_rows(limits.slots),
        counts=sampling.empty_counts(limits.slots, vocabulary.local),
        allowed=jnp.full((limits.slots, limits.mask_words), 0xFFFFFFFF, jnp.uint32),
        remaining=ints(limits.slots),
        stop_ids=jnp.full((limits.slots, MAX_STOP_TOKEN_IDS), -1, jnp.int32),
        done=jnp.ones(limits.slots, bool),
    )
    return DeviceState(PagedCache(layers), slots)


class Record:
    """Named arrays of fixed shape inside one int32 buffer: numpy views to fill on the host, slices on the device."""

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], Any]]):
        self._fields: dict[str, tuple[int, int, tuple[int, ...], np.dtype]] = {}
        end = 0
        for name, (shape, dtype) in fields.items():
            start, end = end, end + math.prod(shape)
            self._fields[name] = (start, end, shape, np.dtype(dtype))
        self.size = end

    def new(self) -> tuple[np.ndarray, Views]:
        """A zeroed buffer `i32[size]` and its views by name. A fresh one per call: the last may still be in flight."""
        buffer = np.zeros(self.size, np.int32)
        return buffer, Views(buffer, self._fields)

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The same views of a traced buffer."""
        return {
            name: jax.lax.bitcast_convert_type(buffer[start:end], dtype).reshape(shape)
            for name, (start, end, shape, dtype) in self._fields.items()
        }


class Views:
    """`views[name]`: one field of a record's buffer, to be filled. Made when asked for: most calls set few fields."""

    def __init__(self, buffer: np.ndarray, fields: dict[str, tuple[int, int, tuple[int, ...], np.dtype]]):
        self._buffer, self._fields = buffer, fields

    def __getitem__(self, name: str) -> np.ndarray:
        start, end, shape, dtype = self._fields[name]
        return self._buffer[start:end].view(dtype).reshape(shape)


def control_record(limits: Limits) -> Record:
    """What every call may change: slots to stop, page-table cells, the loop's length."""
    i32 = np.int32
    return Record(
        {
            "stop": ((limits.slots,), i32),
            "num_cells": ((), i32),
            "cells": ((limits.max_cells, 4), i32),  # group, slot, index, page
            "num_steps": ((), i32),
            "exit_on_free": ((), i32),
        }
    )


def admission_record(limits: Limits, num_groups: int) -> Record:
    """What a mixed step adds: slot rows to set, page copies, the prefill chunks."""
    rows, i32 = limits.max_rows, np.int32
    return Record(
        {
            "num_copies": ((), i32),
            "copies": ((rows * num_groups, 4), i32),  # group, source, target, context shard
            "slot": ((rows,), i32),  # limits.slots = unused row
            "tokens": ((rows, limits.max_len), i32),
            "num_tokens": ((rows,), i32),
            "num_prompt": ((rows,), i32),
            "sampling": ((rows, sampling.ROW_WORDS), i32),
            "count_slot": ((rows,), i32),  # the slot where the sequence has penalties, else limits.slots
            "page_table": ((rows, num_groups, limits.pages_per_seq), i32),
            "remaining": ((rows,), i32),
            "stop_ids": ((rows, MAX_STOP_TOKEN_IDS), i32),
            "allowed": ((rows, limits.mask_words), np.uint32),
            "chunk_slot": ((rows,), i32),  # limits.slots = unused chunk
            "chunk_start": ((rows,), i32),
            "chunk_length": ((rows,), i32),
            "chunk_final": ((rows,), i32),
        }
    )


class Packer:
    """Plans to edit buffers."""

    def __init__(self, model: ModelConfig, limits: Limits, groups: Sequence[PageGroup]):
        self.model, self.limits, self.groups = model, limits, groups
        self.control = control_record(limits)
        self.admission = admission_record(limits, len(groups))

    def pack_control(self, plan: Plan | None) -> np.ndarray:
        """What every call may change; None: nothing, and no step is asked for."""
        buffer, view = self.control.new()
        if plan is None:
            return buffer
        if plan.stops:
            view["stop"][list(plan.stops)] = 1
        if plan.cells:
            rows = [(cell.group, slot, cell.index, cell.page) for slot, cell in plan.cells]
            view["num_cells"][()] = len(rows)
            view["cells"][: len(rows)] = rows
        view["num_steps"][()] = plan.num_steps
        view["exit_on_free"][()] = plan.exit_on_free
        return buffer

    def pack_admission(self, plan: Plan | None) -> np.ndarray:
        """What a mixed step adds; None: nothing."""
        buffer, view = self.admission.new()
        for name in ("slot", "count_slot", "chunk_slot"):
            view[name][:] = self.limits.slots
        if plan is None:
            return buffer
        view["num_copies"][()] = len(plan.copies)
        for i, copy in enumerate(plan.copies):
            view["copies"][i] = (copy.group, copy.source, copy.target, copy.shard)
        for i, admission in enumerate(plan.admissions):
            self._pack_row(i, admission, view)
        for i, chunk in enumerate(plan.chunks):
            view["chunk_slot"][i] = chunk.slot
            view["chunk_start"][i] = chunk.start
            view["chunk_length"][i] = chunk.length
            view["chunk_final"][i] = chunk.final
        return buffer

    def _pack_row(self, i: int, admission: Admission, view: Views) -> None:
        sequence, params = admission.sequence, admission.sequence.request.sampling
        view["slot"][i] = admission.slot
        view["tokens"][i, : len(sequence.tokens)] = sequence.tokens
        view["num_tokens"][i] = len(sequence.tokens)
        view["num_prompt"][i] = sequence.num_prompt
        for cells in admission.pages:
            for cell in cells:
                view["page_table"][i, cell.group, cell.index] = cell.page
        view["remaining"][i] = sequence.resident_max - len(sequence.tokens)
        stop_ids = params.stop_token_ids if params.ignore_eos else (*self.model.eos_token_ids, *params.stop_token_ids)
        view["stop_ids"][i] = -1
        view["stop_ids"][i, : len(stop_ids)] = stop_ids
        view["allowed"][i] = sampling.allowed_words(params, self.model.vocab_size)
        sampling.pack_row(params, sequence.seed, view["sampling"][i])
        if sampling.uses_penalties(params):
            view["count_slot"][i] = admission.slot
