"""Everything an engine's programs are made of, without an array: for an engine, and for compiling where no device is.

Hides how the parts of a device become one program over a mesh, and which arrays of the device state lie where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import memory, scoring
from jaxinfer.batch import DeviceState, Packer, SlotState, empty_state, limits_of
from jaxinfer.config import EngineConfig, ModelConfig, page_groups
from jaxinfer.kernel_check import check_kernels
from jaxinfer.models.transformer import merger
from jaxinfer.outcome import Outcome
from jaxinfer.placement import kv_axes, place_parameters
from jaxinfer.program_shapes import Shape
from jaxinfer.sampling import TokenCounts
from jaxinfer.step import Drivers, stage_model
from pallas_kernels import devices
from sharding.mesh import DeviceMesh
from sharding.parallel import parallel_of
from sharding.shards import Shards


def compiler_options(config: EngineConfig) -> dict[str, bool]:
    """What XLA is told of each of an engine's programs, for `devices.current()`. It refuses names it does not know."""
    options = {}
    if config.invariant:  # else some programs leave out roundings to bfloat16 between operations they fuse
        options["xla_allow_excess_precision"] = False
    if devices.current().name == "tpu7x":  # else bfloat16 has tiles of 16 rows, and each call copies weights tiled by 8
        options["xla_tpu_control_large_2nd_minor_layout_for_x16"] = False
    return options


class Blueprint:
    """A model, options and a mesh, checked against each other: what arrays there are, and every program."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        mesh: DeviceMesh | None = None,
        *,
        num_pages: Sequence[int] | None = None,
    ):
        """`num_pages`: of each page group on each device (default: by the memory there is).

        Raises ConfigError, naming what does not fit.
        """
        self.model, self.config, self.mesh = model, config, mesh
        dtype = jnp.dtype(config.dtype)
        self.max_model_len = memory.max_model_len(model, config)
        self.placed = place_parameters(model, dtype, mesh)
        check_kernels(model, config, self.placed)
        pages = memory.pages_per_group(model, config, self.max_model_len) if num_pages is None else tuple(num_pages)
        self.limits = limits_of(model, config, self.max_model_len, pages)
        self.groups = page_groups(model)
        self.packer = Packer(model, self.limits, self.groups)
        split_tokens = config.sequence_parallel
        self.parallel = parallel_of(mesh, model.vocab_size, kv_axes(model), sequence_parallel=split_tokens)
        merge = self._merger(self.parallel.decode)
        same = self.parallel.prefill is self.parallel.decode
        merge_prefill = merge if same else self._merger(self.parallel.prefill)
        self.drivers = Drivers(model, self.limits, merge, self.parallel, merge_prefill)
        self.compiler_options = compiler_options(config)

    # ---- arrays

    @property
    def parameters(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the flat tuple of weights, with their shardings."""
        return tuple(jax.tree.leaves([parameter.abstract() for parameter in self.placed]))

    @property
    def state(self) -> DeviceState:
        """Of the device state, with its shardings."""
        local = jax.eval_shape(self._empty_part)
        if self.mesh is None:
            return local
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(_whole(leaf.shape, place), leaf.dtype, sharding=place),
            local,
            self._state_shardings(local),
        )

    def empty_state(self) -> DeviceState:
        """The device state, allocated: no sequence, zeroed pages."""
        if self.mesh is None:
            return self._empty_part()
        shardings = self._state_shardings(jax.eval_shape(self._empty_part))
        return jax.jit(self.mesh.run(self._empty_part, (), shardings))()

    @property
    def buffers(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Of the host's edits: i32[size], on a mesh i32[data shards, size]."""
        sizes = self.packer.control.size, self.packer.admission.size
        control, admission = (
            jax.ShapeDtypeStruct((size,), "int32")
            if self.mesh is None
            else jax.ShapeDtypeStruct((self.parallel.data, size), "int32", sharding=self.mesh.by_data)
            for size in sizes
        )
        return control, admission

    def _empty_part(self) -> DeviceState:
        """A device's part of the state."""
        stage = stage_model(self.model, self.parallel.stages)
        return empty_state(stage, self.config, self.limits, self.parallel.vocabulary)

    def _state_shardings(self, local: DeviceState) -> DeviceState:
        """K/V: every device has its own. Slots: of its data shard; counts: of its part of the vocabulary too."""
        mesh = self.mesh
        assert mesh is not None
        slots: SlotState = jax.tree.map(lambda _: mesh.by_data, local.slots)
        counted: Any = mesh.sharding(mesh.names("data"), self.parallel.vocabulary.axes)
        slots = replace(slots, counts=TokenCounts(counted))
        return DeviceState(jax.tree.map(lambda _: mesh.by_device, local.cache), slots)

    # ---- programs

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """One program, traced and lowered."""
        if shape.reader:
            return self._lower_reader(shape)
        control, admission = self.buffers
        arguments: tuple[Any, ...] = (self.parameters, self.state, control)
        if shape.prefill_tokens:
            arguments = (*arguments, admission)
            driver = partial(self.drivers.mixed_step, num_slots=shape.num_slots, prefill_tokens=shape.prefill_tokens)
        else:
            driver = partial(self.drivers.decode_loop, num_slots=shape.num_slots)
        if self.mesh is None:
            return jax.jit(driver, donate_argnums=1).lower(*arguments)

        def part(parameters: Any, state: DeviceState, *buffers: jax.Array) -> tuple[DeviceState, Outcome]:
            return driver(parameters, state, *(buffer[0] for buffer in buffers))

        places = jax.tree.map(lambda leaf: leaf.sharding, arguments)
        everywhere: Any = self.mesh.everywhere
        by_data: Any = self.mesh.by_data
        outcome = Outcome(everywhere, everywhere, everywhere, hidden=by_data, busy=everywhere)
        return jax.jit(self.mesh.run(part, places, (places[1], outcome)), donate_argnums=1).lower(*arguments)

    def compile(self, shape: Shape) -> Callable[..., Any]:
        """One program, for the devices that are here."""
        return self.lower(shape).compile(self.compiler_options)

    def _lower_reader(self, shape: Shape) -> jax.stages.Lowered:
        """A program of scoring.READERS over the hidden rows of all data shards, one after the other."""
        parallel, rows = self.parallel, shape.prefill_tokens
        reader = partial(scoring.READERS[shape.reader], self.drivers.merge, vocabulary=parallel.vocabulary)
        hidden_shape = (parallel.data * rows, self.model.embed_size)
        if self.mesh is None:
            hidden = jax.ShapeDtypeStruct(hidden_shape, self.config.dtype)
            return jax.jit(reader).lower(self.parameters, hidden, *scoring.reader_arguments(shape.reader, rows))
        by_data, everywhere = self.mesh.by_data, self.mesh.everywhere

        def scores(parameters: Any, hidden: jax.Array, targets: jax.Array, num_top: jax.Array) -> Any:
            return jax.tree.map(lambda x: parallel.all_data(x, 0), reader(parameters, hidden, targets, num_top))

        def logits(parameters: Any, hidden: jax.Array, start: jax.Array) -> jax.Array:
            return parallel.of_data_shard(reader(parameters, hidden, start % rows), start // rows)

        part, extra = (scores, (by_data, everywhere)) if shape.reader == "scores" else (logits, (everywhere,))
        arguments = (
            self.parameters,
            jax.ShapeDtypeStruct(hidden_shape, self.config.dtype, sharding=by_data),
            *(
                jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)
                for like, place in zip(scoring.reader_arguments(shape.reader, hidden_shape[0]), extra, strict=True)
            ),
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, arguments)
        return jax.jit(self.mesh.run(part, places, everywhere)).lower(*arguments)

    def _merger(self, shards: Shards) -> Callable[..., Any]:
        """From a device's parts of the weights, in which a stage's layers are the only ones of a stack, to a module."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        stages = self.parallel.stages
        merge = merger(self.model, dtype, config.matmul_backend, config.invariant, shards, stages, fused=True)
        if stages == 1:
            return merge
        stacked = [parameter.stacked for parameter in self.placed for _ in jax.tree.leaves(parameter.abstract())]
        return lambda parameters: merge(
            tuple(leaf[0] if first else leaf for leaf, first in zip(parameters, stacked, strict=True))
        )


def _whole(shape: tuple[int, ...], place: jax.sharding.NamedSharding) -> tuple[int, ...]:
    """The shape of an array of which each device has a part of `shape`."""
    ones = place.shard_shape(tuple(place.mesh.size * size for size in shape))
    return tuple(size * (place.mesh.size * size // one) for size, one in zip(shape, ones, strict=True))


def device_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of a device's part of an array of `parameters` or `state`."""
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize
