"""Stages of a pipeline: what a device knows of its stage, and how a stream of activations goes from stage to stage.

Hides the permutations between stages. Every stage runs the same program, each tick on a micro-batch of its own (GPipe,
Huang et al. 2019, arXiv 1811.06965); `micro_batch` says which. With one stage everything is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Pipeline:
    """`stages` stages along mesh axes `axes`, and as many micro-batches."""

    axes: tuple[str, ...] = ()
    stages: int = 1

    @property
    def stage(self) -> jax.Array | int:
        """This device's."""
        return lax.axis_index(self.axes) if self.stages > 1 else 0

    def micro_batch(self, tick: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(which micro-batch, its how-manieth pass) this stage works on at `tick: i32[]`; a negative pass: none yet."""
        since = tick - self.stage
        return since % self.stages, since // self.stages

    def leaving(self, tick: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same of the last stage: what leaves the pipeline."""
        since = tick - (self.stages - 1)
        return since % self.stages, since // self.stages

    def fill_ticks(self) -> int:
        """Ticks after which the first micro-batch leaves, less one: each stage idles that often."""
        return self.stages - 1

    def first_or(self, first: Any, received: Any) -> Any:
        """`first` in the first stage, what was received in the others; pytrees of equal shapes."""
        return jax.tree.map(lambda a, b: jnp.where(self.stage == 0, a, b), first, received)

    def pass_on(self, stream: Any) -> Any:
        """What the stage before sends; zeros in the first stage."""
        onwards = [(stage, stage + 1) for stage in range(self.stages - 1)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, onwards), stream)

    def of_last(self, stream: Any) -> Any:
        """The last stage's, everywhere."""
        mine = self.stage == self.stages - 1
        return jax.tree.map(lambda x: lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), self.axes), stream)

    def sum(self, x: jax.Array) -> jax.Array:
        """Over the stages."""
        return lax.psum(x, self.axes) if self.stages > 1 else x


UNSTAGED = Pipeline()
