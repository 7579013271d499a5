"""What golden models are made of: the plain and the awkward shape, rope scalings, and what a directory is to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

VOCAB_SIZE = 96
EOS_TOKEN_ID = 2
CONTEXT = 256  # tokens; prompt and continuation fit
ORIGINAL = 32  # tokens of context before rope scaling; every prompt is longer
WINDOW = 16

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
AWKWARD = PLAIN | {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_key_value_heads": 1}
HEAD = {"head_dim": 16}  # neither 32 / 4 nor 40 / 4
QUIET = 0.15
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@dataclass(frozen=True)
class Spec:
    """One directory: how its model is built and what its config.json looks like."""

    build: Callable[[], nn.Module]
    features: str
    hub_form: bool = False  # config.json as older transformers wrote it, the form most models on the hub have
    mxfp4: bool = False  # experts as 4-bit blocks with a scale per 32 values
    wrapped: bool = False  # as the text model inside a multimodal one
    embedding_std: float = 0.5  # lower where tied embeddings would make a token predict itself
    query_gain: float = 1.0  # higher where scores would be so even that all tokens are seen alike
    cached_differs: str = ""  # why transformers' cached continuation need not be that of its uncached forward


def scaled(kind: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def per_type(full: dict[str, Any], sliding_theta: float = 100.0) -> dict[str, Any]:
    return {"rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": sliding_theta}}}


def layers(pattern: str) -> dict[str, Any]:
    """`"ssf"` is two sliding layers and a full one."""
    return {
        "layer_types": [SLIDING if letter == "s" else FULL for letter in pattern],
        "num_hidden_layers": len(pattern),
    }
