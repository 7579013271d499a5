"""`jaxinfer compile`: would this model run on those TPUs, and how fast at best? From its config, without a TPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.model_presets import WEIGHTS, presets
from serving.flags import add_config_flags, config_from, positive

GIB = 1 << 30
# what shapes the programs beside batch, context and chunk; the rest of EngineConfig is about serving
FLAGS = (
    "dtype",
    "kv_dtype",
    "mesh",
    "sequence_parallel",
    "page_size",
    "loop_steps",
    "max_prefill_seqs",
    "attention_backend",
    "matmul_backend",
)
_SKIP = tuple(field.name for field in dataclasses.fields(EngineConfig) if field.name not in FLAGS)
_MAX_COPIES_NAMED = 8  # --json has them all
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}
_WHERE = {
    "step": "every step",
    "inner loop": "every step, in a loop",
    "once": "once per call",
    "other loop": "in another loop",
    "branch": "where a condition holds",
}


def add_compile_parser(subparsers: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `compile` to the CLI."""
    parser = subparsers.add_parser(
        "compile", parents=parents, allow_abbrev=False, help="compile a model's programs for TPUs that are not here"
    )
    parser.add_argument(
        "config_of", metavar="MODEL", help=f"directory with config.json (no weights needed), or {', '.join(presets())}"
    )
    parser.add_argument(
        "--device", required=True, metavar="SLICE", help="v6e:4x4; or v6e, for the slice with as many devices as --mesh"
    )
    parser.add_argument(
        "--batch", type=positive, default=64, metavar="N", help="sequences that decode: max_num_seqs (default: 64)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens each holds: max_model_len (default: 8192, or what the model allows)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a prefill step: max_num_batched_tokens; 0: none (default: 512)",
    )
    parser.add_argument("--weights", choices=WEIGHTS, help="as if the checkpoint were stored so (default: as it is)")
    parser.add_argument("--save-hlo", metavar="DIR", help="keep the programs' optimised HLO there")
    add_config_flags(parser, EngineConfig, skip=_SKIP)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 where everything fits, 1 where it does not."""
    from jaxinfer.compile_report import report, request_of

    if args.prefill_chunk < 0:
        raise ConfigError(f"--prefill-chunk {args.prefill_chunk} must be at least 0")
    config = config_from(
        args,
        EngineConfig,
        _SKIP,
        max_num_seqs=args.batch,
        max_num_batched_tokens=args.prefill_chunk or EngineConfig.max_num_batched_tokens,  # windows hold as many more
        min_prefill_bucket=args.prefill_chunk or EngineConfig.min_prefill_bucket,
    )
    request = request_of(args.config_of, args.device, config, weights=args.weights, prefill_chunk=args.prefill_chunk)
    context = min(8192, request.model.max_position) if args.context is None else args.context
    request = dataclasses.replace(request, config=dataclasses.replace(request.config, max_model_len=context))
    found = report(request, args.progress.say, _made(args.save_hlo))
    args.progress.clear()
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        _print(found)
    return 0 if found["memory"]["fits"] else 1


def _made(directory: str | None) -> Path | None:
    """The directory, made before minutes are spent on what shall lie there."""
    if directory is None:
        return None
    try:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ConfigError(f"--save-hlo {directory!r} is no directory to write to: {error.strerror}") from error


# ---- as tables


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    weights = ", ".join(found["weights"])
    console.print(
        f"[bold]{found['model']}[/bold] ({weights}, K/V {found['kv_dtype']}) on {found['device']['name']}, "
        f"mesh {found['mesh']}: batch {found['batch']}, context {found['context']:,}"
    )
    _print_memory(console, found)
    for program in found["programs"].values():
        _print_program(console, program)


def _print_memory(console: Any, found: dict[str, Any]) -> None:
    from rich.table import Table

    memory = found["memory"]
    table = Table("bytes of each device", "", "of HBM", title=None)
    for label, key in (
        ("weights", "weight_bytes"),
        ("K/V pages", "kv_bytes"),
        ("slots and edits", "slot_bytes"),
        ("temporaries and results", "temporary_bytes"),
        ("together", "needed_bytes"),
        ("of", "limit_bytes"),
    ):
        table.add_row(label, size(memory[key]), f"{memory[key] / memory['limit_bytes']:.1%}")
    console.print(table)
    spare = memory["headroom_bytes"]
    if memory["fits"]:
        console.print(f"[green]fits[/green], {size(spare)} to spare")
    elif spare < 0:
        console.print(f"[red]does not fit[/red]: {size(-spare)} too much")
    else:
        console.print("[red]does not fit[/red]: the compiler refuses a program")
    compiled_with = memory["compiled_with_kv_bytes"]
    if compiled_with is not None and compiled_with < memory["kv_bytes"]:
        console.print(f"compiled with {size(compiled_with)} of K/V pages instead")
    if memory["fits"] and memory["kv_bytes"] > memory["default_kv_bytes"]:
        console.print(
            f"serve it with --max-num-seqs {found['batch']} --max-model-len {found['context']} "
            f"--kv-memory-bytes {memory['kv_bytes']}: by default an engine takes {size(memory['default_kv_bytes'])} of "
            "each device for K/V"
        )
    fits = ", ".join(f"{entry['sequences']:,} of {entry['length']:,}" for entry in memory["capacity"])
    if fits:
        console.print(f"sequences that fit beside the weights, by their tokens: {fits}")
    console.print()


def _print_program(console: Any, program: dict[str, Any]) -> None:
    console.print(f"[bold]{program['program']}[/bold]")
    bound = program["roofline"]
    console.print(
        f"  at least {milliseconds(bound['seconds'])} a step, bound by {bound['bound_by']}: HBM "
        f"{milliseconds(bound['hbm_s'])}, MXU {milliseconds(bound['mxu_s'])}, links {milliseconds(bound['links_s'])}; "
        f"{bound['serial_tokens_per_s']:,.0f} tokens/s, {bound['tokens_per_s']:,.0f} if all is overlapped"
    )
    if "error" in program:
        console.print(f"  [red]not compiled[/red]: {program['error']}")
        return
    seconds = program["seconds"]
    console.print(
        f"  {size(program['temporary_bytes'])} of temporaries, {size(program['code_bytes'])} of code, "
        f"{program['kernels']} kernels; "
        f"traced in {seconds['tracing']:.1f} s, lowered in {seconds['lowering']:.1f} s, compiled in "
        f"{seconds['compiling']:.1f} s ({seconds['cpu']:.1f} s of processors in all)"
    )
    if program["copies"]:
        names = sorted({copied["argument"] for copied in program["copies"]})
        more = f" and {len(names) - _MAX_COPIES_NAMED:,} more" if len(names) > _MAX_COPIES_NAMED else ""
        console.print(f"  [red]copied[/red]: {', '.join(names[:_MAX_COPIES_NAMED])}{more}")
    for place in ("step", "inner loop", "once", "other loop", "branch"):
        lines = [line for line in program["collectives"] if line["place"] == place]
        if not lines:
            continue
        total = sum(line["sent_bytes"] * line["count"] for line in lines)
        console.print(f"  {_WHERE[place]}: {sum(line['count'] for line in lines)} collectives, {size(total)} sent")
        for line in lines if place != "branch" else ():
            console.print(
                f"    {line['count']:,} x {line['kind']} of {size(line['payload_bytes'])} over {line['group_size']}"
                f"{', beside products or kernels' if line['overlapped'] else ''}"
            )
    if program["overlap"] is not None:
        console.print(
            f"  a device sends {size(program['sent_bytes'])} a step, {program['overlap']:.0%} of it beside products or "
            "kernels"
        )
    console.print()


def size(num_bytes: float) -> str:
    """As people read it: `1.50 GiB`."""
    for unit, scale in reversed(_UNITS.items()):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def milliseconds(seconds: float) -> str:
    """`1.23 ms`."""
    return f"{1e3 * seconds:.2f} ms"
