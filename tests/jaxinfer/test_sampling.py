"""sample() against a plain NumPy definition (float64), and that a row depends on nothing but itself."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer import vocabulary_passes
from jaxinfer.request import MAX_TOP_LOGPROBS, SamplingParams
from jaxinfer.sampling import (
    SampleResult,
    TokenCounts,
    allowed_words,
    empty_counts,
    empty_rows,
    pack_row,
    reset_counts,
    sample,
    unpack_rows,
    update_counts,
    uses_penalties,
)
from jaxinfer.truncation import top_k_threshold, top_p_threshold
from jaxinfer.vocabulary_passes import group_width
from pallas_kernels import devices
from sharding.vocabulary import Vocabulary

VOCAB = 300
STOP_IDS = (7, 11, 290)
GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class Row:
    """One slot's inputs, as the definition sees them."""

    logits: np.ndarray
    params: SamplingParams = GREEDY
    seed: int = 0
    position: int = 5
    num_generated: int = 0
    in_prompt: tuple[int, ...] = ()
    in_output: tuple[int, ...] = ()
    active: bool = True


# ---- the definition --------------------------------------------------------------------------------------------------


def adjusted(row: Row) -> np.ndarray:
    """Masks, bias, min_tokens and penalties, in that order, float64[vocab]."""
    p, x = row.params, row.logits.astype(np.float64).copy()
    if p.allowed_token_ids is not None:
        kept = np.isin(np.arange(len(x)), p.allowed_token_ids)
        x[~kept] = -np.inf
    for token, bias in p.logit_bias.items():
        x[token] += bias
    if row.num_generated < p.min_tokens:
        x[list(STOP_IDS)] = -np.inf
    counts = np.bincount(np.array(row.in_output, int), minlength=len(x))
    seen = counts > 0
    seen[list(row.in_prompt)] = True
    x[seen] = np.where(x[seen] > 0, x[seen] / p.repetition_penalty, x[seen] * p.repetition_penalty)
    return x - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)


def truncated(row: Row) -> np.ndarray:
    """Probabilities after temperature, min-p, top-k and top-p, float64[vocab]; ties with the last token kept stay."""
    p, x = row.params, adjusted(row)
    weights = np.exp((x - x.max()) / p.temperature)
    weights[weights < p.min_p] = 0
    if 0 < p.top_k < len(x):
        weights[x < np.sort(x)[-p.top_k]] = 0
    if p.top_p < 1:
        descending = np.sort(weights)[::-1]
        last = np.searchsorted(np.cumsum(descending), p.top_p * weights.sum())
        weights[weights < descending[min(last, len(x) - 1)]] = 0
    return weights / weights.sum()


def draw_bits(row: Row) -> np.ndarray:
    key = jax.random.wrap_key_data(jnp.array([row.seed >> 32, row.seed & 0xFFFFFFFF], jnp.uint32), impl="threefry2x32")
    return np.asarray(jax.random.bits(jax.random.fold_in(key, row.position), (2,), jnp.uint32))


def drawn(row: Row, slack: float = 1e-5) -> set[int]:
    """The token that the draw picks from truncated(row): first a group (ids equal modulo the width), then a member.
    A set, because within `slack` of a boundary either neighbour is right."""
    probabilities, width = truncated(row), group_width(len(row.logits))
    uniform = (draw_bits(row) >> 8) / 2**24
    padded = np.zeros(-(-len(probabilities) // width) * width)
    padded[: len(probabilities)] = probabilities
    members = padded.reshape(-1, width)
    found = set()
    for first in (uniform[0] - slack, uniform[0], uniform[0] + slack):
        group = _first_over(members.sum(0), first)
        for second in (uniform[1] - slack, uniform[1], uniform[1] + slack):
            found.add(group + width * _first_over(members[:, group], second))
    return found


def _first_over(weights: np.ndarray, uniform: float) -> int:
    hits = np.nonzero((np.cumsum(weights) > min(max(uniform, 0), 1) * weights.sum()) & (weights > 0))[0]
    return int(hits[0]) if len(hits) else int(np.nonzero(weights)[0][-1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


# ---- running sample() ------------------------------------------------------------------------------------------------

TRACES: list[int] = []


@jax.jit
def run_jitted(*args: jax.Array) -> SampleResult:
    TRACES.append(1)
    return sample(*args)


def run(rows: list[Row], dtype: str = "float32") -> SampleResult:
    """sample() on these rows, in a batch of one of a few sizes so that little is compiled."""
    slots = next(size for size in (4, 16, 64, 2048) if size >= len(rows))
    idle = dataclasses.replace(rows[0], params=GREEDY, active=False)
    result = run_exactly([*rows, *[idle] * (slots - len(rows))], dtype)
    return jax.tree.map(lambda array: array[: len(rows)], result)


def run_exactly(rows: list[Row], dtype: str = "float32") -> SampleResult:
    vocab, slots = len(rows[0].logits), len(rows)
    in_prompt, in_output = np.zeros((slots + 1, vocab), bool), np.zeros((slots + 1, vocab), np.int32)
    in_prompt[slots:], in_output[slots:] = True, 99  # rows past the batch are not read
    for slot, row in enumerate(rows):
        in_prompt[slot, list(row.in_prompt)] = True
        np.add.at(in_output[slot], list(row.in_output), 1)
    stop_ids = np.full((slots, 16), -1, np.int32)
    stop_ids[:, : len(STOP_IDS)] = STOP_IDS
    result = run_jitted(
        jnp.asarray(np.stack([row.logits for row in rows]), dtype),
        unpack_rows(jnp.asarray(np.stack([pack_row(row.params, row.seed) for row in rows]))),
        TokenCounts.of(jnp.asarray(in_prompt), jnp.asarray(in_output)),
        jnp.asarray(np.stack([allowed_words(row.params, vocab) for row in rows])),
        jnp.asarray(stop_ids),
        jnp.asarray([row.position for row in rows], jnp.int32),
        jnp.asarray([row.num_generated for row in rows], jnp.int32),
        jnp.asarray([row.active for row in rows]),
    )
    return jax.tree.map(np.asarray, result)


def random_logits(seed: int, scale: float = 3.0, vocab: int = VOCAB) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **fields})  # type: ignore[arg-type]


# ---- every field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_takes_the_lowest_of_the_largest(dtype: str) -> None:
    tied = np.zeros(VOCAB, np.float32)
    tied[[41, 170, 299]] = 2.5
    last = np.full(VOCAB, -3.0, np.float32)
    last[VOCAB - 1] = -2.0
    assert run([Row(tied), Row(last)], dtype).tokens.tolist() == [41, VOCAB - 1]


ADJUSTMENTS = {
    "bias": {"logit_bias": {3: 50.0, 299: -100.0}},
    "many_biases": {"logit_bias": {i: float(i % 7) for i in range(0, 256, 2)}},
    "min_tokens": {"min_tokens": 3, "max_tokens": 10, "logit_bias": {7: 90.0, 8: 80.0}},
    "allowed": {"allowed_token_ids": (5, 31, 32, 64, 299)},
    "repetition": {"repetition_penalty": 1.8},
    "repetition_under_one": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "negative_penalties": {"presence_penalty": -2.0, "frequency_penalty": -0.3},
    "all": {
        "logit_bias": {3: 5.0, 9: -2.0},
        "min_tokens": 2,
        "allowed_token_ids": tuple(range(0, 300, 3)),
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
    },
}


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_greedy_after_adjustments(name: str) -> None:
    rows = []
    for seed in range(16):
        logits = random_logits(seed)
        order = np.argsort(-logits)
        # what rewards repetition has not seen the best token; what punishes it has
        prompt, output = (
            (order[1:4], order[2:8])
            if name in ("repetition_under_one", "negative_penalties")
            else (order[:3], order[:6])
        )
        history = {"in_prompt": tuple(prompt), "in_output": (*output, *output[:3], output[0])}
        rows.append(Row(logits, params(temperature=0.0, **ADJUSTMENTS[name]), num_generated=seed % 5, **history))
    tokens = run(rows).tokens
    expected = [int(np.argmax(adjusted(row))) for row in rows]
    assert tokens.tolist() == expected
    assert expected != [int(np.argmax(row.logits)) for row in rows]


@pytest.mark.parametrize(("num_generated", "expected"), [(0, 8), (2, 8), (3, 7)])
def test_min_tokens_holds_stop_ids_back(num_generated: int, expected: int) -> None:
    row = Row(random_logits(0), params(temperature=0.0, **ADJUSTMENTS["min_tokens"]), num_generated=num_generated)
    assert run([row, row]).tokens.tolist() == [expected, expected]


TRUNCATIONS = {
    "temperature": {},
    "cold": {"temperature": 0.05},
    "coldest": {"temperature": 1e-40},
    "hot": {"temperature": 100.0},
    "top_k_1": {"top_k": 1},
    "top_k_1_hot": {"top_k": 1, "temperature": 100.0},
    "top_k_7": {"top_k": 7},
    "top_k_over_vocabulary": {"top_k": 10**9},
    "top_p_tiny": {"top_p": 1e-9},
    "top_p": {"top_p": 0.9},
    "top_p_one": {"top_p": 1.0},
    "top_p_hot": {"top_p": 0.5, "temperature": 50.0},
    "min_p": {"min_p": 0.1},
    "min_p_one": {"min_p": 1.0},
    "all": {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("name", TRUNCATIONS)
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_draws_are_the_definitions(name: str, scale: float) -> None:
    rows = [
        Row(random_logits(i % 5, scale), params(**TRUNCATIONS[name]), seed=i << 33 | 12345 + i, position=i)
        for i in range(64)
    ]
    for row, token in zip(rows, run(rows).tokens.tolist(), strict=True):
        assert token in drawn(row)


def test_ties_at_a_threshold_stay_together() -> None:
    logits = np.full(VOCAB, -50.0, np.float32)
    logits[[2, 90, 200]] = 1.0
    logits[100] = 2.0
    for fields in ({"top_k": 2}, {"top_p": 0.6}):  # the best has 0.48, each tied one 0.17
        rows = [Row(logits, params(**fields), position=i) for i in range(64)]
        assert set(run(rows).tokens.tolist()) == {2, 90, 100, 200}


def test_flat_logits_do_not_trouble_the_search() -> None:
    rows = [Row(np.zeros(VOCAB, np.float32), params(top_k=5, top_p=0.5), position=i) for i in range(64)]
    assert len(set(run(rows).tokens.tolist())) > 40  # all are tied, so all stay


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 2.0, 30.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 50, 299, 300, 5000]),
        "top_p": st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
        "repetition_penalty": st.sampled_from([1.0, 1.2, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=6),
        "min_tokens": st.integers(0, 3),
        "allowed_token_ids": st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=4, max_size=40).map(tuple),
        "logprobs": st.just(True),
        "top_logprobs": st.sampled_from([0, 3, 20]),
    }
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=30).map(tuple)
ROWS = st.builds(
    Row,
    logits=st.builds(random_logits, st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 5.0, 20.0])),
    params=SETTINGS.map(lambda fields: SamplingParams(**fields)),
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**20),
    num_generated=st.integers(0, 5),
    in_prompt=TOKENS,
    in_output=TOKENS,
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(ROWS, min_size=4, max_size=4))
def test_any_combination(rows: list[Row]) -> None:
    result = run(rows)
    assert not result.bad.any()
    for slot, row in enumerate(rows):
        token = int(result.tokens[slot])
        x = adjusted(row)
        if row.params.temperature == 0:
            assert x[token] >= x.max() - 1e-5 * max(1, abs(x.max()))
        else:
            # A threshold within float32 rounding of a token may fall on either side of it.
            near = [dataclasses.replace(row, params=p) for p in _nudged(row.params)]
            assert any(token in drawn(other) for other in near)
        expected = log_softmax(row.logits)
        np.testing.assert_allclose(result.logprobs[slot], expected[token], rtol=1e-5, atol=1e-5)


def _nudged(p: SamplingParams) -> list[SamplingParams]:
    factors = (1.0, 1 - 3e-6, 1 + 3e-6)
    return [
        dataclasses.replace(p, top_p=min(1.0, p.top_p * a), min_p=min(1.0, p.min_p * b))
        for a in factors
        for b in factors
    ]


# ---- thresholds at full size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("vocab", [5, 257, 32000, 50257])
def test_thresholds_keep_the_right_set(vocab: int, scale: float) -> None:
    x = np.stack([random_logits(seed, scale, vocab) for seed in range(3)])
    x[1] = np.round(x[1], 1)  # many ties
    best, whole, wanted = x.max(1), Vocabulary(vocab), np.array([True, True, False])
    for k in {1, 2, vocab // 3 + 1, vocab - 1}:
        threshold = np.asarray(jax.jit(top_k_threshold, static_argnums=4)(x, best, np.full(3, k), wanted, whole))
        for row in range(2):
            np.testing.assert_array_equal(x[row] >= threshold[row], x[row] >= np.sort(x[row])[-k])
        assert threshold[2] == -np.inf
    weights = np.exp(x - best[:, None])
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        top_p = np.full(3, p, np.float32)
        threshold = np.asarray(jax.jit(top_p_threshold, static_argnums=3)(weights, top_p, wanted, whole))
        for row in range(2):
            exact = weights[row].astype(np.float64)
            kept, mass = exact >= threshold[row], exact.sum()
            assert exact[kept].sum() >= (p - 3e-6) * mass
            smallest = exact[kept].min()
            assert exact[exact > smallest].sum() < (p + 3e-6) * mass  # without its last tie class it is too small
        assert threshold[2] == 0


# ---- distribution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.8}, {"top_k": 9, "temperature": 2.0}, {"min_p": 0.05}], ids=str)
def test_frequencies_match(fields: dict) -> None:
    logits = random_logits(3, 1.0, 40)
    rows = [Row(logits, params(**fields), seed=99, position=i) for i in range(8192)]
    tokens = np.concatenate([run(rows[start : start + 2048]).tokens for start in range(0, 8192, 2048)])
    expected = truncated(rows[0]) * len(rows)
    counts = np.bincount(tokens, minlength=40)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    assert common.sum() >= 8 and expected[~common].sum() < 20
    assert chi_square(counts[common], expected[common]) < far_off(common.sum() - 1)


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def far_off(degrees_of_freedom: int) -> float:
    """Four standard deviations over the mean."""
    return degrees_of_freedom + 4 * np.sqrt(2 * degrees_of_freedom)


def test_seeds_and_positions_draw_independently() -> None:
    logits = np.zeros(40, np.float32)
    by_position = run([Row(logits, params(), seed=1, position=i) for i in range(2048)]).tokens
    by_seed = run([Row(logits, params(), seed=i, position=1) for i in range(2048)]).tokens
    by_high_word = run([Row(logits, params(), seed=i << 32, position=1) for i in range(2048)]).tokens
    for tokens in (by_position, by_seed, by_high_word):
        assert chi_square(np.bincount(tokens, minlength=40), 2048 / 40) < far_off(39)
        assert abs(np.corrcoef(tokens[:-1], tokens[1:])[0, 1]) < 0.08


# ---- rows are independent --------------------------------------------------------------------------------------------

FULL = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.85,
    "min_p": 0.001,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {1: 3.0, 2: -1.0},
    "logprobs": True,
    "top_logprobs": 5,
}


@pytest.mark.parametrize("vocab", [1003, 32000])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 50}, FULL, {**FULL, "temperature": 0.0}], ids=str)
def test_rows_are_bit_identical_in_any_batch(vocab: int, fields: dict) -> None:
    rows = [
        Row(
            random_logits(i, 1.5, vocab),
            params(**fields),
            seed=i,
            position=40 + i,
            in_prompt=(1, 5),
            in_output=(2, 2, 9),
        )
        for i in range(16)
    ]
    whole = run_exactly(rows)
    strangers = [
        Row(random_logits(100, 9.0, vocab), params(temperature=0.0)),
        Row(random_logits(101, 0.1, vocab), params(top_p=0.3, top_k=3)),
    ]
    for slots in (2, 3, 16):
        mixed = ([*rows[4:6], *strangers] * 8)[:slots]
        part, other = run_exactly(rows[:slots]), run_exactly(mixed)
        wants = fields.get("logprobs", False)
        for name in ("tokens", "logprobs", "top_ids", "top_logprobs") if wants else ("tokens",):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:slots])
            np.testing.assert_array_equal(getattr(other, name)[:2], getattr(whole, name)[4:6])


def test_inactive_rows_switch_nothing_on() -> None:
    idle = Row(random_logits(1), params(**FULL), active=False)
    result = run([Row(random_logits(0)), idle])
    assert result.tokens[0] == np.argmax(random_logits(0))
    assert not result.logprobs.any() and not result.top_logprobs.any()
    assert 0 <= result.tokens[1] < VOCAB


def test_nothing_retraces() -> None:
    rows = [Row(random_logits(i)) for i in range(4)]
    run(rows)
    before = len(TRACES)
    for fields in (*TRUNCATIONS.values(), FULL):
        run([dataclasses.replace(row, params=params(**fields)) for row in rows])
    assert len(TRACES) == before


# ---- broken rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}, FULL], ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 123, VOCAB - 1])
def test_poisoned_rows_are_flagged(fields: dict, poison: float, where: int) -> None:
    logits = random_logits(0)
    logits[where] = poison
    good = Row(random_logits(1), params(**fields))
    result = run([Row(logits, params(**fields)), good, Row(np.full(VOCAB, np.nan, np.float32), params(**fields))])
    assert result.bad.tolist() == [True, False, True]
    assert ((result.tokens >= 0) & (result.tokens < VOCAB)).all()
    assert result.tokens[1] == run([good, good]).tokens[0]


@pytest.mark.parametrize(("vocab", "slots"), [(100, 2), (512, 16), (4096, 2), (4096, 16)])
def test_nan_is_flagged_wherever_it_lies(vocab: int, slots: int) -> None:
    """A vectorized maximum drops NaN, and which lanes it drops depends on the shape; x86's own NaN is negative."""
    for fields in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}):
        for nan in (np.float32(np.nan), -np.float32(np.nan)):
            rows = [Row(random_logits(i, vocab=vocab), params(**fields)) for i in range(slots)]
            for slot, row in enumerate(rows[1:], start=1):
                row.logits[slice(None) if slot == 1 else (slot * 37) % vocab] = nan
            assert run_exactly(rows).bad.tolist() == [False] + [True] * (slots - 1)


def test_nothing_left_to_choose_is_flagged() -> None:
    nothing = params(temperature=0.0, allowed_token_ids=STOP_IDS, min_tokens=1)
    result = run([Row(random_logits(0), nothing), Row(random_logits(0), nothing, num_generated=1)])
    assert result.bad.tolist() == [True, False]
    assert result.tokens[1] in STOP_IDS


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    rows = [Row(random_logits(i), params(**FULL), seed=i, in_output=(3, 4)) for i in range(4)]
    rows[1].logits[:] = np.round(rows[1].logits)  # ties: the lower id first
    result = run(rows)
    for slot, row in enumerate(rows):
        expected = log_softmax(row.logits)
        order = np.argsort(-row.logits, kind="stable")[:MAX_TOP_LOGPROBS]
        np.testing.assert_array_equal(result.top_ids[slot], order)
        np.testing.assert_allclose(result.top_logprobs[slot], expected[order], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.logprobs[slot], expected[result.tokens[slot]], rtol=1e-5, atol=1e-5)


def test_top_logprobs_of_a_tiny_vocabulary_are_padded() -> None:
    result = run([Row(random_logits(i, vocab=300)[:12], params(logprobs=True, top_logprobs=20)) for i in range(2)])
    assert sorted(result.top_ids[0, :12]) == list(range(12))
    assert (result.top_ids[0, 12:] == -1).all() and (result.top_logprobs[0, 12:] == -np.inf).all()


# ---- packing and counting --------------------------------------------------------------------------------------------


def test_rows_pack_and_unpack() -> None:
    p = SamplingParams(**{**FULL, "min_tokens": 4, "allowed_token_ids": (1, 2)})
    arrays = unpack_rows(empty_rows(3).at[2].set(pack_row(p, 2**62 + 5)))
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert getattr(arrays, name)[2] == np.float32(getattr(p, name))
    for name in ("top_k", "min_tokens", "top_logprobs"):
        assert getattr(arrays, name)[2] == getattr(p, name)
    assert arrays.restricted.tolist() == [0, 0, 1] and arrays.wants_logprobs.tolist() == [0, 0, 1]
    assert arrays.seed[2].tolist() == [2**30, 5]
    assert (
        arrays.num_bias[2] == 2
        and arrays.bias_ids[2, :2].tolist() == [1, 2]
        and arrays.bias_values[2, :2].tolist() == [3, -1]
    )
    assert arrays.temperature[:2].tolist() == [0, 0]


def test_uses_penalties() -> None:
    assert not uses_penalties(GREEDY)
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", 0.5), ("frequency_penalty", -0.5)):
        assert uses_penalties(params(**{name: value}))


@pytest.mark.parametrize("max_len", [10, 256, 700])
def test_counts_reset_and_update(max_len: int) -> None:
    rng, vocab = np.random.default_rng(0), 50
    history = rng.integers(0, vocab, (4, max_len)).astype(np.int32)
    num_tokens = np.array([max_len, max_len // 2, 3, max_len])
    num_prompt = np.array([max_len // 3, max_len // 2, 1, 2])
    dirty = TokenCounts.of(jnp.ones((5, vocab), bool), jnp.full((5, vocab), 9))
    slots = np.array([3, 0, 1, 99])  # the last row is padding
    counts = jax.jit(reset_counts)(dirty, slots, history, num_prompt, num_tokens)
    tokens, active = np.array([1, 2, 3, 4, 5]), np.array([True, True, False, True, True])
    counts = jax.jit(update_counts)(counts, tokens, active)
    for row, slot in enumerate(slots[:3]):
        prompt, output = history[row, : num_prompt[row]], history[row, num_prompt[row] : num_tokens[row]]
        expected = np.bincount(output, minlength=vocab)
        expected[tokens[slot]] += active[slot]
        np.testing.assert_array_equal(counts.in_output[slot], expected)
        np.testing.assert_array_equal(np.nonzero(np.asarray(counts.in_prompt[slot]))[0], np.unique(prompt))
    assert counts.in_prompt[2].all() and (np.asarray(counts.in_output[2]) == 9).all()  # inactive, not reset
    assert np.asarray(counts.in_output[4]).sum() == 9 * vocab + 1


def test_resetting_only_padding_changes_nothing() -> None:
    counts = jax.jit(update_counts)(empty_counts(2, 20), jnp.array([3, 3]), jnp.array([True, True]))
    same = jax.jit(reset_counts)(
        counts, np.array([2, -1]), np.zeros((2, 8), np.int32), np.array([4, 4]), np.array([8, 8])
    )
    assert (same.in_output == counts.in_output).all() and (same.in_prompt == counts.in_prompt).all()


@pytest.mark.parametrize("everywhere", [False, True], ids=["layout", "sums too"])
def test_a_sampled_row_is_the_same_on_accelerators(monkeypatch: pytest.MonkeyPatch, everywhere: bool) -> None:
    """Everything at once, over a vocabulary of several slices and a rest. The layout changes no bit.

    Where rows are summed plainly too, log-probabilities may differ by rounding.
    """
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}
    asked = params(**settings, frequency_penalty=0.2, logprobs=True, top_logprobs=20, logit_bias={5: 2.0})
    rows = [
        Row(random_logits(seed, vocab=5000), asked, seed=seed, in_prompt=(1, 2, 3), in_output=(3, 4, 4))
        for seed in range(16)
    ]
    rows[3] = dataclasses.replace(rows[3], logits=np.round(rows[3].logits))  # ties
    results = []
    for on_cpu in (True, False):
        asked_of = SimpleNamespace(on_cpu=lambda on_cpu=on_cpu: on_cpu)
        if everywhere:
            monkeypatch.setattr(devices, "on_cpu", asked_of.on_cpu)
        else:
            monkeypatch.setattr(vocabulary_passes, "devices", asked_of)
        run_jitted.clear_cache()
        results.append(run_exactly(rows))
    run_jitted.clear_cache()
    for ours, theirs in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        if everywhere and ours.dtype == np.float32:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs)
