"""A tiny golden model with a tokenizer of one token per ASCII character, for tests that need text."""

from __future__ import annotations

import shutil
from pathlib import Path

import tokenizers
from tokenizers import models, processors

GOLDEN = Path(__file__).parent / "goldens" / "llama"


def ascii_tokenizer() -> tokenizers.Tokenizer:
    """Ids are character codes; BOS is id 1 and comes first."""
    vocabulary = {chr(code): code for code in range(2, 128)} | {"<unk>": 0, "<s>": 1}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def ascii_model(directory: Path) -> Path:
    """The golden Llama with that tokenizer, as a model directory."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, directory / name)
    ascii_tokenizer().save(str(directory / "tokenizer.json"))
    return directory
