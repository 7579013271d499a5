"""Row invariance where it is asked for: the same bits for a row in any company, by dots of one shape for all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, devices
from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import matmul as plain
from pallas_kernels.attention import KVSpec, Ragged
from pallas_kernels.dispatch import BackendError
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.matmul import cases, llvm_cpu
from pallas_kernels.native import jit
from pallas_kernels.tensors import QuantizedTensor

CPU = devices.named("cpu")
ROWS = (1, 2, 3, 4, 5, 16, 31, 32, 33, 64, 65, 130, 515)
IN_SIZE, OUT_SIZE = 256, 96
FORMATS = ("dense", "int8", "int4/g64", "fp8", "w8a8-int8", "int4/g64/zp")
needs_native = pytest.mark.skipif(jit.unavailable() is not None, reason="no native kernels")


def rows_of(dtype: str, count: int = max(ROWS), out_size: int = OUT_SIZE) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((count, IN_SIZE), np.float32)
    weight = rng.standard_normal((out_size, IN_SIZE), np.float32) / 16
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


def packed_as(format: str, weight: jax.Array) -> jax.Array | QuantizedTensor:
    return weight if format == "dense" else cases.FORMATS[format](weight)


def assert_same_rows(multiply: Callable[[jax.Array], jax.Array], x: jax.Array) -> None:
    """Of the first n rows, and of rows taken from the middle, whatever n is."""
    whole = np.asarray(jax.jit(multiply)(x), np.float32)
    for rows in ROWS:
        np.testing.assert_array_equal(jax.jit(multiply)(x[:rows]), whole[:rows], err_msg=f"{rows} rows")
    np.testing.assert_array_equal(jax.jit(multiply)(x[77:84]), whole[77:84], err_msg="elsewhere in the batch")


def dot_shapes(function: Callable[..., Any], *args: Any) -> set[str]:
    """The operand types of every dot of a program, but for the thin ones with ones that sum rows."""
    text = jax.jit(function).lower(*args).as_text()
    return {types for types in re.findall(r"dot_general.*: (\(tensor<.*?>\)) ->", text) if "tensor<2x" not in types}


@pytest.mark.parametrize("backend", ["auto", "xla", pytest.param("llvm_cpu", marks=needs_native)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_has_the_same_bits_in_any_batch(backend: str, format: str, dtype: str) -> None:
    x, weight = rows_of(dtype)
    packed = packed_as(format, weight)
    multiply = lambda x: plain.matmul(x, packed, backend=backend, out_dtype="float32", invariant=True)
    no_vnni = format == "w8a8-int8" and not llvm_cpu._has_vnni()
    if backend == "llvm_cpu" and (
        format not in llvm_cpu.TARGETS or (format == "dense" and dtype == "float32") or no_vnni
    ):
        with pytest.raises(BackendError, match="AVX512-VNNI" if no_vnni else "llvm_cpu"):
            multiply(x)
        return
    assert_same_rows(multiply, x)
    exact = np.asarray(plain.matmul(x, packed, backend="reference", out_dtype="float32"))
    np.testing.assert_allclose(multiply(x), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("out_size", [1, 2, 3])
def test_few_outputs_are_no_exception(dtype: str, out_size: int) -> None:
    """XLA:CPU multiplies by one column in an order that depends on the number of rows."""
    x, weight = rows_of(dtype, out_size=out_size)
    assert_same_rows(lambda x: plain.matmul(x, weight, backend="xla", out_dtype="float32", invariant=True), x)


@needs_native
def test_one_backend_serves_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XLA is faster from 33 rows on, a row's bits change there; asked for invariance, they do not."""
    isa = replace(llvm_cpu._isa("dense"), most_rows=32)  # as on CPUs with matrix units, or without bfloat16 dots
    monkeypatch.setattr(llvm_cpu, "_isa", lambda format: isa)
    x, weight = rows_of("bfloat16", 64)
    few, many = (np.asarray(plain.matmul(x, weight, out_dtype="float32"))[:32] for x in (x[:32], x))
    assert np.any(few != many), "the two backends add in the same order: nothing is shown here"
    few, many = (np.asarray(plain.matmul(x, weight, out_dtype="float32", invariant=True))[:32] for x in (x[:32], x))
    np.testing.assert_array_equal(few, many)


@pytest.mark.parametrize("format", ["dense", "int8"])
def test_every_dot_of_the_portable_matmul_has_one_shape(format: str) -> None:
    x, weight = rows_of("bfloat16", 130)
    packed = packed_as(format, weight)
    ask = lambda rows, invariant: dot_shapes(
        lambda x: plain.matmul(x, packed, backend="xla", invariant=invariant), x[:rows]
    )
    shapes = {rows: ask(rows, True) for rows in (1, 4, 33, 130)}
    assert all(len(found) == 1 for found in shapes.values()) and len(set.union(*shapes.values())) == 1
    assert ask(4, False) != ask(130, False), "nothing is shown: the shapes were equal anyway"


@pytest.mark.parametrize("format", ["dense", "int8", "w8a8-int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_experts_row_has_the_same_bits_in_any_batch(format: str, dtype: str) -> None:
    """One row of one expert, alone and among more and more rows of that and of other experts."""
    x, weight, _ = grouped_cases.build(grouped_cases.Case(format, (200, 200, 200), dtype=dtype))
    multiply = jax.jit(lambda x, sizes: grouped.grouped_matmul(x, weight, sizes, out_dtype="float32", invariant=True))
    own = x[250:251]
    alone = np.asarray(multiply(own, jnp.array([0, 1, 0], jnp.int32)))[0]
    for before, own_before, after in ((0, 1, 0), (3, 0, 2), (15, 5, 1), (200, 49, 49), (1, 130, 300)):
        rows = jnp.concatenate([x[:before], x[:own_before], own, x[300 : 300 + after]])
        sizes = jnp.array([before, own_before + 1, after], jnp.int32)
        got = np.asarray(multiply(rows, sizes))[before + own_before]
        np.testing.assert_array_equal(got, alone, err_msg=f"{before}, {own_before}, {after}")


def test_every_dot_of_the_portable_grouped_matmul_has_one_shape() -> None:
    x, weight, _ = grouped_cases.build(grouped_cases.Case("dense", (600, 0, 0)))

    def ask(rows: int, invariant: bool) -> set[str]:
        multiply = lambda x, sizes: grouped.grouped_matmul(x, weight, sizes, backend="xla", invariant=invariant)
        return dot_shapes(multiply, x[:rows], jnp.array([rows, 0, 0], jnp.int32))

    assert ask(2, True) == ask(600, True) and len(ask(2, True)) == 1
    assert ask(2, False) != ask(600, False), "nothing is shown: the shapes were equal anyway"


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_every_tile_of_portable_attention_has_one_shape(kv_dtype: str) -> None:
    spec = KVSpec(2, 24, 16, jnp.dtype(kv_dtype))

    def ask(decoding: int, prefilled: int, invariant: bool) -> set[str]:
        seqs, tokens = decoding + 1, decoding + prefilled
        ragged = Ragged(
            q_start=jnp.asarray([*range(decoding + 1), tokens], jnp.int32),
            kv_len=jnp.full(seqs, 40, jnp.int32),
            page_table=jnp.zeros((seqs, 8), jnp.int32),
            q_position=jnp.full(tokens, 39, jnp.int32),
            num_decode_seqs=decoding,
        )
        kv = attention.allocate(spec, 8, backend="xla", q_heads=4, invariant=invariant)
        q, k, v = (jnp.ones((tokens, heads, 24), jnp.bfloat16) for heads in (4, 2, 2))
        return dot_shapes(lambda *args: attention.attend(*args)[0], q, k, v, kv, ragged)

    batches = ((1, 0), (5, 0), (2, 3), (4, 200))
    assert len({frozenset(ask(*batch, True)) for batch in batches}) == 1
    assert len({frozenset(ask(*batch, False)) for batch in batches}) > 1, (
        "nothing is shown: the shapes were equal anyway"
    )


def test_where_no_test_has_seen_it_nothing_is_promised() -> None:
    case = {"in_size": 256, "out_size": 64, "dtype": "bfloat16", "out_dtype": "bfloat16", "format": "int8"}
    for platform in ("v6e", "h100"):
        device = devices.named(platform)
        for op, sizes in ((plain.OP, {}), (grouped.OP, {"num_groups": 2})):
            with pytest.raises(BackendError, match="rows' bits may depend on the batch on"):
                op.choose("auto", rows=4, device=device, invariant=True, **case, **sizes)
        with pytest.raises(BackendError, match="rows' bits may depend on the batch on"):
            attention.choose(KVSpec(2, 128, 128), device=device, invariant=True)
    with pytest.raises(BackendError, match=r"'reference' refuses .*invariant=True.*what would work: auto,"):
        plain.OP.choose("reference", rows=4, device=CPU, invariant=True, **case)
