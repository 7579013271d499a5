r"""How fast weights are loaded, beside the rate at which this machine copies the same files into memory.

    python scripts/make_random_model.py --arch llama --hidden-size 2048 --layers 16 --heads 32 --kv-heads 8 \
        --intermediate-size 8192 --vocab-size 128256 --tie --out llama-1b
    python benchmarks/load.py llama-1b [--rounds 7] [--format orbax] [--json]

With `--format orbax` the directory is converted first (`jaxinfer convert`), into a temporary one beside it. Files are
read once beforehand, so that they are in the page cache. A round then copies all their bytes into fresh memory, with
one thread and with as many as the loader has, and loads the parameters as bfloat16 and as float32; each round in
another order. Rates are bytes of files per second, so float32 from bfloat16 writes twice as many: the copies are made
once more into memory of that size. Before each, as much memory as the largest needs is written and freed: the host of
a virtual machine may take minutes to give it pages, and whoever comes first would pay for that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np

from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import ORBAX_DIR, load_parameters, num_threads
from jaxinfer.models.conversion import convert

CHUNK_BYTES = 16 << 20
BAR = 0.5  # of the faster copy


def copy_files(paths: list[Path], threads: int, widening: int = 1) -> list[np.ndarray]:
    """Every byte of the files in memory of its own: what any loader that maps nothing has to do.

    With `widening`, that many times as much memory is written: what is past a file's end is set to zeros.
    """
    copies = []
    for path in paths:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
            copy = np.empty(path.stat().st_size * widening, np.uint8)
            view, descriptor = memoryview(copy), file.fileno()

            def copy_chunk(start: int, view: memoryview = view, descriptor: int = descriptor) -> None:
                part = view[start : start + CHUNK_BYTES]
                while part and (count := os.preadv(descriptor, [part], start)):
                    part, start = part[count:], start + count
                part[:] = bytes(len(part))  # past the end of the file: the memory that widening adds

            list(pool.map(copy_chunk, range(0, copy.size, CHUNK_BYTES)))
        copies.append(copy)
    return copies


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result  # freed outside the measured time
    return elapsed


def measure(works: Mapping[str, Callable[[], object]], rounds: int, num_bytes: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, with `num_bytes` of memory at hand; the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            np.empty(num_bytes, np.uint8).fill(1)
            elapsed = seconds(works[name])
            if number:
                times[name].append(elapsed)
    return times


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with config.json and weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--format", choices=("safetensors", "orbax"), default="safetensors", help="of the weights")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with ExitStack() as temporary:
        model = args.model
        if args.format == "orbax":
            beside = temporary.enter_context(tempfile.TemporaryDirectory(dir=model.resolve().parent))
            model = Path(beside) / "converted"
            convert(args.model, model, jnp.dtype(jnp.bfloat16))
        run(model, args.rounds, args.json)


def run(model: Path, rounds: int, as_json: bool) -> None:
    """Measure one directory, whichever format it is in."""
    paths = sorted(model.glob("*.safetensors")) or [p for p in (model / ORBAX_DIR).rglob("*") if p.is_file()]
    num_bytes = sum(path.stat().st_size for path in paths)
    config = load_config(model)
    threads = num_threads()
    many = f"copy, {threads} threads"
    works: dict[str, Callable[[], object]] = {
        "copy, 1 thread": lambda: copy_files(paths, 1),
        many: lambda: copy_files(paths, threads),
        "copy, twice the memory": lambda: copy_files(paths, threads, widening=2),
        "load bfloat16": lambda: load_parameters(model, config, jnp.dtype(jnp.bfloat16)),
        "load float32": lambda: load_parameters(model, config, jnp.dtype(jnp.float32)),
    }
    times = measure(works, rounds, 5 * num_bytes // 2)
    fastest = min(("copy, 1 thread", many), key=lambda name: median(times[name]))
    result = {
        name: {
            "GB/s": num_bytes / median(each) / 1e9,
            "lowest": num_bytes / max(each) / 1e9,
            "highest": num_bytes / min(each) / 1e9,
            "of the faster copy": median(copy / own for copy, own in zip(times[fastest], each, strict=True)),
        }
        for name, each in times.items()
    }
    if as_json:
        print(json.dumps({"bytes": num_bytes, "bar": BAR, "results": result}, indent=2))
        return
    print(f"{num_bytes / 1e9:.2f} GB in {len(paths)} files, {rounds} rounds; the bar for bfloat16 is {BAR}")
    for name, rates in result.items():
        low, high, ratio = rates["lowest"], rates["highest"], rates["of the faster copy"]
        print(f"{name:22} {rates['GB/s']:6.2f} GB/s ({low:.2f} to {high:.2f}), {ratio:.2f} of the faster copy")


if __name__ == "__main__":
    main()
