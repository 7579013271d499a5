"""What tokenizer_config.json and the files next to it say about special tokens, text clean-up and chat templates.

Hides which file wins: everything is read and applied as transformers 5 does for a directory with a tokenizer.json,
so that a string has the same ids in both. Where transformers ignores a setting (`add_bos_token`), so does this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from jaxinfer.config import ConfigError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SWITCHES = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files say beside tokenizer.json.

    add_bos_token and add_eos_token are not here: transformers 5 drops them when there is a tokenizer.json, whose
    post-processor alone decides.
    """

    named: Mapping[str, AddedToken]  # bos_token and so on, and names of the model's own such as image_token
    extra: tuple[AddedToken, ...]  # special without a name
    added: Mapping[int, AddedToken]  # by id; their properties replace those in tokenizer.json
    keep_added: bool  # those in tokenizer.json count as `added`, too: the files of older versions
    split_special_tokens: bool  # special tokens in a text are text
    clean_up_spaces: bool  # after decoding; not for BPE, which it would corrupt
    clean_up_spaces_of_bpe: bool
    llama_prefix: str | None  # which texts get a space in front: "first", "always" or "never"; None: see tokenizer.json
    chat_template: Any  # as it is in the file; `jaxinfer.chat` checks it

    @property
    def special_tokens(self) -> dict[str, str]:
        """Name to text, as chat templates get them."""
        return {name: token.content for name, token in self.named.items()}

    def apply(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Make the tokenizer's added tokens what the files say; new ones get the ids after its last."""
        if self.llama_prefix is not None:
            _split_as_llama(tokenizer, self.llama_prefix)
        names = {token.content for token in self.named.values()}
        present = tokenizer.get_added_tokens_decoder()
        added = {**self.added, **present} if self.keep_added else self.added
        tokens = [token for _, token in sorted(added.items())]
        known = {token.content for token in (*present.values(), *tokens)}
        for token in (*self.named.values(), *self.extra):
            if token.content not in known:
                known.add(token.content)
                tokens.append(token)
        tokenizer.add_tokens([_as_special(token) if token.content in names else token for token in tokens])
        tokenizer.encode_special_tokens = self.split_special_tokens


def read_settings(model_dir: Path | str) -> TokenizerSettings:
    """The settings of a directory; without any file, none. ConfigError names a file that cannot be used, and why."""
    path = Path(model_dir) / "tokenizer_config.json"
    config = _read_object(path)
    versions = config.get("fast_tokenizer_files", ["tokenizer.json"])
    if versions != ["tokenizer.json"]:
        raise ConfigError(f"{path}: fast_tokenizer_files={versions!r:.80} cannot be honoured: only tokenizer.json is")
    llama_prefix = _llama_prefix(config, path)
    if llama_prefix is not None:
        config = LLAMA_NAMED | config
    is_old = "added_tokens_decoder" not in config
    if is_old:
        _complete(config, _read_object(path.with_name("special_tokens_map.json")))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {
        name: value
        for name, value in config.items()
        if value is not None and (name in NAMED or (name.endswith("_token") and isinstance(value, (str, dict))))
    }
    if isinstance(extra, dict):  # names of the model's own
        named, extra = named | extra, []
    if not isinstance(extra, list):
        raise ConfigError(f"{path}: extra_special_tokens={extra!r:.80} is neither a list nor a dict of tokens")
    named = {name: _token(value, f"{path}: {name}") for name, value in named.items()}
    extra = tuple(_token(value, f"{path}: extra_special_tokens") for value in extra)
    if is_old:
        special = {token.content for token in (*named.values(), *extra)}
        added = _old_added_tokens(path.with_name("added_tokens.json"), special)
    else:
        added = _added_tokens(config["added_tokens_decoder"], f"{path}: added_tokens_decoder")
    return TokenizerSettings(
        named=named,
        extra=extra,
        added=added,
        keep_added=is_old,
        split_special_tokens=_switch(config, "split_special_tokens", path),
        clean_up_spaces=_switch(config, "clean_up_tokenization_spaces", path),
        clean_up_spaces_of_bpe=_switch(
            config, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", path
        ),
        llama_prefix=llama_prefix,
        chat_template=config.get("chat_template"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _llama_prefix(config: Mapping[str, Any], path: Path) -> str | None:
    """How transformers 5's LlamaTokenizer, where it takes that class, splits texts: by `legacy`, not by tokenizer.json.

    It takes it when the config says so, and the model's type has no other (only llama has none, of those served here),
    and tokenizer.json is not byte-level. The flag is about a space that legacy versions put after special tokens, too.
    """
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    model_type = _read_object(path.with_name("config.json")).get("model_type", "llama")
    if kind != "LlamaTokenizer" or model_type != "llama":
        return None
    tokenizer = _read_object(path.with_name("tokenizer.json"))
    parts = json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    if '"ByteLevel"' in parts or tokenizer.get("model", {}).get("type") != "BPE":
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if _switch(config, "legacy", path) else "first"


def _split_as_llama(tokenizer: tokenizers.Tokenizer, prefix: str) -> None:
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if prefix == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.model.byte_fallback = tokenizer.model.fuse_unk = True


def _complete(config: dict[str, Any], special_tokens_map: Mapping[str, Any]) -> None:
    """Add what special_tokens_map.json names: it goes before the config's own values."""
    for name, value in special_tokens_map.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            value = [*(config.get(name) or []), *value]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            value = {**value, "special": True}
        config[name] = value


def _added_tokens(value: object, where: str) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}={value!r:.80} is not a dict by token id")
    added = {}
    for token_id, fields in value.items():
        if not (token_id.isascii() and token_id.isdigit()):
            raise ConfigError(f"{where}: {token_id!r:.80} is not a token id")
        added[int(token_id)] = _token(fields, f"{where}: {token_id}")
    return added


def _old_added_tokens(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json is a dict from text to id."""
    added = {}
    for content, token_id in _read_object(path).items():
        if not isinstance(token_id, int):
            raise ConfigError(f"{path}: {content!r:.80} has the id {token_id!r:.80}, which is not a whole number")
        is_special = content in special
        added[token_id] = AddedToken(content, normalized=not is_special, special=is_special)
    return added


def _token(value: object, where: str) -> AddedToken:
    """A token as text, which is special, or as an object with its properties."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ConfigError(f"{where}: {value!r:.80} is neither a token's text nor an object with its content")
    switches = {name: value[name] for name in SWITCHES if name in value}
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise ConfigError(f"{where}: {name}={switch!r:.80} is neither true nor false")
    return AddedToken(value["content"], **switches)


def _as_special(token: AddedToken) -> AddedToken:
    properties = {name: getattr(token, name) for name in SWITCHES}
    return AddedToken(token.content, **properties | {"special": True})


def _switch(config: Mapping[str, Any], name: str, path: Path) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{path}: {name}={value!r:.80} is neither true nor false")
    return bool(value)
