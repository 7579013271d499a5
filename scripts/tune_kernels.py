"""Finds block sizes on the accelerator it runs on and writes them to pallas_kernels/tuning/<device>.json.

    python scripts/tune_kernels.py                         # every kernel of this device, at the shapes below
    python scripts/tune_kernels.py --only attention.triton --rounds 15

From a kernel's default each block size is halved and doubled in turn, as long as that is faster; a size that does not
compile is passed over. Entries of shapes that were not measured now are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it need not be installed

import jax
import jax.numpy as jnp

from pallas_kernels import attention, devices, grouped_matmul, matmul, tuning
from pallas_kernels.devices import Device
from pallas_kernels.timing import compare
from pallas_kernels.workloads import AttentionWork, Call, MatmulWork
from sharding import topology

LEAST_GAIN = 0.02  # of the time: less is noise
HEADS = ((32, 8, 128), (32, 32, 128), (32, 8, 64), (16, 8, 256), (64, 8, 128))  # query heads, KV heads, head_dim
SIZES = ((4096, 28672), (14336, 4096), (4096, 6144), (8192, 57344))  # inputs, outputs; gate and up are one product
EXPERT_SIZES, NUM_EXPERTS = ((2048, 768), (768, 2048)), 32
FORMATS = ("int4/g128", "int8", "fp8", "w8a8-int8")
ROWS = (1, 16, 64, 512)

Blocks = dict[str, int]
Measure = Callable[[Mapping[str, Blocks]], dict[str, float]]  # {name: blocks} -> {name: seconds}, failed ones left out


def works(device: Device) -> Iterator[tuple[str, AttentionWork | MatmulWork]]:
    """(operation, call) of every shape that is tuned."""
    page_size = attention.default_page_size(device)
    for q_heads, kv_heads, head_dim in HEADS:
        for kv_dtype in ("bfloat16", "int8"):
            shape: dict[str, Any] = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
            shape |= {"kv_dtype": kv_dtype, "page_size": page_size}
            yield "attention", AttentionWork("decode", **shape, seqs=32, rows=4096)  # three candidates fit any device
            yield "attention", AttentionWork("prefill", **shape, seqs=1, rows=4096)
    for in_size, out_size in SIZES:
        for format in FORMATS:
            for rows in ROWS:
                yield "matmul", MatmulWork(format, rows, in_size, out_size)
    for in_size, out_size in EXPERT_SIZES:
        for format in ("dense", *FORMATS):
            for rows in ROWS[1:]:
                yield "grouped_matmul", MatmulWork(format, rows, in_size, out_size, NUM_EXPERTS)


def search(default: Blocks, measure: Measure) -> tuple[Blocks, float]:
    """The fastest block sizes found from `default`, one coordinate after the other, and their seconds."""
    first = measure({"best": default})
    if not first:
        raise RuntimeError(f"the default {dict(default)} does not run")
    best, best_s = dict(default), first["best"]
    improved = True
    while improved:
        improved = False
        for name in default:
            candidates = {
                str(size): {**best, name: size}
                for size in (best[name] // 2, best[name] * 2)
                if size and size != best[name]
            }
            seconds = measure({"best": best, **candidates})
            best_s = seconds.pop("best")
            winner = min(seconds, key=lambda size: seconds[size], default=None)
            if winner is not None and seconds[winner] < best_s * (1 - LEAST_GAIN):
                best, best_s, improved = candidates[winner], seconds[winner], True
    return best, best_s


def measure_on_device(make: Callable[[], Call], kernel: str, rounds: int) -> Measure:
    """Times a call with block sizes forced while it is traced, all candidates in turns.

    A candidate whose result is not the first one's (the default's) is passed over, as is one that does not run.
    """
    expected: list[jax.Array] = []

    def measure(candidates: Mapping[str, Blocks]) -> dict[str, float]:
        programs = {}
        for name, blocks in candidates.items():
            with tuning.forced(kernel, blocks):
                try:
                    program = make().program()
                    result = jax.tree.leaves(program())[0]
                    expected.append(result) if not expected else check_agrees(result, expected[0])
                except Exception as error:  # too much shared memory or VMEM, or a shape the compiler does not take
                    print(f"  {blocks}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
                    continue
                programs[name] = program
        return {name: timing.median_s for name, timing in compare(programs, rounds=rounds).items()}

    return measure


def check_agrees(result: jax.Array, expected: jax.Array) -> None:
    """Raises ValueError where a result is further from the expected one than bfloat16's rounding explains."""
    difference = jnp.max(jnp.abs(result.astype(jnp.float32) - expected.astype(jnp.float32)))
    limit = 0.02 * jnp.max(jnp.abs(expected.astype(jnp.float32)))
    if not difference <= limit:
        raise ValueError(f"its result differs by {difference:.3g}, more than {limit:.3g}")


def tune(device: Device, only: set[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kernel, entry of its table) as they are found; a kernel whose default does not run is told and passed over."""
    ops = {op.name: op for op in (attention.OP, matmul.OP, grouped_matmul.OP)}
    for op, work in works(device):
        for backend in ops[op].backends:
            kernel = f"{op}.{backend}"
            if kernel not in tuning.KEYS or (only and kernel not in only):
                continue

            def make(work: AttentionWork | MatmulWork = work, backend: str = backend) -> Call:
                return work.call(backend, device, filled=True)

            for question in questions(work, backend, device, kernel):
                try:
                    blocks, seconds = search(question.default, measure_on_device(make, kernel, rounds))
                except RuntimeError as error:
                    print(f"{kernel} {question.key}: {error}", file=sys.stderr)
                    continue
                microseconds = round(seconds * 1e6, 2)
                print(f"{kernel} {question.key}: {blocks}, {microseconds} us", file=sys.stderr)
                found = {"key": question.key, "blocks": blocks, "default": question.default}
                yield kernel, found | {"microseconds": microseconds}


def questions(work: AttentionWork | MatmulWork, backend: str, device: Device, kernel: str) -> list[tuning.Question]:
    """What a call asks of the tables; nothing where the backend refuses it."""
    try:
        call = work.call(backend, device, filled=False)
        with tuning.asked() as asked, topology.targeting(device):
            jax.eval_shape(call.function, *call.args)
    except ValueError as refusal:
        print(f"{kernel}: {refusal}", file=sys.stderr)
        return []
    return [question for question in asked if question.kernel == kernel]


def merged(
    kernels: Mapping[str, list[dict[str, Any]]], kernel: str, entry: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """A table's kernels with one more entry, in place of one with the same key."""
    others = [old for old in kernels.get(kernel, []) if old["key"] != entry["key"]]
    return {**kernels, kernel: [*others, entry]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", default=[], choices=sorted(tuning.KEYS), help="tune this kernel only"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds per comparison (default: 9)")
    parser.add_argument("--out", type=Path, help="file to write (default: the table of this device)")
    args = parser.parse_args()
    device = devices.current()
    if device.platform == "cpu":
        parser.error("no accelerator here: the CPU's kernels have no block sizes to tune")
    out = args.out or Path(tuning.__file__).parent / "tuning" / f"{device.name}.json"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    head = {"device_kind": jax.devices()[0].device_kind, "versions": versions}
    kernels = json.loads(out.read_text())["kernels"] if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    found = False
    for kernel, entry in tune(device, set(args.only), args.rounds):
        kernels, found = merged(kernels, kernel, entry), True
        out.write_text(json.dumps({**head, "kernels": kernels}, indent=1) + "\n")  # what is found is kept
    if not found:
        print("nothing was tuned: no kernel of this device runs at these shapes", file=sys.stderr)
        return 1
    print(f"wrote {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
