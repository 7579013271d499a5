"""The Hopper backend: numbers and races in GPU interpret mode, its lowering for GPUs that are not here, its budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import attention, devices
from pallas_kernels.attention import KVSpec, Ragged, cases
from pallas_kernels.attention import mosaic_gpu as backend
from pallas_kernels.attention import mosaic_gpu_kernels as kernels
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import BackendError

H100, H200 = devices.named("h100"), devices.named("h200")
QUICK = (
    *("decode", "decode-long", "decode-width-3", "decode-tree"),
    *("prefill-chunk", "prefill-sinks-softcap", "prefill-head-256"),
    *("middle-mixed-window", "spread-decode", "spread-prefill-window"),
)


def adapted(case: Case) -> Case:
    """The case as the kernel takes it: 16-bit pages of a multiple of 64 rows, and heads of 64, 128 or 256."""
    return replace(
        case,
        page_size=max(64, case.page_size),
        dtype="bfloat16",
        kv_dtype=None,
        head_dim=min((size for size in backend.HEAD_DIMS if size >= case.head_dim), default=backend.HEAD_DIMS[-1]),
    )


def check(case: Case, seed: int = 0) -> None:
    """The case against the oracle, in interpret mode with race detection."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        cases.check("mosaic_gpu", case, seed, device=H100)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in QUICK)])
def test_case(name: str) -> None:
    check(adapted(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "prefill-chunk", "mixed-window"])
def test_float16(name: str) -> None:
    check(replace(adapted(CASES[name]), dtype="float16"))


def test_programs_outlive_their_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three thread blocks take ten items of unequal length each: rings and barriers go on where they were; no races."""
    monkeypatch.setattr(devices, "named", lambda name: replace(H200, num_cores=3))
    check(adapted(Case(decode=(300, 1, 700, 0, 64), prefill=((130, 70), (0, 3), (5, 200)), window=150)))
    assert not get_races().races_found


@settings(max_examples=3, deadline=None)
@given(
    decode=st.lists(st.integers(0, 200), max_size=2),
    prefill=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 150)), max_size=2),
    heads=st.sampled_from([(2, 2), (4, 2), (5, 1)]),
    window=st.sampled_from([None, 1, 70]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_mix(decode: list, prefill: list, heads: tuple, window: int | None, padding: int, seed: int) -> None:
    if any(decode) or any(queries for _, queries in prefill):
        mix = Case(tuple(decode), tuple(prefill), q_heads=heads[0], kv_heads=heads[1], window=window, padding=padding)
        check(adapted(mix), seed)


def call_of(spec: KVSpec, *, decode: int = 0, prefill: int = 0, width: int = 1, pages_per_seq: int = 32) -> tuple:
    """Abstract arguments of `attend`: decode sequences of `width` queries, and one sequence with `prefill` queries."""
    tokens, seqs = decode * width + prefill, decode + (1 if prefill else 0)
    shape = lambda *size, dtype=jnp.int32: jax.ShapeDtypeStruct(size, dtype)
    ragged = Ragged(
        shape(seqs + 1), shape(seqs), shape(seqs, pages_per_seq), shape(tokens), width=width, num_decode_seqs=decode
    )
    rows = shape(tokens, spec.kv_heads, spec.head_dim, dtype=spec.dtype)
    q = shape(tokens, 4 * spec.kv_heads, spec.head_dim, dtype=spec.dtype)
    return q, rows, rows, jax.eval_shape(lambda: backend.allocate(spec, 64)), ragged


def lowered(device: Device, call: Any, *args: Any) -> str:
    """The program for a GPU that is not here; Mosaic GPU's layout inference and lowering accept the kernel or raise."""
    gpu = AbstractDevice(device.kind, device.num_cores, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        return jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.accelerators
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
@pytest.mark.parametrize("device", [H100, H200], ids=str)
def test_lowers(device: Device, head_dim: int, phase: str) -> None:
    sizes: dict[str, Any] = {"decode": 64} if phase == "decode" else {"prefill": 1024}
    args = call_of(KVSpec(2, head_dim, 128), **sizes)
    assert lowered(device, attention.attend, *args).count("@mosaic_gpu") == 1


@pytest.mark.accelerators
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (KVSpec(2, 128, 64), {}),  # a prefill block is two pages
        (KVSpec(2, 128, 256), {"window": 1000}),
        (KVSpec(2, 128, 128, jnp.float16), {"softcap": 30.0}),
        (KVSpec(8, 64, 128), {"scale": 0.3, "window": 64}),
    ],
    ids=["page-64", "window", "float16-softcap", "scale-window"],
)
def test_lowers_with_options(spec: KVSpec, options: dict[str, Any]) -> None:
    args = call_of(spec, decode=8, width=3, prefill=300)
    text = lowered(H100, lambda *arrays: attention.attend(*arrays, **options), *args)
    assert text.count("@mosaic_gpu") == 2


@pytest.mark.accelerators
@pytest.mark.parametrize("window", [None, 1000])
def test_lowers_with_spread_pages(window: int | None) -> None:
    *args, ragged = call_of(KVSpec(2, 128, 128), decode=8, width=3, prefill=300)
    ragged = replace(ragged, page_stride=4, page_offset=jax.ShapeDtypeStruct((), jnp.int32))
    text = lowered(H100, lambda *arrays: attention.attend(*arrays, window=window), *args, ragged)
    assert text.count("@mosaic_gpu") == 2


@pytest.mark.accelerators
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_both_routes_of_the_weights_lower(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """What interpret mode runs (weights through shared memory) is itself a kernel for the real thing."""
    attend_tiles = kernels.attend_tiles

    def through_shared_memory(*args: Any) -> Any:
        assert args[-1].probabilities == "registers"
        return attend_tiles(*args[:-1], replace(args[-1], probabilities="smem", slots=2))

    monkeypatch.setattr(kernels, "attend_tiles", through_shared_memory)
    sizes: dict[str, Any] = {"decode": 64} if phase == "decode" else {"prefill": 1024}
    assert "@mosaic_gpu" in lowered(H100, attention.attend, *call_of(KVSpec(2, 128, 128), **sizes))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("page_size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
def test_blocks_fit_and_overlap(head_dim: int, page_size: int, phase: str) -> None:
    """Shared memory holds at least two blocks of each stream: one is read while the next arrives."""
    spec = KVSpec(8, head_dim, page_size)
    plan = backend.plan(phase, spec, 32, 64, 64, backend.Rules(None, None, 1.0), H200)
    assert kernels.smem_bytes(plan, spec) <= H200.fast_memory_bytes
    assert plan.slots >= 2
    assert plan.block % page_size == 0 or page_size % plan.block == 0


@pytest.mark.parametrize(
    ("num_tiles", "pages_per_seq", "parts", "programs"),
    [
        (64, 64, 2, 132),  # 512 items fill the cores: only the warpgroups of a block share a sequence
        (1, 64, 32, 128),  # one long sequence: its rows are split until the cores are busy
        (1, 1, 2, 8),  # one page has nothing to split
    ],
)
def test_splits_fill_the_cores(num_tiles: int, pages_per_seq: int, parts: int, programs: int) -> None:
    plan = backend.plan("decode", KVSpec(8, 128, 128), 32, num_tiles, pages_per_seq, backend.Rules(None, None, 1), H200)
    assert (plan.parts, plan.programs) == (parts, programs)


@pytest.mark.parametrize(
    ("spec", "device", "reason"),
    [
        (KVSpec(2, 128, 64), "b200", r"for Hopper \(h100, h200\), the device is b200"),
        (KVSpec(2, 128, 64), "cpu", "the device is cpu"),
        (KVSpec(2, 128, 64, jnp.int8), "h100", "dtype int8 is not one of bfloat16, float16"),
        (KVSpec(2, 128, 64, jnp.float32), "h100", "dtype float32 is not one of"),
        (KVSpec(2, 96, 64), "h200", "head_dim 96 is not one of 64, 128, 256"),
        (KVSpec(2, 128, 32), "h200", "page_size 32 must be a multiple of 64"),
        (KVSpec(2, 128, 192), "h200", "page_size 192 must divide 128"),
    ],
)
def test_refusals_name_the_value(spec: KVSpec, device: str, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        attention.allocate(spec, 4, backend="mosaic_gpu", device=devices.named(device))


def test_a_negative_scale_is_served() -> None:
    check(replace(adapted(CASES["decode-scale"]), scale=-0.3))
