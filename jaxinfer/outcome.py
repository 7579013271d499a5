"""What a call leaves behind: tokens, log-probabilities and endings, gathered on the device and read by the host.

Hides that all a host needs of most calls is one array.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.batch import NO_TOKEN
from jaxinfer.plan import StepResult
from jaxinfer.request import MAX_TOP_LOGPROBS


class Outcome(NamedTuple):
    """What a call tells the host. `main` is one buffer, so that one transfer answers the common case."""

    main: jax.Array  # i32[slots, 2 * steps + 2]: steps made, finished, tokens, log-probabilities (f32 bits)
    top_ids: jax.Array  # i32[steps, slots, MAX_TOP_LOGPROBS]
    top_logprobs: jax.Array  # f32[steps, slots, MAX_TOP_LOGPROBS]
    hidden: jax.Array | None = None  # of a mixed step: normed states [prefill_tokens, embed] of its prefill rows
    busy: jax.Array | None = None  # of a pipelined loop: i32[2], ticks times stages, and those that had work


class Report(NamedTuple):
    """`Outcome.main` on the host; the count comes first in every row, so that one slice holds all that is common."""

    steps: int  # steps made
    result: StepResult
    logprob_bits: np.ndarray  # i32[slots, steps]

    @classmethod
    def read(cls, main: np.ndarray) -> Report:
        """Of `Outcome.main`, or of the rows of it that are a data shard's."""
        steps, room = int(main[0, 0]), (main.shape[1] - 2) // 2
        rows = main[:, 1 : 2 + steps].tolist()
        finished = [row.pop(0) for row in rows]
        return cls(steps, StepResult(rows, finished), main[:, 2 + room :])


class Trace(NamedTuple):
    """The outcome while it is being gathered."""

    tokens: jax.Array  # i32[steps, slots]
    logprobs: jax.Array  # f32[steps, slots]
    top_ids: jax.Array
    top_logprobs: jax.Array
    finished: jax.Array  # i32[slots]


def empty_trace(steps: int, slots: int) -> Trace:
    """Nothing gathered yet."""
    return Trace(
        tokens=jnp.full((steps, slots), NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros((steps, slots), jnp.float32),
        top_ids=jnp.zeros((steps, slots, MAX_TOP_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((steps, slots, MAX_TOP_LOGPROBS), jnp.float32),
        finished=jnp.zeros(slots, jnp.int32),
    )


def pack(trace: Trace, steps: jax.Array) -> Outcome:
    """The outcome of a call that made `steps: i32[]` steps."""
    bits = lax.bitcast_convert_type(trace.logprobs, jnp.int32)
    rows = jnp.stack([jnp.full_like(trace.finished, steps), trace.finished])
    return Outcome(jnp.concatenate([rows, trace.tokens, bits]).T, trace.top_ids, trace.top_logprobs)


def put_step(trace: jax.Array, step: jax.Array, row: jax.Array, first: jax.Array | int) -> jax.Array:
    """`trace [steps, slots, ...]` with `row [n, ...]` at a step, of the slots from `first` on, if there is such."""
    if isinstance(first, int):
        return trace.at[step].set(row)
    return trace.at[step, first + jnp.arange(row.shape[0])].set(row, mode="drop")
