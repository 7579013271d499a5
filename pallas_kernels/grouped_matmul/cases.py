"""What every grouped matmul backend is held to: formats of weights, and groups that are empty, long, or not aligned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import cases
from pallas_kernels.tensors import QuantizedTensor

_QUANTIZED = ("int8", "int8/g128", "int4", "int4/g64", "int4/g128", "fp8", "w8a8-int8", "w8a8-fp8")
FORMATS: dict[str, Callable[[jax.Array], jax.Array | QuantizedTensor]] = {
    "dense": lambda weight: weight,
    **{name: cases.FORMATS[name] for name in _QUANTIZED},
}
GROUPS: dict[str, tuple[int, ...]] = {  # rows of each group
    "one-row": (0, 1, 0, 0),
    "single-rows": (1, 1, 0, 1, 1, 1),
    "uneven": (5, 0, 17, 1),
    "first-and-last-empty": (0, 16, 16, 0),
    "all-empty": (0, 0, 0),
    "one-group": (40,),
    "many-rows": (130, 3, 0, 70, 64),
}


@dataclass(frozen=True)
class Case:
    """One product."""

    format: str = "dense"
    groups: tuple[int, ...] = GROUPS["uneven"]
    padding: int = 0  # rows beyond all groups
    in_size: int = 256
    out_size: int = 128
    dtype: str = "bfloat16"  # of x
    out_dtype: str = "float32"


def _table() -> dict[str, Case]:
    """Every format with uneven groups, padding, awkward sizes and float32; two formats with every kind of groups."""
    table = {}
    for name in FORMATS:
        table[f"{name}-uneven"] = Case(name, padding=3)
        table[f"{name}-many-rows"] = Case(name, GROUPS["many-rows"], out_dtype="bfloat16")
        table[f"{name}-896x200"] = Case(name, in_size=896, out_size=200)
        table[f"{name}-f32"] = Case(name, padding=1, dtype="float32")
    for groups, sizes in GROUPS.items():
        table |= {f"{name}-{groups}": Case(name, sizes, padding=2) for name in ("dense", "int8")}
    table["int4/g128-512x1000"] = Case("int4/g128", GROUPS["single-rows"], in_size=512, out_size=1000)
    return table


CASES = _table()


def build(case: Case, seed: int = 0) -> tuple[jax.Array, jax.Array | QuantizedTensor, jax.Array]:
    """x `[tokens, in]`, weight `[groups, out, in]`, group sizes; rows beyond all groups hold large numbers."""
    rng = np.random.default_rng(seed)
    used = sum(case.groups)
    x = rng.standard_normal((used + case.padding, case.in_size), np.float32)
    x[used:] = 1e30
    shape = (len(case.groups), case.out_size, case.in_size)
    weight = jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)
    return jnp.asarray(x, case.dtype), jax.jit(FORMATS[case.format])(weight), jnp.asarray(case.groups, jnp.int32)


def exact(x: jax.Array, weight: jax.Array | QuantizedTensor, groups: tuple[int, ...]) -> np.ndarray:
    """f64 `[tokens, out]`: each group's product without rounding; zeros beyond all groups."""
    expected = np.zeros((x.shape[0], weight.shape[1]))
    first = 0
    for group, size in enumerate(groups):
        own = jax.tree.map(lambda array, group=group: array[group], weight)
        expected[first : first + size] = cases.exact(x[first : first + size], own)
        first += size
    return expected


def check(backend: str, case: Case, seed: int = 0, *, device: Device | None = None) -> None:
    """Raises AssertionError where a backend's product is not the exact one; `device`: made for, where not this one."""
    x, weight, group_sizes = build(case, seed)
    expected = exact(x, weight, case.groups)
    multiply = partial(grouped_matmul, backend=backend, out_dtype=case.out_dtype, device=device)
    product = jax.jit(multiply)(x, weight, group_sizes)
    assert product.shape == expected.shape and product.dtype == jnp.dtype(case.out_dtype)
    assert not np.any(np.asarray(product[sum(case.groups) :], np.float32)), "rows beyond all groups are not zero"
    cases.compare(np.asarray(product, np.float64), expected, low="bfloat16" in (case.dtype, case.out_dtype))
