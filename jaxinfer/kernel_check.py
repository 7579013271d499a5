"""Whether there is a kernel for every page and every weight of a model, asked before anything is loaded."""

from __future__ import annotations

from typing import Any

from jaxinfer.batch import device_kv_spec
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig, page_groups
from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.placement import PlacedParameter
from pallas_kernels import attention, devices, grouped_matmul, matmul
from pallas_kernels.dispatch import BackendError

INVARIANT_PLATFORMS = ("cpu",)


def check_kernels(model: ModelConfig, config: EngineConfig, placed: tuple[PlacedParameter, ...]) -> None:
    """ConfigError where no kernel, or not the one asked for, takes a device's part of this model's pages or weights."""
    platform = devices.current().platform
    if config.invariant and platform not in INVARIANT_PLATFORMS:
        raise ConfigError(
            f"invariant=True is supported on {', '.join(INVARIANT_PLATFORMS)}, not on {platform}, where no test has "
            "shown that a row's bits do not depend on its batch; leave it out"
        )
    if config.invariant and config.mesh_sizes.num_devices > 1:
        raise ConfigError(
            f"invariant=True is for one device, not for mesh={config.mesh!r}, where no test has shown that bits do not "
            "depend on the batch; leave one of them out"
        )
    for group in page_groups(model):
        spec, q_heads = device_kv_spec(group.shape, config), model.q_heads // config.mesh_sizes.group
        try:
            attention.choose(spec, backend=config.attention_backend, q_heads=q_heads, invariant=config.invariant)
        except BackendError as error:
            raise ConfigError(f"attention_backend={config.attention_backend}: {error}") from error
    products = {_product(parameter): parameter.label for parameter in placed}
    for (shape, stored), name in products.items():
        try:
            _check_product(shape, stored, config)
        except BackendError as error:
            raise ConfigError(f"matmul_backend={config.matmul_backend}: for {name}, {error}") from error


def _product(parameter: PlacedParameter) -> tuple[tuple[int, ...], str]:
    """What a kernel is chosen by: the shape of a device's part of the weight, and its format."""
    stored, shape = parameter.spec.format, parameter.device_shape
    return shape, "dense" if stored is None else abstract_weight(stored, shape).format


def _check_product(shape: tuple[int, ...], stored: str, config: EngineConfig) -> None:
    """Ask the operation that multiplies by a weight of that shape; vectors are multiplied by none."""
    case: dict[str, Any] = {"rows": 1, "format": stored, "dtype": config.dtype, "device": devices.current()}
    if config.invariant:
        case["invariant"] = True
    if len(shape) == 2:
        matmul.OP.choose(config.matmul_backend, **case, in_size=shape[1], out_size=shape[0], out_dtype=config.dtype)
    elif len(shape) == 3:
        num_groups, out_size, in_size = shape
        grouped_matmul.OP.choose(
            grouped_matmul.backend_for(config.matmul_backend),
            **case,
            in_size=in_size,
            out_size=out_size,
            num_groups=num_groups,
            out_dtype="float32",
        )
