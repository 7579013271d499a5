"""Which parameters the compiled programs take, and where on a mesh each of them goes.

Hides pipeline stacking (a stage's layers, one array for all stages), padding of the vocabulary, what each device has of
a fused parameter's parts, and what of a model a mesh cannot split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ConfigError, EngineConfig, LayerSpec, ModelConfig
from jaxinfer.models.layers import kv_heads_axis
from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from sharding.mesh import DeviceMesh, make_mesh
from sharding.mesh_config import MeshConfig, MeshError, divisors, kv_shards
from sharding.quantized import leaf_shardings
from sharding.rules import padded_shape, partition


@dataclass(frozen=True)
class PlacedParameter:
    """One entry of the flat tuple of parameters that the programs take."""

    names: tuple[str, ...]  # of abstract_parameters: one, or one per pipeline stage; of a fused one those of all parts
    spec: ParameterSpec  # of each of them, or of the fused one
    stacked: bool  # a first dimension of len(names) stages
    shape: tuple[int, ...]  # of the whole, padded; filled up with zeros
    sharding: jax.sharding.Sharding | None  # None: the default device
    in_shards: int = 1  # parts that a weight's inputs, its last dimension, are split into
    parts: tuple[PlacedParameter, ...] = ()  # a device has its parts of these, as if alone, one after the other

    @property
    def label(self) -> str:
        """For messages."""
        return " + ".join(part.label for part in self.parts) or self.names[0]

    @property
    def device_shape(self) -> tuple[int, ...]:
        """Of a device's part of one of the weights."""
        shape = self.shape if self.sharding is None else self.sharding.shard_shape(self.shape)
        return tuple(shape[1:] if self.stacked else shape)

    def abstract(self) -> Any:
        """A jax.ShapeDtypeStruct with its sharding, or a QuantizedTensor of such."""
        if self.spec.format is None:
            return jax.ShapeDtypeStruct(self.shape, self.spec.dtype, sharding=self.sharding)
        stages, shape = (self.shape[:1], self.shape[1:]) if self.stacked else ((), self.shape)
        tensor = abstract_weight(self.spec.format, shape, in_shards=self.in_shards)
        leaves, structure = jax.tree.flatten(tensor)
        places: list[Any] = [None] * len(leaves)
        if self.sharding is not None:
            places = list(leaf_shardings(self.sharding, len(self.shape), tensor.num_groups)[: len(leaves)])
        structs = (
            jax.ShapeDtypeStruct((*stages, *leaf.shape), leaf.dtype, sharding=place)
            for leaf, place in zip(leaves, places, strict=True)
        )
        return jax.tree.unflatten(structure, list(structs))


def mesh_of(model: ModelConfig, config: EngineConfig, devices: Any = None) -> DeviceMesh | None:
    """The mesh that the options ask for; None: one device, no mesh. ConfigError where model and mesh do not fit."""
    sizes = config.mesh_sizes
    if sizes.num_devices == 1 and devices is None:
        return None
    try:
        check_mesh(model, config, sizes)
        return make_mesh(sizes, sorted({model.kv_shape(i).kv_heads for i in range(len(model.layers))}), devices)
    except MeshError as error:
        raise ConfigError(f"mesh={config.mesh!r}: {error}") from error


def check_spans_hosts(mesh: DeviceMesh | None, num_hosts: int) -> None:
    """ConfigError unless every host has devices in the mesh: all of them run every call."""
    present = {device.process_index for device in mesh.mesh.devices.flat} if mesh is not None else {0}
    absent = sorted(set(range(num_hosts)) - present)
    if absent:
        raise ConfigError(
            f"mesh {mesh or 'of one device'} has no device of hosts {_list(absent)} of {num_hosts}: there are "
            f"{jax.device_count()} devices in all; make the axes' product that, or start fewer hosts"
        )


def kv_axes(model: ModelConfig) -> tuple[str, ...]:
    """The logical axes of K/V heads that the model's layers have."""
    return tuple(sorted({kv_heads_axis(model.kv_shape(index).kv_heads) for index in range(len(model.layers))}))


def place_parameters(model: ModelConfig, dtype: jnp.dtype, mesh: DeviceMesh | None) -> tuple[PlacedParameter, ...]:
    """In the order of the flat tuple of a fused `merger`. Raises ConfigError where a parameter cannot be split."""
    specs = abstract_parameters(model, dtype)
    stages = 1 if mesh is None else mesh.config.pipe

    def placed(name: str) -> PlacedParameter:
        if mesh is None:
            return PlacedParameter((name,), specs[name], False, specs[name].shape, None)
        return _placed(name, specs, len(model.layers), mesh)

    return tuple(
        _fused(spec, tuple(map(placed, spec.parts)), mesh) if spec.parts else placed(name)
        for name, spec in abstract_parameters(model, dtype, stages, fused=True).items()
    )


def _fused(spec: ParameterSpec, parts: tuple[PlacedParameter, ...], mesh: DeviceMesh | None) -> PlacedParameter:
    """Of `spec`, split like the first part; what others have on several devices alike is in it as often."""
    names, stacked = tuple(name for part in parts for name in part.names), parts[0].stacked
    if mesh is None:
        return PlacedParameter(names, spec, stacked, spec.shape, None, parts=parts)
    rows = sum(part.device_shape[0] for part in parts)
    whole = replace(spec, shape=(rows * mesh.count(mesh.axes_of(spec.axes[0])), *spec.shape[1:]))
    shape = (mesh.config.pipe, *whole.shape) if stacked else whole.shape
    return PlacedParameter(names, spec, stacked, shape, partition(whole, mesh, stacked=stacked), parts=parts)


def _placed(name: str, specs: dict[str, ParameterSpec], num_layers: int, mesh: DeviceMesh) -> PlacedParameter:
    stages = mesh.config.pipe
    names = tuple(_of_stage(name, stage, num_layers // stages) for stage in range(stages))
    stacked = stages > 1 and name.startswith("layers.")
    spec = specs[names[0]]
    try:
        sharding = partition(spec, mesh, stacked=stacked)
        padded = padded_shape(spec, mesh)
    except MeshError as error:
        raise ConfigError(f"parameter {name} {list(spec.shape)}: {error}") from error
    in_shards = mesh.count(mesh.axes_of(spec.axes[-1]))
    if spec.format is not None:
        _check_groups(name, spec, in_shards)
    shape = (stages, *padded) if stacked else padded
    return PlacedParameter(names if stacked else names[:1], spec, stacked, shape, sharding, in_shards)


def _of_stage(name: str, stage: int, stage_layers: int) -> str:
    """The model's own name for a stage's parameter, which counts layers from 0 in each stage."""
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    return f"layers.{stage * stage_layers + int(index)}.{rest}"


def _check_groups(name: str, spec: ParameterSpec, in_shards: int) -> None:
    """Groups of inputs that share a scale must not lie on two devices."""
    assert spec.format is not None
    group_size, in_size = spec.format.group_size, spec.shape[-1]
    if group_size is None or in_size == group_size or in_shards == 1:
        return
    groups = in_size // group_size
    if groups % in_shards:
        raise ConfigError(
            f"parameter {name} {list(spec.shape)} has {groups} groups of {group_size} inputs, which do not divide over "
            f"{in_shards} devices; numbers of devices that would do: {', '.join(map(str, divisors(groups)))}"
        )


# ---- what a mesh cannot split


def check_mesh(model: ModelConfig, config: EngineConfig, mesh: MeshConfig) -> None:
    """MeshError that names what does not divide, and what would."""
    for what, size, parts, axes in _divisions(model, config, mesh):
        if size % parts:
            fits = [n for n in divisors(size) if n <= max(parts, 64)]
            raise MeshError(f"{what}={size} does not divide over {axes}={parts}; sizes that do: {_list(fits)}")
    for index in range(len(model.layers)):
        kv_shards(model.kv_shape(index).kv_heads, mesh.group, divisors(model.q_heads))
    if mesh.expert > 1 and all(layer.experts is None for layer in model.layers):
        raise MeshError(f"expert={mesh.expert}: the model has no experts; use tensor={mesh.group} instead")
    if mesh.pipe > 1:
        _check_stages(model, mesh.pipe)


def _divisions(model: ModelConfig, config: EngineConfig, mesh: MeshConfig) -> Iterator[tuple[str, int, int, str]]:
    """(what, its size, into how many parts, axes) of all that has to divide."""
    both = "expert*tensor" if mesh.expert > 1 else "tensor"
    yield "q_heads", model.q_heads, mesh.group, both
    for layer in dict.fromkeys(model.layers):
        if layer.experts is None or model.decoder == "gemma4":
            yield "ffn_size", layer.ffn_size or model.ffn_size, mesh.group, both
        if layer.experts is not None:
            yield "num_experts", layer.experts.num_experts, mesh.expert, "expert"
            yield "the experts' ffn_size", layer.experts.ffn_size, mesh.tensor, "tensor"
    yield "max_num_seqs", config.max_num_seqs, mesh.data, "data"
    yield "num_layers", len(model.layers), mesh.pipe, "pipe"


def _check_stages(model: ModelConfig, stages: int) -> None:
    """One program serves every stage, so their layers must be alike one by one."""
    size = len(model.layers) // stages
    for index, layer in enumerate(model.layers):
        if layer.kv_from is not None:
            raise MeshError(
                f"pipe={stages}: layer {index} reads the K/V of layer {layer.kv_from}, so stages cannot be alike; use "
                "tensor or context instead"
            )
        first = model.layers[index % size]
        if layer != first:
            raise MeshError(
                f"pipe={stages}: layer {index} ({_differs(layer, first)}) is not as layer {index % size} of the first "
                f"stage, and stages of {size} layers must be alike; numbers of stages that would do: "
                f"{_list(_stackable(model))}"
            )
    if model.quantization is not None:
        _check_stage_formats(model, stages)


def _check_stage_formats(model: ModelConfig, stages: int) -> None:
    """A checkpoint may quantize some layers and not others."""
    specs = abstract_parameters(model, jnp.dtype(jnp.float32))
    for name in abstract_parameters(model, jnp.dtype(jnp.float32), stages):
        names = [_of_stage(name, stage, len(model.layers) // stages) for stage in range(stages)]
        formats = {specs[each].format for each in names}
        if len(formats) > 1:
            raise MeshError(
                f"pipe={stages}: {', '.join(names)} are quantized in different ways, and stages must be alike; use "
                "tensor or context instead"
            )


def _differs(layer: LayerSpec, other: LayerSpec) -> str:
    fields = [name for name in layer.__dataclass_fields__ if getattr(layer, name) != getattr(other, name)]
    return ", ".join(f"{name}={getattr(layer, name)} instead of {getattr(other, name)}" for name in fields)


def _stackable(model: ModelConfig) -> list[int]:
    """Numbers of pipeline stages whose layers are alike."""
    layers = model.layers
    return [n for n in divisors(len(layers)) if layers == layers[: len(layers) // n] * n]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
