"""Where a parameter lies in a Hugging Face checkpoint: the values of an architecture's name table. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Source:
    """A stored tensor, or one per expert, and which part of it one of our parameters is.

    Parts lie along `axis` of our parameter, whose layout is `[out, in]`, with experts `[expert, out, in]`.
    """

    name: str  # {i} is the layer; {e} the expert: one stored tensor each, stacked along our first axis
    part: int = 0  # of the `of` parameters that share the tensor, this one's number
    of: int = 1
    axis: int = 0  # 1 where axis 0 is experts
    interleaved: bool = False  # the part is rows part::of; else parts are consecutive, in the order of their numbers
    transposed: bool = False  # the last two axes are swapped in the file

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.of:
            raise ValueError(f"{self.name}: part {self.part} is not from 0 to {self.of - 1}")
        if self.axis < (self.per_expert and self.of > 1):
            raise ValueError(f"{self.name}: axis {self.axis} is negative, or the experts' own")

    def in_layer(self, index: str) -> Source:
        """With {i} filled in."""
        return replace(self, name=self.name.replace("{i}", index))

    def names(self, num_experts: int) -> tuple[str, ...]:
        """The stored tensors' names: one, or one per expert."""
        if "{e}" not in self.name:
            return (self.name,)
        return tuple(self.name.replace("{e}", str(expert)) for expert in range(num_experts))

    @property
    def per_expert(self) -> bool:
        """Whether each expert is a stored tensor of its own."""
        return "{e}" in self.name
