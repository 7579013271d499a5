#!/usr/bin/env python3
r"""Make tests/goldens/: tiny random Hugging Face models with the logits and greedy tokens transformers computes.

Runs in an environment of its own, since torch never enters the project's:

    python3.11 -m venv ../goldens-env
    ../goldens-env/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy  # torch's CPU build will do
    ../goldens-env/bin/python scripts/make_goldens.py

For each model, seeds are tried until the narrowest gap between best and second-best logit along the greedy
continuation is the widest, so that another machine's rounding cannot change a token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

try:
    import torch
    from safetensors.torch import save_file
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MinistralConfig,
        MinistralForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedModel,
    )
except ModuleNotFoundError as error:
    print(f"{error}; this script needs its own environment:\n{__doc__}", file=sys.stderr)
    sys.exit(2)

OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens"
PROMPT_TOKENS = 80  # past every window and past the Llama model's original context
GREEDY_TOKENS = 48
VOCAB_SIZE = 192
EOS_TOKEN_ID = 2
MIN_DISTINCT = 16  # a continuation that repeats itself would test little
MAX_BYTES = 400_000

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "attn_implementation": "eager",
}


def llama() -> PreTrainedModel:
    """Tied embeddings, grouped heads, llama3 rope whose ramp lies among the frequencies of 16 dimensions."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3, tie_word_embeddings=True, rope_parameters=rope))


def mistral() -> PreTrainedModel:
    """Every layer slides, over 16 tokens: what layer 2 sees reaches twice as far."""
    return MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=2, sliding_window=16))


def ministral() -> PreTrainedModel:
    """Sliding and full layers mixed; one key-value head."""
    shape = SHAPE | {"hidden_size": 32, "num_key_value_heads": 1}
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return MinistralForCausalLM(MinistralConfig(**shape, num_hidden_layers=4, sliding_window=24, layer_types=types))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "mistral": mistral, "ministral": ministral}


@dataclass(frozen=True)
class Golden:
    """One seed's model and what it computes."""

    seed: int
    model: PreTrainedModel
    prompt: torch.Tensor  # i64[prompt tokens]
    logits: torch.Tensor  # f32[prompt tokens, vocab]
    greedy: torch.Tensor  # i64[greedy tokens]
    margin: float  # narrowest gap between the best and the second-best logit along the continuation
    spread: float  # largest |logit|


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=64, help="seeds to choose from")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, build in MODELS.items():
        candidates = (compute(build, seed) for seed in range(args.seeds))
        best = max(filter(usable, candidates), key=lambda golden: golden.margin)
        save(best, args.out / name)
        num_bytes = sum(path.stat().st_size for path in (args.out / name).iterdir())
        distinct = len(set(best.greedy.tolist()))
        print(
            f"{name}: seed {best.seed}, narrowest margin {best.margin:.4f} of max |logit| {best.spread:.2f}, "
            f"{distinct} distinct of {GREEDY_TOKENS} greedy tokens, {num_bytes} bytes"
        )
        if num_bytes > MAX_BYTES:
            print(f"{name}: {num_bytes} bytes are over the limit of {MAX_BYTES}", file=sys.stderr)
            return 1
    return 0


@torch.no_grad()
def compute(build: Callable[[], PreTrainedModel], seed: int) -> Golden:
    torch.manual_seed(seed)
    model = build().float().eval()
    randomize(model)
    prompt = torch.randint(3, VOCAB_SIZE, (1, PROMPT_TOKENS))
    logits = model(prompt).logits[0]
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=GREEDY_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert tokens.shape[1] == PROMPT_TOKENS + GREEDY_TOKENS
    top = model(tokens).logits[0, PROMPT_TOKENS - 1 : -1].topk(2).values
    greedy = tokens[0, PROMPT_TOKENS:]
    margin = float((top[:, 0] - top[:, 1]).min())
    return Golden(seed, model, prompt[0], logits, greedy, margin, float(logits.abs().max()))


def randomize(model: PreTrainedModel) -> None:
    """Weights large enough that every layer, head and norm scale changes the logits: 0.02 would leave them flat."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)


def usable(golden: Golden) -> bool:
    tokens = golden.greedy.tolist()
    return len(set(tokens)) >= MIN_DISTINCT and EOS_TOKEN_ID not in tokens


def save(golden: Golden, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    golden.model.save_pretrained(out)
    tensors = {
        "prompt": golden.prompt.to(torch.int32),
        "logits": golden.logits.contiguous(),
        "greedy": golden.greedy.to(torch.int32).contiguous(),
    }
    save_file(tensors, out / "golden.safetensors", metadata={"seed": str(golden.seed), "torch": torch.__version__})


if __name__ == "__main__":
    sys.exit(main())
