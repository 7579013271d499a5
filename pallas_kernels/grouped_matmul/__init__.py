"""One matrix multiplication per group of rows: the experts of a mixture, each for the tokens routed to it.

Hides which code multiplies and how groups of unequal length are cut into tiles. Work grows with tokens, not with tokens
times groups.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import devices, tensors
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Op
from pallas_kernels.tensors import QuantizedTensor

OP = Op(
    name="grouped_matmul",
    backends={
        "mosaic_tpu": "pallas_kernels.grouped_matmul.mosaic_tpu",
        "triton": "pallas_kernels.grouped_matmul.triton",
        "xla": "pallas_kernels.grouped_matmul.xla",
        "reference": "pallas_kernels.grouped_matmul.reference",
    },
    platforms={"mosaic_tpu": ("tpu",), "triton": ("cuda", "rocm")},
    invariant={"xla": ("cpu",)},  # these supply run_invariant, with run's signature
)
BACKENDS = OP.backends
Largest = Callable[[jax.Array], jax.Array]  # f32[rows] of the inputs here -> of all inputs, some of them elsewhere


def backend_for(matmul_backend: str) -> str:
    """The backend that goes with one forced for plain products: of the same name, or where there is none, any."""
    return matmul_backend if matmul_backend in BACKENDS else "auto"


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    group_sizes: jax.Array,
    *,
    backend: str = "auto",
    out_dtype: DTypeLike | None = None,
    device: Device | None = None,
    invariant: bool = False,
    largest: Largest | None = None,
) -> jax.Array:
    """`x [tokens, in]` sorted by group, `weight [groups, out, in]` -> `[tokens, out]`, out_dtype None being x's dtype.

    `group_sizes i32[groups]`: the first rows of x meet the first group's weight; a group may be empty, and rows beyond
    all groups give zeros. `invariant`: a row's bits depend on that row and its group's weight alone, in any dtype.
    `largest`: where x and weight are some of the inputs, the magnitude by which W8A8 scales a row, from that of the
    inputs here.
    Raises ValueError for what does not fit, BackendError where a forced backend refuses.
    Source: MegaBlocks (arXiv 2211.15841, section 5.1).
    """
    _check(x, weight, group_sizes)
    result = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    num_groups, out_size, in_size = weight.shape
    if 0 in (*x.shape, num_groups, out_size):
        return jnp.zeros((x.shape[0], out_size), result)
    device = device or devices.current()
    promise = {"invariant": True} if invariant else {}
    _, module = OP.choose(
        backend,
        rows=1 if invariant else x.shape[0],  # one backend for every number of rows
        **promise,
        in_size=in_size,
        out_size=out_size,
        num_groups=num_groups,
        dtype=x.dtype.name,
        out_dtype=result.name,
        format=weight.format if isinstance(weight, QuantizedTensor) else "dense",
        device=device,
    )
    row_scales = None
    if isinstance(weight, QuantizedTensor) and weight.activation is not None:
        x, row_scales = tensors.quantize_rows(x, weight.activation, largest=largest)
    run = module.run_invariant if invariant else module.run
    return run(x, weight, group_sizes, row_scales=row_scales, out_dtype=result, device=device)


def _check(x: jax.Array, weight: jax.Array | QuantizedTensor, group_sizes: jax.Array) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or group_sizes.shape != weight.shape[:1]:
        raise ValueError(
            "grouped_matmul takes x [tokens, in], weight [groups, out, in] and group_sizes [groups], "
            f"got {x.shape}, {weight.shape} and {group_sizes.shape}"
        )
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes are int32, got {group_sizes.dtype.name}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype.name} is not floating-point; activations are quantized here, not before")
    if not isinstance(weight, QuantizedTensor):
        if x.dtype != weight.dtype:
            raise ValueError(f"x {x.dtype.name} and weight {weight.dtype.name} must share one floating-point dtype")
        return
    weight.check()
    if weight.zeros is not None or weight.outlier_columns is not None or weight.sparse_index is not None:
        raise ValueError(
            f"grouped_matmul takes dense, int8, int4, fp8 and w8a8 weights, not {weight.format}: quantize experts "
            "symmetrically, without outliers"
        )
