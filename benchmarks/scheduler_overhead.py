"""Host time of one plan + apply at steady decoding, without a device: `python benchmarks/scheduler_overhead.py`.

Prints the CPU time of the calling thread per loop call, in microseconds; the host's budget per call is 300 with 16
slots and 1000 with 256, everything included.
"""

from __future__ import annotations

import time

import numpy as np

from jaxinfer.cache import CacheManager
from jaxinfer.config import EngineConfig, KVShape, PageGroup
from jaxinfer.plan import StepResult
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sharded_scheduler import ShardedScheduler

PAGE_SIZE = 32


def steady_decoding(
    num_slots: int, windows: tuple[int | None, ...], num_steps: int, num_calls: int = 120
) -> list[float]:
    """Seconds per plan + apply while all slots decode `num_steps` tokens per call."""
    config = EngineConfig(max_num_seqs=num_slots, max_num_batched_tokens=8192, max_prefill_seqs=num_slots)
    groups = [PageGroup(window, KVShape(1, 2), (index,)) for index, window in enumerate(windows)]
    cache = CacheManager(groups, [num_slots * 70] * len(windows), PAGE_SIZE)
    scheduler = ShardedScheduler(config, [cache], max_model_len=2048)
    rng = np.random.default_rng(0)
    for index in range(num_slots):
        prompt = tuple(rng.integers(0, 1000, 12 + index % PAGE_SIZE).tolist())  # page boundaries spread over the calls
        scheduler.add(Request(str(index), prompt, SamplingParams(max_tokens=2000)), seeds=[0])
    seconds, flight = [], None
    for _ in range(num_calls):
        start = time.thread_time()
        plans = scheduler.plan(max_steps=num_steps)
        planned = time.thread_time() - start
        assert plans is not None and plans[0] is not None
        plan = plans[0]
        running = {slot for slot, _ in plan.running}
        tokens = [[7 if slot in running else -1] * plan.num_steps for slot in range(num_slots)]
        start = time.thread_time()
        if flight is not None:
            scheduler.apply(*flight)
        if not plan.chunks:
            seconds.append(planned + time.thread_time() - start)
        flight = (plans, [StepResult(tokens, [0] * num_slots)])
    return seconds[4:]


def main() -> None:
    print(f"{'slots':>6} {'steps':>6} {'groups':>7} {'median us':>10} {'p95 us':>8}")
    for num_slots in (16, 256):
        for num_steps in (1, 4, 16):
            for windows in ((None,), (None, 512)):
                us = np.array(steady_decoding(num_slots, windows, num_steps)) * 1e6
                median, p95 = np.percentile(us, (50, 95))
                print(f"{num_slots:6} {num_steps:6} {len(windows):7} {median:10.0f} {p95:8.0f}")


if __name__ == "__main__":
    main()
