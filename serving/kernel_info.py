"""`jaxinfer info --kernels`: which kernel would serve which case on this machine, or on one that is not here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys


def run(args: argparse.Namespace) -> int:
    """Print the survey of a device as a table, or with --json as a document. Raises ConfigError for an unknown one."""
    from jaxinfer.config import ConfigError
    from pallas_kernels import devices
    from pallas_kernels.survey import survey

    try:
        device = devices.current() if args.device is None else devices.named(args.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    answers = survey(device)
    if args.json:
        json.dump({"device": device.name, "kernels": [dataclasses.asdict(answer) for answer in answers]}, sys.stdout)
        print()
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("operation", "case", "backend", "refused by", title=f"kernels on {device.name}")
    for answer in answers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in answer.refusals.items())
        table.add_row(answer.op, answer.case, answer.backend or "none but the reference", escape(reasons))
    Console().print(table)
    return 0
