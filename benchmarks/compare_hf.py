"""jaxinfer against Hugging Face transformers on the same weights, interleaved in one run.

Both keep their model loaded; round by round each runs the same work while the other idles. Prints one JSON document
(medians, spread, ratios) and writes it where --out says.

    python benchmarks/compare_hf.py latency MODEL --hf-python /path/to/torch/env/bin/python
    python benchmarks/compare_hf.py throughput MODEL --hf-python ... --num-prompts 32 --output-len 8:128
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.request import SamplingParams
from serving.bench_drive import Run, drive, equal_prompts
from serving.bench_latency import summarize_latency
from serving.bench_options import flag_type, length, positive
from serving.bench_report import Ceilings, common_report
from serving.bench_trace import draw_trace, save_trace
from serving.flags import add_config_flags, config_from

GREEDY = SamplingParams(temperature=0.0)
BASELINES = {"hf_batches": "batches", "hf_continuous": "continuous"}  # name -> mode of hf_baseline.py


class HuggingFace:
    """benchmarks/hf_baseline.py as a process that keeps its model loaded and answers one command at a time."""

    def __init__(self, python: Path, model: Path, *, dtype: str, threads: int):
        script = Path(__file__).with_name("hf_baseline.py")
        command = [str(python), str(script), str(model), "--serve", "--dtype", dtype, "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def __enter__(self) -> HuggingFace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, mode: str, **arguments: Any) -> dict[str, Any]:
        """One measurement. RuntimeError with the other side's message when it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"mode": mode, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"Hugging Face {mode}: {answer['error']}")
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the Hugging Face process ended early with exit code {self._process.wait()}")
        return json.loads(line)


def open_engine(args: argparse.Namespace, *, num_seqs: int, longest: int) -> Engine:
    engine = Engine(args.model, config_from(args, EngineConfig, max_num_seqs=num_seqs, max_model_len=longest))
    say(f"compiling {args.model.name}")
    engine.warm_up()
    return engine


def latency(args: argparse.Namespace, hf: HuggingFace) -> dict[str, Any]:
    """One request at a time: prefill and decode of both, and what our decode made of the machine."""
    limits = Ceilings(args.dtype)
    total = args.fixed_input_len + args.fixed_output_len
    engine = open_engine(args, num_seqs=1, longest=total)
    lengths = {"input_len": args.fixed_input_len, "output_len": args.fixed_output_len}
    runs: list[Run] = []
    theirs: list[dict[str, Any]] = []
    for number in range(1 + args.rounds):
        prompts = equal_prompts(engine, 1, args.fixed_input_len, args.fixed_output_len, number)
        done = drive(engine, prompts, GREEDY, label=f"round{number}")
        other = hf.run("latency", iterations=1, **lengths)
        if number:  # round 0 warms both up
            runs.append(done)
            theirs.append(other)
            say(f"round {number}: {done.duration_s:.2f} s, Hugging Face {other['latency_s']:.2f} s")
    ours = summarize_latency(
        runs, engine.model, args.fixed_input_len, args.fixed_output_len, args.dtype, limits.report()
    )
    pairs = {
        "latency_s": (ours["latencies"], [r["latency_s"] for r in theirs]),
        "prefill_s": (ours["prefill_s_all"], [r["prefill_s"] for r in theirs]),
        "decode_s_per_token": ([ms / 1e3 for ms in ours["decode_step_ms_all"]], [r["per_token_s"] for r in theirs]),
    }
    report = {name: compare(a, b, smaller_is_better=True) for name, (a, b) in pairs.items()}
    keys = ("mbu", "mfu_prefill", "read_bandwidth_gbps", "matmul_tflops", "decode_tokens_per_s", "ceilings")
    return {**lengths, **report, **{key: ours[key] for key in keys}, **common_report(engine)}


def throughput(args: argparse.Namespace, hf: HuggingFace) -> dict[str, Any]:
    """The same trace through our engine, `generate` in batches, and transformers' continuous batching."""
    model_vocabulary, limit = vocabulary_and_length(args.model)
    trace = draw_trace(
        num_prompts=args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        vocab_size=model_vocabulary,
        max_model_len=limit,
        seed=args.seed,
    )
    engine = open_engine(
        args, num_seqs=args.concurrency, longest=max(len(r.prompt_token_ids) + r.output_len for r in trace)
    )
    outputs = sum(item.output_len for item in trace)
    rates: dict[str, list[float]] = {name: [] for name in ("jaxinfer", *BASELINES)}
    failures: dict[str, str] = {}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        save_trace(trace, Path(file.name))
        shared = {"trace": file.name, "batch_size": args.concurrency}
        drive(engine, trace[: args.concurrency], GREEDY, label="warm-up")
        hf.run("latency", input_len=64, output_len=4, iterations=1)
        for number in range(args.rounds):
            done = drive(engine, trace, GREEDY, label=f"round{number}")
            if any(record.error for record in done.records):
                raise RuntimeError(f"requests failed: {next(r.error for r in done.records if r.error)}")
            rates["jaxinfer"].append(outputs / done.duration_s)
            for name in [name for name in BASELINES if name not in failures]:
                try:
                    rates[name].append(hf.run(BASELINES[name], **shared)["output_throughput"])
                except RuntimeError as error:  # this baseline does not run here; the other one counts
                    failures[name] = str(error)
                    say(f"{name}: {error}")
            latest = ", ".join(f"{name} {each[-1]:.1f}" for name, each in rates.items() if each)
            say(f"round {number + 1}, tokens/s: {latest}")
    usable = [name for name in BASELINES if name not in failures]
    if not usable:
        raise RuntimeError(f"no baseline ran: {failures}")
    better = max(usable, key=lambda name: statistics.median(rates[name]))
    return {
        "num_prompts": args.num_prompts,
        "total_input_tokens": sum(len(item.prompt_token_ids) for item in trace),
        "total_output_tokens": outputs,
        "concurrency": args.concurrency,
        "output_throughput": {name: spread(each) for name, each in rates.items() if each},
        "better_baseline": better,
        **compare(rates["jaxinfer"], rates[better], smaller_is_better=False),
        "failures": failures,
        **common_report(engine),
    }


def compare(ours: list[float], theirs: list[float], *, smaller_is_better: bool) -> dict[str, Any]:
    """Medians, spread, and how many times better we are: the median over rounds, and every round's."""
    ratios = [b / a if smaller_is_better else a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "jaxinfer": spread(ours),
        "hugging_face": spread(theirs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def vocabulary_and_length(model: Path) -> tuple[int, int]:
    config = json.loads((model / "config.json").read_text())
    return config["vocab_size"], config["max_position_embeddings"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "throughput"))
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--hf-python", type=Path, required=True, help="python of the environment with torch and transformers"
    )
    parser.add_argument("--hf-threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--fixed-input-len", type=positive, default=128, help="latency: prompt tokens (default: 128)")
    parser.add_argument("--fixed-output-len", type=positive, default=64, help="latency: output tokens (default: 64)")
    parser.add_argument("--num-prompts", type=positive, default=32, help="throughput: requests (default: 32)")
    parser.add_argument(
        "--input-len", type=length, default="16:512", help="throughput: prompt tokens (default: 16:512)"
    )
    parser.add_argument("--output-len", type=length, default="8:128", help="throughput: output tokens (default: 8:128)")
    parser.add_argument(
        "--concurrency", type=flag_type(int), default=16, help="throughput: requests at once (default: 16)"
    )
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON to this file")
    add_config_flags(parser, EngineConfig, skip={"max_num_seqs", "max_model_len"})
    args = parser.parse_args()
    with HuggingFace(args.hf_python, args.model, dtype=args.dtype, threads=args.hf_threads) as hf:
        report = {"what": args.what, "rounds": args.rounds, "hugging_face_versions": hf.about["versions"]}
        report |= latency(args, hf) if args.what == "latency" else throughput(args, hf)
        report["torch_matmul_tflops"] = hf.run("matmul")["matmul_tflops"]
    text = json.dumps(report, indent=2, default=str)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
