"""Products with quantized weights on GPUs, in Triton: weight-only int8, int4 and fp8, and W8A8.

Hides tiles and split-K. With few rows the weight's bytes are all that takes time: enough programs are started to keep
the memory busy, several per output where there are few outputs, and XLA adds their sums. Dense products are cuBLAS's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tensors, triton_launch, tuning
from pallas_kernels.devices import Device
from pallas_kernels.tensors import QuantizedTensor
from pallas_kernels.triton_launch import Launch, Tiles, power_of_two

DTYPES = ("bfloat16", "float16")
OUT_DTYPES = ("float32", "bfloat16", "float16")
MOST_ROWS = 1024
FEW_ROWS = 16  # one tile of dots: reading the weight is all that takes time
LEAST_STEP = 16  # stored values that a dot takes at least
LEAST_SPLIT_STEPS, MOST_SPLITS = 2, 16
FP8_CAPABILITY = 89  # the first NVIDIA GPUs that convert and multiply float8_e4m3fn


class Blocks(NamedTuple):
    """How a product is cut up."""

    rows: int
    outs: int
    step: int  # stored values of a row of weight per step
    warps: int
    stages: int
    splits: int


def refuse(
    *, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, format: str, device: Device
) -> str | None:
    """None, or why this case is not served."""
    if format == "dense" or format.startswith("2:4"):
        return f"{format} weights are not for it: XLA's own dots serve them"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}: arithmetic is the limit there, widen the weight and use xla"
    return refuse_kind(in_size, dtype, out_dtype, format, device)


def refuse_kind(in_size: int, dtype: str, out_dtype: str, format: str, device: Device) -> str | None:
    """None, or why no number of rows and outputs is served."""
    kind, *details = format.split("/")
    group = next((int(detail[1:]) for detail in details if detail.startswith("g")), in_size)
    if dtype not in DTYPES:
        return f"x {dtype} is not one of {', '.join(DTYPES)} (in float32, XLA's dot promises a row's bits)"
    if out_dtype not in OUT_DTYPES:
        return f"out_dtype {out_dtype} is not one of {', '.join(OUT_DTYPES)}"
    capability = triton_launch.capability(device)
    lacks_fp8 = kind == "w8a8-fp8" if capability is None else capability < FP8_CAPABILITY  # AMD's widens in software
    if kind.endswith("fp8") and lacks_fp8:
        return f"{device} has no float8_e4m3fn dots (sm_{FP8_CAPABILITY} has): use int8 or xla"
    if _step(in_size, group, kind == "int4") < LEAST_STEP:
        return f"{in_size} inputs in groups of {group} leave fewer than {LEAST_STEP} {kind} values that lie together"
    return triton_launch.refuse(device)


def run(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`x [rows, in]` (W8A8: quantized, `row_scales f32[rows]`), `weight [out, in]` -> `[rows, out]`."""
    rows = x.shape[0]
    blocks = blocks_of("matmul.triton", rows, -(-rows // FEW_ROWS), x.shape[1], weight, device)
    return multiply(x, weight, row_scales, None, blocks, out_dtype, device)


def multiply(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    row_scales: jax.Array | None,
    tiles: Tiles | None,
    blocks: Blocks,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`x [rows, in]` times `weight [out, in]`; or, with `tiles`, times that of their owners in `weight [n, out, in]`.

    A tile of owner n, who has no weight, gives zeros.
    """
    (parts,) = triton_launch.run(_launch(x, weight, row_scales, tiles, blocks, out_dtype, device), device)
    return parts[0] if blocks.splits == 1 else jnp.sum(parts, axis=0).astype(out_dtype)


def _launch(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    row_scales: jax.Array | None,
    tiles: Tiles | None,
    blocks: Blocks,
    out_dtype: jnp.dtype,
    device: Device,
) -> Launch:
    """Output `[splits, rows, out]`, in f32 where there are several splits."""
    from pallas_kernels.matmul import triton_kernels

    tensor = weight if isinstance(weight, QuantizedTensor) else QuantizedTensor(weight)
    *owners, out_size, in_size = tensor.shape
    row_tiles = -(-x.shape[0] // blocks.rows) if tiles is None else tiles.owner.shape[0]
    table = jnp.stack([*tiles], axis=1) if tiles is not None else None
    # an array that a constant says is not there: x stands for it
    scales, row_scale_array, table = (x if array is None else array for array in (tensor.scales, row_scales, table))
    part_dtype = out_dtype if blocks.splits == 1 else jnp.float32
    return Launch(
        kernel=triton_kernels.multiply,
        grid=(-(-out_size // blocks.outs), row_tiles, blocks.splits),
        arguments=(x, tensor.values, scales, row_scale_array, table, x.shape[0]),
        outputs=(jax.ShapeDtypeStruct((blocks.splits, x.shape[0], out_size), part_dtype),),
        constants={
            "IN_SIZE": in_size,
            "OUT_SIZE": out_size,
            "OWNERS": owners[0] if owners else 0,
            "GROUP": tensor.group_size,
            "HALF": 0 if tensor.pack_block is None else tensor.pack_block // 2,
            "PTX": device.platform == "cuda",
            "HAS_SCALES": tensor.scales is not None,
            "HAS_ROW_SCALES": row_scales is not None,
            "INTEGER": x.dtype == jnp.int8,
            "ROWS": blocks.rows,
            "OUTS": blocks.outs,
            "STEP": blocks.step,
            "STEPS": math.ceil(_steps(tensor, blocks) / blocks.splits),
        },
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _steps(tensor: QuantizedTensor, blocks: Blocks) -> int:
    """Of a whole row of weight."""
    return -(-tensor.values.shape[-1] // blocks.step)


def _step(in_size: int, group: int, packed: bool) -> int:
    """Stored values per step: within one group of inputs and, packed, within one half of a block."""
    if packed:
        half = math.gcd(in_size, tensors.LARGEST_PACK_BLOCK) // 2
        return math.gcd(half, group) if group < in_size else half
    return math.gcd(128, group) if group < in_size else 128


def blocks_of(
    kernel: str,
    rows: int,
    row_tiles: int,
    in_size: int,
    weight: jax.Array | QuantizedTensor,
    device: Device,
    **key: int,
) -> Blocks:
    """Measured block sizes, else ones that keep `device`'s memory busy.

    `rows` meet one weight, in about `row_tiles` tiles (over all weights); `key` is what KEYS[kernel] names beside the
    sizes.
    """
    tensor = weight if isinstance(weight, QuantizedTensor) else QuantizedTensor(weight)
    out_size, cuda = tensor.shape[-2], device.platform == "cuda"
    packed, few = tensor.pack_block is not None, rows <= FEW_ROWS
    step = _step(in_size, tensor.group_size, packed)
    default = Blocks(
        rows=FEW_ROWS if few else min(64 if packed else 128, power_of_two(rows)),
        # every tile of outputs reads x again: as long as its rows are few, more programs are worth more
        outs=64 if few and (rows <= 4 or (packed and not cuda)) else 128,
        step=min(step, 128 // tensor.values.dtype.itemsize if few else 64),
        warps=4 if few else 8,
        stages=(4 if few else 3) if cuda else 2,
        splits=1,
    )
    programs = -(-out_size // default.outs) * (row_tiles if few else -(-row_tiles * FEW_ROWS // default.rows))
    fit = 1 if default.warps > 4 else 4 if default.outs == 64 else 3  # programs in a core, by their registers
    resident = device.num_cores * fit
    splits = min(resident // programs, _steps(tensor, default) // LEAST_SPLIT_STEPS, MOST_SPLITS)
    measured = tuning.block_sizes(
        kernel,
        device,
        default._replace(splits=max(1, splits))._asdict(),
        format=weight.format if isinstance(weight, QuantizedTensor) else "dense",
        rows=tuning.row_bucket(rows),
        in_size=in_size,
        out_size=out_size,
        **key,
    )
    return _checked(kernel, Blocks(**measured), tensor)


def _checked(kernel: str, blocks: Blocks, tensor: QuantizedTensor) -> Blocks:
    """Raises ValueError where a step would cross into other inputs' scales, or out of half a block of nibbles."""
    group = tensor.group_size if tensor.num_groups > 1 else 0
    limit = math.gcd(group, (tensor.pack_block or 0) // 2)  # 0: none, which every step divides
    if limit % blocks.step:
        raise ValueError(
            f"{kernel} block step={blocks.step} must divide {limit}: the values of {tensor.format} that lie together "
            f"and share a scale"
        )
    return blocks
