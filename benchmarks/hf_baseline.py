"""Hugging Face transformers on a trace: the baseline that jaxinfer is compared with.

Runs in its own environment (torch and transformers; never the project's), reads the same model directory, and
prints one JSON document. `--serve` keeps the model loaded and answers one JSON line per JSON line on stdin, so
that another program can interleave it with something else.

    HF_PYTHON hf_baseline.py MODEL --mode latency --input-len 128 --output-len 64
    HF_PYTHON hf_baseline.py MODEL --mode batches|continuous --trace trace.json --batch-size 16
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Nothing here may reach for the network: the model directory is local.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAD_ID = 0  # any id: padded positions are masked


class Baseline:
    """One loaded model and the three ways to run it. Every method returns a JSON-able dict of seconds and tokens."""

    def __init__(self, model_dir: str, *, threads: int, dtype: str):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
        self.attention = self.model.config._attn_implementation

    def latency(self, *, input_len: int, output_len: int, batch_size: int = 1, iterations: int = 3) -> dict[str, Any]:
        """Prefill and per-token seconds of `generate`: a call for one token, and one for `output_len`, alternating."""
        prompts = torch.randint(0, self.model.config.vocab_size, (batch_size, input_len))
        self._generate(prompts, torch.ones_like(prompts), 2)  # warm-up: allocator and lazy kernels
        prefill_s, total_s = [], []
        for _ in range(iterations):
            prefill_s.append(_seconds(lambda: self._generate(prompts, torch.ones_like(prompts), 1)))
            total_s.append(_seconds(lambda: self._generate(prompts, torch.ones_like(prompts), output_len)))
        per_token_s = [(t - p) / (output_len - 1) for t, p in zip(total_s, prefill_s, strict=True)]
        return {
            "prefill_s": statistics.median(prefill_s),
            "per_token_s": statistics.median(per_token_s),
            "latency_s": statistics.median(total_s),
            "output_throughput": batch_size * output_len / statistics.median(total_s),
            "decode_tokens_per_s": batch_size / statistics.median(per_token_s),
            "prefill_s_all": prefill_s,
            "per_token_s_all": per_token_s,
            "latency_s_all": total_s,
        }

    def batches(self, requests: list[dict[str, Any]], *, batch_size: int) -> dict[str, Any]:
        """`generate` on consecutive batches, prompts padded on the left, each batch to its longest output.

        Tokens that a request did not ask for are generated (the API has one length per batch) but not counted.
        """
        start = time.perf_counter()
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            longest = max(len(r["prompt_token_ids"]) for r in batch)
            padding = [longest - len(r["prompt_token_ids"]) for r in batch]
            pairs = list(zip(padding, batch, strict=True))
            ids = torch.tensor([[PAD_ID] * pad + r["prompt_token_ids"] for pad, r in pairs])
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
            self._generate(ids, mask, max(r["output_len"] for r in batch))
        return _throughput(requests, time.perf_counter() - start)

    def continuous(self, requests: list[dict[str, Any]], *, batch_size: int) -> dict[str, Any]:
        """transformers' continuous-batching manager: all requests queued at once, `batch_size` at a time."""
        config = GenerationConfig(
            do_sample=False, eos_token_id=-1, max_new_tokens=max(r["output_len"] for r in requests)
        )
        rows = sum(len(r["prompt_token_ids"]) + r["output_len"] for r in requests)
        page_size = 64
        batching = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=rows // page_size + 2 * len(requests),
            max_batch_tokens=512,
            max_requests_per_batch=batch_size,
            allow_block_sharing=False,
        )
        with self._manager(config, batching) as manager:
            manager.add_request([1, 2, 3, 4], max_new_tokens=2)
            warm_up = _next_results(manager, 1)[0]
            if warm_up.error is not None:
                raise RuntimeError(f"continuous batching failed on its warm-up request: {warm_up.error}")
            start = time.perf_counter()
            for request in requests:
                manager.add_request(request["prompt_token_ids"], max_new_tokens=request["output_len"])
            results = _next_results(manager, len(requests))
            duration = time.perf_counter() - start
        failed = [r.error for r in results if r.error is not None]
        generated = sum(len(r.generated_tokens) for r in results)
        if failed or generated != sum(r["output_len"] for r in requests):
            raise RuntimeError(f"continuous batching gave {generated} tokens, {len(failed)} errors: {failed[:1]}")
        return _throughput(requests, duration)

    def matmul(self, *, rows: int = 512, inner: int = 2048, outer: int = 8192, repeats: int = 8) -> dict[str, Any]:
        """torch's own best rate for a dense product in the model's dtype, for the record."""
        dtype = next(self.model.parameters()).dtype
        x, w = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        best_s = min(_seconds(lambda: torch.nn.functional.linear(x, w)) for _ in range(repeats))
        return {"matmul_tflops": 2 * rows * inner * outer / best_s / 1e12}

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
        config = GenerationConfig(
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD_ID,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, generation_config=config)
        if out.shape[1] != ids.shape[1] + num_tokens:
            raise RuntimeError(f"generate returned {out.shape[1] - ids.shape[1]} tokens, not {num_tokens}")
        return out

    @contextlib.contextmanager
    def _manager(self, config: GenerationConfig, batching: ContinuousBatchingConfig) -> Iterator[Any]:
        """A running continuous-batching manager; the model's attention is put back afterwards."""
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=10
        ) as manager:
            yield manager
        self.model.set_attn_implementation(self.attention)


def _next_results(manager: Any, count: int) -> list[Any]:
    results: list[Any] = []
    while len(results) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            results.append(result)
        elif result is None and not manager.is_running():
            raise RuntimeError("the continuous-batching thread ended early")
    return results


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _throughput(requests: list[dict[str, Any]], duration_s: float) -> dict[str, Any]:
    inputs = sum(len(r["prompt_token_ids"]) for r in requests)
    outputs = sum(r["output_len"] for r in requests)
    return {
        "duration": duration_s,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
    }


def run(baseline: Baseline, command: dict[str, Any]) -> dict[str, Any]:
    """One measurement: {"mode": "latency" | "batches" | "continuous" | "matmul", ...its arguments}."""
    arguments = {k: v for k, v in command.items() if k != "mode"}
    if "trace" in arguments:
        arguments["requests"] = json.loads(Path(arguments.pop("trace")).read_text())["requests"]
    modes = {n: getattr(baseline, n) for n in ("latency", "batches", "continuous", "matmul")}
    if command["mode"] not in modes:
        raise ValueError(f"mode {command['mode']!r} is not one of {', '.join(modes)}")
    return modes[command["mode"]](**arguments)


def serve(baseline: Baseline, out: Any) -> None:
    """Answer one JSON line per JSON line; a failure is {"error": ...} and the next line is served."""
    print(json.dumps({"ready": True, **versions()}), file=out, flush=True)
    for line in sys.stdin:
        try:
            answer = run(baseline, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


def versions() -> dict[str, Any]:
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face model directory")
    parser.add_argument("--mode", choices=("latency", "batches", "continuous", "matmul"), default="latency")
    parser.add_argument("--trace", type=Path, help="JSON file with requests: prompt_token_ids and output_len")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 1 for latency, 16 otherwise")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--serve", action="store_true", help="keep the model loaded; JSON lines in, JSON lines out")
    args = parser.parse_args()
    if args.mode in ("batches", "continuous") and args.trace is None and not args.serve:
        parser.error(f"--mode {args.mode} needs --trace")

    # transformers prints to stdout now and then; only our JSON may go there.
    out, sys.stdout = sys.stdout, sys.stderr
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    baseline = Baseline(args.model, threads=args.threads, dtype=args.dtype)
    if args.serve:
        serve(baseline, out)
        return 0
    command: dict[str, Any] = {"mode": args.mode}
    if args.mode == "latency":
        command |= {"input_len": args.input_len, "output_len": args.output_len, "iterations": args.iterations}
        command["batch_size"] = args.batch_size or 1
    elif args.mode != "matmul":
        command |= {"trace": str(args.trace), "batch_size": args.batch_size or 16}
    print(
        json.dumps(
            {"model": args.model, "dtype": args.dtype, **command, **run(baseline, command), **versions()}, indent=2
        ),
        file=out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
