"""Tokenization and chat templates, off the event loop and off the engine thread.

Hides the thread pool and the limits that are checked before any work is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from jaxinfer.request import QueueFullError, RequestError
from serving.chat_wire import conversation_from_proto
from serving.protos.jaxinfer.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from jaxinfer.chat import ChatTemplate
    from jaxinfer.tokenizer import Tokenizer

RETRY_S = 1.0


class TokenizerPool:
    """Encodes and decodes in `num_threads` threads; at most `max_pending` calls wait or run at once."""

    def __init__(self, *, num_threads: int, max_prompt_chars: int, max_pending: int):
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="jaxinfer-tokenizer")
        self._max_prompt_chars = max_prompt_chars
        self._max_pending = max_pending
        self._num_pending = 0

    async def encode(self, tokenizer: Tokenizer | None, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`. RequestError (no tokenizer, too long) or QueueFullError."""
        if tokenizer is None:
            raise RequestError("text", "this model has no tokenizer; send token_ids")
        if len(text) > self._max_prompt_chars:
            raise RequestError("text", f"{len(text)} characters are over the limit of {self._max_prompt_chars}")
        return tuple(await self._run(partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)))

    async def encode_chat(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, chat: pb.Chat
    ) -> tuple[int, ...]:
        """Token ids of a conversation's prompt. RequestError (no template, see ChatTemplate) or QueueFullError."""
        if tokenizer is None:
            raise RequestError("chat", "this model has no tokenizer; send token_ids")
        if template is None:
            raise RequestError("chat", "this model has no chat template; send text")
        return tuple(await self._run(partial(self._encode_chat, tokenizer, template, chat)))

    def _encode_chat(self, tokenizer: Tokenizer, template: ChatTemplate, chat: pb.Chat) -> list[int]:
        text = template.render(conversation_from_proto(chat))
        if len(text) > self._max_prompt_chars:
            raise RequestError(
                "chat", f"the prompt's {len(text)} characters are over the limit of {self._max_prompt_chars}"
            )
        return tokenizer.encode(text, add_special_tokens=False)

    async def decode(
        self, tokenizer: Tokenizer | None, ids: Sequence[int], *, vocab_size: int, skip_special_tokens: bool
    ) -> str:
        """Text of `ids`. RequestError (no tokenizer, too many ids, an id outside the vocabulary) or QueueFullError."""
        if tokenizer is None:
            raise RequestError("token_ids", "this model has no tokenizer, so ids have no text")
        if len(ids) > self._max_prompt_chars:
            raise RequestError("token_ids", f"{len(ids)} ids are over the limit of {self._max_prompt_chars}")
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RequestError("token_ids", f"{token} is outside the vocabulary (0 to {vocab_size - 1})")
        return await self._run(partial(tokenizer.decode, ids, skip_special_tokens=skip_special_tokens))

    def close(self) -> None:
        """Let the threads go; calls that wait are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run[Value](self, work: Callable[[], Value]) -> Value:
        if self._num_pending >= self._max_pending:
            raise QueueFullError(self._max_pending, RETRY_S)
        self._num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_pending -= 1
