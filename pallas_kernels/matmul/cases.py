"""What every matmul backend is held to: formats of weights, row counts and awkward shapes, and the exact product.

Hides how the exact product is found: in float64, from the weight that the tensor stands for and, for W8A8, from the
rows that quantization made of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tensors
from pallas_kernels.devices import Device
from pallas_kernels.matmul import matmul
from pallas_kernels.tensors import QuantizedTensor, quantize, sparsify_2_4

OUTLIERS = (3, 17)
FORMATS: dict[str, Callable[[jax.Array], QuantizedTensor]] = {  # by QuantizedTensor.format, at 256 inputs or more
    "int8": lambda weight: quantize(weight, "int8"),
    "int8/g128": lambda weight: quantize(weight, "int8", group_size=128),
    "int8/zp": lambda weight: quantize(weight, "int8", zero_point=True),
    "int4": lambda weight: quantize(weight, "int4"),
    "int4/g32": lambda weight: quantize(weight, "int4", group_size=32),
    "int4/g64": lambda weight: quantize(weight, "int4", group_size=64),
    "int4/g128": lambda weight: quantize(weight, "int4", group_size=128, scale_dtype=jnp.bfloat16),
    "int4/g64/zp": lambda weight: quantize(weight, "int4", group_size=64, zero_point=True),
    "fp8": lambda weight: quantize(weight, "float8_e4m3fn"),
    "w8a8-int8": lambda weight: quantize(weight, "int8", activation="int8"),
    "w8a8-fp8": lambda weight: quantize(weight, "float8_e4m3fn", activation="float8_e4m3fn"),
    "w8a8-int8/outliers": lambda weight: quantize(weight, "int8", activation="int8", outlier_columns=OUTLIERS),
    "2:4": sparsify_2_4,
    "2:4-int8": lambda weight: sparsify_2_4(weight, "int8"),
    "2:4-fp8": lambda weight: sparsify_2_4(weight, "float8_e4m3fn"),
}


@dataclass(frozen=True)
class Case:
    """One product."""

    format: str = "int8"  # "dense", or a key of FORMATS
    rows: int = 5
    in_size: int = 512
    out_size: int = 256
    dtype: str = "bfloat16"  # of x
    out_dtype: str = "float32"


def _table() -> dict[str, Case]:
    """Every format at each row count; then every format at awkward sizes, and in other dtypes."""
    cases: dict[str, Case] = {}
    for name in FORMATS:
        usual = 1024 if name.startswith("2:4") else 512  # inputs that every backend takes
        cases |= {f"{name}-rows-{rows}": Case(name, rows, usual) for rows in (1, 2, 5, 16, 130)}
        cases[f"{name}-896x1000"] = Case(name, 5, 896, 1000)
        cases[f"{name}-1024x200"] = Case(name, 3, 1024, 200)
        cases[f"{name}-f32"] = Case(name, 3, usual, dtype="float32")
        cases[f"{name}-to-bf16"] = Case(name, 5, usual, out_dtype="bfloat16")
    cases["dense-5"] = Case("dense")
    cases["dense-130-f32"] = Case("dense", 130, 896, 1000, dtype="float32")
    return cases


CASES = _table()

# max |product - exact|, relative to the largest exact value. float32: reassociated sums of some hundred terms.
# bfloat16: a result, or a weight times its group's scale, is rounded to 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8}


def build(case: Case, seed: int = 0) -> tuple[jax.Array, jax.Array | QuantizedTensor]:
    """x `[rows, in]` and the weight `[out, in]` of a case, the same for every backend; some inputs are large."""
    x = np.random.default_rng(seed).standard_normal((case.rows, case.in_size), np.float32)
    x[:, OUTLIERS] *= 30 if case.format.endswith("outliers") else 1
    return jnp.asarray(x, case.dtype), _weight(case.format, (case.out_size, case.in_size), case.dtype, seed)


@functools.lru_cache(maxsize=64)
def _weight(format: str, shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array | QuantizedTensor:
    """Kept for the next case with another number of rows."""
    weight = jnp.asarray(np.random.default_rng(seed + 1).standard_normal(shape, np.float32), dtype)
    return weight if format == "dense" else jax.jit(FORMATS[format])(weight)


def exact(x: jax.Array, weight: jax.Array | QuantizedTensor) -> np.ndarray:
    """f64 `[rows, out]`: the product without rounding, of activations as they are quantized."""
    if not isinstance(weight, QuantizedTensor):
        return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    plain = np.asarray(jax.jit(tensors.dequantize)(weight), np.float64)
    seen = np.asarray(x, np.float64)
    if weight.activation is not None:
        columns = np.asarray([] if weight.outlier_columns is None else weight.outlier_columns, np.int32)
        values, scales = tensors.quantize_rows(x.at[:, columns].set(0), weight.activation)
        kept = seen[:, columns]
        seen = np.asarray(values, np.float64) * np.asarray(scales, np.float64)[:, None]
        seen[:, columns] = kept
    return seen @ plain.T


def check(backend: str, case: Case, seed: int = 0, *, device: Device | None = None) -> None:
    """Raises AssertionError where a backend's product is not the exact one; `device`: made for, where not this one."""
    x, weight = build(case, seed)
    expected = exact(x, weight)
    multiply = jax.jit(lambda x, weight: matmul(x, weight, backend=backend, out_dtype=case.out_dtype, device=device))
    product = multiply(x, weight)
    assert product.shape == expected.shape and product.dtype == jnp.dtype(case.out_dtype)
    compare(np.asarray(product, np.float64), expected, low="bfloat16" in (case.dtype, case.out_dtype))


def compare(product: np.ndarray, expected: np.ndarray, *, low: bool) -> None:
    """Raises AssertionError where a product is further from the exact one than TOLERANCE allows."""
    tolerance = TOLERANCE["bfloat16" if low else "float32"]
    np.testing.assert_allclose(product, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))
