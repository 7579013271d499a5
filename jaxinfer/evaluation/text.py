"""A text as overlapping windows of tokens, each token scored once and with as much context as its window gives.

The scheme is that of Hugging Face's guide to perplexity of fixed-length models; BOS_MODES says where a beginning of
sequence goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

# start: what the tokenizer itself puts before a text, once; window: BOS before every window; none: neither
BOS_MODES = ("start", "window", "none")
DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Window:
    """A prompt, of which the tokens [scored, len(token_ids)) count; those before are context."""

    token_ids: tuple[int, ...]
    scored: int

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.scored


@dataclass(frozen=True)
class WindowOptions:
    """How a text is cut: tokens per prompt, tokens from one window's start to the next's, where BOS goes."""

    length: int
    stride: int
    bos: str

    def report(self, text: TokenizedText, windows: Sequence[Window]) -> dict[str, Any]:
        """What was scored of which text, for a report."""
        return {
            "num_scored_tokens": sum(window.num_scored for window in windows),
            "num_windows": len(windows),
            "text": text.json(),
            "window": self.length,
            "stride": self.stride,
            "bos": self.bos,
        }

    @classmethod
    def checked(cls, length: int | None, stride: int | None, bos: str, *, max_model_len: int) -> WindowOptions:
        """With defaults filled in: the longest window up to DEFAULT_WINDOW, strides of half of it. ConfigError."""
        longest = max_model_len - 1  # a request also samples a token
        length = min(DEFAULT_WINDOW, longest) if length is None else length
        if not 2 <= length <= longest:
            raise ConfigError(f"window={length} must be from 2 to {longest}, one less than max_model_len")
        stride = max(1, length // 2) if stride is None else stride
        if not 1 <= stride <= length:
            raise ConfigError(f"stride={stride} must be from 1 to the window's {length}")
        if bos not in BOS_MODES:
            raise ConfigError(f"bos={bos!r} is not one of {', '.join(BOS_MODES)}")
        return cls(length, stride, bos)


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens and size; `prefix` is what the tokenizer puts before it."""

    token_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    num_bytes: int
    sha256: str

    def json(self) -> dict[str, Any]:
        """What identifies the text in a report."""
        return {"sha256": self.sha256, "num_bytes": self.num_bytes, "num_tokens": len(self.token_ids)}


def read_text(path: str | Path) -> str:
    """The file's text, line ends as they are. ConfigError when it cannot be read, is empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"text file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"text file {str(path)!r} is not UTF-8: byte {error.start}") from error
    if not text:
        raise ConfigError(f"text file {str(path)!r} is empty")
    return text


def tokenize(text: str, tokenizer: Tokenizer | None, *, limit: int | None = None) -> TokenizedText:
    """The text's tokens; with a `limit`, of its longest beginning that has at most so many. ConfigError."""
    if tokenizer is None:
        raise ConfigError("this model directory has no tokenizer.json, so a text cannot be scored")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if limit is not None and len(token_ids) > limit:
        text = _beginning(text, tokenizer, limit)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text)
    starts = (k for k in range(len(whole) - len(token_ids) + 1) if whole[k : k + len(token_ids)] == token_ids)
    prefix = whole[: next(starts, 0)]
    data = text.encode()
    return TokenizedText(tuple(token_ids), tuple(prefix), len(data), hashlib.sha256(data).hexdigest())


def _beginning(text: str, tokenizer: Tokenizer, limit: int) -> str:
    """The longest beginning found by bisection that has at most `limit` tokens, so that bytes and tokens agree."""
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if len(tokenizer.encode(text[:middle], add_special_tokens=False)) <= limit:
            low = middle
        else:
            high = middle
    return text[:low]


def windows(text: TokenizedText, options: WindowOptions, model: ModelConfig) -> list[Window]:
    """The text's windows in order; every token that has a predecessor in its window is scored exactly once.

    ConfigError when that leaves no token, or BOS is asked for and the model has none.
    """
    every: tuple[int, ...] = ()
    if options.bos == "window":
        if model.bos_token_id is None:
            raise ConfigError("bos='window' needs a bos_token_id in config.json, and this model has none")
        every = (model.bos_token_id,)
    start = text.prefix if options.bos == "start" else ()
    tokens = (*start, *text.token_ids)
    room = options.length - len(every)
    stride = min(options.stride, room)
    found: list[Window] = []
    done = len(start)  # tokens before this one were scored, or are not to be
    for begin in range(0, len(tokens), stride):
        end = min(begin + room, len(tokens))
        first = max(done, begin) if every else max(done, begin + 1)
        if first < end:
            found.append(Window((*every, *tokens[begin:end]), first - begin + len(every)))
        done = max(done, end)
        if end == len(tokens):
            break
    if not found:
        raise ConfigError(f"the text has {len(text.token_ids)} tokens; none has a predecessor that could predict it")
    return found
