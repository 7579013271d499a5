"""Which backend serves what on a device, here or elsewhere: the question `jaxinfer info --kernels` answers.

Hides the shapes that stand for a model's: those of an 8B Llama, and around them each head_dim, K/V dtype and format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels import attention, grouped_matmul, matmul
from pallas_kernels.attention import KVSpec, storage
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Op
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.matmul import cases as matmul_cases

HEAD_DIMS = (64, 80, 96, 128, 256, 512)
ROWS = (1, 16, 512)
IN_SIZE, OUT_SIZE, NUM_GROUPS = 4096, 14336, 8


@dataclass(frozen=True)
class Answer:
    """What serves one case on one device: the automatic choice, and why the backends before it do not."""

    op: str
    case: str
    backend: str | None  # None: nothing but the reference takes it
    refusals: dict[str, str]


def survey(device: Device) -> list[Answer]:
    """An answer per operation and case, in the order of the operations."""
    return [Answer(op.name, name, *op.first_willing(device=device, **case)) for op, name, case in _cases(device)]


def _cases(device: Device) -> Iterator[tuple[Op, str, dict[str, Any]]]:
    page_size = attention.default_page_size(device)
    shapes = [(head_dim, "bfloat16", 32, 8) for head_dim in HEAD_DIMS]
    shapes += [(128, dtype, 32, 8) for dtype in storage.DTYPES if dtype != "bfloat16"]
    shapes += [(64, dtype, 32, 8) for dtype in storage.QUANTIZED] + [
        (128, "bfloat16", 32, 1),
        (128, "bfloat16", 32, 32),
    ]
    for head_dim, dtype, q_heads, kv_heads in shapes:
        spec = KVSpec(kv_heads, head_dim, page_size, jnp.dtype(dtype))
        name = f"{q_heads}/{kv_heads} heads x {head_dim}, K/V {dtype}, pages of {page_size}"
        yield attention.OP, name, {"spec": spec, "q_heads": q_heads}
    for op, formats, extra in (
        (matmul.OP, matmul_cases.FORMATS, {}),
        (grouped_matmul.OP, grouped_cases.FORMATS, {"num_groups": NUM_GROUPS}),
    ):
        for format in dict.fromkeys(["dense", *formats]):
            for rows in ROWS:
                sizes = {"rows": rows, "in_size": IN_SIZE, "out_size": OUT_SIZE, **extra}
                name = f"{format}, {rows} x {IN_SIZE} x {OUT_SIZE}" + (f", {NUM_GROUPS} groups" if extra else "")
                core = format.removesuffix("/outliers").removesuffix("/zp")  # those are not a backend's business
                yield op, name, {**sizes, "dtype": "bfloat16", "out_dtype": "bfloat16", "format": core}
