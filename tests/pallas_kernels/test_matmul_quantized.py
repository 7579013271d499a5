"""Quantized matmul: portable backends against the exact product, what is common to all, and what XLA is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _pytest.mark import ParameterSet

from pallas_kernels import devices, tensors
from pallas_kernels.dispatch import BackendError
from pallas_kernels.matmul import OP, cases, matmul, xla
from pallas_kernels.matmul.cases import CASES, FORMATS, Case

CPU = devices.named("cpu")


def slow_where(table: Mapping[str, Case], is_slow: Callable[[Case], bool]) -> list[ParameterSet]:
    """A test's parameters: the names of a table, some of them only in the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow if is_slow(case) else ()) for name, case in table.items()]


@pytest.mark.parametrize("name", slow_where(CASES, lambda case: case.rows in (2, 16)))
def test_xla_agrees_with_the_exact_product(name: str) -> None:
    cases.check("xla", CASES[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows == 1 or case.format == "dense"])
def test_the_oracle_agrees_with_the_exact_product(name: str) -> None:
    cases.check("reference", CASES[name])


@pytest.mark.parametrize("name", FORMATS)
def test_on_accelerators_xla_gets_one_dot(name: str) -> None:
    """The formulation for other platforms, run here."""
    case = Case(name, 5, 1024, 200)
    x, weight = cases.build(case)
    if weight.activation == "float8_e4m3fn":
        x = x.astype(jnp.float32)  # a dot of fp8 that XLA:CPU also takes
    product = matmul(x, weight, backend="xla", out_dtype="float32", device=devices.named("h100"))
    cases.compare(np.asarray(product, np.float64), cases.exact(x, weight), low=True)
    text = jax.jit(partial(matmul, backend="xla", device=devices.named("h100"))).lower(x, weight).as_text()
    assert "stablehlo.while" not in text


def test_the_table_covers_every_format_and_row_count() -> None:
    assert {case.format for case in CASES.values()} == {*FORMATS, "dense"}
    assert {case.rows for case in CASES.values() if case.format == "int4/g64"} >= {1, 2, 5, 16, 130}


@pytest.mark.parametrize("name", ["int8", "int4/g64", "int4/g64/zp", "w8a8-int8", "w8a8-int8/outliers", "2:4-int8"])
def test_a_float32_row_has_the_same_bits_whatever_the_number_of_rows(name: str) -> None:
    x, weight = cases.build(Case(name, 16, 1024, 300, dtype="float32"))
    products = [np.asarray(matmul(x[:rows], weight, backend="xla")) for rows in (16, 5, 2, 1)]
    for product in products[1:]:
        np.testing.assert_array_equal(product, products[0][: len(product)])


def test_w8a8_sums_integers_exactly() -> None:
    """Sums beyond 2**24, where float32 would round."""
    x, weight = jnp.ones((2, 4096)), jnp.ones((3, 4096)).at[:, 1].set(1 - 1 / 127)
    tensor = tensors.quantize(weight, "int8", activation="int8")
    wanted = (4095 * 127 + 126) * 127
    assert wanted > 2**24 and wanted % 2
    values, _ = tensors.quantize_rows(x, "int8")
    for backend in ("xla", "reference"):
        module = OP.load(backend)
        unscaled = replace(tensor, scales=jnp.full((1, 3), 2.0**-24))
        product = module.run(values, unscaled, out_dtype=jnp.dtype(jnp.float32), device=CPU)
        np.testing.assert_array_equal(np.asarray(product), np.float32(wanted) * np.float32(2.0**-24))


def test_w8a8_multiplies_integers_on_the_cpu() -> None:
    x, weight = cases.build(Case("w8a8-int8", 4))
    text = jax.jit(partial(matmul, backend="xla")).lower(x, weight).as_text()
    assert re.search(r"dot_general.*tensor<4x512xi8>.*tensor<256x512xi8>.*-> tensor<4x256xi32>", text)


@pytest.mark.parametrize("name", ["int8", "int4/g128", "fp8", "2:4-int8"])
def test_no_whole_weight_is_widened_on_the_cpu(name: str) -> None:
    x, weight = cases.build(Case(name, 4, 1024, 2048))
    memory = jax.jit(partial(matmul, backend="xla")).lower(x, weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 1024 * 2  # less than the weight in bfloat16


def test_outliers_matter_to_the_product() -> None:
    x, weight = cases.build(Case("w8a8-int8/outliers", 5))
    plain = cases.build(Case("w8a8-int8", 5))[1]
    wanted = np.asarray(x, np.float64) @ np.asarray(tensors.dequantize(weight), np.float64).T
    error = lambda tensor: np.max(np.abs(np.asarray(matmul(x, tensor, out_dtype="float32"), np.float64) - wanted))
    assert error(weight) < error(plain) / 4


def test_nan_activations_reach_the_result() -> None:
    x, weight = cases.build(Case("w8a8-int8", 3))
    product = matmul(x.at[1, 7].set(jnp.nan), weight, backend="xla")
    assert np.all(np.isnan(np.asarray(product[1], np.float32))) and not np.any(np.isnan(np.asarray(product[0])))


def test_empty_operands_give_zeros() -> None:
    weight = tensors.quantize(jnp.ones((4, 8)), "int8")
    assert matmul(jnp.ones((0, 8)), weight).shape == (0, 4)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (jnp.ones((2, 8)), tensors.quantize(jnp.ones((4, 16)), "int4"), r"\(2, 8\) and \(4, 16\)"),
        (jnp.ones((2, 8), jnp.int8), tensors.quantize(jnp.ones((4, 8)), "int8"), "x int8 is not floating-point"),
        (
            jnp.ones((2, 8)),
            tensors.sparsify_2_4(jnp.ones((4, 8), jnp.bfloat16)),
            "x float32 and sparse values bfloat16",
        ),
        (jnp.ones((2, 8)), tensors.quantize(jnp.ones((3, 4, 8)), "int8"), r"\(2, 8\) and \(3, 4, 8\)"),
    ],
)
def test_what_does_not_fit_says_so(x: jax.Array, weight: tensors.QuantizedTensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(x, weight)


def test_a_forced_backend_refuses_by_name() -> None:
    x, weight = cases.build(Case("int4/g64"))
    with pytest.raises(BackendError, match=r"llvm_cpu.*refuses.*format=int4/g64.*not int4/g64.*auto, xla"):
        matmul(x, weight, backend="llvm_cpu")
    with pytest.raises(BackendError, match=r"mosaic_tpu.*it is for tpu, the device is cpu"):
        matmul(x, weight, backend="mosaic_tpu")


def test_every_fp8_number_is_widened_exactly() -> None:
    bits = jnp.arange(256, dtype=jnp.uint8)
    wanted = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    np.testing.assert_array_equal(xla._widened_fp8(bits).astype(jnp.float32), wanted.astype(jnp.float32))


@pytest.mark.parametrize("at_a_time", [1, 512 * 7, 512 * 100, 1 << 30])
def test_outputs_that_do_not_divide_into_blocks(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "WEIGHTS_AT_A_TIME_CPU", at_a_time)
    cases.check("xla", Case("int4/g64", 3, 512, 30))
