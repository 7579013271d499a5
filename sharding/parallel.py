"""Everything a step asks of a mesh, in one value: how layers, vocabulary, slots, sequences and stages are split.

Hides which of these a mesh has. With no mesh every part answers for one device, by identities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sharding.mesh import DeviceMesh
from sharding.pipeline import UNSTAGED, Pipeline
from sharding.shards import ALONE, Shards, shards_of
from sharding.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Parallel:
    """How a model is split over the devices of a mesh, as one device sees it."""

    vocabulary: Vocabulary
    mesh: DeviceMesh | None = None
    decode: Shards = ALONE
    prefill: Shards = ALONE  # the same devices; tokens may be split between a layer's parts
    pipeline: Pipeline = UNSTAGED
    context_axes: tuple[str, ...] = ()
    context: int = 1  # devices that a sequence's pages are spread over
    data_axes: tuple[str, ...] = ()
    data: int = 1  # shards of slots

    @property
    def stages(self) -> int:
        return self.pipeline.stages

    def any_data(self, flag: jax.Array) -> jax.Array:
        """Whether `flag: bool[]` is set in any data shard: loops must end for all devices at once."""
        return lax.pmax(flag.astype(jnp.int32), self.data_axes) > 0 if self.data > 1 else flag

    def sum(self, x: jax.Array) -> jax.Array:
        """Over the stages of all data shards."""
        x = self.pipeline.sum(x)
        return lax.psum(x, self.data_axes) if self.data > 1 else x

    def all_data(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` of every data shard, one after the other along `axis`."""
        return lax.all_gather(x, self.data_axes, axis=axis, tiled=True) if self.data > 1 else x

    def of_data_shard(self, x: jax.Array, shard: jax.Array) -> jax.Array:
        """`x` of data shard `shard: i32[]`, everywhere."""
        if self.data == 1:
            return x
        return lax.psum(jnp.where(lax.axis_index(self.data_axes) == shard, x, jnp.zeros_like(x)), self.data_axes)

    def own_context(self, x: jax.Array) -> jax.Array:
        """Of `x [tokens, ...]` the run of this context shard."""
        if self.context == 1:
            return x
        size = x.shape[0] // self.context
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.context_axes) * size, size)

    def all_context(self, x: jax.Array) -> jax.Array:
        """`x [tokens of this context shard, ...]` of all of them."""
        return lax.all_gather(x, self.context_axes, axis=0, tiled=True) if self.context > 1 else x

    def of_first_context(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Integers and booleans `x` of context shard 0, on all of them.

        Each shard adds up its layers' sums in a group of its own. Where a network adds in another order, last bits
        differ, and with them a token now and then; loops that must end together would not.
        """
        if self.context == 1:
            return x
        first = lax.axis_index(self.context_axes) == 0
        told = lax.psum(jax.tree.map(lambda a: jnp.where(first, a.astype(jnp.int32), 0), x), self.context_axes)
        return jax.tree.map(lambda a, sent: sent.astype(a.dtype), x, told)

    def on_context_shard(self, shard: jax.Array) -> jax.Array | bool:
        """Whether this device is on context shard `shard: i32[]`."""
        return True if self.context == 1 else lax.axis_index(self.context_axes) == shard

    def rows_per_step(self, decode_rows: int, prefill_tokens: int) -> int:
        """The least number of packed prefill tokens, from `prefill_tokens` on, that every split divides.

        `decode_rows`: beside them, in each micro-batch a `stages`-th part of both.
        """
        unit = self.stages * self.context
        tokens = -(-prefill_tokens // unit) * unit
        while (decode_rows // self.stages + tokens // unit) % self.prefill.token_shards:
            tokens += unit
        return tokens


def parallel_of(
    mesh: DeviceMesh | None, vocab_size: int, kv_axes: Iterable[str], *, sequence_parallel: bool = True
) -> Parallel:
    """For a model with so many tokens and these axes of K/V heads."""
    if mesh is None:
        return Parallel(Vocabulary(vocab_size))
    kv_axes = tuple(kv_axes)
    return Parallel(
        vocabulary=mesh.vocabulary(vocab_size),
        mesh=mesh,
        decode=shards_of(mesh, kv_axes),
        prefill=shards_of(mesh, kv_axes, split_tokens=sequence_parallel),
        pipeline=Pipeline(mesh.names("pipe"), mesh.config.pipe),
        context_axes=mesh.names("context"),
        context=mesh.config.context,
        data_axes=mesh.names("data"),
        data=mesh.config.data,
    )
