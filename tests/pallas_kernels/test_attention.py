"""`attend` on every backend against the reference, with shuffled pages, NaN where nothing may be read, odd shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention
from pallas_kernels.attention import KVSpec, Ragged, UnsupportedError
from pallas_kernels.dispatch import BackendError
from pallas_kernels.native import jit


@dataclass(frozen=True)
class Case:
    """Decode sequences of `width` queries, then ragged ones; each number pair is (rows before this call, queries)."""

    decode: tuple[int, ...] = ()  # rows after the call; 0 = unused
    prefill: tuple[tuple[int, int], ...] = ()
    width: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    padding: int = 0  # unused packed tokens at the end
    gaps: bool = False  # rows whose positions were thinned by eviction
    tree: bool = False
    dtype: str = "float32"
    kv_dtype: str | None = None  # of the pages, where it is another one


NATIVE = pytest.param("llvm_cpu", marks=pytest.mark.skipif(jit.unavailable() is not None, reason="no native kernels"))
NATIVE_DTYPES = [pytest.param("llvm_cpu", dtype, marks=NATIVE.marks) for dtype in ("float32", "bfloat16")]
BACKENDS = ["xla", NATIVE]
CASES = {
    "decode": Case(decode=(1, 5, 130, 0, 257)),
    "decode-mha": Case(decode=(3, 129), q_heads=2, kv_heads=2),
    "decode-mqa": Case(decode=(3, 129), q_heads=8, kv_heads=1),
    "decode-window": Case(decode=(3, 129, 300, 64), window=20),
    "decode-window-1": Case(decode=(3, 129), window=1),
    "decode-window-of-a-block": Case(decode=(500, 128, 127), window=128),
    "decode-softcap": Case(decode=(40, 200), softcap=5.0),
    "decode-sinks": Case(decode=(40, 200, 0), sinks=True),
    "decode-scale": Case(decode=(40, 200), scale=0.3),
    "decode-page-128": Case(decode=(40, 300), page_size=128),
    "decode-page-256": Case(decode=(40, 600), page_size=256),
    "decode-page-1": Case(decode=(40, 140), page_size=1),
    "decode-width": Case(decode=(40, 200, 0, 7), width=3),
    "decode-head-80": Case(decode=(40, 200), head_dim=80),
    "decode-bf16": Case(decode=(40, 200), dtype="bfloat16"),
    "decode-gaps": Case(decode=(40, 200), gaps=True),
    "decode-gaps-window": Case(decode=(40, 200), gaps=True, window=30),
    "decode-tree": Case(decode=(40, 200, 0), width=5, tree=True),
    "decode-tree-window": Case(decode=(40, 200), width=5, tree=True, window=8),
    "prefill": Case(prefill=((0, 70),)),
    "prefill-one-token": Case(prefill=((0, 1), (140, 1))),
    "prefill-chunk": Case(prefill=((130, 70), (0, 3), (16, 0), (5, 200))),
    "prefill-padded": Case(prefill=((130, 70), (0, 3)), padding=9),
    "prefill-window": Case(prefill=((300, 150), (0, 40)), window=33),
    "prefill-mha": Case(prefill=((3, 129),), q_heads=3, kv_heads=3),
    "prefill-mqa": Case(prefill=((3, 129),), q_heads=6, kv_heads=1),
    "prefill-sinks-softcap": Case(prefill=((3, 70),), sinks=True, softcap=3.0),
    "prefill-tree": Case(prefill=((3, 20),), tree=True),
    "prefill-gaps": Case(prefill=((100, 20), (7, 9)), gaps=True),
    "mixed": Case(decode=(17, 0, 129), prefill=((130, 70), (0, 3)), padding=5),
    "mixed-window": Case(decode=(17, 0, 129), prefill=((130, 70), (0, 3)), padding=5, window=10),
    "mixed-bf16": Case(decode=(17, 0, 129), prefill=((130, 70),), dtype="bfloat16"),
    "decode-head-256": Case(decode=(40, 200), head_dim=256, dtype="bfloat16"),
    "decode-group-7": Case(decode=(40, 200), q_heads=7, kv_heads=1, page_size=32),
    "prefill-short-ones": Case(prefill=((0, 3), (20, 1), (0, 2), (33, 9)), padding=3, page_size=4),
    "prefill-head-96": Case(prefill=((5, 40),), head_dim=96, window=17, page_size=8),
    "mixed-bf16-pages": Case(decode=(17, 129), prefill=((130, 70),), kv_dtype="bfloat16", sinks=True),
    "mixed-width": Case(decode=(17, 0, 129), prefill=((130, 70),), width=2),
}


@dataclass
class Inputs:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    pages: np.ndarray  # canonical, what lies in the pages before the call
    ragged: Ragged
    options: dict
    owned: np.ndarray  # bool[pages, page_size]: rows that hold something the call may read


def build(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    lengths = [(rows - case.width, case.width) if rows else (0, 0) for rows in case.decode]
    lengths += [(before if queries else 0, queries) for before, queries in case.prefill]
    kv_len = np.array([before + queries if queries else 0 for before, queries in lengths], np.int32)
    num_decode = len(case.decode)
    pages_per_seq = max(1, -(-int(kv_len.max()) // case.page_size))
    num_pages = 1 + len(lengths) * pages_per_seq + 3
    order = rng.permutation(np.arange(1, num_pages))
    table = np.zeros((len(lengths), pages_per_seq), np.int32)
    pages = np.full((num_pages, case.page_size, 2, case.kv_heads, case.head_dim), np.nan, np.float32)
    owned = np.zeros((num_pages, case.page_size), bool)
    positions: list[int] = []
    kv_position = np.zeros((len(lengths), pages_per_seq * case.page_size), np.int32)
    for s, (before, queries) in enumerate(lengths):
        used = -(-int(kv_len[s]) // case.page_size)
        table[s, :used] = order[s * pages_per_seq : s * pages_per_seq + used]
        for row in range(before):
            page, offset = table[s, row // case.page_size], row % case.page_size
            pages[page, offset] = rng.standard_normal((2, case.kv_heads, case.head_dim))
            owned[page, offset] = True
        gap = np.cumsum(rng.integers(1, 3, kv_position.shape[1])) - 1 if case.gaps else np.arange(kv_position.shape[1])
        kv_position[s] = gap
        if s < num_decode:
            positions += [int(gap[before + i]) for i in range(queries)] if queries else [0] * case.width
        else:
            positions += [int(gap[before + i]) for i in range(queries)]
    tokens = len(positions) + case.padding
    positions += [0] * case.padding
    q_start = np.concatenate(
        [np.arange(num_decode) * case.width, num_decode * case.width + np.cumsum([0, *(n for _, n in case.prefill)])]
    )
    dtype = jnp.dtype(case.dtype)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    ancestors = None
    if case.tree:
        ancestors = rng.integers(0, 2**32, (tokens, 1), dtype=np.uint32)
        own = np.array([i for _, n in lengths for i in range(n or case.width)] + [0] * case.padding)
        ancestors |= (np.uint32(1) << own.astype(np.uint32))[:, None]  # every node sees itself
    if case.window is not None and not case.gaps:  # what slid out is not in the table any more
        for s, (before, queries) in enumerate(lengths):
            gone = max(0, (before - case.window + 1) // case.page_size) if queries else 0
            table[s, :gone] = 0
    ragged = Ragged(
        q_start=jnp.asarray(q_start, jnp.int32),
        kv_len=jnp.asarray(kv_len),
        page_table=jnp.asarray(table),
        q_position=jnp.asarray(positions, jnp.int32),
        kv_position=jnp.asarray(kv_position) if case.gaps else None,
        ancestors=None if ancestors is None else jnp.asarray(ancestors),
        width=case.width,
        num_decode_seqs=num_decode,
    )
    options = {"window": case.window, "softcap": case.softcap, "scale": case.scale}
    if case.sinks:
        options["sinks"] = jnp.asarray(rng.standard_normal(case.q_heads), jnp.float32)
    return Inputs(
        q=draw(tokens, case.q_heads, case.head_dim),
        k=draw(tokens, case.kv_heads, case.head_dim),
        v=draw(tokens, case.kv_heads, case.head_dim),
        pages=pages,
        ragged=ragged,
        options=options,
        owned=owned,
    )


def run(backend: str, case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kv = attention.allocate(spec_of(case), len(inputs.pages), backend=backend)
    everything = jnp.arange(len(inputs.pages))
    kv = attention.write_pages(kv, everything, jnp.asarray(inputs.pages))
    call = jax.jit(lambda q, k, v, kv, ragged: attention.attend(q, k, v, kv, ragged, **inputs.options))
    out, lse, kv = call(inputs.q, inputs.k, inputs.v, kv, inputs.ragged)
    return np.asarray(out, np.float32), np.asarray(lse), np.asarray(attention.read_pages(kv, everything), np.float32)


def spec_of(case: Case) -> KVSpec:
    return KVSpec(case.kv_heads, case.head_dim, case.page_size, jnp.dtype(case.kv_dtype or case.dtype))


def check(backend: str, case: Case, seed: int = 0) -> None:
    inputs = build(case, seed)
    expected_out, expected_lse, expected_pages = run("reference", case, inputs)
    out, lse, pages = run(backend, case, inputs)
    assert np.isfinite(expected_out).all()
    # float32: reassociated sums of up to some hundred terms; bfloat16: weights are rounded to 8 bits before the values
    tolerance = 2e-5 if case.dtype == "float32" and case.kv_dtype is None else 2e-2
    np.testing.assert_allclose(out, expected_out, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(pages[1:], expected_pages[1:])  # page 0 is trash
    written = np.isfinite(expected_pages[1:]).all(axis=(2, 3, 4))
    assert (written >= inputs.owned[1:]).all()


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    check("xla", CASES[name])


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.page_size >= 4])
def test_native_case(name: str, backend: str) -> None:
    check(backend, CASES[name])


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
@pytest.mark.parametrize(("backend", "dtype"), [("xla", "float32"), *NATIVE_DTYPES])
def test_bits_do_not_depend_on_the_batch(backend: str, dtype: str, heads: tuple[int, int], window: int | None) -> None:
    """A token's output is bit-identical decoded alone, decoded among others, or prefilled in any chunk."""
    base = Case(q_heads=heads[0], kv_heads=heads[1], window=window, dtype=dtype, prefill=((0, 300),))
    inputs = build(base)
    out, _, pages = run(backend, base, inputs)
    for before, queries in ((299, 1), (170, 130), (250, 50), (128, 172)):
        chunk = replace(base, prefill=((before, queries),))
        rest = replace(inputs, pages=pages, q=inputs.q[before:], k=inputs.k[before:], v=inputs.v[before:])
        rest.ragged = replace(
            inputs.ragged,
            q_start=jnp.asarray([0, queries], jnp.int32),
            q_position=inputs.ragged.q_position[before:],
        )
        np.testing.assert_array_equal(run(backend, chunk, rest)[0], out[before:])
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
        np.testing.assert_array_equal(run(backend, base, last)[0][0], out[299])


def test_partials_merge_by_lse() -> None:
    """Two disjoint halves of the rows, merged by their log-sum-exp, are the whole."""
    case = Case(decode=(200,))
    inputs = build(case)
    whole, lse, pages = run("reference", case, inputs)
    position = np.arange(inputs.ragged.page_table.shape[1] * case.page_size)
    parts = []
    for rows in (position < 100, position >= 100):
        hidden = np.where(rows, position, 10_000).astype(np.int32)  # a position nobody sees yet
        ragged = replace(inputs.ragged, kv_position=jnp.asarray(hidden[None]))
        parts.append(run("xla", case, replace(inputs, pages=pages, ragged=ragged))[:2])
    top = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * np.exp(part - top)[..., None] for out, part in parts)
    np.testing.assert_allclose(merged, whole, atol=2e-5)
    np.testing.assert_allclose(top, lse, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_kv_reads_what_another_layer_wrote(backend: str) -> None:
    case = Case(prefill=((0, 40),))
    inputs = build(case)
    out, _, pages = run(backend, case, inputs)
    again = run(backend, case, replace(inputs, k=None, v=None, pages=pages))[0]
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_page_operations(backend: str) -> None:
    kv = attention.allocate(KVSpec(2, 16, 4, jnp.float32), 6, backend=backend)
    values = np.random.default_rng(0).standard_normal((2, 4, 2, 2, 16)).astype(np.float32)
    kv = attention.write_pages(kv, jnp.array([3, 1]), jnp.asarray(values))
    np.testing.assert_array_equal(attention.read_pages(kv, jnp.array([1, 3])), values[::-1])
    kv = attention.copy_pages(kv, jnp.array([3]), jnp.array([5]))
    np.testing.assert_array_equal(attention.read_pages(kv, jnp.array([5]))[0], values[0])
    kv = attention.move_rows(kv, (jnp.array([3, 1]), jnp.array([2, 0])), (jnp.array([2, 5]), jnp.array([1, 3])))
    np.testing.assert_array_equal(attention.read_pages(kv, jnp.array([2]))[0, 1], values[0, 2])
    np.testing.assert_array_equal(attention.read_pages(kv, jnp.array([5]))[0, 3], values[1, 0])


def test_refusals_name_the_value() -> None:
    with pytest.raises(BackendError, match="page_size 48 must divide 128"):
        attention.allocate(KVSpec(2, 8, 48, jnp.float32), 4, backend="xla")
    with pytest.raises(BackendError, match=r"no attention backend takes .*page_size 48"):  # the reference must be asked
        attention.allocate(KVSpec(2, 8, 48, jnp.float32), 4)
    assert attention.allocate(KVSpec(2, 8, 48, jnp.float32), 4, backend="reference").backend == "reference"
    with pytest.raises(BackendError, match="'flash' is not one of auto, llvm_cpu, xla, reference"):
        attention.allocate(KVSpec(2, 8, 16), 4, backend="flash")
    inputs = build(CASES["decode"])
    kv = attention.allocate(KVSpec(3, 16, 16, jnp.float32), 4)
    with pytest.raises(UnsupportedError, match="3 KV heads x 16"):
        attention.attend(inputs.q, inputs.k, inputs.v, kv, inputs.ragged)
