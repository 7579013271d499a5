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

from jaxinfer import memory
from jaxinfer.batch import DeviceState, Packer, empty_state, kv_spec, limits_of
from jaxinfer.cache import CacheManager
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig, page_groups
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
from pallas_kernels import attention, devices, matmul
from pallas_kernels.dispatch import BackendError

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3  # after which the sequences of the failing call end with an error


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and gauges of now."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_calls: int  # device calls applied
    num_failed_calls: int
    num_watchdog_reports: int
    prompt_tokens: int  # once per completion
    cached_prompt_tokens: int  # of these, whose K/V came from the prefix cache, of completions that ended
    generation_tokens: int
    host_us_per_loop: float  # median processor time that step() takes on its thread
    host_wall_us_per_loop: float  # the same by the clock, without waiting for the device: on a CPU both share cores
    step_time_s: float  # recent time of one decode step
    pages_total: tuple[int, ...]  # per page group, without the trash page
    pages_used: tuple[int, ...]
    pages_cached: tuple[int, ...]
    compiles_after_warmup: int


@dataclass
class _Flight:
    """A device call whose result was not read yet."""

    plan: Plan
    shape: Shape
    outcome: Outcome
    dispatched_s: float


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
        enable_compilation_cache(config)
        self.max_model_len = memory.max_model_len(self.model, config)
        self.num_pages = memory.pages_per_group(self.model, config, self.max_model_len)
        _check_kernels(self.model, config)
        self._limits = limits_of(self.model, config, self.max_model_len, self.num_pages)
        self._groups = page_groups(self.model)
        self._packer = Packer(self.model, self._limits, self._groups)
        dtype = jnp.dtype(config.dtype)
        self._parameters = load_parameters(
            self.model_dir, self.model, dtype, progress=None if progress is None else lambda name, *_: progress(name)
        )
        self._state: DeviceState = empty_state(self.model, config, self._limits)
        drivers = Drivers(self.model, self._limits, merger(self.model, dtype, config.matmul_backend))
        self._programs = Programs(drivers, self._packer, config, self._parameters, self._state)
        self._cache = CacheManager(
            self._groups, self.num_pages, self._limits.page_size, prefix_caching=config.prefix_caching
        )
        self._scheduler = Scheduler(config, self._cache, max_model_len=self.max_model_len)
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
        return _Flight(plan, shape, outcome, dispatched_s)

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
        spec = kv_spec(self.model, self.config)
        owners = sum(len(group.layers) for group in self._groups)
        return {
            "model": str(self.model_dir.name),
            "architecture": self.model.architecture,
            "num_parameters": sum(int(p.size) for p in self._parameters),
            "parameter_bytes": sum(int(p.nbytes) for p in self._parameters),
            "vocab_size": self.model.vocab_size,
            "num_layers": len(self.model.layers),
            "q_heads": self.model.q_heads,
            "kv_heads": self.model.kv_heads,
            "head_dim": self.model.head_dim,
            "max_model_len": self.max_model_len,
            "has_tokenizer": self.tokenizer is not None,
            "dtype": self.config.dtype,
            "kv_bytes_per_token": owners * spec.token_bytes,
            "kv_dtype": jnp.dtype(spec.dtype).name,
            "page_size": spec.page_size,
            "page_groups": [
                {
                    "window": group.window,
                    "layers": list(group.layers),
                    "num_pages": pages - 1,
                    "page_bytes": spec.token_bytes * spec.page_size * len(group.layers),
                }
                for group, pages in zip(self._groups, self.num_pages, strict=True)
            ],
            "attention_backend": self._state.cache.layers[0].backend,
            "matmul_backend": self.config.matmul_backend,
            "programs": [str(shape) for shape in self._programs.declared()],
            "device": str(self._parameters[0].devices()).strip("{}"),
            "platform": jax.default_backend(),
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
        }

    def close(self) -> None:
        """Stop the watchdog and drop the device arrays."""
        self._watchdog.close()
        self._flight = None
        del self._state, self._parameters


def _check_kernels(model: ModelConfig, config: EngineConfig) -> None:
    """ConfigError where no kernel, or not the one asked for, takes this model's pages or weights."""
    try:
        attention.choose(kv_spec(model, config), backend=config.attention_backend, q_heads=model.q_heads)
    except BackendError as error:
        raise ConfigError(f"attention_backend={config.attention_backend}: {error}") from error
    case = {"rows": 1, "in_size": model.embed_size, "out_size": model.ffn_size, "format": "dense"}
    try:
        matmul.OP.choose(
            config.matmul_backend, **case, dtype=config.dtype, out_dtype=config.dtype, device=devices.current()
        )
    except BackendError as error:
        raise ConfigError(f"matmul_backend={config.matmul_backend}: {error}") from error


def _mix(value: int) -> int:
    """A 63-bit seed from any integer, well spread (SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
