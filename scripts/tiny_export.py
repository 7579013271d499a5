"""Exports the tiny model as a Hugging Face directory, with a model card, samples and a learning curve."""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import save_file
from tiny_corpus import END_OF_TEXT, END_OF_TEXT_ID
from tiny_model import SHAPES, Shape, hf_config
from tiny_run_files import write, write_json
from tiny_trainer import ADAM_LR, CLIP_NORM, EVAL_CONTEXT, PHASES, SAMPLE_TEMPERATURE, WEIGHT_DECAY, Trainer

SAMPLE_PROMPTS = ("def read_json(path):", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n\ndef main(")
NUM_SAMPLE_TOKENS = 64


def export(out: Path, trainer: Trainer, ended_at: float = 1.0) -> float:
    """Write the Hugging Face directory, every file whole or not at all; returns the held-out loss in nats.

    `ended_at` is the share of the schedule at which the run ended, for the card.
    """
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
    write(out / "README.md", lambda path: path.write_text(model_card(trainer, nats, ended_at), "utf-8"))
    return nats


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


def model_card(trainer: Trainer, nats: float, ended_at: float) -> str:
    run, facts, shape = trainer.run, trainer.corpus.facts, trainer.model.shape
    bits_per_byte = nats / math.log(2) * facts["held_out_tokens"] / facts["held_out_bytes"]
    samples = (f"```python\n{prompt}{complete(trainer, prompt)}\n```" for prompt in SAMPLE_PROMPTS)
    phases = (f"{context} from {100 * start:.0f} %" if start else f"{context} at first" for start, context in PHASES)
    early = f" The run was ended early, at {100 * ended_at:.0f} % of its schedule." if ended_at < 1.0 else ""
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
        ended=early,
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
