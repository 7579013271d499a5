"""Reads a Hugging Face config.json strictly: every field is read, known not to matter, or refused.

Hides where the field names moved between transformers 4 and 5 (rope above all). A field that is silently skipped
is a model that silently computes something else, so an unknown one is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError, LayerSpec, Llama3Scaling, ModelConfig, RopeSpec
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
        "tokenizer_class",
        "torch_dtype",  # the loader reads each tensor's own dtype, the caller chooses the target
        "dtype",
        # training
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
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

# Fields that may be present with one value only: the one this decoder implements.
FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


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
        self._prefix = prefix
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value, or None when it is absent or null."""
        self._read.add(name)
        return self._hf.get(name)

    def has(self, name: str) -> bool:
        return name in self._hf

    def integer(self, name: str, default: int | None = None) -> int:
        return _integer(self._prefix + name, self._required(name, default))

    def number(self, name: str, default: float | None = None) -> float:
        return _number(self._prefix + name, self._required(name, default))

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} must be true or false")
        return value

    def fixed(self, expected: Mapping[str, Any]) -> None:
        """Refuse a field that is present with another value than the expected one."""
        for name, only in expected.items():
            value = self.get(name)
            if value is not None and value != only:
                choice = "its absence" if only is None else f"{self._prefix}{name}={only!r}"
                raise ConfigError(f"{self._prefix}{name}={value!r} is not supported; supported: {choice}")

    def token_ids(self, name: str, vocab_size: int, before: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The ids `before` and then the field's, each once: one id or a list; absent or null is none."""
        value = self.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ConfigError(f"{name}={_short(value)} must be token ids in [0, vocab_size={vocab_size})")
        found = tuple(dict.fromkeys([*before, *ids]))
        if len(found) > MAX_STOP_TOKEN_IDS:
            raise ConfigError(f"{name} makes {len(found)} ids; a request has room for {MAX_STOP_TOKEN_IDS} stop ids")
        return found

    def rope(self) -> RopeSpec:
        """Rotary embedding: transformers 5's `rope_parameters`, or `rope_theta` beside `rope_scaling` before that."""
        tables = {name: self.get(name) for name in ("rope_parameters", "rope_scaling")}
        given = {name: table for name, table in tables.items() if table is not None}
        for name, table in given.items():
            if not isinstance(table, dict):
                raise ConfigError(f"{name}={table!r} must be an object")
        if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
            raise ConfigError(
                f"rope_parameters={given['rope_parameters']} and rope_scaling={given['rope_scaling']} differ"
            )
        name, table = next(iter(given.items()), ("rope_parameters", {}))
        inner = Fields(table, prefix=f"{name}.")
        outer_theta = self.number("rope_theta", 10000.0)
        theta = inner.number("rope_theta", outer_theta)
        if theta != outer_theta and self.get("rope_theta") is not None:
            raise ConfigError(f"rope_theta={outer_theta} and {name}.rope_theta={theta} differ")
        if theta <= 0:
            raise ConfigError(f"rope_theta={theta} must be positive")
        scaled = _is_llama3(inner, name)
        inner.fixed({"partial_rotary_factor": 1.0})
        scaling = _llama3(inner, name) if scaled else None
        inner.finish()
        return RopeSpec(theta, scaling)

    def finish(self) -> None:
        """Refuse every field that nothing read and that is not known to be irrelevant."""
        unread = sorted(set(self._hf) - self._read - IRRELEVANT)
        if unread:
            fields = ", ".join(f"{self._prefix}{name}={_short(self._hf[name])}" for name in unread)
            raise ConfigError(
                f"unknown field {fields}: it may change what the model computes, so it is refused; "
                f"supported: {', '.join(self._prefix + name for name in sorted(self._read))}"
            )

    def _required(self, name: str, default: float | None) -> Any:
        value = self.get(name)
        if value is None and default is None:
            raise ConfigError(f"{self._prefix}{name} is missing")
        return default if value is None else value


def decoder_config(
    architecture: str,
    fields: Fields,
    windows: tuple[int | None, ...],
) -> ModelConfig:
    """The fields that Llama and its relatives share; `windows` has one entry per layer. Ends with `finish`.

    A window that no sequence can outgrow is none, so that its layers share pages with those that see all tokens.
    """
    fields.fixed(FIXED)
    embed_size, q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    vocab_size = fields.integer("vocab_size")
    if q_heads < 1 or (fields.get("head_dim") is None and embed_size % q_heads):
        raise ConfigError(f"hidden_size={embed_size} is not a multiple of num_attention_heads={q_heads}; give head_dim")
    rope, max_position = fields.rope(), fields.integer("max_position_embeddings")
    windows = tuple(None if window is not None and window >= max_position else window for window in windows)
    norm_eps = fields.number("rms_norm_eps")
    if norm_eps < 0:
        raise ConfigError(f"rms_norm_eps={norm_eps} must not be negative")
    bos = fields.token_ids("bos_token_id", vocab_size)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        embed_size=embed_size,
        ffn_size=fields.integer("intermediate_size"),
        q_heads=q_heads,
        kv_heads=fields.integer("num_key_value_heads", q_heads),
        head_dim=fields.integer("head_dim", embed_size // q_heads),
        norm_eps=norm_eps,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        max_position=max_position,
        layers=tuple(LayerSpec(window=window, rope=rope) for window in windows),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )
    fields.finish()
    return config


def _is_llama3(inner: Fields, name: str) -> bool:
    """Whether `rope_type` (`type` in older files) is llama3 rather than default."""
    kinds = [kind for kind in (inner.get("rope_type"), inner.get("type")) if kind is not None]
    for kind in kinds:
        if kind not in ("default", "llama3"):
            raise ConfigError(f"{name}.rope_type={kind!r} is not supported; supported: default, llama3")
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ConfigError(f"{name}.rope_type={kinds[0]!r} and {name}.type={kinds[1]!r} differ")
    return kinds[:1] == ["llama3"]


def _llama3(inner: Fields, name: str) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_position=inner.integer("original_max_position_embeddings"),
    )
    for field in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if (value := inner.number(field)) <= 0:
            raise ConfigError(f"{name}.{field}={value} must be positive")
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"{name}: high_freq_factor={scaling.high_freq_factor} must be over "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
