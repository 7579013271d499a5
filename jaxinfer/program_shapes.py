"""Which programs an engine has: their shapes, and how many slots they run over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Shape:
    """One program: a decode loop over `num_slots` slots, or a mixed step with `prefill_tokens` besides.

    Or, with a name of scoring.READERS, one that reads the hidden rows a mixed step of so many tokens left.
    """

    num_slots: int
    prefill_tokens: int = 0  # 0: decode_loop
    reader: str = ""

    def __str__(self) -> str:
        if self.reader:
            return f"prompt_{self.reader}[{self.prefill_tokens} tokens]"
        if self.prefill_tokens:
            return f"mixed_step[{self.num_slots} slots + {self.prefill_tokens} tokens]"
        return f"decode_loop[{self.num_slots} slots]"


def slot_buckets(slots: int, least: int = 2) -> list[int]:
    """Numbers of slots that programs run over: `slots`, quartered while above 4, ascending; multiples of `least`."""
    buckets = [slots]
    while buckets[0] > max(4, least):
        quarter = max(2, buckets[0] // 4)
        buckets.insert(0, quarter if least == 2 else -(-quarter // least) * least)
    return buckets
