"""The engine's own steps compiled for TPUs that are not here: attention is a kernel in each, pools stay in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import pytest

from jaxinfer.blueprint import Blueprint
from jaxinfer.config import EngineConfig, LayerSpec, ModelConfig, NormSpec, page_groups
from pallas_kernels import devices
from pallas_kernels.devices import MIB, Device
from sharding import topology

SLOTS, CONTEXT, PREFILL = 16, 4096, 512
LAYERS = 3


def model_of(head_dim: int) -> ModelConfig:
    """The shape of an 8B Llama, a window in one of three layers, with a small vocabulary."""
    layers = tuple(LayerSpec(window=1024 if index == 1 else None) for index in range(LAYERS))
    return ModelConfig("llama", 4096, 2048, 8192, 32, 8, head_dim, NormSpec(1e-5), False, CONTEXT, layers)


def compiled(
    device: Device, config: EngineConfig, model: ModelConfig, *, prefill: bool
) -> tuple[topology.Compiled, list]:
    """The step for a device, and the shapes of its K/V pools."""
    with topology.targeting(device):
        pages = (SLOTS * CONTEXT // 128 + 2,) * len(page_groups(model))
        blueprint = Blueprint(model, config, num_pages=pages)
        state = blueprint.state
    control, admission = blueprint.buffers
    arguments: tuple[Any, ...] = (blueprint.parameters, state, control)
    if prefill:
        arguments = (*arguments, admission)
        step = partial(blueprint.drivers.mixed_step, num_slots=SLOTS, prefill_tokens=PREFILL)
    else:
        step = partial(blueprint.drivers.decode_loop, num_slots=SLOTS)
    result = topology.compile_for(device, step, *arguments, donate=(1,), compiler_options=blueprint.compiler_options)
    return result, [leaf.shape for leaf in jax.tree.leaves(state.cache)]


@pytest.mark.accelerators
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_loops_for_a_tpu(head_dim: int, kv_dtype: str) -> None:
    check_loop(devices.named("v6e"), head_dim, kv_dtype)


@pytest.mark.accelerators
@pytest.mark.parametrize("name", ["v5e", "v5p", "tpu7x"])
def test_decode_loops_for_other_tpus(name: str) -> None:
    check_loop(devices.named(name), 128, "bfloat16")


def check_loop(device: Device, head_dim: int, kv_dtype: str) -> None:
    config = EngineConfig(max_num_seqs=SLOTS, max_model_len=CONTEXT, kv_dtype=kv_dtype)
    loop, pools = compiled(device, config, model_of(head_dim), prefill=False)
    assert len(loop.fast_memory_bytes) == LAYERS  # kernels
    for shape in set(pools):
        assert loop.copies_of(shape) == []
    assert loop.temporary_bytes <= 16 * MIB


@pytest.mark.accelerators
def test_a_mixed_step_runs_the_decode_and_the_prefill_kernel() -> None:
    config = EngineConfig(max_num_seqs=SLOTS, max_model_len=CONTEXT, kv_dtype="int8")
    step, pools = compiled(devices.named("v6e"), config, model_of(128), prefill=True)
    assert len(step.fast_memory_bytes) == 2 * LAYERS
    for shape in set(pools):
        assert step.copies_of(shape) == []
