"""What a call of `attend` must be, checked where it is made: shapes, dtypes and options that no backend tests again.

Hides nothing from backends: after these checks arrays fit each other, so that kernels which take raw memory may.
Values on the device (lengths, page numbers) are the caller's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from pallas_kernels.attention import KVSpec, PageRows, Ragged


class UnsupportedError(ValueError):
    """A request to a kernel that cannot be honoured; the message names the value and what would work."""


def check_heads(q: jax.Array, k: jax.Array | None, v: jax.Array | None, sinks: jax.Array | None, spec: KVSpec) -> None:
    """Raises UnsupportedError unless q, k, v and sinks fit each other and the pages."""
    if (k is None) != (v is None):
        raise UnsupportedError("k and v come together or not at all")
    if q.ndim != 3 or q.shape[2] != spec.head_dim or q.shape[1] % spec.kv_heads or not q.shape[1]:
        raise UnsupportedError(
            f"q {q.shape} does not fit pages of {spec.kv_heads} KV heads x {spec.head_dim}: "
            "it must be [tokens, a multiple of kv_heads, head_dim]"
        )
    for name, array in (("k", k), ("v", v)):
        if array is not None:
            _check_array(name, array, (q.shape[0], spec.kv_heads, spec.head_dim), jnp.floating)
    _check_array("q", q, q.shape, jnp.floating)
    if sinks is not None:
        _check_array("sinks", sinks, (q.shape[1],), jnp.floating)


def check_new_rows(k: jax.Array, v: jax.Array, spec: KVSpec) -> None:
    """Raises UnsupportedError unless k and v are rows of these pages."""
    for name, array in (("k", k), ("v", v)):
        _check_array(name, array, (k.shape[0] if k.ndim else 0, spec.kv_heads, spec.head_dim), jnp.floating)


def check_ragged(ragged: Ragged, num_tokens: int, page_size: int) -> None:
    """Raises UnsupportedError unless the parts of a Ragged fit each other, the tokens and the pages."""
    if ragged.kv_len.ndim != 1 or ragged.page_table.ndim != 2:
        raise UnsupportedError(f"kv_len {ragged.kv_len.shape} must be [seqs], page_table [seqs, pages_per_seq]")
    seqs, columns = ragged.kv_len.shape[0], ragged.page_table.shape[1]
    for name, array, shape in (
        ("q_start", ragged.q_start, (seqs + 1,)),
        ("kv_len", ragged.kv_len, (seqs,)),
        ("page_table", ragged.page_table, (seqs, columns)),
        ("q_position", ragged.q_position, (num_tokens,)),
    ):
        _check_array(name, array, shape, jnp.integer)
    width, decoding = ragged.width, ragged.num_decode_seqs
    if not 0 <= decoding <= seqs or width < 1 or decoding * width > num_tokens:
        raise UnsupportedError(
            f"num_decode_seqs={decoding} must be from 0 to {seqs}, width={width} at least 1, and their product "
            f"at most the {num_tokens} packed tokens"
        )
    position, rows = ragged.kv_position, columns * page_size
    if position is not None and (position.ndim != 2 or position.shape[0] != seqs or position.shape[1] < rows):
        raise UnsupportedError(f"kv_position {position.shape} must be [{seqs}, {rows}]: one for each row of the table")
    if ragged.ancestors is not None:
        _check_array("ancestors", ragged.ancestors, (num_tokens, ragged.ancestors.shape[-1]), jnp.unsignedinteger)
        if 32 * ragged.ancestors.shape[1] < width:
            raise UnsupportedError(
                f"ancestors of {ragged.ancestors.shape[1]} words have too few bits for width={width}: "
                f"{-(-width // 32)} words would do"
            )


def check_spread(ragged: Ragged, sinks: jax.Array | None) -> None:
    """Raises UnsupportedError for a stride that means nothing, and for what is not done with pages on many devices."""
    stride, offset = ragged.page_stride, ragged.page_offset
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise UnsupportedError(f"page_stride={stride!r} must be an int, at least 1: the devices that share the pages")
    if offset is not None:
        _check_array("page_offset", offset, (), jnp.integer)
    if stride == 1:
        return
    if sinks is not None:
        raise UnsupportedError(f"sinks with page_stride={stride}: merge the partial results, then apply with_sinks")
    for name in ("kv_position", "ancestors"):
        if getattr(ragged, name) is not None:
            raise UnsupportedError(f"{name} with page_stride={stride}: it is served where all pages lie on one device")


def check_options(window: Any, softcap: Any, scale: Any) -> None:
    """Raises UnsupportedError for options that would hide every row, none by accident, or make NaN of scores."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < 2**31):
        raise UnsupportedError(f"window={window!r} must be an int from 1 to {2**31 - 1}, or None for all rows")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise UnsupportedError(f"softcap={softcap!r} must be above 0 and finite, or None for none")
    if scale is not None and not math.isfinite(scale):
        raise UnsupportedError(f"scale={scale!r} must be finite, or None for 1/sqrt(head_dim)")


def check_rows(rows: PageRows, num_pages: int, spec: KVSpec) -> None:
    """Raises UnsupportedError unless canonical pages are those of `num_pages` pages of this spec."""
    shape = (num_pages, spec.page_size, 2, spec.kv_heads, spec.head_dim)
    if rows.values.shape != shape or (rows.scales is not None) != spec.quantized:
        wanted = " with scales" if spec.quantized else " without scales"
        raise UnsupportedError(
            f"pages {rows.values.shape}{' with scales' if rows.scales is not None else ''} must be {shape}{wanted}, "
            f"as pages of {jnp.dtype(spec.dtype).name} are"
        )
    if rows.scales is not None:
        _check_array("scales", rows.scales, shape[:-1], jnp.floating)


def _check_array(name: str, array: Any, shape: tuple[int, ...], kind: Any) -> None:
    if array.shape != shape:
        raise UnsupportedError(f"{name} {array.shape} must be {shape}")
    if not jnp.issubdtype(array.dtype, kind):
        raise UnsupportedError(f"{name} {array.dtype.name} must be {kind.__name__}")
