"""TPU matmul kernels without a TPU: interpreted against the exact product with race detection, and compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from _pytest.mark import ParameterSet
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices, grouped_matmul
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import BackendError
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.matmul import cases, matmul, mosaic_tpu
from pallas_kernels.matmul.cases import FORMATS, Case
from pallas_kernels.matmul.mosaic_tpu import Piece, Tiling
from sharding import topology

V5E, V6E, TPU7X = (devices.named(name) for name in ("v5e", "v6e", "tpu7x"))
TPUS = [device for device in devices.DEVICES.values() if device.platform == "tpu"]
SERVED = {  # the table, less what is refused: dense weights, and 2:4 sparse ones of 896 inputs
    name: case
    for name, case in cases.CASES.items()
    if case.format != "dense" and not (case.format.startswith("2:4") and case.in_size % 1024)
}
QUICK = (  # every way of storing, scaling and cutting; the whole table is slow
    "int8-896x1000",
    "int4/g32-rows-5",
    "int4/g64-896x1000",
    "int4/g64/zp-rows-1",
    "int4/g128-to-bf16",
    "fp8-f32",
    "w8a8-int8-rows-130",
    "w8a8-fp8-rows-2",
    "2:4-int8-rows-5",
)
QUICK_GROUPED = ("dense-many-rows", "int8-all-empty", "int4/g64-uneven", "w8a8-int8-896x200")


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside are interpreted; memory that nobody wrote holds NaN. Fails where two accesses race."""
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def quick_first(table: Mapping[str, object], quick: tuple[str, ...]) -> list[ParameterSet]:
    """A test's parameters: the names of a table, those that are not quick only in the slow suite."""
    assert set(quick) <= set(table)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", quick_first(SERVED, QUICK))
def test_agrees_with_the_exact_product(name: str) -> None:
    with interpreted():
        cases.check("mosaic_tpu", SERVED[name], device=V5E)


@pytest.mark.parametrize("name", ["w8a8-int8-rows-5", "w8a8-fp8-rows-5"])
def test_a_matrix_unit_without_integers_or_with_fp8(name: str) -> None:
    with interpreted():
        cases.check("mosaic_tpu", SERVED[name], device=TPU7X)


@pytest.mark.parametrize("name", quick_first(grouped_cases.CASES, QUICK_GROUPED))
def test_grouped_agrees_with_the_exact_product(name: str) -> None:
    with interpreted():
        grouped_cases.check("mosaic_tpu", grouped_cases.CASES[name], device=V5E)


@pytest.mark.parametrize("name", ["int8", "int4/g128", "w8a8-int8"])
def test_sums_over_several_tiles_of_inputs_and_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_tpu, "MOST_INPUTS", 256)
    monkeypatch.setattr(mosaic_tpu, "MOST_ROWS", 32)
    monkeypatch.setattr(mosaic_tpu, "OUTS", (128, 128))
    assert mosaic_tpu.tile_inputs(name, 768) == 256
    with interpreted():
        cases.check("mosaic_tpu", Case(name, 70, 768, 300), device=V5E)


@pytest.mark.parametrize(
    ("name", "rows", "in_size"),
    [("int8", 3, 2560), ("int8", 37, 4096), ("int4", 5, 4096), ("w8a8-int8", 5, 3072), ("int8", 1, 2048)],
)
def test_loops_over_a_tile_and_what_is_left_of_it(name: str, rows: int, in_size: int) -> None:
    """2,560 inputs are two turns of 1,024 and a piece of 512; rows are as many as there are, where x is wide."""
    with interpreted():
        cases.check("mosaic_tpu", Case(name, rows, in_size, 300), device=V5E)


def test_rows_are_padded_where_they_are_bytes_or_several_tiles() -> None:
    _, weight = cases.build(Case("int8", 1, 4096, 256))
    rows = lambda count, dtype: mosaic_tpu.default_blocks(weight, jnp.zeros((count, 4096), dtype), V6E)["rows"]
    assert rows(37, jnp.bfloat16) == 37
    assert rows(37, jnp.int8) == 64
    assert rows(700, jnp.bfloat16) == 352  # two tiles


@pytest.mark.parametrize(
    ("format", "group_size"), [("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128), ("int4", 512)]
)
def test_pieces_cover_every_input_once_in_its_group(format: str, group_size: int) -> None:
    tiling = Tiling(format, 32, 128, 1024, group_size, 256, False)
    seen = []
    for group, pieces in enumerate(tiling.pieces()):
        for piece in pieces:
            assert piece.start % 128 == 0 and piece.start <= piece.first < piece.last <= piece.stop
            for position in range(piece.first, piece.last):
                block, offset = divmod(position, 128) if format == "int4" else (0, position)
                natural = block * 256 + piece.plane * 128 + offset if format == "int4" else position
                assert natural // group_size == group
                seen.append(natural)
    assert sorted(seen) == list(range(1024))


def test_pieces_without_groups_are_as_wide_as_is_widened_at_a_time() -> None:
    assert Tiling("int8", 32, 128, 896, None, 0, False).pieces() == [
        [Piece(0, 0, 512, 0, 512), Piece(0, 512, 896, 512, 896)]
    ]


@pytest.mark.parametrize(
    ("format", "in_size", "inputs"),
    [
        ("int8", 4096, 4096),
        ("int8", 14336, 3584),
        ("int8", 11008, 11008),  # 43 * 256: its divisors are too few
        ("int4/g128", 14336, 3584),
        ("2:4", 14336, 2048),
        ("int8", 896, 896),
        ("int8", 28672, 4096),
    ],
)
def test_tiles_divide_the_inputs(format: str, in_size: int, inputs: int) -> None:
    assert mosaic_tpu.tile_inputs(format, in_size) == inputs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "dense"}, "dense weights are for XLA's own dot"),
        ({"dtype": "float16"}, "x float16 is not one of bfloat16, float32"),
        ({"out_dtype": "float16"}, "out_dtype float16 is not one of bfloat16, float32"),
        ({"format": "2:4", "in_size": 896}, "2:4 sparse weights need a multiple of 1024 inputs, got 896"),
        ({"format": "int4/g96", "in_size": 768}, "groups of 96 lie across the halves of 256 inputs packed together"),
        ({"format": "int8/g4"}, "groups of 4 inputs are not a multiple of 8"),
        ({"in_size": 16411}, "16411 inputs have no divisor that makes a tile, and are more than 16384"),
    ],
)
def test_refusals_say_why(change: dict[str, object], reason: str) -> None:
    case = {"rows": 4, "in_size": 1024, "out_size": 64, "dtype": "bfloat16", "out_dtype": "bfloat16", "format": "int8"}
    assert mosaic_tpu.refuse(**case, device=V6E) is None
    assert mosaic_tpu.refuse(**{**case, **change}, device=V6E) == reason


def test_a_forced_refusal_says_what_would_work() -> None:
    x, weight = cases.build(Case("2:4", 3, 896, 64))
    with pytest.raises(BackendError, match=r"multiple of 1024 inputs, got 896 \(what would work: auto, xla"):
        matmul(x, weight, backend="mosaic_tpu", device=V6E)


def abstract(format: str, *shape: int) -> Any:
    """A weight's arrays, without their contents."""
    weight = lambda: jnp.zeros(shape, jnp.bfloat16)
    return jax.eval_shape(weight if format == "dense" else lambda: FORMATS[format](weight()))


@pytest.mark.accelerators
@pytest.mark.parametrize("format", ["int8", "int4/g128", "fp8", "w8a8-int8", "w8a8-fp8", "2:4-int8"])
@pytest.mark.parametrize("device", TPUS, ids=str)
def test_compiles(device: Device, format: str) -> None:
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    weight = abstract(format, 2048, 4096)
    compiled = topology.compile_for(device, partial(matmul, backend="mosaic_tpu"), x, weight)
    assert max(compiled.fast_memory_bytes) <= mosaic_tpu.VMEM_LIMIT
    assert not compiled.copies_of(weight.values.shape)
    assert compiled.temporary_bytes < weight.num_bytes / 2, "the weight is copied, or widened outside the kernel"


@pytest.mark.accelerators
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, jnp.bfloat16), (3, jnp.bfloat16), (2, jnp.float32), (37, jnp.bfloat16), (300, jnp.bfloat16)]
)
@pytest.mark.parametrize("format", ["int8", "int4/g128", "w8a8-int8", "w8a8-fp8", "2:4-int8"])
@pytest.mark.parametrize("device", [V5E, TPU7X], ids=str)
def test_compiles_for_any_number_of_rows(device: Device, format: str, rows: int, dtype: Any) -> None:
    x, weight = jax.ShapeDtypeStruct((rows, 4096), dtype), abstract(format, 2048, 4096)
    compiled = topology.compile_for(device, partial(matmul, backend="mosaic_tpu"), x, weight)
    assert max(compiled.fast_memory_bytes) <= mosaic_tpu.VMEM_LIMIT
    if format == "int8":
        assert not re.search(r" pad\(", compiled.text), "rows are padded beside the kernel"


@pytest.mark.accelerators
@pytest.mark.parametrize("format", ["dense", "int8", "int4/g128", "w8a8-int8"])
@pytest.mark.parametrize("device", [V5E, TPU7X], ids=str)
def test_grouped_compiles(device: Device, format: str) -> None:
    shapes = (jax.ShapeDtypeStruct((128, 2048), jnp.bfloat16), abstract(format, 8, 768, 2048))
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    run = partial(grouped_matmul.grouped_matmul, backend="mosaic_tpu")
    compiled = topology.compile_for(device, run, *shapes, sizes)
    assert compiled.temporary_bytes < 1 << 20
