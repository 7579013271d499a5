"""Functions that layers call alike: what depends on the batch alone is in a program once, not once per layer.

Hides how a traced function is taken apart. A compiler would find the common parts too, after it has converted,
partitioned and simplified all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, Var, jaxpr_as_fun


class SharedWork:
    """Of one program, while it is traced."""

    def __init__(self) -> None:
        self._done: dict[Any, tuple[tuple[jax.Array, ...], list[jax.Array]]] = {}  # with what keeps ids from others

    def call(self, function: Any, shared: Any, *own: Any, **options: Any) -> Any:
        """`function(shared, *own, **options)`; `function` is a `jax.jit`, traced once for all calls that are alike.

        What it computes from `shared` alone, a pytree of arrays, comes from the first such call with the same arrays.
        """
        traced = function.trace(shared, *own, **options)
        arrays = tuple(jax.tree.leaves(shared))
        before, after = _halves(traced.jaxpr, len(arrays))
        key = (before, *map(id, arrays))
        if key not in self._done:
            self._done[key] = (arrays, before(*arrays))
        results = after(*self._done[key][1], *jax.tree.leaves(own))
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)


@functools.lru_cache(maxsize=64)
def _halves(traced: ClosedJaxpr, num_shared: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What only needs the first arguments, and from its results and the other arguments all the rest."""
    jaxpr = traced.jaxpr
    first, others = jaxpr.invars[:num_shared], jaxpr.invars[num_shared:]
    known, early, late = {*jaxpr.constvars, *first}, [], []
    for equation in jaxpr.eqns:
        if not equation.effects and known.issuperset(_variables(equation.invars)):
            early.append(equation)
            known |= set(equation.outvars)
        else:
            late.append(equation)
    needed = [*(v for equation in late for v in _variables(equation.invars)), *_variables(jaxpr.outvars)]
    passed = [v for v in dict.fromkeys(needed) if v in known]
    names = jaxpr.debug_info.with_unknown_names()
    before = jaxpr.replace(invars=first, outvars=passed, eqns=early, debug_info=names)
    after = jaxpr.replace(constvars=[], invars=[*passed, *others], eqns=late, debug_info=names)
    return _inlined(ClosedJaxpr(before, traced.consts)), _inlined(ClosedJaxpr(after, []))


def _inlined(jaxpr: ClosedJaxpr) -> Callable[..., Any]:
    return jax.jit(jaxpr_as_fun(jaxpr), inline=True)


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]
