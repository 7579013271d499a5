"""One timed start of an engine, in its own process: options as JSON on stdin, times as JSON on stdout.

Imports nothing heavy before the clock of the import phase is read.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> int:
    """Read {"model", "config", "measure"}; write epoch seconds at the end of each phase, and a report when asked to."""
    order = json.load(sys.stdin)
    from jaxinfer.config import EngineConfig
    from jaxinfer.engine import Engine
    from jaxinfer.request import Request, SamplingParams

    ends = {"import": time.time()}
    engine = Engine(order["model"], EngineConfig(**order["config"]))
    ends["load"] = time.time()
    engine.warm_up()
    ends["compile"] = time.time()
    tokens = tuple(i % engine.model.vocab_size for i in range(1, 17))
    engine.add(Request("first", tokens, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
    while engine.has_work():
        for event in engine.step():
            if event.token_ids:
                ends["first_token"] = time.time()
    answer: dict[str, Any] = {"ends": ends, "compiles_after_warmup": engine.stats().compiles_after_warmup}
    if order["measure"]:
        from serving.bench_latency import measure_latency

        answer["report"] = measure_latency(
            engine, input_len=min(128, engine.max_model_len // 2), output_len=min(32, engine.max_model_len // 4)
        )
    engine.close()
    json.dump(answer, sys.stdout, default=float)
    return 0


if __name__ == "__main__":
    sys.exit(main())
