"""Vocabulary over every number of shards against the whole array: which ids lie where, and how devices agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vocabulary_split import SPLITS, WHOLE, Split

from sharding.vocabulary import UNUSED_ID, Vocabulary

SIZES = (1, 31, 96, 101, 4096)


@pytest.fixture(params=SPLITS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_every_id_has_one_column(name: str, size: int) -> None:
    split = Split(name, size)
    n, local = split.vocabulary.num_shards, split.vocabulary.local
    assert n * local >= size > n * (local - 1)
    ids = np.array([*range(size), -1, -local, UNUSED_ID], np.int32)
    columns = split.everywhere(split.vocabulary.columns, (ids, WHOLE))
    for shard in range(n):
        expected = np.where((ids // local == shard) & (ids >= 0), ids % local, UNUSED_ID)
        np.testing.assert_array_equal(columns[shard], expected)


@pytest.mark.parametrize("size", SIZES)
def test_words_are_the_bits_of_the_columns(name: str, size: int) -> None:
    split = Split(name, size)
    bits = np.random.default_rng(size).integers(0, 2, (3, size)).astype(bool)
    whole = np.pad(bits, ((0, 0), (0, -size % 32)), constant_values=True)
    words = np.packbits(whole, axis=1, bitorder="little").view("<u4")
    found = split.everywhere(split.vocabulary.words, (words, WHOLE))
    assert found.shape[-1] == -(-split.vocabulary.local // 32)
    local = split.vocabulary.local
    for shard in range(split.vocabulary.num_shards):
        own = np.unpackbits(found[shard].astype("<u4").view(np.uint8), axis=1, bitorder="little").astype(bool)
        expected = bits[:, shard * local : (shard + 1) * local]
        np.testing.assert_array_equal(own[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("size", [7, 101])
def test_devices_agree(name: str, size: int) -> None:
    split = Split(name, size)
    vocabulary, columns = split.vocabulary, split.columns
    x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    padded = split.pad(x, -np.inf)
    whole = split.everywhere(vocabulary.whole, (padded, columns))
    largest = split.everywhere(lambda x: vocabulary.max(jnp.max(x, axis=1)), (padded, columns))
    over = split.everywhere(lambda x: vocabulary.sum(jnp.sum(x > 0, axis=1, dtype=jnp.int32)), (padded, columns))
    for shard in range(vocabulary.num_shards):
        np.testing.assert_array_equal(whole[shard], x)
        np.testing.assert_array_equal(largest[shard], x.max(axis=1))
        np.testing.assert_array_equal(over[shard], (x > 0).sum(axis=1))


@pytest.mark.parametrize("columns", [1, 5, 64])
def test_sums_are_added_shard_after_shard(name: str, columns: int) -> None:
    split = Split(name, 101)
    n = split.vocabulary.num_shards
    parts = np.random.default_rng(1).standard_normal((3, n * columns)).astype(np.float32)
    expected = parts[:, :columns].copy()
    for shard in range(1, n):
        expected += parts[:, shard * columns : (shard + 1) * columns]
    wide = split.everywhere(split.vocabulary.sum_in_order, (parts, split.columns))
    narrow = split.everywhere(lambda x: split.vocabulary.sum_in_order(x[:, 0]), (parts, split.columns))
    for shard in range(n):
        np.testing.assert_array_equal(wide[shard], expected)
        np.testing.assert_array_equal(narrow[shard], expected[:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_taken_by_id(name: str, dtype: str) -> None:
    split = Split(name, 101)
    x = np.random.default_rng(2).standard_normal((3, 101)).astype(np.float32)
    x[0, :4] = np.inf, -np.inf, np.nan, 0
    x = np.asarray(jnp.asarray(x, dtype))
    ids = np.stack([np.arange(101), np.arange(101)[::-1], np.full(101, 100)]).astype(np.int32)

    def take(x: jax.Array, ids: jax.Array) -> jax.Array:
        found = split.vocabulary.take(x, ids)
        assert found.dtype == x.dtype
        return found.astype(jnp.float32)

    taken = split.everywhere(take, (split.pad(x, -np.inf), split.columns), (ids, WHOLE))
    for shard in range(split.vocabulary.num_shards):
        np.testing.assert_array_equal(taken[shard], np.take_along_axis(x, ids, axis=1).astype(np.float32))


def test_candidates_keep_their_bits_and_get_ids(name: str) -> None:
    split = Split(name, 101)
    n, local = split.vocabulary.num_shards, split.vocabulary.local
    values = np.random.default_rng(3).standard_normal((3, n)).astype(np.float32)
    values[:, 0] = np.inf, np.nan, -0.0
    columns = np.random.default_rng(4).integers(0, local, (3, n)).astype(np.int32)

    def gathered(values: jax.Array, columns: jax.Array) -> jax.Array:
        found, ids = split.vocabulary.gather_candidates(values, columns)
        return jnp.stack([jax.lax.bitcast_convert_type(found, jnp.int32), ids])

    found = split.everywhere(gathered, (values, split.columns), (columns, split.columns))
    for shard in range(n):
        np.testing.assert_array_equal(found[shard, 0, ..., 0], values.view(np.int32).T)
        np.testing.assert_array_equal(found[shard, 1, ..., 0], (columns + np.arange(n) * local).T)


def test_alone_everything_stays_as_it_is() -> None:
    """Not even an operation is traced."""
    vocabulary = Vocabulary(40)
    x, words, ids = jnp.zeros((2, 40)), jnp.zeros((2, 2), jnp.uint32), jnp.array([[3, UNUSED_ID]] * 2)
    assert (vocabulary.first, vocabulary.local) == (0, 40)
    assert vocabulary.columns(ids) is ids and vocabulary.words(words) is words
    for same in (vocabulary.max, vocabulary.sum, vocabulary.sum_in_order, vocabulary.whole):
        assert same(x) is x
    assert vocabulary.gather(x).shape == (1, 2, 40)


def test_shards_need_axes() -> None:
    with pytest.raises(AssertionError, match="shards without axes"):
        Vocabulary(40, (), 2)
