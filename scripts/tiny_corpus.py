"""What the tiny model learns from: the source of Python's own standard library, as tokens."""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_run_files import UsageError, write
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray  # u16[tokens]
    held_out: np.ndarray  # u16[tokens]
    facts: dict[str, Any]  # files and bytes of either part, for the model card


def prepare_corpus(work_dir: Path, vocab_size: int, max_files: int | None) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and token streams, made once and kept in the work directory."""
    tokenizer_path, tokens_path = work_dir / "tokenizer.json", work_dir / "tokens.npz"
    if tokens_path.exists():
        with np.load(tokens_path) as saved:
            corpus = Corpus(saved["train"], saved["held_out"], json.loads(str(saved["facts"])))
        return Tokenizer.from_file(str(tokenizer_path)), corpus
    texts = read_library(Path(sysconfig.get_paths()["stdlib"]), max_files)
    tokenizer = train_tokenizer(texts["train"], vocab_size)
    streams = {part: encode(tokenizer, texts[part]) for part in texts}
    facts: dict[str, Any] = {"python": platform.python_version()}
    for part in texts:
        facts[f"{part}_files"] = len(texts[part])
        facts[f"{part}_bytes"] = sum(len(text.encode()) for text in texts[part])
        facts[f"{part}_tokens"] = len(streams[part])
    corpus = Corpus(streams["train"], streams["held_out"], facts)
    saved_facts = np.array(json.dumps(facts))
    write(tokenizer_path, lambda path: tokenizer.save(str(path)))
    write(tokens_path, lambda path: np.savez(path, train=corpus.train, held_out=corpus.held_out, facts=saved_facts))
    return tokenizer, corpus


def read_library(root: Path, max_files: int | None) -> dict[str, list[str]]:
    """The texts of either part, "train" and "held_out"."""
    files = library_files(root)[:max_files]
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for relative in files:
        part = "held_out" if is_held_out(relative) else "train"
        texts[part].append((root / relative).read_text("utf-8", errors="ignore"))
    if not texts["train"] or not texts["held_out"]:
        raise UsageError(f"{len(files)} files leave nothing to train on or nothing held out; raise --max-files")
    return texts


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
    if tokenizer.get_vocab_size() != vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size}: the corpus supports only {tokenizer.get_vocab_size()} tokens; lower it"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one stream, each after an end-of-text token."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream.append(END_OF_TEXT_ID)
        stream.extend(encoding.ids)
    return np.asarray(stream, np.uint16)


def crops(stream: np.ndarray, seed: int, step: int, num_tokens: int, context: int) -> np.ndarray:
    """`i32[sequences, context + 1]`: random crops that depend on seed and step alone, so a resumed run repeats none."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(stream) - context - 1, size=max(1, num_tokens // context))
    return stream[starts[:, None] + np.arange(context + 1)].astype(np.int32)
