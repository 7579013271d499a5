"""What a model is (`ModelConfig`) and how an engine runs it (`EngineConfig`).

Both are frozen and validated when made; every field is read somewhere (tests/test_architecture.py).
Only this module, serving/cli.py and sharding/multihost.py read the environment.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration value that cannot be honoured; the message names the value and the choices."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rope scaling: long wavelengths slowed by `factor`, short ones kept, a smooth ramp between.

    Source: Llama 3.1 reference implementation (Meta, 2024); "The Llama 3 Herd of Models", section 3.4.2.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), rotate-half convention. Frozen, so layers can share one."""

    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer is, where layers differ."""

    window: int | None = None  # tokens a query sees, itself included; None = all
    kv_from: int | None = None  # an earlier layer whose K/V this layer reads (cross-layer attention)
    rope: RopeSpec | None = None  # None = no rotation


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; `layers` is one LayerSpec per layer, so depth cannot disagree with it."""

    architecture: str
    vocab_size: int
    embed_size: int
    ffn_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tie_embeddings: bool
    max_position: int
    layers: tuple[LayerSpec, ...]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "ffn_size", "q_heads", "kv_heads", "head_dim", "max_position"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.q_heads % self.kv_heads:
            raise ConfigError(f"q_heads={self.q_heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for rotary embedding")
        if not self.layers:
            raise ConfigError("a model needs at least one layer")
        for index, layer in enumerate(self.layers):
            if layer.window is not None and layer.window < 1:
                raise ConfigError(f"layer {index}: window={layer.window} must be at least 1, or None for all tokens")
            if layer.kv_from is not None:
                if not 0 <= layer.kv_from < index or self.layers[layer.kv_from].kv_from is not None:
                    raise ConfigError(
                        f"layer {index}: kv_from={layer.kv_from} must name an earlier layer that owns K/V"
                    )
                if self.layers[layer.kv_from].window != layer.window:
                    raise ConfigError(
                        f"layer {index}: window must equal that of layer {layer.kv_from}, whose K/V it reads"
                    )


@dataclass(frozen=True)
class PageGroup:
    """Layers whose K/V pages are handed out together: one page table per sequence and group."""

    window: int | None
    layers: tuple[int, ...]  # indices of the K/V-owning layers


def page_groups(config: ModelConfig) -> tuple[PageGroup, ...]:
    """One group per distinct window, in order of first appearance (K/V shapes are equal within a model today)."""
    owners: dict[int | None, list[int]] = {}
    for index, layer in enumerate(config.layers):
        if layer.kv_from is None:
            owners.setdefault(layer.window, []).append(index)
    return tuple(PageGroup(window, tuple(layers)) for window, layers in owners.items())


BATCHING = ("continuous", "dynamic", "static")
DTYPES = ("bfloat16", "float32")
KV_DTYPES = ("auto", "bfloat16", "float32", "int8", "float8_e4m3fn", "int4")
ATTENTION_BACKENDS = ("auto", "mosaic_tpu", "mosaic_gpu", "triton", "llvm_cpu", "xla", "reference")
MATMUL_BACKENDS = ("auto", "mosaic_tpu", "triton", "llvm_cpu", "xla", "reference")


def _flag(
    default: Any,
    help_text: str,
    choices: tuple[str, ...] | None = None,
    limits: tuple[float, float] | None = None,
) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices, "limits": limits})


def _check_field(spec: dataclasses.Field, value: object) -> None:
    """ConfigError unless the value has the field's type and lies within its choices or limits."""
    choices, limits = spec.metadata["choices"], spec.metadata["limits"]
    if choices is not None and value not in choices:
        raise ConfigError(f"{spec.name}={value!r} is not one of {', '.join(choices)}")
    kinds = {kind.strip() for kind in str(spec.type).split("|")}
    if value is None and "None" in kinds:
        return
    accepted: Any = {"float": (int, float), "int": int, "bool": bool, "str": str}[(kinds - {"None"}).pop()]
    if not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool):
        raise ConfigError(f"{spec.name}={value!r} must be of type {spec.type}")
    if limits is not None and not limits[0] <= value <= limits[1]:  # type: ignore[operator]
        raise ConfigError(f"{spec.name}={value!r} must be from {limits[0]:,} to {limits[1]:,}")


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model. Flags are generated from these fields: `max_num_seqs` becomes `--max-num-seqs`."""

    dtype: str = _flag("bfloat16", "dtype of weights, activations and K/V", DTYPES)
    max_num_seqs: int = _flag(16, "decode slots: sequences that run at once", limits=(1, 16_384))
    max_model_len: int | None = _flag(
        None, "longest prompt plus completion in tokens (default: what the model allows)", limits=(2, 2**31 - 1)
    )
    max_num_batched_tokens: int = _flag(
        512, "token budget of one mixed step: decode rows plus prefill chunks", limits=(1, 2**20)
    )
    max_prefill_seqs: int = _flag(4, "sequences that may prefill in one mixed step", limits=(1, 1024))
    min_prefill_bucket: int = _flag(32, "smallest compiled prefill size; buckets double from here", limits=(1, 2**20))
    page_size: int | None = _flag(
        None, "tokens per K/V page (default: 32 on CPUs, 64 on GPUs, 128 on TPUs)", limits=(1, 2**16)
    )
    kv_dtype: str = _flag(
        "auto", "dtype of K/V pages (auto: --dtype); integers and fp8 have a scale per head", KV_DTYPES
    )
    kv_memory_bytes: int | None = _flag(
        None,
        "bytes for K/V pages (default: every slot can reach max_model_len, up to a quarter of memory)",
        limits=(1, 2**63 - 1),
    )
    prefix_caching: bool = _flag(True, "share K/V pages between requests with a common prefix")
    chunked_prefill: bool = _flag(
        True, "split long prompts over steps; off: a prompt is prefilled in one step or refused"
    )
    batching: str = _flag(
        "continuous", "admission: continuous, dynamic (max batch or max wait), static (full batches)", BATCHING
    )
    max_batch_wait_s: float = _flag(
        0.05, "dynamic batching: longest wait for a batch to fill, in seconds", limits=(0, 3600)
    )
    max_queue: int = _flag(1024, "requests that may wait; further ones are refused", limits=(1, 2**20))
    loop_steps: int = _flag(16, "most decode steps in one compiled loop call", limits=(1, 1024))
    stream_interval_s: float = _flag(
        0.1, "aimed time between streamed chunks; sets the loop length while nobody waits", limits=(0, 3600)
    )
    watchdog_s: float = _flag(
        120.0, "report a device call that has not returned after this many seconds", limits=(0, 10**6)
    )
    seed: int = _flag(0, "seed for requests that bring none", limits=(-(2**63), 2**63 - 1))
    attention_backend: str = _flag("auto", "attention kernel", ATTENTION_BACKENDS)
    matmul_backend: str = _flag("auto", "matrix multiplication kernel", MATMUL_BACKENDS)
    compilation_cache_dir: str | None = _flag(
        None, "persistent compilation cache (default: ~/.cache/jaxinfer/xla; empty string: off)"
    )

    def __post_init__(self) -> None:
        for spec in flag_fields(EngineConfig):
            _check_field(spec, getattr(self, spec.name))
        if self.min_prefill_bucket > self.max_num_batched_tokens:
            raise ConfigError(
                f"min_prefill_bucket={self.min_prefill_bucket} is over "
                f"max_num_batched_tokens={self.max_num_batched_tokens}"
            )

    @property
    def prefill_buckets(self) -> tuple[int, ...]:
        """Numbers of prefill tokens that mixed steps are compiled for: doubling from the smallest, ascending."""
        buckets = [self.min_prefill_bucket]
        while buckets[-1] < self.max_num_batched_tokens:
            buckets.append(2 * buckets[-1])
        return tuple(buckets)


def flag_fields(config_class: type) -> list[dataclasses.Field]:
    """The fields of a config dataclass that become command-line flags."""
    return [f for f in dataclasses.fields(config_class) if "help" in f.metadata]


def default_compilation_cache() -> Path:
    """`$XDG_CACHE_HOME/jaxinfer/xla`, or below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "jaxinfer" / "xla"


def shipped_model() -> Path:
    """Directory of the model that ships with the project."""
    return Path(__file__).parent / "assets" / "tiny_python"
