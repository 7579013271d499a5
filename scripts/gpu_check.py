"""Runs every kernel case that this machine's accelerator can, against the oracles, times kernels, writes one JSON.

    python scripts/gpu_check.py --out benchmarks/results/nvidia-h200.json

Needs jax, flax and numpy; backends whose packages are missing say so in the result. Exits 1 where a case fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it need not be installed

import jax
import jax.numpy as jnp

from pallas_kernels import attention, devices, grouped_matmul, matmul, workloads
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import REFERENCE, BackendError, Op
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.matmul import cases as matmul_cases
from pallas_kernels.timing import Timing, compare
from pallas_kernels.workloads import AttentionWork, MatmulWork

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "numpy", "flax", "libtpu")
COPY_BYTES = 1 << 31
MATMUL_COPIES = 8  # weights of one shape in turn, so that none is found in a cache


def backends_of(op: Op) -> list[str]:
    return [name for name in op.backends if name != REFERENCE]


# ---- correctness


def all_checks(device: Device) -> Iterator[tuple[str, str, str, Callable[[], None]]]:
    """(operation, backend, case, check) for each pair of a case and a backend."""
    for backend in backends_of(attention.OP):
        for name, case in attention_variants(device).items():
            yield "attention", backend, name, functools.partial(attention_cases.check, backend, case)
    for op, module in ((matmul.OP, matmul_cases), (grouped_matmul.OP, grouped_cases)):
        for backend in backends_of(op):
            for name, case in module.CASES.items():
                yield op.name, backend, name, functools.partial(module.check, backend, case)


def attention_variants(device: Device) -> dict[str, attention_cases.Case]:
    """The table as it is, and each case in the shape that an accelerator's kernels like best."""
    page_size = attention.default_page_size(device)
    liked: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 128, "page_size": page_size}
    return attention_cases.CASES | {
        f"{name}, bfloat16 x 128": dataclasses.replace(case, **liked) for name, case in attention_cases.CASES.items()
    }


def run_checks(device: Device, only: set[str], part: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One record per check whose case's name holds `part`: "ok", "refused" with the reason, "failed" with the error."""
    records = []
    for op, backend, case, check in all_checks(device):
        if op not in only or part not in case:
            continue
        began = time.perf_counter()
        record: dict[str, Any] = {"op": op, "backend": backend, "case": case, "status": "ok"}
        try:
            check()
        except BackendError as refusal:
            record |= {"status": "refused", "reason": str(refusal)}
        except Exception as error:  # one broken kernel must not hide the others
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc(limit=3)
        record["seconds"] = round(time.perf_counter() - began, 3)
        records.append(record)
        if record["status"] != "refused":
            say(f"{op} {backend} {case}: {record['status']}")
    return records


# ---- timing


def timings(device: Device, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The bars: each a comparison within one run, beside a copy of device memory."""
    records = []
    for name, programs, facts in timed_programs(device):
        say(f"timing {name}")
        runnable, errors = {}, {}
        for label, make in programs.items():
            try:
                runnable[label] = make()
                jax.block_until_ready(runnable[label]())
            except Exception as error:  # a refusal, or a kernel that this device's compiler does not take
                errors[label] = f"{type(error).__name__}: {error}"[:500]
                runnable.pop(label, None)
        measured = compare(runnable)
        times = {label: dataclasses.asdict(scaled(timing, facts.get("calls", 1))) for label, timing in measured.items()}
        records.append({"name": name, **facts, "seconds": times, "errors": errors})
    return records


def scaled(timing: Timing, calls: int) -> Timing:
    return Timing(timing.median_s / calls, timing.lowest_s / calls, timing.highest_s / calls)


def copy_program() -> Callable[[], Any]:
    """Reads and writes COPY_BYTES."""
    copy = jax.jit(lambda x: (x + 1, x[0]), donate_argnums=0)  # one buffer, however many copies are under way
    held = [jnp.ones(COPY_BYTES // 4, jnp.float32)]

    def run() -> Any:
        held[0], done = copy(held[0])
        return done

    return run


def timed_programs(device: Device) -> Iterator[tuple[str, dict[str, Callable[[], Any]], dict[str, Any]]]:
    """(name, {label: function that makes a program}, facts about one call)."""
    yield "copy", {"copy": copy_program}, {"bytes": 2 * COPY_BYTES}
    page_size = attention.default_page_size(device)
    for kv_dtype in ("bfloat16", "int8", "float8_e4m3fn", "int4"):
        decode = AttentionWork("decode", kv_dtype=kv_dtype, page_size=page_size)
        programs = attention_programs(decode, device)
        yield f"decode 64 x 8192, 32/8 x 128, {kv_dtype}", programs, {"bytes": decode.kv_bytes, "flops": decode.flops}
    prefill = AttentionWork("prefill", page_size=page_size, seqs=1, rows=8192)
    programs = attention_programs(prefill, device) | {"cudnn": lambda: cudnn_program(prefill)}
    yield "prefill 8192 causal, 32/8 x 128", programs, {"flops": prefill.flops}
    for rows in (1, 2, 4, 8, 16, 512):
        for format in ("int4/g128", "int8", "fp8", "w8a8-int8", "w8a8-fp8"):
            work, dense = MatmulWork(format, rows), MatmulWork("dense", rows)
            programs = {f"dense {name}": make for name, make in matmul_programs(dense, device).items()}
            facts = {"calls": MATMUL_COPIES, "flops": work.flops, "bytes": weight_bytes(work, device)}
            yield f"{format} {rows} x 4096 x 14336", programs | matmul_programs(work, device), facts


def attention_programs(work: AttentionWork, device: Device) -> dict[str, Callable[[], Any]]:
    def make(backend: str) -> Callable[[], Any]:
        return work.call(backend, device, filled=True).program()

    return {name: functools.partial(make, name) for name in backends_of(attention.OP)}


def cudnn_program(work: AttentionWork) -> Callable[[], Any]:
    heads = (work.q_heads, work.kv_heads, work.kv_heads)
    arrays = [
        workloads.random(jax.ShapeDtypeStruct((work.seqs, work.rows, n, work.head_dim), jnp.bfloat16)) for n in heads
    ]
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"))
    return lambda: attend(*arrays)


def matmul_programs(work: MatmulWork, device: Device) -> dict[str, Callable[[], Any]]:
    """Programs of MATMUL_COPIES products with as many weights."""

    def make(backend: str) -> Callable[[], Any]:
        calls = [work.call(backend, device, filled=True) for _ in range(MATMUL_COPIES)]
        together = jax.jit(
            lambda arguments: [call.function(*args) for call, args in zip(calls, arguments, strict=True)]
        )
        arguments = [call.args for call in calls]
        return lambda: together(arguments)

    return {name: functools.partial(make, name) for name in backends_of(matmul.OP)}


def weight_bytes(work: MatmulWork, device: Device) -> int:
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(work.call("auto", device, filled=False).args[1])
    )


# ---- the command


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", default="attention,matmul,grouped_matmul", help="operations to check, by comma")
    parser.add_argument("--cases", default="", metavar="PART", help="check only cases whose name holds this")
    parser.add_argument("--no-timing", action="store_true", help="check correctness only")
    parser.add_argument("--no-checks", action="store_true", help="time only")
    args = parser.parse_args()
    only = set(args.only.split(","))
    if unknown := only - {"attention", "matmul", "grouped_matmul"}:
        parser.error(f"--only {', '.join(unknown)} is not one of attention, matmul, grouped_matmul")
    device = devices.current()
    say = lambda text: print(text, file=sys.stderr, flush=True)
    say(f"{device} ({jax.devices()[0].device_kind})")
    checks = [] if args.no_checks else run_checks(device, only, args.cases, say)
    if not checks and not args.no_checks:
        parser.error(f"no case of {args.only} holds {args.cases!r} in its name")
    counts = {status: sum(r["status"] == status for r in checks) for status in ("ok", "refused", "failed")}
    result = {
        "device": device.name,
        "device_kind": jax.devices()[0].device_kind,
        "versions": versions(),
        "counts": counts,
        "checks": checks,
        "timings": [] if args.no_timing else timings(device, say),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"{counts}; wrote {args.out}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
