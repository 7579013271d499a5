"""Products with quantized weights in Triton: numbers in its interpreter, machine code for GPUs that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_launches import interpret, record

from pallas_kernels import devices, triton_aot, tuning
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import BackendError
from pallas_kernels.matmul import cases, matmul
from pallas_kernels.matmul import triton as backend
from pallas_kernels.triton_launch import Launch
from sharding import topology

SERVED = {
    name: case
    for name, case in cases.CASES.items()
    if case.dtype == "bfloat16" and case.format != "dense" and not case.format.startswith("2:4")
}
QUICK = [name for name in SERVED if name.endswith(("-rows-5", "-896x1000"))]
QUICK += ["int4-rows-1", "int4/g32-rows-16", "int8/g128-rows-130", "int4/g64/zp-1024x200", "w8a8-int8-to-bf16"]
SLOW = {f"every-{i}": list(SERVED)[i::3] for i in range(3)}
TARGETS = [devices.named(name) for name in ("a100", "h200", "b200", "mi300x")]
SHAPES = {"few": (16, 4096, 1024), "one": (1, 4096, 1024), "many": (256, 4096, 1024)}  # rows, in, out


@pytest.mark.accelerators
@pytest.mark.parametrize(
    "names",
    [QUICK, *(pytest.param(names, marks=pytest.mark.slow) for names in SLOW.values())],
    ids=["quick", *SLOW],
)
def test_cases_in_the_interpreter(names: list[str]) -> None:
    failures = interpret("matmul", "triton", names)
    assert not failures, "\n".join(f"{name}: {error}" for name, error in failures.items())


def launch_of(device: Device, format: str, rows: int, in_size: int, out_size: int) -> Launch:
    shape = jax.ShapeDtypeStruct((out_size, in_size), jnp.bfloat16)
    weight = jax.eval_shape(cases.FORMATS[format], shape)
    x = jax.ShapeDtypeStruct((rows, in_size), jnp.bfloat16)
    (launch,) = record(device, lambda x, weight: matmul(x, weight, backend="triton"), x, weight)
    return launch


@pytest.mark.accelerators
@pytest.mark.parametrize("shape", [SHAPES["few"], *(pytest.param(SHAPES[x], marks=pytest.mark.slow) for x in SHAPES)])
@pytest.mark.parametrize("format", ["int8", "int4/g128", "int4/g32", "fp8", "w8a8-int8", "w8a8-fp8"])
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles(device: Device, format: str, shape: tuple[int, int, int]) -> None:
    if (device.name, format) in (("a100", "fp8"), ("a100", "w8a8-fp8"), ("mi300x", "w8a8-fp8")):
        with pytest.raises(BackendError, match=f"{device} has no float8_e4m3fn dots"):
            launch_of(device, format, *shape)
        return
    compiled = triton_aot.compile_launch(launch_of(device, format, *shape), device)
    assert compiled.shared_bytes <= device.fast_memory_bytes, compiled
    assert compiled.spilled_bytes <= 128, compiled


@pytest.mark.accelerators
def test_lowers_through_jax_triton() -> None:
    device = devices.named("h200")
    weight = jax.eval_shape(cases.FORMATS["int4/g64"], jax.ShapeDtypeStruct((256, 512), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    with topology.targeting(device):
        traced = jax.jit(lambda x, weight: matmul(x, weight, backend="triton")).trace(x, weight)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("triton_kernel_call") == 1


@pytest.mark.accelerators
@pytest.mark.parametrize(("in_size", "out_size"), [(4096, 14336), (14336, 4096), (4096, 4096)])
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_fill_the_device_in_one_wave(rows: int, in_size: int, out_size: int) -> None:
    """About two programs per core, and no more than fit by registers, at any shape of a large layer."""
    device = devices.named("h200")
    launch = launch_of(device, "int4/g128", rows, in_size, out_size)
    resident = 4 if launch.constants["OUTS"] == 64 else 3
    assert 1.9 <= np.prod(launch.grid) / device.num_cores <= resident
    assert launch.constants["STEPS"] * launch.constants["STEP"] * launch.grid[2] >= in_size // 2  # no input is left out


@pytest.mark.parametrize(
    ("format", "step", "limit"),
    [("int8/g128", 256, 128), ("int8/g128", 96, 128), ("int4/g64", 128, 64), ("int4", 256, 128)],
)
def test_a_step_over_several_scales_is_an_error(format: str, step: int, limit: int) -> None:
    weight = jax.eval_shape(cases.FORMATS[format], jax.ShapeDtypeStruct((256, 512), jnp.bfloat16))
    with (
        tuning.forced("matmul.triton", {"step": step}),
        pytest.raises(ValueError, match=f"matmul.triton block step={step} must divide {limit}: .* {format} "),
    ):
        backend.blocks_of("matmul.triton", 4, 1, 512, weight, devices.named("h200"))


def test_a_step_over_one_scale_may_be_longer() -> None:
    weight = jax.eval_shape(cases.FORMATS["int8"], jax.ShapeDtypeStruct((256, 512), jnp.bfloat16))
    with tuning.forced("matmul.triton", {"step": 256}):
        assert backend.blocks_of("matmul.triton", 4, 1, 512, weight, devices.named("h200")).step == 256


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"format": "dense"}, "dense weights are not for it"),
        ({"format": "2:4-int8"}, "2:4-int8 weights are not for it"),
        ({"dtype": "float32"}, "x float32 is not one of bfloat16, float16"),
        ({"out_dtype": "int32"}, "out_dtype int32 is not one of"),
        ({"rows": 4096}, "4096 rows are more than 1024"),
        ({"format": "fp8", "device": devices.named("a100")}, "a100 has no float8_e4m3fn dots"),
        ({"format": "int4", "in_size": 4104}, "4104 inputs in groups of 4104 leave fewer than 16 int4 values"),
        ({"device": devices.named("cpu")}, "it is for GPUs, the device is cpu"),
    ],
)
def test_refuses_by_name(case: dict, words: str) -> None:
    usual = {"rows": 4, "in_size": 4096, "out_size": 512, "dtype": "bfloat16", "out_dtype": "float32", "format": "int8"}
    assert words in (backend.refuse(**{**usual, "device": devices.named("h200"), **case}) or "")
