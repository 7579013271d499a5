"""The tiny model's optimizer, schedule and clock, and a training run with its checkpoints."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tiny_corpus import crops, prepare_corpus
from tiny_model import SHAPES, Model, Params, Shape, is_projection
from tiny_run_files import History

# (from this share of the run on, context length); a batch holds the same number of tokens in each phase.
PHASES = ((0.0, 256), (0.5, 512), (0.88, 1024))
WARMUP = 0.02
CLIP_NORM = 1.0
PAUSE_FACTOR = 5.0  # a step longer than this many medians was a pause (SIGSTOP, a compile), and is not counted
ADAM_LR = 4e-3
WEIGHT_DECAY = 0.05  # of projections, per unit of learning rate
MUON_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
EVAL_CONTEXT = 512
SAMPLE_TEMPERATURE = 0.6


def make_optimizer(shape: Shape) -> optax.GradientTransformation:
    """Muon for the projections (Jordan 2024), Adam for the embedding and the norms; decay on projections only.

    Built at the peak learning rate; the step scales the whole update by the schedule's factor.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=lambda tree: dict.fromkeys(tree, MUON_AXES)),
        optax.stateless(lambda tree, _: {k: u * max(1.0, u.shape[0] / u.shape[1]) ** 0.5 for k, u in tree.items()}),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale(-shape.muon_lr),
    )
    adam = optax.chain(optax.scale_by_adam(0.9, 0.98, eps=1e-9), optax.scale(-ADAM_LR))
    clip = optax.clip_by_global_norm(CLIP_NORM)

    def split(tree: Params) -> tuple[Params, Params]:
        projections = {name: leaf for name, leaf in tree.items() if is_projection(name)}
        return projections, {name: leaf for name, leaf in tree.items() if not is_projection(name)}

    def init(params: Params) -> Any:
        projections, others = split(params)
        return clip.init(params), muon.init(projections), adam.init(others)

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        grads, clip_state = clip.update(grads, state[0])
        (muon_grads, adam_grads), (projections, others) = split(grads), split(params)
        muon_updates, muon_state = muon.update(muon_grads, state[1], projections)
        adam_updates, adam_state = adam.update(adam_grads, state[2], others)
        return muon_updates | adam_updates, (clip_state, muon_state, adam_state)

    return optax.GradientTransformation(init, update)


def schedule(progress: float) -> float:
    """Share of the peak learning rate: a short ramp, then a cosine down to 1 %."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


@dataclass
class Run:
    """Everything a checkpoint holds; the random crops follow from `step`."""

    params: Params
    opt_state: Any
    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0  # spent in steps, without pauses

    def saved(self) -> dict[str, Any]:
        """A tree of arrays whose parameter names are the Hugging Face ones, whatever class computes with them."""
        leaves = {f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(self.opt_state))}
        counters = {
            "step": np.array(self.step, np.int64),
            "num_tokens": np.array(self.num_tokens, np.int64),
            "elapsed_s": np.array(self.elapsed_s, np.float64),
        }
        return {"params": self.params, "optimizer": leaves, "counters": counters}

    def restore(self, tree: dict[str, Any]) -> None:
        self.params = {name: jnp.asarray(array) for name, array in tree["params"].items()}
        leaves = [jnp.asarray(tree["optimizer"][name]) for name in sorted(tree["optimizer"])]
        self.opt_state = jax.tree.unflatten(jax.tree.structure(self.opt_state), leaves)
        counters = tree["counters"]
        self.step, self.num_tokens = int(counters["step"]), int(counters["num_tokens"])
        self.elapsed_s = float(counters["elapsed_s"])


class StepClock:
    """Seconds spent in steps; one far over the median (a stopped process, a compilation) counts as a few medians."""

    def __init__(self) -> None:
        self.recent: list[float] | None = None

    def counted(self, seconds: float) -> float:
        """What of a step's `seconds` counts; the first step of a process compiles, and counts nothing."""
        if self.recent is None:
            self.recent = []
            return 0.0
        counted = min(seconds, PAUSE_FACTOR * statistics.median(self.recent)) if self.recent else seconds
        self.recent = [*self.recent, counted][-31:]
        return counted

    def median(self) -> float:
        return statistics.median(self.recent) if self.recent else math.inf


class Trainer:
    """One run in one work directory: its data, its state, and the compiled functions."""

    def __init__(self, args: argparse.Namespace):
        work_dir = Path(args.work_dir)
        self.seed, self.batch_tokens = args.seed, args.batch_tokens
        self.tokenizer, self.corpus = prepare_corpus(work_dir, args.vocab_size, args.max_files)
        self.model = Model(SHAPES[args.size], args.vocab_size)
        self.optimizer = make_optimizer(self.model.shape)
        params = self.model.init(args.seed)
        self.run = Run(params, self.optimizer.init(params))
        self.history = History(work_dir / "metrics.jsonl")
        self.clock = StepClock()
        self._update = jax.jit(self._update_eagerly, donate_argnums=(0, 1))
        self._losses = jax.jit(self.model.losses)
        self._sample = jax.jit(self._sample_eagerly)
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.checkpoints = ocp.CheckpointManager((work_dir / "checkpoints").resolve(), options=options)

    def _update_eagerly(
        self, params: Params, opt_state: Any, window: jax.Array, scale: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: self.model.losses(p, window).mean())(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return {name: array + scale * updates[name] for name, array in params.items()}, opt_state, loss

    def _sample_eagerly(self, params: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), last)
        return jax.random.categorical(key, self.model(params, tokens)[0, last] / SAMPLE_TEMPERATURE)

    def step(self, progress: float) -> float:
        """One optimizer step; returns its loss."""
        run = self.run
        context = [context for start, context in PHASES if progress >= start][-1]
        window = crops(self.corpus.train, self.seed, run.step, self.batch_tokens, context)
        began = time.monotonic()
        scale = jnp.float32(schedule(progress))
        run.params, run.opt_state, loss = self._update(run.params, run.opt_state, window, scale)
        loss = float(loss)
        run.elapsed_s += self.clock.counted(time.monotonic() - began)
        run.step += 1
        run.num_tokens += window[:, 1:].size
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {run.step}; lower the learning rate")
        return loss

    def held_out_nats(self, num_windows: int | None) -> float:
        """Mean over the held-out stream cut into windows, or over `num_windows` of them, evenly spread.

        With all windows the weights are rounded to bfloat16 as they are shipped: the model casts them anyway.
        """
        stream, batch = self.corpus.held_out, 8
        count = (len(stream) - 1) // EVAL_CONTEXT
        chosen = np.linspace(0, count - 1, min(count, num_windows or count)).astype(int)
        total = 0.0
        for first in range(0, len(chosen), batch):
            starts = chosen[first : first + batch] * EVAL_CONTEXT
            windows = stream[np.resize(starts, batch)[:, None] + np.arange(EVAL_CONTEXT + 1)].astype(np.int32)
            total += float(self._losses(self.run.params, windows)[: len(starts)].sum())
        return total / (len(chosen) * EVAL_CONTEXT)

    def next_token(self, tokens: list[int]) -> int:
        """A likely token after `tokens`, the same in every call."""
        padded = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)  # few lengths, so few compilations
        padded[0, : len(tokens)] = tokens
        return int(self._sample(self.run.params, padded, len(tokens) - 1))

    def save(self) -> None:
        if self.checkpoints.latest_step() != self.run.step:
            self.checkpoints.save(self.run.step, args=ocp.args.StandardSave(self.run.saved()))
        self.checkpoints.wait_until_finished()

    def resume(self) -> bool:
        step = self.checkpoints.latest_step()
        if step is None:
            return False
        self.run.restore(self.checkpoints.restore(step, args=ocp.args.StandardRestore(self.run.saved())))
        self.history.forget_after(step)
        return True
