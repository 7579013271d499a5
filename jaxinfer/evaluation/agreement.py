"""Logits of ours against logits that another stack wrote to a file, for the same tokens.

The file is safetensors: `tokens` int[n] and `logits` float[n, vocab], or several prompts as `tokens.0`, `logits.0`, and
so on. Hides its dtypes and that the other stack may have cut a padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.evaluation.divergence import divergence

# max|ours - theirs| / max|theirs| that still counts as the same model, by the engine's dtype
TOLERANCES = {"float32": 2e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Dump:
    """One prompt of a file: its name ("" where there is only one), token ids, and f[tokens, vocab] logits."""

    name: str
    token_ids: tuple[int, ...]
    logits: np.ndarray


def read_dumps(path: str | Path, model: ModelConfig, *, longest: int) -> Iterator[Dump]:
    """The file's prompts in order, one in memory at a time. ConfigError names what is wrong with which tensor."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            suffixes = _suffixes(names, path)
            for suffix in suffixes:
                tokens, logits = (_tensor(file, f"{kind}{suffix}", path) for kind in ("tokens", "logits"))
                yield _checked(suffix, tokens, logits, model, longest)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _suffixes(names: set[str], path: str | Path) -> list[str]:
    """ "" or ".0", ".1", ...; ConfigError unless every prompt has both tensors and nothing else is there."""
    if names == {"tokens", "logits"}:
        return [""]
    count = len(names) // 2
    suffixes = [f".{i}" for i in range(count)]
    if not names or names != {f"{kind}{suffix}" for kind in ("tokens", "logits") for suffix in suffixes}:
        raise ConfigError(
            f"{str(path)!r} holds {', '.join(sorted(names)) or 'no tensor'}; it must hold `tokens` and `logits`, or "
            "`tokens.0`, `logits.0`, `tokens.1` and so on"
        )
    return suffixes


def _tensor(file: Any, name: str, path: str | Path) -> np.ndarray:
    if file.get_slice(name).get_dtype() == "BF16":  # which numpy does not know by itself
        return file.get_tensor(name).view(ml_dtypes.bfloat16)
    return file.get_tensor(name)


def _checked(suffix: str, tokens: np.ndarray, logits: np.ndarray, model: ModelConfig, longest: int) -> Dump:
    names = f"tokens{suffix}", f"logits{suffix}"
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise ConfigError(
            f"{names[0]} is {tokens.dtype}{list(tokens.shape)}; it must be whole numbers [n], n at least 1"
        )
    if (
        logits.ndim != 2
        or len(logits) != len(tokens)
        or logits.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16)
    ):
        raise ConfigError(
            f"{names[1]} is {logits.dtype}{list(logits.shape)}; it must be float32, float16 or bfloat16 "
            f"[{len(tokens)}, vocab], a row for each of {names[0]}"
        )
    if len(tokens) > longest:
        raise ConfigError(f"{names[0]} has {len(tokens)} tokens; at most {longest} fit max_model_len")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ConfigError(
            f"{names[0]} holds {tokens.min()} to {tokens.max()}; the model's ids are 0 to {model.vocab_size - 1}"
        )
    if logits.shape[1] > model.vocab_size:
        raise ConfigError(
            f"{names[1]} has {logits.shape[1]} columns, over the model's vocabulary of {model.vocab_size}: "
            "it is of another model"
        )
    wide = logits.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ConfigError(
            f"{names[1]} holds a value that is not finite in row {int(np.argwhere(~np.isfinite(wide))[0, 0])}"
        )
    if not wide.any():
        raise ConfigError(f"{names[1]} is zero everywhere, so no error can be put in relation to it")
    return Dump(suffix.removeprefix("."), tuple(tokens.tolist()), wide)


def agreement(dump: Dump, logits: Callable[[tuple[int, ...]], np.ndarray]) -> dict[str, Any]:
    """How our logits of the dump's tokens compare with the dump's (JSON).

    Where theirs has fewer columns, ours are cut to those: padding of the vocabulary that the other stack left out.
    """
    ours = logits(dump.token_ids)
    num_columns = dump.logits.shape[1]
    difference = np.abs(ours[:, :num_columns].astype(np.float64) - dump.logits)
    row, column = (int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
    rows = divergence(dump.logits, ours[:, :num_columns], [0] * len(ours))
    scale = float(np.abs(dump.logits).max())
    return {
        "name": dump.name,
        "num_tokens": len(dump.token_ids),
        "num_columns": num_columns,
        "num_columns_ignored": ours.shape[1] - num_columns,
        "relative_error": float(difference[row, column]) / scale,
        "max_abs_error": float(difference[row, column]),
        "max_abs_theirs": scale,
        "worst": {
            "position": row,
            "token_id": column,
            "ours": float(ours[row, column]),
            "theirs": float(dump.logits[row, column]),
        },
        "kl": {"mean": float(rows.kl.mean()), "max": float(rows.kl.max())},
        "top1_agreement": float(rows.agrees.mean()),
    }
