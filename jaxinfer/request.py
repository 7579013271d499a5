"""A request, validated once for every front end, and the events that answer it.

Limits are checked before anything is allocated. Sources: vLLM's and OpenAI's field names and meanings;
min-p (Nguyen et al. 2024), nucleus sampling (Holtzman et al. 2019), repetition penalty (CTRL, Keskar et al. 2019).
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:
    import numpy as np

MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 16  # the model's own end-of-sequence ids count too
MAX_LOGIT_BIAS = 128
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MIN_REPETITION_PENALTY = 0.01  # below it logits overflow


class RequestError(ValueError):
    """The caller's mistake: `field` names the offending field, the message its value, limit and choices."""

    def __init__(self, field_name: str, message: str):
        super().__init__(f"{field_name}: {message}")
        self.field_name = field_name


class QueueFullError(RuntimeError):
    """`max_queue` requests wait already; `retry_after_s` says when to come back."""

    def __init__(self, max_queue: int, retry_after_s: float):
        super().__init__(
            f"{max_queue} requests are waiting already (max_queue={max_queue}); retry in {retry_after_s:.1f} s"
        )
        self.retry_after_s = retry_after_s


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more; the message says why."""


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # cancelled by the caller, a deadline or shutdown
    ERROR = "error"  # this request failed (for example NaN logits); `error` says how


class Priority(enum.IntEnum):
    ONLINE = 0
    BATCH = 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Every field is honoured or the request is refused.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0, penalties 1 / 0 / 0 are off. `max_tokens=None` runs to the
    model's length limit. `logprobs` returns the sampled token's log-probability, `top_logprobs` that many more
    alternatives; both are of the model's own distribution, before temperature, penalties and truncation.
    `prompt_logprobs` asks the same of each prompt token given those before it: None is off, 0 its own alone, more
    that many alternatives too. Such a prompt is computed in full, whatever the prefix cache holds.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()  # one string counts as one stop string
    stop_token_ids: tuple[int, ...] = ()
    include_stop_in_output: bool = False
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _tuple("allowed_token_ids", self.allowed_token_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", f"{self.logit_bias!r} must map token ids to numbers")
        for name in ("include_stop_in_output", "ignore_eos", "logprobs", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                hint = "; top_logprobs is how many alternatives" if name == "logprobs" else ""
                raise RequestError(name, f"{getattr(self, name)!r} must be true or false{hint}")
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1 if self.max_tokens is None else self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("n", self.n, 1, MAX_N)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", f"{self.top_logprobs} needs logprobs=True")
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError("stop", f"{len(self.stop)} strings are over the limit of {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise RequestError("stop", f"{text!r} must be a string of 1 to {MAX_STOP_STRING_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                "stop_token_ids", f"{len(self.stop_token_ids)} ids are over the limit of {MAX_STOP_TOKEN_IDS}"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError("logit_bias", f"{len(self.logit_bias)} entries are over the limit of {MAX_LOGIT_BIAS}")
        for token, bias in self.logit_bias.items():
            _check_float(f"logit_bias[{token}]", bias, -100.0, 100.0)

    def check_vocabulary(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raise RequestError where a token id lies outside the vocabulary, stop ids do not fit, or no id is left."""
        if self.allowed_token_ids is not None and not 1 <= len(self.allowed_token_ids) <= vocab_size:
            raise RequestError(
                "allowed_token_ids",
                f"{len(self.allowed_token_ids)} ids, where 1 to {vocab_size} can be; leave it out to allow all",
            )
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _check_int(name, token, 0, vocab_size - 1)
        eos = () if self.ignore_eos else eos_token_ids
        if len(self.stop_token_ids) + len(eos) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                "stop_token_ids",
                f"{len(self.stop_token_ids)} with the model's {len(eos)} end-of-sequence ids are over the limit of "
                f"{MAX_STOP_TOKEN_IDS}",
            )
        allowed = self.allowed_token_ids
        if self.min_tokens > 0 and allowed is not None and {*allowed} <= {*self.stop_token_ids, *eos}:
            raise RequestError(
                "min_tokens", f"{self.min_tokens} cannot be reached: every one of allowed_token_ids ends the text"
            )


@dataclass(frozen=True)
class Request:
    """One prompt to complete. `request_id` is the caller's name for it; the engine's own keys are its own.

    `on_prompt_logits(first, logits)` hears the model's logits f32[rows, vocab] of the prompt positions from `first` on,
    block by block, each position once and in order, on the thread that steps the engine. If it raises, the request
    ends with that error. Only in this process; it holds the prompt back from the prefix cache as prompt_logprobs does.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: Priority = Priority.ONLINE
    cache_salt: str = ""  # requests share cached prefixes only with the same salt
    on_prompt_logits: Callable[[int, np.ndarray], None] | None = None

    def check(self, *, vocab_size: int, max_model_len: int, eos_token_ids: Sequence[int], has_tokenizer: bool) -> None:
        """Raise RequestError unless a model with these limits can run this request."""
        num_prompt = len(self.prompt_token_ids)
        if num_prompt == 0:
            raise RequestError("prompt", "is empty; at least one token is needed")
        if num_prompt >= max_model_len:
            raise RequestError(
                "prompt", f"{num_prompt} tokens leave no room to generate: max_model_len is {max_model_len}"
            )
        if num_prompt + self.sampling.min_tokens > max_model_len:
            raise RequestError(
                "min_tokens",
                f"{self.sampling.min_tokens} after a prompt of {num_prompt} go over max_model_len={max_model_len}",
            )
        try:
            self.cache_salt.encode()
        except UnicodeEncodeError as error:
            raise RequestError("cache_salt", f"{self.cache_salt!r} is not valid Unicode") from error
        for token in self.prompt_token_ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise RequestError(
                    "prompt_token_ids", f"{token!r} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})"
                )
        if self.sampling.stop and not has_tokenizer:
            raise RequestError(
                "stop", "stop strings need a tokenizer, and this model directory has none; use stop_token_ids"
            )
        self.sampling.check_vocabulary(vocab_size, eos_token_ids)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one generated token: its own, and the best alternatives (id, value), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprob:
    """How the model saw one prompt token: log-probability, rank (1 = its first choice), the best alternatives."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), best first


# One entry per prompt token; None for the first, which nothing predicts.
PromptLogprobs = tuple[PromptLogprob | None, ...]


@dataclass(frozen=True)
class TokenEvent:
    """A piece of one completion. `text` may lag behind the tokens: what could begin a stop string waits.

    `prompt_logprobs` comes once per request: with the first piece of completion 0.
    """

    request_id: str
    index: int  # which of the request's n completions
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose K/V came from the prefix cache
    num_generated_tokens: int = 0  # so far, this piece included
    prompt_logprobs: PromptLogprobs | None = None


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(name, f"{value!r} must be a whole number from {low} to {high}")


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        lower = f"above {low:g} up" if open_low else f"from {low:g}"
        raise RequestError(name, f"{value!r} must be a number {lower} to {high:g}")


def _tuple(name: str, value: object) -> tuple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(name, f"{value!r} must be a sequence")
    return tuple(value)


def check_token_ids(value: Iterable[object]) -> tuple[int, ...]:
    """Token ids, numpy's integers among them, as a tuple of ints, or RequestError."""
    ids = []
    for token in value:
        if isinstance(token, bool) or not isinstance(token, SupportsIndex):
            raise RequestError("prompt_token_ids", f"{token!r} is not a whole number")
        ids.append(operator.index(token))
    return tuple(ids)
