"""Rotary embedding from config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` before.

Hides the names a scaling's fields have had, their defaults, and that a model may have one rope for each type of layer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.models.hugging_face import Fields
from jaxinfer.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0


def read_rope(
    fields: Fields,
    head_dim: int,
    max_position: int,
    *,
    may_be_partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    default: Mapping[str, Any] | None = None,
) -> tuple[RopeSpec, int]:
    """The one rope of all layers, and the positions it reaches: `linear`, `dynamic` and `yarn` stretch the context.

    may_be_partial: the architecture turns only `partial_rotary_factor` of a head. aliases: names that its files have
    for a scaling -> the name it has here. default: what an absent object holds, and an absent `rope_theta` is.
    """
    absent = dict(default or {})
    default_theta = absent.pop("rope_theta", DEFAULT_THETA)
    inner = _one_table(fields) or Fields(absent, "rope_parameters.")
    theta = _theta(fields, inner, default_theta)
    partial = _same(fields, inner, "partial_rotary_factor", 1.0)
    if partial != 1.0 and not may_be_partial:
        raise ConfigError(f"partial_rotary_factor={partial} is not supported; supported: 1.0")
    kind = _kind(inner, KINDS, aliases or {})
    rotary_dim = rotated(partial, head_dim)
    scaling = _scaling(kind, fields, inner, rotary_dim, max_position)
    if scaling is None:
        fields.skip("original_max_position_embeddings")  # of Phi-3 and Phi-4, which counts with a scaling only
    inner.finish()
    match scaling:
        case LinearScaling() | DynamicScaling():
            max_position = _stretched(inner, max_position, scaling.factor)
        case YarnScaling():
            max_position = max(max_position, _stretched(inner, scaling.original_max_position, scaling.factor))
    return RopeSpec(theta, scaling, None if rotary_dim == head_dim else rotary_dim), max_position


def read_ropes(
    fields: Fields, head_dims: Mapping[str, int], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, RopeSpec]:
    """One rope per type of layer, from `rope_parameters` with an object for each type, or from older files' fields.

    head_dims: by type; defaults: what an absent object holds. Older files: `rope_theta` and `rope_scaling` for
    full_attention, `rope_local_base_freq` for sliding_attention. `proportional` (Gemma 4) turns some pairs only.
    """
    parameters = fields.table("rope_parameters")
    scaling = fields.get("rope_scaling")
    tables = {kind: dict(table) for kind, table in defaults.items()}
    if parameters is None:
        for name, kind in (("rope_theta", "full_attention"), ("rope_local_base_freq", "sliding_attention")):
            tables[kind]["rope_theta"] = fields.number(name, tables[kind]["rope_theta"])
        if scaling is not None:
            if not isinstance(scaling, dict):
                raise ConfigError(f"rope_scaling={scaling!r} must be an object")
            tables["full_attention"] |= scaling
    else:
        fields.fixed({"rope_theta": None, "rope_local_base_freq": None, "rope_scaling": None})
        for kind in tables:
            given = parameters.get(kind)
            if given is not None:
                if not isinstance(given, dict):
                    raise ConfigError(f"rope_parameters.{kind}={given!r} must be an object")
                tables[kind] = {"rope_theta": defaults[kind]["rope_theta"]} | given
        parameters.finish()
    return {
        kind: _typed_rope(kind, Fields(table, f"rope_parameters.{kind}."), head_dims[kind])
        for kind, table in tables.items()
    }


def rotated(partial: float, head_dim: int) -> int:
    """Dimensions of a head that turn, of `partial_rotary_factor`."""
    rotary_dim = int(head_dim * min(max(partial, 0.0), 1.0))
    if not 0 < partial <= 1 or rotary_dim % 2 or rotary_dim < 2:
        raise ConfigError(
            f"partial_rotary_factor={partial} of head_dim={head_dim} must make an even number of dimensions from 2 to "
            f"{head_dim}, not {rotary_dim}"
        )
    return rotary_dim


def _typed_rope(kind: str, inner: Fields, head_dim: int) -> RopeSpec:
    theta = _positive(inner, "rope_theta")
    name = _kind(inner, ("default", "linear", "proportional"), {})
    scaling = LinearScaling(_positive(inner, "factor", 1.0)) if inner.get("factor") is not None else None
    partial = inner.number("partial_rotary_factor", 1.0)
    inner.finish()
    if name == "default" and scaling is not None:
        raise ConfigError(f"rope_parameters.{kind}.factor={scaling.factor} needs rope_type linear or proportional")
    if name == "linear" and scaling is None:
        raise ConfigError(f"rope_parameters.{kind}.factor is missing")
    if name != "proportional":
        rotary_dim = rotated(partial, head_dim)
        return RopeSpec(theta, scaling, None if rotary_dim == head_dim else rotary_dim)
    if not 0 <= partial <= 1:
        raise ConfigError(f"{inner.prefix}partial_rotary_factor={partial} must be from 0 to 1")
    return RopeSpec(theta, scaling, num_turning=int(partial * head_dim // 2))


def _one_table(fields: Fields) -> Fields | None:
    tables = {name: fields.table(name) for name in ("rope_parameters", "rope_scaling")}
    given = {name: table for name, table in tables.items() if table is not None}
    if len(given) == 2 and fields.get("rope_parameters") != fields.get("rope_scaling"):
        raise ConfigError(
            f"rope_parameters={fields.get('rope_parameters')} and rope_scaling={fields.get('rope_scaling')} differ"
        )
    return next(iter(given.values()), None)


def _theta(fields: Fields, inner: Fields, default: float) -> float:
    theta = _same(fields, inner, "rope_theta", default)
    if theta <= 0:
        raise ConfigError(f"rope_theta={theta} must be positive")
    return theta


def _same(fields: Fields, inner: Fields, name: str, default: float) -> float:
    """A number that may stand in config.json itself, in the rope's object, or in both and then is one."""
    outer_value = fields.number(name, default)
    value = inner.number(name, outer_value)
    if value != outer_value and fields.get(name) is not None:
        raise ConfigError(f"{name}={outer_value} and {inner.prefix}{name}={value} differ")
    return value


def _kind(inner: Fields, kinds: tuple[str, ...], aliases: Mapping[str, str]) -> str:
    """`rope_type`, which older files call `type`."""
    named = {name: inner.get(name) for name in ("rope_type", "type")}
    found = {name: aliases.get(kind, kind) for name, kind in named.items() if isinstance(kind, str)}
    for name, kind in named.items():
        if kind is not None and found.get(name) not in kinds:
            raise ConfigError(f"{inner.prefix}{name}={kind!r} is not supported; supported: {', '.join(kinds)}")
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"{inner.prefix}rope_type={named['rope_type']!r} and {inner.prefix}type={named['type']!r} differ"
        )
    return next(iter(found.values()), "default")


def _scaling(kind: str, fields: Fields, inner: Fields, rotary_dim: int, max_position: int) -> RopeScaling | None:
    match kind:
        case "linear":
            return LinearScaling(_positive(inner, "factor"))
        case "dynamic":
            original = inner.integer("original_max_position_embeddings", max_position)
            if original != max_position:
                raise ConfigError(
                    f"{inner.prefix}original_max_position_embeddings={original} must be max_position_embeddings="
                    f"{max_position} with rope_type dynamic"
                )
            factor = _positive(inner, "factor")
            if factor < 1 or rotary_dim < 4:
                raise ConfigError(f"{inner.prefix}factor={factor} must be at least 1, and 4 dimensions rotated")
            return DynamicScaling(factor, original)
        case "llama3":
            return _llama3(inner)
        case "yarn":
            return _yarn(fields, inner, max_position)
        case "longrope":
            return _longrope(fields, inner, rotary_dim // 2, max_position)
    return None


def _llama3(inner: Fields) -> Llama3Scaling:
    factor = _positive(inner, "factor")
    original = inner.integer("original_max_position_embeddings")
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=_positive(inner, "low_freq_factor"),
        high_freq_factor=_positive(inner, "high_freq_factor"),
        original_max_position=original,
    )
    if original < 1:
        raise ConfigError(f"{inner.prefix}original_max_position_embeddings={original} must be positive")
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"{inner.prefix.rstrip('.')}: high_freq_factor={scaling.high_freq_factor} must be over "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


def _yarn(fields: Fields, inner: Fields, max_position: int) -> YarnScaling:
    original = _original_context(fields, inner, max_position)
    factor = _positive(inner, "factor", max_position / original)
    attention_factor = inner.get("attention_factor")
    mscale, of_all = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
    if attention_factor is not None:
        attention_factor = _positive(inner, "attention_factor")
    elif mscale and of_all:
        attention_factor = _temperature(factor, mscale) / _temperature(factor, of_all)
    else:
        attention_factor = _temperature(factor, 1.0)
    return YarnScaling(
        factor,
        original,
        attention_factor,
        beta_fast=_positive(inner, "beta_fast", 32.0),
        beta_slow=_positive(inner, "beta_slow", 1.0),
        truncate=inner.boolean("truncate", True),
    )


def _temperature(factor: float, scale: float) -> float:
    """Section 3.4 of the YaRN paper: the root of the attention temperature's inverse."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(fields: Fields, inner: Fields, num_pairs: int, max_position: int) -> LongScaling:
    original = _original_context(fields, inner, max_position)
    factor = _positive(inner, "factor", max_position / original)
    if original < 2:
        raise ConfigError(f"original_max_position_embeddings={original} must be at least 2 with rope_type longrope")
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (_positives(inner, name, num_pairs) for name in ("short_factor", "long_factor"))
    return LongScaling(short, long, original, _positive(inner, "attention_factor", default))


def _positives(inner: Fields, name: str, num_pairs: int) -> tuple[float, ...]:
    """A divisor for each pair of dimensions; not-a-number, which JSON readers let pass, is none."""
    values = inner.listed(name, num_pairs, (int, float))
    if values is None or not all(0 < value <= sys.float_info.max for value in values):
        raise ConfigError(f"{inner.prefix}{name}={values!r:.80} must list {num_pairs} positive numbers")
    return tuple(map(float, values))


def _stretched(inner: Fields, context: int, factor: float) -> int:
    """The positions that a scaling by `factor` reaches."""
    if not context * factor < 2**63:
        raise ConfigError(f"{inner.prefix}factor={factor} takes a context of {context} tokens over 2**63")
    return int(context * factor)


def _original_context(fields: Fields, inner: Fields, max_position: int) -> int:
    """In config.json itself (Phi-3), where it counts before the rope's own; absent: max_position_embeddings."""
    name = "original_max_position_embeddings"
    within = inner.integer(name, max_position)
    original = fields.integer(name, within)
    if not 0 < original <= max_position:
        raise ConfigError(f"{name}={original} must be from 1 to max_position_embeddings={max_position}")
    return original


def _positive(fields: Fields, name: str, default: float | None = None) -> float:
    value = fields.number(name, default)
    if value <= 0:
        raise ConfigError(f"{fields.prefix}{name}={value} must be positive")
    return value
