"""The engine: requests in, TokenEvents out, one `step()` at a time.

It keeps one device call in flight while it plans the next, and reads a result only after the next call was
dispatched. It hides recovery: a failed call costs time (state reallocated, sequences recomputed), not requests.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import fingerprints, scoring
from jaxinfer.batch import DeviceState
from jaxinfer.blueprint import Blueprint
from jaxinfer.cache import CacheManager
from jaxinfer.chat import ChatTemplate
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.engine_info import describe
from jaxinfer.engine_stats import EngineStats
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.outcome import Outcome, Report
from jaxinfer.output import CompletionStream, Logprobs
from jaxinfer.placement import check_spans_hosts, mesh_of
from jaxinfer.plan import Plan, Sequence
from jaxinfer.programs import Programs, Shape, enable_compilation_cache
from jaxinfer.request import FinishReason, Request, RequestError, TokenEvent
from jaxinfer.runner import Runner
from jaxinfer.sharded_scheduler import ShardedScheduler
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.watchdog import Watchdog
from sharding.control import Message
from sharding.group import Group
from sharding.host_arrays import from_devices

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3  # after which the sequences of the failing call end with an error


Plans = tuple[Plan | None, ...]  # of one call: a plan per data shard


@dataclass
class _Flight:
    """A device call whose result was not read yet."""

    plans: Plans
    shape: Shape
    outcome: Outcome
    dispatched_s: float
    scoring: scoring.Scoring | None = None


class Engine:
    """Serves one model on one device or mesh. Not thread-safe: one thread owns it, but for `check_request`."""

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: Callable[[str], None] | None = None,
        devices: Seq[jax.Device] | None = None,
        group: Group | None = None,
    ):
        """Load the weights and allocate the pages; `warm_up` compiles.

        `devices`: those to use, `config.mesh` of them (default: the first there are). `group`: of hosts that make one
        engine each, over one mesh; the first one's serves, the others' `follow`.
        Raises ConfigError or CheckpointError, naming what is wrong with the directory or the options.
        """
        self.config = config = EngineConfig() if config is None else config
        self.model_dir = Path(model_dir)
        self.model: ModelConfig = load_config(self.model_dir)
        self.tokenizer = Tokenizer.load(self.model_dir)
        self.chat_template = ChatTemplate.load(self.model_dir)
        enable_compilation_cache(config)
        self.blueprint = blueprint = Blueprint(self.model, config, mesh_of(self.model, config, devices))
        self.max_model_len, self.num_pages = blueprint.max_model_len, blueprint.limits.num_pages
        if group is not None:
            check_spans_hosts(blueprint.mesh, group.size)
            group.agree(fingerprints.facts(self.model_dir, config))
            limits = {"num_pages": self.num_pages, "max_model_len": self.max_model_len}
            group.agree(limits, "kv_memory_bytes and max_model_len set them")
        if config.invariant:
            log.info("invariant=True: bits do not depend on the batch; benchmarks/invariance.py measures the cost")
        loaded = load_parameters(
            self.model_dir,
            self.model,
            jnp.dtype(config.dtype),
            placed=blueprint.placed,
            progress=None if progress is None else lambda name, *_: progress(name),
        )
        self._group = group
        self._runner = Runner(blueprint, tuple(jax.tree.leaves(loaded)), group)
        caches = [
            CacheManager(
                blueprint.groups,
                self.num_pages,
                blueprint.limits.page_size,
                prefix_caching=config.prefix_caching,
                context=blueprint.parallel.context,
            )
            for _ in range(blueprint.parallel.data)
        ]
        self._scheduler = ShardedScheduler(
            config, caches, max_model_len=self.max_model_len, length_rule=self.model.length_rule
        )
        self._watchdog = Watchdog(config.watchdog_s)
        self._streams: dict[int, CompletionStream] = {}  # by sequence id
        self._sequences: dict[str, list[Sequence]] = {}  # by request id, unfinished ones
        self._ended: list[TokenEvent] = []  # events of completions the host ended
        self._flight: _Flight | None = None
        self._num_requests = self._failures_in_a_row = 0
        self._counters = dict.fromkeys(("calls", "failed", "prompt", "cached", "generated"), 0)
        self._num_dispatched = 0
        self._stage_ticks = np.zeros(2, np.int64)  # of pipelined loops: all, and those that had work
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
        plans = self._scheduler.plan(max_steps=self._loop_length())
        flight, failure = None, None
        if plans is not None:
            try:
                flight = self._dispatch(plans)
            except Exception as error:  # the plans count as in flight: whatever it is, recover
                failure = (error, plans)
        events: list[TokenEvent] = []
        last, self._flight = self._flight, flight
        if last is not None and failure is None:
            waiting = time.perf_counter()
            try:
                with self._watchdog.watch(str(last.shape)):
                    main = from_devices(last.outcome.main)
                    self._read_scoring(last)
            except Exception as error:
                failure = (error, last.plans)
            else:
                waited = time.perf_counter() - waiting
                events += self._apply(last, main)
        if failure is not None:
            self._recover(*failure)
        if self._ended:
            events += self._ended
            self._ended = []
        if last is not None or plans is not None:
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

    def _dispatch(self, plans: Plans) -> _Flight:
        active = [plan for plan in plans if plan is not None]
        prefill_tokens = max(sum(chunk.length for chunk in plan.chunks) for plan in active)
        shape = self.programs.shape_for(max(plan.num_slots for plan in active), prefill_tokens)
        self._runner.prepare(shape)  # compiled here, it does not count as the call's time
        buffers = self._runner.pack(plans)
        dispatched_s = time.perf_counter()
        call = self._num_dispatched = self._num_dispatched + 1
        outcome = self._runner.step(shape, buffers, call)
        if self._copies_early:
            outcome.main.copy_to_host_async()
        scores = None
        if shape.prefill_tokens:
            scores = scoring.dispatch(
                plans, shape.prefill_tokens, lambda name, *arguments: self._runner.read(name, call, arguments)
            )
        return _Flight(plans, shape, outcome._replace(hidden=None), dispatched_s, scores)

    def _read_scoring(self, flight: _Flight) -> None:
        """Take what prompts were scored for; who cannot have it ends, before the call's other results are applied."""
        for sequence, error in flight.scoring.read(self._streams) if flight.scoring is not None else ():
            self._scheduler.finish(sequence, FinishReason.ERROR)
            self._end(sequence, FinishReason.ERROR, error)

    def _apply(self, flight: _Flight, main: np.ndarray) -> list[TokenEvent]:
        slots = len(main) // len(flight.plans)
        reports = [Report.read(main[shard * slots :][:slots]) for shard in range(len(flight.plans))]
        self._measure(flight, max(report.steps for report in reports))
        self._counters["calls"] += 1
        self._failures_in_a_row = 0
        if flight.outcome.busy is not None:
            self._stage_ticks += from_devices(flight.outcome.busy)
        results = [None if plan is None else r.result for plan, r in zip(flight.plans, reports, strict=True)]
        events = []
        for shard, updates in enumerate(self._scheduler.apply(flight.plans, results)):
            top = flight.outcome.top_ids, flight.outcome.top_logprobs
            logprobs = Logprobs(reports[shard].logprob_bits, *top, first_slot=shard * slots)
            for update in updates:
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

    def _recover(self, error: Exception, plans: Plans) -> None:
        """The donated state is gone: allocate it anew and replay the running sequences from the host's tokens.

        HostLostError where the call failed because a host is gone: its part of the weights is.
        """
        if self._group is not None:
            self._group.check_after(error)
        self._counters["failed"] += 1
        self._failures_in_a_row += 1
        log.error("device call failed (%d in a row), replaying: %s", self._failures_in_a_row, error)
        self._flight = None
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            named = [
                s for plan in plans if plan for s in (*(s for _, s in plan.running), *(c.sequence for c in plan.chunks))
            ]
            for sequence in {id(sequence): sequence for sequence in named}.values():
                if sequence.seq_id in self._streams:
                    self._scheduler.finish(sequence, FinishReason.ERROR)
                    text = f"the device call failed {self._failures_in_a_row} times in a row; the server's log says how"
                    self._end(sequence, FinishReason.ERROR, text)
        self._scheduler.reset_device()
        self._runner.reset(f"{type(error).__name__}: {error}")

    def follow(self, message: Message) -> Any:
        """On a host other than the first: make the device call that the first one makes; what to wait for."""
        return self._runner.obey(message)

    # ---- start and inspection

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile the declared programs; from then on a compile is a counted, logged event."""
        self._runner.warm_up(progress)
        gc.collect()
        gc.freeze()  # what lives now lives long; collections in the loop need not walk it (up to 20 ms each)

    def check(self) -> None:
        """AssertionError when a page or slot leaked. Call it when idle."""
        self._scheduler.check()  # the cache's books included
        if not self.has_work():
            used = [usage.used for usage in self._scheduler.usage()]
            assert not any(used), f"pages in use while idle, per group: {used}"
            assert not self._streams, f"sequences never ended: {sorted(self._streams)}"

    def stats(self) -> EngineStats:
        usage = self._scheduler.usage()
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
            pages_total=tuple(u.total for u in usage),
            pages_used=tuple(u.used for u in usage),
            pages_cached=tuple(u.cached for u in usage),
            compiles_after_warmup=self.programs.compiles_after_warmup,
            pipeline_bubble=1 - float(self._stage_ticks[1] / self._stage_ticks[0]) if self._stage_ticks[0] else 0.0,
        )

    def info(self) -> dict[str, Any]:
        """What runs here, as JSON: the model, effective options, memory, kernels, versions."""
        return describe(self)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights as they are held, once however many devices hold them."""
        return sum(int(array.nbytes) for array in self._runner.parameters)

    @property
    def programs(self) -> Programs:
        """The compiled programs."""
        return self._runner.programs

    @property
    def device_state(self) -> DeviceState:
        """What lies on the device between calls; the next call takes it."""
        return self._runner.state

    def close(self) -> None:
        """Stop the watchdog, end the chat template's process and drop the device arrays."""
        self._watchdog.close()
        if self.chat_template is not None:
            self.chat_template.close()
        self._flight = None
        self._runner.close()


def _mix(value: int) -> int:
    """A 63-bit seed from any integer, well spread (SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
