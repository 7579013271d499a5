"""QuantizedTensor: exact round trips, error bounds, shapes that follow slices, refusals that say what would work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import tensors
from pallas_kernels.matmul.cases import FORMATS
from pallas_kernels.tensors import QuantizedTensor, assemble, dequantize, quantize, sparsify_2_4


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("block", [2, 8, 64, 256])
def test_nibbles_survive_packing(block: int) -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 5, 2 * block)), jnp.int8)
    packed = tensors.pack(values, block)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 5, block)
    np.testing.assert_array_equal(tensors.unpack(packed, block), values)


def test_a_byte_holds_inputs_half_a_block_apart() -> None:
    packed = tensors.pack(jnp.arange(8, dtype=jnp.int8)[None] % 8, 4)
    np.testing.assert_array_equal(packed, [[0x20, 0x31, 0x64, 0x75]])


def test_split_nibbles_meets_the_packed_values() -> None:
    x, values = normal(3, 512), jnp.asarray(np.random.default_rng(0).integers(-8, 8, (4, 512)), jnp.int8)
    block = tensors.pack_block_of(512)
    packed = tensors.pack(values, block)
    low, high = tensors.split_nibbles(x, block)
    signed = packed.astype(jnp.int32)
    halves = [((signed & 0xF) ^ 8) - 8, ((signed >> 4) ^ 8) - 8]
    product = low @ halves[0].T + high @ halves[1].T
    np.testing.assert_allclose(product, x @ values.T.astype(jnp.float32), atol=1e-4)


@pytest.mark.parametrize(("size", "block"), [(4096, 256), (896, 128), (14, 2), (768, 256), (160, 32)])
def test_pack_block_is_a_power_of_two_that_divides(size: int, block: int) -> None:
    assert tensors.pack_block_of(size) == block


@pytest.mark.parametrize("name", FORMATS)
def test_format_names_itself(name: str) -> None:
    assert FORMATS[name](normal(64, 512)).format == name


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("group_size", [None, 32])
def test_integers_are_within_half_a_step(dtype: str, levels: int, group_size: int | None) -> None:
    weight = normal(24, 128)
    tensor = quantize(weight, dtype, group_size=group_size)
    grouped = np.asarray(weight).reshape(24, -1, group_size or 128)
    step = np.abs(grouped).max(axis=-1) / levels
    error = np.abs(np.asarray(dequantize(tensor)) - weight).reshape(grouped.shape).max(axis=-1)
    assert np.all(error <= 0.5001 * step)
    assert np.all(error.max(axis=-1) > 0)


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 255), ("int4", 15)])
def test_zero_points_use_the_whole_range(dtype: str, levels: int) -> None:
    weight = normal(24, 128) + 2.5
    tensor = quantize(weight, dtype, group_size=64, zero_point=True)
    grouped = np.asarray(weight).reshape(24, 2, 64)
    step = (np.maximum(grouped.max(axis=-1), 0) - np.minimum(grouped.min(axis=-1), 0)) / levels
    error = np.abs(np.asarray(dequantize(tensor)) - weight).reshape(grouped.shape).max(axis=-1)
    assert np.all(error <= 1.0001 * step)  # half a step, and half a step by which the zero point is rounded
    symmetric = np.abs(np.asarray(dequantize(quantize(weight, dtype, group_size=64))) - weight).max()
    assert error.max() < symmetric


def test_fp8_keeps_four_significant_bits() -> None:
    weight = normal(16, 256)
    restored = dequantize(quantize(weight, "float8_e4m3fn"))
    large = jnp.abs(weight) > 2.0**-6 * jnp.max(jnp.abs(weight), axis=1, keepdims=True)  # normal numbers
    assert jnp.max(jnp.where(large, jnp.abs(restored / weight - 1), 0)) <= 2.0**-4


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
def test_a_group_of_zeros_stays_zero(dtype: str) -> None:
    weight = normal(4, 128).at[1].set(0)
    assert not np.any(dequantize(quantize(weight, dtype, group_size=64))[1])


def test_values_on_the_grid_come_back_exactly() -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (16, 512)), jnp.int8)
    scales, zeros = 2.0 ** normal(4, 16).round(), normal(4, 16).round()
    wanted = (np.asarray(values).reshape(16, 4, 128) - np.asarray(zeros).T[..., None]) * np.asarray(scales).T[..., None]
    tensor = assemble(values, scales, zeros, dtype="int4")
    assert tensor.format == "int4/g128/zp"
    np.testing.assert_array_equal(dequantize(tensor), wanted.reshape(16, 512))


def test_outlier_columns_are_kept_as_they_are() -> None:
    weight = normal(16, 128).at[:, 5].set(1000.0)
    tensor = quantize(weight, "int8", outlier_columns=[5, 77])
    restored = dequantize(tensor)
    np.testing.assert_array_equal(restored[:, [5, 77]], weight[:, [5, 77]])
    assert jnp.max(jnp.abs(restored - weight)) < 0.02  # the outlier did not stretch the others' scale


def test_two_of_four_keeps_the_largest() -> None:
    weight = normal(8, 256)
    fours = np.asarray(weight).reshape(8, 64, 4)
    order = np.argsort(np.abs(fours), axis=-1)
    wanted = fours.copy()
    np.put_along_axis(wanted, order[..., :2], 0, axis=-1)
    np.testing.assert_array_equal(dequantize(sparsify_2_4(weight)), wanted.reshape(8, 256))


def test_two_of_four_of_equal_values_keeps_two() -> None:
    assert jnp.sum(dequantize(sparsify_2_4(jnp.ones((2, 64))))) == 64


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_sparse_values_are_rounded(dtype: str) -> None:
    weight = normal(8, 256)
    dense, rounded = dequantize(sparsify_2_4(weight)), dequantize(sparsify_2_4(weight, dtype))
    np.testing.assert_array_equal(rounded == 0, dense == 0)
    assert 0 < jnp.max(jnp.abs(rounded - dense)) <= 2.0**-4 * jnp.max(jnp.abs(weight))


@pytest.mark.parametrize(
    ("name", "bits"), [("int8", 8), ("int4", 4), ("int4/g128", 4.125), ("2:4-int8", 5), ("2:4", 9)]
)
def test_bytes_are_what_the_format_promises(name: str, bits: float) -> None:
    tensor = FORMATS[name](normal(64, 1024, dtype="bfloat16"))
    scales_per_output = 4 * 64 * (name in ("int8", "int4", "2:4-int8"))
    assert tensor.num_bytes == 64 * 1024 * bits / 8 + scales_per_output


@pytest.mark.parametrize("name", ["int8", "int4/g64/zp", "w8a8-fp8", "2:4-int8", "w8a8-int8/outliers"])
def test_experts_are_quantized_one_by_one(name: str) -> None:
    weight = normal(3, 16, 512)
    together = FORMATS[name](weight)
    assert together.shape == weight.shape and together.format == name
    for expert in range(3):
        np.testing.assert_array_equal(dequantize(together)[expert], dequantize(FORMATS[name](weight[expert])))


def test_shards_along_either_axis_are_tensors() -> None:
    weight = normal(64, 1024)
    tensor = quantize(weight, "int4", group_size=128)
    outs = replace(tensor, values=tensor.values[16:32], scales=tensor.scales[:, 16:32])
    ins = replace(tensor, values=tensor.values[:, 128:256], scales=tensor.scales[2:4])  # inputs 256 : 512
    for shard, wanted in ((outs, dequantize(tensor)[16:32]), (ins, dequantize(tensor)[:, 256:512])):
        shard.check()
        assert shard.shape == wanted.shape and shard.group_size == 128
        np.testing.assert_array_equal(dequantize(shard), wanted)


def test_a_tensor_passes_through_jit_and_tree_map() -> None:
    tensor = quantize(normal(8, 256), "int4", group_size=64)
    doubled = jax.jit(lambda t: replace(t, scales=t.scales * 2))(tensor)
    assert isinstance(doubled, QuantizedTensor) and doubled.format == tensor.format
    np.testing.assert_array_equal(dequantize(doubled), 2 * dequantize(tensor))
    assert jax.eval_shape(lambda: tensor).shape == (8, 256)


@settings(max_examples=20)
@given(st.integers(1, 5), st.sampled_from([1e-20, 1.0, 1e20]), st.sampled_from(["int8", "float8_e4m3fn"]))
def test_rows_are_quantized_to_their_largest(rows: int, size: float, dtype: str) -> None:
    x = normal(rows, 64) * size
    values, scales = tensors.quantize_rows(x, dtype)
    assert values.dtype == jnp.dtype(dtype) and scales.shape == (rows,)
    largest = jnp.max(jnp.abs(values.astype(jnp.float32)), axis=1)
    np.testing.assert_allclose(largest * scales, jnp.max(jnp.abs(x), axis=1), rtol=1e-6)


def test_rows_of_zeros_and_of_nan() -> None:
    values, scales = tensors.quantize_rows(jnp.array([[0.0, 0.0], [jnp.nan, 1.0]]), "int8")
    assert scales[0] == 1 and not np.any(values[0]) and np.isnan(scales[1])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("width", [5, 64, 2048])
def test_no_row_loses_what_is_no_number(width: int, broken: float) -> None:
    """Compiled, a maximum of many drops NaN."""
    x = np.array(normal(16, width))
    for column in range(0, width, 1 + width // 7):
        x[column % 16, column] = broken
    values, scales = jax.jit(lambda x: tensors.quantize_rows(x, "int8"))(x)
    np.testing.assert_array_equal(np.isnan(scales), ~np.isfinite(x).all(axis=1))
    assert not np.any(values[np.isnan(scales)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize(w, "int2"), "int2 is not one of int8, int4, float8_e4m3fn"),
        (lambda w: quantize(w, "int8", group_size=48), "group_size 48 does not divide 128 inputs"),
        (
            lambda w: quantize(w, "float8_e4m3fn", zero_point=True),
            "zero_point needs one of int8, int4, not float8_e4m3fn",
        ),
        (lambda w: quantize(w, "int8", activation="int4"), "activation 'int4' is not one of int8, float8_e4m3fn"),
        (lambda w: quantize(w, "int8", group_size=64, activation="int8"), "one scale per output.*got int8/g64"),
        (lambda w: quantize(w, "int4", activation="int8"), "needs dense int8 values.*got int4"),
        (lambda w: quantize(w, "int8", outlier_columns=[128]), r"\[128\] are not all within 0..127"),
        (lambda w: quantize(w, "int8", outlier_columns=[]), "with n > 0"),
        (lambda w: quantize(w[0], "int8"), r"floating-point \[..., out, in\], got float32 \(128,\)"),
        (lambda w: quantize(w[:, :7], "int4"), "7 nibbles cannot be packed"),
        (lambda w: sparsify_2_4(w[:, :12]), "a multiple of 8 inputs, got 12"),
        (lambda w: sparsify_2_4(w, "int4"), "2:4 sparse values are one of .* not int4"),
        (lambda w: replace(quantize(w, "int8"), scales=None).check(), "int8 values need scales"),
        (lambda w: replace(quantize(w, "int8"), scales=jnp.ones((1, 3))).check(), r"scales \(1, 3\) do not fit"),
        (lambda w: replace(quantize(w, "int8"), scales=jnp.ones((3, 16))).check(), "do not divide into 3 groups"),
        (lambda w: replace(quantize(w, "int4"), pack_block=96).check(), "128 nibbles do not divide into blocks of 96"),
    ],
)
def test_what_does_not_fit_says_so(call: Callable[[jax.Array], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(normal(16, 128))


def test_rows_too_small_for_a_scale_become_zeros() -> None:
    tiny = jnp.zeros((2, 8)).at[0, 0].set(1e-36)
    for dtype in ("int8", "float8_e4m3fn"):
        assert np.isfinite(tensors.dequantize(tensors.quantize(tiny, dtype))).all()
        assert np.isfinite(tensors.dequantize(tensors.sparsify_2_4(tiny, dtype))).all()


def test_a_sparse_weight_keeps_nan() -> None:
    weight = jnp.array([[1.0, 2.0, jnp.nan, 3.0, 1.0, 2.0, 3.0, 4.0]])
    assert np.isnan(tensors.dequantize(tensors.sparsify_2_4(weight))[0, 2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zeros": jnp.zeros((1, 1))}, r"zeros \(1, 1\)"),
        ({"scales": jnp.ones((1, 8), jnp.int32)}, "scales int32 must be floating-point"),
        ({"values": jnp.ones((8, 64), jnp.int32)}, "values int32 with scales are not one of int8"),
        ({"outlier_columns": jnp.array([3])}, "come together or not at all"),
        (
            {"outlier_columns": jnp.array([300]), "outlier_values": jnp.ones((8, 1))},
            r"outlier columns must be from 0 to 63, got \[300\]",
        ),
        ({"outlier_columns": jnp.array([3]), "outlier_values": jnp.ones((8, 2))}, r"outlier_values \(8, 2\) must be"),
    ],
)
def test_arrays_that_do_not_belong_together_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(tensors.quantize(jnp.ones((8, 64)), "int8"), **changes).check()


@pytest.mark.parametrize(("dtype", "value"), [("int4", 9), ("int8", 200), ("int4", -9)])
def test_values_that_do_not_fit_are_named(dtype: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{dtype} values .* to {max(value, 1)}|from {value} to"):
        tensors.assemble(jnp.full((2, 8), value), jnp.ones((1, 2)), dtype=dtype)
