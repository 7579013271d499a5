"""Slices of absent TPUs: their names, their links, the order of their devices, and what compiling for them says."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import devices
from sharding import topology
from sharding.tpu_slice import SHAPES, Slice, arranged


@dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...]
    core_on_chip: int = 0


def grid_of(shape: tuple[int, ...], cores: int = 1) -> list[Chip]:
    """As libtpu lists them: x fastest, both devices of a chip together."""
    places = itertools.product(*(range(size) for size in reversed(shape)))
    return [Chip(tuple(reversed(place)), core) for place in places for core in range(cores)]


def hops(ring: list[Chip]) -> list[int]:
    """Links from each device to the next, and from the last to the first."""
    return [
        sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))
        for one, other in zip(ring, [*ring[1:], ring[0]], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "chips", "num_devices", "links"),
    [
        ("v5e:2x2", 4, 4, 2),
        ("v6e:4x4", 16, 16, 2),
        ("v6e:1x1", 1, 1, 0),
        ("v6e:8x16", 128, 128, 3),
        ("v5e:16x16", 256, 256, 4),
        ("v5p:2x2x1", 4, 4, 2),
        ("v5p:2x2x4", 16, 16, 3),
        ("v5p:4x4x4", 64, 64, 6),
        ("tpu7x:2x2x1", 4, 8, 2),
        ("tpu7x:2x2x2", 8, 16, 3),
    ],
)
def test_a_slice_by_its_name(name: str, chips: int, num_devices: int, links: int) -> None:
    piece = Slice.parse(name)
    assert (piece.name, piece.num_chips, piece.num_devices, piece.links()) == (name, chips, num_devices, links)


@pytest.mark.parametrize(
    ("name", "num_devices", "links"),
    [("v6e:4x4", 4, 2), ("v6e:4x4", 2, 1), ("v6e:4x4", 1, 0), ("v5p:4x4x4", 16, 4), ("v5p:4x4x4", 8, 3)]
    + [("tpu7x:2x2x1", 2, 0), ("tpu7x:2x2x1", 4, 1), ("v6e:4x4", 6, 1)],
)
def test_links_inside_a_part_of_a_slice(name: str, num_devices: int, links: int) -> None:
    assert Slice.parse(name).links(num_devices) == links


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v6e:3x3", r"device 'v6e:3x3': '3x3' is no topology of v6e; there are 1x1, 2x2, 2x4, 4x4, 4x8"),
        ("v5p:4x4", r"'4x4' is no topology of v5p; there are 1x1x1, 2x2x1, .* 16x16x24"),
        ("tpu7x", r"device 'tpu7x': the topology is missing; there are 1x1x1"),
        ("h100:2x2", r"device 'h100:2x2': 'h100' is not one of v5e, v6e, v5p, tpu7x; write for example v5e:4x4"),
        ("", r"device '': '' is not one of v5e"),
    ],
)
def test_a_name_that_is_none_says_what_there_is(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Slice.parse(name)


def test_the_slice_with_that_many_devices() -> None:
    assert Slice.smallest("v6e", 16).name == "v6e:4x4"
    assert Slice.smallest("tpu7x", 16).name == "tpu7x:2x2x2"
    with pytest.raises(ValueError, match=r"'v6e': no topology has 12 devices; there are 1 \(v6e:1x1\), 4 \(v6e:2x2\)"):
        Slice.smallest("v6e", 12)
    with pytest.raises(ValueError, match="is not one of v5e"):
        Slice.smallest("v9", 4)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 4), (8, 16), (2, 2, 1), (2, 2, 2), (2, 4, 4), (4, 4, 4)])
@pytest.mark.parametrize("cores", [1, 2])
def test_devices_of_one_axis_are_a_ring(shape: tuple[int, ...], cores: int) -> None:
    found = grid_of(shape, cores)
    ring = list(arranged(found, (1, len(found))).flat)
    assert sorted(map(id, ring)) == sorted(map(id, found))
    assert max(hops(ring)) == 1
    assert hops(ring).count(0) == len(found) * (cores - 1) // cores  # both devices of a chip are side by side


@pytest.mark.parametrize(
    ("shape", "cores", "sizes", "box"),
    [
        ((4, 4), 1, (2, 8), (2, 4)),
        ((4, 4), 1, (2, 2, 4), (2, 2)),
        ((4, 4, 4), 1, (4, 16), (2, 2, 4)),
        ((4, 4, 4), 1, (8, 1, 8), (2, 2, 2)),
        ((2, 2, 2), 2, (2, 8), (1, 2, 2)),
        ((2, 2, 1), 2, (4, 2), (1, 1, 1)),
    ],
)
def test_devices_of_the_last_axis_are_a_box_and_a_ring(
    shape: tuple[int, ...], cores: int, sizes: tuple[int, ...], box: tuple[int, ...]
) -> None:
    mesh = arranged(grid_of(shape, cores), sizes)
    assert mesh.shape == sizes
    for group in mesh.reshape(-1, sizes[-1]):
        sides = [max(axis) - min(axis) + 1 for axis in zip(*(chip.coords for chip in group), strict=True)]
        assert sorted(sides) == sorted(box)
        assert max(hops(list(group))) <= 1


def test_devices_in_no_box_or_without_coordinates_keep_their_order() -> None:
    part = grid_of((4, 4))[:3]
    assert list(arranged(part, (3,))) == part
    here = jax.devices()
    assert list(arranged(here, (2, 4)).flat) == here


def test_a_device_that_is_no_tpu_cannot_be_compiled_for() -> None:
    assert "is not a TPU" in str(topology.unavailable(devices.named("h100")))


def test_while_a_mesh_of_absent_devices_is_traced_for_the_context_has_its_axes() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    with topology.targeting(devices.named("v6e"), mesh):
        assert jax.sharding.get_abstract_mesh().shape == mesh.shape
        assert devices.current().name == "v6e"


@pytest.mark.accelerators
@pytest.mark.parametrize("name", [f"{kind}:{shape}" for kind, shapes in SHAPES.items() for shape in shapes[:5]])
def test_libtpu_knows_every_slice(name: str) -> None:
    piece = Slice.parse(name)
    found = topology.devices_of(piece)
    assert len(found) == piece.num_devices
    assert devices.of_kind(found[0].device_kind, "tpu") == piece.device
    assert len({tuple(device.coords) for device in found}) == piece.num_chips
    assert max(hops(list(arranged(found, (len(found),)).flat))) <= 1


@pytest.mark.accelerators
@pytest.mark.parametrize(
    ("name", "gib"), [("v5e:2x2", 15.75), ("v6e:2x2", 31.24), ("v5p:2x2x1", 95.73), ("tpu7x:2x2x1", 94.74)]
)
def test_memory_that_programs_may_use(name: str, gib: float) -> None:
    assert topology.memory_limit_bytes(Slice.parse(name)) == int(gib * devices.GIB)


def lowered_product(name: str, rows: int) -> tuple[Slice, jax.stages.Lowered]:
    """`x @ w` with w split over all devices by columns."""
    piece = Slice.parse(name)
    mesh = Mesh(arranged(topology.devices_of(piece), (piece.num_devices,)), ("tensor",))
    x, w = (
        jax.ShapeDtypeStruct((rows, 4096), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec())),
        jax.ShapeDtypeStruct((4096, 8192), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec(None, "tensor"))),
    )
    with topology.targeting(piece.device, mesh):
        return piece, jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(x, w)


@pytest.mark.accelerators
def test_sizes_are_those_of_one_device() -> None:
    with topology.timed_stages() as seconds:
        piece, lowered = lowered_product("v6e:2x2", 512)
        compiled = topology.compile_lowered(lowered, piece.device)
    assert compiled.argument_bytes == 2 * (512 * 4096 + 4096 * 8192 // 4)
    assert compiled.output_bytes == 2 * 512 * 8192 // 4
    assert compiled.program.module.num_devices == 4
    assert all(each > 0 for each in seconds.values())
    assert compiled.seconds >= seconds["compiling"]


@pytest.mark.accelerators
def test_a_program_too_large_is_refused_in_the_compilers_words() -> None:
    piece, lowered = lowered_product("v5e:2x2", 1 << 22)
    with pytest.raises(topology.OutOfMemory, match=r"15\.75G"):
        topology.compile_lowered(lowered, piece.device)
