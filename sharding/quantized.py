"""How the arrays of a quantized weight are split: values like the weight, scales and zeros by group and output."""

from __future__ import annotations

from jax.sharding import NamedSharding, PartitionSpec, Sharding


def leaf_shardings(weight: Sharding, ndim: int, num_groups: int) -> tuple[Sharding, Sharding, Sharding]:
    """Shardings of the values `[..., out, in]`, and of scales and of zero points `[..., groups, out]`.

    `weight` is that of the weight, of `ndim` dimensions. The only group there is belongs to every shard of the inputs;
    several are split like these. Raises TypeError for a sharding that names no axes and has several parts.
    """
    if weight.is_fully_replicated:
        return weight, weight, weight
    named = _named(weight)
    *leading, outputs, inputs = _axes(named, ndim)
    spec = PartitionSpec(*leading, inputs if num_groups > 1 else None, outputs)
    per_group = NamedSharding(named.mesh, spec, memory_kind=named.memory_kind)
    return named, per_group, per_group


def _named(weight: Sharding) -> NamedSharding:
    if not isinstance(weight, NamedSharding):
        raise TypeError(f"a quantized weight is split by a NamedSharding, not by {weight}")
    return weight


def _axes(sharding: NamedSharding, ndim: int) -> list[str | tuple[str, ...] | None]:
    """Mesh axes of each dimension; a spec may leave out the last ones."""
    spec = list(sharding.spec)
    return [*spec, *([None] * (ndim - len(spec)))]
