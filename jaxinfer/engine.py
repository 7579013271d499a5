"""The engine: requests in, TokenEvents out, one `step()` at a time.

It keeps one device call in flight while it plans the next, and reads a result only after the next call was
dispatched. It hides recovery: a failed call costs time (state reallocated, sequences recomputed), not requests.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import memory, scoring
from jaxinfer.batch import DeviceState, Packer, empty_state, limits_of
from jaxinfer.cache import CacheManager
from jaxinfer.chat import ChatTemplate
from jaxinfer.config import EngineConfig, ModelConfig, page_groups
from jaxinfer.engine_info import describe
from jaxinfer.engine_stats import EngineStats
from jaxinfer.kernel_check import check_kernels
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.transformer import merger
from jaxinfer.output import CompletionStream, Logprobs
from jaxinfer.plan import Plan, Sequence
from jaxinfer.programs import Programs, Shape, enable_compilation_cache
from jaxinfer.request import FinishReason, Request, RequestError, TokenEvent
from jaxinfer.scheduler import Scheduler
from jaxinfer.step import Drivers, Outcome, Report
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.watchdog import Watchdog

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3  # after which the sequences of the failing call end with an error


@dataclass
class _Flight:
    """A device call whose result was not read yet."""

    plan: Plan
    shape: Shape
    outcome: Outcome
    dispatched_s: float
    scoring: scoring.Scoring | None = None


class Engine:
    """Serves one model on one device. Not thread-safe: one thread owns it, but for `check_request`."""

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: Callable[[str], None] | None = None,
    ):
        """Load the weights and allocate the pages; `warm_up` compiles.

        Raises ConfigError or CheckpointError, naming what is wrong with the directory or the options.
        """
        self.config = config = EngineConfig() if config is None else config
        self.model_dir = Path(model_dir)
        self.model: ModelConfig = load_config(self.model_dir)
        self.tokenizer = Tokenizer.load(self.model_dir)
        self.chat_template = ChatTemplate.load(self.model_dir)
        enable_compilation_cache(config)
        self.max_model_len = memory.max_model_len(self.model, config)
        self.num_pages = memory.pages_per_group(self.model, config, self.max_model_len)
        check_kernels(self.model, config)
        if config.invariant:
            log.info("invariant=True: bits do not depend on the batch; benchmarks/invariance.py measures the cost")
        self._limits = limits_of(self.model, config, self.max_model_len, self.num_pages)
        self._groups = page_groups(self.model)
        self._packer = Packer(self.model, self._limits, self._groups)
        dtype = jnp.dtype(config.dtype)
        loaded = load_parameters(
            self.model_dir, self.model, dtype, progress=None if progress is None else lambda name, *_: progress(name)
        )
        self._parameters = tuple(jax.tree.leaves(loaded))
        self._state: DeviceState = empty_state(self.model, config, self._limits)
        drivers = Drivers(self.model, self._limits, merger(self.model, dtype, config.matmul_backend, config.invariant))
        self._programs = Programs(drivers, self._packer, config, self._parameters, self._state)
        self._cache = CacheManager(
            self._groups, self.num_pages, self._limits.page_size, prefix_caching=config.prefix_caching
        )
        self._scheduler = Scheduler(
            config, self._cache, max_model_len=self.max_model_len, length_rule=self.model.length_rule
        )
        self._watchdog = Watchdog(config.watchdog_s)
        self._streams: dict[int, CompletionStream] = {}  # by sequence id
        self._sequences: dict[str, list[Sequence]] = {}  # by request id, unfinished ones
        self._ended: list[TokenEvent] = []  # events of completions the host ended
        self._flight: _Flight | None = None
        self._num_requests = 0
        self._failures_in_a_row = 0
        self._counters = dict.fromkeys(("calls", "failed", "prompt", "cached", "generated"), 0)
        self._copies_early = jax.default_backend() != "cpu"  # there is nothing to copy there, and asking costs 0.1 ms
        self._step_time_s = 0.0
        self._last_ready_s = 0.0
        self._host_s: list[tuple[float, float]] = []  # per step: processor time, clock time

    # ---- requests

    def check_request(self, request: Request) -> None:
        """Raise RequestError unless this engine can run the request. Pure: any thread may call it."""
        request.check(
            vocab_size=self.model.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
            has_tokenizer=self.tokenizer is not None,
        )
        if request.sampling.n > self.config.max_queue:
            raise RequestError(
                "n", f"{request.sampling.n} completions can never wait at once: max_queue is {self.config.max_queue}"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError, or QueueFullError over `max_queue`."""
        self.check_request(request)
        if request.request_id in self._sequences or any(e.request_id == request.request_id for e in self._ended):
            raise RequestError("request_id", f"{request.request_id!r} is in use by an unfinished request")
        params = request.sampling
        base = params.seed if params.seed is not None else _mix(_mix(self.config.seed) + self._num_requests)
        seeds = [base if i == 0 else _mix(base + i) for i in range(params.n)]
        sequences = self._scheduler.add(request, seeds=seeds)
        self._num_requests += 1
        self._counters["prompt"] += len(request.prompt_token_ids) * len(sequences)
        self._sequences[request.request_id] = list(sequences)
        eos = frozenset(self.model.eos_token_ids)
        for sequence in sequences:
            self._streams[sequence.seq_id] = CompletionStream(sequence, self.tokenizer, eos)

    def abort(self, request_id: str) -> None:
        """End a request; its ABORT events come from the next `step()`. Unknown and ended ones are ignored."""
        for sequence in list(self._sequences.get(request_id, ())):
            self._scheduler.finish(sequence, FinishReason.ABORT)
            self._end(sequence, FinishReason.ABORT)

    def has_work(self) -> bool:
        """Whether `step()` still has something to do or to tell."""
        return bool(self._sequences or self._ended or self._flight is not None or self._scheduler.has_work)

    def idle_s(self) -> float:
        """How long `step()` has nothing to do although requests wait (dynamic batching); 0 = call it now."""
        if self._flight is not None or self._ended:
            return 0.0
        deadline = self._scheduler.next_deadline()
        return 0.0 if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def is_stuck(self) -> bool:
        """Whether a device call takes longer than `watchdog_s` right now. Any thread may ask."""
        return self._watchdog.is_overdue

    # ---- the loop

    def step(self) -> list[TokenEvent]:
        """Plan and dispatch the next device call, then read the one before it."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        waited = 0.0
        plan = self._scheduler.plan(max_steps=self._loop_length())
        flight, failure = None, None
        if plan is not None:
            try:
                flight = self._dispatch(plan)
            except Exception as error:  # the plan counts as in flight: whatever it is, recover
                failure = (error, plan)
        events: list[TokenEvent] = []
        last, self._flight = self._flight, flight
        if last is not None and failure is None:
            waiting = time.perf_counter()
            try:
                with self._watchdog.watch(str(last.shape)):
                    main = np.asarray(last.outcome.main)
                    self._read_scoring(last)
            except Exception as error:
                failure = (error, last.plan)
            else:
                waited = time.perf_counter() - waiting
                events += self._apply(last, main)
        if failure is not None:
            self._recover(*failure)
        if self._ended:
            events += self._ended
            self._ended = []
        if last is not None or plan is not None:
            self._host_s.append((time.thread_time() - cpu_start, time.perf_counter() - start - waited))
            if len(self._host_s) > 4096:
                del self._host_s[:2048]
        return events

    def _loop_length(self) -> int:
        """Decode steps that take about `stream_interval_s`."""
        if not self._step_time_s:
            return min(4, self.config.loop_steps)
        steps = int(self.config.stream_interval_s / self._step_time_s)
        return max(1, min(self.config.loop_steps, steps))

    def _dispatch(self, plan: Plan) -> _Flight:
        prefill_tokens = sum(chunk.length for chunk in plan.chunks)
        shape = self._programs.shape_for(plan.num_slots, prefill_tokens)
        program = self._programs.get(shape)
        buffers = [self._packer.pack_control(plan)]
        if plan.chunks:
            buffers.append(self._packer.pack_admission(plan))
        dispatched_s = time.perf_counter()
        self._state, outcome = program(self._parameters, self._state, *buffers)
        if self._copies_early:
            outcome.main.copy_to_host_async()
        scores = None if outcome.hidden is None else scoring.dispatch(plan, outcome.hidden, self._run_reader)
        return _Flight(plan, shape, outcome._replace(hidden=None), dispatched_s, scores)

    def _run_reader(self, name: str, hidden: jax.Array, *arguments: np.ndarray) -> Any:
        """Call a program of scoring.READERS on a mixed step's hidden rows."""
        return self._programs.get(Shape(0, hidden.shape[0], name))(self._parameters, hidden, *arguments)

    def _read_scoring(self, flight: _Flight) -> None:
        """Take what prompts were scored for; who cannot have it ends, before the call's other results are applied."""
        for sequence, error in flight.scoring.read(self._streams) if flight.scoring is not None else ():
            self._scheduler.finish(sequence, FinishReason.ERROR)
            self._end(sequence, FinishReason.ERROR, error)

    def _apply(self, flight: _Flight, main: np.ndarray) -> list[TokenEvent]:
        report = Report.read(main)
        logprobs = Logprobs(report.logprob_bits, flight.outcome.top_ids, flight.outcome.top_logprobs)
        self._measure(flight, report.steps)
        self._counters["calls"] += 1
        self._failures_in_a_row = 0
        events = []
        for update in self._scheduler.apply(flight.plan, report.result):
            sequence = update.sequence
            event = self._streams[sequence.seq_id].push(update, logprobs)
            self._counters["generated"] += len(event.token_ids)
            if event.finish_reason is not None:
                if update.finish_reason is None:  # a stop string, which only the host sees
                    self._scheduler.finish(sequence, event.finish_reason)
                self._forget(sequence)
            events.append(event)
        return events

    def _measure(self, flight: _Flight, steps: int) -> None:
        """Keep a running estimate of a decode step's time."""
        now = time.perf_counter()
        began = max(flight.dispatched_s, self._last_ready_s)
        self._last_ready_s = now
        if flight.shape.prefill_tokens == 0 and steps:
            sample = (now - began) / steps
            self._step_time_s = sample if not self._step_time_s else 0.8 * self._step_time_s + 0.2 * sample

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._ended.append(self._streams[sequence.seq_id].end(reason, error))
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._streams[sequence.seq_id]
        self._counters["cached"] += sequence.num_cached
        siblings = self._sequences[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.request_id]

    def _recover(self, error: Exception, plan: Plan) -> None:
        """The donated state is gone: allocate it anew and replay the running sequences from the host's tokens."""
        self._counters["failed"] += 1
        self._failures_in_a_row += 1
        log.error("device call failed (%d in a row), replaying: %s", self._failures_in_a_row, error)
        self._flight = None
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            affected = {id(s): s for s in [*(s for _, s in plan.running), *(chunk.sequence for chunk in plan.chunks)]}
            for sequence in affected.values():
                if sequence.seq_id in self._streams:
                    self._scheduler.finish(sequence, FinishReason.ERROR)
                    text = f"the device call failed {self._failures_in_a_row} times in a row; the server's log says how"
                    self._end(sequence, FinishReason.ERROR, text)
        self._scheduler.reset_device()
        del self._state
        self._state = empty_state(self.model, self.config, self._limits)

    # ---- start and inspection

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile the declared programs; from then on a compile is a counted, logged event."""
        self._programs.warm_up(progress)
        gc.collect()
        gc.freeze()  # what lives now lives long; collections in the loop need not walk it (up to 20 ms each)

    def check(self) -> None:
        """AssertionError when a page or slot leaked. Call it when idle."""
        self._scheduler.check()  # the cache's books included
        if not self.has_work():
            used = [usage.used for usage in self._cache.usage()]
            assert not any(used), f"pages in use while idle, per group: {used}"
            assert not self._streams, f"sequences never ended: {sorted(self._streams)}"

    def stats(self) -> EngineStats:
        usage = self._cache.usage()
        cpu_s, wall_s = np.median(self._host_s, axis=0) if self._host_s else (0.0, 0.0)
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_preemptions=self._scheduler.num_preemptions,
            num_calls=self._counters["calls"],
            num_failed_calls=self._counters["failed"],
            num_watchdog_reports=self._watchdog.num_reports,
            prompt_tokens=self._counters["prompt"],
            cached_prompt_tokens=self._counters["cached"],
            generation_tokens=self._counters["generated"],
            host_us_per_loop=1e6 * float(cpu_s),
            host_wall_us_per_loop=1e6 * float(wall_s),
            step_time_s=self._step_time_s,
            pages_total=tuple(pages - 1 for pages in self.num_pages),
            pages_used=tuple(u.used for u in usage),
            pages_cached=tuple(u.cached for u in usage),
            compiles_after_warmup=self._programs.compiles_after_warmup,
        )

    def info(self) -> dict[str, Any]:
        """What runs here, as JSON: the model, effective options, memory, kernels, versions."""
        return describe(self)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(int(array.nbytes) for array in self._parameters)

    @property
    def programs(self) -> Programs:
        """The compiled programs."""
        return self._programs

    @property
    def device_state(self) -> DeviceState:
        """What lies on the device between calls; the next call takes it."""
        return self._state

    def close(self) -> None:
        """Stop the watchdog, end the chat template's process and drop the device arrays."""
        self._watchdog.close()
        if self.chat_template is not None:
            self.chat_template.close()
        self._flight = None
        del self._state, self._parameters


def _mix(value: int) -> int:
    """A 63-bit seed from any integer, well spread (SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
