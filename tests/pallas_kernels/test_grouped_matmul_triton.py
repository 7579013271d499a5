"""Grouped products in Triton: numbers in its interpreter, machine code for GPUs that are not here, tiles of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from triton_launches import interpret, record

from pallas_kernels import devices, triton_aot, tuning
from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul import cases, grouped_matmul
from pallas_kernels.grouped_matmul import triton as backend
from pallas_kernels.matmul.cases import FORMATS
from pallas_kernels.triton_launch import tiles_of

SERVED = [name for name, case in cases.CASES.items() if case.dtype == "bfloat16"]
QUICK = ["dense-uneven", "int8/g128-uneven", "int4-896x200", "int4/g64-uneven", "w8a8-int8-uneven", "dense-all-empty"]
QUICK += ["int8-single-rows", "int4/g128-512x1000", "dense-many-rows", "w8a8-fp8-uneven"]
TARGETS = [devices.named(name) for name in ("a100", "h200", "b200", "mi300x")]


@pytest.mark.accelerators
@pytest.mark.parametrize("names", [QUICK, pytest.param(SERVED, marks=pytest.mark.slow)], ids=["quick", "every"])
def test_cases_in_the_interpreter(names: list[str]) -> None:
    failures = interpret("grouped_matmul", "triton", names)
    assert not failures, "\n".join(f"{name}: {error}" for name, error in failures.items())


@pytest.mark.accelerators
@pytest.mark.parametrize("rows", [16, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", ["dense", "int4/g128", "w8a8-int8"])
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles(device: Device, format: str, rows: int) -> None:
    weight = jax.ShapeDtypeStruct((8, 1024, 2048), jnp.bfloat16)
    weight = weight if format == "dense" else jax.eval_shape(FORMATS[format], weight)
    x, sizes = jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    (launch,) = record(device, lambda *arrays: grouped_matmul(*arrays, backend="triton"), x, weight, sizes)
    compiled = triton_aot.compile_launch(launch, device)
    assert compiled.shared_bytes <= device.fast_memory_bytes, compiled
    assert compiled.spilled_bytes <= 128, compiled


def test_a_step_over_several_scales_is_an_error() -> None:
    device = devices.named("h200")
    weight = jax.eval_shape(FORMATS["int8/g128"], jax.ShapeDtypeStruct((8, 256, 512), jnp.bfloat16))
    x, sizes = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    call = lambda *arrays: backend.run(*arrays, out_dtype=jnp.dtype("float32"), device=device)
    with (
        tuning.forced("grouped_matmul.triton", {"step": 256}),
        pytest.raises(ValueError, match=r"grouped_matmul\.triton block step=256 must divide 128: .* int8/g128 "),
    ):
        record(device, call, x, weight, sizes)


@given(lengths=st.lists(st.integers(0, 12), min_size=5, max_size=5), size=st.sampled_from([1, 4, 16]))
def test_tiles_cover_every_row_once(lengths: list[int], size: int) -> None:
    starts = np.cumsum([0, *lengths, 60 - sum(lengths)])
    covered = []
    for owner, first, stop in zip(*map(np.asarray, tiles_of(jnp.asarray(starts, jnp.int32), size, 60)), strict=True):
        assert stop - first <= size
        assert stop <= first or starts[owner] <= first < stop <= starts[owner + 1]
        covered += range(first, stop)
    assert sorted(covered) == list(range(60))
