"""The TPU kernel without a TPU: interpreted against the oracle, races looked for, its copies counted, and compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention, devices, tensors, tuning
from pallas_kernels.attention import KVSpec, PageRows, Ragged, UnsupportedError
from pallas_kernels.attention.cases import CASES, TOLERANCE, Case, Inputs, build, check, run
from pallas_kernels.attention.flash import flash_attention
from pallas_kernels.devices import MIB
from pallas_kernels.dispatch import BackendError
from sharding import topology

V6E = devices.named("v6e")
QUICK = (  # one of each kind; the whole table is slow
    "decode",
    "decode-gaps-window",
    "decode-tree",
    "decode-fp8-head-128-bf16",
    "decode-int4-window-sinks",
    "decode-page-256",
    "prefill-chunk",
    "prefill-shared",
    "mixed-int8",
    "middle-prefill",
    "spread-decode-width-3-window",
    "spread-apart-mixed",
)
KV_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn", "int4")
HEAD_DIMS = (64, 80, 96, 128, 256, 512)


@contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Kernels traced inside are interpreted; memory that nobody wrote holds NaN. Fails where two accesses race."""
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races)):
            yield
        assert not (detect_races and interpreter.races.races_found)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def adapted(case: Case) -> Case:
    """The case on pages whose tokens fill lanes."""
    return case.on_pages_of(128) if case.page_size % 128 else case


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_case(name: str) -> None:
    with interpreted():
        check("mosaic_tpu", adapted(CASES[name]), device=V6E)


@pytest.mark.parametrize(
    "name", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixed-int4-tree", "decode-sinks"))]
)
def test_two_cores_share_the_kv_heads(name: str) -> None:
    with interpreted(), topology.targeting(devices.named("v5p")):
        check("mosaic_tpu", adapted(CASES[name]))


@pytest.mark.slow
def test_decode_with_tokens_of_nobody() -> None:
    with interpreted():
        check("mosaic_tpu", Case(decode=(40, 0), padding=3, page_size=128), device=V6E)


@pytest.mark.parametrize("name", ["prefill-chunk-bf16", "prefill-tree"])
@pytest.mark.slow
def test_small_and_large_blocks_agree(name: str) -> None:
    case = adapted(CASES[name])
    for sizes in ({"tokens": 32, "pages_per_step": 1}, {"tokens": 256, "pages_per_step": 3}):
        with interpreted(), tuning.forced("attention.mosaic_tpu", sizes):
            check("mosaic_tpu", case, device=V6E)


def _any_mix(decode, prefill, heads, kv_dtype, window, width, padding, seed) -> None:
    case = Case(
        decode=tuple(max(rows, width) if rows else 0 for rows in decode),
        prefill=tuple(prefill),
        width=width,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=32,
        page_size=128,
        window=window,
        padding=padding,
        kv_dtype=kv_dtype,
    )
    if decode or prefill:
        with interpreted():
            check("mosaic_tpu", case, seed=seed, device=V6E)


MIXES = {
    "decode": st.lists(st.integers(0, 300), max_size=3),
    "prefill": st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), max_size=3),
    "heads": st.sampled_from([(2, 2), (4, 2), (5, 1)]),
    "kv_dtype": st.sampled_from([None, "int8", "float8_e4m3fn", "int4"]),
    "window": st.sampled_from([None, 1, 40, 200]),
    "width": st.sampled_from([1, 3]),
    "padding": st.integers(0, 3),
    "seed": st.integers(0, 1000),
}
test_some_mix = settings(max_examples=2)(given(**MIXES)(_any_mix))
test_any_mix = pytest.mark.slow(settings(max_examples=25)(given(**MIXES)(_any_mix)))


def on_both(case: Case, inputs: Inputs) -> tuple[Any, Any]:
    """What the kernel and the reference make of these inputs."""
    with interpreted():
        outcome = run("mosaic_tpu", case, inputs, device=V6E)
    return outcome, run("reference", case, inputs)


def test_nan_stays_in_its_sequence() -> None:
    case = Case(prefill=((0, 20), (0, 20)), page_size=128)  # in one query block
    inputs = build(case)
    assert inputs.v is not None
    outcome, expected = on_both(case, replace(inputs, v=inputs.v.at[3].set(jnp.nan)))
    assert np.isnan(expected.out[3:20]).all()
    assert np.isnan(outcome.out[3:20]).all()
    np.testing.assert_allclose(outcome.out[20:], expected.out[20:], atol=TOLERANCE["float32"])


def test_nan_queries_give_nan() -> None:
    case = Case(decode=(5, 9), page_size=128)
    inputs = build(case)
    outcome, expected = on_both(case, replace(inputs, q=inputs.q.at[0].set(jnp.nan)))
    assert np.isnan(expected.lse[0]).all()
    np.testing.assert_allclose(outcome.lse, expected.lse, atol=TOLERANCE["float32"])
    np.testing.assert_allclose(outcome.out, expected.out, atol=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("causal", "lengths"),
    [
        (False, None),  # a query sees rows after its own, also where a block boundary cuts its sequence
        (True, None),
        (True, (100, 20, 100)),  # more queries than rows: a part of a sequence, before a used one, sees nothing
    ],
)
def test_dense_attention(causal: bool, lengths: tuple[int, ...] | None) -> None:
    batch = 2 if lengths is None else len(lengths)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, 100, heads, 16)), jnp.float32) for heads in (8, 1, 1))
    attend = partial(
        flash_attention, q, k, v, causal=causal, lengths=None if lengths is None else jnp.array(lengths), device=V6E
    )
    with interpreted():
        outcome = attend(backend="mosaic_tpu")
    expected = attend(backend="reference")
    for ours, theirs in zip(outcome, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE["float32"])
    if lengths is not None:
        assert (outcome[0][1, :80] == 0).all()
        assert (outcome[1][1, :80] == -jnp.inf).all()


# ---- pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_pages_move_as_the_oracle_moves_them(kv_dtype: str) -> None:
    spec = KVSpec(kv_heads=2, head_dim=48, page_size=128, dtype=jnp.dtype(kv_dtype))
    values = jnp.asarray(np.random.default_rng(0).standard_normal((6, 128, 2, 2, 48)), jnp.float32)
    rows = PageRows(*tensors.quantize_rows(values, kv_dtype)) if spec.quantized else PageRows(values.astype(spec.dtype))
    source, target = (jnp.array([1, 2, 2]), jnp.array([5, 0, 127])), (jnp.array([2, 1, 4]), jnp.array([0, 5, 5]))
    seen = []
    for backend in ("reference", "mosaic_tpu"):
        kv = attention.allocate(spec, 6, backend=backend, device=V6E)
        kv = attention.write_pages(kv, jnp.array([3, 1, 2, 5, 4, 0]), rows)
        kv = attention.copy_pages(kv, jnp.array([1, 3]), jnp.array([5, 1]))
        kv = attention.move_rows(kv, source, target)
        seen.append(attention.read_pages(kv, jnp.array([0, 5, 4, 2, 1, 3])))
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), *seen)


@pytest.mark.parametrize(
    ("spec", "q_heads", "words"),
    [
        (KVSpec(2, 64, 32), 4, "page_size 32 must be a multiple of 128: tokens lie along lanes; use 128"),
        (KVSpec(2, 72, 128), 4, "head_dim 72 must be a multiple of 16"),
        (KVSpec(2, 64, 128, jnp.float16), 4, "dtype float16 is not one of"),
        (KVSpec(64, 128, 4096), 64, r"pages of 4096 tokens need \d+ MiB of VMEM, the limit is 64"),
        (KVSpec(2, 64, 128), 5, "5 query heads are not a multiple of 2"),
    ],
)
def test_it_refuses_by_name(spec: KVSpec, q_heads: int, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        attention.allocate(spec, 4, backend="mosaic_tpu", q_heads=q_heads, device=V6E)


def test_it_refuses_other_devices_and_float16_queries() -> None:
    with pytest.raises(BackendError, match="it is for tpu, the device is h100"):
        attention.allocate(KVSpec(2, 64, 128), 4, backend="mosaic_tpu", device=devices.named("h100"))
    with pytest.raises(UnsupportedError, match="q dtype float16 is not one of"):
        case = Case(decode=(3,), page_size=128, dtype="float16", kv_dtype="bfloat16")
        run("mosaic_tpu", case, build(case), device=V6E)


# ---- bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of the asynchronous copies that the interpreter carries out, by direction."""
    bytes_ = Counter[str]()
    read = interpreter.DMA.execute_read

    def counted(dma: Any) -> None:
        started = dma.state == interpreter.DmaState.STARTED
        read(dma)
        if started:
            hbm = dma.src_memory_space == interpreter.TPU_MEMORY_SPACE_IDXS[pltpu.HBM]
            bytes_["into VMEM" if hbm else "back"] += dma.data_size

    monkeypatch.setattr(interpreter.DMA, "execute_read", counted)
    return bytes_


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn", "int4"])
def test_a_decode_step_copies_each_row_once(kv_dtype: str, copied: Counter[str]) -> None:
    case = Case(decode=(8192, 7900), head_dim=128, page_size=128, dtype="bfloat16", kv_dtype=kv_dtype)
    with interpreted(detect_races=False):
        run("mosaic_tpu", case, build(case), device=V6E)
    needed = sum(case.decode) * case.spec.token_bytes
    print(f"{kv_dtype}: {copied['into VMEM']} bytes read for {needed}, {copied['back']} written back")
    assert needed <= copied["into VMEM"] <= 1.05 * needed
    assert copied["back"] == len(case.decode) * case.page_size * case.spec.token_bytes  # a page per sequence


def test_pages_outside_the_window_are_not_copied(copied: Counter[str]) -> None:
    case = Case(decode=(8192, 1000), window=256, page_size=128)
    with interpreted(detect_races=False):
        run("mosaic_tpu", case, build(case), device=V6E)
    page_bytes = case.page_size * case.spec.token_bytes
    assert copied["into VMEM"] == (2 + 3) * page_bytes  # rows [7936, 8192) and [744, 1000)


# ---- compiled ----------------------------------------------------------------------------------------------------


def arguments(
    spec: KVSpec, *, decode: int, prefill: int, q_heads: int, num_pages: int = 1031, context: int = 8192
) -> tuple[Any, ...]:
    """Shapes of q, k, v, kv and ragged: `decode` sequences of `context` rows, then four that share `prefill` tokens."""
    tokens, seqs = decode + prefill, decode + (4 if prefill else 0)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
    ragged = Ragged(
        shape(seqs + 1), shape(seqs), shape(seqs, context // spec.page_size), shape(tokens), num_decode_seqs=decode
    )
    rows = [
        jax.ShapeDtypeStruct((tokens, n, spec.head_dim), jnp.bfloat16) for n in (q_heads, spec.kv_heads, spec.kv_heads)
    ]
    allocate = partial(attention.allocate, spec, num_pages, backend="mosaic_tpu", device=V6E)
    return *rows, jax.eval_shape(allocate), ragged


def compiled(device: str, function: Any, args: tuple[Any, ...]) -> topology.Compiled:
    """Compiled with the pages donated, which then are neither copied nor held twice."""
    result = topology.compile_for(devices.named(device), function, *args, donate=(3,))
    pools = jax.tree.leaves(args[3])
    assert [result.copies_of(pool.shape) for pool in pools] == [[] for _ in pools]
    assert result.aliased_bytes >= sum(pool.size * pool.dtype.itemsize for pool in pools)
    assert max(result.fast_memory_bytes) <= devices.named(device).fast_memory_bytes * 3 // 4
    return result


@pytest.mark.accelerators
@pytest.mark.parametrize("device", ["v5e", "v5p", "v6e", "tpu7x"])
def test_decode_compiles_without_a_copy_of_the_pool(device: str) -> None:
    args = arguments(KVSpec(8, 128, 128), decode=64, prefill=0, q_heads=32)
    assert compiled(device, attention.attend, args).temporary_bytes <= 16 * MIB


@pytest.mark.accelerators
@pytest.mark.parametrize("device", ["v6e", *(pytest.param(d, marks=pytest.mark.slow) for d in ("v5e", "v5p", "tpu7x"))])
def test_prefill_compiles_without_a_copy_of_the_pool(device: str) -> None:
    args = arguments(KVSpec(8, 128, 128), decode=0, prefill=2048, q_heads=32)
    queries_bytes = args[0].size * args[0].dtype.itemsize
    assert compiled(device, attention.attend, args).temporary_bytes <= 4 * queries_bytes  # q and out in blocks


@pytest.mark.accelerators
@pytest.mark.parametrize("device", ["v6e", *(pytest.param(d, marks=pytest.mark.slow) for d in ("v5e", "v5p", "tpu7x"))])
@pytest.mark.parametrize("window", [None, 1000])
def test_spread_pages_stay_in_place(device: str, window: int | None) -> None:
    args = arguments(KVSpec(8, 128, 128), decode=64, prefill=512, q_heads=32)
    ragged = replace(args[-1], page_stride=4, page_offset=jax.ShapeDtypeStruct((), jnp.int32))
    result = compiled(device, partial(attention.attend, window=window), (*args[:-1], ragged))
    assert result.temporary_bytes <= 32 * MIB  # q and out in blocks


@pytest.mark.accelerators
@pytest.mark.parametrize("device", ["v6e", *(pytest.param(d, marks=pytest.mark.slow) for d in ("v5e", "v5p", "tpu7x"))])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stride", [1, 4])
def test_rows_are_written_in_place(device: str, kv_dtype: str, stride: int) -> None:
    _, k, v, kv, ragged = arguments(KVSpec(8, 128, 128, jnp.dtype(kv_dtype)), decode=64, prefill=2048, q_heads=8)
    ragged = replace(ragged, page_stride=stride, page_offset=jax.ShapeDtypeStruct((), jnp.int32))
    write = lambda k, v, ragged, kv: attention.write(kv, k, v, ragged)
    result = compiled(device, write, (k, v, ragged, kv))
    assert result.temporary_bytes <= 4 * k.size * k.dtype.itemsize  # k above v, tokens along lanes, twice over


@pytest.mark.accelerators
def test_pages_alias_through_a_device_loop() -> None:
    def loop(q: Any, k: Any, v: Any, kv: Any, ragged: Ragged) -> Any:
        def step(state: Any) -> Any:
            i, q, kv, kv_len = state
            out, _, kv = attention.attend(q, k, v, kv, replace(ragged, kv_len=kv_len, q_position=kv_len - 1))
            return i + 1, out, kv, kv_len + 1

        return jax.lax.while_loop(lambda state: state[0] < 8, step, (0, q, kv, ragged.kv_len))

    args = arguments(KVSpec(8, 128, 128), decode=64, prefill=0, q_heads=32)
    assert compiled("v6e", loop, args).temporary_bytes <= 16 * MIB


@pytest.mark.accelerators
def test_a_page_table_larger_than_scalar_memory_compiles() -> None:
    args = arguments(KVSpec(8, 128, 128), decode=256, prefill=0, q_heads=32, context=1 << 20)
    assert args[-1].page_table.size * 4 > MIB  # scalar memory of a core
    compiled("v6e", attention.attend, args)


@pytest.mark.accelerators
@pytest.mark.slow
@pytest.mark.parametrize(("device", "heads"), [("tpu7x", (128, 8)), ("v5e", (64, 64)), ("v5p", (8, 1))])
def test_blocks_shrink_to_fit(device: str, heads: tuple[int, int]) -> None:
    compiled(device, attention.attend, arguments(KVSpec(heads[1], 128, 128), decode=4, prefill=1000, q_heads=heads[0]))


@pytest.mark.accelerators
@pytest.mark.slow
@pytest.mark.parametrize("device", ["v5e", "v6e", "tpu7x"])
def test_every_option_at_once_compiles(device: str) -> None:
    q, k, v, kv, ragged = arguments(KVSpec(8, 128, 128, jnp.int8), decode=16, prefill=256, q_heads=32)
    positions = jax.ShapeDtypeStruct((20, 8192), jnp.int32)
    ragged = replace(ragged, kv_position=positions, ancestors=jax.ShapeDtypeStruct((272, 2), jnp.uint32))
    sinks = jax.ShapeDtypeStruct((32,), jnp.float32)
    attend = lambda q, k, v, kv, ragged, sinks: attention.attend(
        q, k, v, kv, ragged, window=1000, softcap=30.0, sinks=sinks
    )
    compiled(device, attend, (q, k, v, kv, ragged, sinks))


@pytest.mark.accelerators
@pytest.mark.parametrize("device", ["v6e", *(pytest.param(d, marks=pytest.mark.slow) for d in ("v5e", "tpu7x"))])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_rows_move_in_place(device: str, kv_dtype: str) -> None:
    _, _, _, kv, _ = arguments(KVSpec(8, 128, 128, jnp.dtype(kv_dtype)), decode=1, prefill=0, q_heads=8)
    rows = (jax.ShapeDtypeStruct((64,), jnp.int32),) * 2
    result = topology.compile_for(devices.named(device), attention.move_rows, kv, rows, rows, donate=(0,))
    assert result.temporary_bytes <= 16 * MIB  # a pool has 515 MiB


def _quick(head_dim: int, kv_dtype: str) -> bool:
    return (head_dim, kv_dtype) in ((64, "int4"), (80, "int8"), (256, "float8_e4m3fn"))


@pytest.mark.accelerators
@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"),
    [
        pytest.param(head_dim, kv_dtype, marks=() if _quick(head_dim, kv_dtype) else pytest.mark.slow)
        for head_dim in (16, *HEAD_DIMS)
        for kv_dtype in KV_DTYPES
    ],
)
def test_every_head_dim_and_storage_compiles(head_dim: int, kv_dtype: str) -> None:
    spec = KVSpec(8 if head_dim < 512 else 1, head_dim, 128, jnp.dtype(kv_dtype))
    args = arguments(spec, decode=16, prefill=256, q_heads=2 * spec.kv_heads, num_pages=131)
    assert compiled("v6e", attention.attend, args).temporary_bytes <= 16 * MIB


@pytest.mark.accelerators
@pytest.mark.slow
@pytest.mark.parametrize("device", ["v5e", "v5p", "tpu7x"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_storage_compiles_for_every_generation(device: str, kv_dtype: str) -> None:
    args = arguments(KVSpec(8, 128, 128, jnp.dtype(kv_dtype)), decode=16, prefill=256, q_heads=32, num_pages=131)
    assert compiled(device, attention.attend, args).temporary_bytes <= 16 * MIB
