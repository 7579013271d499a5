"""`jaxinfer convert`: a Hugging Face directory into one whose weights any mesh reads in parts, an Orbax checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from jaxinfer.config import DTYPES


def add_convert_parser(subparsers: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `convert` to the CLI. `parents` must not have the optional MODEL."""
    parser = subparsers.add_parser(
        "convert", parents=parents, allow_abbrev=False, help="write a model's weights as an Orbax checkpoint"
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model directory")
    parser.add_argument("out", metavar="OUT", help="directory to write, which every command takes as MODEL")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of weights that are not quantized (default: %(default)s)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed, and one may be in use
    import jax.numpy as jnp

    from jaxinfer.models.conversion import convert

    def report(name: str, done: int, total: int) -> None:
        args.progress.update(f"{done / total:4.0%} {name}")

    start = time.monotonic()
    converted = convert(args.model, args.out, jnp.dtype(args.dtype), progress=report)
    seconds = time.monotonic() - start
    args.progress.clear()
    if args.json:
        json.dump({"out": args.out, "dtype": args.dtype, "seconds": round(seconds, 3)} | asdict(converted), sys.stdout)
        print()
    else:
        print(
            f"{args.out}: {converted.num_parameters} parameters, {converted.num_bytes / 1e9:.3f} GB, plain ones in "
            f"{args.dtype}; {seconds:.1f} s"
        )
    return 0
