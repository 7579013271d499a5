"""Pages spread over devices, as one of them sees them: the page table's columns `offset::stride`, and whole pages.

Hides all arithmetic between a sequence's rows and the ones that lie here. Those keep their order, so a query that sees
rows [a, b) of its sequence sees rows [held(a), held(b)) of what lies here: kernels need know nothing of strides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import Ragged


class View(NamedTuple):
    """A call in terms of the rows that lie here."""

    ragged: Ragged  # of stride 1; a token that sees no row has position -1
    window: int | None  # None where there is none, and where `first` stands for it
    first: jax.Array | None  # i32[tokens]: the first row that each token sees


def view(ragged: Ragged, page_size: int, window: int | None) -> View:
    """`ragged` itself where all pages lie here, and its window."""
    if ragged.page_stride == 1:
        return View(ragged, window, None)
    first = None if window is None else held(ragged, ragged.q_position + 1 - window, page_size)
    local = replace(
        ragged,
        kv_len=held(ragged, ragged.kv_len, page_size),
        page_table=_columns(ragged),
        q_position=held(ragged, ragged.q_position + 1, page_size) - 1,
        page_offset=None,
        page_stride=1,
    )
    return View(local, None, first)


def offset(ragged: Ragged) -> jax.Array:
    """i32[]"""
    return jnp.int32(0) if ragged.page_offset is None else ragged.page_offset.astype(jnp.int32)


def held(ragged: Ragged, rows: jax.Array, page_size: int) -> jax.Array:
    """How many of a sequence's first `rows: i32[...]` rows lie here; 0 of a negative number."""
    rows = jnp.maximum(rows.astype(jnp.int32), 0)
    turn = ragged.page_stride * page_size  # rows of one page on every device
    return rows // turn * page_size + jnp.clip(rows % turn - offset(ragged) * page_size, 0, page_size)


def _columns(ragged: Ragged) -> jax.Array:
    """i32[seqs, ceil(pages_per_seq / stride)]: page numbers of this device; 0 behind the table's end."""
    table, stride = ragged.page_table, ragged.page_stride
    table = jnp.pad(table, [(0, 0), (0, -table.shape[1] % stride)])
    by_device = table.reshape(table.shape[0], -1, stride)
    return lax.dynamic_index_in_dim(by_device, offset(ragged), axis=2, keepdims=False)
