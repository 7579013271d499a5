"""Compiles every kernel for every accelerator it is made for and writes the tables of docs/kernels.md.

    make kernels          # needs libtpu, Triton and jax's CUDA plugin (make accelerators), and no accelerator

Exits 1 where a kernel does not compile. What no kernel takes is in the table too, with the reason.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from doc_tables import replaced

from pallas_kernels import attention, devices, grouped_matmul, matmul, triton_aot, triton_launch
from pallas_kernels.devices import MIB, Device
from pallas_kernels.dispatch import BackendError
from pallas_kernels.workloads import AttentionWork, Call, MatmulWork
from sharding import topology

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
TRITON_GPUS = ("a100", "h100", "b200", "mi300x")
HOPPERS = ("h100", "h200")
KV_DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "int4")
HEAD_DIMS = (64, 80, 96, 256, 512)
FORMATS = ("int8", "int4/g128", "fp8", "w8a8-int8", "w8a8-fp8", "2:4")
GROUPED_FORMATS = ("dense", "int8", "int4/g64", "fp8", "w8a8-int8")

Work = AttentionWork | MatmulWork


@dataclass(frozen=True)
class Row:
    """A line of a table: one call on one device, and what its compiler said in the columns of its table."""

    call: str
    device: str
    cells: tuple[str, ...]
    failed: bool = False


def attention_works(page_size: int) -> Iterator[tuple[str, AttentionWork]]:
    """Named calls: a decode step of 64 sequences of 8,192 rows and a prompt of 2,048 tokens, 32/8 heads."""
    for plain in (
        AttentionWork("decode", page_size=page_size),
        AttentionWork("prefill", page_size=page_size, seqs=1, rows=2048),
    ):
        phase = plain.phase
        for kv_dtype in KV_DTYPES:
            yield f"{phase} x 128, K/V {kv_dtype}", replace(plain, kv_dtype=kv_dtype)
        for head_dim in HEAD_DIMS:
            yield f"{phase} x {head_dim}, K/V bfloat16", replace(plain, head_dim=head_dim)
        yield f"{phase} x 128, 32/1 heads", replace(plain, kv_heads=1)
        yield f"{phase} x 128, window 1024", replace(plain, window=1024)


def matmul_works() -> Iterator[tuple[str, MatmulWork]]:
    for rows in (16, 512):
        for format in FORMATS:
            yield f"{format}, {rows} rows", MatmulWork(format, rows)
    for format in GROUPED_FORMATS:
        yield f"{format}, 256 rows of 8 groups", MatmulWork(format, 256, 2048, 4096, 8)


def tpu_cells(call: Call, device: Device) -> tuple[str, ...]:
    compiled = topology.compile_for(device, call.function, *call.args, donate=call.donate)
    copies = sum(
        len(compiled.copies_of(leaf.shape)) for position in call.donate for leaf in jax.tree.leaves(call.args[position])
    )
    fast = max(compiled.fast_memory_bytes, default=0)
    cells = (f"{fast / MIB:.1f}", f"{compiled.temporary_bytes / MIB:.1f}", str(copies) if call.donate else "")
    return (*cells, f"{compiled.seconds:.1f}")


def triton_cells(call: Call, device: Device) -> tuple[str, ...]:
    with topology.targeting(device), triton_launch.recorded() as launches:
        jax.eval_shape(call.function, *call.args)
    compiled = [triton_aot.compile_launch(launch, device) for launch in launches]
    names = ", ".join(launch.kernel.__name__ for launch in launches)
    columns = [
        (each.shared_bytes // 1024, each.registers, each.spilled_bytes, each.binary_bytes // 1024) for each in compiled
    ]
    return (names, *(", ".join(map(str, column)) for column in zip(*columns, strict=True)))


def hopper_cells(call: Call, device: Device) -> tuple[str, ...]:
    with topology.targeting(device):
        text = (
            jax.jit(call.function, donate_argnums=call.donate)
            .trace(*call.args)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    return (str(text.count("@mosaic_gpu")), f"{len(text) // 1024}")


@dataclass(frozen=True)
class Table:
    """One compiler's table."""

    title: str
    backend: str
    devices: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Callable[[Call, Device], tuple[str, ...]]


TABLES = (
    Table(
        "TPUs: Pallas Mosaic, compiled by libtpu",
        "mosaic_tpu",
        TPUS,
        ("VMEM of a kernel, MiB", "HBM temporaries, MiB", "copies of a pool", "seconds to compile"),
        tpu_cells,
    ),
    Table(
        "GPUs: Triton, compiled to cubin and hsaco",
        "triton",
        TRITON_GPUS,
        ("kernels", "shared memory, KiB", "registers", "spilled bytes", "binary, KiB"),
        triton_cells,
    ),
    Table(
        "Hopper: Pallas Mosaic GPU, lowered (its last step, PTX to machine code, needs a CUDA toolkit)",
        "mosaic_gpu",
        HOPPERS,
        ("kernels", "lowered program, KiB"),
        hopper_cells,
    ),
)


def roofline() -> str:
    """What no kernel can beat on each device, by published figures: the time its bytes or its arithmetic take."""
    decode, prefill = AttentionWork("decode"), AttentionWork("prefill", seqs=1, rows=8192)
    product = MatmulWork("int4/g128", 16)
    packed = product.in_size * product.out_size // 2
    head = [
        "device",
        "ridge, FLOP per byte",
        f"decode 64 x 8192 ({decode.flops / decode.kv_bytes:.0f} FLOP per byte), us",
        "prefill 8192, us",
        f"int4, 16 x 4096 x 14336 ({product.flops / packed:.0f} FLOP per byte), us",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for device in devices.DEVICES.values():
        if device.platform == "cpu":
            continue
        bounds = [
            max(flops / device.bf16_tflops / 1e6, num_bytes / device.memory_gbps / 1e3)
            for flops, num_bytes in (
                (decode.flops, decode.kv_bytes),
                (prefill.flops, prefill.kv_bytes),
                (product.flops, packed),
            )
        ]
        ridge = f"{1e3 * device.bf16_tflops / device.memory_gbps:.0f}"
        lines.append(f"| {' | '.join([device.name, ridge, *(f'{bound:.0f}' for bound in bounds)])} |")
    return "\n".join(lines) + "\n"


def rows_of(table: Table, only: str, say: Callable[[str], None]) -> Iterator[Row]:
    for name in table.devices:
        device = devices.named(name)
        works: list[tuple[str, str, Work]] = [
            ("attention", label, work) for label, work in attention_works(attention.default_page_size(device))
        ]
        works += [("grouped_matmul" if work.num_groups else "matmul", label, work) for label, work in matmul_works()]
        ops = {"attention": attention.OP, "matmul": matmul.OP, "grouped_matmul": grouped_matmul.OP}
        for op, label, work in works:
            if table.backend not in ops[op].backends or only not in f"{op} {label} {name}":
                continue
            say(f"{table.backend} {name}: {op} {label}")
            yield row_of(table, f"{op}: {label}", work, device)


def row_of(table: Table, label: str, work: Work, device: Device) -> Row:
    try:
        call = work.call(table.backend, device, filled=False)
        return Row(label, device.name, table.cells(call, device))
    except BackendError as refusal:
        reason = re.search(r"refuses .*?: (.*?) \((?:what would work|no other)", str(refusal), re.DOTALL)
        return Row(label, device.name, ("refused: " + (reason[1] if reason else str(refusal)),))
    except Exception as error:  # a compiler's, of which each has its own kinds: the other rows are wanted all the same
        return Row(label, device.name, (f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:200]}",), True)


def markdown(table: Table, rows: list[Row]) -> str:
    """A table with a line per call and device."""
    head = ["call", "device", *table.columns]
    lines = [f"### {table.title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [*row.cells, *[""] * (len(table.columns) - len(row.cells))]
        lines.append(f"| {' | '.join([row.call, row.device, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PART", help="calls whose operation, name and device hold this")
    parser.add_argument("--backend", choices=[table.backend for table in TABLES], action="append", help="these tables")
    parser.add_argument("--print", action="store_true", help="print the tables; leave the page as it is")
    args = parser.parse_args()
    if args.only and not args.print:
        parser.error(f"--only {args.only} needs --print: the page holds whole tables")
    say = lambda text: print(text, file=sys.stderr, flush=True)
    failed, page = 0, replaced(PAGE.read_text(), "roofline", roofline(), PAGE)
    for table in TABLES:
        if args.backend and table.backend not in args.backend:
            continue
        rows = list(rows_of(table, args.only, say))
        failed += sum(row.failed for row in rows)
        text = markdown(table, rows)
        if args.print:
            print(text)
        else:
            page = replaced(page, table.backend, text, PAGE)
    if not args.print:
        PAGE.write_text(page)
    say(f"{failed} kernels do not compile" if failed else "every kernel compiles")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
