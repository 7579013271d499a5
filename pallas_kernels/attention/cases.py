"""What every attention backend is held to: one table of cases, their inputs, and the comparison with the oracle.

Hides how inputs are made hostile: pages lie in shuffled order, and whatever a call may not read (pages of nobody, the
trash page, a sequence's unwritten tail, rows that slid out of the window) holds NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention, tensors
from pallas_kernels.attention import KVSpec, PageRows, Ragged
from pallas_kernels.devices import Device


@dataclass(frozen=True)
class Case:
    """Decode sequences of `width` queries, then ragged ones as pairs (rows before this call, queries)."""

    decode: tuple[int, ...] = ()  # rows after the call; 0 = unused
    prefill: tuple[tuple[int, int], ...] = ()
    width: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    padding: int = 0  # unused packed tokens at the end
    gaps: bool = False  # rows whose positions were thinned by eviction
    tree: bool = False
    shared: bool = False  # k = v = None: the rows were written by another layer
    apart: bool = False  # new rows are written by `write`, and then attended to
    later: int = 0  # rows behind the queries of every sequence, which may then not be the last; `shared` only
    shards: int = 1  # devices over which pages are spread: one call each, and their results merged
    dtype: str = "float32"  # of q, k, v and the output
    kv_dtype: str | None = None  # of the pages, where it is another one

    @property
    def spec(self) -> KVSpec:
        return KVSpec(self.kv_heads, self.head_dim, self.page_size, jnp.dtype(self.kv_dtype or self.dtype))

    def on_pages_of(self, page_size: int) -> Case:
        """The same case for a backend that wants larger pages."""
        return replace(self, page_size=page_size)


_DECODE = (1, 5, 130, 0, 257)
_CHUNKS = ((130, 70), (0, 3), (16, 0), (5, 200))
_MIXED: dict[str, Any] = {"decode": (17, 0, 129), "prefill": ((130, 70), (0, 3)), "padding": 5}
CASES: dict[str, Case] = {
    "decode": Case(decode=_DECODE),
    "decode-long": Case(decode=(1100, 3)),
    "decode-all-unused": Case(decode=(0, 0, 0)),
    "decode-mha": Case(decode=(3, 129), q_heads=2, kv_heads=2),
    "decode-mqa": Case(decode=(3, 129), q_heads=8, kv_heads=1),
    "decode-one-head": Case(decode=(3, 129), q_heads=1, kv_heads=1),
    "decode-group-7": Case(decode=(40, 200), q_heads=7, kv_heads=1),
    "decode-group-16": Case(decode=(40, 200), q_heads=32, kv_heads=2),
    "decode-many-kv-heads": Case(decode=(40, 200), q_heads=16, kv_heads=16),
    "decode-window": Case(decode=(3, 129, 300, 64), window=20),
    "decode-window-1": Case(decode=(3, 129), window=1),
    "decode-window-128": Case(decode=(500, 128, 127), window=128),
    "decode-softcap": Case(decode=(40, 200), softcap=5.0),
    "decode-sinks": Case(decode=(40, 200, 0), sinks=True),
    "decode-sinks-window": Case(decode=(40, 200, 0), sinks=True, window=30),
    "decode-scale": Case(decode=(40, 200), scale=0.3),
    "decode-page-1": Case(decode=(40, 140), page_size=1),
    "decode-page-16": Case(decode=(40, 140), page_size=16),
    "decode-page-128": Case(decode=(40, 300), page_size=128),
    "decode-page-256": Case(decode=(40, 600), page_size=256),
    "decode-width-3": Case(decode=(40, 200, 0, 7), width=3),
    "decode-width-9": Case(decode=(40, 136, 0, 9), width=9),
    "decode-head-16": Case(decode=(40, 200), head_dim=16),
    "decode-head-80": Case(decode=(40, 200), head_dim=80),
    "decode-head-96": Case(decode=(40, 200), head_dim=96),
    "decode-head-128": Case(decode=(40, 200), head_dim=128),
    "decode-head-256": Case(decode=(40, 200), head_dim=256),
    "decode-head-512": Case(decode=(40, 200), head_dim=512, kv_heads=1),
    "decode-bf16": Case(decode=_DECODE, dtype="bfloat16"),
    "decode-bf16-head-128": Case(decode=_DECODE, head_dim=128, dtype="bfloat16"),
    "decode-gaps": Case(decode=(40, 200), gaps=True),
    "decode-gaps-window": Case(decode=(40, 200, 140), gaps=True, window=30),
    "decode-tree": Case(decode=(40, 200, 0), width=5, tree=True),
    "decode-tree-window": Case(decode=(40, 200), width=5, tree=True, window=8),
    "decode-shared": Case(decode=(40, 200, 0), shared=True),
    "decode-int8": Case(decode=_DECODE, kv_dtype="int8"),
    "decode-int8-head-128-bf16": Case(decode=_DECODE, head_dim=128, dtype="bfloat16", kv_dtype="int8"),
    "decode-int8-mqa": Case(decode=(40, 200), q_heads=8, kv_heads=1, kv_dtype="int8"),
    "decode-fp8": Case(decode=_DECODE, kv_dtype="float8_e4m3fn"),
    "decode-fp8-head-128-bf16": Case(decode=_DECODE, head_dim=128, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    "decode-int4": Case(decode=_DECODE, kv_dtype="int4"),
    "decode-int4-head-128-bf16": Case(decode=_DECODE, head_dim=128, dtype="bfloat16", kv_dtype="int4"),
    "decode-int4-window-sinks": Case(decode=(40, 200), kv_dtype="int4", window=50, sinks=True),
    "prefill": Case(prefill=((0, 70),)),
    "prefill-one-token": Case(prefill=((0, 1), (140, 1))),
    "prefill-chunk": Case(prefill=_CHUNKS),
    "prefill-chunk-bf16": Case(prefill=_CHUNKS, head_dim=128, dtype="bfloat16"),
    "prefill-padded": Case(prefill=((130, 70), (0, 3)), padding=9),
    "prefill-window": Case(prefill=((300, 150), (0, 40)), window=33),
    "prefill-mha": Case(prefill=((3, 129),), q_heads=3, kv_heads=3),
    "prefill-mqa": Case(prefill=((3, 129),), q_heads=6, kv_heads=1),
    "prefill-sinks-softcap": Case(prefill=((3, 70),), sinks=True, softcap=3.0),
    "prefill-tree": Case(prefill=((3, 20),), tree=True),
    "prefill-gaps": Case(prefill=((100, 20), (7, 9)), gaps=True),
    "prefill-many-short": Case(prefill=((0, 3), (20, 1), (0, 2), (33, 9)), padding=3),
    "prefill-shared": Case(prefill=((30, 40), (0, 9)), shared=True),
    "prefill-head-80": Case(prefill=((5, 40),), head_dim=80, window=17),
    "prefill-head-256": Case(prefill=((5, 140),), head_dim=256, dtype="bfloat16"),
    "prefill-head-512": Case(prefill=((5, 40),), head_dim=512, kv_heads=1, dtype="bfloat16"),
    "prefill-int8": Case(prefill=((130, 70), (0, 3)), kv_dtype="int8"),
    "prefill-fp8": Case(prefill=((130, 70), (0, 3)), dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    "prefill-int4": Case(prefill=((130, 70), (0, 3)), kv_dtype="int4"),
    "mixed": Case(**_MIXED),
    "mixed-window": Case(**_MIXED, window=10),
    "mixed-bf16": Case(**_MIXED, dtype="bfloat16"),
    "mixed-head-128-bf16": Case(**_MIXED, q_heads=8, kv_heads=2, head_dim=128, dtype="bfloat16"),
    "mixed-bf16-pages": Case(decode=(17, 129), prefill=((130, 70),), kv_dtype="bfloat16", sinks=True),
    "mixed-width": Case(decode=(17, 0, 129), prefill=((130, 70),), width=2),
    "mixed-int8": Case(**_MIXED, kv_dtype="int8", dtype="bfloat16"),
    "mixed-int4-tree": Case(decode=(40, 0, 136), prefill=((12, 9),), width=4, tree=True, kv_dtype="int4"),
    "middle-decode": Case(decode=(40, 200, 0), shared=True, later=70),
    "middle-prefill": Case(prefill=((130, 70), (0, 3)), shared=True, later=150),
    "middle-mixed-window": Case(**_MIXED, shared=True, later=33, window=40),
    "apart-mixed": Case(**_MIXED, apart=True),
    "apart-mixed-width-int4": Case(decode=(17, 0, 129), prefill=((130, 70),), width=3, kv_dtype="int4", apart=True),
    "spread-decode": Case(decode=(*_DECODE, 600), shards=3),
    "spread-decode-width-3-window": Case(decode=(40, 530, 0, 7), width=3, shards=2, window=150),
    "spread-decode-sinks-softcap": Case(decode=(40, 500), sinks=True, softcap=5.0, shards=2),
    "spread-decode-int8": Case(decode=_DECODE, kv_dtype="int8", shards=2),
    "spread-decode-page-16": Case(decode=(40, 140), page_size=16, shards=4),
    "spread-prefill-chunk": Case(prefill=_CHUNKS, shards=2),
    "spread-prefill-chunk-bf16": Case(prefill=((300, 270), (0, 3)), head_dim=128, dtype="bfloat16", shards=3),
    "spread-prefill-window": Case(prefill=((300, 150), (0, 40)), window=33, shards=2),
    "spread-mixed": Case(**_MIXED, shards=2),
    "spread-mixed-int4": Case(**_MIXED, kv_dtype="int4", shards=2),
    "spread-apart-mixed": Case(**_MIXED, width=2, apart=True, shards=2),
    "spread-apart-prefill-bf16": Case(prefill=((300, 270), (0, 3)), dtype="bfloat16", apart=True, shards=3),
    "spread-middle-mixed-window": Case(**_MIXED, shared=True, later=333, window=200, shards=3),
}

# max |out - expected|. float32: reassociated sums of some hundred terms (and TF32-free dots are asked for everywhere).
# bfloat16: 8 bits of mantissa in the weights before they meet V, and in the output; |out| is of order 1.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass
class Inputs:
    """One call's arguments."""

    q: jax.Array
    k: jax.Array | None
    v: jax.Array | None
    pages: PageRows  # what lies in all pages before the call
    ragged: Ragged
    options: dict[str, Any]
    owned: np.ndarray  # bool[pages, page_size]: rows that hold something before the call


@dataclass(frozen=True)
class Outcome:
    """What a call gave; `pages` after it, the trash page left out."""

    out: np.ndarray  # f32[tokens, q_heads, head_dim]
    lse: np.ndarray  # f32[tokens, q_heads]
    pages: np.ndarray  # f32[pages - 1, page_size, 2, kv_heads, head_dim], dequantized


def build(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of a case, the same for every backend."""
    rng = np.random.default_rng(seed)
    lengths = [(rows - case.width, case.width) if rows else (0, 0) for rows in case.decode]
    lengths += [(before if queries else 0, queries) for before, queries in case.prefill]
    assert case.shared or not case.later, "rows behind the queries were written before"
    kv_len = np.array([before + queries + case.later if queries else 0 for before, queries in lengths], np.int32)
    written = kv_len if case.shared else np.array([before for before, _ in lengths])
    table, values, owned = _pages(case, kv_len, written, rng)
    num_rows = table.shape[1] * case.page_size
    steps = rng.integers(1, 3, (len(lengths), num_rows)) if case.gaps else np.ones((len(lengths), num_rows), np.int64)
    kv_position = (np.cumsum(steps, axis=1) - 1).astype(np.int32)
    positions: list[int] = []
    for s, (before, queries) in enumerate(lengths):
        count = queries or (case.width if s < len(case.decode) else 0)
        positions += [int(kv_position[s, before + i]) if queries else 0 for i in range(count)]
    kv_position[np.arange(num_rows) >= kv_len[:, None]] = 0  # what callers leave where there is no row
    tokens = len(positions) + case.padding
    first_prefill = len(case.decode) * case.width
    q_start = [*range(0, first_prefill, case.width), *(first_prefill + np.cumsum([0, *(n for _, n in case.prefill)]))]
    if case.window is not None and not case.gaps:  # what slid out is not in the table any more
        for s, (before, queries) in enumerate(lengths):
            table[s, : max(0, (before - case.window + 1) // case.page_size) if queries else 0] = 0
    ragged = Ragged(
        q_start=jnp.asarray(q_start, jnp.int32),
        kv_len=jnp.asarray(kv_len),
        page_table=jnp.asarray(table),
        q_position=jnp.asarray(positions + [0] * case.padding, jnp.int32),
        kv_position=jnp.asarray(kv_position) if case.gaps else None,
        ancestors=jnp.asarray(_ancestors(case, lengths, tokens, rng)) if case.tree else None,
        width=case.width,
        num_decode_seqs=len(case.decode),
    )
    options: dict[str, Any] = {"window": case.window, "softcap": case.softcap, "scale": case.scale}
    if case.sinks:
        options["sinks"] = jnp.asarray(rng.standard_normal(case.q_heads), jnp.float32)
    q, k, v = (
        jnp.asarray(rng.standard_normal((tokens, heads, case.head_dim)), jnp.dtype(case.dtype))
        for heads in (case.q_heads, case.kv_heads, case.kv_heads)
    )
    new_k, new_v = (None, None) if case.shared else (k, v)
    return Inputs(q, new_k, new_v, _stored(values, case), ragged, options, owned)


def _pages(
    case: Case, kv_len: np.ndarray, written: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Page table, f32 canonical values with NaN where nothing was written, and which rows were."""
    pages_per_seq = max(1, -(-int(kv_len.max(initial=0)) // case.page_size))
    num_pages = 1 + len(kv_len) * pages_per_seq + 3
    order = rng.permutation(np.arange(1, num_pages))
    table = np.zeros((len(kv_len), pages_per_seq), np.int32)
    values = np.full((num_pages, case.page_size, 2, case.kv_heads, case.head_dim), np.nan, np.float32)
    owned = np.zeros((num_pages, case.page_size), bool)
    for s in range(len(kv_len)):
        used = -(-int(kv_len[s]) // case.page_size)
        table[s, :used] = order[s * pages_per_seq : s * pages_per_seq + used]
        row = np.arange(int(written[s]))
        page, offset = table[s, row // case.page_size], row % case.page_size
        values[page, offset] = rng.standard_normal((len(row), *values.shape[2:]))
        owned[page, offset] = True
    return table, values, owned


def _ancestors(case: Case, lengths: list[tuple[int, int]], tokens: int, rng: np.random.Generator) -> np.ndarray:
    """u32[tokens, 1]: random trees in which every node sees itself."""
    words = rng.integers(0, 2**32, (tokens, 1), dtype=np.uint32)
    own = np.array([i for _, n in lengths for i in range(n or case.width)] + [0] * case.padding)
    return words | (np.uint32(1) << own.astype(np.uint32))[:, None]


def _stored(values: np.ndarray, case: Case) -> PageRows:
    rows = jnp.asarray(values)
    if case.spec.quantized:
        return PageRows(*tensors.quantize_rows(rows, case.spec.dtype))
    return PageRows(rows.astype(case.spec.dtype))


def run(backend: str, case: Case, inputs: Inputs, *, device: Device | None = None, invariant: bool = False) -> Outcome:
    """The case on one backend, under jit; `device`: what the pages are made for, where it is not this machine."""
    sinks = inputs.options.get("sinks") if case.shards > 1 else None
    options = {name: x for name, x in inputs.options.items() if name != "sinks" or case.shards == 1}

    @jax.jit
    def call(q: Any, k: Any, v: Any, kv: Any, ragged: Ragged) -> Any:
        if case.apart:
            kv, k, v = attention.write(kv, k, v, ragged), None, None
        return attention.attend(q, k, v, kv, ragged, **options)

    shards = spread(case, inputs) if case.shards > 1 else [Shard(inputs, np.arange(1, len(inputs.pages.values)))]
    after = dequantized(inputs.pages).copy()
    parts = []
    for part, home in shards:
        num_pages = len(part.pages.values)
        everything = jnp.arange(num_pages)
        kv = attention.allocate(
            case.spec, num_pages, backend=backend, q_heads=case.q_heads, device=device, invariant=invariant
        )
        kv = attention.write_pages(kv, everything, part.pages)
        out, lse, kv = call(part.q, part.k, part.v, kv, part.ragged)
        parts.append((out, lse))
        pages = dequantized(attention.read_pages(kv, everything))[1:]
        after[home] = pages[: len(home)]
        assert np.isnan(pages[len(home) :]).all(), "pages of nobody were written"
    out, lse = parts[0] if len(parts) == 1 else attention.with_sinks(*attention.merge(parts), sinks)
    return Outcome(np.asarray(out, np.float32), np.asarray(lse), after[1:])


class Shard(NamedTuple):
    """What one of the devices that share a case's pages has."""

    inputs: Inputs
    home: np.ndarray  # the case's numbers of this device's pages 1, 2, ...; behind those are pages of nobody


def spread(case: Case, inputs: Inputs, seed: int = 0) -> list[Shard]:
    """A case's pages over `case.shards` devices, numbered anew on each, so that devices use the same numbers."""
    rng = np.random.default_rng(seed)
    table = np.asarray(inputs.ragged.page_table)
    column = np.arange(table.shape[1])
    here = [np.unique(table[:, column % case.shards == offset]) for offset in range(case.shards)]
    homes = [rng.permutation(pages[pages > 0]) for pages in here]
    number = np.zeros(len(inputs.pages.values), np.int32)
    for home in homes:
        number[home] = 1 + np.arange(len(home))
    num_pages = 1 + max(map(len, homes)) + 2
    shards = []
    for offset, home in enumerate(homes):
        poison = [0] * (num_pages - 1 - len(home))  # the trash page's content
        pages = jax.tree.map(lambda x, home=home, poison=poison: x[np.array([0, *home, *poison], int)], inputs.pages)
        ragged = replace(
            inputs.ragged,
            page_table=jnp.asarray(number[table]),
            page_stride=case.shards,
            page_offset=jnp.int32(offset),
        )
        shards.append(Shard(replace(inputs, pages=pages, ragged=ragged), home))
    return shards


def dequantized(pages: PageRows) -> np.ndarray:
    """f32 canonical values."""
    values = pages.values.astype(jnp.float32)
    return np.asarray(values if pages.scales is None else values * pages.scales[..., None])


def check(backend: str, case: Case, seed: int = 0, *, device: Device | None = None) -> None:
    """Raises AssertionError where a backend's outcome is not the oracle's, BackendError where it refuses the case."""
    attention.choose(case.spec, backend=backend, q_heads=case.q_heads, device=device)
    inputs, expected = oracle(case, seed)
    compare(case, inputs, run(backend, case, inputs, device=device), expected)


@functools.lru_cache(maxsize=len(CASES))
def oracle(case: Case, seed: int = 0) -> tuple[Inputs, Outcome]:
    """A case's inputs and what the reference makes of them; kept, for the next backend."""
    inputs = build(case, seed)
    expected = run("reference", replace(case, shards=1), inputs)
    assert np.isfinite(expected.out).all(), "the oracle itself read something it may not"
    return inputs, expected


def compare(case: Case, inputs: Inputs, outcome: Outcome, expected: Outcome) -> None:
    """Raises AssertionError where outputs differ by more than TOLERANCE or a written row by anything at all."""
    low = next((name for name in ("bfloat16", "float16") if name in (case.dtype, case.kv_dtype)), "float32")
    tolerance = TOLERANCE[low]
    np.testing.assert_allclose(outcome.out, expected.out, atol=tolerance, rtol=tolerance, err_msg="out")
    np.testing.assert_allclose(outcome.lse, expected.lse, atol=tolerance, rtol=tolerance, err_msg="lse")
    rows = inputs.owned[1:] | np.isfinite(expected.pages).all(axis=(2, 3, 4))  # nobody may read the others
    np.testing.assert_array_equal(outcome.pages[rows], expected.pages[rows], err_msg="pages")
