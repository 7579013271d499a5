"""Host arrays that a device may take as they are, without a copy."""

from __future__ import annotations

import math

import numpy as np

_ALIGNMENT_BYTES = 64  # XLA:CPU takes a NumPy buffer as it is from this alignment on


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array in memory of its own."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[offset : offset + num_bytes].view(dtype).reshape(shape)
