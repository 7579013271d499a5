"""The Triton backend: numbers in Triton's interpreter, machine code for GPUs that are not here, launch arithmetic."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from triton_launches import interpret, record

from pallas_kernels import attention, devices, triton_aot, tuning
from pallas_kernels.attention import KVSpec, Ragged, cases
from pallas_kernels.attention import triton as backend
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import BackendError
from pallas_kernels.triton_launch import Launch
from sharding import topology

QUICK = {  # one process each: together every branch of the kernels
    "decode": (
        "decode decode-all-unused decode-group-7 decode-window decode-sinks decode-page-1 decode-head-80 decode-bf16 "
        "decode-gaps-window decode-tree-window decode-int8 decode-int4-window-sinks"
    ),
    "splits": "decode-long decode-page-256 decode-window-128",
    "prefill": "prefill-one-token prefill-sinks-softcap prefill-gaps prefill-tree prefill-many-short prefill-shared",
    "nan": "decode+nan decode-long+nan decode-sinks+nan mixed-width+nan",
    "spread": "middle-mixed-window spread-decode spread-decode-width-3-window spread-prefill-window spread-mixed-int4",
    "mixed": "mixed-window mixed-bf16-pages mixed-width mixed-int4-tree prefill-fp8",
}
SLOW = {f"every-{i}": " ".join(list(cases.CASES)[i::4]) for i in range(4)}
TARGETS = [devices.named(name) for name in ("a100", "h100", "b200", "mi300x")]


@pytest.mark.accelerators
@pytest.mark.parametrize(
    "names",
    [*QUICK.values(), *(pytest.param(names, marks=pytest.mark.slow) for names in SLOW.values())],
    ids=[*QUICK, *SLOW],
)
def test_cases_in_the_interpreter(names: str) -> None:
    failures = interpret("attention", "triton", names.split())
    assert not failures, "\n".join(f"{name}: {error}" for name, error in failures.items())


def call_of(spec: KVSpec, dtype: Any, *, decode: int = 16, prefill: int = 512, pages_per_seq: int = 64) -> tuple:
    """Abstract arguments of `attend`: decode sequences of one query each, and one sequence with `prefill` queries."""
    tokens, seqs = decode + prefill, decode + (1 if prefill else 0)
    shape = lambda *size, dtype=jnp.int32: jax.ShapeDtypeStruct(size, dtype)
    ragged = Ragged(shape(seqs + 1), shape(seqs), shape(seqs, pages_per_seq), shape(tokens), num_decode_seqs=decode)
    rows = shape(tokens, spec.kv_heads, spec.head_dim, dtype=dtype)
    q = shape(tokens, 4 * spec.kv_heads, spec.head_dim, dtype=dtype)
    return q, rows, rows, jax.eval_shape(lambda: backend.allocate(spec, 1024)), ragged


def check_compiles(device: Device, spec: KVSpec, dtype: str) -> None:
    launches = record(device, attention.attend, *call_of(spec, dtype))
    assert [launch.kernel.__name__ for launch in launches] == ["attend", "merge", "attend"]
    for launch in launches:
        compiled = triton_aot.compile_launch(launch, device)
        assert compiled.shared_bytes <= device.fast_memory_bytes, compiled
        assert compiled.spilled_bytes <= 64, compiled


@pytest.mark.accelerators
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles(device: Device, kv_dtype: str) -> None:
    spec = KVSpec(8, 128, 64, jnp.dtype(kv_dtype))
    if device.name == "a100" and kv_dtype == "float8_e4m3fn":
        with pytest.raises(BackendError, match="a100 has no float8_e4m3fn"):
            attention.allocate(spec, 4, backend="triton", device=device)
        return
    check_compiles(device, spec, "bfloat16")


@pytest.mark.accelerators
@pytest.mark.parametrize("kv_dtype", ["bfloat16", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles_with_every_option(device: Device, kv_dtype: str) -> None:
    q, rows, _, kv, ragged = call_of(KVSpec(2, 128, 16, jnp.dtype(kv_dtype)), jnp.bfloat16)
    shape = lambda *size, dtype=jnp.int32: jax.ShapeDtypeStruct(size, dtype)
    ragged = dataclasses.replace(
        ragged, kv_position=shape(17, 1024), ancestors=shape(528, 2, dtype=jnp.uint32), width=5, num_decode_seqs=8
    )

    def call(q: Any, rows: Any, kv: Any, ragged: Ragged, sinks: Any) -> Any:
        return attention.attend(q, rows, rows, kv, ragged, window=3000, softcap=30.0, sinks=sinks, scale=0.1)

    launches = record(device, call, q, rows, kv, ragged, shape(8, dtype=jnp.float32))
    assert len(launches) == 3
    for launch, most in zip(launches, (128, 0, 1024), strict=True):  # prefill with a tree and gaps is no usual case
        compiled = triton_aot.compile_launch(launch, device)
        assert compiled.shared_bytes <= device.fast_memory_bytes, compiled
        assert compiled.spilled_bytes <= most, compiled


@pytest.mark.accelerators
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles_for_spread_pages(device: Device) -> None:
    *arguments, ragged = call_of(KVSpec(8, 128, 64), jnp.bfloat16)
    ragged = dataclasses.replace(ragged, page_stride=4, page_offset=jax.ShapeDtypeStruct((), jnp.int32))
    attend = lambda *arrays: attention.attend(*arrays, window=1000)
    launches = record(device, attend, *arguments, ragged)
    assert [launch.constants["HAS_FIRST"] for launch in launches if "HAS_FIRST" in launch.constants] == [True, True]
    for launch in launches:
        compiled = triton_aot.compile_launch(launch, device)
        assert compiled.shared_bytes <= device.fast_memory_bytes, compiled
        assert compiled.spilled_bytes <= 64, compiled


@pytest.mark.accelerators
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 256, 512])
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles_other_heads(device: Device, head_dim: int) -> None:
    check_compiles(device, KVSpec(8, head_dim, 16), "bfloat16")
    check_compiles(device, KVSpec(8, head_dim, 16, jnp.float16), "float16")


@pytest.mark.accelerators
@pytest.mark.slow
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_compiles_float32(device: Device) -> None:
    check_compiles(device, KVSpec(8, 128, 16, jnp.float32), "float32")


@pytest.mark.accelerators
def test_lowers_through_jax_triton_and_keeps_pages_in_place() -> None:
    device = devices.named("h100")
    arguments = call_of(KVSpec(8, 128, 64), jnp.bfloat16)
    with topology.targeting(device):
        traced = jax.jit(attention.attend, donate_argnums=3).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("triton_kernel_call") == 3
    assert lowered.count("tf.aliasing_output") == 2  # K and V


@pytest.mark.accelerators
def test_few_long_sequences_are_split_and_many_are_not() -> None:
    device = devices.named("h200")
    splits = {}
    for seqs in (1, 16, 512):
        launch = record(device, attention.attend, *call_of(KVSpec(8, 128, 64), jnp.bfloat16, decode=seqs, prefill=0))[0]
        assert launch.grid[:2] == (seqs, 8)
        splits[seqs] = launch.grid[2]
    assert splits == {1: 16, 16: 5, 512: 1}  # of 4096 rows: 256 rows are the least; 4 programs per core the aim


@pytest.mark.accelerators
def test_a_tile_holds_all_query_heads_of_a_kv_head() -> None:
    q, _, _, kv, ragged = call_of(KVSpec(1, 128, 64), jnp.bfloat16, decode=0, prefill=300)
    q = jax.ShapeDtypeStruct((300, 6, 128), q.dtype)
    launch = record(
        devices.named("h100"), lambda q, kv, ragged: attention.attend(q, None, None, kv, ragged), q, kv, ragged
    )[0]
    tokens = launch.constants["ROWS"] // 6
    assert launch.constants["ROWS"] == 128
    assert launch.grid == (300 // tokens + 2, 1, 1)  # one partial tile for the sequence, one for padding


@pytest.mark.parametrize(
    ("spec", "device", "words"),
    [
        (KVSpec(2, 64, 16), "cpu", "for cuda and rocm, the device is cpu|for GPUs, the device is cpu; use xla"),
        (KVSpec(2, 576, 16), "h100", "head_dim 576 is above 512"),
        (KVSpec(2, 64, 16, jnp.float8_e5m2), "h100", "K/V dtype float8_e5m2 is not one of bfloat16, .*, int4"),
        (KVSpec(2, 64, 16, jnp.float8_e4m3fn), "a100", "a100 has no float8_e4m3fn .sm_89 has.; int8"),
    ],
)
def test_refuses_by_name(spec: KVSpec, device: str, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        attention.allocate(spec, 4, backend="triton", device=devices.named(device))


def test_refuses_query_heads_that_kv_heads_do_not_divide() -> None:
    reason = backend.refuse(spec=KVSpec(2, 64, 16), q_heads=5, device=devices.named("h100"))
    assert reason == "5 query heads are not a multiple of 2 KV heads"


def test_refuses_gpus_that_are_too_old() -> None:
    old = dataclasses.replace(devices.named("a100"), name="tesla-t4", arch="sm_75")
    reason = backend.refuse(spec=KVSpec(2, 64, 16), q_heads=4, device=old)
    assert reason is not None and "sm_75 is older than sm_80, the oldest" in reason


@pytest.mark.parametrize("sizes", [(4, 0), (0, 4)], ids=["decode", "prefill"])
def test_a_tile_that_leaves_out_query_heads_is_an_error(sizes: tuple[int, int]) -> None:
    q, _, _, kv, ragged = call_of(KVSpec(1, 64, 16), jnp.bfloat16, decode=sizes[0], prefill=sizes[1])
    q = jax.ShapeDtypeStruct((4, 32, 64), q.dtype)
    call = lambda q, kv, ragged: attention.attend(q, None, None, kv, ragged)
    with (
        tuning.forced("attention.triton", {"rows": 16}),
        pytest.raises(ValueError, match=r"attention\.triton block rows=16 must be at least 32, the query heads"),
    ):
        record(devices.named("h100"), call, q, kv, ragged)


def test_without_jax_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.refuse(spec=KVSpec(2, 64, 16), q_heads=4, device=devices.named("h100")) is None  # it is elsewhere
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    reason = backend.refuse(spec=KVSpec(2, 64, 16), q_heads=4, device=devices.named("h100"))
    assert reason is not None and "pip install jaxinfer[cuda13]" in reason


def test_a_device_that_is_no_gpu_is_not_compiled_for() -> None:
    with pytest.raises(ValueError, match="Triton compiles for GPUs, v6e is a tpu"):
        triton_aot.compile_launch(Launch(None, (1,), (), (), {}, 1, 1), devices.named("v6e"))
