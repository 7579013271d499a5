#!/usr/bin/env python3
"""Train the small model that ships with jaxinfer, on the source of Python's own standard library.

    python scripts/train_tiny.py --minutes 60                                    # the shipped model
    python scripts/train_tiny.py --size draft --minutes 20 --out build/draft     # a smaller one, same vocabulary

Killed at any moment, the same command continues from its last checkpoint. See docs/training.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxinfer.config import ModelConfig
from jaxinfer.models import weight_name
from jaxinfer.models.mistral import ministral_config
from jaxinfer.models.transformer import Transformer, abstract_parameters, merger

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / "jaxinfer" / "assets" / "tiny_python"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# Tests, data tables and vendored or generated text are left out: they teach a model little about library code.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "turtledemo"}
SKIPPED_LIB2TO3 = ("lib2to3/tests", "lib2to3/fixes")
MAX_FILE_BYTES = 400_000
HELD_OUT_PERCENT = 5

# GPT-2's split without its English contractions ('s, 't, ...), which would cut 'self' and 'test' in string literals;
# identifiers keep their underscores, so `__init__` can become one token. "\n        x" splits as "\n       " + " x".
SPLIT = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

# (from this share of the run on, context length); a batch holds the same number of tokens in each phase.
PHASES = ((0.0, 256), (0.5, 512), (0.88, 1024))
WARMUP = 0.02
CLIP_NORM = 1.0
PAUSE_FACTOR = 5.0  # a step longer than this many medians was a pause (SIGSTOP, a compile), and is not counted
ADAM_LR = 4e-3
WEIGHT_DECAY = 0.05  # of projections, per unit of learning rate
MUON_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
EVAL_CONTEXT = 512
NUM_EVAL_WINDOWS = 24
SAMPLE_PROMPTS = ("def read_json(path):", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n\ndef main(")
NUM_SAMPLE_TOKENS = 64
SAMPLE_TEMPERATURE = 0.6


class UsageError(ValueError):
    """A flag or a work directory that cannot be honoured; the message says what to do."""


@dataclass(frozen=True)
class Shape:
    """A Llama block with one window per layer (None: all tokens)."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    windows: tuple[int | None, ...]
    muon_lr: float
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_position: int = 1024


SHAPES = {
    "tiny": Shape(256, 8, 4, 32, 688, (128, 128, None, 128, 128, None), muon_lr=0.02),
    "draft": Shape(128, 4, 2, 32, 344, (128, 128, 128, None), muon_lr=0.03),
}
RESIDUAL_WEIGHTS = ("o_proj.weight", "down_proj.weight")
EMBEDDING_SCALE = 0.04
COMPUTE_DTYPE = jnp.dtype("bfloat16")  # 1.6 times as fast as float32 on a CPU with AVX512-BF16; parameters stay float32

Params = dict[str, jax.Array]  # Hugging Face name -> array, projections shaped [out, in]


# ---------------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray  # u16[tokens]
    held_out: np.ndarray  # u16[tokens]
    facts: dict[str, Any]  # files and bytes of either part, for the model card


def library_files(root: Path) -> list[Path]:
    """Relative paths of the library's own modules, sorted."""
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.as_posix().startswith(SKIPPED_LIB2TO3):
            continue
        if 0 < path.stat().st_size <= MAX_FILE_BYTES and not relative.name.startswith("_sysconfigdata"):
            files.append(relative)
    return files


def is_held_out(relative: Path) -> bool:
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one stream, each after an end-of-text token."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream.append(END_OF_TEXT_ID)
        stream.extend(encoding.ids)
    return np.asarray(stream, np.uint16)


def prepare_corpus(work_dir: Path, vocab_size: int, max_files: int | None) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and token streams, made once and kept in the work directory."""
    tokenizer_path, tokens_path = work_dir / "tokenizer.json", work_dir / "tokens.npz"
    if tokens_path.exists():
        with np.load(tokens_path) as saved:
            corpus = Corpus(saved["train"], saved["held_out"], json.loads(str(saved["facts"])))
        return Tokenizer.from_file(str(tokenizer_path)), corpus
    root = Path(sysconfig.get_paths()["stdlib"])
    files = library_files(root)[:max_files]
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for relative in files:
        text = (root / relative).read_text("utf-8", errors="ignore")
        parts["held_out" if is_held_out(relative) else "train"].append(text)
    if not parts["train"] or not parts["held_out"]:
        raise UsageError(f"{len(files)} files leave nothing to train on or nothing held out; raise --max-files")
    tokenizer = train_tokenizer(parts["train"], vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size}: the corpus supports only {tokenizer.get_vocab_size()} tokens; lower it"
        )
    streams = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    facts = {"python": platform.python_version()}
    for name, texts in parts.items():
        facts |= {f"{name}_files": len(texts), f"{name}_bytes": sum(len(t.encode()) for t in texts)}
        facts |= {f"{name}_tokens": len(streams[name])}
    tokenizer.save(str(tokenizer_path))
    partial_path = work_dir / "tokens.partial.npz"
    np.savez(partial_path, **streams, facts=json.dumps(facts))
    os.replace(partial_path, tokens_path)
    return tokenizer, Corpus(streams["train"], streams["held_out"], facts)


def crops(stream: np.ndarray, seed: int, step: int, num_tokens: int, context: int) -> np.ndarray:
    """`i32[sequences, context + 1]`: random crops that depend on seed and step alone, so a resumed run repeats none."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(stream) - context - 1, size=max(1, num_tokens // context))
    return stream[starts[:, None] + np.arange(context + 1)].astype(np.int32)


# ----------------------------------------------------------------------------------------------------------- model


class Model:
    """jaxinfer's own decoder over parameters that go by their Hugging Face names."""

    def __init__(self, shape: Shape, vocab_size: int):
        self.shape = shape
        self.config: ModelConfig = ministral_config(hf_config(shape, vocab_size))
        specs = abstract_parameters(self.config, jnp.float32)
        self.shapes = {weight_name(self.config.architecture, name): spec.shape for name, spec in specs.items()}
        self._merge = merger(self.config, COMPUTE_DTYPE, "xla")

    def init(self, seed: int) -> Params:
        """Fan-in scaled projections; those that write to the residual stream are zero: a layer begins as identity."""
        rng = np.random.default_rng(seed)
        params = {}
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                params[name] = jnp.ones(shape)
            elif name.endswith(RESIDUAL_WEIGHTS):
                params[name] = jnp.zeros(shape)
            else:
                scale = shape[1] ** -0.5 if is_projection(name) else EMBEDDING_SCALE
                params[name] = jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
        return params

    def __call__(self, params: Params, tokens: jax.Array) -> jax.Array:
        """`tokens i32[sequences, tokens]` -> logits `f32[sequences, tokens, vocab]`, computed in bfloat16."""
        sequences, length = tokens.shape
        transformer: Transformer = self._merge(tuple(params[name].astype(COMPUTE_DTYPE) for name in self.shapes))

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = (x.reshape(sequences, length, *x.shape[1:]) for x in (q, k, v))
            return attention(q, k, v, self.config.layers[layer].window).reshape(sequences * length, *q.shape[2:])

        positions = jnp.tile(jnp.arange(length), sequences)
        hidden = transformer(tokens.reshape(-1), positions, attend)
        return transformer.unembed(hidden).reshape(sequences, length, -1)

    def losses(self, params: Params, window: jax.Array) -> jax.Array:
        """Negative log likelihood in nats of `window[:, 1:]`, `f32[sequences, tokens]`."""
        logits = self(params, window[:, :-1])
        target = jnp.take_along_axis(logits, window[:, 1:, None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - target


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """`q [B, T, N, H]`, `k, v [B, T, K, H]`: key j is visible to query i iff 0 <= i - j < window."""
    batch, tokens, heads, head_dim = q.shape
    if window is not None and tokens > 2 * window and tokens % window == 0:
        # Each block of `window` queries sees its own block and the one before: 2 * window keys instead of all.
        blocks = tokens // window
        q = q.reshape(batch * blocks, window, heads, head_dim)
        k, v = (_with_previous_block(x, blocks) for x in (k, v))
        distance = window + jnp.arange(window)[:, None] - jnp.arange(2 * window)
        first = jnp.tile(jnp.arange(blocks) == 0, batch)[:, None, None]
        visible = (distance >= 0) & (distance < window) & ~(first & (jnp.arange(2 * window) < window))
    else:
        distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        visible = ((distance >= 0) & (distance < (window or tokens)))[None]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, head_dim) * head_dim**-0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k)
    scores = jnp.where(visible[:, None, None], scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, tokens, heads, head_dim)


def _with_previous_block(x: jax.Array, blocks: int) -> jax.Array:
    """`[B, blocks * w, K, H]` -> `[B * blocks, 2 * w, K, H]`; before the first come zeros, which the caller masks."""
    batch, tokens, heads, head_dim = x.shape
    current = x.reshape(batch, blocks, tokens // blocks, heads, head_dim)
    previous = jnp.pad(current[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([previous, current], 2).reshape(batch * blocks, -1, heads, head_dim)


# -------------------------------------------------------------------------------------------------------- training


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


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


# ---------------------------------------------------------------------------------------------------------- export


def hf_config(shape: Shape, vocab_size: int) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in shape.windows]
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": len(shape.windows),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "sliding_window": next(window for window in shape.windows if window is not None),
        "layer_types": kinds,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(shape: Shape) -> dict[str, Any]:
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(END_OF_TEXT_ID): special | {"special": True}},
    }


def export(out: Path, trainer: Trainer) -> float:
    """Write the Hugging Face directory, every file whole or not at all; returns the held-out loss in nats."""
    out.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    weights = {name: np.asarray(array.astype(jnp.bfloat16)) for name, array in trainer.run.params.items()}
    shape, tokenizer = trainer.model.shape, trainer.tokenizer
    write(out / "config.json", lambda path: write_json(path, hf_config(shape, tokenizer.get_vocab_size())))
    write(out / "generation_config.json", lambda path: write_json(path, special))
    write(out / "tokenizer_config.json", lambda path: write_json(path, tokenizer_config(shape)))
    write(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write(out / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write(out / "learning_curve.png", lambda path: draw_curve(path, trainer.history.read()))
    nats = trainer.held_out_nats(None)
    write(out / "README.md", lambda path: path.write_text(model_card(trainer, nats), "utf-8"))
    return nats


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer(temporary)
    temporary.chmod(0o644)  # safetensors makes files private
    os.replace(temporary, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def draw_curve(path: Path, rows: list[dict[str, float]]) -> None:
    """Training loss and held-out perplexity against tokens seen."""
    figure = Figure(figsize=(7, 4), dpi=120)
    axis = figure.subplots()
    tokens = [row["tokens"] / 1e6 for row in rows]
    axis.plot(tokens, [row["loss"] for row in rows], color="tab:blue", linewidth=1, label="training loss")
    axis.set(xlabel="tokens seen (millions)", ylabel="training loss (nats per token)")
    right = axis.twinx()
    right.plot(tokens, [row["ppl"] for row in rows], color="tab:orange", label="held-out perplexity")
    right.set(yscale="log", ylabel="held-out perplexity per token")
    figure.legend(loc="upper right", bbox_to_anchor=(0.85, 0.9))
    figure.tight_layout()
    figure.savefig(path)


def complete(trainer: Trainer, prompt: str) -> str:
    """A continuation, recomputing the whole text for each token: slow, but it needs no cache."""
    tokens = [END_OF_TEXT_ID, *trainer.tokenizer.encode(prompt, add_special_tokens=False).ids]
    first = len(tokens)
    while len(tokens) < first + NUM_SAMPLE_TOKENS:
        token = trainer.next_token(tokens)
        if token == END_OF_TEXT_ID:
            break
        tokens.append(token)
    return trainer.tokenizer.decode(tokens[first:])


def model_card(trainer: Trainer, nats: float) -> str:
    run, facts, shape = trainer.run, trainer.corpus.facts, trainer.model.shape
    bits_per_byte = nats / math.log(2) * facts["held_out_tokens"] / facts["held_out_bytes"]
    samples = (f"```python\n{prompt}{complete(trainer, prompt)}\n```" for prompt in SAMPLE_PROMPTS)
    phases = (f"{context} from {100 * start:.0f} %" if start else f"{context} at first" for start, context in PHASES)
    text = CARD.format(
        name="draft model" if shape == SHAPES["draft"] else "tiny_python",
        parameters=f"{sum(array.size for array in run.params.values()) / 1e6:.1f}",
        layers=len(shape.windows),
        kinds=", ".join("full" if window is None else f"window {window}" for window in shape.windows),
        vocab=f"{trainer.tokenizer.get_vocab_size():,}",
        samples="\n\n".join(samples),
        ppl=f"{math.exp(nats):.1f}",
        nats=f"{nats:.3f}",
        bits=f"{bits_per_byte:.3f}",
        seen=f"{run.num_tokens / 1e6:.2f}",
        passes=f"{run.num_tokens / facts['train_tokens']:.1f}",
        steps=f"{run.step:,}",
        batch_tokens=f"{trainer.batch_tokens:,}",
        minutes=f"{run.elapsed_s / 60:.0f}",
        ended=""
        if trainer.ended_at >= 1.0
        else f" The run was ended early, at {100 * trainer.ended_at:.0f} % of its schedule.",
        temperature=SAMPLE_TEMPERATURE,
        prompts=", ".join(f"`{json.dumps(prompt)}`" for prompt in SAMPLE_PROMPTS),
        adam_lr=ADAM_LR,
        decay=WEIGHT_DECAY,
        clip=CLIP_NORM,
        context=EVAL_CONTEXT,
        phases=", ".join(phases),
        **{key: f"{value:,}" if isinstance(value, int) else value for key, value in facts.items()},
        **asdict(shape),
    )
    return wrapped(text)


def wrapped(markdown: str) -> str:
    """Prose paragraphs filled to 120 columns; front matter, code, tables and headings as they are."""
    head, *blocks = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    front, prose = head[: head.index("\n#")], head[head.index("\n#") :]
    parts = [prose, *blocks]
    filled = [part if part.startswith("```") else "\n\n".join(map(fill, part.split("\n\n"))) for part in parts]
    return front + "".join(filled)


def fill(paragraph: str) -> str:
    if not paragraph.strip() or paragraph.lstrip().startswith(("#", "|", "!", "-")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


CARD = """---
license: apache-2.0
language: code
library_name: jaxinfer
tags: [python, demo]
---

# {name}

A {parameters} M parameter decoder that continues Python code in the manner of the standard library. It belongs to
jaxinfer, whose demos and tests need a real model to run; `scripts/train_tiny.py` made it, and this page.

## Model

Llama block (RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases), tied embeddings: hidden {hidden},
{layers} layers, {heads} query and {kv_heads} key/value heads of size {head_dim}, feed-forward {ffn}, positions up to
{max_position}. Attention by layer: {kinds}. A window of 128 means that a token sees the last 128, itself included. In
Hugging Face terms `MinistralForCausalLM`; weights are bfloat16.

Byte-level BPE of {vocab} tokens without a Unicode normaliser: any text round-trips exactly. `<|endoftext|>` (id 0)
stands before each training file and is bos, eos and pad; none is added automatically.

## Training

Data: the `*.py` files of CPython {python}'s standard library, without tests, idle tests, `encodings` tables,
`pydoc_data`, `turtledemo`, most of `lib2to3` and installed packages: {train_files} files, {train_bytes} bytes,
{train_tokens} tokens. Held out, by a hash of the path: {held_out_files} files, {held_out_bytes} bytes,
{held_out_tokens} tokens. The tokenizer saw the training files only.

{seen} M tokens ({passes} passes), {steps} steps of {batch_tokens} tokens, {minutes} minutes on a shared CPU. Muon for
the projections (peak learning rate {muon_lr}, weight decay {decay}), Adam for embedding and norms ({adam_lr}), gradient
clip {clip}, short warmup, then cosine on elapsed time. Context length by progress: {phases}. bfloat16 arithmetic,
float32 parameters.{ended}

Held-out, whole set, context {context}, weights as shipped:

| perplexity per token | nats per token | bits per byte |
|---|---|---|
| {ppl} | {nats} | {bits} |

![Learning curve](learning_curve.png)

## Samples

At temperature {temperature}, after `<|endoftext|>`. The prompts are {prompts}.

{samples}

## Use and limits

For demonstrations, tests and as a speculative-decoding playground. It knows the look of Python, not its meaning: code
it writes seldom runs, names are invented, and English or other languages are out of its reach. It has seen few tokens
for its size and may repeat its training text, which is the standard library's. Not for production use.

## Licence

Weights: Apache-2.0. Trained on the Python standard library, which is under the PSF Licence Agreement.
"""


# ------------------------------------------------------------------------------------------------------------- loop


class History:
    """One JSON object per line: step, tokens, elapsed_s, loss, ppl."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def append(self, row: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop what a killed process wrote after its last checkpoint; those steps will run again."""
        rows = [row for row in self.read() if row["step"] <= step]
        write(self.path, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))


class Timer:
    """Due once after `first_s`, then every `every_s`; the clock starts again when the work is done."""

    def __init__(self, first_s: float, every_s: float):
        self.every_s, self.due_at = every_s, time.monotonic() + first_s

    def due(self) -> bool:
        return time.monotonic() >= self.due_at

    def done(self) -> None:
        self.due_at = time.monotonic() + self.every_s


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
        self.ended_at = 1.0  # share of the schedule
        self._sample = jax.jit(
            lambda params, tokens, last: jax.random.categorical(
                jax.random.fold_in(jax.random.key(args.seed), last),
                self.model(params, tokens)[0, last] / SAMPLE_TEMPERATURE,
            )
        )
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.checkpoints = ocp.CheckpointManager((work_dir / "checkpoints").resolve(), options=options)

    def _update_eagerly(
        self, params: Params, opt_state: Any, window: jax.Array, scale: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: self.model.losses(p, window).mean())(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return {name: array + scale * updates[name] for name, array in params.items()}, opt_state, loss

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
    trainer.ended_at = min(1.0, progress_of(trainer.run, args))
    if trainer.run.step == 0:
        console.print("stopped before the first step; nothing exported")
        return
    trainer.save()
    nats = export(out, trainer)
    trainer.checkpoints.close()
    seen = f"step {trainer.run.step}, {trainer.run.num_tokens / 1e6:.2f} M tokens"
    console.print(f"exported to {args.out}: {seen}, held-out perplexity {math.exp(nats):.1f}", soft_wrap=True)


def loop(trainer: Trainer, args: argparse.Namespace, signals: list[int], console: Console) -> None:
    """Steps until time or `--max-steps` is up, or a signal came; saves, evaluates and exports on the way."""
    run, recent = trainer.run, []
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


def check_same_run(work_dir: Path, args: argparse.Namespace) -> None:
    """A work directory belongs to one setting; continuing it with another would mix two models."""
    wanted = {name: getattr(args, name) for name in ("size", "vocab_size", "max_files", "seed", "batch_tokens")}
    path = work_dir / "run.json"
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{args.work_dir} holds a run with {flag} {found.get(name)}, not {value}; "
                "choose another --work-dir or remove this one"
            )


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


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        train(args)
    except UsageError as error:
        print(f"train_tiny.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
