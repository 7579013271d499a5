"""A vocabulary whose columns are split over devices, as one device sees it inside a shard_map.

Hides which ids a device holds, and how devices agree: every method that answers for the whole vocabulary gives all of
them the same bits, and these depend neither on where a row lies nor on how a collective is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

UNUSED_ID = 2**31 - 1  # past any vocabulary: scatters drop it


@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens over `num_shards` devices, in order of the mesh axes `axes`; alone, every method is the identity.

    Each device holds `local` columns; past `size` there is padding, in which logits must be -inf.
    """

    size: int
    axes: tuple[str, ...] = ()
    num_shards: int = 1

    def __post_init__(self) -> None:
        assert self.size > 0 and self.num_shards > 0, self
        assert self.axes or self.num_shards == 1, f"{self}: shards without axes"

    @property
    def local(self) -> int:
        """Columns per device, padding included."""
        return -(-self.size // self.num_shards)

    @property
    def first(self) -> jax.Array | int:
        """The id of this device's first column; not below `size` where a device holds nothing but padding."""
        return 0 if self.num_shards == 1 else lax.axis_index(self.axes) * self.local

    # ---- ids to columns

    def columns(self, ids: jax.Array) -> jax.Array:
        """The columns i32[...] of token ids here; UNUSED_ID for those of other devices, and for ids that are none."""
        if self.num_shards == 1:
            return ids
        columns = ids - self.first
        return jnp.where((columns >= 0) & (columns < self.local), columns, UNUSED_ID)

    def words(self, words: jax.Array) -> jax.Array:
        """Bits of all ids, u32[slots, ceil(size/32)] -> those of this device's columns, u32[slots, ceil(local/32)]."""
        if self.num_shards == 1:
            return words
        num_words = -(-self.local // 32)
        room = (self.num_shards - 1) * self.local // 32 + num_words + 1 - words.shape[1]
        padded = jnp.pad(words, ((0, 0), (0, max(room, 0))))
        found = lax.dynamic_slice_in_dim(padded, self.first // 32, num_words + 1, axis=1)
        shift = jnp.asarray(self.first % 32, jnp.uint32)
        return found[:, :-1] >> shift | lax.shift_left(found[:, 1:], 32 - shift)  # a shift by 32 leaves nothing

    # ---- agreement

    def max(self, x: jax.Array) -> jax.Array:
        """The largest over the devices, elementwise."""
        return x if self.num_shards == 1 else lax.pmax(x, self.axes)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the devices, elementwise, where any order gives the same bits: of integers, say."""
        return x if self.num_shards == 1 else lax.psum(x, self.axes)

    def sum_in_order(self, x: jax.Array) -> jax.Array:
        """The sum over the devices of `x f32[rows]` or `f32[rows, n]`, in their order: an all-reduce may take any.

        Columns are shared out before they are added, so that no device holds everybody's rows.
        """
        if self.num_shards == 1:
            return x
        if x.ndim == 1:
            return _chain(self.gather(x))
        rows, size = x.shape
        shares = jnp.pad(x, ((0, 0), (0, -size % self.num_shards))).reshape(rows, self.num_shards, -1)
        own = _chain(lax.all_to_all(shares, self.axes, split_axis=1, concat_axis=0))
        return lax.all_gather(own, self.axes, axis=1, tiled=True)[:, :size]

    def gather(self, x: jax.Array) -> jax.Array:
        """`x [...]` of every device, `[num_shards, ...]`."""
        return x[None] if self.num_shards == 1 else lax.all_gather(x, self.axes)

    def gather_candidates(self, values: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Every device's `values f32[...]` and the ids of their `columns i32[...]`, both `[num_shards, ...]`, in one
        collective."""
        words = jnp.stack([lax.bitcast_convert_type(values, jnp.int32), columns + self.first])
        words = self.gather(words)
        return lax.bitcast_convert_type(words[:, 0], jnp.float32), words[:, 1]

    # ---- values by id

    def take(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """`x [rows, local]` at ids i32[rows, n], all inside the vocabulary -> [rows, n]."""
        if self.num_shards == 1:
            return jnp.take_along_axis(x, ids, axis=1)
        columns = self.columns(ids)
        found = jnp.take_along_axis(x, jnp.minimum(columns, self.local - 1), axis=1)
        return self.sum(jnp.where(columns < self.local, found, 0))  # only one device adds other than 0

    def whole(self, x: jax.Array) -> jax.Array:
        """`x [rows, local]` of every device, side by side and without padding: [rows, size]."""
        return x if self.num_shards == 1 else lax.all_gather(x, self.axes, axis=1, tiled=True)[:, : self.size]


def _chain(parts: jax.Array) -> jax.Array:
    """`[n, ...]` added up over the first axis, one after the other."""
    return reduce(jnp.add, [parts[index] for index in range(parts.shape[0])])
