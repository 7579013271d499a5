"""Seconds to compile the sampler for a TPU that is not here, laid out for accelerators and for CPUs, in turns.

    make accelerators
    PYTHONPATH=.venv/accelerators TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/compile_sampler.py

Prints wall time of both layouts (jaxinfer/vocabulary_passes.py, pallas_kernels/reductions.py) and their ratio, of the
whole sampler and its parts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxinfer import sampling, truncation, vocabulary_passes
from pallas_kernels import devices
from sharding.topology import compile_for


def whole(logits: jax.Array, rows: jax.Array, *state: Any) -> sampling.SampleResult:
    return sampling.sample(logits, sampling.unpack_rows(rows), *state)


def parts(columns: int, slots: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What is compiled, and the shapes it is compiled for."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((slots, *shape), dtype)
    logits, floats, numbers = of("float32", columns), of("float32"), of("int32")
    counts = sampling.TokenCounts(of("int32", columns))
    state = counts, of("uint32", -(-columns // 32)), of("int32", 16), numbers, numbers, of("bool")
    return {
        "sampler": (whole, (logits, of("int32", sampling.ROW_WORDS), *state)),
        "group sums": (truncation.group_sums, (logits, floats)),
        "largest": (vocabulary_passes.largest, (logits,)),
        "20 largest": (lambda x: vocabulary_passes.several_largest(x, 20), (logits,)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="v6e")
    parser.add_argument(
        "--columns", type=int, default=8016, help="of the vocabulary on a device (default: %(default)s)"
    )
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = devices.named(args.device)
    compile_for(device, jnp.tanh, jnp.ones(8))  # the first one starts the compiler
    for name, (function, shapes) in parts(args.columns, args.slots).items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.repeats):
            for for_cpu in (True, False):
                with mock.patch.object(devices, "on_cpu", lambda for_cpu=for_cpu: for_cpu):
                    jax.clear_caches()
                    seconds[for_cpu].append(compile_for(device, function, *shapes).seconds)
        slow, fast = (statistics.median(seconds[for_cpu]) for for_cpu in (True, False))
        spread = f"{min(seconds[False]):.1f} to {max(seconds[False]):.1f}"
        print(f"{name}: laid out for CPUs {slow:.1f} s, for accelerators {fast:.1f} s ({spread}): {slow / fast:.1f}x")


if __name__ == "__main__":
    main()
