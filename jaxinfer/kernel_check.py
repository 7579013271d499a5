"""Whether there is a kernel for every page and every weight of a model, asked before anything is loaded."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxinfer.batch import kv_spec
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig, page_groups
from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from pallas_kernels import attention, devices, grouped_matmul, matmul
from pallas_kernels.dispatch import BackendError

INVARIANT_PLATFORMS = ("cpu",)


def check_kernels(model: ModelConfig, config: EngineConfig) -> None:
    """ConfigError where no kernel, or not the one asked for, takes this model's pages or weights."""
    platform = devices.current().platform
    if config.invariant and platform not in INVARIANT_PLATFORMS:
        raise ConfigError(
            f"invariant=True is supported on {', '.join(INVARIANT_PLATFORMS)}, not on {platform}, where no test has "
            "shown that a row's bits do not depend on its batch; leave it out"
        )
    for group in page_groups(model):
        spec = kv_spec(group.shape, config)
        try:
            attention.choose(spec, backend=config.attention_backend, q_heads=model.q_heads, invariant=config.invariant)
        except BackendError as error:
            raise ConfigError(f"attention_backend={config.attention_backend}: {error}") from error
    specs = abstract_parameters(model, jnp.dtype(config.dtype))
    products = {_product(spec): name for name, spec in specs.items()}
    for (shape, stored), name in products.items():
        try:
            _check_product(shape, stored, config)
        except BackendError as error:
            raise ConfigError(f"matmul_backend={config.matmul_backend}: for {name}, {error}") from error


def _product(spec: ParameterSpec) -> tuple[tuple[int, ...], str]:
    """What a kernel is chosen by: the weight's shape and format."""
    return spec.shape, "dense" if spec.format is None else abstract_weight(spec.format, spec.shape).format


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
