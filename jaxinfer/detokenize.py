"""Streams of token ids to text that never ends in half a character, in time linear in their length.

Hides how each kind of decoder is followed incrementally: byte-level BPE and SentencePiece-like chains by tables of
their own, which read no id twice; every other by decoding a short window twice. All equal decode() of all the ids.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class IncrementalDecoder(Protocol):
    """Ids in, text out, in linear time. The pieces and the flush, joined, are decode() of all ids."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; never half a character."""
        ...

    def flush(self) -> str:
        """What is still held back, when no more ids will come."""
        ...


class Detokenizer:
    """Makes incremental decoders for one tokenizer; what they share is computed when first asked for."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        decoder = (
            tokenizer.decoder
        )  # its pickled state is JSON; to_str() of the tokenizer would write the vocabulary too
        self._steps = [] if decoder is None else _steps_of(json.loads(decoder.__getstate__()))
        self._tables: dict[bool, Callable[[], IncrementalDecoder]] = {}

    def decoder(self, *, skip_special_tokens: bool) -> IncrementalDecoder:
        """A decoder for one stream of ids."""
        if skip_special_tokens not in self._tables:
            self._tables[skip_special_tokens] = self._prepare(self._tokens(skip_special_tokens))
        return self._tables[skip_special_tokens]()

    def _tokens(self, skip_special_tokens: bool) -> list[str | None]:
        """By id; None where a token is skipped or there is none."""
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            tokens[token_id] = token
        if skip_special_tokens:
            for token_id, added in self._tokenizer.get_added_tokens_decoder().items():
                if added.special:
                    tokens[token_id] = None
        return tokens

    def _prepare(self, tokens: list[str | None]) -> Callable[[], IncrementalDecoder]:
        kinds = [step["type"] for step in self._steps]
        if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            table = [_byte_level(token) for token in tokens]
            return lambda: ByteDecoder(table)
        if (chain := _chain_of(self._steps)) is not None:
            pieces = [None if token is None else chain.text(token) for token in tokens]
            if "" not in pieces:  # a token without text would end a run of bytes, and leave no trace of it
                texts = [piece or "" for piece in pieces]
                return lambda: ChainDecoder(texts, chain)
        byte_fallback = "ByteFallback" in kinds
        return lambda: WindowDecoder(self._tokenizer, tokens, byte_fallback=byte_fallback)


def _steps_of(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The decoders that tokenizer.json chains, in order, nested sequences unfolded."""
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps_of(part)]
    return [decoder]


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


class ByteDecoder:
    """For byte-level BPE: a table of bytes and an incremental UTF-8 decoder."""

    def __init__(self, table: list[bytes]):
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(_look_up(self._table, ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _look_up[Piece: (bytes, str)](table: list[Piece], ids: Sequence[int]) -> list[Piece]:
    """The entries of the ids; none for ids past the table, where the model's vocabulary is padded."""
    try:
        return [table[token_id] for token_id in ids]
    except IndexError:
        return [table[token_id] for token_id in ids if token_id < len(table)]


# ---- SentencePiece-like chains: Replace, ByteFallback, Fuse, Strip ---------------------------------------------------

# A byte token becomes one character that no text can hold, so that runs of bytes are found after everything is joined.
_FIRST_BYTE = 0xDC00
_BYTES = "".join(chr(_FIRST_BYTE + byte) for byte in range(256))
_RUN = re.compile(f"[{_BYTES[0]}-{_BYTES[-1]}]+")


@dataclass(frozen=True)
class _Chain:
    """Replace any number of strings, fall back to bytes, fuse, strip spaces from the beginning: each may be absent."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    strip: str = ""  # the character
    max_stripped: int = 0

    def text(self, token: str) -> str:
        """What becomes of a token before it is joined with others."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return _BYTES[int(match[1], 16)]
        return token


def _chain_of(steps: Sequence[Mapping[str, Any]]) -> _Chain | None:
    """The chain these decoders are, or None for anything else."""
    rest = list(steps)
    replacements = []
    while rest and rest[0]["type"] == "Replace" and rest[0]["pattern"].get("String"):
        step = rest.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    rest = rest[byte_fallback:]
    match [step["type"] for step in rest]:
        case [] if steps:
            return _Chain(tuple(replacements), byte_fallback)
        case ["Fuse"]:
            return _Chain(tuple(replacements), byte_fallback)
        case ["Fuse", "Strip"] if rest[1]["stop"] == 0:
            return _Chain(tuple(replacements), byte_fallback, rest[1]["content"], rest[1]["start"])
    return None


class ChainDecoder:
    """For SentencePiece-like tokenizers: a table of texts.

    A run of byte tokens waits for its end: one invalid byte turns the whole run into U+FFFD.
    """

    def __init__(self, table: list[str], chain: _Chain):
        self._table = table
        self._strip = chain.strip
        self._to_strip = chain.max_stripped
        self._run: list[str] = []  # of bytes, to be continued

    def push(self, ids: Sequence[int]) -> str:
        new = "".join(_look_up(self._table, ids))
        text = new.rstrip(_BYTES)
        if len(text) == len(new) and not self._run:
            return self._finish(text)
        if not text:
            if new:
                self._run.append(new)
            return ""
        whole = "".join([*self._run, text])
        self._run = [new[len(text) :]] if len(text) < len(new) else []
        return self._finish(whole)

    def flush(self) -> str:
        whole, self._run = "".join(self._run), []
        return self._finish(whole)

    def _finish(self, text: str) -> str:
        text = _RUN.sub(_decode_run, text)
        while self._to_strip and text:
            if text[0] != self._strip:
                self._to_strip = 0
            else:
                text, self._to_strip = text[1:], self._to_strip - 1
        return text


def _decode_run(match: re.Match[str]) -> str:
    data = bytes(ord(character) - _FIRST_BYTE for character in match[0])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


# ---- any other tokenizer: decode a short window twice ----------------------------------------------------------------

_MAX_HELD = 8  # ids held back for an unfinished character, which takes at most 4 bytes
_CONTEXT = 2  # ids decoded again, so that what a decoder does to the start of a text is done only there


class WindowDecoder:
    """For decoders known only by what they return: new text is decode(context + new ids) less decode(context).

    With byte fallback a run of byte tokens waits for its end: one invalid byte turns the whole run into U+FFFD.
    Else ids wait while their text ends in U+FFFD, which may be an unfinished character.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, tokens: list[str | None], *, byte_fallback: bool):
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
        return BYTE_TOKEN.fullmatch(self._tokens[token_id] or "") is not None

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


# ---- clean-up of spaces ----------------------------------------------------------------------------------------------

_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# A character after which the text can be cut: no replacement reaches across, not even one that others lead to
# (" n ' t" becomes "n't"). Only a space, an apostrophe, n before it, and v and r of 've and 're can be inside one.
_SAFE_CUT = re.compile(r"[^ 'nvr](?=.)|n(?=[^ '])|'(?=[^ tmsvr])|[vr](?=[^e])", re.DOTALL)


def clean_up_spaces(text: str) -> str:
    """Spaces before punctuation and English contractions away, as transformers does for WordPiece models."""
    for pattern in _CLEAN_UP:
        text = text.replace(pattern, pattern.strip())
    return text


class CleaningDecoder:
    """Another decoder's text, cleaned up: what may still become part of a replacement waits."""

    def __init__(self, decoder: IncrementalDecoder):
        self._decoder = decoder
        self._held: list[str] = []

    def push(self, ids: Sequence[int]) -> str:
        return self._clean(self._decoder.push(ids))

    def flush(self) -> str:
        text, self._held = "".join([*self._held, self._decoder.flush()]), []
        return clean_up_spaces(text)

    def _clean(self, text: str) -> str:
        if not text:
            return ""
        last = self._held[-1][-1] if self._held else ""  # the cut may lie between two pieces
        joined = last + text
        cut = next((end for end in range(len(joined) - 1, 0, -1) if _SAFE_CUT.match(joined, end - 1)), None)
        if cut is None:
            self._held.append(text)
            return ""
        cut -= len(last)
        whole = "".join([*self._held, text[:cut]])
        self._held = [text[cut:]]
        return clean_up_spaces(whole)
