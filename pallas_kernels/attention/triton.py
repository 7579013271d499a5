"""Paged attention for GPUs in Triton: NVIDIA from Ampere on, AMD from CDNA 3 on.

Hides tiles, splits and block sizes. Its pages are those of the `xla` backend. A decode call cuts each sequence's rows
into splits that run side by side (Flash-Decoding); a prefill call has one program per tile of query tokens. Both are
the one kernel `triton_kernels.attend`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import devices, triton_launch, tuning
from pallas_kernels.attention import KVSpec, Ragged, storage, strided, xla
from pallas_kernels.attention.xla import XlaKV
from pallas_kernels.devices import Device
from pallas_kernels.triton_launch import Launch, power_of_two

LARGEST_HEAD = 512  # values of a head; more would not fit the registers of a block
HOPPER = 90  # the capability whose dots read both operands from shared memory
FP8_CAPABILITY = 89  # the first NVIDIA GPUs that convert float8_e4m3fn
STEP_BYTES = 16 * 1024  # of K (and of V) that one step reads: enough of them in flight hide the memory's latency
AHEAD_BYTES = 64 * 1024  # of K and V that are under way, at most, while a step is computed
MOST_DECODE_ROWS = 64  # query rows of a decode tile: more of one sequence's tokens make further tiles
PREFILL_VALUES = {False: 128 * 128, True: 32 * 128}  # of a prefill tile's output; True: of float32 dots
LEAST_SPLIT_ROWS = 256  # K/V rows of a split: fewer cost more in merging than they gain
MOST_SPLITS = 64


class Rules(NamedTuple):
    """What one call asks for beside its arrays."""

    window: int | None
    first: jax.Array | None  # i32[tokens]: the first row each token sees, where no window says it
    span: int | None  # rows that a token sees at most; None: all
    softcap: float | None
    sinks: jax.Array | None  # f32[q_heads]
    scale: float


class Blocks(NamedTuple):
    """How a call is cut up."""

    rows: int  # of a tile: tokens x query heads of a KV head
    block: int  # K/V rows per step
    warps: int
    stages: int
    programs_per_core: int  # that splitting aims at


class Work(NamedTuple):
    """The tiles of one call over tokens `[first_token, first_token + num_tokens)`."""

    items: jax.Array  # i32[tiles, 5]: sequence, first token, token after the last, queries of the sequence, its kv_len
    first_token: int
    num_tokens: int


def refuse(*, spec: KVSpec, q_heads: int, device: Device) -> str | None:
    """None, or why these pages cannot be served."""
    dtype = jnp.dtype(spec.dtype).name
    if dtype not in storage.DTYPES:
        return f"K/V dtype {dtype} is not one of {', '.join(storage.DTYPES)}"
    if q_heads % spec.kv_heads:
        return f"{q_heads} query heads are not a multiple of {spec.kv_heads} KV heads"
    if spec.head_dim > LARGEST_HEAD:
        return f"head_dim {spec.head_dim} is above {LARGEST_HEAD}"
    if dtype == "float8_e4m3fn" and (triton_launch.capability(device) or FP8_CAPABILITY) < FP8_CAPABILITY:
        return f"{device} has no float8_e4m3fn (sm_{FP8_CAPABILITY} has); int8 takes as many bytes"
    if dtype == "int4" and spec.head_dim % 2:
        return f"head_dim {spec.head_dim} must be even for int4"
    return triton_launch.refuse(device)


def allocate(spec: KVSpec, num_pages: int) -> XlaKV:
    return xla.allocate(spec, num_pages, backend="triton")


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: XlaKV,
    ragged: Ragged,
    *,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, XlaKV]:
    if k is not None and v is not None:
        kv = xla.write(kv, k, v, ragged)
    page_size, stride = kv.spec.page_size, ragged.page_stride
    span = window if window is None or stride == 1 else -(-window // stride) + page_size
    ragged, window, first = strided.view(ragged, page_size, window)
    rules = Rules(window, first, span, softcap, sinks, scale)
    decode_tokens = ragged.num_decode_seqs * ragged.width
    device = devices.current()
    parts = []
    if decode_tokens:
        parts.append(_decode(q, kv, ragged, rules, device))
    if q.shape[0] > decode_tokens:
        parts.append(_prefill(q, kv, ragged, rules, device))
    if not parts:
        return q, jnp.zeros(q.shape[:2], jnp.float32), kv
    out, lse = (jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0] for arrays in zip(*parts, strict=True))
    return out, lse, kv


def _decode(q: jax.Array, kv: XlaKV, ragged: Ragged, rules: Rules, device: Device) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of the decode sequences' tokens."""
    seqs, width, spec = ragged.num_decode_seqs, ragged.width, kv.spec
    group = q.shape[1] // spec.kv_heads
    blocks = _blocks("decode", width * group, q, spec, rules, device)
    size = max(1, min(width, blocks.rows // group))
    sequence, index = jnp.divmod(jnp.arange(seqs * -(-width // size), dtype=jnp.int32), -(-width // size))
    first = sequence * width + index * size
    stop = jnp.minimum(first + size, (sequence + 1) * width)
    queries = jnp.full_like(first, width)
    items = jnp.stack([sequence, first, stop, queries, ragged.kv_len[sequence]], axis=1)
    work = Work(items, 0, seqs * width)
    rows = ragged.page_table.shape[1] * spec.page_size
    if rules.span is not None and ragged.kv_position is None:  # else where a window begins is found row by row
        rows = min(rows, rules.span + blocks.block)
    splits = _splits(items.shape[0] * spec.kv_heads, rows, blocks, device)
    if splits == 1:
        out, lse = triton_launch.run(_attend(q, kv, ragged, rules, work, blocks, 1), device)
        return out, lse
    launch = _attend(q, kv, ragged, rules._replace(sinks=None), work, blocks, splits)
    parts, part_lse = triton_launch.run(launch, device)
    out, lse = triton_launch.run(_merge(parts, part_lse, rules.sinks, q.dtype), device)
    return out, lse


def _prefill(q: jax.Array, kv: XlaKV, ragged: Ragged, rules: Rules, device: Device) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of the tokens behind those of the decode sequences, padding included."""
    spec = kv.spec
    group = q.shape[1] // spec.kv_heads
    first_token = ragged.num_decode_seqs * ragged.width
    num_tokens = q.shape[0] - first_token
    blocks = _blocks("prefill", num_tokens * group, q, spec, rules, device)
    size = max(1, blocks.rows // group)
    work = Work(_prefill_items(ragged, size, q.shape[0]), first_token, num_tokens)
    out, lse = triton_launch.run(_attend(q, kv, ragged, rules, work, blocks, 1), device)
    return out, lse


def _prefill_items(ragged: Ragged, size: int, num_tokens: int) -> jax.Array:
    """i32[tiles, 5]: tiles of up to `size` tokens of one sequence each; those left over are empty.

    Padding is one more sequence, without rows: its output is zero.
    """
    decode = ragged.num_decode_seqs
    starts = jnp.append(ragged.q_start[decode:], num_tokens).astype(jnp.int32)
    tiles = triton_launch.tiles_of(starts, size, num_tokens - decode * ragged.width)
    queries, kv_len = jnp.diff(starts)[tiles.owner], jnp.append(ragged.kv_len[decode:], 0)[tiles.owner]
    return jnp.stack([decode + tiles.owner, tiles.first, tiles.stop, queries, kv_len], axis=1)


def _attend(q: jax.Array, kv: XlaKV, ragged: Ragged, rules: Rules, work: Work, blocks: Blocks, splits: int) -> Launch:
    """Outputs `[tokens, q_heads, head_dim]` and `[tokens, q_heads]`; f32 with a leading axis where there are splits."""
    from triton import language as tl

    from pallas_kernels.attention import triton_kernels

    spec, (_, q_heads, head_dim) = kv.spec, q.shape
    packed = kv.keys.dtype == jnp.uint8
    shape = (work.num_tokens, q_heads) if splits == 1 else (splits, work.num_tokens, q_heads)
    absent = ragged.page_table  # stands for an array that the kernel's constants say is not there
    optional = (rules.first, ragged.kv_position, ragged.ancestors, rules.sinks, kv.key_scales, kv.value_scales)
    first, kv_position, ancestors, sinks, key_scales, value_scales = (absent if x is None else x for x in optional)
    compute = _compute_dtype(q, spec)
    return Launch(
        kernel=triton_kernels.attend,
        grid=(work.items.shape[0], spec.kv_heads, splits),
        arguments=(
            *(q, kv.keys, kv.values, key_scales, value_scales, work.items, ragged.page_table, ragged.q_position),
            *(first, kv_position, ancestors, sinks),
            *(ragged.page_table.shape[1], kv_position.shape[1], work.first_token, work.num_tokens),
        ),
        outputs=(
            jax.ShapeDtypeStruct((*shape, head_dim), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        constants={
            "Q_HEADS": q_heads,
            "KV_HEADS": spec.kv_heads,
            "HEAD_DIM": head_dim,
            "PAGE_SIZE": spec.page_size,
            "PACKED": packed,
            "QUANTIZED": spec.quantized,
            "COMPUTE": getattr(tl, compute),
            "HAS_FIRST": rules.first is not None,
            "HAS_POSITIONS": ragged.kv_position is not None,
            "WORDS": 0 if ragged.ancestors is None else ragged.ancestors.shape[1],
            "HAS_SINKS": rules.sinks is not None,
            "WINDOW": rules.window or 0,
            "SOFTCAP": float(rules.softcap or 0.0),
            "SCALE": float(rules.scale),
            "ROWS": blocks.rows,
            "BLOCK": blocks.block,
            "LANES": _lanes(spec),
            "SPLITS": splits,
            "LEAST_BLOCKS": max(1, LEAST_SPLIT_ROWS // blocks.block),
        },
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _merge(parts: jax.Array, part_lse: jax.Array, sinks: jax.Array | None, dtype: Any) -> Launch:
    """`parts f32[splits, tokens, q_heads, head_dim]` and their `lse` -> one output in `dtype` and its `lse`."""
    from pallas_kernels.attention import triton_kernels

    splits, num_tokens, q_heads, head_dim = parts.shape
    return Launch(
        kernel=triton_kernels.merge,
        grid=(num_tokens, q_heads),
        arguments=(parts, part_lse, part_lse if sinks is None else sinks, num_tokens, q_heads),
        outputs=(
            jax.ShapeDtypeStruct((num_tokens, q_heads, head_dim), dtype),
            jax.ShapeDtypeStruct((num_tokens, q_heads), jnp.float32),
        ),
        constants={
            "HEAD_DIM": head_dim,
            "LANES": power_of_two(head_dim),
            "HAS_SINKS": sinks is not None,
            "SPLITS": splits,
            "PADDED_SPLITS": power_of_two(splits),
        },
        num_warps=max(1, min(4, power_of_two(splits) * power_of_two(head_dim) // 1024)),
        num_stages=1,
    )


def _compute_dtype(q: jax.Array, spec: KVSpec) -> str:
    """What is multiplied: q's type holds every quantized value exactly; plain pages may be wider."""
    return jnp.dtype(q.dtype if spec.quantized else jnp.promote_types(q.dtype, spec.dtype)).name


def _lanes(spec: KVSpec) -> int:
    """Values of a row that a kernel reads together, padded to a power of two that its dots take."""
    halves = 2 if jnp.dtype(spec.dtype).name == "int4" else 1
    return max(16, power_of_two(spec.head_dim // halves))


def _blocks(phase: str, rows: int, q: jax.Array, spec: KVSpec, rules: Rules, device: Device) -> Blocks:
    """Measured block sizes, else ones whose K/V steps fit `device` in as many stages as hide its memory's latency.

    `rows`: query rows of the longest stretch of tokens that one tile could take.
    """
    decode, cuda = phase == "decode", device.platform == "cuda"
    head, wide = power_of_two(spec.head_dim), jnp.dtype(_compute_dtype(q, spec)).itemsize == 4
    # widened rows and a prefill tile's sums are too much for registers; Hopper's dots read shared memory
    crowded = not decode and spec.quantized and triton_launch.capability(device) != HOPPER
    most = MOST_DECODE_ROWS if decode else PREFILL_VALUES[wide] // max(128, head) // (2 if crowded else 1)
    rows = max(16, power_of_two(max(q.shape[1] // spec.kv_heads, min(rows, most))))
    block = max(16, min(64 if cuda and not crowded else 32, STEP_BYTES // (head * (8 if wide else 2))))
    step_bytes = 2 * block * _lanes(spec) * jnp.dtype(spec.dtype).itemsize
    room = device.fast_memory_bytes // (2 if decode else 1) - rows * head * q.dtype.itemsize
    ahead = max(1, min(3 if decode else 2, min(room, AHEAD_BYTES) // step_bytes))
    many = rows * head > 64 * 128 or (wide and head >= 128) or (spec.quantized and not decode)
    default = Blocks(
        rows=rows,
        block=block,
        warps=8 if many else 4,
        # a step's rows are fetched where page numbers fetched before say: each step ahead takes two stages
        stages=2 * ahead + 1 if cuda else 2,
        programs_per_core=4,
    )
    measured = tuning.block_sizes(
        "attention.triton",
        device,
        default._asdict(),
        phase=phase,
        dtype=q.dtype.name,
        kv_dtype=jnp.dtype(spec.dtype).name,
        q_heads=q.shape[1],
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        window=rules.span,
    )
    return _checked(Blocks(**measured), q.shape[1] // spec.kv_heads)


def _checked(blocks: Blocks, group: int) -> Blocks:
    """Raises ValueError where a tile does not hold the `group` query heads of a KV head: it would leave out some."""
    if blocks.rows < group:
        raise ValueError(
            f"attention.triton block rows={blocks.rows} must be at least {group}, the query heads of a KV head"
        )
    return blocks


def _splits(programs: int, rows: int, blocks: Blocks, device: Device) -> int:
    """How many programs share one tile's K/V rows, of which there are at most `rows`."""
    wanted = math.ceil(blocks.programs_per_core * device.num_cores / programs)
    return max(1, min(wanted, rows // LEAST_SPLIT_ROWS, MOST_SPLITS))


write = xla.write
read_pages = xla.read_pages
write_pages = xla.write_pages
copy_pages = xla.copy_pages
move_rows = xla.move_rows
