"""Attention over pages that devices share, on eight virtual CPU devices, against one device that holds all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import attention
from pallas_kernels.attention import KVSpec, Ragged, cases
from pallas_kernels.attention.cases import Case, Inputs, Outcome
from pallas_kernels.native import jit
from sharding import context, topology, traffic
from sharding.mesh import make_mesh
from sharding.mesh_config import MeshConfig
from sharding.parallel import parallel_of
from sharding.tpu_slice import Slice

# context shards -> the mesh they are part of, and the names of its axes that are context
MESHES: dict[int, tuple[dict[str, int], tuple[str, ...]]] = {
    2: ({"data": 2, "context": 2, "tensor": 2}, ("context",)),
    4: ({"rows": 2, "tensor": 2, "columns": 2}, ("rows", "columns")),
    8: ({"context": 8}, ("context",)),
}
NATIVE = pytest.param("llvm_cpu", marks=pytest.mark.skipif(jit.unavailable() is not None, reason="no native kernels"))
FLOAT32 = 1e-5  # of the largest value: sums of the same float32 terms in another order

_MIXED: dict[str, Any] = {"decode": (170, 0, 3, 257), "prefill": ((130, 70), (0, 3), (0, 61))}
CASES = {
    "decode": Case(decode=(1, 5, 130, 0, 257)),
    "decode-width": Case(decode=(40, 200, 0, 7), width=3),
    "decode-window": Case(decode=(3, 129, 300, 64), window=50),
    "decode-sinks-softcap": Case(decode=(40, 200, 0), sinks=True, softcap=5.0),
    "decode-int8": Case(decode=(40, 200, 0), kv_dtype="int8"),
    "decode-bf16": Case(decode=(40, 500, 0), dtype="bfloat16"),
    "decode-unused": Case(decode=(0, 0)),
    "prefill": Case(prefill=((0, 128),)),
    "prefill-many": Case(prefill=((0, 3), (20, 1), (40, 0), (33, 9), (0, 40)), padding=11),
    "prefill-window": Case(prefill=((300, 150), (0, 42)), window=33),
    "mixed": Case(**_MIXED, padding=2),
    "mixed-width-scale": Case(decode=(17, 0, 129), prefill=((130, 72),), width=2, scale=0.3),
    "mixed-mha-window-sinks": Case(**_MIXED, padding=2, kv_heads=4, window=100, sinks=True),
    "mixed-group-softcap": Case(**_MIXED, padding=2, q_heads=12, kv_heads=2, softcap=3.0),
    "mixed-int4": Case(**_MIXED, padding=2, kv_dtype="int4"),
    "mixed-bf16": Case(**_MIXED, padding=2, dtype="bfloat16", head_dim=16, sinks=True),
    "mixed-page-128": Case(**_MIXED, padding=2, page_size=128),
    "mixed-shared": Case(**_MIXED, padding=2, shared=True),
}
MORE = ("decode-window", "prefill-many", "mixed-int4")  # on other meshes too


@dataclass
class Group:
    """The devices of a mesh, and a case's pages spread over those of a context group."""

    case: Case
    mesh: Mesh
    axes: tuple[str, ...]
    heads: str | None  # the axis that heads are split over, where there is one
    compiled: Any = None  # the program, once it ran

    def __init__(self, case: Case, shards: int, heads: bool = True) -> None:
        sizes, self.axes = MESHES[shards]
        self.case = replace(case, shards=shards)
        self.mesh = Mesh(np.array(jax.devices()[:8]).reshape(list(sizes.values())), tuple(sizes))
        self.heads = "tensor" if heads and "tensor" in sizes and case.kv_heads % 2 == 0 else None

    @property
    def shards(self) -> int:
        return self.case.shards

    def program(self, inputs: Inputs) -> Any:
        """`(q, k, v, ragged, sinks, kv) -> (out, kv)`; all but `ragged`, of all shards one after the other."""
        options = {name: x for name, x in inputs.options.items() if name != "sinks"}

        def call(q: Any, k: Any, v: Any, ragged: Ragged, sinks: Any, kv: Any) -> Any:
            group = {"axes": self.axes, "shards": self.shards}
            return context.attend(q, k, v, kv, context.spread(ragged, **group), sinks=sinks, **group, **options)

        by_head = PartitionSpec(self.axes, self.heads)
        return jax.shard_map(
            call,
            mesh=self.mesh,
            in_specs=(by_head, by_head, by_head, PartitionSpec(), PartitionSpec(self.heads), by_head),
            out_specs=(by_head, by_head),
            check_vma=False,
        )

    def arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        """What the program takes before `kv`."""
        decode_rows = inputs.ragged.num_decode_seqs * inputs.ragged.width
        by_shard = lambda x: None if x is None else _by_shard(x, decode_rows, self.shards)
        return *map(by_shard, (inputs.q, inputs.k, inputs.v)), inputs.ragged, inputs.options.get("sinks")

    def attend(self, inputs: Inputs, kv: Any) -> tuple[np.ndarray, Any]:
        """`(out [tokens, ...], kv)` of all shards; `kv`: each shard's pages, one after the other."""
        decode_rows = inputs.ragged.num_decode_seqs * inputs.ragged.width
        self.compiled = self.compiled or jax.jit(self.program(inputs))
        out, kv = self.compiled(*self.arguments(inputs), kv)
        parts = np.asarray(out, np.float32).reshape(self.shards, -1, *out.shape[1:])
        for part in parts[1:]:  # every shard has the decode rows' results
            np.testing.assert_array_equal(part[:decode_rows], parts[0, :decode_rows])
        return np.concatenate([parts[0, :decode_rows], *parts[:, decode_rows:]]), kv

    def pages(self, backend: str, pieces: list[Any]) -> Any:
        """Pages on every shard of what each holds in canonical form."""
        pools = []
        for rows in pieces:
            kv = attention.allocate(self.case.spec, len(rows.values), backend=backend, q_heads=self.case.q_heads)
            pools.append(attention.write_pages(kv, jnp.arange(len(rows.values)), rows))
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *pools)


def _by_shard(x: jax.Array, decode_rows: int, shards: int) -> jax.Array:
    """`x [tokens, ...]` as shards have it, one after the other: all decode rows, then a part of the others."""
    parts = jnp.split(x[decode_rows:], shards)
    return jnp.concatenate([rows for part in parts for rows in (x[:decode_rows], part)])


def spread_run(backend: str, case: Case, shards: int, heads: bool = True) -> tuple[Inputs, Outcome, Outcome]:
    """A case's inputs, what a context group makes of them, and what the reference does on one device."""
    inputs, expected = cases.oracle(case, 0)
    group = Group(case, shards, heads)
    pieces = cases.spread(group.case, inputs)
    shared = replace(inputs, ragged=replace(pieces[0].inputs.ragged, page_stride=1, page_offset=None))
    out, kv = group.attend(shared, group.pages(backend, [piece.inputs.pages for piece in pieces]))
    after = cases.dequantized(inputs.pages).copy()
    num_pages = len(pieces[0].inputs.pages.values)
    for shard, piece in enumerate(pieces):
        found = cases.dequantized(attention.read_pages(kv, shard * num_pages + jnp.arange(1, num_pages)))
        after[piece.home] = found[: len(piece.home)]
        assert np.isnan(found[len(piece.home) :]).all(), "pages of nobody were written"
    return inputs, Outcome(out, expected.lse, after[1:]), expected


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        *((name, 4) for name in CASES),
        *(("mixed-mha-window-sinks", shards) for shards in (2, 8)),
        *(pytest.param(name, shards, marks=pytest.mark.slow) for name in MORE for shards in (2, 8)),
    ],
)
def test_one_device_and_many_agree(name: str, shards: int) -> None:
    case = CASES[name]
    inputs, outcome, expected = spread_run("xla", case, shards)
    cases.compare(case, inputs, outcome, expected)
    if "float32" == case.dtype == (case.kv_dtype or case.dtype):
        assert np.abs(outcome.out - expected.out).max() <= FLOAT32 * max(1e-30, np.abs(expected.out).max())


@pytest.mark.parametrize("backend", [NATIVE, "reference"])
@pytest.mark.parametrize(("name", "shards"), [("mixed", 4), ("mixed-mha-window-sinks", 2), ("mixed-bf16", 8)])
def test_other_backends_agree(name: str, shards: int, backend: str) -> None:
    heads = backend != "reference"  # its pages have heads elsewhere
    inputs, outcome, expected = spread_run(backend, CASES[name], shards, heads)
    cases.compare(CASES[name], inputs, outcome, expected)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("xla", "float32"), pytest.param("llvm_cpu", "bfloat16", marks=NATIVE.marks)]
)
def test_bits_depend_neither_on_chunks_nor_on_decoding(backend: str, dtype: str) -> None:
    """A query's result is the same prefilled in one go, in a later chunk, in any shard's block, and decoded."""
    case = Case(prefill=((0, 300),), head_dim=16, dtype=dtype, window=200)
    group, inputs = Group(case, 4), cases.build(case)
    pieces = cases.spread(group.case, inputs)
    inputs = replace(inputs, ragged=replace(pieces[0].inputs.ragged, page_stride=1, page_offset=None))
    whole, kv = group.attend(inputs, group.pages(backend, [piece.inputs.pages for piece in pieces]))
    for before in (128, 200, 296):
        rest = replace(inputs, **{name: getattr(inputs, name)[before:] for name in "qkv"})
        rest.ragged = replace(
            inputs.ragged,
            q_start=jnp.array([0, 300 - before], jnp.int32),
            q_position=inputs.ragged.q_position[before:],
        )
        np.testing.assert_array_equal(group.attend(rest, kv)[0], whole[before:])
    last = replace(inputs, **{name: getattr(inputs, name)[299:] for name in "qkv"})
    last.ragged = replace(
        inputs.ragged,
        q_start=jnp.array([0, 1], jnp.int32),
        q_position=inputs.ragged.q_position[299:],
        num_decode_seqs=1,
    )
    np.testing.assert_array_equal(group.attend(last, kv)[0], whole[299:])


SLOTS, COLUMNS = 2, 34  # sequences, and pages that each may have
PREFILL = 512  # tokens, with padding, of a step that has any


@pytest.mark.parametrize("window", [None, 150])
def test_a_sequence_larger_than_a_pool_in_chunks(window: int | None) -> None:
    """Two sequences, one of more pages than a shard holds, through chunks, mixed steps and decoding."""
    case = Case(head_dim=16, window=window)
    group, rng = Group(case, 4), np.random.default_rng(0)
    single = attention.allocate(case.spec, 1 + SLOTS * COLUMNS, backend="xla")
    here = jnp.arange(1, 1 + SLOTS * COLUMNS, dtype=jnp.int32).reshape(SLOTS, COLUMNS)
    # column c of a slot: the next page number that is free on shard c % 4
    local = 1 + np.arange(COLUMNS) // 4 + np.arange(SLOTS)[:, None] * -(-COLUMNS // 4)
    num_pages = 1 + int(local.max())
    assert num_pages < COLUMNS  # a shard alone could not hold the longer sequence
    spread = group.pages("xla", [attention.read_pages(single, jnp.zeros(num_pages, jnp.int32))] * 4)
    attend = jax.jit(partial(attention.attend, window=window))
    rows = [0, 0]
    steps: list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = [
        ((), ((0, 256),)),
        ((), ((0, 244), (1, 12))),
        ((), ((0, 500), (1, 12))),
        ((0,), ((1, 53),)),
        ((0,), ((1, 3),)),
        ((0, 1), ()),
        ((0, 1), ()),
    ]
    for decoding, chunks in steps:
        inputs = _step(case, rows, decoding, chunks, rng)
        for seq in decoding:
            rows[seq] += 1
        for seq, count in chunks:
            rows[seq] += count
        slots = np.array([*range(SLOTS)] * (2 if chunks else 1))
        ragged = replace(inputs.ragged, page_table=here[slots])
        expected, _, single = attend(inputs.q, inputs.k, inputs.v, single, ragged)
        shared = replace(inputs, ragged=replace(ragged, page_table=jnp.asarray(local[slots], jnp.int32)))
        found, spread = group.attend(shared, spread)
        np.testing.assert_allclose(found, expected, atol=FLOAT32 * float(jnp.abs(expected).max()), rtol=0)
    assert rows == [1004, 82]


def _step(
    case: Case,
    rows: list[int],
    decoding: tuple[int, ...],
    chunks: tuple[tuple[int, int], ...],
    rng: np.random.Generator,
) -> Inputs:
    """One step's arguments, without a page table: a decode row per slot and, where there are chunks, one of each."""
    kv_len = [rows[slot] + 1 if slot in decoding else 0 for slot in range(SLOTS)]
    position = [max(0, n - 1) for n in kv_len]
    counts = [dict(chunks).get(slot, 0) for slot in range(SLOTS if chunks else 0)]
    for slot, count in enumerate(counts):
        kv_len.append(rows[slot] + count if count else 0)
        position += range(rows[slot], rows[slot] + count)
    padding = PREFILL - sum(counts) if chunks else 0
    ends = SLOTS + np.cumsum([0, *counts])
    ragged = Ragged(
        q_start=jnp.asarray([*range(SLOTS), *ends], jnp.int32),
        kv_len=jnp.asarray(kv_len, jnp.int32),
        page_table=jnp.zeros((len(kv_len), COLUMNS), jnp.int32),
        q_position=jnp.asarray(position + [0] * padding, jnp.int32),
        num_decode_seqs=SLOTS,
    )
    tokens = len(position) + padding
    q, k, v = (
        jnp.asarray(rng.standard_normal((tokens, heads, case.head_dim)), jnp.float32)
        for heads in (case.q_heads, case.kv_heads, case.kv_heads)
    )
    return Inputs(q, k, v, None, ragged, {"window": case.window}, np.zeros(0))  # type: ignore[arg-type]


def test_one_shard_is_plain_attention() -> None:
    case = CASES["mixed-mha-window-sinks"]
    inputs, expected = cases.oracle(case, 0)
    kv = attention.allocate(case.spec, len(inputs.pages.values), backend="xla")
    kv = attention.write_pages(kv, jnp.arange(len(inputs.pages.values)), inputs.pages)
    out, _ = context.attend(inputs.q, inputs.k, inputs.v, kv, inputs.ragged, axes=(), shards=1, **inputs.options)
    np.testing.assert_allclose(out, expected.out, atol=2e-5)


@pytest.mark.parametrize(("rows", "tokens"), [(5, 20), (0, 0), (3, 12)])
def test_tokens_that_do_not_divide_are_named(rows: int, tokens: int) -> None:
    ragged = Ragged(
        q_start=jnp.zeros(2, jnp.int32),
        kv_len=jnp.zeros(1, jnp.int32),
        page_table=jnp.zeros((1, 4), jnp.int32),
        q_position=jnp.zeros(tokens, jnp.int32),
    )
    kv = attention.allocate(Case().spec, 3, backend="xla")
    q = jnp.zeros((rows, 4, 64))
    with pytest.raises(ValueError, match="ragged is for pages over 1 devices, not over 2: spread makes it"):
        context.attend(q, None, None, kv, ragged, axes=("context",), shards=2)
    ragged = replace(ragged, page_stride=2)
    with pytest.raises(
        ValueError, match=rf"{rows} rows of q are not 0 decode rows and one of 2 equal parts of {tokens}"
    ):
        context.attend(q, None, None, kv, ragged, axes=("context",), shards=2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decode", {"all_gather": 1}),
        ("prefill", {"all_gather": 1, "ppermute": 1, "all_to_all": 1}),  # the permute is in the ring's loop
        ("mixed", {"all_gather": 1, "ppermute": 1, "all_to_all": 1}),
    ],
)
def test_a_call_has_few_collectives(name: str, expected: dict[str, int]) -> None:
    case = CASES[name]
    group, inputs = Group(case, 8), cases.build(case)
    kv = group.pages("xla", [piece.inputs.pages for piece in cases.spread(group.case, inputs)])
    text = str(jax.make_jaxpr(lambda kv: group.program(inputs)(*group.arguments(inputs), kv))(kv))
    found = {name: text.count(f" {name}[") for name in ("all_gather", "ppermute", "all_to_all", "psum", "pmax")}
    assert {name: count for name, count in found.items() if count} == expected


@pytest.mark.accelerators
@pytest.mark.parametrize(
    "name", ["v6e:2x2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"))]
)
@pytest.mark.parametrize("prefill", [0, 2048])
def test_on_tpus_queries_travel_while_the_kernel_runs_and_no_page_is_copied(name: str, prefill: int) -> None:
    """A whole slice as one context group: 64 decode rows and, or not, prefill tokens."""
    piece = Slice.parse(name)
    shards = piece.num_devices
    mesh = Mesh(np.array(topology.devices_of(piece)), ("context",))
    shape = lambda *size, dtype=jnp.int32, split=(): jax.ShapeDtypeStruct(
        size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*split))
    )
    by_device = lambda rows, *rest, dtype=jnp.bfloat16: shape(shards * rows, *rest, dtype=dtype, split=("context",))
    spec, decode, seqs = KVSpec(2, 128, 128), 64, 64 + (4 if prefill else 0)
    rows = decode + prefill // shards
    ragged = Ragged(shape(seqs + 1), shape(seqs), shape(seqs, 256), shape(decode + prefill), num_decode_seqs=decode)
    pool = jax.eval_shape(partial(attention.allocate, spec, 515, backend="mosaic_tpu", device=piece.device))
    kv = jax.tree.map(lambda x: by_device(*x.shape, dtype=x.dtype), pool)

    def call(q: Any, k: Any, v: Any, kv: Any, ragged: Ragged) -> Any:
        group = {"axes": ("context",), "shards": shards}
        return context.attend(q, k, v, kv, context.spread(ragged, **group), **group)

    split = PartitionSpec("context")
    program = jax.shard_map(
        call, mesh=mesh, in_specs=(split,) * 4 + (PartitionSpec(),), out_specs=(split, split), check_vma=False
    )
    with topology.targeting(piece.device, mesh):
        new = by_device(rows, 2, 128)
        lowered = jax.jit(program, donate_argnums=3).lower(by_device(rows, 8, 128), new, new, kv, ragged)
    result = topology.compile_lowered(lowered, piece.device)
    assert [result.copies_of(x.shape) for x in jax.tree.leaves(pool)] == [[]]
    assert result.aliased_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
    found = traffic.collectives(result.program)
    kinds = Counter(collective.kind for collective in found)
    assert kinds == ({"all-gather": 1, "collective-permute": 1, "all-to-all": 1} if prefill else {"all-gather": 1})
    for collective in found:
        if collective.kind == "collective-permute":
            assert collective.is_async and collective.beside


def test_what_the_first_shard_chose_is_what_all_have() -> None:
    """Their own tokens may differ, where a network adds each group's sums in another order."""
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    parallel = parallel_of(mesh, 8, ())

    def chosen() -> Any:
        device = sum(place * lax.axis_index(name) for name, place in (("data", 100), ("context", 10), ("tensor", 0)))
        own = {"tokens": jnp.array([device, 7 + device]), "bad": jnp.array([device % 100 == 0, device % 100 == 10])}
        return jax.tree.map(lambda x: x[None], parallel.of_first_context(own))

    told = jax.jit(mesh.run(chosen, (), mesh.by_device))()
    assert told["bad"].dtype == bool and told["bad"].tolist() == [[True, False]] * 8
    assert told["tokens"].tolist() == [[0, 7]] * 4 + [[100, 107]] * 4
    assert parallel_of(None, 8, ()).of_first_context(told) is told
