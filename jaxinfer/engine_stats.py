"""What an engine counts: the one record that `Engine.stats()`, benchmarks and servers read."""

from __future__ import annotations

from dataclasses import dataclass


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
    pipeline_bubble: float  # share of pipeline stages' ticks without work, of decode loops; 0 without a pipeline
