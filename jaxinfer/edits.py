"""What a call's edits do to the device state, traced: stops, page-table cells, admissions, page copies, chunks.

Hides the fields of the records that batch.Packer fills.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer import sampling
from jaxinfer.batch import PagedCache, SlotState
from pallas_kernels import attention
from sharding.vocabulary import Vocabulary


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


def chunk_layout(edits: dict[str, jax.Array], prefill_tokens: int, num_slots: int) -> Chunks:
    """Where the chunks' tokens lie in the packed batch."""
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


def apply_control(slots: SlotState, edits: dict[str, jax.Array]) -> SlotState:
    """Stops and page-table cells."""

    def set_cell(i: jax.Array, tables: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, slot, index, page = edits["cells"][i]
        outside = slots.done.shape[0]
        return tuple(
            table.at[jnp.where(group == g, slot, outside), index].set(page, mode="drop")
            for g, table in enumerate(tables)
        )

    tables = lax.fori_loop(0, edits["num_cells"], set_cell, slots.page_table)
    return replace(slots, page_table=tables, done=slots.done | (edits["stop"] != 0))


def admit(slots: SlotState, edits: dict[str, jax.Array], vocabulary: Vocabulary) -> SlotState:
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
            slots.counts, edits["count_slot"], edits["tokens"], edits["num_prompt"], edits["num_tokens"], vocabulary
        ),
        allowed=put(slots.allowed, edits["allowed"]),
        remaining=put(slots.remaining, edits["remaining"]),
        stop_ids=put(slots.stop_ids, edits["stop_ids"]),
        done=put(slots.done, jnp.ones(at.shape, bool)),
    )


def copy_pages(
    cache: PagedCache,
    edits: dict[str, jax.Array],
    group_of: Sequence[int],
    here: Callable[[jax.Array], jax.Array | bool],
) -> PagedCache:
    """Copy-on-write copies; every layer of a group copies the same pages.

    `group_of`: each pool's page group; `here(shard)`: whether a context shard's pages are this device's.
    """

    def copy(i: jax.Array, layers: tuple) -> tuple:
        group, source, target, shard = edits["copies"][i]
        copied = []
        for own_group, kv in zip(group_of, layers, strict=True):
            mine = (group == own_group) & here(shard)
            copied.append(attention.copy_pages(kv, jnp.where(mine, source, 0)[None], jnp.where(mine, target, 0)[None]))
        return tuple(copied)

    return PagedCache(lax.fori_loop(0, edits["num_copies"], copy, cache.layers))
