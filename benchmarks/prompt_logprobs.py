"""What prompt log-probabilities cost beside plain prefill: `python benchmarks/prompt_logprobs.py [MODEL]`.

Prompts of random tokens are read without, with 0 and with 20 alternatives, in turn; prints seconds and ratios to plain.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from jaxinfer.llm import LLM
from jaxinfer.request import SamplingParams

KINDS = {"plain": None, "prompt_logprobs=0": 0, "prompt_logprobs=20": 20}


def main() -> None:
    """Print a line per kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="model directory (default: the shipped model)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts per turn")
    parser.add_argument("--tokens", type=int, default=500, help="tokens per prompt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    llm = LLM(args.model, warm_up=False, dtype=args.dtype, max_model_len=args.tokens + 1, prefix_caching=False)
    random = np.random.default_rng(0)
    prompts = random.integers(1, llm.engine.model.vocab_size, (args.prompts, args.tokens)).tolist()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.turns + 1):  # the first one compiles
        for kind, num_top in KINDS.items():
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num_top)
            start = time.perf_counter()
            llm.generate(prompts, params, progress=False)
            if turn:
                seconds[kind].append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain"])
    for kind, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{kind:20} {middle:8.3f} s  {args.prompts * args.tokens / middle:10,.0f} tokens/s  {middle / plain:5.2f} x"
        )


if __name__ == "__main__":
    main()
