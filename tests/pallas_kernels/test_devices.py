"""Which device a kernel is compiled for."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import devices
from sharding import topology


def test_a_name_that_is_none_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"device 'v9' is not one of v5e, v5p, v6e, tpu7x, a100, .*cpu"):
        devices.named("v9")


def test_without_an_accelerator_it_is_the_cpu() -> None:
    assert devices.current() == devices.named("cpu")


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [
        ("TPU v5 lite", "tpu", "v5e"),
        ("TPU v5", "tpu", "v5p"),
        ("TPU v5e", "tpu", "v5e"),
        ("TPU v5p", "tpu", "v5p"),
        ("TPU v6e", "tpu", "v6e"),
        ("TPU v6 lite", "tpu", "v6e"),
        ("TPU7x", "tpu", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "gpu", "h100"),
        ("NVIDIA H200", "gpu", "h200"),
        ("NVIDIA B200", "gpu", "b200"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100"),
        ("AMD Instinct MI300X", "gpu", "mi300x"),
    ],
)
def test_the_abstract_device_in_context_is_what_is_compiled_for(kind: str, platform: str, name: str) -> None:
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, 1, platform))
    with jax.sharding.use_abstract_mesh(mesh):
        assert devices.current() == devices.named(name)


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=str)
def test_one_can_trace_for_every_device(device: devices.Device) -> None:
    with topology.targeting(device):
        assert devices.current() == device
    assert devices.current() == devices.named("cpu")


@pytest.mark.parametrize(
    ("kind", "capability", "arch"),
    [("NVIDIA GH200 480GB", "9.0", "sm_90a"), ("NVIDIA GB200", "10.0", "sm_100a"), ("Tesla T4", "7.5", "sm_75")],
)
def test_an_unknown_gpu_is_compiled_for_what_it_is(kind: str, capability: str, arch: str) -> None:
    assert devices.of_kind(kind, "gpu", capability).arch == arch


@pytest.mark.parametrize(
    ("kind", "platform", "like"),
    [
        ("TPU v9", "tpu", "tpu"),
        ("NVIDIA Z900", "gpu", "cuda"),
        ("AMD X", "gpu", "rocm"),
        ("M4", "METAL", "METAL"),
    ],
)
def test_an_unknown_kind_keeps_its_name_and_platform(kind: str, platform: str, like: str) -> None:
    device = devices.of_kind(kind, platform)
    assert device.platform == like
    assert device.kind == kind
