"""The one forward pass over a packed batch, on one device or as one device of a mesh.

Hides which attention the mesh asks for, that only a run of the tokens may be here, and that a batch goes through a
pipeline in micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.batch import PagedCache
from jaxinfer.config import ModelConfig, page_groups
from jaxinfer.models.layers import Attend
from jaxinfer.models.transformer import Decoder
from jaxinfer.shared_work import SharedWork
from pallas_kernels import attention
from pallas_kernels.attention import Ragged
from sharding import context
from sharding.parallel import Parallel


class Batch(NamedTuple):
    """Packed tokens: one of each decode sequence, then those of prefill chunks, then padding."""

    tokens: jax.Array  # i32[tokens]
    positions: jax.Array  # i32[tokens]
    lengths: jax.Array  # i32[tokens]: as models.layers.rotation has it
    ragged: tuple[Ragged, ...]  # per page group

    @property
    def decode_rows(self) -> int:
        return self.ragged[0].num_decode_seqs

    def padded(self, num_tokens: int) -> Batch:
        """With padding up to so many tokens, that belong to no sequence."""
        if num_tokens == self.tokens.shape[0]:
            return self
        more = (0, num_tokens - self.tokens.shape[0])
        tokens, positions, lengths = (jnp.pad(x, more) for x in self[:3])
        ragged = tuple(replace(r, q_position=jnp.pad(r.q_position, more)) for r in self.ragged)
        return Batch(tokens, positions, jnp.maximum(lengths, 1), ragged)


@dataclass(frozen=True)
class Forward:
    """Hidden states of packed batches; `stage`: a ModelConfig with the layers of one pipeline stage."""

    stage: ModelConfig
    parallel: Parallel

    def whole(self, decoder: Decoder, cache: PagedCache, batch: Batch) -> tuple[jax.Array, PagedCache]:
        """Normed hidden states `[tokens, embed]` of a batch, and the cache with its K/V written."""
        num_tokens, shards = batch.tokens.shape[0], self.parallel.prefill
        rows = batch.decode_rows
        batch = batch.padded(rows + self.parallel.rows_per_step(rows, num_tokens - rows))
        if self.parallel.stages > 1:
            hidden, cache = self._in_micro_batches(decoder, cache, batch)
            return hidden[:num_tokens], cache
        local = self._of_context(batch)
        stream, cache = self.layers(decoder, decoder.begin(local.tokens), cache, local)
        hidden = shards.all_tokens(decoder.finish(stream))
        return self._of_all_contexts(hidden, rows)[:num_tokens], cache

    def layers(self, decoder: Decoder, stream: Any, cache: PagedCache, batch: Batch) -> tuple[Any, PagedCache]:
        """This stage's layers. `batch.tokens, positions, lengths` are this context shard's, `batch.ragged` is whole."""
        pools = list(cache.layers)
        attend = self._attention(pools, batch.ragged)
        stream = decoder.through(stream, batch.positions, batch.lengths, attend, self.parallel.pipeline.stage)
        return stream, PagedCache(tuple(pools))

    @cached_property
    def _pool_of(self) -> dict[int, int]:
        """Layer that owns K/V -> its place among the pools."""
        owners = sorted(layer for group in page_groups(self.stage) for layer in group.layers)
        return {layer: place for place, layer in enumerate(owners)}

    @cached_property
    def group_of(self) -> dict[int, int]:
        """Layer that owns K/V -> its page group."""
        return {layer: g for g, group in enumerate(page_groups(self.stage)) for layer in group.layers}

    def _attention(self, pools: list[Any], ragged: tuple[Ragged, ...]) -> Attend:
        """What layers call; it replaces the pools by those with the new rows in them."""
        model, parallel, work = self.stage, self.parallel, SharedWork()
        group: dict[str, Any] = {"axes": parallel.context_axes, "shards": parallel.context}
        ragged = tuple(context.spread(each, **group) for each in ragged)

        def attend(
            index: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None, sinks: jax.Array | None
        ) -> jax.Array:
            owner = model.kv_owner(index)
            place, rows = self._pool_of[owner], ragged[self.group_of[owner]]
            options: dict[str, Any] = {
                "window": model.layers[index].window,
                "softcap": model.attention_softcap,
                "scale": model.attention_scale,
            }
            if parallel.context == 1:
                out, _, pools[place] = work.call(_attend, rows, q, k, v, pools[place], sinks, **options)
            else:
                out, pools[place] = work.call(_attend_over, rows, q, k, v, pools[place], sinks, **options, **group)
            return out

        return attend

    def _of_context(self, batch: Batch) -> Batch:
        """The decode rows and this context shard's run of the prefill tokens."""
        if self.parallel.context == 1:
            return batch
        rows = batch.decode_rows
        tokens, positions, lengths = (
            jnp.concatenate([x[:rows], self.parallel.own_context(x[rows:])]) for x in batch[:3]
        )
        return Batch(tokens, positions, lengths, batch.ragged)

    def _of_all_contexts(self, hidden: jax.Array, rows: int) -> jax.Array:
        if self.parallel.context == 1:
            return hidden
        return jnp.concatenate([hidden[:rows], self.parallel.all_context(hidden[rows:])])

    # ---- pipeline

    def _in_micro_batches(self, decoder: Decoder, cache: PagedCache, batch: Batch) -> tuple[jax.Array, PagedCache]:
        """As many micro-batches as stages: each stage waits `stages - 1` ticks, at the start or at the end."""
        pipeline = self.parallel.pipeline
        count, rows = pipeline.stages, batch.decode_rows
        tokens = batch.tokens.shape[0] - rows
        first = self._of_context(micro_batch(batch, jnp.int32(0), count))
        stream = jax.eval_shape(decoder.begin, first.tokens)
        received = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stream)
        embed_size = jax.eval_shape(decoder.finish, stream).shape[1]
        decoded = jnp.zeros((rows, embed_size), _dtype(stream))
        prefilled = jnp.zeros((tokens, embed_size), _dtype(stream))

        def tick(t: jax.Array, carry: Any) -> Any:
            cache, received, decoded, prefilled = carry
            entering = self._of_context(micro_batch(batch, jnp.minimum(t, count - 1), count))
            index, passes = pipeline.micro_batch(t)
            mine = unless(micro_batch(batch, index, count), passes != 0)
            begun = pipeline.first_or(decoder.begin(entering.tokens), received)
            stream, cache = self.layers(decoder, begun, cache, self._of_context(mine))
            hidden = self.parallel.prefill.all_tokens(decoder.finish(pipeline.of_last(stream)))
            hidden = self._of_all_contexts(hidden, rows // count)
            index, passes = pipeline.leaving(t)
            decoded = _put(decoded, hidden[: rows // count], index, passes == 0)
            prefilled = _put(prefilled, hidden[rows // count :], index, passes == 0)
            return cache, pipeline.pass_on(stream), decoded, prefilled

        start = (cache, received, decoded, prefilled)
        cache, _, decoded, prefilled = lax.fori_loop(0, count + pipeline.fill_ticks(), tick, start)
        return jnp.concatenate([decoded, prefilled]), cache


# Traced once for all layers that are alike: of 80 layers, most of the time before XLA has the program.
_OPTIONS = ("window", "softcap", "scale")


@partial(jax.jit, static_argnames=_OPTIONS)
def _attend(ragged: Ragged, q: Any, k: Any, v: Any, kv: Any, sinks: Any, **options: Any) -> Any:
    return attention.attend(q, k, v, kv, ragged, sinks=sinks, **options)


@partial(jax.jit, static_argnames=(*_OPTIONS, "axes", "shards"))
def _attend_over(ragged: Ragged, q: Any, k: Any, v: Any, kv: Any, sinks: Any, **options: Any) -> Any:
    return context.attend(q, k, v, kv, ragged, sinks=sinks, **options)


def _dtype(stream: Any) -> jnp.dtype:
    return jax.tree.leaves(stream)[0].dtype


def _put(whole: jax.Array, part: jax.Array, index: jax.Array, wanted: jax.Array) -> jax.Array:
    """`part` at its place among its likes in `whole`, if it is wanted."""
    if not part.shape[0]:
        return whole
    at = index * part.shape[0]
    old = lax.dynamic_slice_in_dim(whole, at, part.shape[0])
    return lax.dynamic_update_slice_in_dim(whole, jnp.where(wanted, part.astype(whole.dtype), old), at, axis=0)


def micro_batch(batch: Batch, index: jax.Array, count: int) -> Batch:
    """The `index`-th of `count` equal parts of the decode rows and of the prefill tokens.

    A chunk that a border cuts continues in the next part: stages see the parts in order, so its K/V are there by then.
    """
    rows = batch.decode_rows // count
    size = (batch.tokens.shape[0] - batch.decode_rows) // count

    def part(x: jax.Array) -> jax.Array:
        decoding = lax.dynamic_slice_in_dim(x[: batch.decode_rows], index * rows, rows)
        return jnp.concatenate([decoding, lax.dynamic_slice_in_dim(x[batch.decode_rows :], index * size, size)])

    ragged = tuple(_ragged_part(r, index, rows, size, part(r.q_position)) for r in batch.ragged)
    tokens, positions, lengths = (part(x) for x in batch[:3])
    return Batch(tokens, positions, lengths, ragged)


def _ragged_part(ragged: Ragged, index: jax.Array, rows: int, size: int, q_position: jax.Array) -> Ragged:
    whole = ragged.num_decode_seqs
    first = whole + index * size
    starts = jnp.clip(ragged.q_start[whole:] - first, 0, size)
    count = starts[1:] - starts[:-1]
    after = jnp.maximum(ragged.q_start[whole + 1 :] - (first + size), 0)  # tokens of a chunk in later parts
    kv_len = jnp.where(count > 0, ragged.kv_len[whole:] - after, 0)
    decoding = lax.dynamic_slice_in_dim(ragged.kv_len[:whole], index * rows, rows)
    tables = lax.dynamic_slice_in_dim(ragged.page_table[:whole], index * rows, rows)
    return replace(
        ragged,
        q_start=jnp.concatenate([jnp.arange(rows, dtype=jnp.int32), rows + starts]),
        kv_len=jnp.concatenate([decoding, kv_len]),
        page_table=jnp.concatenate([tables, ragged.page_table[whole:]]),
        q_position=q_position,
        num_decode_seqs=rows,
    )


def unless(batch: Batch, idle: jax.Array) -> Batch:
    """The batch, or one of the same shape in which no sequence is used."""
    ragged = tuple(replace(r, kv_len=jnp.where(idle, 0, r.kv_len)) for r in batch.ragged)
    return batch._replace(ragged=ragged)
