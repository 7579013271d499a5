"""Calls at the shapes that models have: what is timed, tuned and compiled ahead of time.

Hides how a call's arguments are made, as shapes only or filled, and what it must move and compute: its K/V or weight
bytes and its floating-point operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention
from pallas_kernels.attention import KVSpec, Ragged
from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import cases as matmul_cases
from pallas_kernels.matmul import matmul

DECODE_SEQS, DECODE_ROWS, PREFILL_TOKENS = 64, 8192, 2048


@dataclass(frozen=True)
class Call:
    """`function(*args)` under jit, `donate` being the arguments it gives up."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # pytrees of arrays, or of ShapeDtypeStructs
    donate: tuple[int, ...] = ()

    def program(self) -> Callable[[], Any]:
        """Runs it on its filled arguments, again and again: what is given up comes back as the last result."""
        compiled = jax.jit(self.function, donate_argnums=self.donate)
        args = list(self.args)

        def run() -> Any:
            results = compiled(*args)
            if not self.donate:
                return results
            *results, args[self.donate[0]] = results
            return results

        return run


@dataclass(frozen=True)
class AttentionWork:
    """Decode: `seqs` sequences of `rows` K/V rows, one query each. Prefill: `seqs` whole prompts of `rows` tokens."""

    phase: str
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    window: int | None = None
    seqs: int = DECODE_SEQS
    rows: int = DECODE_ROWS

    @property
    def spec(self) -> KVSpec:
        return KVSpec(self.kv_heads, self.head_dim, self.page_size, jnp.dtype(self.kv_dtype))

    @property
    def kv_bytes(self) -> int:
        """K/V that must be read once, scales included."""
        seen = self.rows if self.window is None or self.phase == "prefill" else min(self.rows, self.window)
        return self.seqs * seen * self.spec.token_bytes

    @property
    def flops(self) -> int:
        """Of the two products, over the rows that queries see."""
        window = self.rows if self.window is None else min(self.rows, self.window)
        pairs = window if self.phase == "decode" else window * (window + 1) // 2 + (self.rows - window) * window
        return 4 * self.seqs * pairs * self.q_heads * self.head_dim

    def call(self, backend: str, device: Device, *, filled: bool) -> Call:
        """One `attend`, K/V writes included; `filled`: with random arguments, else only their shapes."""
        tokens = self.seqs * (1 if self.phase == "decode" else self.rows)
        columns = -(-self.rows // self.page_size)
        num_pages = 1 + self.seqs * columns

        def pages() -> Any:
            return attention.allocate(self.spec, num_pages, backend=backend, q_heads=self.q_heads, device=device)

        def attend(q: Any, k: Any, v: Any, kv: Any, ragged: Ragged) -> Any:
            return attention.attend(q, k, v, kv, ragged, window=self.window)

        heads = (self.q_heads, self.kv_heads, self.kv_heads)
        shapes = [jax.ShapeDtypeStruct((tokens, n, self.head_dim), jnp.dtype(self.dtype)) for n in heads]
        ragged = self._ragged(tokens, columns)
        if filled:
            return Call(attend, (*map(random, shapes), jax.tree.map(random, pages()), ragged), (3,))
        return Call(attend, (*shapes, jax.eval_shape(pages), jax.eval_shape(lambda: ragged)), (3,))

    def _ragged(self, tokens: int, columns: int) -> Ragged:
        decode = self.phase == "decode"
        per_seq = tokens // self.seqs
        order = 1 + np.random.default_rng(0).permutation(self.seqs * columns)
        return Ragged(
            q_start=jnp.arange(self.seqs + 1, dtype=jnp.int32) * per_seq,
            kv_len=jnp.full(self.seqs, self.rows, jnp.int32),
            page_table=jnp.asarray(order.reshape(self.seqs, columns), jnp.int32),
            q_position=jnp.tile(jnp.arange(self.rows - per_seq, self.rows, dtype=jnp.int32), self.seqs),
            num_decode_seqs=self.seqs if decode else 0,
        )


@dataclass(frozen=True)
class MatmulWork:
    """`x [rows, in] @ weight [out, in]`; with `num_groups` a grouped product, rows spread evenly over groups."""

    format: str = "dense"
    rows: int = 16
    in_size: int = 4096
    out_size: int = 14336
    num_groups: int | None = None
    dtype: str = "bfloat16"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.in_size * self.out_size

    def call(self, backend: str, device: Device, *, filled: bool) -> Call:
        """One product; `filled`: with random arguments, else only their shapes."""
        groups = () if self.num_groups is None else (self.num_groups,)
        formats = {**matmul_cases.FORMATS, **grouped_cases.FORMATS}  # the latter has "dense" too
        weight_shape = jax.ShapeDtypeStruct((*groups, self.out_size, self.in_size), jnp.dtype(self.dtype))
        x: Any = jax.ShapeDtypeStruct((self.rows, self.in_size), jnp.dtype(self.dtype))
        make = formats[self.format]
        weight = jax.jit(make)(random(weight_shape)) if filled else jax.eval_shape(make, weight_shape)
        x = random(x) if filled else x
        if self.num_groups is None:
            return Call(lambda x, w: matmul(x, w, backend=backend, device=device), (x, weight))
        sizes: Any = jax.ShapeDtypeStruct((self.num_groups,), jnp.int32)
        if filled:
            sizes = jnp.full(self.num_groups, self.rows // self.num_groups, jnp.int32)
            sizes = sizes.at[0].add(self.rows % self.num_groups)
        return Call(lambda x, w, n: grouped_matmul(x, w, n, backend=backend, device=device), (x, weight, sizes))


def of_key(kernel: str, key: dict[str, Any]) -> AttentionWork | MatmulWork:
    """The call whose block sizes a tuning table holds under `key`. Raises ValueError for a key that no call has."""
    try:
        if kernel.startswith("attention."):
            rows = DECODE_ROWS if key["phase"] == "decode" else PREFILL_TOKENS
            return AttentionWork(**key, seqs=DECODE_SEQS if key["phase"] == "decode" else 1, rows=rows)
        return MatmulWork(**key)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{kernel} is not called with {key}: {error}") from error


def random(shape: Any) -> jax.Array:
    """An array of a shape and dtype, normal or of random bits: zeros would make a GPU's clock faster than it is."""
    key = jax.random.key(0)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jax.random.randint(key, shape.shape, 0, 127, jnp.int32).astype(shape.dtype)
    wide = jnp.float32 if jnp.dtype(shape.dtype).itemsize == 1 else shape.dtype
    return jax.random.normal(key, shape.shape, wide).astype(shape.dtype)
