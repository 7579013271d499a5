r"""What `--invariant` costs: the same engine with and without it, taking turns.

    python scripts/make_random_model.py --arch llama --hidden-size 1024 --layers 12 --heads 16 --kv-heads 4 \
        --intermediate-size 2816 --vocab-size 32000 --out llama-150m
    python benchmarks/invariance.py [MODEL ...] [--matmul-backend xla] [--attention-backend xla] [--kv-dtype int8]
        [--rounds 9] [--out results.json]

Without MODEL, the one that ships with the project. Decoding: milliseconds per step of 1, 4 and 16 sequences; prefill:
milliseconds to the first token of a prompt of 512. Every round runs every case on both engines, in bfloat16. A ratio is
the median over rounds of (with / without); above 1 the option costs time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxinfer.config import ATTENTION_BACKENDS, KV_DTYPES, MATMUL_BACKENDS, EngineConfig, shipped_model
from jaxinfer.engine import Engine
from jaxinfer.perf.hardware import describe_device
from jaxinfer.request import Request, SamplingParams

DECODING = (1, 4, 16)  # sequences
DECODE_STEPS, SHORT_PROMPT, LONG_PROMPT = 48, 8, 512
CASES = (*(f"decode {n}" for n in DECODING), f"prefill {LONG_PROMPT}")


def engines(model: Path, options: dict[str, Any]) -> dict[str, Engine]:
    config = EngineConfig(
        max_num_seqs=max(DECODING),
        max_prefill_seqs=max(DECODING),
        max_model_len=LONG_PROMPT + DECODE_STEPS,
        prefix_caching=False,  # a prompt is computed in every round
        **options,
    )
    return {
        "without": Engine(model, config),
        "with": Engine(model, EngineConfig(**{**vars(config), "invariant": True})),
    }


def seconds(engine: Engine, case: str, rng: np.random.Generator) -> float:
    """Of one step of decoding, or of one prefill."""
    kind, _, size = case.partition(" ")
    sequences, length, tokens = (int(size), SHORT_PROMPT, DECODE_STEPS) if kind == "decode" else (1, LONG_PROMPT, 1)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for i in range(sequences):
        prompt = tuple(rng.integers(1, engine.model.vocab_size, length).tolist())
        engine.add(Request(str(i), prompt, params))
    running = kind == "prefill"  # decoding is timed from the first token on
    start, spoken = time.perf_counter(), 0
    while engine.has_work():
        spoken += sum(len(event.token_ids) for event in engine.step())
        if not running and spoken >= sequences:
            start, running, counted = time.perf_counter(), True, spoken
    elapsed = time.perf_counter() - start
    return elapsed if kind == "prefill" else elapsed / ((spoken - counted) / sequences)


def measure(pair: dict[str, Engine], rounds: int) -> dict[str, dict[str, list[float]]]:
    """case -> engine -> seconds per round; a first round, which compiles, is left out."""
    times: dict[str, dict[str, list[float]]] = {case: {name: [] for name in pair} for case in CASES}
    for number in range(rounds + 1):
        for case in CASES:
            for name in list(pair)[:: 1 if number % 2 else -1]:
                elapsed = seconds(pair[name], case, np.random.default_rng(number))
                if number:
                    times[case][name].append(elapsed)
    return times


def rows(times: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    for case, each in times.items():
        ratios = [own / plain for own, plain in zip(each["with"], each["without"], strict=True)]
        milliseconds = {
            name: {"median": 1e3 * median(own), "low": 1e3 * min(own), "high": 1e3 * max(own)}
            for name, own in each.items()
        }
        ratio = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
        yield {"case": case, "milliseconds": milliseconds, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", default=[shipped_model()], help="Hugging Face directories")
    parser.add_argument("--matmul-backend", choices=MATMUL_BACKENDS, default="auto")
    parser.add_argument("--attention-backend", choices=ATTENTION_BACKENDS, default="auto")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("matmul_backend", "attention_backend", "kv_dtype")}
    document: dict[str, Any] = {"device": describe_device(), "jax": jax.__version__, "options": options, "models": {}}
    print(f"{document['device']}, jax {jax.__version__}, {options}, {args.rounds} rounds")
    for model in args.models:
        results = list(rows(measure(engines(model, options), args.rounds)))
        document["models"][model.name] = results
        for row in results:
            plain, own, ratio = row["milliseconds"]["without"], row["milliseconds"]["with"], row["ratio"]
            print(
                f"{model.name}, {row['case']}: {plain['median']:.2f} ms ({plain['low']:.2f} to {plain['high']:.2f}) "
                f"without, {own['median']:.2f} ms ({own['low']:.2f} to {own['high']:.2f}) with: "
                f"{ratio['median']:.2f} times ({ratio['low']:.2f} to {ratio['high']:.2f})",
                flush=True,
            )
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
