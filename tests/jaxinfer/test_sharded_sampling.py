"""sample() and penalty counts over a vocabulary split over devices, against one device that has it all.

Whatever is exact must be the same to the last bit: greedy tokens, ids and their order, ranks, top-k, flags. Sums over
the vocabulary round differently, so log-probabilities are close and a draw may, once in a long while, be a neighbour.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from vocabulary_split import WHOLE, Split, agreed

from jaxinfer import sampling
from jaxinfer.request import MAX_TOP_LOGPROBS, SamplingParams
from jaxinfer.sampling import SampleResult, TokenCounts, allowed_words, pack_row, unpack_rows
from jaxinfer.truncation import top_k_threshold
from sharding.vocabulary import Vocabulary

SIZES = (96, 101, 4096, 32003)  # the second and the last leave padding
DEFAULT = (("2", 101), ("4", 96), ("2x2", 4096), ("8", 32003))  # of all splits over all sizes; the others are slow
SLOTS = 16
GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class Batch:
    """What sample() takes, of the whole vocabulary."""

    logits: np.ndarray  # f32[slots, vocab]
    params: list[SamplingParams]
    seeds: np.ndarray
    positions: np.ndarray
    num_generated: np.ndarray
    stop_ids: np.ndarray
    in_prompt: np.ndarray
    in_output: np.ndarray
    dtype: str = "float32"

    def arrays(self, pad: Callable[[np.ndarray, Any], np.ndarray] = lambda x, fill: x) -> tuple[Any, ...]:
        """sample()'s arguments; `pad` gives what has a column per token its padding."""
        vocab, active = self.logits.shape[1], np.ones(len(self.params), bool)
        return (
            jnp.asarray(pad(self.logits, -np.inf), self.dtype),
            unpack_rows(
                jnp.asarray(np.stack([pack_row(p, int(s)) for p, s in zip(self.params, self.seeds, strict=True)]))
            ),
            TokenCounts.of(jnp.asarray(pad(self.in_prompt, False)), jnp.asarray(pad(self.in_output, 0))),
            jnp.asarray(np.stack([allowed_words(p, vocab) for p in self.params])),
            jnp.asarray(self.stop_ids, jnp.int32),
            jnp.asarray(self.positions, jnp.int32),
            jnp.asarray(self.num_generated, jnp.int32),
            jnp.asarray(active),
        )

    def head(self, slots: int) -> Batch:
        """The first rows alone."""
        rows = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: x if isinstance(x, str) else x[:slots] for name, x in rows.items()})


def batch_of(vocab: int, params: SamplingParams | list[SamplingParams], seed: int = 0, scale: float = 3.0) -> Batch:
    """Random logits, of which some tie; stop ids and histories all over the vocabulary."""
    rng = np.random.default_rng([seed, vocab])
    logits = (scale * rng.standard_normal((SLOTS, vocab))).astype(np.float32)
    logits[::4] = np.round(logits[::4], 1)
    stop_ids = np.where(rng.random((SLOTS, 8)) < 0.7, rng.integers(0, vocab, (SLOTS, 8)), -1)
    stop_ids[:, 3] = np.argmax(logits, axis=1)
    return Batch(
        logits=logits,
        params=params if isinstance(params, list) else [params] * SLOTS,
        seeds=rng.integers(0, 2**63, SLOTS),
        positions=rng.integers(0, 2**16, SLOTS),
        num_generated=rng.integers(0, 4, SLOTS),
        stop_ids=stop_ids,
        in_prompt=rng.random((SLOTS, vocab)) < 0.2,
        in_output=rng.poisson(0.2, (SLOTS, vocab)).astype(np.int32),
    )


split_of = functools.cache(Split)


@functools.cache
def program(split: Split) -> Callable[..., SampleResult]:
    specs = (split.columns, WHOLE, split.columns, *[WHOLE] * 5)
    return split.compile(functools.partial(sampling.sample, vocabulary=split.vocabulary), *specs)


def sharded(split: Split, batch: Batch) -> SampleResult:
    """What all devices agree on; padding is never among it."""
    vocab = split.vocabulary.size
    result = agreed(program(split)(*batch.arrays(split.pad)))
    assert (result.tokens >= 0).all() and (result.tokens < vocab).all() and (result.top_ids < vocab).all()
    return result


single = jax.jit(sampling.sample)


def alone(batch: Batch) -> SampleResult:
    return jax.tree.map(np.asarray, single(*batch.arrays()))


def assert_same(found: SampleResult, expected: SampleResult) -> None:
    """All but the draws' rounding: for greedy rows, and where no draw happened to be near a boundary."""
    np.testing.assert_array_equal(found.bad, expected.bad)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=2e-5)


@pytest.fixture(
    params=[
        pytest.param((name, size), id=f"{size} over {name}", marks=() if (name, size) in DEFAULT else pytest.mark.slow)
        for name in ("2", "4", "8", "2x2")
        for size in SIZES
    ]
)
def split(request: pytest.FixtureRequest) -> Split:
    return split_of(*request.param)


# ---- greedy


def settings(vocab: int) -> dict[str, SamplingParams]:
    """Every feature that changes logits; ids on both sides of every shard's border."""
    borders = sorted({b + d for n in (2, 4, 8) for s in range(n) for b in [s * -(-vocab // n)] for d in (-1, 0, 1)})
    ids = [i for i in borders if 0 <= i < vocab]
    fields: dict[str, dict[str, Any]] = {
        "plain": {},
        "bias": {"logit_bias": {i: float(k % 5) * 4 - 6 for k, i in enumerate(ids)}},
        "stops held back": {"min_tokens": 3, "max_tokens": 9},
        "allowed": {"allowed_token_ids": tuple(ids[1::2])},
        "allowed in one shard": {"allowed_token_ids": (vocab - 1, vocab - 2)},
        "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": -0.4},
        "log-probabilities": {"logprobs": True, "top_logprobs": 5},
    }
    fields["all"] = {name: value for part in fields.values() for name, value in part.items()}
    fields["all"]["allowed_token_ids"] = tuple(range(0, vocab, 3))
    return {name: SamplingParams(temperature=0.0, **part) for name, part in fields.items()}


def test_greedy_rows_are_the_same(split: Split) -> None:
    vocab = split.vocabulary.size
    plain = alone(batch_of(vocab, GREEDY))
    for feature, params in settings(vocab).items():
        batch = batch_of(vocab, params)
        found, expected = sharded(split, batch), alone(batch)
        assert_same(found, expected)
        changed = (expected.tokens != plain.tokens).any()
        assert changed != (feature in ("plain", "log-probabilities")), feature
        assert params.logprobs == found.logprobs.any(), feature


def test_the_lowest_id_wins_a_tie_across_shards(split: Split) -> None:
    vocab = split.vocabulary.size
    batch = batch_of(vocab, SamplingParams(temperature=0.0, logprobs=True, top_logprobs=20), scale=0.1)
    local = split.vocabulary.local
    rows = [
        [local - 1, local],
        [local, vocab - 1],
        [0, vocab - 1],
        [1, local + 1, min(2 * local, vocab) - 1],
        [vocab - 1],
    ]
    for row, ids in enumerate(rows):
        batch.logits[row, ids] = 9.0
    batch.logits[len(rows)] = 0.0  # all are tied
    batch.logits[len(rows) + 1] = np.where(np.arange(vocab) % 2, 0.0, -0.0)
    found = sharded(split, batch)
    assert found.tokens[: len(rows) + 2].tolist() == [min(ids) for ids in rows] + [0, 0]
    assert found.top_ids[len(rows)].tolist() == list(range(MAX_TOP_LOGPROBS))
    assert_same(found, alone(batch))


def test_bfloat16_logits() -> None:
    for params in (settings(101)["all"], SamplingParams(temperature=1.0, top_p=0.9, logprobs=True, top_logprobs=20)):
        batch = dataclasses.replace(batch_of(101, params), dtype="bfloat16")
        assert_same(sharded(split_of("2", 101), batch), alone(batch))


# ---- draws

DRAWS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "cold": {"temperature": 0.05},
    "hot": {"temperature": 50.0},
    "top-k 1": {"top_k": 1},
    "top-k": {"top_k": 40},
    "top-k of more than there are": {"top_k": 10**6},
    "top-p": {"top_p": 0.9},
    "hot top-p": {"temperature": 50.0, "top_p": 0.5},
    "tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
}


def test_a_seed_draws_the_same_token(split: Split) -> None:
    vocab = split.vocabulary.size
    for seed, fields in enumerate(DRAWS.values()):
        batch = batch_of(
            vocab, SamplingParams(**{"temperature": 1.0, "logprobs": True, "top_logprobs": 3, **fields}), seed
        )
        found, expected = sharded(split, batch), alone(batch)
        assert_same(found, expected)
        assert len(set(found.tokens.tolist())) > 4


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """Any combination; no more than 40 tokens allowed where a mask is in force."""
    ids = rng.permutation(vocab)
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.01, 0.4, 1.0, 2.0, 20.0])),
        top_k=int(rng.choice([0, 1, 3, 50, vocab - 1, vocab])),
        top_p=float(rng.choice([1.0, rng.uniform(1e-6, 1.0)])),
        min_p=float(rng.choice([0.0, rng.uniform(0, 0.5)])),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        presence_penalty=float(rng.choice([0.0, 1.1, -0.6])),
        frequency_penalty=float(rng.choice([0.0, 0.3])),
        logit_bias={int(i): float(rng.uniform(-5, 5)) for i in ids[: rng.integers(0, 9)]},
        min_tokens=int(rng.integers(0, 4)),
        max_tokens=9,
        allowed_token_ids=tuple(ids[:40].tolist()) if rng.random() < 0.3 else None,
        logprobs=bool(rng.random() < 0.5),
    )


def test_any_combination(split: Split) -> None:
    """Many rows; the draws of fewer than one in a thousand may differ, by rounding."""
    vocab, different, rows = split.vocabulary.size, 0, 0
    for seed in range(40):
        rng = np.random.default_rng([seed, vocab])
        batch = batch_of(vocab, [random_params(rng, vocab) for _ in range(SLOTS)], seed, float(rng.choice([0.2, 1, 6])))
        found, expected = sharded(split, batch), alone(batch)
        np.testing.assert_array_equal(found.bad, expected.bad)
        same = found.tokens == expected.tokens
        greedy = np.array([p.temperature == 0 for p in batch.params])
        assert (same | ~greedy).all()
        np.testing.assert_allclose(found.logprobs[same], expected.logprobs[same], rtol=1e-5, atol=2e-5)
        different, rows = different + int((~same).sum()), rows + SLOTS
    assert different <= 1 + rows // 1000


def test_many_draws_of_one_distribution() -> None:
    """Frequencies follow from the tokens being the single device's, which test_sampling.py holds to the definition."""
    batch, split = batch_of(101, SamplingParams(temperature=1.0, top_p=0.95), scale=1.0), split_of("2", 101)
    different, tokens = 0, []
    for turn in range(100):
        batch.positions = turn * SLOTS + np.arange(SLOTS)
        found = sharded(split, batch)
        different += int((found.tokens != alone(batch).tokens).sum())
        tokens += found.tokens.tolist()
    assert different <= 1 and len(set(tokens)) > 90


def test_top_k_thresholds_have_the_same_bits(split: Split) -> None:
    vocab = split.vocabulary.size
    x = batch_of(vocab, GREEDY).logits
    wanted = np.arange(SLOTS) % 5 != 4
    find = split.compile(
        functools.partial(top_k_threshold, vocabulary=split.vocabulary), split.columns, WHOLE, WHOLE, WHOLE
    )
    whole = jax.jit(functools.partial(top_k_threshold, vocabulary=Vocabulary(vocab)))
    for k in (1, 7, vocab // 2, vocab - 1):
        top_k = np.full(SLOTS, k)
        found = agreed(find(split.pad(x, -np.inf), x.max(axis=1), top_k, wanted))
        np.testing.assert_array_equal(found, whole(x, x.max(axis=1), top_k, wanted))


# ---- broken rows


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 9}], ids=str)
def test_rows_that_are_not_finite_are_flagged_everywhere(split: Split, fields: dict) -> None:
    vocab = split.vocabulary.size
    batch = batch_of(vocab, SamplingParams(**fields, logprobs=True, top_logprobs=5))
    local = split.vocabulary.local
    poisons = [np.nan, -np.float32(np.nan), np.inf]
    where = [0, local - 1, local, vocab - 1]
    for row, (poison, at) in enumerate((p, w) for p in poisons for w in where):
        batch.logits[row, at] = poison
    batch.logits[12], batch.logits[13] = np.nan, -np.inf
    found, expected = sharded(split, batch), alone(batch)
    assert found.bad.tolist() == expected.bad.tolist() == [True] * 14 + [False] * 2
    np.testing.assert_array_equal(found.tokens[14:], expected.tokens[14:])
    np.testing.assert_allclose(found.logprobs[14:], expected.logprobs[14:], rtol=1e-5)
    assert found.tokens[13] == 0


@pytest.mark.parametrize(("name", "vocab"), [("2", 1), ("8", 9), ("4", 21), ("8", 12)])
def test_shards_of_nothing_but_padding(name: str, vocab: int) -> None:
    """9 tokens are two for each of eight devices: the last three hold none. Lists are filled up as on one device."""
    split = split_of(name, vocab)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, top_k=3, top_p=0.99, logprobs=True, top_logprobs=20)
        batch = batch_of(vocab, params)
        batch.in_prompt[:], batch.in_output[:], batch.stop_ids[:] = False, 0, -1
        batch.logits[1, vocab // 2 :] = -np.inf  # tokens of probability 0 are listed, padding is not
        batch.logits[2] = -np.inf
        found, expected = sharded(split, batch), alone(batch)
        np.testing.assert_array_equal(found.top_ids, expected.top_ids)
        assert found.bad[2] and expected.bad[2]
        assert_same(*(jax.tree.map(lambda x: np.delete(x, 2, axis=0), result) for result in (found, expected)))


# ---- what it costs

COLLECTIVE = re.compile(
    r"= \S+(?: \S+\))? (all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
)


def executed(text: str, taken: bool) -> Iterator[str]:
    """Lines of optimised HLO that run: from the entry on, branches of conditionals when `taken`, else those for False.

    Loops of no turn run their conditions only, when not `taken`.
    """
    bodies: dict[str, list[str]] = {}
    for part in re.split(r"\n(?=%|ENTRY )", text):
        lines = part.splitlines()
        header = lines[0].removeprefix("ENTRY ").split(" ", 1)[0]
        bodies["ENTRY" if lines[0].startswith("ENTRY ") else header] = lines[1:]

    def run(name: str) -> Iterator[str]:
        for line in bodies[name]:
            yield line
            called = re.findall(r"(calls|to_apply|condition|body|true_computation|false_computation)=(%[\w.-]+)", line)
            for listed in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [
                    ("branch", branch) for branch in listed.split(", ")[None if taken else 0 : None if taken else 1]
                ]
            for role, target in called:
                if taken or role not in ("body", "true_computation"):
                    yield from run(target)

    return run("ENTRY")


def collectives(text: str, taken: bool) -> list[str]:
    return [found[1] for line in executed(text, taken) if (found := COLLECTIVE.search(line))]


def test_choosing_greedily_is_one_collective(split: Split) -> None:
    vocab = split.vocabulary.size
    text = program(split).lower(*batch_of(vocab, GREEDY).arrays(split.pad)).compile().as_text()
    assert collectives(text, taken=False) == ["all-gather"]
    assert len(collectives(text, taken=True)) > 5  # the count sees what draws and log-probabilities need


def test_no_device_gets_the_logits() -> None:
    """No array of the program is much wider than a device's columns."""
    split = split_of("8", 32003)
    text = program(split).lower(*batch_of(32003, GREEDY).arrays(split.pad)).compile().as_text()
    widths = {int(size) for shape in re.findall(r"\w+\[([\d,]+)\]", text) for size in shape.split(",")}
    own = split.vocabulary.local
    assert own in widths and max(widths) < own + 64


# ---- rows are independent


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 40, "top_p": 0.85}], ids=str)
def test_rows_are_bit_identical_in_any_batch(fields: dict) -> None:
    split = split_of("2x2", 4096)
    batch = batch_of(4096, SamplingParams(**fields, logprobs=True, top_logprobs=5, repetition_penalty=1.2))
    whole = sharded(split, batch)
    for slots in (2, 3):
        part = sharded(split, batch.head(slots))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[: len(a)]), part, whole)


def test_slots_split_over_another_axis() -> None:
    """Half of the slots greedy, half drawn with everything on: each half takes its own branches and loops."""
    split = split_of("2x2 of 2x2x2", 101)
    axes = split.vocabulary.axes
    columns, rows = PartitionSpec("data", axes), PartitionSpec("data")
    run = split.compile(
        functools.partial(sampling.sample, vocabulary=split.vocabulary), columns, rows, columns, *[rows] * 5
    )
    full = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.3, logprobs=True, top_logprobs=3)
    for first, second in ((GREEDY, full), (full, GREEDY), (full, full)):
        batch = batch_of(101, [first] * (SLOTS // 2) + [second] * (SLOTS // 2))
        found = jax.tree.map(
            lambda x: np.asarray(x).reshape(2, 2, 2, SLOTS // 2, *x.shape[2:]), run(*batch.arrays(split.pad))
        )
        expected = alone(batch)
        for pipe in range(2):
            for tensor in range(2):
                assert_same(
                    jax.tree.map(lambda x, at=(pipe, tensor): np.concatenate([*x[at[0], :, at[1]]]), found),
                    _without_unasked(expected, batch),
                )


def _without_unasked(result: SampleResult, batch: Batch) -> SampleResult:
    """One device gives every row log-probabilities when any asks; a half where none does has zeros."""
    asks = np.array([p.logprobs for p in batch.params])
    return dataclasses.replace(
        result,
        logprobs=np.where(asks, result.logprobs, 0),
        top_ids=np.where(asks[:, None], result.top_ids, 0),
        top_logprobs=np.where(asks[:, None], result.top_logprobs, 0),
    )


# ---- counting


@pytest.mark.parametrize(("name", "vocab"), [("8", 9), ("2", 101), ("2x2", 96)])
def test_counts_are_columns_of_the_whole(name: str, vocab: int) -> None:
    split = split_of(name, vocab)
    rng = np.random.default_rng(0)
    history = rng.integers(0, vocab, (3, 300)).astype(np.int32)
    entering = np.array([2, 0, 99]), history, np.array([100, 7, 3]), np.array([300, 150, 9])
    tokens = np.stack([rng.integers(0, vocab, 4), [vocab - 1, 0, -1, 3]])
    active = np.array([True, True, True, False])

    def count(vocabulary: Vocabulary, tokens: jax.Array, *entering: jax.Array) -> TokenCounts:
        counts = sampling.empty_counts(4, vocabulary.local)
        counts = sampling.update_counts(counts, tokens[0], active, vocabulary)
        counts = sampling.reset_counts(counts, *entering, vocabulary)
        return sampling.update_counts(counts, tokens[1], active, vocabulary)

    found = split.compile(functools.partial(count, split.vocabulary), *[WHOLE] * 5)(tokens, *entering)
    expected = jax.jit(functools.partial(count, Vocabulary(vocab)))(tokens, *entering)
    for part, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.concatenate([*part], axis=1)[:, :vocab], whole)
        assert not np.concatenate([*part], axis=1)[:, vocab:].any()
    assert expected.in_output.sum() > 300
