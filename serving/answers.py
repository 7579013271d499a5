"""What a client gets back: plain frozen dataclasses, and how they come out of proto messages. Imports no jax."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jaxinfer.request import FinishReason, PromptLogprobs, TokenLogprobs
from serving import wire
from serving.protos.jaxinfer.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Usage:
    """Tokens that a request used; completion tokens are of all its completions together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Completion:
    """One of the n completions of a prompt."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] | None
    error: str | None


@dataclass(frozen=True)
class GenerateResult:
    """A unary answer."""

    request_id: str
    completions: tuple[Completion, ...]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None  # when asked for; one entry per prompt token

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text


@dataclass(frozen=True)
class Chunk:
    """A piece of one completion. `finish_reason` is on its last piece, `usage` on the last piece of the request."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] | None
    error: str | None
    num_prompt_tokens: int | None  # on the first piece of the request
    usage: Usage | None
    prompt_logprobs: PromptLogprobs | None = None  # when asked for, on the first piece of completion 0


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves; `engine` is what `jaxinfer info` prints."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    server_version: str
    engine: dict[str, Any]
    chat_templates: tuple[str, ...] = ()  # names; none for a model without a chat template


def result_of(message: pb.GenerateResponse) -> GenerateResult:
    """A unary answer, from its message."""
    completions = tuple(
        Completion(
            index=c.index,
            token_ids=tuple(c.token_ids),
            text=c.text,
            finish_reason=wire.finish_from_proto(c.finish_reason),
            logprobs=wire.logprobs_from_proto(c.logprobs),
            error=c.error or None,
        )
        for c in message.completions
    )
    prompt_logprobs = wire.prompt_logprobs_from_proto(message)
    return GenerateResult(message.request_id, completions, usage_of(message.usage), prompt_logprobs)


def chunk_of(message: pb.GenerateStreamResponse) -> Chunk:
    """A piece, from its message."""
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        finish_reason=wire.finish_from_proto(message.finish_reason),
        logprobs=wire.logprobs_from_proto(message.logprobs),
        error=message.error or None,
        num_prompt_tokens=message.prompt.num_tokens if message.HasField("prompt") else None,
        usage=usage_of(message.usage) if message.HasField("usage") else None,
        prompt_logprobs=wire.prompt_logprobs_from_proto(message),
    )


def usage_of(message: pb.Usage) -> Usage:
    """Token counts, from their message."""
    return Usage(message.prompt_tokens, message.completion_tokens, message.total_tokens, message.cached_tokens)


def model_info_of(message: pb.GetModelInfoResponse) -> ModelInfo:
    """What is served, from its message."""
    return ModelInfo(
        model=message.model,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        has_tokenizer=message.has_tokenizer,
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        eos_token_ids=tuple(message.eos_token_ids),
        dtype=message.dtype,
        server_version=message.server_version,
        engine=json.loads(message.engine_json),
        chat_templates=tuple(message.chat_templates),
    )
