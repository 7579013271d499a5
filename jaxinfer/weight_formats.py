"""How a checkpoint's quantized weights are stored, and as what they are held once loaded.

Data only, without jax: config.json becomes a `Quantization` (models/quantization_config.py), the model asks it which
weights are quantized, and the loader (models/quantized_checkpoint.py) how their bytes lie.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """What fixes the arrays of a loaded `QuantizedTensor`, given the weight's shape `[..., out, in]`."""

    dtype: str  # "int8" | "int4" | "float8_e4m3fn"
    group_size: int | None = None  # inputs that share a scale; None: one scale per output
    zero_points: bool = False
    activation: str | None = None  # "int8" | "float8_e4m3fn": activations are quantized per row too
    scale_dtype: str = "float32"


@dataclass(frozen=True)
class StoredFormat:
    """How one kind of weight lies in the files, and what it becomes."""

    layout: str  # a key of quantized_checkpoint.LAYOUTS
    held: WeightFormat
    bits: int
    block_outputs: int = 1  # outputs that share a scale
    per_tensor: bool = False  # one scale for all of the weight


@dataclass(frozen=True)
class Quantization:
    """Which weights of a checkpoint are quantized, and how. Patterns match whole module names.

    The first entry of `formats` with a pattern that fits decides, unless one of `kept` fits.
    """

    method: str  # as in the checkpoint's config, for messages
    formats: tuple[tuple[str, StoredFormat], ...]  # (pattern, format)
    kept: tuple[str, ...] = ()  # patterns of modules that are not quantized

    def stored_as(self, name: str) -> StoredFormat | None:
        """How the weight with this Hugging Face name lies in the files ({e}: any expert); None: as it is."""
        module = name.replace("{e}", "0").removesuffix(".weight")
        if any(re.fullmatch(pattern, module) for pattern in self.kept):
            return None
        return next((stored for pattern, stored in self.formats if re.fullmatch(pattern, module)), None)

    def format_of(self, name: str) -> WeightFormat | None:
        """What the weight with this Hugging Face name is held as; None: a plain array."""
        stored = self.stored_as(name)
        return None if stored is None else stored.held
