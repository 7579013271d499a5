"""Generated tables inside pages that people write: between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def replaced(page: str, name: str, text: str, path: Path) -> str:
    """The page with `text` between the markers of that name. SystemExit where it has none."""
    begin, end = (f"<!-- {edge} {name} -->" for edge in ("begin", "end"))
    if begin not in page or end not in page:
        raise SystemExit(f"{path.name} has no place for the table: {begin} ... {end}")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
