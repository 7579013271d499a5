"""Compiles large models' programs for TPU slices that are not here and writes the tables of docs/scale.md.

    make scale            # needs libtpu (make accelerators), and no TPU; hours on a laptop

Every program's report is kept in benchmarks/results/scale as soon as it is there; --reuse takes from there what the
same jax and libtpu have compiled, whatever our own code was then. Exits 1 where a bar is missed or a program does not
compile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doc_tables import replaced, table

from jaxinfer.compile_report import report, request_of, versions
from jaxinfer.config import ConfigError, EngineConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE, KEPT = ROOT / "docs" / "scale.md", ROOT / "benchmarks" / "results" / "scale"
GIB = 1 << 30
CHUNK = 8192


@dataclass(frozen=True)
class Setup:
    """A model on a slice."""

    model: str
    device: str
    mesh: str
    weights: str | None = None
    decode: tuple[tuple[int, int], ...] = ((1, 8192), (64, 2048), (256, 2048))  # (batch, context)
    chunk: int = CHUNK

    @property
    def label(self) -> str:
        return f"{self.model}, {self.weights or 'bfloat16'}"


@dataclass(frozen=True)
class Row:
    """One program of one setup."""

    setup: Setup
    batch: int
    context: int
    chunk: int  # 0: the decode loop

    @property
    def key(self) -> str:
        what = f"prefill{self.chunk}" if self.chunk else "decode"
        setup = self.setup
        words = (setup.model, setup.weights or "bfloat16", setup.device, setup.mesh, what, self.batch, self.context)
        return "_".join(map(str, words)).replace(":", "-").replace(",", "-").replace("=", "")


SEVENTY_16 = Setup("llama-3.1-70b", "v6e:4x4", "tensor=16", decode=((1, 8192), (64, 8192), (256, 2048)))
FOUR_HUNDRED = Setup("llama-3.1-405b", "v5p:4x4x4", "context=2,tensor=32", "int8")
SETUPS = (
    Setup("llama-3.1-8b", "v5e:2x2", "tensor=4"),
    Setup("llama-3.1-8b", "v6e:1x1", ""),
    Setup("llama-3.1-8b", "v6e:2x2", "tensor=4"),
    Setup("llama-3.1-70b", "v5e:4x4", "tensor=16"),
    Setup("llama-3.1-70b", "v6e:2x4", "tensor=8"),
    SEVENTY_16,
    Setup("llama-3.1-70b", "v5e:2x4", "tensor=8", "int8"),
    FOUR_HUNDRED,
    Setup("qwen3-235b-a22b", "tpu7x:2x2x1", "expert=8"),
    Setup("mixtral-8x7b", "v6e:2x4", "expert=8"),
)


def rows_of(setup: Setup) -> list[Row]:
    decode = [Row(setup, batch, context, 0) for batch, context in setup.decode]
    return [*decode, Row(setup, 8, CHUNK, setup.chunk)]


def made(row: Row, say: Callable[[str], None]) -> dict[str, Any]:
    """The row's report, with one program."""
    setup, chunk = row.setup, max(1, row.chunk)
    config = EngineConfig(
        mesh=setup.mesh,
        max_num_seqs=row.batch,
        max_model_len=row.context,
        max_num_batched_tokens=chunk,
        min_prefill_bucket=chunk,
    )
    request = request_of(setup.model, setup.device, config, weights=setup.weights, prefill_chunk=row.chunk)
    return report(request, say, only="prefill" if row.chunk else "decode")


def program_of(found: dict[str, Any]) -> dict[str, Any]:
    [program] = found["programs"].values()
    return program


# ---- tables


def memory_cells(row: Row, found: dict[str, Any]) -> list[str]:
    memory, program = found["memory"], program_of(found)
    if "error" in program:
        return [row.setup.label, row.setup.device, row.setup.mesh, what(row), f"**{program['error'][:120]}**"]
    gib = [f"{memory[key] / GIB:.2f}" for key in ("weight_bytes", "kv_bytes", "temporary_bytes", "headroom_bytes")]
    if memory["headroom_bytes"] >= 0 and not memory["fits"]:
        gib[-1] += ", and refused"
    fits = {entry["length"]: entry["sequences"] for entry in memory["capacity"]}
    return [
        row.setup.label,
        row.setup.device,
        row.setup.mesh or "one device",
        what(row),
        *gib,
        f"{fits[2048]:,} / {fits[8192]:,}",
    ]


def what(row: Row) -> str:
    return f"prefill {row.chunk:,}" if row.chunk else f"decode {row.batch} x {row.context:,}"


def speed_cells(row: Row, found: dict[str, Any]) -> list[str]:
    program = program_of(found)
    bound = program["roofline"]
    cells = [
        row.setup.label,
        row.setup.device,
        what(row),
        *(f"{1e3 * bound[key]:.2f}" for key in ("hbm_s", "mxu_s", "links_s")),
        bound["bound_by"],
        f"{bound['serial_tokens_per_s']:,.0f} to {bound['tokens_per_s']:,.0f}",
    ]
    if "error" in program:
        return cells
    return [
        *cells,
        sums_of(program),
        f"{program['sent_bytes'] / 1e6:,.1f}",
        "" if program["overlap"] is None else f"{program['overlap']:.0%}",
        f"{seconds_of(program):.0f}",
        f"{program['seconds']['cpu']:.0f}",
    ]


def seconds_of(program: dict[str, Any]) -> float:
    """From the traced function to the executable."""
    return float(sum(program["seconds"][stage] for stage in ("tracing", "lowering", "compiling")))


def sums_of(program: dict[str, Any]) -> str:
    """Collectives of a step by kind: `160 all-reduce, 2 all-gather`."""
    counts: dict[str, int] = {}
    for line in of_step(program):
        counts[line["kind"]] = counts.get(line["kind"], 0) + line["count"]
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda pair: -pair[1])) or "none"


def of_step(program: dict[str, Any]) -> list[dict[str, Any]]:
    """Collectives that run in every step: in a decode loop, or anywhere but under a condition."""
    inside = [line for line in program["collectives"] if line["place"] in ("step", "inner loop")]
    return inside or [line for line in program["collectives"] if line["place"] != "branch"]


MEMORY_HEAD = [
    "model",
    "slice",
    "mesh",
    "program",
    "weights",
    "K/V",
    "temporaries",
    "to spare",
    "sequences of 2,048 / 8,192",
]
SPEED_HEAD = [
    *(
        "model",
        "slice",
        "program",
        "HBM, ms",
        "MXU, ms",
        "links, ms",
        "bound by",
        "tokens/s, nothing to all overlapped",
    ),
    *("collectives of a step", "MB sent", "overlapped", "s to compile", "s of processors"),
]


def padded(head: list[str], rows: Iterable[list[str]]) -> str:
    return table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


# ---- bars


@dataclass(frozen=True)
class Bar:
    """A promise, and what was found."""

    what: str
    wanted: str
    found: str
    kept: bool


def bars(found: dict[Row, dict[str, Any]]) -> list[Bar]:
    """The bars of those rows that were made. Temporaries of other models are named where they are too large."""
    checked: list[Bar] = []
    for row, each in found.items():
        program = program_of(each)
        if "error" in program:
            continue
        if row.setup == SEVENTY_16 and not row.chunk:
            checked += decode_bars(row, each, program, 80)
        if row.setup == SEVENTY_16 and row.chunk:
            share = program["overlap"] or 0.0
            checked.append(Bar(f"{name(row)}: bytes sent beside products", ">= 80%", f"{share:.0%}", share >= 0.8))
        limit_s = {"llama-3.1-70b": 25, "llama-3.1-405b": 45}.get(row.setup.model)
        if not row.chunk and limit_s and row.setup in (SEVENTY_16, FOUR_HUNDRED):
            seconds = seconds_of(program)
            checked.append(
                Bar(f"{name(row)}: time to compile", f"<= {limit_s} s", f"{seconds:.0f} s", seconds <= limit_s)
            )
    shares = {row: temporary_share(each) for row, each in found.items() if "error" not in program_of(each)}
    others = {row: share for row, share in shares.items() if row.setup != SEVENTY_16 and not row.chunk}
    checked += [
        Bar(f"{name(row)}: temporaries", "< 2% of HBM", f"{share:.2%}", False)
        for row, share in others.items()
        if share >= 0.02
    ]
    return checked


def temporary_share(found: dict[str, Any]) -> float:
    """Of a device's memory."""
    return float(program_of(found)["temporary_bytes"] / found["memory"]["limit_bytes"])


def decode_bars(row: Row, found: dict[str, Any], program: dict[str, Any], layers: int) -> list[Bar]:
    sums = sum(line["count"] for line in of_step(program) if line["kind"] == "all-reduce")
    share = temporary_share(found)
    copied = sorted({copy["argument"] for copy in program["copies"]})
    most = 2 * layers + 1
    return [
        Bar(f"{name(row)}: copies of weights and K/V pools", "none", ", ".join(copied) or "none", not copied),
        Bar(f"{name(row)}: all-reduces of a step", f"<= {most}", str(sums), sums <= most),
        Bar(f"{name(row)}: temporaries", "< 2% of HBM", f"{share:.2%}", share < 0.02),
    ]


def name(row: Row) -> str:
    return f"{row.setup.label}, {row.setup.device}, {what(row)}"


def bars_table(checked: list[Bar]) -> str:
    return table(
        ["what", "bar", "found", ""],
        [[bar.what, bar.wanted, bar.found, "" if bar.kept else "**missed**"] for bar in checked],
    )


# ---- all of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PART", help="programs whose name holds this")
    parser.add_argument("--reuse", action="store_true", help="compile only what these versions have not")
    parser.add_argument("--print", action="store_true", help="print the tables; leave the page as it is")
    args = parser.parse_args()
    if args.only and not args.print:
        parser.error(f"--only {args.only} needs --print: the page holds whole tables")
    say = lambda text: print(text, file=sys.stderr, flush=True)
    found: dict[Row, dict[str, Any]] = {}
    refused = 0
    for row in (row for setup in SETUPS for row in rows_of(setup) if args.only in row.key):
        kept = KEPT / f"{row.key}.json"
        if args.reuse and kept.exists():
            found[row] = json.loads(kept.read_text())
            if found[row]["versions"] == versions():
                continue
            say(f"{row.key}: compiled by {found[row]['versions']}, not {versions()}: again")
        try:
            found[row] = made(row, say)
        except ConfigError as error:
            say(f"{row.key}: {error}")
            refused += 1
            continue
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found[row], indent=1))
    tables = {
        "bars": bars_table(bars(found)),
        "memory": padded(MEMORY_HEAD, [memory_cells(row, each) for row, each in found.items()]),
        "speed": padded(SPEED_HEAD, [speed_cells(row, each) for row, each in found.items()]),
    }
    if args.print:
        print("\n".join(tables.values()))
    else:
        page = PAGE.read_text()
        for part, text in tables.items():
            page = replaced(page, part, text, PAGE)
        PAGE.write_text(page)
    missed = sum(not bar.kept for bar in bars(found))
    errors = sum("error" in program_of(each) for each in found.values())
    say(f"{len(found)} programs: {missed} bars missed, {errors} not compiled, {refused} refused")
    return 1 if missed or errors or refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
