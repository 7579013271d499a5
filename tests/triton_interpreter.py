"""Runs kernels in Triton's interpreter, on the CPU and without torch: `triton_interpreter.py OP BACKEND CASE ...`.

A process of its own, because TRITON_INTERPRET must be set before triton is imported. Prints one line of JSON: for each
case that fails, how. Launches go to the interpreter instead of jax-triton; everything around them is the product's.
`CASE+nan` is an attention case two of whose queries are NaN.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib
import json
import sys
import traceback
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
from triton.runtime import interpreter

from pallas_kernels import devices, triton_launch
from pallas_kernels.attention import cases as attention_cases

NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
    "uint32": "u32",
}
EXACT = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn}  # what the interpreter holds as integers


class HostArray:
    """What the interpreter asks of a tensor, around a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.device = array, array.shape, NAMES[array.dtype.name], "cpu"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def size(self) -> tuple[int, ...]:
        return self.shape

    def storage_offset(self) -> int:
        return 0

    def _itself(self, *_: Any, **__: Any) -> "HostArray":
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = _itself


def run(launch: triton_launch.Launch, device: devices.Device) -> Any:
    """Stands for `triton_launch.run`."""
    is_array = [not isinstance(argument, int) for argument in launch.arguments]

    def call(*arrays: Any) -> tuple[np.ndarray, ...]:
        left = iter(arrays)
        arguments = [
            HostArray(np.ascontiguousarray(next(left))) if array else argument
            for array, argument in zip(is_array, launch.arguments, strict=True)
        ]
        outputs = [np.full(out.shape, np.nan if out.dtype != np.int32 else -1, out.dtype) for out in launch.outputs]
        constants = {**launch.constants, **({"PTX": False} if "PTX" in launch.constants else {})}  # it runs no assembly
        launch.kernel[launch.grid](*arguments, *map(HostArray, outputs), **constants)
        return tuple(outputs)

    arrays = [x for array, x in zip(is_array, launch.arguments, strict=True) if array]
    return jax.pure_callback(call, launch.outputs, *arrays)


def _values(handle: Any) -> np.ndarray:
    """A handle's data as NumPy can calculate with it."""
    name = handle.dtype.scalar.name
    return handle.data.view(EXACT[name]) if name in EXACT else handle.data


def _cast(self: Any, source: Any, to: Any, *_: Any) -> Any:
    """A conversion that rounds to nearest, where the interpreter's own cuts off bits."""
    target = to.scalar
    if target.name in EXACT:
        data = _values(source).astype(np.float32).astype(EXACT[target.name]).view(interpreter._get_np_dtype(target))
    else:
        data = _values(source).astype(interpreter._get_np_dtype(target))
    return interpreter.TensorHandle(data, target)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """A dot whose products are exact, where the interpreter's own multiplies bfloat16's bits as integers."""
    wide = d.data.dtype
    return interpreter.TensorHandle(
        np.matmul(_values(a).astype(wide), _values(b).astype(wide)) + d.data, d.dtype.scalar
    )


def _maximum(self: Any, a: Any, b: Any) -> Any:
    """A maximum that passes over NaN, as GPUs' own does."""
    return self.binary_op(a, b, np.fmax)


PATCH_TENSOR = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Scalars index loops; the interpreter holds them as one-element arrays, which NumPy no longer converts."""
    PATCH_TENSOR(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def check_nan(backend: str, case: attention_cases.Case, *, device: devices.Device) -> None:
    """The first and the last query are NaN: so is what comes out for them, as in the oracle, and nothing else."""
    inputs = attention_cases.build(case)
    inputs = replace(inputs, q=inputs.q.at[np.array([0, -1])].set(np.nan))
    expected = attention_cases.run("reference", case, inputs)
    assert np.isnan(expected.out[0]).all()
    attention_cases.compare(case, inputs, attention_cases.run(backend, case, inputs, device=device), expected)


def main(op: str, backend: str, names: list[str]) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compiling the oracle takes longer than running anything
    cases = importlib.import_module(f"pallas_kernels.{op}.cases")
    device = devices.named("h100")
    builder = interpreter.InterpreterBuilder
    failures = {}
    with (
        mock.patch.object(builder, "cast_impl", _cast),
        mock.patch.object(builder, "create_fp_to_fp", _cast),
        mock.patch.object(builder, "create_dot", _dot),
        mock.patch.object(builder, "create_maxnumf", _maximum),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_tensor),
        mock.patch.object(triton_launch, "run", run),
        mock.patch.object(devices, "current", lambda: device),
        np.errstate(all="ignore"),
    ):
        for name in names:
            try:
                check = check_nan if name.endswith("+nan") else cases.check
                check(backend, cases.CASES[name.removesuffix("+nan")], device=device)
            except Exception:
                failures[name] = traceback.format_exc(limit=-6)[-3000:]
    print(json.dumps(failures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
