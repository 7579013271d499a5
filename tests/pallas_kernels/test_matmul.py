"""Dense matmul: every backend against the oracle, the bits of a row, and the native kernel inside XLA programs."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import devices, tensors
from pallas_kernels.dispatch import BackendError
from pallas_kernels.matmul import OP, llvm_cpu, llvm_tiles, matmul, matmul_rows
from pallas_kernels.native import handler, jit

ROWS = (1, 2, 3, 4, 5, 8, 13, 16, 33)
SHAPES = ((1, 1), (31, 3), (70, 13), (64, 8), (513, 1030), (2048, 64))  # (in, out): tails, one chunk, several chunks
CPU, TPU, GPU = (devices.named(name) for name in ("cpu", "v6e", "h100"))
CASE = {
    "rows": 4,
    "in_size": 64,
    "out_size": 64,
    "dtype": "bfloat16",
    "out_dtype": "bfloat16",
    "format": "dense",
    "device": CPU,
}
TOLERANCE = {"bfloat16": 2**-8, "float32": 1e-5}  # of the largest result; bfloat16 results are rounded to 8 bits

# Of the machine alone: where it could run the kernel and the kernel refuses, that is a failure and no reason to skip.
needs_native = pytest.mark.skipif(jit.unavailable() is not None, reason="no native kernels on this machine")


def operands(rows: int, in_size: int, out_size: int, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(in_size * out_size)
    x = generator.standard_normal((rows, in_size), np.float32)
    weight = generator.standard_normal((out_size, in_size), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


def exact(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


def served_rows(backend: str) -> tuple[int, ...]:
    """Those of ROWS that the backend takes on this CPU: with matrix units or without bfloat16 dots, 32 at most."""
    most = llvm_cpu._isa("dense").most_rows if backend == "llvm_cpu" else None
    return tuple(rows for rows in ROWS if most is None or rows <= most)


def leading_rows(backend: str, x: jax.Array, weight: jax.Array, out_dtype: str) -> list[np.ndarray]:
    """The products of the first n rows of x for each n of `served_rows`, each a multiplication of its own."""

    @jax.jit
    def products(x: jax.Array, weight: jax.Array) -> list[jax.Array]:
        return [matmul(x[:rows], weight, backend=backend, out_dtype=out_dtype) for rows in served_rows(backend)]

    return [np.asarray(product) for product in products(x, weight)]


@needs_native
def test_more_rows_than_the_native_kernel_is_for_are_refused() -> None:
    x, weight = operands(max(ROWS), 70, 13)
    for rows in set(ROWS) - set(served_rows("llvm_cpu")):
        with pytest.raises(BackendError, match=rf"{rows} rows are more than 32: .*what would work: auto, xla"):
            matmul(x[:rows], weight, backend="llvm_cpu")


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("backend", "shape"),
    [pytest.param("llvm_cpu", shape, marks=needs_native) for shape in SHAPES]
    + [(backend, (70, 13)) for backend in ("xla", "reference")],
)
def test_agrees_with_float64(backend: str, shape: tuple[int, int], out_dtype: str) -> None:
    x, weight = operands(max(ROWS), *shape)
    wanted = exact(x, weight)
    for rows, product in zip(served_rows(backend), leading_rows(backend, x, weight, out_dtype), strict=True):
        assert product.shape == (rows, shape[1]) and product.dtype == jnp.dtype(out_dtype)
        error = np.max(np.abs(product.astype(np.float64) - wanted[:rows]))
        assert error <= TOLERANCE[out_dtype] * np.max(np.abs(wanted)), f"{rows} rows"


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_float32_agrees_with_float64(backend: str) -> None:
    x, weight = operands(5, 70, 13, "float32")
    wanted = exact(x, weight)
    np.testing.assert_allclose(matmul(x, weight, backend=backend), wanted, atol=1e-5 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("shape", [(70, 13), (513, 1030)])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("xla", "float32"), ("reference", "float32"), pytest.param("llvm_cpu", "bfloat16", marks=needs_native)],
)
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(backend: str, dtype: str, shape: tuple[int, int]) -> None:
    x, weight = operands(max(ROWS), *shape, dtype)
    products = leading_rows(backend, x, weight, "float32")
    for rows, product in zip(served_rows(backend), products, strict=True):
        np.testing.assert_array_equal(product, products[-1][:rows], err_msg=f"{rows} rows")


@needs_native
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "NEON"])
def test_portable_instructions_agree_with_float64(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 variants of the kernel; LLVM compiles any vector width for any CPU."""
    target = f"test_matmul_{isa.lower()}"
    monkeypatch.setitem(llvm_cpu.TARGETS, "dense", target)
    assert jit.register(target, llvm_cpu.ir(getattr(llvm_tiles, isa), target)) is None
    x, weight = operands(9, 77, 530)
    run = partial(llvm_cpu.run, weight=weight, out_dtype=jnp.dtype(jnp.float32), device=devices.current())
    products = [run(x[:rows]) for rows in (9, 4, 1)]
    wanted = exact(x, weight)
    np.testing.assert_allclose(products[0], wanted, atol=1e-5 * np.max(np.abs(wanted)))
    for product in products[1:]:
        np.testing.assert_array_equal(product, products[0][: product.shape[0]])


@needs_native
def test_special_values_survive() -> None:
    x = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [0.0, -0.0]], jnp.bfloat16)
    weight = jnp.array([[1.0, 1.0], [3.0, 0.5], [1e38, 1e38], [3e38, 3e38], [0.0, 1.0]], jnp.bfloat16)
    for out_dtype in (jnp.bfloat16, jnp.float32):
        native = matmul(x, weight, backend="llvm_cpu", out_dtype=out_dtype)
        np.testing.assert_array_equal(
            np.asarray(native, np.float32),
            np.asarray(matmul(x, weight, backend="reference", out_dtype=out_dtype), np.float32),
        )


@needs_native
def test_bfloat16_results_round_to_nearest_even() -> None:
    """`1 * value` for float32 values halfway between bfloat16 ones, built as sums of two products."""
    low = np.arange(128) * 2.0**-7  # 1 + low: every bfloat16 mantissa
    weight = jnp.asarray(np.stack([1 + low, np.full(128, 2.0**-8)], axis=1), jnp.bfloat16)
    x = jnp.ones((1, 2), jnp.bfloat16)
    wide = matmul(x, weight, backend="llvm_cpu", out_dtype=jnp.float32)
    np.testing.assert_array_equal(wide[0], 1 + low + 2.0**-8)
    np.testing.assert_array_equal(matmul(x, weight, backend="llvm_cpu"), wide.astype(jnp.bfloat16))


@needs_native
def test_the_compiled_program_calls_the_native_kernel() -> None:
    x, weight = operands(16, 256, 512)
    text = jax.jit(partial(matmul, backend="llvm_cpu")).lower(x, weight).compile().as_text()
    assert llvm_cpu.TARGETS["dense"] in text
    assert " dot(" not in text


@needs_native
def test_inside_while_loop_with_donated_state() -> None:
    """As decoding uses it: weights constant over the loop, the state donated."""
    _, weight = operands(1, 512, 512)
    weight = weight / 23  # keeps the state's size about constant: 23 is the root of 512
    start, _ = operands(3, 512, 1)

    @partial(jax.jit, donate_argnums=0)
    def loop(x: jax.Array, weight: jax.Array) -> jax.Array:
        body = lambda carry: (carry[0] + 1, jnp.tanh(matmul(carry[1], weight, backend="llvm_cpu")))
        return jax.lax.while_loop(lambda carry: carry[0] < 10, body, (0, x))[1]

    wanted = start
    for _ in range(10):
        wanted = jnp.tanh(matmul(wanted, weight, backend="llvm_cpu"))
    np.testing.assert_array_equal(loop(start, weight), wanted)


@needs_native
def test_rows_beyond_the_second_level_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken in groups that fit it; a prefill's rows have the bits they would have when decoded."""
    monkeypatch.setattr(llvm_cpu, "_host_isa", lambda: llvm_tiles.AVX512_BF16)  # whose rows are not limited
    x, weight = operands(150, 4100, 40)
    product = np.asarray(matmul(x, weight, backend="llvm_cpu", out_dtype=jnp.float32))
    wanted = exact(x, weight)
    np.testing.assert_allclose(product, wanted, atol=1e-5 * np.max(np.abs(wanted)))
    for row in (0, 31, 32, 74, 75, 149):
        single = matmul(x[row : row + 1], weight, backend="llvm_cpu", out_dtype=jnp.float32)
        np.testing.assert_array_equal(single[0], product[row])


@needs_native
def test_many_threads_at_once() -> None:
    x, weight = operands(4, 1024, 2048)  # large enough to be split over cores
    multiply = jax.jit(partial(matmul, backend="llvm_cpu"))
    wanted = np.asarray(multiply(x, weight))

    def work(_: int) -> bool:
        return all(np.array_equal(np.asarray(multiply(x, weight)), wanted) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@needs_native
def test_independent_calls_in_one_program() -> None:
    x, weight = operands(2, 512, 4096)
    together = jax.jit(lambda x, weight: [matmul(x * scale, weight, backend="llvm_cpu") for scale in range(1, 9)])
    for scale, product in enumerate(together(x, weight), start=1):
        np.testing.assert_array_equal(product, matmul(x * scale, weight, backend="llvm_cpu"))


@needs_native
def test_vmap_runs_one_after_the_other() -> None:
    x, weight = operands(6, 64, 32)
    batched = jax.vmap(partial(matmul, backend="llvm_cpu"), in_axes=(0, None))(x.reshape(2, 3, 64), weight)
    np.testing.assert_array_equal(batched.reshape(6, 32), matmul(x, weight, backend="llvm_cpu"))


@needs_native
def test_gradients_are_those_of_the_xla_backend() -> None:
    x, weight = operands(4, 64, 32)

    def loss(x: jax.Array, weight: jax.Array, backend: str) -> jax.Array:
        return jnp.sum(matmul(x, weight, backend=backend, out_dtype=jnp.float32) ** 2)

    native, wanted = (jax.grad(loss, argnums=(0, 1))(x, weight, backend) for backend in ("llvm_cpu", "xla"))
    for got, want in zip(native, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.max(np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)))
        assert error <= 2**-7 * np.max(np.abs(np.asarray(want, np.float32)))


@needs_native
def test_auto_prefers_the_native_kernel_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OP.choose("auto", **CASE)[0] == "llvm_cpu"
    assert OP.choose("auto", **CASE | {"dtype": "float32", "out_dtype": "float32"})[0] == "xla"
    assert OP.choose("auto", **CASE | {"device": TPU})[0] == "xla"
    monkeypatch.setattr(llvm_cpu, "_host_isa", lambda: llvm_tiles.AVX2)
    assert OP.choose("auto", **CASE | {"rows": 32})[0] == "llvm_cpu"
    assert OP.choose("auto", **CASE | {"rows": 33})[0] == "xla"
    assert "33 rows are more than 32" in str(llvm_cpu.refuse(**CASE | {"rows": 33}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": GPU}, "it is for CPUs, the device is h100"),
        ({"format": "int8"}, "it multiplies dense and w8a8-int8 weights, not int8"),
        ({"dtype": "float32"}, "it multiplies bfloat16, not float32"),
        ({"out_dtype": "float16"}, "out_dtype float16 is not one of bfloat16, float32"),
    ],
)
def test_native_refusals_say_why(change: dict[str, object], reason: str) -> None:
    assert reason in (llvm_cpu.refuse(**CASE | change) or "")


def test_forced_native_kernel_on_float32_raises() -> None:
    x, weight = operands(2, 64, 8, "float32")
    with pytest.raises(
        BackendError, match=r"'llvm_cpu' refuses rows=2.*float32.*what would work: auto, xla, reference"
    ):
        matmul(x, weight, backend="llvm_cpu")


def test_without_llvmlite_xla_serves_and_the_refusal_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llvmlite" else found(name))
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setattr(llvm_cpu, "_register", llvm_cpu._register.__wrapped__)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    x, weight = operands(3, 64, 8)
    np.testing.assert_array_equal(matmul(x, weight), matmul(x, weight, backend="xla"))
    with pytest.raises(BackendError, match="llvmlite is not installed: pip install llvmlite"):
        matmul(x, weight, backend="llvm_cpu")


def test_a_cpu_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.host, "machine", lambda: "riscv64")
    reason = str(llvm_cpu._register.__wrapped__("dense"))
    assert "needs x86-64 with AVX2 and FMA, or 64-bit Arm; this is riscv64" in reason


@needs_native
def test_another_ffi_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "API_MINOR", 99)
    monkeypatch.setitem(llvm_cpu.TARGETS, "dense", "test_matmul_future_api")
    assert "does not take handlers of XLA FFI 0.99" in str(llvm_cpu._register.__wrapped__("dense"))


needs_vnni = pytest.mark.skipif(
    jit.unavailable() is not None or not llvm_cpu._has_vnni(), reason="no AVX512-VNNI on this machine"
)


@needs_vnni
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 130])
@pytest.mark.parametrize("shape", [(512, 256), (896, 1000), (100, 7), (33, 5), (5, 64)], ids=str)
def test_native_w8a8_is_exact(rows: int, shape: tuple[int, int]) -> None:
    """Integers and their scales: nothing is rounded until the end, so `xla` gives the same bits."""
    x, weight = operands(rows, *shape)
    quantized = tensors.quantize(weight, "int8", activation="int8")
    products = [matmul(x, quantized, backend=name, out_dtype=jnp.float32) for name in ("llvm_cpu", "xla")]
    np.testing.assert_allclose(products[0], products[1], rtol=1e-6)


@needs_vnni
def test_native_w8a8_takes_the_largest_values() -> None:
    """The most that 65,536 inputs can add up to: unsigned bytes times signed ones do not saturate, sums do not wrap."""
    in_size = llvm_cpu.MOST_INTEGER_INPUTS
    for sign in (1, -1):
        x = jnp.full((2, in_size), sign, jnp.float32)
        weight = tensors.quantize(jnp.full((5, in_size), -1.0), "int8", activation="int8")
        np.testing.assert_allclose(matmul(x, weight, backend="llvm_cpu"), np.full((2, 5), -sign * in_size), rtol=1e-6)


def test_native_w8a8_refuses_sums_that_may_not_fit() -> None:
    assert "131072 inputs are more than 65536" in str(
        llvm_cpu.refuse(**CASE | {"format": "w8a8-int8", "in_size": 1 << 17})
    )


@pytest.mark.parametrize("backend", ["xla", pytest.param("llvm_cpu", marks=needs_vnni)])
def test_parts_of_w8a8_add_up_exactly(backend: str) -> None:
    """Of inputs in two places: sums of integers, scaled once, are the bits of the whole product."""
    x, weight = operands(5, 512, 96)
    whole = tensors.quantize(weight, "int8", activation="int8")
    wanted = matmul(x, whole, backend=backend, out_dtype=jnp.float32)
    rows, scales = tensors.quantize_rows(x, "int8")
    total = jnp.zeros_like(wanted)
    for part in (slice(0, 256), slice(256, None)):
        piece = replace(whole, values=whole.values[:, part])
        total += matmul_rows(rows[:, part], None, piece, dtype=x.dtype, out_dtype=jnp.float32, backend=backend)
    np.testing.assert_array_equal(total * whole.scales * scales[:, None], wanted)


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
def test_rows_that_are_quantized_already(activation: str) -> None:
    x, weight = operands(5, 512, 96)
    whole = tensors.quantize(weight, activation, activation=activation)
    rows, scales = tensors.quantize_rows(x, activation)
    got = matmul_rows(rows, scales, whole, dtype=x.dtype, out_dtype=x.dtype)
    np.testing.assert_array_equal(got, matmul(x, whole))


def test_a_cpu_without_vnni_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "unavailable", lambda: None)
    monkeypatch.setattr(llvm_cpu, "_has_vnni", lambda: False)
    assert "w8a8-int8 needs AVX512-VNNI" in str(llvm_cpu._register.__wrapped__("w8a8-int8"))


def test_xla_never_runs_a_one_row_dot() -> None:
    for dtype, rows in (("float32", 2), ("bfloat16", 4)):
        x, weight = operands(1, 64, 32, dtype)
        text = jax.jit(partial(matmul, backend="xla")).lower(x, weight).as_text()
        assert f"tensor<{rows}x64x" in text.split("dot_general")[1], dtype


def test_empty_operands_give_zeros() -> None:
    assert matmul(jnp.ones((0, 8)), jnp.ones((4, 8))).shape == (0, 4)
    np.testing.assert_array_equal(matmul(jnp.ones((2, 0)), jnp.ones((3, 0))), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 8), (4, 9), r"\(2, 8\) and \(4, 9\)"),
        ((8,), (4, 8), r"\(8,\) and \(4, 8\)"),
        ((2, 2, 8), (4, 8), r"\(2, 2, 8\)"),
    ],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(jnp.ones(x), jnp.ones(weight))


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="x float32 and weight bfloat16 must share one floating-point dtype"):
        matmul(jnp.ones((2, 8)), jnp.ones((4, 8), jnp.bfloat16))
    with pytest.raises(ValueError, match="int32"):
        matmul(jnp.ones((2, 8), jnp.int32), jnp.ones((4, 8), jnp.int32))
