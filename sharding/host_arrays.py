"""Arrays of a host to and from the devices of a mesh, which may be those of several processes.

Hides that jax compares what processes place (a collective per array), and that none of them sees all of an array.
"""

from __future__ import annotations

import jax
import numpy as np


def to_devices(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
    """`array`, the same in every process, as `sharding` places it; None: as it is, for the default device."""
    if sharding is None:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def from_devices(array: jax.Array) -> np.ndarray:
    """What every device holds whole, on the host; waits until it is computed."""
    return np.asarray(array if array.is_fully_addressable else array.addressable_data(0))
