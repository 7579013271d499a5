"""Text to token ids and back, and stop strings over streamed text.

Hides the `tokenizers` library, and what must be held back of a stream because it could begin a stop string.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from jaxinfer.config import ConfigError
from jaxinfer.detokenize import CleaningDecoder, Detokenizer, IncrementalDecoder, clean_up_spaces
from jaxinfer.request import RequestError
from jaxinfer.tokenizer_config import TokenizerSettings, read_settings

MAX_TOKEN_IDS = 2**24  # a table by id has an entry for every id up to the largest
OTHER_FORMATS = ("tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model", "vocab.json", "merges.txt")


class Tokenizer:
    """The tokenizer of a Hugging Face model directory: its tokenizer.json and what the files next to it say."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings | None = None):
        """`settings` (None: nothing beside tokenizer.json) change the tokenizer that is given."""
        tokenizer.no_truncation()  # some files carry their training's settings, which would cut prompts silently
        tokenizer.no_padding()
        self._cleans_up = False
        if settings is not None:
            settings.apply(tokenizer)
            is_bpe = isinstance(tokenizer.model, tokenizers.models.BPE)
            self._cleans_up = settings.clean_up_spaces and (settings.clean_up_spaces_of_bpe or not is_bpe)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)

    @classmethod
    def load(cls, model_dir: Path | str) -> Tokenizer | None:
        """Read model_dir/tokenizer.json; None when there is none. ConfigError names a file that cannot be used."""
        path = Path(model_dir) / "tokenizer.json"
        if not path.is_file():
            _refuse_other_formats(Path(model_dir))
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer this project can read: {error}") from error
        if (vocab_size := _vocab_size(tokenizer)) > MAX_TOKEN_IDS:
            raise ConfigError(f"{path} has token id {vocab_size - 1}; ids must be below {MAX_TOKEN_IDS}")
        loaded = cls(tokenizer, read_settings(model_dir))
        loaded.incremental()  # makes the tables, which the first request would wait for
        return loaded

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
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return clean_up_spaces(text) if self._cleans_up else text

    def incremental(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one stream of ids."""
        decoder = self._detokenizer.decoder(skip_special_tokens=skip_special_tokens)
        return CleaningDecoder(decoder) if self._cleans_up else decoder


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _refuse_other_formats(model_dir: Path) -> None:
    """A vocabulary in a form that is not read is an error: the directory looks as if it had a tokenizer."""
    found = [name for name in OTHER_FORMATS if (model_dir / name).is_file()]
    if found:
        raise ConfigError(
            f"{model_dir} has {' and '.join(found)} but no tokenizer.json, the one form that is read. Write it with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR); or remove the file to serve token "
            "ids without text"
        )


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
