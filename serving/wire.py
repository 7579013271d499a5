"""Between the proto messages and our own types, both ways, for the server and the clients.

Hides field presence (unset = the dataclass default, never proto's zero) and the names of proto fields in errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from jaxinfer.request import (
    FinishReason,
    Priority,
    PromptLogprob,
    PromptLogprobs,
    Request,
    RequestError,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from serving.protos.jaxinfer.v1 import inference_pb2 as pb

MAX_REQUEST_ID_CHARS = 256
MAX_CACHE_SALT_CHARS = 1024
MAX_TOKEN_ID = 2**32 - 1
MIN_LOGPROBS_BYTES = 2 + 9  # tag and length of the message, tag and value of the double
MIN_LOGPROB_BYTES = 2 + 9 + 2  # and tag and value of an id
MIN_PROMPT_LOGPROB_BYTES = 2 + 9 + 2  # and tag and value of a rank

# SamplingParams fields that are proto scalars of the same name; the others are handled by name below.
_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "include_stop_in_output",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
)

_FINISH_TO_PROTO = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}
_PRIORITY_FROM_PROTO = {
    pb.PRIORITY_UNSPECIFIED: Priority.ONLINE,
    pb.PRIORITY_ONLINE: Priority.ONLINE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """The settings a client sent over our defaults; RequestError names the field."""
    values: dict = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}  # type: ignore[arg-type]
    if message.no_max_tokens:
        if message.HasField("max_tokens"):
            raise RequestError("sampling.no_max_tokens", f"true excludes max_tokens={message.max_tokens}")
        values["max_tokens"] = None
    if message.HasField("allowed_token_ids"):
        values["allowed_token_ids"] = tuple(message.allowed_token_ids.ids)
    values["logit_bias"] = dict(message.logit_bias)
    values["stop"] = tuple(message.stop)
    values["stop_token_ids"] = tuple(message.stop_token_ids)
    return SamplingParams(**values)


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Every field set, so the server's defaults play no part; RequestError names a field that cannot be sent."""
    allowed = params.allowed_token_ids
    return message_of(
        pb.SamplingParams,
        logit_bias=params.logit_bias,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        no_max_tokens=params.max_tokens is None,
        allowed_token_ids=None if allowed is None else {"ids": allowed},
        **{name: getattr(params, name) for name in _SCALARS},
    )


def message_of[Kind: Message](kind: type[Kind], **fields: Any) -> Kind:
    """A message with these fields, None for unset; RequestError for a value that protobuf cannot hold.

    That is text which is not valid Unicode, or a token id out of range (SamplingParams has checked other numbers).
    """
    message = kind()
    for name, value in fields.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except UnicodeEncodeError as error:
            raise RequestError(name, f"is not valid Unicode: {error}") from None
        except ValueError as error:
            raise RequestError(name, f"{error}; token ids are from 0 to {MAX_TOKEN_ID}") from None
    return message


def priority_from_proto(message: pb.GenerateRequest) -> Priority:
    """Unset is ONLINE; a number that is no Priority is a RequestError."""
    if message.priority not in _PRIORITY_FROM_PROTO:
        raise RequestError("priority", f"{message.priority} is not one of {', '.join(pb.Priority.keys())}")
    return _PRIORITY_FROM_PROTO[message.priority]


def priority_to_proto(priority: Priority | int) -> pb.Priority:
    """The proto's number for a Priority or its value; RequestError for anything else."""
    try:
        known = Priority(priority)
    except ValueError:
        choices = ", ".join(f"{item.name} ({item.value})" for item in Priority)
        raise RequestError("priority", f"{priority!r} is not one of {choices}") from None
    return pb.PRIORITY_BATCH if known is Priority.BATCH else pb.PRIORITY_ONLINE


def check_names(message: pb.GenerateRequest) -> None:
    """RequestError when request_id or cache_salt is too long."""
    for name, limit in (("request_id", MAX_REQUEST_ID_CHARS), ("cache_salt", MAX_CACHE_SALT_CHARS)):
        if len(getattr(message, name)) > limit:
            raise RequestError(name, f"{len(getattr(message, name))} characters are over the limit of {limit}")


def min_prompt_bytes(request: Request) -> int:
    """What the prompt's log-probabilities take at the least; one message holds them all."""
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return 0
    return (len(request.prompt_token_ids) - 1) * (MIN_PROMPT_LOGPROB_BYTES + num_top * MIN_LOGPROB_BYTES)


def min_answer_bytes(request: Request, max_model_len: int) -> int:
    """What a GenerateResponse takes at the least, without text, when every completion reaches the max_tokens asked for.

    Without max_tokens how long they get is not known: only the prompt's part counts.
    """
    sampling = request.sampling
    if sampling.max_tokens is None:
        return min_prompt_bytes(request)
    num_tokens = min(sampling.max_tokens, max_model_len - len(request.prompt_token_ids))
    logprobs = (MIN_LOGPROBS_BYTES + sampling.top_logprobs * MIN_LOGPROB_BYTES) if sampling.logprobs else 0
    return sampling.n * num_tokens * (1 + logprobs) + min_prompt_bytes(request)


def finish_to_proto(reason: FinishReason | None) -> pb.FinishReason:
    """The proto's number for a finish reason; None is UNSPECIFIED."""
    return _FINISH_TO_PROTO[reason]


def finish_from_proto(value: int) -> FinishReason | None:
    """A finish reason, or None while the completion runs; a reason this client does not know is ERROR."""
    return _FINISH_FROM_PROTO.get(value, FinishReason.ERROR)  # type: ignore[call-overload]


def logprobs_to_proto(logprobs: Sequence[TokenLogprobs] | None) -> list[pb.TokenLogprobs]:
    """One message per token."""
    return [pb.TokenLogprobs(logprob=item.logprob, top=_top_to_proto(item.top)) for item in logprobs or ()]


def logprobs_from_proto(messages: Sequence[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...] | None:
    """One entry per token; None when the server sent none."""
    return tuple(TokenLogprobs(m.logprob, tuple((t.token_id, t.logprob) for t in m.top)) for m in messages) or None


def prompt_logprobs_to_proto(logprobs: PromptLogprobs | None) -> pb.PromptLogprobs | None:
    """One entry per token after the first; None stays None."""
    if logprobs is None:
        return None
    items = (item for item in logprobs if item is not None)
    return pb.PromptLogprobs(
        tokens=[pb.PromptLogprob(logprob=i.logprob, rank=i.rank, top=_top_to_proto(i.top)) for i in items]
    )


def prompt_logprobs_from_proto(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> PromptLogprobs | None:
    """One entry per prompt token, None for the first; None when the server sent none."""
    if not message.HasField("prompt_logprobs"):
        return None
    tokens = message.prompt_logprobs.tokens
    return (None, *(PromptLogprob(m.logprob, m.rank, tuple((t.token_id, t.logprob) for t in m.top)) for m in tokens))


def _top_to_proto(top: Sequence[tuple[int, float]]) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(token_id=token, logprob=value) for token, value in top]


def chunk_to_proto(request_id: str, event: TokenEvent) -> pb.GenerateStreamResponse:
    """A stream message without `prompt` and `usage`, which only the first and the last have."""
    return pb.GenerateStreamResponse(
        request_id=request_id,
        index=event.index,
        token_ids=event.token_ids,
        text=event.text,
        logprobs=logprobs_to_proto(event.logprobs),
        finish_reason=finish_to_proto(event.finish_reason),
        error=event.error or "",
        prompt_logprobs=prompt_logprobs_to_proto(event.prompt_logprobs),
    )


class Tally:
    """Counts the events of one request, for usage and for the end of its n completions."""

    def __init__(self, num_completions: int):
        self._num_open = num_completions
        self._num_generated: dict[int, int] = {}
        self._num_prompt = 0
        self._num_cached = 0
        self._errors: list[str] = []
        self._num_completions = num_completions

    def count(self, event: TokenEvent) -> None:
        """Take one event into account."""
        self._num_prompt = event.num_prompt_tokens
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        self._num_generated[event.index] = event.num_generated_tokens
        self._num_open -= event.finish_reason is not None
        if event.finish_reason is FinishReason.ERROR:
            self._errors.append(event.error or "the completion failed")

    @property
    def finished(self) -> bool:
        """Whether every completion has finished."""
        return self._num_open == 0

    @property
    def failure(self) -> str | None:
        """The first error, when every completion ended with one."""
        return self._errors[0] if len(self._errors) == self._num_completions else None

    def prompt(self) -> pb.PromptInfo:
        """What is known of the prompt."""
        return pb.PromptInfo(num_tokens=self._num_prompt, num_cached_tokens=self._num_cached)

    def usage(self) -> pb.Usage:
        """Tokens so far; completion tokens of all completions together."""
        generated = sum(self._num_generated.values())
        return pb.Usage(
            prompt_tokens=self._num_prompt,
            completion_tokens=generated,
            total_tokens=self._num_prompt + generated,
            cached_tokens=self._num_cached,
        )
