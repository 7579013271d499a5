"""How long a trace would take an ideal continuous-batching engine on this machine.

Ideal means: zero host time, no padding, a freed slot is refilled at the very next step, prompts are never in the
way of one another. Only the measured costs of the device remain. See docs/benchmarking.md for how they are measured.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TraceItem:
    """One request: when it may start (seconds from the start), prompt tokens, and output tokens (at least 1)."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class StepCosts:
    """Device time of the two kinds of work. A mixed step costs the sum: `prefill_token_s` is the marginal cost."""

    decode_step_s: Mapping[int, float]  # running sequences -> seconds of one step, at least one point
    prefill_token_s: float  # per prompt token on top of the step that carries it

    def decode(self, num_running: int) -> float:
        """Seconds of a step with `num_running` sequences: linear between the measured points, flat outside."""
        points = sorted(self.decode_step_s)
        return float(np.interp(num_running, points, [self.decode_step_s[n] for n in points]))


def ideal_duration_s(trace: Sequence[TraceItem], num_slots: int, costs: StepCosts) -> float:
    """Seconds from the start to the last token of `trace`, with `num_slots` sequences at once, first come first served.

    A prompt's prefill yields its first output token; every later token takes part in one decode step, which all
    running sequences share. Raises ValueError for no slots or an output of no tokens.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots} must be at least 1")
    for item in trace:
        if item.num_output_tokens < 1:
            raise ValueError(f"an output of {item.num_output_tokens} tokens cannot be simulated; at least 1")
    waiting = deque(sorted(trace, key=lambda item: item.arrival_s))
    step_s = {n: costs.decode(n) for n in range(1, num_slots + 1)}
    ends: list[int] = []  # heap: the decode step after which each running sequence is done
    now_s, step = 0.0, 0
    while waiting or ends:
        while waiting and len(ends) < num_slots and waiting[0].arrival_s <= now_s:
            item = waiting.popleft()
            now_s += item.num_prompt_tokens * costs.prefill_token_s
            if item.num_output_tokens > 1:
                heapq.heappush(ends, step + item.num_output_tokens - 1)
        if not ends:
            if waiting:
                now_s = max(now_s, waiting[0].arrival_s)
            continue
        now_s += step_s[len(ends)]
        step += 1
        while ends and ends[0] <= step:
            heapq.heappop(ends)
    return now_s
