"""What a layer asks of the devices it is split over, by logical axis; on one device every answer is the identity.

Hides collectives, which devices they join, the order of tokens under sequence parallelism, and rings in which a
product is computed while the next operand is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.mesh import DeviceMesh
from sharding.rules import RULES

RING_ROWS = 64  # per device and step: below that, launching a piece costs more than its transfer


@dataclass(frozen=True, eq=False)
class Shards:
    """The devices that share a layer. `split_tokens`: between its parts, each holds a run of the tokens of its own.

    That is sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2): norms and residuals are
    computed once, not by every device, and an all-reduce becomes a gather and a scatter of half its bytes each.
    """

    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # logical axis -> mesh axes; absent: whole
    counts: Mapping[str, int] = field(default_factory=dict)  # mesh axis -> devices along it
    split_tokens: bool = False
    ring_rows: int = RING_ROWS

    # ---- sizes and places

    def names(self, axis: str) -> tuple[str, ...]:
        """Mesh axes of a logical axis."""
        return self.axes.get(axis, ())

    def count(self, axis: str) -> int:
        """Into how many parts a logical axis is split."""
        number = 1
        for name in self.names(axis):
            number *= self.counts[name]
        return number

    def index(self, axis: str) -> jax.Array | int:
        """Which part this device has."""
        names = self.names(axis)
        return lax.axis_index(names) if names else 0

    # ---- reductions

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """The sum of all parts' `x`."""
        names = self.names(axis)
        return lax.psum(x, names) if names else x

    def max(self, x: jax.Array, axis: str) -> jax.Array:
        """The largest of all parts' `x`."""
        names = self.names(axis)
        return lax.pmax(x, names) if names else x

    def once(self, x: jax.Array, axis: str) -> jax.Array:
        """`x` on the first part, zeros on the others: what a sum over the parts must count once."""
        return x if not self.names(axis) else jnp.where(self.index(axis) == 0, x, jnp.zeros_like(x))

    def columns(self, x: jax.Array, axis: str) -> jax.Array:
        """`x [tokens, part]` of every part, side by side: `[tokens of this device's run, whole]`."""
        names = self.names(axis)
        if not names:
            return x
        if self.token_shards > 1 and names == self.names("heads"):
            return lax.all_to_all(x, names, split_axis=0, concat_axis=1, tiled=True)
        return self.own_tokens(lax.all_gather(x, names, axis=1, tiled=True))

    # ---- tokens

    @property
    def token_shards(self) -> int:
        """Into how many runs the tokens between a layer's parts are split."""
        return self.count("heads") if self.split_tokens else 1

    def own_tokens(self, x: jax.Array) -> jax.Array:
        """Of `x [tokens, ...]` this device's run."""
        if self.token_shards == 1:
            return x
        size = x.shape[0] // self.token_shards
        return lax.dynamic_slice_in_dim(x, self.index("heads") * size, size)

    def all_tokens(self, x: jax.Array) -> jax.Array:
        """`x [tokens of this device's run, ...]` of all of them: `[tokens, ...]`."""
        if self.token_shards == 1:
            return x
        return lax.all_gather(x, self.names("heads"), axis=0, tiled=True)

    def entering(self, x: jax.Array, function: Callable[[jax.Array], Any]) -> Any:
        """`function` of all tokens, from each device's run `x [tokens, ...]`; row by row, it may be called in pieces.

        Devices call it for different rows at a time: it has no collective in it.
        In a ring, the next run arrives while this one is multiplied (Wang et al. 2023, doi 10.1145/3567955.3567959).
        """
        count = self.token_shards
        if count == 1 or count % 2 or x.shape[0] < self.ring_rows:
            return function(self.all_tokens(x))
        return self._gathered(x, function)

    def leaving(self, x: Any, function: Callable[[Any], jax.Array], axis: str) -> jax.Array:
        """The sum over the parts of `axis` of `function(x)`, row by row as in `entering`; each device gets its run.

        `x [tokens, ...]`, or several such arrays -> `[tokens of this device's run, ...]`, or all of them where tokens
        are not split.
        """
        count = self.token_shards
        if count == 1:
            return self.sum(function(x), axis)
        names = self.names(axis)
        assert names == self.names("heads"), f"{axis} is split over {names}, tokens over {self.names('heads')}"
        rows = jax.tree.leaves(x)[0].shape[0] // count
        if count % 2 or rows < self.ring_rows:
            return lax.psum_scatter(function(x), names, scatter_dimension=0, tiled=True)
        return self._scattered(x, function, rows)

    def scatter_tokens(self, partial: jax.Array) -> jax.Array:
        """The sum over the tensor group of `partial [tokens, ...]`; each device gets its run."""
        names = self.names("heads")
        if not names:
            return partial
        if self.token_shards == 1:
            return lax.psum(partial, names)
        return lax.psum_scatter(partial, names, scatter_dimension=0, tiled=True)

    @property
    def _ring(self) -> tuple[tuple[str, ...], list[tuple[int, int]], list[tuple[int, int]]]:
        """Mesh axes, and the permutations to the next device and to the one before."""
        count = self.token_shards
        forward = [(device, (device + 1) % count) for device in range(count)]
        return self.names("heads"), forward, [(target, source) for source, target in forward]

    def _gathered(self, x: jax.Array, function: Callable[[jax.Array], Any]) -> Any:
        """Runs come round the ring both ways, and a run from each side is multiplied while the next two travel.

        A loop, not as many copies of `function` as there are devices: programs stay small.
        """
        (axes, forward, backward), me, rows = self._ring, self.index("heads"), x.shape[0]
        count = self.token_shards

        def multiplied(step: Any, pair: jax.Array, whole: Any) -> Any:
            """`whole` with what becomes of the runs `step` places ahead and `step + 1` behind: `pair`."""
            return jax.tree.map(
                lambda out, part: _put(
                    _put(out, part[:rows], (me + step) % count), part[rows:], (me - 1 - step) % count
                ),
                whole,
                function(pair),
            )

        def turn(step: jax.Array, carry: Any) -> Any:
            pair, whole = carry
            following = [lax.ppermute(pair[:rows], axes, backward), lax.ppermute(pair[rows:], axes, forward)]
            return jnp.concatenate(following), multiplied(step, pair, whole)

        pair = jnp.concatenate([x, lax.ppermute(x, axes, forward)])
        whole = jax.tree.map(
            lambda part: jnp.zeros((rows * count, *part.shape[1:]), part.dtype), jax.eval_shape(function, pair)
        )
        last = count // 2 - 1
        pair, whole = lax.fori_loop(0, last, turn, (pair, whole))
        return multiplied(last, pair, whole)

    def _scattered(self, x: Any, function: Callable[[Any], jax.Array], rows: int) -> jax.Array:
        """A run's sum travels once round the ring, in halves that go opposite ways, while the next is multiplied."""
        (axes, forward, backward), me, count, half = self._ring, self.index("heads"), self.token_shards, rows // 2

        def pieces(step: Any) -> tuple[jax.Array, jax.Array]:
            """This device's share of the two halves that are here at a step."""
            first, second = (me - 1 - step) % count * rows, (me + 1 + step) % count * rows + half

            def both(x: jax.Array) -> jax.Array:
                parts = (first, half), (second, rows - half)
                return jnp.concatenate([lax.dynamic_slice_in_dim(x, start, size) for start, size in parts])

            product = function(jax.tree.map(both, x))
            return product[:half], product[half:]

        def turn(step: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first, second = pieces(step)
            return lax.ppermute(sums[0], axes, forward) + first, lax.ppermute(sums[1], axes, backward) + second

        return jnp.concatenate(lax.fori_loop(1, count, turn, pieces(0)))


def _put(whole: jax.Array, run: jax.Array, index: jax.Array) -> jax.Array:
    """`run [rows, ...]` at the `index`-th place of `whole`."""
    return lax.dynamic_update_slice_in_dim(whole, run, index * run.shape[0], axis=0)


ALONE = Shards()


def shards_of(mesh: DeviceMesh | None, kv_axes: Iterable[str], *, split_tokens: bool = False) -> Shards:
    """What the layers of a model may ask on a mesh; `kv_axes`: its logical axes "kv_heads/N"."""
    if mesh is None:
        return ALONE
    names = (*RULES, *kv_axes)
    return Shards(
        axes={axis: mesh.axes_of(axis) for axis in names},
        counts=dict(mesh.mesh.shape),
        split_tokens=split_tokens and mesh.config.group > 1,
    )
