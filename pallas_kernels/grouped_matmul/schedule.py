"""Cutting rows that are sorted by group into tiles of equal length, each piece of work within one tile and one group.

Hides the boundaries: a tile in which groups meet is worked on once for each of them, so the number of pieces is at most
tiles + groups + 1, whatever the groups' lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """Pieces of work in the order of their rows, every tile visited; i32[tiles + groups + 1] each."""

    tile: jax.Array
    group: jax.Array  # of a piece without rows: one whose weight is needed anyway, before or after it
    start: jax.Array  # rows start : stop, counted over all tiles; start == stop where there is nothing to do
    stop: jax.Array


def schedule(group_sizes: jax.Array, num_rows: int, tile_rows: int) -> Schedule:
    """`group_sizes i32[groups]`, their sum at most `num_rows`; rows beyond it belong to no piece.

    Pieces lie between neighbouring cuts: the starts of tiles, the starts of groups, and the end of the last group.
    """
    num_tiles = -(-num_rows // tile_rows)
    # Of pairs, not cumulative sums and searches: XLA:TPU writes those out.
    group = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    ends = jnp.sum(jnp.where(group[:, None] >= group[None, :], group_sizes[None, :], 0), axis=1, dtype=jnp.int32)
    tile_starts = jnp.arange(num_tiles, dtype=jnp.int32) * tile_rows
    start = jnp.sort(jnp.concatenate([tile_starts, ends - group_sizes, ends[-1:]]))
    following = jnp.concatenate([start[1:], jnp.array([num_rows], jnp.int32)])
    last = ends[-1] - 1  # the last row of any group: from there on, its weight stays
    ended = jnp.sum(jnp.minimum(start, last)[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    return Schedule(
        tile=jnp.minimum(start // tile_rows, num_tiles - 1),
        group=jnp.minimum(ended, group_sizes.shape[0] - 1),
        start=start,
        stop=jnp.where(start > last, start, following),
    )
