"""Paged decode attention on this CPU, backend against backend: `python benchmarks/attention_cpu.py [--json]`.

Each case runs every backend in turn, several times; medians of K/V bytes over time, beside the rate at which XLA sums a
large array in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.perf.hardware import describe_device
from pallas_kernels import attention
from pallas_kernels.attention import KVSpec, Ragged

CALLS = 10  # per measurement, in one program
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    seqs: int
    rows: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 32

    def __str__(self) -> str:
        return f"{self.seqs} x {self.rows}, {self.q_heads}/{self.kv_heads} x {self.head_dim}"

    @property
    def num_bytes(self) -> int:
        return self.seqs * self.rows * KVSpec(self.kv_heads, self.head_dim, self.page_size).token_bytes


CASES = (
    Case(16, 2048, 32, 8, 128),
    Case(16, 2048, 8, 8, 128),
    Case(1, 2048, 32, 8, 128),
    Case(16, 320, 16, 4, 64),
    Case(16, 320, 8, 4, 32),
)


def decode_call(case: Case, backend: str) -> Callable[[], None]:
    """One call attends CALLS times, each time from what the last gave, in bfloat16 over shuffled pages."""
    pages = case.rows // case.page_size
    table = np.random.default_rng(0).permutation(case.seqs * pages) + 1
    last = jnp.full(case.seqs, case.rows - 1, jnp.int32)
    ragged = Ragged(
        q_start=jnp.arange(case.seqs + 1, dtype=jnp.int32),
        kv_len=last + 1,
        page_table=jnp.asarray(table.reshape(case.seqs, pages), jnp.int32),
        q_position=last,
        num_decode_seqs=case.seqs,
    )
    kv = attention.allocate(KVSpec(case.kv_heads, case.head_dim, case.page_size), len(table) + 1, backend=backend)
    kv = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), kv)
    q = jax.random.normal(jax.random.key(1), (case.seqs, case.q_heads, case.head_dim), jnp.bfloat16)
    new = q[:, : case.kv_heads]

    def attend_often(kv: attention.LayerKV) -> tuple[jax.Array, attention.LayerKV]:
        def body(_: jax.Array, carry: tuple[jax.Array, attention.LayerKV]) -> tuple[jax.Array, attention.LayerKV]:
            out, _, kv = attention.attend(carry[0], new, new, carry[1], ragged)
            return out, kv

        return jax.lax.fori_loop(0, CALLS, body, (q, kv))

    compiled = jax.jit(attend_often, donate_argnums=0)
    state = [compiled(kv)[1]]

    def call() -> None:
        out, state[0] = compiled(state[0])
        out.block_until_ready()

    return call


def measure(case: Case) -> dict[str, dict[str, float]]:
    """GB/s per backend and for a plain sum: median, lowest, highest."""
    large = jnp.ones(1 << 26, jnp.float32)
    total = jax.jit(jnp.sum)
    calls = {
        name: (decode_call(case, name), CALLS * case.num_bytes)
        for name, refusal in attention.OP.refusals(spec=KVSpec(case.kv_heads, case.head_dim, case.page_size)).items()
        if refusal is None and name != "reference"
    }
    calls["sum"] = (lambda: total(large).block_until_ready(), large.nbytes)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):
        for name, (call, num_bytes) in calls.items():
            start = time.perf_counter()
            call()
            if round_:  # the first one warms up
                rates[name].append(num_bytes / (time.perf_counter() - start) / 1e9)
    return {name: {"median": float(np.median(r)), "low": min(r), "high": max(r)} for name, r in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    results = [(case, measure(case)) for case in CASES]
    if args.json:
        rows = [{"case": asdict(case), "gbps": rates} for case, rates in results]
        print(json.dumps({"device": describe_device(), "jax": jax.__version__, "results": rows}, indent=1))
        return
    for case, rates in results:
        texts = [f"{name} {r['median']:.1f} ({r['low']:.1f} to {r['high']:.1f})" for name, r in rates.items()]
        print(f"{case}: {', '.join(texts)} GB/s")


if __name__ == "__main__":
    main()
