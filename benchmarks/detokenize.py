"""Tokens per second of incremental detokenization: `python benchmarks/detokenize.py [--model DIR]`.

Two tokenizers by default: the shipped model's byte-level BPE, and one of SentencePiece's kind made here (Metaspace,
byte fallback). The ids are those of this project's own sources, repeated. For each number of tokens and each chunk
size it prints the best of --repeats runs, in CPU time of the thread, which other programs on the machine disturb less;
and how much slower a token is than in the shortest stream: about 1 is linear (10,000 tokens fit into nearer caches).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfer.config import shipped_model
from jaxinfer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = (10_000, 100_000, 400_000)
CHUNKS = (1, 8, None)  # None: all at once


def texts() -> Iterable[str]:
    """This project's sources and pages, and lines that only bytes can spell."""
    for path in sorted([*ROOT.glob("jaxinfer/*.py"), *ROOT.glob("docs/*.md")]):
        yield path.read_text(encoding="utf-8")
    yield "Größe, naïve, 東京 and 👍🏽 in one line; Ελληνικά, русский, हिन्दी, ไทย.\n" * 20


def byte_fallback(vocab_size: int = 4000) -> Tokenizer:
    """A tokenizer as SentencePiece's BPE models are converted: bytes for what the vocabulary lacks."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=bytes_first, limit_alphabet=90, show_progress=False
    )
    tokenizer.train_from_iterator([text for text in texts() if text.isascii()], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are plain entries of the vocabulary
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer)


def ids_of(tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    ids = [token_id for text in texts() for token_id in tokenizer.encode(text)]
    return (ids * (num_tokens // len(ids) + 1))[:num_tokens]


def seconds(tokenizer: Tokenizer, ids: list[int], chunk: int | None) -> float:
    """CPU time of one stream; its text is checked against decode() of all ids by the tests, not here."""
    step = chunk or len(ids)
    chunks = [ids[start : start + step] for start in range(0, len(ids), step)]
    decoder = tokenizer.incremental()
    start_s = time.thread_time()
    for piece in chunks:
        decoder.push(piece)
    decoder.flush()
    return time.thread_time() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory with a tokenizer.json, instead of the two")
    parser.add_argument("--repeats", type=int, default=5, help="runs per case; the best counts")
    args = parser.parse_args()
    if args.model is not None:
        loaded = Tokenizer.load(args.model)
        if loaded is None:
            parser.error(f"{args.model} has no tokenizer.json")
        cases = {str(args.model): loaded}
    else:
        shipped = Tokenizer.load(shipped_model())
        assert shipped is not None
        cases = {"byte-level BPE": shipped, "byte fallback": byte_fallback()}
    print(f"{'tokenizer':<16} {'per push':>9} {'tokens':>8} {'tokens/s':>12} {'per token, to the shortest':>27}")
    for name, tokenizer in cases.items():
        ids = ids_of(tokenizer, NUM_TOKENS[-1])
        tokenizer.incremental().push(ids[:1])  # makes the tables
        for chunk in CHUNKS:
            shortest = None
            for num_tokens in NUM_TOKENS:
                best = min(seconds(tokenizer, ids[:num_tokens], chunk) for _ in range(args.repeats))
                per_token = best / num_tokens
                shortest = shortest or per_token
                shown = "all" if chunk is None else chunk
                print(f"{name:<16} {shown:>9} {num_tokens:>8} {1 / per_token:>12,.0f} {per_token / shortest:>27.2f}")


if __name__ == "__main__":
    main()
