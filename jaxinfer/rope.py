"""Which rotary embedding a layer has, and its frequencies. Imports no jax.

Hides the scalings that stretch models past the context they were trained on. Two of them look at a sequence's
length; `length_rule` says how, so that what is cached depends on a sequence alone and never on how it was batched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def frequencies(self, plain: np.ndarray) -> np.ndarray:
        return plain / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rope scaling: long wavelengths slowed by `factor`, short ones kept, a smooth ramp between.

    Source: "The Llama 3 Herd of Models" (2024), section 3.4.2, and its reference implementation.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def frequencies(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original_max_position * plain / (2 * math.pi)  # rotations within the original context
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0.0, 1.0)
        return (1 - kept) * plain / self.factor + kept * plain


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a ramp over dimensions, and cos and sin times `attention_factor`.

    `beta_fast`, `beta_slow`: rotations within the original context above which a dimension is kept, below which it is
    slowed. `truncate`: the ramp begins and ends at whole dimensions.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        num_pairs = len(plain)

        def pair_that_turns(times: float) -> float:
            ratio = self.original_max_position / (2 * math.pi * times)
            return num_pairs * math.log(ratio) / math.log(theta)

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num_pairs - 1)
        width = (high - low) or 0.001  # one step where both ends fall on the same dimension
        slowed = np.clip((np.arange(num_pairs) - low) / width, 0.0, 1.0)
        return slowed * plain / self.factor + (1 - slowed) * plain


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling that grows with the sequence ("dynamic NTK"; section 3.3 of the YaRN paper).

    A prompt's tokens are rotated by the frequencies of the prompt's length, each later token by those of its own.
    """

    factor: float
    original_max_position: int


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor per dimension, of two sets.

    A sequence within the original context has the short set, a longer one the long set for all its tokens.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongScaling


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), rotate-half convention. Frozen, so layers can share one."""

    theta: float
    scaling: RopeScaling | None = None
    rotary_dim: int | None = None  # leading dimensions of a head that are rotated; None = all
    num_turning: int | None = None  # of the dimension pairs, how many turn at all; None = all

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongScaling) else 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """f32[sets, rotary_dim // 2] radians per position: one set, or LongRoPE's short and long ones.

        For DynamicScaling these are the ones within the original context.
        """
        dim = self.rotary_dim or head_dim
        plain = self.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.num_turning is not None:
            plain[self.num_turning :] = 0.0
        match self.scaling:
            case LinearScaling() | Llama3Scaling() as scaling:
                plain = scaling.frequencies(plain)
            case YarnScaling() as scaling:
                plain = scaling.frequencies(plain, self.theta)
            case LongScaling() as scaling:
                plain = plain / np.array([scaling.short_factors, scaling.long_factors], np.float64)
        return np.atleast_2d(plain).astype(np.float32)


@dataclass(frozen=True)
class LengthRule:
    """How a model's rotation depends on the length of a sequence.

    `whole`: by the tokens it has now, all of them alike, so passing `limit` tokens means computing its K/V anew;
    otherwise by its prompt's length, and past that by each token's own position.
    """

    limit: int  # up to this many tokens nothing depends on the length
    whole: bool

    def cache_salt(self, num_prompt: int, num_tokens: int) -> str:
        """Sequences may share K/V pages where their tokens and this are equal."""
        if self.whole:
            return "long" if num_tokens > self.limit else ""
        return f"prompt={num_prompt}" if num_prompt > self.limit else ""

    def resident_limit(self, num_tokens: int) -> int | None:
        """The number of tokens at which a sequence that has `num_tokens` must be computed anew; None = never."""
        return self.limit + 1 if self.whole and num_tokens <= self.limit else None


def length_rule(ropes: Iterable[RopeSpec | None]) -> LengthRule | None:
    """The rule of a model with these rotary embeddings; None where length plays no part."""
    rules = {
        LengthRule(rope.scaling.original_max_position, isinstance(rope.scaling, LongScaling))
        for rope in ropes
        if rope is not None and isinstance(rope.scaling, DynamicScaling | LongScaling)
    }
    if len(rules) > 1:
        raise ValueError(f"layers disagree on how rotation depends on length: {sorted(map(str, rules))}")
    return rules.pop() if rules else None
