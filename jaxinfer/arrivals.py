"""Requests become sequences, or are refused because too many wait. One for all data shards.

Hides the numbering of sequences, and the estimate of how fast the queue moves.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from jaxinfer.plan import Sequence
from jaxinfer.request import QueueFullError, Request, RequestError


class Arrivals:
    """Sequences are numbered in order of arrival; a queue of `max_queue` completions is full."""

    def __init__(self, max_queue: int, max_model_len: int, clock: Callable[[], float]):
        self._max_queue = max_queue
        self._max_model_len = max_model_len
        self._clock = clock
        self._next_seq_id = 0
        self._last_end_s: float | None = None
        self._seconds_per_end = 1.0

    def receive(self, request: Request, seeds: Seq[int], num_waiting: int) -> list[Sequence]:
        """One sequence per completion, all or none. seeds: one per completion; num_waiting: completions that wait now.

        Raises QueueFullError when they do not fit the queue, RequestError when they never could.
        """
        num = request.sampling.n
        assert len(seeds) == num, f"{len(seeds)} seeds for n={num}"
        if num > self._max_queue:
            raise RequestError("n", f"{num} completions can never wait at once: max_queue is {self._max_queue}")
        if num_waiting + num > self._max_queue:
            raise QueueFullError(self._max_queue, min(60.0, max(0.1, self._seconds_per_end * num)))
        now_s = self._clock()
        prompt = request.prompt_token_ids
        max_tokens = request.sampling.max_tokens
        wanted = self._max_model_len if max_tokens is None else len(prompt) + max_tokens
        sequences = [
            Sequence(
                seq_id=self._next_seq_id + index,
                request=request,
                index=index,
                seed=seed,
                arrival_s=now_s,
                tokens=list(prompt),
                num_prompt=len(prompt),
                max_total=min(wanted, self._max_model_len),
                rank=int(request.priority),
            )
            for index, seed in enumerate(seeds)
        ]
        self._next_seq_id += num
        return sequences

    def one_ended(self) -> None:
        """A sequence ended: whoever waits comes nearer."""
        now_s = self._clock()
        if self._last_end_s is not None:
            self._seconds_per_end += 0.1 * (now_s - self._last_end_s - self._seconds_per_end)
        self._last_end_s = now_s
