"""From applied tokens to TokenEvents: incremental text, stop strings, log-probabilities of one completion."""

from __future__ import annotations

import jax
import numpy as np

from jaxinfer.plan import Sequence, Update
from jaxinfer.request import FinishReason, PromptLogprob, PromptLogprobs, TokenEvent, TokenLogprobs
from jaxinfer.tokenizer import StopMatcher, Tokenizer
from sharding.host_arrays import from_devices


class Logprobs:
    """A call's log-probabilities on the host. The alternatives are fetched only when a request asks for them."""

    def __init__(self, bits: np.ndarray, top_ids: jax.Array, top_logprobs: jax.Array, first_slot: int = 0):
        self._bits = bits  # i32[slots, steps]: float32 bits, of the slots from `first_slot` on
        self._first_slot = first_slot
        self._top = (top_ids, top_logprobs)
        self._fetched: tuple[np.ndarray, np.ndarray] | None = None

    def of(self, step: int, slot: int, num_top: int) -> TokenLogprobs:
        """Log-probabilities of the token that `slot` drew in `step`."""
        top: tuple[tuple[int, float], ...] = ()
        if num_top:
            if self._fetched is None:
                self._fetched = (from_devices(self._top[0]), from_devices(self._top[1]))
            ids, values = (array[step, self._first_slot + slot, :num_top] for array in self._fetched)
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprobs(float(self._bits[slot, step].view(np.float32)), top)


class PromptValues:
    """A prompt's log-probabilities while they come in, rows in any pieces; 8 bytes a token and 8 per alternative."""

    def __init__(self, num_prompt: int, num_top: int):
        rows = num_prompt - 1  # row i predicts token i + 1
        self._logprobs, self._ranks = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
        self._top_ids, self._top_logprobs = np.zeros((rows, num_top), np.int32), np.zeros((rows, num_top), np.float32)
        self._num_known = 0

    def put(
        self,
        first: int,
        logprobs: np.ndarray,
        ranks: np.ndarray,
        top_ids: np.ndarray | None,
        top_logprobs: np.ndarray | None,
    ) -> None:
        """Values of rows [first, first + len(logprobs)): f32, i32, and [rows, num_top] of each alternative."""
        at = slice(first, first + len(logprobs))
        self._logprobs[at], self._ranks[at] = logprobs, ranks
        if top_ids is not None and top_logprobs is not None:
            self._top_ids[at], self._top_logprobs[at] = top_ids, top_logprobs
        self._num_known = max(self._num_known, at.stop)

    def take(self) -> PromptLogprobs | None:
        """All of them; None while some are missing."""
        if self._num_known < len(self._logprobs):
            return None
        rows = zip(
            self._logprobs.tolist(),
            self._ranks.tolist(),
            self._top_ids.tolist(),
            self._top_logprobs.tolist(),
            strict=True,
        )
        return (
            None,
            *(PromptLogprob(value, rank, tuple(zip(ids, tops, strict=True))) for value, rank, ids, tops in rows),
        )


class CompletionStream:
    """The text side of one completion. Without a tokenizer its text is empty."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None, eos_ids: frozenset[int]):
        params = sequence.request.sampling
        self.sequence = sequence
        self._decoder = (
            None if tokenizer is None else tokenizer.incremental(skip_special_tokens=params.skip_special_tokens)
        )
        self._matcher = StopMatcher(params.stop, include_stop=params.include_stop_in_output) if params.stop else None
        self._num_pushed = 0
        self.prompt: PromptValues | None = None  # until it was told
        if params.prompt_logprobs is not None and sequence.index == 0:
            self.prompt = PromptValues(sequence.num_prompt, params.prompt_logprobs)
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)

    def push(self, update: Update, logprobs: Logprobs) -> TokenEvent:
        """The event for an update. A stop string found ends it there: later tokens of the update are dropped.

        The text of the first `min_tokens` tokens is not searched.
        """
        params = self.sequence.request.sampling
        token_ids, reason = update.token_ids, update.finish_reason
        if self._matcher is None:
            text = self._decode(token_ids, last_is_stop=reason is FinishReason.STOP)
        else:
            text = ""
            for count, token in enumerate(token_ids, start=1):
                ends = reason is FinishReason.STOP and count == len(token_ids)
                piece, matched = self._decode((token,), last_is_stop=ends), False
                self._num_pushed += 1
                if self._num_pushed > params.min_tokens:
                    piece, matched = self._matcher.push(piece)
                text += piece
                if matched:
                    token_ids, reason = token_ids[:count], FinishReason.STOP
                    self._decoder = self._matcher = None
                    break
        if reason is not None:
            tail, matched = self._flush()
            text += tail
            if matched and reason is FinishReason.LENGTH:
                reason = FinishReason.STOP
        values = None
        if params.logprobs:
            values = tuple(logprobs.of(step, update.slot, params.top_logprobs) for step in range(len(token_ids)))
        generated = self.sequence.num_generated - (len(update.token_ids) - len(token_ids))
        return self.event(token_ids, text, reason, generated=generated, logprobs=values, error=update.error)

    def end(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """The last event of a completion that the host ended."""
        return self.event((), self._flush()[0], reason, generated=self.sequence.num_generated, error=error)

    def event(
        self,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        *,
        generated: int,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        error: str | None = None,
    ) -> TokenEvent:
        prompt_logprobs = None if self.prompt is None else self.prompt.take()
        if prompt_logprobs is not None:
            self.prompt = None
        return TokenEvent(
            request_id=self.sequence.request.request_id,
            index=self.sequence.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
            num_prompt_tokens=self.sequence.num_prompt,
            num_cached_tokens=self.sequence.num_cached,
            num_generated_tokens=generated,
            prompt_logprobs=prompt_logprobs,
        )

    def _flush(self) -> tuple[str, bool]:
        """Text still held back (half a character, the beginning of a stop string), and whether it holds a stop."""
        tail = self._decoder.flush() if self._decoder is not None else ""
        if self._matcher is None:
            return tail, False
        piece, matched = self._matcher.push(tail)
        return (piece, True) if matched else (piece + self._matcher.flush(), False)

    def _decode(self, token_ids: tuple[int, ...], *, last_is_stop: bool) -> str:
        if self._decoder is None:
            return ""
        hide = last_is_stop and not self.sequence.request.sampling.include_stop_in_output
        return self._decoder.push(token_ids[:-1] if hide and token_ids[-1] in self._stop_ids else token_ids)
