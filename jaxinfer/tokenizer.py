"""Text to token ids and back, and stop strings over streamed text. Hides: the `tokenizers` library, how a stream of
ids becomes text that never ends in half a character, and what must be held back because it could begin a stop string.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from jaxinfer.config import ConfigError
from jaxinfer.request import RequestError

MAX_TOKEN_IDS = 2**24  # a table by id has an entry for every id up to the largest


class IncrementalDecoder(Protocol):
    """Ids in, text out, in linear time. The pieces and the flush, joined, are decode() of all ids."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; never half a character."""
        ...

    def flush(self) -> str:
        """What is still held back, when no more ids will come."""
        ...


class Tokenizer:
    """The tokenizer of a Hugging Face model directory: its tokenizer.json."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()  # some files carry their training's settings, which would cut prompts silently
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._decoders = _decoder_types(json.loads(tokenizer.to_str()).get("decoder"))

    @classmethod
    def load(cls, model_dir: Path | str) -> Tokenizer | None:
        """Read model_dir/tokenizer.json; None when there is none. ConfigError names a file that cannot be used."""
        path = Path(model_dir) / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer this project can read: {error}") from error
        if (vocab_size := _vocab_size(tokenizer)) > MAX_TOKEN_IDS:
            raise ConfigError(f"{path} has token id {vocab_size - 1}; ids must be below {MAX_TOKEN_IDS}")
        return cls(tokenizer)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's own vocabulary may be padded beyond it."""
        return _vocab_size(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of the text, with the tokens (such as BOS) that tokenizer.json puts around it unless told not to.

        Other threads run meanwhile. Raises RequestError for text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "prompt", f"text has a lone surrogate at position {error.start}: it is not valid Unicode"
            ) from error
        # not encode(), which keeps every other thread waiting for the interpreter until it returns
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD, ids past the vocabulary become nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def incremental(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one stream of ids."""
        if self._decoders and self._decoders <= {"ByteLevel", "Fuse"}:
            return _ByteDecoder(self._visible_bytes if skip_special_tokens else self._all_bytes)
        tokens = self._visible_tokens if skip_special_tokens else self._all_tokens
        return _WindowDecoder(self, tokens, byte_fallback="ByteFallback" in self._decoders)

    @cached_property
    def _all_tokens(self) -> list[str | None]:
        """By id; None where no token has that id."""
        tokens: list[str | None] = [None] * self.vocab_size
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            tokens[token_id] = token
        return tokens

    @cached_property
    def _visible_tokens(self) -> list[str | None]:
        tokens = list(self._all_tokens)
        for token_id, added in self._tokenizer.get_added_tokens_decoder().items():
            if added.special:
                tokens[token_id] = None
        return tokens

    @cached_property
    def _all_bytes(self) -> list[bytes]:
        return [_byte_level(token) for token in self._all_tokens]

    @cached_property
    def _visible_bytes(self) -> list[bytes]:
        return [
            text if token is not None else b""
            for text, token in zip(self._all_bytes, self._visible_tokens, strict=True)
        ]


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _decoder_types(decoder: dict[str, Any] | None) -> frozenset[str]:
    """The kinds of decoder that tokenizer.json chains; empty when it names none."""
    if decoder is None:
        return frozenset()
    if decoder["type"] == "Sequence":
        return frozenset().union(*map(_decoder_types, decoder["decoders"]))
    return frozenset((decoder["type"],))


# ---- byte-level BPE: every token is a string of bytes ----------------------------------------------------------------


def _byte_level_table() -> dict[int, str]:
    """The characters of byte-level BPE (GPT-2, Radford et al. 2019) -> chr(byte); other low characters -> no byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {code: chr(code) for code in printable} | {256 + i: chr(byte) for i, byte in enumerate(hidden)}
    return dict.fromkeys(hidden, "\U0010ffff") | table


_BYTE_LEVEL = _byte_level_table()


def _byte_level(token: str | None) -> bytes:
    """The bytes a byte-level decoder makes of a token; one with a character outside its alphabet stands for itself."""
    if token is None:
        return b""
    try:
        return token.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8")


class _ByteDecoder:
    """For byte-level BPE: a table of bytes and an incremental UTF-8 decoder."""

    def __init__(self, table: list[bytes]):
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = b"".join([table[token_id] for token_id in ids])
        except IndexError:  # the model's vocabulary is padded beyond the tokenizer's
            data = b"".join([table[token_id] for token_id in ids if token_id < len(table)])
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


# ---- any other tokenizer: decode a short window twice ----------------------------------------------------------------

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_HELD = 8  # ids held back for an unfinished character, which takes at most 4 bytes
_CONTEXT = 2  # ids decoded again, so that what a decoder does to the start of a text is done only there


class _WindowDecoder:
    """For decoders known only by what they return: new text is decode(context + new ids) less decode(context).

    With byte fallback a run of byte tokens waits for its end: one invalid byte turns the whole run into U+FFFD.
    Else ids wait while their text ends in U+FFFD, which may be an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[str | None], *, byte_fallback: bool):
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._byte_fallback = byte_fallback
        self._context: list[int] = []  # its text is out already
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        tokens = self._tokens
        # ids without text of their own would make a context that does not shield the start of the new text
        visible = [token_id for token_id in ids if token_id < len(tokens) and tokens[token_id] is not None]
        if not visible:
            return ""
        self._held += visible
        if not self._byte_fallback:
            return self._release(len(self._held), may_wait=len(self._held) <= _MAX_HELD)
        end = len(self._held)
        first_new = end - len(visible)
        while end > first_new and self._is_byte(self._held[end - 1]):
            end -= 1
        if end == first_new:  # only bytes are new: what was held is a run of bytes too
            return ""
        return self._release(end, may_wait=False)

    def flush(self) -> str:
        return self._release(len(self._held), may_wait=False)

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._tokens[token_id] or "") is not None

    def _release(self, end: int, *, may_wait: bool) -> str:
        """The text of the first `end` held ids, which become context; nothing yet if it may end in half a character."""
        window = self._context + self._held[:end]
        before = self._decode(self._context)
        text = self._decode(window)
        if may_wait and text.endswith("\ufffd"):
            return ""
        del self._held[:end]
        self._context = window[-_CONTEXT:]
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


# ---- stop strings ----------------------------------------------------------------------------------------------------


class StopMatcher:
    """Finds the first stop string in streamed text and holds back exactly what could still begin one.

    The match that ends first wins; of several that end at the same character, the longest. So the result does not
    depend on how the text was cut. Linear time: the automaton of Aho and Corasick (1975).
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False):
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._include_stop = include_stop
        self._next: list[dict[str, int]] = [{}]  # per state: character -> state
        self._depth = [0]  # how many characters a state has matched: that many are held back
        self._found = [0]  # length of the longest stop string that ends in this state, or 0
        for stop in stops:
            self._insert(stop)
        self._fallback = self._link()
        self._may_begin = re.compile("[" + "".join(map(re.escape, self._next[0])) + "]") if stops else None
        self._state = 0
        self._held = ""
        self.matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to emit, whether a stop string has been found). After a match nothing more is emitted."""
        if self.matched:
            return "", True
        if self._may_begin is None or (self._state == 0 and not self._may_begin.search(text)):
            return text, False
        step, fallback, found, state = self._next, self._fallback, self._found, self._state
        for index, character in enumerate(text):
            while state and character not in step[state]:
                state = fallback[state]
            state = step[state].get(character, 0)
            if found[state]:
                return self._match(text[: index + 1], found[state]), True
        self._state = state
        whole = self._held + text
        safe = len(whole) - self._depth[state]
        self._held = whole[safe:]
        return whole[:safe], False

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _match(self, text: str, length: int) -> str:
        whole = self._held + text
        self._held, self.matched = "", True
        return whole if self._include_stop else whole[: len(whole) - length]

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(0)
            state = self._next[state][character]
        self._found[state] = len(stop)

    def _link(self) -> list[int]:
        """Per state, that of its longest proper suffix which begins some stop string; completes `_found` on the way."""
        fallback = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                suffix = fallback[state]
                while suffix and character not in self._next[suffix]:
                    suffix = fallback[suffix]
                fallback[child] = self._next[suffix].get(character, 0)
                self._found[child] = self._found[child] or self._found[fallback[child]]
                queue.append(child)
        return fallback
