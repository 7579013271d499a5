"""Bounds of a step on a mesh, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxinfer.config import ExpertsSpec, KVShape, LayerSpec, ModelConfig, NormSpec
from jaxinfer.perf.mesh_roofline import Bound, WeightBytes, Work, bound, decode_step, prefill_chunk
from jaxinfer.perf.roofline import prefill_flops
from pallas_kernels import devices
from sharding.mesh_config import MeshConfig

V6E, TPU7X = devices.named("v6e"), devices.named("tpu7x")
# per layer 1000 x (2 x 4 + 2 x 2) x 16 + 3 x 1000 x 3000 weights
MODEL = ModelConfig("llama", 5000, 1000, 3000, 4, 2, 16, NormSpec(1e-5), False, 4096, (LayerSpec(),) * 10)
LAYER_WEIGHTS = 1000 * 12 * 16 + 9_000_000
WEIGHTS = WeightBytes(dense=7e6, tables=1e6)


def kv_bytes(heads: int) -> Any:
    return lambda shape: 2 * heads * shape.head_dim * 2


def step(mesh: MeshConfig, model: ModelConfig = MODEL, weights: WeightBytes = WEIGHTS, **options: Any) -> Work:
    options = {"batch": 8, "context": 100, "kv_token_bytes": kv_bytes(2), **options}
    return decode_step(model, weights, mesh, options.pop("device", V6E), **options)


def chunk(mesh: MeshConfig, model: ModelConfig = MODEL, **options: Any) -> Work:
    options = {"tokens": 64, "kv_token_bytes": kv_bytes(2), **options}
    return prefill_chunk(model, WEIGHTS, mesh, options.pop("device", V6E), **options)


def test_a_decode_step_on_one_device() -> None:
    work = step(MeshConfig())
    assert work.weight_bytes == 7e6
    assert work.kv_bytes == 8 * 100 * 10 * (2 * 2 * 16 * 2)
    assert work.flops == 8 * (2 * (10 * LAYER_WEIGHTS + 5000 * 1000) + 4 * 4 * 16 * 100 * 10)
    assert work.sent_bytes == 0


def test_a_tensor_group_divides_products_and_sends_two_sums_per_layer() -> None:
    alone, work = step(MeshConfig()), step(MeshConfig(tensor=4), kv_token_bytes=kv_bytes(1))
    assert work.flops == alone.flops / 4
    assert work.kv_bytes == alone.kv_bytes / 2
    assert work.sent_bytes == 8 * 1000 * 2 * (10 * 2 * 2 * 3 / 4 + 3 / 4)  # and the embedding's columns once


def test_data_shards_have_their_own_slots() -> None:
    alone, work = step(MeshConfig()), step(MeshConfig(data=2))
    assert (work.weight_bytes, work.sent_bytes) == (alone.weight_bytes, 0)
    assert (work.kv_bytes, work.flops) == (alone.kv_bytes / 2, alone.flops / 2)


def test_context_shards_have_a_part_of_every_sequence_and_exchange_results() -> None:
    alone, work = step(MeshConfig()), step(MeshConfig(context=4))
    assert work.kv_bytes == alone.kv_bytes / 4
    assert work.flops == alone.flops - 8 * 4 * 4 * 16 * 100 * 10 * 3 / 4  # linear maps are repeated
    assert work.sent_bytes == 10 * 3 * 8 * 4 * (16 * 4 + 4)  # results are float32


def test_a_chunk_of_several_sequences_sees_only_their_own_rows() -> None:
    one, four = chunk(MeshConfig(), longest=64), chunk(MeshConfig(), longest=16)
    assert one == chunk(MeshConfig())
    assert four.kv_bytes == one.kv_bytes
    per_pair, unembed = 4 * 4 * 16 * 10, 2 * 5000 * 1000
    pairs = [n * (n + 1) / 2 for n in (64, 16)]
    assert one.flops - four.flops == per_pair * (pairs[0] - 4 * pairs[1]) - 3 * unembed
    last = chunk(MeshConfig(), start=10, longest=50)  # 40 of a sequence that holds 10, 24 of another
    assert last.flops - one.flops == per_pair * (50 * 51 / 2 - 10 * 11 / 2 + 24 * 25 / 2 - pairs[0]) + unembed


def test_quantized_activations_are_multiplied_at_their_own_rate() -> None:
    work = Work(weight_bytes=0, kv_bytes=0, flops=1e15, sent_bytes=0)
    seconds = lambda device, *products: bound(work, device, 4, products=products).mxu_s
    assert seconds(V6E) == seconds(V6E, "float8_e4m3fn", None) == 1e15 / 918e12  # no unit for it
    assert seconds(V6E, "int8") == 1e15 / 1836e12
    assert seconds(TPU7X) == seconds(TPU7X, "int8") == 1e15 / 1153e12
    assert seconds(TPU7X, "float8_e4m3fn") == 1e15 / 2307e12


def test_stages_read_their_weights_for_every_micro_batch() -> None:
    alone, work = step(MeshConfig()), step(MeshConfig(pipe=2), weights=WeightBytes(dense=4e6))
    assert work.weight_bytes == 2 * 4e6
    assert (work.kv_bytes, work.flops) == (alone.kv_bytes / 2, alone.flops / 2)
    activation = 8 * 1000 * 2
    assert work.sent_bytes == activation * (1 / 2 + 1 + 2 / 2)  # columns, to the next stage, from the last to all


def test_a_window_bounds_what_is_read() -> None:
    windowed = dataclasses.replace(MODEL, layers=(LayerSpec(window=25), LayerSpec()) * 5)
    assert step(MeshConfig(), windowed).kv_bytes == 8 * (25 + 100) * 5 * 128


@pytest.mark.parametrize(("batch", "share"), [(1, 1 / 4), (2, 1 - (3 / 4) ** 2), (64, 1 - (3 / 4) ** 64)])
def test_experts_that_a_step_reads(batch: int, share: float) -> None:
    experts = ExpertsSpec(num_experts=8, per_token=2, ffn_size=500)
    model = dataclasses.replace(MODEL, layers=(LayerSpec(experts=experts),) * 10)
    work = step(MeshConfig(), model, WeightBytes(dense=1e6, experts=8e6), batch=batch)
    assert work.weight_bytes == pytest.approx(1e6 + 8e6 * share)


@pytest.mark.parametrize("window", [None, 25, 64, 200])
def test_a_prompt_has_the_operations_that_are_counted_elsewhere(window: int | None) -> None:
    model = dataclasses.replace(MODEL, layers=(LayerSpec(window=window), LayerSpec()) * 5)
    assert chunk(MeshConfig(), model).flops == pytest.approx(prefill_flops(model, 64))
    parts = chunk(MeshConfig(), model, tokens=40).flops + chunk(MeshConfig(), model, tokens=24, start=40).flops
    assert parts - 2 * 5000 * 1000 == pytest.approx(prefill_flops(model, 64))


def test_a_prefill_chunk_on_a_tensor_group() -> None:
    work = chunk(MeshConfig(tensor=4), tokens=512)
    assert work.flops == pytest.approx(prefill_flops(MODEL, 512) / 4)
    assert work.kv_bytes == 512 * 10 * 128
    assert work.sent_bytes == 512 * 1000 * 2 * (10 * 2 * 2 * 3 / 4 + 3 / 4)


def test_a_prefill_chunk_over_context_shards() -> None:
    work = chunk(MeshConfig(context=2), tokens=512)
    linear = 2 * 10 * LAYER_WEIGHTS * 512 + 2 * 5000 * 1000
    attention = prefill_flops(MODEL, 512) - linear
    assert work.flops == pytest.approx(2 * 10 * LAYER_WEIGHTS * 256 + 2 * 5000 * 1000 + attention / 2)
    new_rows, queries, results = 2 * 2 * 16 * 2, 4 * 16 * 2, 4 * (16 * 4 + 4)
    assert work.sent_bytes == 10 * 256 * (new_rows + queries + results)


def test_seconds_by_published_figures() -> None:
    work = Work(weight_bytes=800e9, kv_bytes=20e9, flops=459e12, sent_bytes=100e9)
    found = bound(work, V6E, links=2)
    assert found == Bound(hbm_s=0.5, mxu_s=0.5, links_s=0.5)
    assert bound(work, V6E, links=4).links_s == 0.25
    assert bound(work, V6E, links=2, products=["int8"]).mxu_s == 0.25
    assert bound(work, TPU7X, links=2, products=["int8"]).mxu_s == 459 / 1153  # it has no integer unit
    assert bound(work, V6E, links=0).links_s == 0


@pytest.mark.parametrize(
    ("parts", "by", "seconds", "serial"),
    [((3, 2, 1), "HBM", 3, 4), ((1, 3, 2), "MXU", 3, 5), ((1, 2, 5), "links", 5, 7)],
)
def test_the_largest_part_bounds(parts: tuple[float, float, float], by: str, seconds: float, serial: float) -> None:
    found = Bound(*parts)
    assert (found.by, found.seconds, found.serial_s) == (by, seconds, serial)


def test_devices_of_one_chip_share_its_links_and_need_none_between_them() -> None:
    assert step(MeshConfig(tensor=2), device=TPU7X).sent_bytes == 0
    four_chips = step(MeshConfig(tensor=8), device=TPU7X).sent_bytes
    assert four_chips == step(MeshConfig(tensor=4)).sent_bytes
    assert step(MeshConfig(context=4), device=TPU7X).sent_bytes == 2 * step(MeshConfig(context=4)).sent_bytes


def test_the_shape_that_bytes_are_asked_for_is_the_models() -> None:
    asked: list[KVShape] = []
    step(MeshConfig(), kv_token_bytes=lambda shape: asked.append(shape) or 1)
    assert set(asked) == {KVShape(2, 16)}
