"""What host code costs beside computation on the same cores: `python benchmarks/host_cold.py`.

On a CPU the engine's host work runs once per call, between computations that fill both cores' caches with weights.
Prints the processor time of two fixed pieces after a pause: some numpy on 16 x 16 integers, and the call of a compiled
program on one small array, which is the least any engine pays per call. Once with nothing else running, once beside a
matrix product that never ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PAUSES_MS = (0, 4, 16)
REPEATS = 100


def median_us(work: Callable[[], object], pause_s: float) -> float:
    """Processor time of `work` on this thread after a pause."""
    times = []
    for _ in range(REPEATS):
        if pause_s:
            time.sleep(pause_s)
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return 1e6 * float(np.median(times))


def compute_forever(stop: threading.Event) -> None:
    """A decode-like load: 16 rows times 64 MB of weights, again and again, on all cores."""
    weight = jnp.ones((8192, 4096), jnp.bfloat16)
    product = jax.jit(lambda x, w: jax.lax.fori_loop(0, 50, lambda _, x: jnp.tanh(x @ w.T @ w), x))
    x = jnp.ones((16, 4096), jnp.bfloat16)
    while not stop.is_set():
        product(x, weight).block_until_ready()


def main() -> None:
    tokens = np.zeros((16, 16), np.int32)
    add = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((16,), jnp.int32)).compile()
    array = jnp.zeros(16, jnp.int32)
    pieces: dict[str, Callable[[], object]] = {
        "numpy: np.count_nonzero(np.any(x >= 0, axis=1))": lambda: np.count_nonzero(np.any(tokens >= 0, axis=1)),
        "jax: a compiled call on one array": lambda: add(array),
    }
    print(f"{'us of processor time after a pause of':52}" + "".join(f"{pause:5} ms" for pause in PAUSES_MS))
    for beside in ("alone", "beside a product"):
        stop = threading.Event()
        thread = threading.Thread(target=compute_forever, args=(stop,))
        if beside != "alone":
            thread.start()
            time.sleep(3)  # it compiles
        for name, work in pieces.items():
            print(f"{name:52}" + "".join(f"{median_us(work, ms / 1e3):8.0f}" for ms in PAUSES_MS) + f"  {beside}")
        stop.set()
        if thread.ident is not None:
            thread.join()


if __name__ == "__main__":
    main()
