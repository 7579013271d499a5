"""`attend` on every backend against the reference, with shuffled pages, NaN where nothing may be read, odd shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention, devices, tensors
from pallas_kernels.attention import KVSpec, PageRows, Ragged, UnsupportedError, storage, strided
from pallas_kernels.attention.cases import CASES, Case, build, check, dequantized, oracle, spread
from pallas_kernels.attention.cases import run as run_case
from pallas_kernels.dispatch import BackendError
from pallas_kernels.native import jit

NATIVE = pytest.param("llvm_cpu", marks=pytest.mark.skipif(jit.unavailable() is not None, reason="no native kernels"))
NATIVE_DTYPES = [pytest.param("llvm_cpu", dtype, marks=NATIVE.marks) for dtype in ("float32", "bfloat16")]
BACKENDS = ["xla", NATIVE]


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    check("xla", CASES[name])


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("name", CASES)
def test_native_case(name: str, backend: str) -> None:
    case = CASES[name]
    reason = attention.OP.refuse(backend, spec=case.spec, q_heads=case.q_heads, device=devices.current())
    if reason is None:
        check(backend, case)
    else:
        assert case.spec.quantized or case.page_size < 4, reason


@pytest.mark.parametrize("backend", [NATIVE])
def test_the_native_kernel_refuses_by_name(backend: str) -> None:
    for spec, words in ((KVSpec(2, 16, 1), "page_size 1 must be"), (KVSpec(2, 24, 32), "head_dim 24 must be")):
        with pytest.raises(BackendError, match=words):
            attention.allocate(spec, 4, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(
    decode=st.lists(st.integers(0, 150), max_size=3),
    prefill=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 80)), max_size=3),
    heads=st.sampled_from([(2, 2), (4, 2), (5, 1)]),
    page_size=st.sampled_from([8, 32, 128]),
    window=st.sampled_from([None, 1, 40]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_mix(backend, decode, prefill, heads, page_size, window, padding, seed) -> None:
    case = Case(
        decode=tuple(decode),
        prefill=tuple(prefill),
        q_heads=heads[0],
        kv_heads=heads[1],
        page_size=page_size,
        window=window,
        padding=padding,
    )
    if any(decode) or any(n for _, n in prefill):
        check(backend, case, seed)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (8, 1)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("backend", "dtype"), [("xla", "float32"), ("xla", "bfloat16"), *NATIVE_DTYPES])
def test_bits_do_not_depend_on_the_batch(backend: str, dtype: str, heads: tuple[int, int], window: int | None) -> None:
    """A token's output is bit-identical decoded alone, decoded among others, or prefilled in any chunk."""
    run = partial(run_case, invariant=(backend, dtype) == ("xla", "bfloat16"))  # the others are so anyway
    base = Case(q_heads=heads[0], kv_heads=heads[1], head_dim=16, window=window, dtype=dtype, prefill=((0, 300),))
    inputs = build(base)
    whole = run(backend, base, inputs)
    pages = all_pages(whole.pages, dtype)
    for before, queries in ((299, 1), (170, 130), (250, 50), (128, 172)):
        chunk = replace(base, prefill=((before, queries),))
        rest = replace(inputs, pages=pages, q=inputs.q[before:], k=inputs.k[before:], v=inputs.v[before:])
        rest.ragged = replace(
            inputs.ragged,
            q_start=jnp.asarray([0, queries], jnp.int32),
            q_position=inputs.ragged.q_position[before:],
        )
        np.testing.assert_array_equal(run(backend, chunk, rest).out, whole.out[before:])
    last = replace(inputs, pages=pages)
    for slots in (1, 2, 5):
        last.q, last.k, last.v = (jnp.concatenate([x[299:]] * slots) for x in (inputs.q, inputs.k, inputs.v))
        last.ragged = Ragged(
            q_start=jnp.arange(slots + 1, dtype=jnp.int32),
            kv_len=jnp.full(slots, 300, jnp.int32).at[1:].set(0),
            page_table=jnp.repeat(inputs.ragged.page_table, slots, axis=0),
            q_position=jnp.full(slots, 299, jnp.int32),
            num_decode_seqs=slots,
        )
        np.testing.assert_array_equal(run(backend, base, last).out[0], whole.out[299])


@pytest.mark.parametrize("name", ["middle-mixed-window", "apart-mixed", "spread-decode-int8", "spread-apart-mixed"])
def test_the_oracle_itself_spreads_pages(name: str) -> None:
    check("reference", CASES[name])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=5)
@given(
    decode=st.lists(st.integers(0, 300), max_size=3),
    prefill=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 80)), max_size=2),
    page_size=st.sampled_from([8, 32, 128]),
    window=st.sampled_from([None, 1, 40, 150]),
    shards=st.sampled_from([2, 3, 5]),
    apart=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_spread(backend, decode, prefill, page_size, window, shards, apart, seed) -> None:
    case = Case(
        tuple(decode), tuple(prefill), head_dim=16, page_size=page_size, window=window, shards=shards, apart=apart
    )
    if any(decode) or any(n for _, n in prefill):
        check(backend, case, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_program_runs_on_every_device(backend: str) -> None:
    case = CASES["spread-mixed"]
    traces = []

    @jax.jit
    def call(q, k, v, kv, ragged):
        traces.append(1)
        return attention.attend(q, k, v, kv, ragged)

    for part, _ in spread(case, build(case)):
        kv = attention.allocate(case.spec, len(part.pages.values), backend=backend)
        call(part.q, part.k, part.v, kv, part.ragged)
    assert len(traces) == 1


def test_rows_that_lie_here_are_counted() -> None:
    """Against a list of them."""
    for stride, size in ((1, 4), (2, 4), (3, 1), (5, 8)):
        for offset in range(stride):
            ragged = replace(RAGGED, page_stride=stride, page_offset=jnp.int32(offset))
            here = np.arange(100) // size % stride == offset
            counted = strided.held(ragged, jnp.arange(-3, 101), size)
            np.testing.assert_array_equal(counted, [0, 0, 0, *np.cumsum([0, *here])])


def all_pages(pages: np.ndarray, dtype: str) -> PageRows:
    """An outcome's pages as a next call's input: the trash page is poison again."""
    return PageRows(jnp.asarray(np.concatenate([np.full_like(pages[:1], np.nan), pages]), jnp.dtype(dtype)))


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
def test_partials_merge_by_lse(kv_dtype: str | None) -> None:
    """Two disjoint halves of the rows, merged by their log-sum-exp, are the whole."""
    case = Case(decode=(200,), kv_dtype=kv_dtype, shared=True)
    inputs, whole = oracle(case)
    position = np.arange(inputs.ragged.page_table.shape[1] * case.page_size)
    parts = []
    for rows in (position < 100, position >= 100):
        hidden = np.where(rows, position, 10_000).astype(np.int32)  # a position nobody sees yet
        half = replace(inputs, ragged=replace(inputs.ragged, kv_position=jnp.asarray(hidden[None])))
        result = run_case("xla", case, half)
        parts.append((jnp.asarray(result.out), jnp.asarray(result.lse)))
    out, lse = attention.merge(parts)
    np.testing.assert_allclose(out, whole.out, atol=2e-5)
    np.testing.assert_allclose(lse, whole.lse, atol=2e-5)


def test_a_partial_that_saw_nothing_changes_nothing() -> None:
    out, lse = jnp.ones((2, 3, 4)), jnp.zeros((2, 3))
    nothing = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
    for parts in ([(out, lse), nothing], [nothing, (out, lse)]):
        merged = attention.merge(parts)
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    np.testing.assert_array_equal(attention.merge([nothing, nothing])[0], 0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_of_nan_is_seen_and_disturbs_nobody(backend: str, sinks: bool) -> None:
    """A query that is NaN, and a sequence one of whose keys is: their outputs are NaN, the others' as they were."""
    case = Case(decode=(40, 200, 70), prefill=((20, 5),), sinks=sinks)
    inputs, expected = oracle(case)
    broken = replace(inputs, q=inputs.q.at[0].set(jnp.nan), k=inputs.k.at[1].set(jnp.nan))
    result = run_case(backend, case, broken)
    assert np.isnan(result.out[:2]).all()
    np.testing.assert_allclose(result.out[2:], expected.out[2:], atol=2e-5)


def test_a_partial_of_nan_stays_nan() -> None:
    out, lse = jnp.ones((1, 3, 4)), jnp.zeros((1, 3))
    merged, total = attention.merge([(out, lse), (out * jnp.nan, lse * jnp.nan)])
    assert np.isnan(merged).all() and np.isnan(total).all()
    assert np.isnan(attention.with_sinks(merged, total, jnp.zeros(3))[0]).all()


@pytest.mark.parametrize("dtype", storage.DTYPES)
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_page_operations(backend: str, dtype: str) -> None:
    check_page_operations(backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), NATIVE_DTYPES)
def test_native_page_operations(backend: str, dtype: str) -> None:
    check_page_operations(backend, dtype)


def check_page_operations(backend: str, dtype: str) -> None:
    spec = KVSpec(2, 16, 4, jnp.dtype(dtype))
    kv = attention.allocate(spec, 6, backend=backend)
    rows = np.random.default_rng(0).standard_normal((2, 4, 2, 2, 16)).astype(np.float32)
    stored = (
        PageRows(*tensors.quantize_rows(rows, dtype)) if spec.quantized else PageRows(jnp.asarray(rows, spec.dtype))
    )
    values = dequantized(stored)
    read = lambda pages: dequantized(attention.read_pages(kv, jnp.array(pages)))
    kv = attention.write_pages(kv, jnp.array([3, 1]), stored)
    np.testing.assert_array_equal(read([1, 3]), values[::-1])
    kv = attention.copy_pages(kv, jnp.array([3]), jnp.array([5]))
    np.testing.assert_array_equal(read([5])[0], values[0])
    kv = attention.move_rows(kv, (jnp.array([3, 1]), jnp.array([2, 0])), (jnp.array([2, 5]), jnp.array([1, 3])))
    np.testing.assert_array_equal(read([2])[0, 1], values[0, 2])
    np.testing.assert_array_equal(read([5])[0, 3], values[1, 0])
    assert kv.spec == spec
    assert kv.backend == backend


@pytest.mark.parametrize("dtype", storage.QUANTIZED)
def test_quantized_rows_are_within_half_a_step(dtype: str) -> None:
    rows = (
        np.random.default_rng(0).standard_normal((5, 3, 64)).astype(np.float32) * np.logspace(-6, 6, 5)[:, None, None]
    )
    rows[2, 1] = 0
    values, scales = tensors.quantize_rows(jnp.asarray(rows, jnp.float32), dtype)
    error = np.abs(np.asarray(values.astype(jnp.float32)) * np.asarray(scales)[..., None] - rows)
    step = (
        np.abs(rows) / 16 + np.asarray(scales)[..., None] / 512 if dtype == "float8_e4m3fn" else scales[..., None] / 2
    )
    assert (error <= step * 1.001).all()


def test_packed_int4_is_what_was_packed() -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 5, 32)), jnp.int8)
    packed = storage.pack_int4(values)
    assert packed.shape == (3, 5, 16)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(storage.unpack_int4(packed), values)


@pytest.mark.parametrize(
    ("dtype", "token_bytes"), [("bfloat16", 256), ("int8", 128 + 8), ("float8_e4m3fn", 128 + 8), ("int4", 64 + 8)]
)
def test_a_tokens_bytes_are_what_the_pools_hold(dtype: str, token_bytes: int) -> None:
    spec = KVSpec(1, 64, 32, jnp.dtype(dtype))
    assert spec.token_bytes == token_bytes
    pools = jax.tree.leaves(attention.allocate(spec, 3, backend="xla"))
    assert sum(pool.nbytes for pool in pools) == 3 * 32 * token_bytes


def test_refusals_name_the_value() -> None:
    with pytest.raises(BackendError, match="page_size 48 must divide 128"):
        attention.allocate(KVSpec(2, 8, 48, jnp.float32), 4, backend="xla")
    with pytest.raises(BackendError, match=r"no attention backend takes .*page_size 48"):  # the reference must be asked
        attention.allocate(KVSpec(2, 8, 48, jnp.float32), 4)
    assert attention.allocate(KVSpec(2, 8, 48, jnp.float32), 4, backend="reference").backend == "reference"
    with pytest.raises(BackendError, match=r"'flash' is not one of auto, .*llvm_cpu, xla, reference"):
        attention.allocate(KVSpec(2, 8, 16), 4, backend="flash")
    with pytest.raises(BackendError, match=r"refuses .*: it is for tpu, the device is cpu \(what would work"):
        attention.allocate(KVSpec(2, 128, 128), 4, backend="mosaic_tpu")
    inputs = build(CASES["decode"])
    kv = attention.allocate(KVSpec(3, 64, 16, jnp.float32), 4)
    with pytest.raises(UnsupportedError, match="3 KV heads x 64"):
        attention.attend(inputs.q, inputs.k, inputs.v, kv, inputs.ragged)


RAGGED = Ragged(
    q_start=jnp.array([0, 1, 4], jnp.int32),
    kv_len=jnp.array([6, 3], jnp.int32),
    page_table=jnp.array([[1], [2]], jnp.int32),
    q_position=jnp.array([5, 0, 1, 2], jnp.int32),
    num_decode_seqs=1,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_decode_seqs": -1}, "num_decode_seqs=-1 must be from 0 to 2"),
        ({"num_decode_seqs": 3}, "num_decode_seqs=3 must be from 0 to 2"),
        ({"width": 0}, "width=0 at least 1"),
        ({"width": 5}, "their product at most the 4 packed tokens"),
        ({"q_position": jnp.zeros(2, jnp.int32)}, r"q_position \(2,\) must be \(4,\)"),
        ({"q_position": jnp.zeros(4)}, "q_position float32 must be integer"),
        ({"q_start": jnp.zeros(2, jnp.int32)}, r"q_start \(2,\) must be \(3,\)"),
        ({"page_table": jnp.zeros((1, 1), jnp.int32)}, r"page_table \(1, 1\) must be \(2, 1\)"),
        ({"kv_position": jnp.zeros((2, 8), jnp.int32)}, r"kv_position \(2, 8\) must be \[2, 16\]"),
        ({"ancestors": jnp.zeros((5, 1), jnp.uint32)}, r"ancestors \(5, 1\) must be \(4, 1\)"),
        ({"ancestors": jnp.zeros((4, 1), jnp.int32)}, "ancestors int32 must be unsignedinteger"),
        ({"ancestors": jnp.zeros((4, 0), jnp.uint32)}, "too few bits for width=1: 1 words would do"),
        ({"page_stride": 0}, "page_stride=0 must be an int, at least 1"),
        ({"page_stride": 2, "page_offset": jnp.zeros(1, jnp.int32)}, r"page_offset \(1,\) must be \(\)"),
        ({"page_stride": 2, "page_offset": jnp.float32(1)}, "page_offset float32 must be integer"),
        ({"page_stride": 2, "kv_position": jnp.zeros((2, 16), jnp.int32)}, "kv_position with page_stride=2"),
        ({"page_stride": 2, "ancestors": jnp.ones((4, 1), jnp.uint32)}, "ancestors with page_stride=2"),
    ],
)
def test_a_ragged_that_does_not_fit_is_named(changes: dict, words: str) -> None:
    """No backend is asked: the native kernel would read what is not there."""
    kv = attention.allocate(KVSpec(2, 64, 16, jnp.float32), 4)
    with pytest.raises(UnsupportedError, match=words):
        attention.attend(*drawn(4), kv, replace(RAGGED, **changes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window=0 must be an int from 1"),
        ({"window": 1.5}, "window=1.5 must be an int"),
        ({"window": 2**31}, "window=2147483648 must be"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"scale": float("nan")}, "scale=nan must be finite"),
        ({"sinks": jnp.zeros((1, 4))}, r"sinks \(1, 4\) must be \(4,\)"),
    ],
)
def test_an_option_that_means_nothing_is_named(options: dict, words: str) -> None:
    kv = attention.allocate(KVSpec(2, 64, 16, jnp.float32), 4)
    with pytest.raises(UnsupportedError, match=words):
        attention.attend(*drawn(4), kv, RAGGED, **options)


def test_sinks_wait_until_partial_results_are_merged() -> None:
    kv = attention.allocate(KVSpec(2, 64, 16, jnp.float32), 4)
    with pytest.raises(UnsupportedError, match="sinks with page_stride=2: merge the partial results, then apply"):
        attention.attend(*drawn(4), kv, replace(RAGGED, page_stride=2), sinks=jnp.zeros(4))


def test_rows_to_write_must_fit() -> None:
    kv = attention.allocate(KVSpec(2, 64, 16, jnp.float32), 4)
    _, k, v = drawn(4)
    with pytest.raises(UnsupportedError, match=r"k \(4, 1, 64\) must be \(4, 2, 64\)"):
        attention.write(kv, k[:, :1], v, RAGGED)
    with pytest.raises(UnsupportedError, match=r"v \(3, 2, 64\) must be \(4, 2, 64\)"):
        attention.write(kv, k, v[:3], RAGGED)
    with pytest.raises(UnsupportedError, match=r"q_position \(4,\) must be \(3,\)"):
        attention.write(kv, k[:3], v[:3], RAGGED)


def test_integer_queries_and_other_pages_are_named() -> None:
    spec = KVSpec(2, 64, 16, jnp.dtype("int8"))
    kv = attention.allocate(spec, 4)
    q, k, v = drawn(4)
    with pytest.raises(UnsupportedError, match="q int32 must be floating"):
        attention.attend(q.astype(jnp.int32), k, v, kv, RAGGED)
    rows = PageRows(jnp.zeros((1, 16, 2, 2, 64), jnp.int8), jnp.ones((1, 16, 2, 2)))
    with pytest.raises(UnsupportedError, match="with scales, as pages of int8 are"):
        attention.write_pages(kv, jnp.array([1]), replace(rows, scales=None))
    with pytest.raises(UnsupportedError, match=r"must be \(2, 16, 2, 2, 64\)"):
        attention.write_pages(kv, jnp.array([1, 2]), rows)


def test_no_tokens_are_no_work() -> None:
    kv = attention.allocate(KVSpec(2, 64, 16, jnp.float32), 4)
    none = Ragged(
        jnp.zeros(1, jnp.int32), jnp.zeros(0, jnp.int32), jnp.zeros((0, 1), jnp.int32), jnp.zeros(0, jnp.int32)
    )
    out, lse, _ = attention.attend(*drawn(0), kv, none)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def drawn(tokens: int) -> list[jax.Array]:
    """q, k, v of four query heads on two KV heads."""
    return [jnp.ones((tokens, heads, 64)) for heads in (4, 2, 2)]
