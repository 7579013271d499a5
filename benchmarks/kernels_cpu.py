"""Kernels on this CPU, backend against backend: `python benchmarks/kernels_cpu.py [--only attention|matmul] [--json]`.

Every case runs all backends in turns, several rounds. Attention: one decode step, K/V bytes over time, beside the rate
at which XLA sums a large array. Matmul: time beside XLA's bfloat16 dot at the same sizes, over weights in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.perf.hardware import describe_device
from pallas_kernels import attention, devices, matmul
from pallas_kernels.dispatch import REFERENCE, Op
from pallas_kernels.timing import Timing, compare
from pallas_kernels.workloads import AttentionWork, MatmulWork

CPU = devices.named("cpu")
ATTENTION = tuple(
    AttentionWork("decode", "bfloat16", kv_dtype, q_heads, kv_heads, head_dim, 32, None, seqs, rows)
    for seqs, rows, q_heads, kv_heads, head_dim, kv_dtype in (
        (16, 2048, 32, 8, 128, "bfloat16"),
        (16, 2048, 8, 8, 128, "bfloat16"),
        (1, 2048, 32, 8, 128, "bfloat16"),
        (16, 320, 16, 4, 64, "bfloat16"),
        (16, 320, 8, 4, 32, "bfloat16"),
        (16, 2048, 32, 8, 128, "int8"),
        (16, 2048, 32, 8, 128, "int4"),
    )
)
FORMATS = ("dense", "w8a8-int8", "int8", "int4/g64")
MATMUL = tuple((rows, *sizes) for sizes in ((4096, 14336), (2048, 5632)) for rows in (2, 4, 8, 16))
WEIGHTS = 3  # in turn, so that none stays in a cache
ROUND_S = 0.1


def attention_rates(work: AttentionWork) -> dict[str, dict[str, float]]:
    """GB/s of K/V per backend, and of a sum."""
    large, total = jnp.ones(1 << 26, jnp.float32), jax.jit(jnp.sum)
    willing = backends(attention.OP, spec=work.spec, q_heads=work.q_heads)
    programs = {name: work.call(name, CPU, filled=True).program() for name in willing}
    num_bytes = dict.fromkeys(programs, work.kv_bytes) | {"sum": large.nbytes}
    times = compare(programs | {"sum": lambda: total(large)}, round_s=ROUND_S)
    return {name: rate(time, num_bytes[name]) for name, time in times.items()}


def rate(time: Timing, num_bytes: int) -> dict[str, float]:
    low, high = num_bytes / time.highest_s / 1e9, num_bytes / time.lowest_s / 1e9
    return {"median": num_bytes / time.median_s / 1e9, "low": low, "high": high}


def matmul_times(rows: int, in_size: int, out_size: int) -> dict[str, dict[str, float]]:
    """Milliseconds per product of each format on each backend."""
    programs = dict(matmul_programs(rows, in_size, out_size))
    return {
        name: {key: 1e3 * seconds / WEIGHTS for key, seconds in asdict(time).items()}
        for name, time in compare(programs, round_s=ROUND_S).items()
    }


def matmul_programs(rows: int, in_size: int, out_size: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    for format in FORMATS:
        work = MatmulWork(format, rows, in_size, out_size)
        case = {"rows": rows, "in_size": in_size, "out_size": out_size, "dtype": work.dtype, "out_dtype": work.dtype}
        for backend in backends(matmul.OP, **case, format=format):
            calls = [work.call(backend, CPU, filled=True) for _ in range(WEIGHTS)]
            yield f"{format} {backend}", in_turn([call.function for call in calls], [call.args for call in calls])


def in_turn(functions: list[Callable[..., Any]], arguments: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """One program that calls each function on its arguments."""
    together = jax.jit(lambda sets: [function(*args) for function, args in zip(functions, sets, strict=True)])
    return lambda: together(arguments)


def backends(op: Op, **case: Any) -> list[str]:
    refusals = op.refusals(device=CPU, **case)
    return [name for name, reason in refusals.items() if reason is None and name != REFERENCE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("attention", "matmul"), help="one operation")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    document: dict[str, Any] = {"device": describe_device(), "jax": jax.__version__, "attention": [], "matmul": []}
    for work in ATTENTION if args.only != "matmul" else ():
        rates = attention_rates(work)
        document["attention"].append({"case": asdict(work), "gbps": rates})
        texts = [f"{name} {r['median']:.1f} ({r['low']:.1f} to {r['high']:.1f})" for name, r in rates.items()]
        title = f"{work.seqs} x {work.rows}, {work.q_heads}/{work.kv_heads} x {work.head_dim}, {work.kv_dtype}"
        say(args, f"{title}: {', '.join(texts)} GB/s")
    for sizes in MATMUL if args.only != "attention" else ():
        times = matmul_times(*sizes)
        document["matmul"].append({"rows_in_out": sizes, "milliseconds": times})
        base = times["dense xla"]["median_s"]
        texts = [f"{name} {t['median_s']:.2f} ms ({base / t['median_s']:.2f}x)" for name, t in times.items()]
        say(args, f"{' x '.join(map(str, sizes))}: {', '.join(texts)}")
    if args.json:
        print(json.dumps(document, indent=1))


def say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, flush=True)


if __name__ == "__main__":
    main()
