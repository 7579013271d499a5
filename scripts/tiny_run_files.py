"""The files of a training run: replaced whole or not at all, and tied to one setting."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """A flag or a work directory that cannot be honoured; the message says what to do."""


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer(temporary)
    temporary.chmod(0o644)  # safetensors makes files private
    os.replace(temporary, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


class History:
    """One JSON object per line: step, tokens, elapsed_s, loss, ppl."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def append(self, row: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop what a killed process wrote after its last checkpoint; those steps will run again."""
        rows = [row for row in self.read() if row["step"] <= step]
        write(self.path, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def check_same_run(work_dir: Path, args: argparse.Namespace) -> None:
    """A work directory belongs to one setting; continuing it with another would mix two models."""
    wanted = {name: getattr(args, name) for name in ("size", "vocab_size", "max_files", "seed", "batch_tokens")}
    path = work_dir / "run.json"
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{args.work_dir} holds a run with {flag} {found.get(name)}, not {value}; "
                "choose another --work-dir or remove this one"
            )
