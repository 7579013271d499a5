"""Reads a Hugging Face config.json strictly: every field is read, known not to matter, or refused.

Hides where the field names moved between transformers 4 and 5 (rope above all). A field that is silently skipped
is a model that silently computes something else, so an unknown one is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.request import MAX_STOP_TOKEN_IDS

# Fields that cannot change what a decoder computes at inference.
IRRELEVANT = frozenset(
    {
        # what the file is, and who wrote it
        "_name_or_path",
        "architectures",
        "model_type",
        "transformers_version",
        "transformers.js_config",
        "is_llama_config",
        "model_name",
        "unsloth_fixed",
        "unsloth_version",
        "tokenizer_class",
        "quantization_config",  # read by quantization_config.py
        "torch_dtype",  # the loader reads each tensor's own dtype, the caller chooses the target
        "dtype",
        # training
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "embedding_dropout",
        "residual_dropout",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_kernels",
        "classifier_dropout",
        "gradient_checkpointing",
        # how transformers itself runs, returns or labels things
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "cache_implementation",
        "auto_map",  # code beside the file, which nothing here runs
        "problem_type",
        "return_dict",
        "torchscript",
        "use_cache",
        "use_return_dict",
        # padding is never computed here; the context length is max_position_embeddings
        "pad_token_id",
        "max_sequence_length",
    }
)

# What is computed with before a ModelConfig can check it: lists as long as the model is deep, the root of its width.
_RANGES = {"num_hidden_layers": range(1, 10_001), "hidden_size": range(1, 2**31)}
LAYER_TYPES = ("full_attention", "sliding_attention")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook`); ValueError where a key comes twice, of which json keeps the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name!r}")
        found[name] = value
    return found


class Fields:
    """The fields of one JSON object, config.json's own or one inside it, whose name then is the `prefix` of theirs.

    Remembers what was read so that `finish` can refuse the rest.
    """

    def __init__(self, hf: Mapping[str, Any], prefix: str = ""):
        self._hf = hf
        self.prefix = prefix
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value, or None when it is absent or null."""
        self._read.add(name)
        return self._hf.get(name)

    def has(self, name: str) -> bool:
        return name in self._hf

    def integer(self, name: str, default: int | None = None) -> int:
        value = _integer(self.prefix + name, self._required(name, default))
        if name in _RANGES and value not in _RANGES[name]:
            allowed = _RANGES[name]
            raise ConfigError(f"{self.prefix}{name}={value} must be from {allowed[0]} to {allowed[-1]}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return _number(self.prefix + name, self._required(name, default))

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.prefix}{name}={value!r} must be true or false")
        return value

    def fixed(self, expected: Mapping[str, Any]) -> None:
        """Refuse a field that is present with another value than the expected one; one that was read stays as read."""
        for name, only in expected.items():
            if name in self._read:
                continue
            value = self.get(name)
            if value is not None and value != only:
                choice = "its absence" if only is None else f"{self.prefix}{name}={only!r}"
                raise ConfigError(f"{self.prefix}{name}={value!r} is not supported; supported: {choice}")

    def skip(self, *names: str) -> None:
        """Fields that this architecture's files have and that change nothing, whatever they say."""
        self._read.update(names)

    def token_ids(self, name: str, vocab_size: int, before: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The ids `before` and then the field's, each once: one id or a list; absent or null is none."""
        value = self.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ConfigError(
                    f"{self.prefix}{name}={_short(value)} must be token ids in [0, vocab_size={vocab_size})"
                )
        found = tuple(dict.fromkeys([*before, *ids]))
        if len(found) > MAX_STOP_TOKEN_IDS:
            raise ConfigError(f"{name} makes {len(found)} ids; a request has room for {MAX_STOP_TOKEN_IDS} stop ids")
        return found

    def choice(self, name: str, choices: Mapping[Any, Any], default: Any = None) -> Any:
        """What `choices` has for the field's value; `default` is a value too, for a field that is absent or null."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, list | dict) or value not in choices:
            raise ConfigError(f"{self.prefix}{name}={_short(value)} is not supported; supported: {_listed(choices)}")
        return choices[value]

    def listed(self, name: str, length: int, kind: type | tuple[type, ...]) -> list[Any] | None:
        """A list with an entry of `kind` for each of `length` layers; None when absent or null."""
        value = self.get(name)
        if value is None:
            return None
        fits = isinstance(value, list) and len(value) == length
        if not fits or not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value):
            raise ConfigError(f"{self.prefix}{name}={_short(value)} must list one entry for each of {length} layers")
        return value

    def layer_types(self, default: Callable[[int], str], choices: tuple[str, ...] = LAYER_TYPES) -> list[str]:
        """`layer_types`, one per layer; where it is absent, `default(index)` says them."""
        depth = self.integer("num_hidden_layers")
        types = self.get("layer_types")
        if types is None:
            return [default(index) for index in range(depth)]
        if not isinstance(types, list) or len(types) != depth:
            raise ConfigError(f"layer_types={_short(types)} must list num_hidden_layers={depth} layers")
        for kind in types:
            if kind not in choices:
                raise ConfigError(f"layer_types has {kind!r}; supported: {', '.join(choices)}")
        return types

    def table(self, name: str) -> Fields | None:
        """The fields of an object inside this one; None when it is absent or null. Its owner calls `finish` on it."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self.prefix}{name}={_short(value)} must be an object")
        return Fields(value, prefix=f"{self.prefix}{name}.")

    def finish(self) -> None:
        """Refuse every field that nothing read and that is not known to be irrelevant."""
        unread = sorted(set(self._hf) - self._read - IRRELEVANT)
        if unread:
            fields = ", ".join(f"{self.prefix}{name}={_short(self._hf[name])}" for name in unread)
            raise ConfigError(
                f"unknown field {fields}: it may change what the model computes, so it is refused; "
                f"supported: {', '.join(self.prefix + name for name in sorted(self._read))}"
            )

    def _required(self, name: str, default: float | None) -> Any:
        value = self.get(name)
        if value is None and default is None:
            raise ConfigError(f"{self.prefix}{name} is missing")
        return default if value is None else value


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise ConfigError(f"{name}={_short(value)} must be a whole number below 2**63")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name}={_short(value)} must be a number")
    try:
        number = float(value)
    except OverflowError:  # an int that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name}={_short(value)} must be finite")
    return number


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
