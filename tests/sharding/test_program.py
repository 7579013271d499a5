"""What is read from a compiled program's text: loops, collectives and what runs beside them, copies of arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import devices
from sharding import copies, topology, traffic
from sharding.hlo import ArrayShape, Module
from sharding.program import Program
from sharding.tpu_slice import Slice, arranged

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8, frontend_attributes={}\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""
DOT = """%product (p: bf16[64,128], q: bf16[128,32]) -> bf16[64,32] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,32]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf
}

"""


def entry(*lines: str, before: str = "") -> Program:
    """A program whose entry has these lines, the last of them its root."""
    body = "\n".join(f"  {'ROOT ' if line is lines[-1] else ''}{line}" for line in lines)
    return Program(f"{HEADER}{before}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def the_only(program: Program) -> traffic.Collective:
    [collective] = traffic.collectives(program)
    return collective


# ---- the grammar


def test_an_instruction_with_a_nested_tuple_tiles_and_spaces() -> None:
    program = entry(
        "%x = f32[8]{0} parameter(0)",
        "%s = ((bf16[2048,1024]{1,0:T(8,128)(2,1)}), /*index=1*/bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) "
        'slice-start(%x), slice={[0:512], [0:1024]}, metadata={op_name="state.a[\\"b\\"]"}',
    )
    line = program.module.entry.root
    assert (line.name, line.opcode, line.operands) == ("s", "slice-start", ("x",))
    assert line.arrays == (
        ArrayShape("bf16", (2048, 1024)),
        ArrayShape("bf16", (512, 1024), 1),
        ArrayShape("s32", (), 2),
    )
    assert line.source == 'state.a["b"]'
    assert line.num_bytes == 2048 * 1024 * 2 + 512 * 1024 * 2 + 4


@pytest.mark.parametrize(
    ("dtype", "size", "num_bytes"), [("s4", 3, 2), ("pred", 3, 3), ("f8e4m3fn", 5, 5), ("bf16", 5, 10), ("u32", 2, 8)]
)
def test_sizes_of_element_types(dtype: str, size: int, num_bytes: int) -> None:
    assert ArrayShape(dtype, (size,)).num_bytes == num_bytes


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        Module.parse("module @jit_f {\n}\n")


# ---- one collective


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", 4),
        ("mesh['data'=2,'tensor'=4] {'tensor'}", 4),
        ("mesh['data'=2,'tensor'=4] {'data','tensor'}", 8),
        ("mesh['data'=2,'tensor'=4] {'tensor':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_who_takes_part(groups: str, size: int) -> None:
    program = entry(
        "%x = f32[8]{0} parameter(0)",
        f"%r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add",
        before=ADD,
    )
    assert the_only(program).group_size == size


@pytest.mark.parametrize(
    ("pairs", "size"),
    [("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", 4), ("{{0,1},{1,0}}", 2), ("{{0,1},{1,2}}", 3)],
)
def test_a_permute_travels_round_its_ring(pairs: str, size: int) -> None:
    line = f"%r = f32[8]{{0}} collective-permute(%x), source_target_pairs={pairs}"
    found = the_only(entry("%x = f32[8]{0} parameter(0)", line))
    assert (found.group_size, found.payload_bytes, found.sent_bytes) == (size, 32, 32)


@pytest.mark.parametrize(
    ("line", "kind", "payload", "sent"),
    [
        ("f32[8]{0} all-reduce(%x)", "all-reduce", 32, 2 * 7 / 8 * 32),
        ("(f32[8]{0}, f32[8]{0}) all-reduce(%x, %x)", "all-reduce", 64, 2 * 7 / 8 * 64),
        ("f32[64]{0} all-gather(%x), dimensions={0}", "all-gather", 256, 7 / 8 * 256),
        ("f32[1]{0} reduce-scatter(%x), dimensions={0}", "reduce-scatter", 32, 7 / 8 * 32),
        ("f32[8]{0} all-to-all(%x), dimensions={0}", "all-to-all", 32, 7 / 8 * 32),
    ],
)
def test_bytes_of_each_kind(line: str, kind: str, payload: int, sent: float) -> None:
    found = the_only(entry("%x = f32[8]{0} parameter(0)", f"%r = {line}, replica_groups={{{{0,1,2,3,4,5,6,7}}}}"))
    assert (found.kind, found.payload_bytes, found.sent_bytes) == (kind, payload, sent)


def test_an_all_reduce_of_which_each_keeps_a_part_is_a_reduce_scatter() -> None:
    fused = """%all-reduce-scatter (input: f32[64]) -> f32[8] {
  %input = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %at = u32[] constant(8)
  ROOT %own = f32[8]{0} dynamic-slice(%all-reduce.1, %at), dynamic_slice_sizes={8}
}

"""
    program = entry(
        "%x = f32[64]{0} parameter(0)",
        "%r = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        before=ADD + fused,
    )
    found = the_only(program)
    assert (found.name, found.kind, found.payload_bytes, found.is_async) == ("r", "reduce-scatter", 256, False)


# ---- what runs beside one


PAIRS = "source_target_pairs={{0,1},{1,0}}"
START = f"%s = (f32[8]{{0}}, f32[8]{{0:S(1)}}, u32[]{{:S(2)}}) collective-permute-start(%x), {PAIRS}"
DONE = "%d = f32[8]{0} collective-permute-done(%s)"
FUSED_DOT = "%f = bf16[64,32]{1,0} fusion(%l, %w), kind=kOutput, calls=%product"
KERNEL = '%k = bf16[64,32]{1,0} custom-call(%l, %w), custom_call_target="tpu_custom_call"'
OPERANDS = ("%x = f32[8]{0} parameter(0)", "%l = bf16[64,128]{1,0} parameter(1)", "%w = bf16[128,32]{1,0} parameter(2)")


@pytest.mark.parametrize(
    ("lines", "beside"),
    [
        ((START, FUSED_DOT, DONE), ("f",)),
        ((START, KERNEL, DONE), ("k",)),
        ((START, FUSED_DOT, KERNEL, DONE), ("f", "k")),
        ((START, DONE, FUSED_DOT), ()),
        ((FUSED_DOT, START, "%n = f32[8]{0} negate(%x)", DONE), ()),
        ((START, '%k = bf16[64,32]{1,0} custom-call(%l), custom_call_target="ConcatBitcast"', DONE), ()),
    ],
)
def test_what_is_computed_between_start_and_done(lines: tuple[str, ...], beside: tuple[str, ...]) -> None:
    found = the_only(entry(*OPERANDS, *lines, before=DOT))
    assert (found.is_async, found.beside) == (True, beside)
    assert traffic.overlap([found]) == (1.0 if beside else 0.0)


def test_where_instructions_are_in_no_order_nothing_is_known_to_overlap() -> None:
    text = HEADER.replace("is_scheduled=true, ", "") + DOT
    body = "\n".join(f"  {line}" for line in (*OPERANDS, START, FUSED_DOT, f"ROOT {DONE}"))
    program = Program(f"{text}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n")
    assert the_only(program).beside == ()


def test_one_taken_over_by_another_core_begins_when_it_has_its_data() -> None:
    called = """%called (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %all-reduce.9 = f32[8]{0} all-reduce(%c), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

"""
    start = '%s = ((), (), s32[]{:S(2)}) call-start(), async_execution_thread="sparsecore", to_apply=%called'
    update = "%u = ((f32[8]{0}), f32[8]{0}) call-update(%s, %x)"
    done = "%d = f32[8]{0} call-done(%u)"
    early = the_only(entry(*OPERANDS, start, FUSED_DOT, update, done, before=ADD + DOT + called))
    late = the_only(entry(*OPERANDS, start, update, FUSED_DOT, done, before=ADD + DOT + called))
    assert (early.kind, early.payload_bytes, early.beside, late.beside) == ("all-reduce", 32, (), ("f",))


def test_one_carried_out_step_by_step_inside_fusions_counts_once() -> None:
    part = "all-reduce(%i), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add"
    config = 'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'
    fused = f"""%begin (i: f32[8]) -> (f32[8], u32[]) {{
  %i = f32[8]{{0}} parameter(0)
  %all-reduce.1 = f32[8]{{0}} {part}, {config}
  ROOT %c = (f32[8]{{0}}, u32[]{{:S(2)}}) custom-call(%all-reduce.1), custom_call_target="AsyncCollectiveStart"
}}

%go_on (i: f32[8], t: u32[], p: bf16[64,128], q: bf16[128,32]) -> (bf16[64,32], f32[8], u32[]) {{
  %i = f32[8]{{0}} parameter(0)
  %t = u32[]{{:S(2)}} parameter(1)
  %p = bf16[64,128]{{1,0}} parameter(2)
  %q = bf16[128,32]{{1,0}} parameter(3)
  %convolution.2 = bf16[64,32]{{1,0}} convolution(%p, %q), dim_labels=bf_io->bf
  %all-reduce.2 = f32[8]{{0}} {part}, {config}
  ROOT %r = (bf16[64,32]{{1,0}}, f32[8]{{0}}, u32[]{{:S(2)}}) tuple(%convolution.2, %all-reduce.2, %t)
}}

%finish (i: f32[8], t: u32[]) -> f32[8] {{
  %i = f32[8]{{0}} parameter(0)
  %t = u32[]{{:S(2)}} parameter(1)
  %all-reduce.3 = f32[8]{{0}} {part}, {config}
  ROOT %c = f32[8]{{0}} custom-call(%all-reduce.3, %t), custom_call_target="AsyncCollectiveDone"
}}

"""
    found = the_only(
        entry(
            *OPERANDS,
            "%s = (f32[8]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin",
            "%s0 = f32[8]{0} get-tuple-element(%s), index=0",
            "%s1 = u32[]{:S(2)} get-tuple-element(%s), index=1",
            "%f = (bf16[64,32]{1,0}, f32[8]{0}, u32[]{:S(2)}) fusion(%s0, %s1, %l, %w), kind=kOutput, calls=%go_on",
            "%f1 = f32[8]{0} get-tuple-element(%f), index=1",
            "%f2 = u32[]{:S(2)} get-tuple-element(%f), index=2",
            "%d = f32[8]{0} fusion(%f1, %f2), kind=kCustom, calls=%finish",
            before=ADD + fused,
        )
    )
    assert (found.name, found.kind, found.is_async, found.beside) == ("s", "all-reduce", True, ("f",))


# ---- programs compiled here, for eight virtual CPU devices


LAYERS, WIDTH, HIDDEN = 3, 64, 256
SPEC = PartitionSpec


def loop_of_layers(x: jax.Array, up: jax.Array, down: jax.Array, steps: jax.Array) -> jax.Array:
    """A sum per layer in every step, a ring of permutes in a loop inside it, a rare sum over the other axis."""

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, x = carry
        for _ in range(LAYERS):
            x = x + lax.psum(jax.nn.silu(x @ up) @ down, "tensor")
        ring = [(i, (i + 1) % 4) for i in range(4)]
        x = lax.fori_loop(0, 5, lambda i, y: y + lax.ppermute(y, "tensor", ring), x)
        x = lax.cond(jnp.any(x > 100), lambda y: lax.psum(y, "data"), lambda y: y, x)
        return step + 1, x

    x = lax.all_gather(x, "data", axis=0, tiled=True)
    return lax.while_loop(lambda carry: carry[0] < steps, body, (0, x))[1]


@functools.cache
def compiled_loop() -> Program:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    specs = (SPEC("data"), SPEC(None, "tensor"), SPEC("tensor", None), SPEC())
    run = jax.shard_map(loop_of_layers, mesh=mesh, in_specs=specs, out_specs=SPEC(), check_vma=False)
    shapes = [(8, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    arguments = (*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes), jax.ShapeDtypeStruct((), "int32"))
    return Program(jax.jit(run).lower(*arguments).compile().as_text() or "")


def test_collectives_of_a_program_compiled_for_this_machine() -> None:
    program = compiled_loop()
    found = {(c.kind, c.place, c.times): c for c in traffic.collectives(program)}
    count = [(c.kind, c.place) for c in traffic.collectives(program)].count(("all-reduce", "step"))
    assert program.step_loop is not None and program.module.num_devices == 8
    assert count == LAYERS
    assert found["all-reduce", "step", 1].group_size == 4
    assert found["all-reduce", "step", 1].payload_bytes == 8 * WIDTH * 4
    assert found["collective-permute", "inner loop", 5].group_size == 4
    assert found["all-reduce", "branch", 1].group_size == 2
    assert found["all-gather", "once", 1].payload_bytes == 8 * WIDTH * 4
    step = traffic.of_step(traffic.collectives(program), program)
    assert traffic.sent_bytes(step) == (LAYERS * 2 * 3 / 4 + 5) * 8 * WIDTH * 4
    assert traffic.overlap(step) == 0


def test_a_loop_of_known_length_is_no_step_loop() -> None:
    def ring(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 6, lambda i, y: y @ w, x)

    shape = jax.ShapeDtypeStruct((32, 32), "float32")
    program = Program(jax.jit(ring).lower(shape, shape).compile().as_text() or "")
    assert program.step_loop is None
    assert {program.label(place): place.trips for _, place in program.running()} == {"once": 1, "other loop": 6}


def copied(function: object, *shapes: tuple[int, ...], donate: tuple[int, ...] = ()) -> set[tuple[str, str]]:
    """(argument, place) of every copy of an argument of more than 1 KiB."""
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    text = jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text()  # type: ignore[arg-type]
    found = copies.copied_arguments(Program(text or ""), lambda name, array: array.num_bytes > 1024)
    return {(each.argument, each.place) for each in found}


def test_a_copy_of_an_argument_is_found_in_a_loop_and_outside() -> None:
    def updated(pool: jax.Array, w: jax.Array, n: jax.Array) -> jax.Array:
        return lax.fori_loop(0, jnp.int32(n[0]), lambda i, p: p.at[i].set(p[i] @ w), pool)

    assert copied(updated, (64, 32), (32, 32), (1,), donate=(0,)) == set()
    assert copied(updated, (64, 32), (32, 32), (1,)) == {("pool", "once")}

    def transposed(pool: jax.Array, w: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = lax.fori_loop(
            0, jnp.int32(n[0]), lambda i, y: y + (w @ y).sum() * w.reshape(-1)[::-1].reshape(w.shape), w
        )
        return pool.T.reshape(32, 64), kept

    assert ("pool", "once") in copied(transposed, (64, 32), (32, 32), (1,))


POOL = "bf16[512,128]{1,0:T(8,128)(2,1)}"
ALIASES = "output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}"


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (f"%c = {POOL} copy(%g)", "step"),
        (f"%c = (bf16[512,128]{{1,0}}, {POOL}, u32[]{{:S(2)}}) copy-start(%g)", "step"),
        (f"%c = (bf16[512,128]{{1,0:S(1)}}, {POOL}, u32[]{{:S(2)}}) copy-start(%g)", None),
        ("%c = bf16[128,512]{1,0} transpose(%g), dimensions={1,0}", "step"),
        ("%c = bf16[8,128]{1,0} slice(%g), slice={[0:8], [0:128]}", None),
        (f"%c = {POOL} negate(%g)", None),
    ],
)
def test_a_pool_that_a_kernel_updates_in_a_loop_is_followed_back_to_its_argument(line: str, place: str | None) -> None:
    loop = f"""%body (t: (s32[], bf16[512,128])) -> (s32[], bf16[512,128]) {{
  %t = (s32[], {POOL}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %p = {POOL} get-tuple-element(%t), index=1
  %k = (s32[], {POOL}) custom-call(%i, %p), custom_call_target="tpu_custom_call", {ALIASES}
  %g = {POOL} get-tuple-element(%k), index=1
  {line}
  ROOT %r = (s32[], {POOL}) tuple(%i, %g)
}}

%condition (t: (s32[], bf16[512,128])) -> pred[] {{
  %t = (s32[], {POOL}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %go = pred[] compare(%i, %i), direction=LT
}}

"""
    program = entry(
        "%n = s32[] parameter(0)",
        f'%pool = {POOL} parameter(1), metadata={{op_name="state.pool"}}',
        f"%start = (s32[], {POOL}) tuple(%n, %pool)",
        f"%w = (s32[], {POOL}) while(%start), condition=%condition, body=%body",
        before=loop,
    )
    found = copies.copied_arguments(program, lambda name, array: name == "state.pool")
    assert [(each.argument, each.place) for each in found] == ([("state.pool", place)] if place else [])


def test_an_array_fetched_in_slices_is_followed_too() -> None:
    """Into fast memory is no copy; from there into another layout in main memory is one."""
    halves = [
        line
        for i in (0, 1)
        for line in (
            f"%s{i} = ((s8[131072]{{0}}), s8[65536]{{0:S(1)}}, s32[]{{:S(2)}}) slice-start(%bytes), "
            f"slice={{[{65536 * i}:{65536 * (i + 1)}]}}",
            f"%d{i} = s8[65536]{{0:S(1)}} slice-done(%s{i})",
        )
    ]
    fetched = "bf16[512,128]{1,0:T(8,128)(2,1)S(1)}"
    program = entry(
        f'%w = {POOL} parameter(0), metadata={{op_name="up"}}',
        "%bytes = s8[131072]{0} bitcast(%w)",
        *halves,
        f'%j = {fetched} custom-call(%d0, %d1), custom_call_target="ConcatBitcast"',
        f"%here = {fetched} copy(%j)",
        "%c = bf16[512,128]{0,1:T(8,128)(2,1)} copy(%j)",
    )
    found = copies.copied_arguments(program, lambda name, array: name == "up")
    assert [(each.argument, each.instruction) for each in found] == [("up", "c")]


# ---- programs compiled for a TPU that is not here


@functools.cache
def tpu_mesh() -> Mesh:
    found = topology.devices_of(Slice.parse("v5e:2x4"))
    return Mesh(arranged(found, (8,)), ("tensor",))


def compiled_for_tpu(
    function: object, *specs: tuple[tuple[int, ...], PartitionSpec, str], out: PartitionSpec
) -> Program:
    mesh = tpu_mesh()
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, spec, dtype in specs
    ]
    run = jax.shard_map(function, mesh=mesh, in_specs=tuple(s for _, s, _ in specs), out_specs=out, check_vma=False)  # type: ignore[arg-type]
    device = devices.named("v5e")
    with topology.targeting(device, mesh):
        return topology.compile_lowered(jax.jit(run).lower(*arguments), device).program


@pytest.mark.accelerators
def test_a_sum_per_layer_in_a_loop_for_a_tpu() -> None:
    def loop(x: jax.Array, up: jax.Array, down: jax.Array, steps: jax.Array) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            step, x = carry
            for _ in range(LAYERS):
                x = x + lax.psum(jax.nn.silu(x @ up) @ down, "tensor")
            return step + 1, lax.cond(jnp.any(x > 100), lambda y: lax.psum(y, "tensor"), lambda y: y, x)

        return lax.while_loop(lambda carry: carry[0] < steps, body, (0, x))[1]

    program = compiled_for_tpu(
        loop,
        ((64, 1024), SPEC(), "bfloat16"),
        ((1024, 4096), SPEC(None, "tensor"), "bfloat16"),
        ((4096, 1024), SPEC("tensor", None), "bfloat16"),
        ((), SPEC(), "int32"),
        out=SPEC(),
    )
    found = [(c.kind, c.place, c.payload_bytes, c.group_size) for c in traffic.collectives(program)]
    assert found.count(("all-reduce", "step", 64 * 1024 * 2, 8)) == LAYERS
    assert found.count(("all-reduce", "branch", 64 * 1024 * 2, 8)) == 1
    assert len(found) == LAYERS + 1
    weights = copies.copied_arguments(program, lambda name, array: name in ("up", "down"))
    assert weights == [], "prefetching into VMEM is no copy in memory"


@pytest.mark.accelerators
def test_a_ring_of_permutes_for_a_tpu_has_products_beside_it() -> None:
    def ring(x: jax.Array, w: jax.Array) -> jax.Array:
        parts = []
        for _ in range(8):
            following = lax.ppermute(x, "tensor", [(i, (i + 1) % 8) for i in range(8)])
            parts.append(x @ w)
            x = following
        return jnp.concatenate(parts)

    program = compiled_for_tpu(
        ring,
        ((8192, 2048), SPEC("tensor", None), "bfloat16"),
        ((2048, 32768), SPEC(None, "tensor"), "bfloat16"),
        out=SPEC(None, "tensor"),
    )
    found = traffic.collectives(program)
    assert {(c.kind, c.payload_bytes, c.group_size, c.is_async) for c in found} == {
        ("collective-permute", 1024 * 2048 * 2, 8, True)
    }
    assert len(found) == 7  # what the last step sends, nobody reads
    assert traffic.overlap(found) == 1


@pytest.mark.accelerators
def test_a_gather_that_waits_has_nothing_beside_it() -> None:
    def gathered(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.all_gather(x, "tensor", axis=0, tiled=True) @ w

    program = compiled_for_tpu(
        gathered,
        ((8192, 1024), SPEC("tensor", None), "bfloat16"),
        ((1024, 8192), SPEC(None, "tensor"), "bfloat16"),
        out=SPEC(None, "tensor"),
    )
    found = the_only(program)
    assert (found.kind, found.payload_bytes, found.beside) == ("all-gather", 8192 * 1024 * 2, ())
