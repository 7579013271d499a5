"""Drives an engine in this process and notes when pieces arrive; measures the device costs the ideal is made of.

Hides the client's side of a benchmark: arrivals, the limit on requests handed over, and the clock.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.engine import Engine
from jaxinfer.perf.metrics import RequestTimes
from jaxinfer.perf.simulate import StepCosts
from jaxinfer.request import FinishReason, QueueFullError, Request, RequestError, SamplingParams, TokenEvent
from serving.bench_trace import TraceRequest


@dataclass(frozen=True)
class Run:
    """What one drive of a trace gave: a record per request in trace order, and the time from start to last token."""

    records: list[RequestTimes]
    duration_s: float


def drive(
    engine: Engine,
    trace: Sequence[TraceRequest],
    sampling: SamplingParams,
    *,
    max_outstanding: float = math.inf,
    label: str,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Run `trace` to its end; every request generates exactly its `output_len` tokens, end-of-sequence ids ignored.

    At most `max_outstanding` requests are unfinished in the engine at any time (also bounded by its queue). A request's
    clock starts when it arrives; with a limit, when it is handed over. `label` must be new to the engine: it names the
    requests, and salts the prefix cache, so that no prompt finds pages of an earlier run. `progress` gets the number of
    finished requests.
    """
    start = time.perf_counter()
    records: dict[str, RequestTimes] = {}
    position, unfinished = 0, 0
    while position < len(trace) or unfinished:
        now = time.perf_counter() - start
        full = False
        while position < len(trace) and trace[position].arrival_s <= now:
            item, name = trace[position], f"{label}-{position}"
            full = unfinished >= max_outstanding or not _hand_over(engine, item, sampling, name, salt=label)
            if full:
                break
            since = item.arrival_s if max_outstanding == math.inf else now
            records[name] = RequestTimes(start + since, len(item.prompt_token_ids))
            position, unfinished = position + 1, unfinished + 1
        for event in engine.step():
            ended = _note(records[event.request_id], event)
            unfinished -= ended
            if ended and progress is not None:
                progress(position - unfinished)
        _rest(engine, None if full or position == len(trace) else start + trace[position].arrival_s, unfinished)
    for item, record in zip(trace, records.values(), strict=True):
        if record.error is None and record.num_output_tokens != item.output_len:
            record.error = f"{record.num_output_tokens} tokens came, {item.output_len} were asked for"
    ends = [r.last_s for r in records.values() if r.pieces]
    return Run(list(records.values()), (max(ends) if ends else time.perf_counter()) - start)


def _hand_over(engine: Engine, item: TraceRequest, sampling: SamplingParams, name: str, salt: str) -> bool:
    """Whether the engine took the request; False when its queue is full."""
    params = dataclasses.replace(sampling, max_tokens=item.output_len, ignore_eos=True)
    try:
        engine.add(Request(name, item.prompt_token_ids, params, cache_salt=salt))
    except QueueFullError:
        return False
    return True


def _note(record: RequestTimes, event: TokenEvent) -> bool:
    """Write an event into its record; True when it was the last one."""
    if event.token_ids:
        record.pieces.append((time.perf_counter(), len(event.token_ids)))
    if event.finish_reason is None:
        return False
    record.num_cached_tokens = event.num_cached_tokens
    if event.finish_reason is FinishReason.ERROR:
        record.error = event.error or "failed without a message"
    return True


def _rest(engine: Engine, next_arrival_s: float | None, unfinished: int) -> None:
    """Sleep until the engine or the next arrival has something to do."""
    pauses = [engine.idle_s()] if unfinished else []
    if next_arrival_s is not None:
        pauses.append(next_arrival_s - time.perf_counter())
    if pauses and min(pauses) > 0:
        time.sleep(min(pauses))


@dataclass(frozen=True)
class Calibration:
    """Measured device costs, and the prefill steps they came from."""

    costs: StepCosts
    kv_rows: int  # rows that each sequence held, on average, while decode steps were timed
    prefill_step_s: float  # time of a mixed step full of prompt tokens ..
    prefill_step_tokens: int  # .. and its tokens


def calibrate(engine: Engine, sampling: SamplingParams, *, kv_rows: int, num_slots: int, seed: int) -> Calibration:
    """Time decode steps at several batch sizes, and prefill, on the otherwise idle engine.

    Sequences hold about `kv_rows` rows while decode is timed. A decode step's time is that of the longest loops the
    engine runs, divided by their steps, so host work hides behind the device. The prefill cost of a token is what a
    mixed step full of prompt tokens takes over a decode step, per token.
    """
    sizes = sorted({1, max(1, num_slots // 4), max(1, num_slots // 2), num_slots})
    num_steps = max(16, 3 * engine.config.loop_steps)
    num_steps = min(num_steps, engine.max_model_len - 2)
    prompt_len = max(1, min(kv_rows - num_steps // 2, engine.max_model_len - num_steps - 1))
    decode_s = {}
    for size in sizes:
        run = drive(
            engine,
            equal_prompts(engine, size, prompt_len, num_steps + 1, seed, size),
            sampling,
            label=f"decode-{size}-{seed}",
        )
        decode_s[size] = all_running_step_s(run.records)
    budget = engine.config.max_num_batched_tokens
    length = min(budget, engine.max_model_len - 1)
    run = drive(
        engine, equal_prompts(engine, 4 * -(-budget // length), length, 1, seed, 0), sampling, label=f"prefill-{seed}"
    )
    firsts = sorted(r.first_s for r in run.records)
    later = [time_s for time_s in firsts if time_s > firsts[0]]
    if not later:
        raise RuntimeError(
            f"{len(firsts)} prompts of {length} tokens were all prefilled in one step; cannot time prefill"
        )
    tokens = length * len(later)
    elapsed_s, steps = firsts[-1] - firsts[0], -(-tokens // budget)
    marginal_s = max(0.0, elapsed_s - steps * decode_s[1]) / tokens
    return Calibration(StepCosts(decode_s, marginal_s), prompt_len + num_steps // 2, elapsed_s / steps, tokens // steps)


def all_running_step_s(records: Sequence[RequestTimes]) -> float:
    """Seconds per decode step while all of `records` run: those of the request whose first token came last.

    From its second piece on where there are three: the first one may be seen late, when the next call already ran.
    """
    last = max(records, key=lambda record: record.first_s)
    if len(last.pieces) >= 3:
        return (last.last_s - last.pieces[1][0]) / sum(count for _, count in last.pieces[2:])
    if last.tpot_s is None:
        raise ValueError("a decode step cannot be timed on an output of one token; ask for at least 2")
    return last.tpot_s


def equal_prompts(engine: Engine, count: int, length: int, output_len: int, *seed: int) -> list[TraceRequest]:
    """`count` requests of `length` random tokens, all there at once. RequestError where they cannot fit the engine."""
    if length + output_len > engine.max_model_len:
        raise RequestError(
            "prompt", f"{length} tokens and {output_len} of output go over max_model_len={engine.max_model_len}"
        )
    tokens = np.random.default_rng([engine.config.seed, *seed]).integers(0, engine.model.vocab_size, (count, length))
    return [TraceRequest(0.0, tuple(row), output_len) for row in tokens.tolist()]
