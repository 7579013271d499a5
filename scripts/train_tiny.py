#!/usr/bin/env python3
"""Train the small model that ships with jaxinfer, on the source of Python's own standard library.

    python scripts/train_tiny.py --minutes 60                                    # the shipped model
    python scripts/train_tiny.py --size draft --minutes 20 --out build/draft     # a smaller one, same vocabulary

Killed at any moment, the same command continues from its last checkpoint. See docs/training.md.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tiny_export import export
from tiny_model import SHAPES
from tiny_run_files import UsageError, check_same_run
from tiny_trainer import Run, Trainer

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / "jaxinfer" / "assets" / "tiny_python"
NUM_EVAL_WINDOWS = 24


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        train(args)
    except UsageError as error:
        print(f"train_tiny.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--minutes", type=positive(float), default=60.0, help="time to spend in steps")
    parser.add_argument("--out", help="directory to export to (default for tiny: the shipped model's)")
    parser.add_argument("--work-dir", help="checkpoints and tokens (default: build/train_<size>)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=positive(int), default=2048, help="tokens per step")
    parser.add_argument("--vocab-size", type=positive(int), default=4096)
    parser.add_argument("--max-files", type=positive(int), help="train on the first files only (for tests)")
    parser.add_argument("--max-steps", type=positive(int), help="end after this many steps if that comes first")
    parser.add_argument("--log-every", type=positive(int), default=50, help="steps between evaluations")
    parser.add_argument("--save-every-s", type=positive(float), default=120.0, help="seconds between checkpoints")
    parser.add_argument("--first-export-s", type=positive(float), default=120.0, help="seconds to the first export")
    parser.add_argument("--export-every-s", type=positive(float), default=600.0, help="seconds between later exports")
    args = parser.parse_args(argv)
    if args.out is None and args.size != "tiny":
        parser.error(f"--size {args.size} needs --out: only the tiny model has a place in the package")
    args.out = args.out or str(ASSET)
    args.work_dir = args.work_dir or str(ROOT / "build" / f"train_{args.size}")
    return args


def positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be over 0")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def train(args: argparse.Namespace) -> None:
    work_dir, out = Path(args.work_dir), Path(args.out)
    work_dir.mkdir(parents=True, exist_ok=True)
    check_same_run(work_dir, args)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    console = Console(highlight=False)
    trainer = Trainer(args)
    if trainer.resume():
        console.print(f"continuing from step {trainer.run.step}, {trainer.run.elapsed_s / 60:.1f} min of training")
    loop(trainer, args, signals, console)
    if trainer.run.step == 0:
        console.print("stopped before the first step; nothing exported")
        return
    trainer.save()
    nats = export(out, trainer, progress_of(trainer.run, args))
    trainer.checkpoints.close()
    seen = f"step {trainer.run.step}, {trainer.run.num_tokens / 1e6:.2f} M tokens"
    console.print(f"exported to {args.out}: {seen}, held-out perplexity {math.exp(nats):.1f}", soft_wrap=True)


def loop(trainer: Trainer, args: argparse.Namespace, signals: list[int], console: Console) -> None:
    """Steps until time or `--max-steps` is up, or a signal came; saves, evaluates and exports on the way."""
    run = trainer.run
    recent: list[float] = []
    save_timer = Timer(args.save_every_s, args.save_every_s)
    export_timer = Timer(args.first_export_s, args.export_every_s)
    percentage = TextColumn("{task.percentage:.1f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percentage, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        while not signals and (progress := progress_of(run, args)) < 1.0:
            recent = [*recent, trainer.step(progress)][-args.log_every :]
            bar.update(task, completed=progress)
            if run.step % args.log_every == 0:
                line = log(trainer, statistics.mean(recent))
                bar.update(task, description=line)
                if not console.is_terminal:
                    console.print(f"{line}, {100 * progress:.1f} %", soft_wrap=True)
            if save_timer.due():
                trainer.save()
                save_timer.done()
            if export_timer.due():
                export(Path(args.out), trainer)
                export_timer.done()


def progress_of(run: Run, args: argparse.Namespace) -> float:
    """Share of the run that is done: by time, or by steps if that is further."""
    return max(run.elapsed_s / (60 * args.minutes), run.step / args.max_steps if args.max_steps else 0.0)


def log(trainer: Trainer, loss: float) -> str:
    run, perplexity = trainer.run, math.exp(trainer.held_out_nats(NUM_EVAL_WINDOWS))
    row = {"step": run.step, "tokens": run.num_tokens, "elapsed_s": round(run.elapsed_s, 1)}
    trainer.history.append(row | {"loss": loss, "ppl": perplexity})
    tokens_per_s = trainer.batch_tokens / trainer.clock.median()
    return f"step {run.step}: loss {loss:.3f}, held-out perplexity {perplexity:.1f}, {tokens_per_s:.0f} tokens/s"


class Timer:
    """Due once after `first_s`, then every `every_s`; the clock starts again when the work is done."""

    def __init__(self, first_s: float, every_s: float):
        self.every_s, self.due_at = every_s, time.monotonic() + first_s

    def due(self) -> bool:
        return time.monotonic() >= self.due_at

    def done(self) -> None:
        self.due_at = time.monotonic() + self.every_s


if __name__ == "__main__":
    sys.exit(main())
