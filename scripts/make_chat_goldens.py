#!/usr/bin/env python3
r"""Make tests/goldens_chat/: small tokenizers with chat templates, and the prompts and ids transformers makes of them.

Runs in the environment of scripts/make_goldens.py, which says how to make it:

    ../goldens-env/bin/python scripts/make_chat_goldens.py

A family is a format that models use: its markers, the kind of its tokenizer, how its files say what is special. The
templates (scripts/chat_templates) are written for this project in those formats; the vocabularies are trained here on
this repository's pages. Conversations that a template refuses are goldens, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    from jinja2.exceptions import TemplateError
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils
except ModuleNotFoundError as error:
    print(f"{error}; this script needs its own environment:\n{__doc__}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "goldens_chat"
TEMPLATES = ROOT / "scripts" / "chat_templates"
CASES = ROOT / "scripts" / "chat_templates" / "conversations.json"
NOW = datetime.datetime(2026, 3, 14, 15, 9, 26)
VOCAB_SIZE = 640
MAX_FAMILY_BYTES = 80_000
MAX_BYTES = 700_000
UNICODE = ["Größe, naïve, Ελλάδα, 東京 and 👍🏽", "def f(x):\n    return x + 1\n"]


class FixedClock(datetime.datetime):
    """datetime.datetime whose now() stands still, for strftime_now."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> FixedClock:
        return cls.fromisoformat(NOW.isoformat())


# ---- tokenizers ----


def corpus() -> Iterator[str]:
    for name in ("README.md", "docs/grpc.md", "docs/cli.md", "docs/sampling.md"):
        yield from (ROOT / name).read_text(encoding="utf-8").splitlines(keepends=True)
    yield from UNICODE


def byte_level(special: list[str]) -> Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3, Qwen and DeepSeek have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def byte_fallback(special: list[str]) -> Tokenizer:
    """SentencePiece's BPE as Llama 2, Mistral and Phi-3 have it: spaces as ▁, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    first = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE + 200, special_tokens=first, limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special) + 1]  # bytes are plain entries of the vocabulary
    state["pre_tokenizer"]["split"] = False
    tokenizer = Tokenizer.from_str(json.dumps(state))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer


def old_llama(special: list[str]) -> Tokenizer:
    """Byte fallback as Llama 2's tokenizer.json has it: a normalizer puts ▁ in front, also after special tokens."""
    tokenizer = byte_fallback(special)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def gemma_like(special: list[str]) -> Tokenizer:
    """Byte fallback where a normalizer makes the ▁, and no space is put in front or stripped."""
    tokenizer = byte_fallback(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


# ---- families ----


@dataclass(frozen=True)
class Family:
    """How one format's directory is written."""

    build: Callable[[list[str]], Tokenizer]
    special: list[str]  # in tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json
    prefix: str | None = None  # the token that tokenizer.json's post-processor puts first
    added: list[AddedToken] = field(default_factory=list)  # in tokenizer.json, beside `special`
    in_config: bool = False  # templates in tokenizer_config.json, not in files
    special_tokens_map: dict[str, Any] | None = None
    model_type: str | None = None  # in config.json: transformers then chooses the tokenizer's class
    further: list[str] = field(default_factory=list)  # names of further templates


def properties(content: str, **switches: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **switches}


def named(bos: str | None, eos: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, **more}


HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = [AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>", "<tool_call>")]
INST = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
TURNS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"]
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"]
COMMAND = ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
FAMILIES = {
    # tokenizer.json puts BOS first although the config says not to: transformers lets tokenizer.json decide. Its class
    # LlamaTokenizer splits a text by `legacy`, not by tokenizer.json; and it has names for special tokens of its own
    "llama2": Family(
        old_llama,
        ["<s>", "</s>"],
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False},
        prefix="<s>",
        in_config=True,
        model_type="llama",
    ),
    "llama3": Family(byte_level, HEADERS, named(HEADERS[0], HEADERS[4]), prefix=HEADERS[0]),
    "chatml": Family(
        byte_level,
        CHATML,
        # the config makes <tool_call> special, which tokenizer.json does not, and knows a token more
        named(
            None,
            CHATML[2],
            pad_token=CHATML[0],
            additional_special_tokens=["<|vision_start|>"],
            added_tokens_decoder={"642": properties("<tool_call>"), "643": properties("<|box|>", special=False)},
        ),
        added=THINK,
    ),
    # for this model_type transformers takes tokenizer.json as it is, whatever class the config names
    "mistral": Family(
        old_llama,
        INST,
        named("<s>", "</s>", legacy=False) | {"tokenizer_class": "LlamaTokenizer"},
        prefix="<s>",
        model_type="mistral",
    ),
    "gemma": Family(gemma_like, TURNS, named("<bos>", "<eos>", clean_up_tokenization_spaces=True), prefix="<bos>"),
    "phi3": Family(
        byte_fallback,
        ["<s>", "<|endoftext|>"],
        named(
            "<s>",
            "<|endoftext|>",
            added_tokens_decoder={
                str(840 + i): properties(token, rstrip=True)
                for i, token in enumerate(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))
            },
        ),
    ),
    # nothing puts BOS first although the config asks for it: tokenizer.json has no post-processor
    "deepseek": Family(
        byte_level,
        DEEPSEEK,
        named(DEEPSEEK[0], DEEPSEEK[1], add_bos_token=True, image_token="<｜image｜>"),
        in_config=True,
    ),
    # files of an older version: what is special stands in special_tokens_map.json
    "olmo": Family(
        byte_level,
        ["<|endoftext|>"],
        {"tokenizer_class": "GPTNeoXTokenizer"},
        added=[AddedToken("<|user|>", normalized=False, special=False), AddedToken("  ", normalized=True)],
        special_tokens_map={
            "bos_token": properties("<|endoftext|>") | {"special": None},
            "eos_token": "<|endoftext|>",
            "pad_token": "<|padding|>",
        },
    ),
    "harmony": Family(byte_level, HARMONY, named("<|startoftext|>", "<|return|>")),
    "command_r": Family(
        byte_level, COMMAND, named(COMMAND[0], COMMAND[2]), in_config=True, further=["tool_use", "rag"]
    ),
}


def write(name: str, family: Family, out: Path) -> None:
    """The family's directory but for golden.json."""
    out.mkdir(parents=True)
    tokenizer = family.build(family.special)
    if family.added:
        tokenizer.add_tokens(family.added)
    if family.prefix is not None:
        prefix_id = tokenizer.token_to_id(family.prefix)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.prefix} $A", special_tokens=[(family.prefix, prefix_id)]
        )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    sources = {"default": (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")}
    sources |= {
        further: (TEMPLATES / f"{name}.{further}.jinja").read_text(encoding="utf-8") for further in family.further
    }
    config = dict(family.config)
    if not family.in_config:
        (out / "chat_template.jinja").write_text(sources["default"], encoding="utf-8")
    elif family.further:
        config["chat_template"] = [{"name": key, "template": source} for key, source in sources.items()]
    else:
        config["chat_template"] = sources["default"]
    write_json(out / "tokenizer_config.json", config)
    if family.model_type is not None:
        write_json(out / "config.json", {"model_type": family.model_type})
    if family.special_tokens_map is not None:
        entries = family.special_tokens_map.items()
        cleaned = {k: {f: x for f, x in v.items() if x is not None} if isinstance(v, dict) else v for k, v in entries}
        write_json(out / "special_tokens_map.json", cleaned)


# ---- goldens ----


def golden(name: str, directory: Path) -> dict[str, Any]:
    """What transformers makes of every conversation and text; `name` chooses those of the family."""
    kind = AutoTokenizer if (directory / "config.json").is_file() else PreTrainedTokenizerFast
    tokenizer = kind.from_pretrained(directory)
    cases = json.loads(CASES.read_text(encoding="utf-8"))
    conversations = {**cases["conversations"], **cases["of_family"].get(name, {})}
    markers = sorted(str(token) for token in tokenizer.added_tokens_decoder.values())
    texts = [
        *cases["texts"],
        "".join(markers[:6]),
        f"a {markers[0]} b {markers[-1]}  \n c",
        f"{markers[1]}{markers[1]}x",
    ]
    return {
        "now": NOW.isoformat(),
        "special_tokens": tokenizer.special_tokens_map,
        "conversations": {key: prompt(tokenizer, conversation) for key, conversation in conversations.items()},
        "texts": [text_golden(tokenizer, text) for text in texts],
    }


def prompt(tokenizer: PreTrainedTokenizerFast, conversation: dict[str, Any]) -> dict[str, Any]:
    continued = conversation.get("continue_final_message", False)
    options = {
        "tools": conversation.get("tools"),
        "add_generation_prompt": conversation.get("add_generation_prompt", not continued),
        "continue_final_message": continued,
        "chat_template": conversation.get("template_name"),
        **conversation.get("variables", {}),
    }
    made: dict[str, Any] = {"conversation": conversation}
    try:
        text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, **options)
    except Exception as error:
        on_purpose = type(error) is TemplateError
        return {**made, "error": str(error) if on_purpose else type(error).__name__, "on_purpose": on_purpose}
    ids = list(tokenizer.apply_chat_template(conversation["messages"], tokenize=True, return_dict=False, **options))
    return {**made, "text": text, "ids": ids, **decoded(tokenizer, ids)}


def text_golden(tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
    ids = tokenizer.encode(text)
    return {
        "text": text,
        "ids": ids,
        "ids_without_special": tokenizer.encode(text, add_special_tokens=False),
        **decoded(tokenizer, ids),
    }


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> dict[str, str]:
    return {
        "decoded": tokenizer.decode(ids, skip_special_tokens=False),
        "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    chat_template_utils.datetime = FixedClock
    shutil.rmtree(args.out, ignore_errors=True)
    total = 0
    for name, family in FAMILIES.items():
        directory = args.out / name
        write(name, family, directory)
        made = golden(name, directory)
        text = (
            json.dumps(made, ensure_ascii=False, separators=(",", ":")).replace('},"', '},\n"').replace("},{", "},\n{")
        )
        (directory / "golden.json").write_text(text + "\n", encoding="utf-8")
        num_bytes = sum(path.stat().st_size for path in directory.iterdir())
        total += num_bytes
        refused = sum("error" in case for case in made["conversations"].values())
        print(f"{name}: {len(made['conversations'])} conversations, {refused} refused, {num_bytes} bytes")
        if num_bytes > MAX_FAMILY_BYTES or total > MAX_BYTES:
            print(f"{name}: over the limit of {MAX_FAMILY_BYTES} bytes, or {MAX_BYTES} in all", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
