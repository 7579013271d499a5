"""Pipelines: who works on what at each tick, what goes from stage to stage, and batches cut into micro-batches."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinfer.forward import Batch, micro_batch, unless
from pallas_kernels import attention
from pallas_kernels.attention import KVSpec, Ragged
from sharding.mesh import DeviceMesh, make_mesh
from sharding.mesh_config import MeshConfig
from sharding.parallel import Parallel
from sharding.pipeline import Pipeline
from sharding.shards import Shards
from sharding.vocabulary import Vocabulary

PAGE, PAGES_PER_SEQ = 8, 4


# ---- batches cut into parts


@dataclass(frozen=True)
class Layout:
    """Sequences of a mixed batch: rows held by each decode one (0: unused), (rows before, new tokens) of each chunk."""

    decode: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    padding: int

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.chunks) + self.padding

    def batch(self) -> Batch:
        """Token and length of a row say which it is; page tables say whose."""
        rows, total = len(self.decode), len(self.decode) + self.num_tokens
        positions = np.zeros(total, np.int32)
        positions[:rows] = [max(held - 1, 0) for held in self.decode]
        ends = np.cumsum([length for _, length in self.chunks], dtype=np.int32)
        for (before, length), end in zip(self.chunks, ends, strict=True):
            positions[rows + end - length : rows + end] = before + np.arange(length)
        seqs = rows + len(self.chunks)
        ragged = Ragged(
            q_start=np.concatenate([np.arange(rows + 1), rows + ends]).astype(np.int32),
            kv_len=np.array([*self.decode, *(before + n if n else 0 for before, n in self.chunks)], np.int32),
            page_table=np.arange(1, 1 + seqs * PAGES_PER_SEQ, dtype=np.int32).reshape(seqs, PAGES_PER_SEQ),
            q_position=positions,
            width=1,
            num_decode_seqs=rows,
        )
        ids = np.arange(total, dtype=np.int32)
        return jax.tree.map(jnp.asarray, Batch(ids, positions, 1000 + ids, (ragged,)))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout, and a number of parts that divides its decode rows and its tokens; of few shapes, as each compiles."""
    count = draw(st.sampled_from([1, 2, 3]))
    rows, left = count * draw(st.sampled_from([0, 2])), count * 6
    decode = draw(st.lists(st.integers(0, 30), min_size=rows, max_size=rows))
    lengths = []
    for _ in range(4):
        lengths.append(draw(st.integers(0, min(left, 20))))
        left -= lengths[-1]
    chunks = [(draw(st.integers(0, 10)) if length else 0, length) for length in lengths]
    return Layout(tuple(decode), tuple(chunks), left), count


CUT = Layout((5, 0, 9, 1), ((3, 11), (0, 0), (0, 1), (7, 8)), 4)  # borders at 6, 12, 18: two chunks are cut, one twice


def facts(batch: Batch) -> dict[int, tuple[int, ...]]:
    """Of each token that belongs to a sequence: position (it sees the rows up to that), length, first page."""
    [ragged] = batch.ragged
    starts, held, tables = (np.asarray(x) for x in (ragged.q_start, ragged.kv_len, ragged.page_table))
    tokens, positions, lengths, at = (np.asarray(x) for x in (*batch[:3], ragged.q_position))
    found = {}
    for seq in range(len(held)):
        count = starts[seq + 1] - starts[seq]
        if not held[seq]:
            assert seq < ragged.num_decode_seqs or count == 0, "tokens of an unused sequence"
            continue
        for offset, row in enumerate(range(starts[seq], starts[seq + 1])):
            assert positions[row] == held[seq] - count + offset == at[row]
            found[int(tokens[row])] = (int(positions[row]), int(lengths[row]), int(tables[seq, 0]))
    return found


@partial(jax.jit, static_argnums=1)
def cut(batch: Batch, count: int) -> list[Batch]:
    return [micro_batch(batch, jnp.int32(index), count) for index in range(count)]


@given(layouts())
@settings(max_examples=150)
def test_parts_say_of_every_token_what_the_batch_says(case: tuple[Layout, int]) -> None:
    layout, count = case
    batch = layout.batch()
    parts = jax.tree.map(np.asarray, cut(batch, count))
    sizes = {part.tokens.shape[0] for part in parts}
    assert sizes == {len(layout.decode) // count + layout.num_tokens // count}
    assert {part.decode_rows for part in parts} == {len(layout.decode) // count}
    merged: dict[int, tuple[int, ...]] = {}
    for part in parts:
        ours = facts(part)
        assert not merged.keys() & ours.keys()
        merged |= ours
    assert merged == facts(batch)
    order = [int(token) for part in parts for token in part.tokens[part.decode_rows :]]
    assert order == list(range(len(layout.decode), len(layout.decode) + layout.num_tokens))


def test_a_chunk_that_borders_cut_grows_from_part_to_part() -> None:
    parts = cut(CUT.batch(), 4)
    held = [part.ragged[0].kv_len.tolist() for part in parts]
    assert held == [[5, 9, 0, 0, 0], [0, 14, 0, 1, 0], [9, 0, 0, 0, 13], [1, 0, 0, 0, 15]]
    starts = [part.ragged[0].q_start.tolist() for part in parts]
    assert starts == [[0, 1, 7, 7, 7, 7], [0, 1, 6, 6, 7, 7], [0, 1, 1, 1, 1, 7], [0, 1, 1, 1, 1, 3]]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_over_the_parts_is_attention_over_the_batch(count: int, window: int | None) -> None:
    """Part after part, each over the pages that those before wrote."""
    batch, spec = CUT.batch(), KVSpec(2, 16, PAGE, jnp.float32)
    total, seqs = batch.tokens.shape[0], batch.ragged[0].kv_len.shape[0]
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (total, 4, 16))
    k, v = (jax.random.normal(key, (total, 2, 16)) for key in keys[1:3])
    empty = attention.allocate(spec, 1 + seqs * PAGES_PER_SEQ, backend="reference")
    rows = jax.random.normal(keys[3], (1 + seqs * PAGES_PER_SEQ, PAGE, 2, 2, 16))
    filled = attention.write_pages(empty, jnp.arange(len(rows)), attention.PageRows(rows))
    attend = jax.jit(partial(attention.attend, window=window))
    whole, _, _ = attend(q, k, v, filled, batch.ragged[0])
    kv, outs = filled, {}
    for part in cut(batch, count):
        out, _, kv = attend(q[part.tokens], k[part.tokens], v[part.tokens], kv, part.ragged[0])
        outs |= dict(zip(part.tokens.tolist(), out, strict=True))
    used = sorted(facts(batch))
    np.testing.assert_allclose([outs[token] for token in used], whole[jnp.asarray(used)], atol=1e-6)


def test_an_idle_part_uses_no_sequence() -> None:
    batch = CUT.batch()
    assert facts(unless(batch, jnp.bool(False))) == facts(batch)
    idle = unless(batch, jnp.bool(True))
    assert not idle.ragged[0].kv_len.any() and idle.tokens is batch.tokens


def test_padding_belongs_to_nobody() -> None:
    batch = CUT.batch()
    total = batch.tokens.shape[0]
    padded = batch.padded(total + 5)
    assert all(x.shape[0] == total + 5 for x in padded[:3]) and padded.ragged[0].q_position.shape[0] == total + 5
    assert facts(padded) == facts(batch) and padded.lengths.min() >= 1
    assert batch.padded(total) is batch


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 4), st.integers(1, 70))
def test_steps_are_as_small_as_every_split_allows(
    stages: int, context: int, group: int, rows_per_stage: int, tokens: int
) -> None:
    rows = stages * rows_per_stage
    split = Parallel(
        vocabulary=Vocabulary(9), prefill=TokensOf(group), pipeline=Pipeline(("pipe",), stages), context=context
    )

    def fits(size: int) -> bool:
        return size % (stages * context) == 0 and (rows_per_stage + size // (stages * context)) % group == 0

    found = split.rows_per_step(rows, tokens)
    assert found >= tokens and fits(found)
    assert not any(fits(size) for size in range(tokens, found))


class TokensOf(Shards):
    """Shards that split tokens over so many devices."""

    def __init__(self, count: int):
        super().__init__(axes={"heads": ("tensor",)}, counts={"tensor": count}, split_tokens=True)


# ---- stages


def mesh_of(stages: int) -> tuple[DeviceMesh, Pipeline]:
    mesh = make_mesh(MeshConfig(pipe=stages, tensor=2 if stages < 8 else 1))
    return mesh, Pipeline(mesh.names("pipe"), stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_schedule(stages: int) -> None:
    """Each pass of each micro-batch is in every stage once, in order, a tick each; no stage has two."""
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    passes_wanted = 3
    ticks = passes_wanted * stages + stages - 1
    for stage in range(stages):
        pipeline = FixedStage(("pipe",), stages, stage)
        assert pipeline.fill_ticks() == stages - 1
        for tick in range(ticks):
            index, number = pipeline.micro_batch(tick)  # type: ignore[arg-type]
            if 0 <= number < passes_wanted:
                seen.setdefault((number, index), []).append((stage, tick))
            else:
                assert tick < stage or tick >= passes_wanted * stages + stage, "idle only while filling and draining"
            if stage == stages - 1:
                assert pipeline.leaving(tick) == (index, number)  # type: ignore[arg-type]
    assert sorted(seen) == [(number, index) for number in range(passes_wanted) for index in range(stages)]
    for (number, index), visits in seen.items():
        entered = number * stages + index
        assert visits == [(stage, entered + stage) for stage in range(stages)]


@dataclass(frozen=True)
class FixedStage(Pipeline):
    """A pipeline as one stage sees it, outside of any mesh."""

    at: int = 0

    @property
    def stage(self) -> int:
        return self.at


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_streams_go_through_all_stages_in_order(stages: int) -> None:
    """A stage multiplies by ten and adds its number; micro-batches differ in their first digit."""
    mesh, pipeline = mesh_of(stages)
    whole = mesh.everywhere

    def program() -> Any:
        def tick(t: jax.Array, carry: Any) -> Any:
            received, results = carry
            begun = pipeline.first_or({"x": jnp.float32(1 + t)}, received)
            stream = {"x": begun["x"] * 10 + pipeline.stage}
            index, passes = pipeline.leaving(t)
            out = pipeline.of_last(stream)["x"]
            results = jnp.where((jnp.arange(stages) == index) & (passes == 0), out, results)
            return pipeline.pass_on(stream), results

        start = ({"x": jnp.float32(0)}, jnp.zeros(stages))
        _, results = lax.fori_loop(0, stages + pipeline.fill_ticks(), tick, start)
        return results, pipeline.sum(jnp.int32(1)), pipeline.pass_on(jnp.float32(7)) * 1.0

    place = (whole, whole, mesh.sharding())
    results, total, _ = jax.jit(mesh.run(program, (), place))()
    expected = []
    for batch in range(stages):
        value = 1.0 + batch
        for stage in range(stages):
            value = value * 10 + stage
        expected.append(value)
    np.testing.assert_allclose(results, expected, rtol=1e-6)
    assert total == stages


@pytest.mark.parametrize("stages", [2, 4])
def test_what_is_passed_on_comes_from_the_stage_before(stages: int) -> None:
    mesh, pipeline = mesh_of(stages)
    by_stage = mesh.sharding(mesh.names("pipe"))

    def program() -> jax.Array:
        return pipeline.pass_on(jnp.full((1,), pipeline.stage + 1.0))

    found = jax.jit(mesh.run(program, (), by_stage))()
    np.testing.assert_array_equal(found, np.arange(stages, dtype=np.float32))  # and the first stage gets zero


def test_one_stage_is_none() -> None:
    pipeline = Pipeline()
    assert (pipeline.stage, pipeline.fill_ticks()) == (0, 0)
    x = tick = jnp.arange(3)
    for micro_batch_of in (pipeline.micro_batch, pipeline.leaving):
        index, passes = micro_batch_of(tick)
        assert not index.any() and (passes == tick).all()
    assert pipeline.sum(x) is x
