"""Triton kernels without a GPU: what a traced call would launch, and what its launches calculate in the interpreter."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import triton_launch
from pallas_kernels.devices import Device
from pallas_kernels.triton_launch import Launch
from sharding import topology


def record(device: Device, call: Callable, *arguments: Any) -> list[Launch]:
    """The launches of `call(*arguments)`; arguments may be abstract."""
    with topology.targeting(device), triton_launch.recorded() as launches:
        jax.eval_shape(lambda *traced: call(*traced), *arguments)  # a new function: traces are remembered by function
    return launches


def interpret(op: str, backend: str, names: list[str]) -> dict[str, str]:
    """How those of `pallas_kernels.<op>.cases` failed that did, in Triton's interpreter and a process of its own."""
    runner = Path(__file__).resolve().with_name("triton_interpreter.py")
    command = [sys.executable, str(runner), op, backend, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
