"""The compiled programs of an engine: a declared, printable set, kept on disk, and the counting of strays."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxinfer import scoring
from jaxinfer.blueprint import Blueprint
from jaxinfer.config import ConfigError, EngineConfig, default_compilation_cache
from jaxinfer.program_shapes import Shape, slot_buckets

__all__ = ["Program", "Programs", "Shape", "enable_compilation_cache", "slot_buckets"]

MIN_MIXED_SLOTS = 16  # below that a prefill hardly notices its decode rows, and each program costs seconds to compile

log = logging.getLogger(__name__)

Program = Callable[..., Any]  # compiled


class Programs:
    """Compile ahead of time and look up by shape. `compiles_after_warmup` counts strays, each of them logged."""

    def __init__(self, blueprint: Blueprint):
        self._blueprint = blueprint
        self._slots = slot_buckets(blueprint.limits.slots, 2 * blueprint.parallel.stages)
        self._mixed_slots = [n for n in self._slots if n >= MIN_MIXED_SLOTS] or self._slots[-1:]
        self._tokens = blueprint.config.prefill_buckets
        self._compiled: dict[Shape, Program] = {}
        self._lock = threading.Lock()
        self._warm = False
        self.compiles_after_warmup = 0

    def declared(self) -> list[Shape]:
        """The warm set, most likely first: what a lone request needs, then full batches, then the rest."""
        largest, smallest = self._slots[-1], self._slots[0]
        lone = [Shape(self._mixed_slots[0], self._tokens[0]), Shape(smallest)]
        first = [*lone, Shape(largest, self._tokens[-1]), Shape(largest)]
        rest = [Shape(slots, tokens) for tokens in self._tokens for slots in self._mixed_slots]
        return list(dict.fromkeys(first + rest + [Shape(slots) for slots in self._slots]))

    def on_demand(self) -> list[Shape]:
        """What is compiled only when the first request asks for prompt log-probabilities or logits; no stray then."""
        return [Shape(0, tokens, reader) for tokens in self._tokens for reader in scoring.READERS]

    def shape_for(self, num_slots: int, prefill_tokens: int) -> Shape:
        """The smallest declared shape that holds this many slots and prefill tokens."""
        slots = next(n for n in (self._mixed_slots if prefill_tokens else self._slots) if n >= num_slots)
        tokens = next(bucket for bucket in self._tokens if bucket >= prefill_tokens) if prefill_tokens else 0
        return Shape(slots, tokens)

    def warm_up(self, progress: Callable[[str], None] | None = None, workers: int = 2) -> None:
        """Compile the declared set, `workers` at a time. `progress` hears of each program."""
        shapes = self.declared()
        done = 0

        def compile_one(shape: Shape) -> None:
            nonlocal done
            self.get(shape)
            done += 1
            if progress is not None:
                progress(f"compiled {shape} ({done} of {len(shapes)})")

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compile_one, shapes))
        self._warm = True

    def get(self, shape: Shape) -> Program:
        """The compiled program, compiled now where it is not there yet. A step's gives (DeviceState, Outcome)."""
        program = self._compiled.get(shape)
        if program is None:
            program = self._blueprint.compile(shape)
            with self._lock:
                if self._warm and not shape.reader:
                    self.compiles_after_warmup += 1
                    log.warning("compiled %s after warm-up", shape)
                self._compiled[shape] = program
        return program


_cache_lock = threading.Lock()


def enable_compilation_cache(config: EngineConfig) -> None:
    """Let jax keep compiled programs on disk. Its cache is one per process: the first engine's directory wins.

    ConfigError for another directory than that, or one given that cannot be written; without the default one the
    engine starts all the same, and says so.
    """
    if config.compilation_cache_dir == "":
        return
    given = config.compilation_cache_dir
    wanted = Path(given) if given else default_compilation_cache()
    with _cache_lock:
        current = jax.config.jax_compilation_cache_dir
        if current is not None:
            if given is not None and current != str(wanted):
                raise ConfigError(
                    f"compilation_cache_dir={given!r}: this process already uses {current!r}; leave it out or use that"
                )
            return
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=wanted).close()
        except OSError as error:
            if given is not None:
                raise ConfigError(f"compilation_cache_dir={given!r} cannot be written: {error}") from error
            log.warning("compiled programs are not kept: %s cannot be written: %s", wanted, error)
            return
        jax.config.update("jax_compilation_cache_dir", str(wanted))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
