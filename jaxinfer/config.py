"""What a model is (`ModelConfig`) and how an engine runs it (`EngineConfig`).

Both are frozen and validated when made; every field is read somewhere (tests/test_architecture.py).
Only this module, serving/cli.py and sharding/multihost.py read the environment.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.rope import LengthRule, RopeSpec, length_rule
from sharding.mesh_config import MeshConfig, MeshError

if TYPE_CHECKING:
    from jaxinfer.weight_formats import Quantization


class ConfigError(ValueError):
    """A configuration value that cannot be honoured; the message names the value and the choices."""


NORMS = ("rms", "layer")
NORM_PLACES = ("before", "after", "around")
QK_NORMS = (None, "head", "projection")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
ROUTINGS = ("softmax_then_top_k", "top_k_then_softmax")


@dataclass(frozen=True)
class NormSpec:
    """Root-mean-square norm (Zhang & Sennrich 2019) or layer norm with a bias (Ba et al. 2016), in float32.

    The scale is `offset + weight`; `scale_in_float32`: it is applied before rounding to the activations' dtype.
    """

    eps: float
    kind: str = "rms"
    offset: float = 0.0
    scale_in_float32: bool = False


@dataclass(frozen=True)
class ActivationSpec:
    """A feed-forward layer's nonlinearity; `alpha` and `limit` are GPT-OSS's clamped SwiGLU."""

    name: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.limit <= 0:
            raise ConfigError(f"the activation's alpha={self.alpha} and limit={self.limit} must be positive")


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts (Shazeer et al. 2017): each token goes through `per_token` of `num_experts` small MLPs."""

    num_experts: int
    per_token: int
    ffn_size: int
    routing: str = "softmax_then_top_k"
    renormalize: bool = True  # the chosen experts' weights sum to one
    bias: bool = False  # of the router and of the experts

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.num_experts:
            raise ConfigError(f"per_token={self.per_token} experts must be from 1 to num_experts={self.num_experts}")
        if self.ffn_size < 1:
            raise ConfigError(f"the experts' ffn_size={self.ffn_size} must be at least 1")
        _choice("routing", self.routing, ROUTINGS)


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer is, where layers differ; None in a size means the model's."""

    window: int | None = None  # tokens a query sees, itself included; None = all
    kv_from: int | None = None  # an earlier layer whose K/V this layer reads (cross-layer attention)
    rope: RopeSpec | None = None  # None = no rotation
    experts: ExpertsSpec | None = None  # None = a dense MLP
    head_dim: int | None = None
    kv_heads: int | None = None
    ffn_size: int | None = None
    k_eq_v: bool = False  # values are made of the keys' projection
    activation_sparsity: float = 0.0  # share of the gate's units that are cut off (Gemma 3n)


@dataclass(frozen=True)
class PerLayerInputSpec:
    """Per-layer embeddings (Gemma 3n): each layer adds a small embedding of the token, gated by its hidden state."""

    size: int
    vocab_size: int


@dataclass(frozen=True)
class AltUpSpec:
    """Alternating updates (Baykal et al. 2023) and learned augmented residuals (LAuReL, Menghani et al. 2024)."""

    num_streams: int
    active: int
    scale_corrected: bool
    laurel_rank: int


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
    norm: NormSpec
    tie_embeddings: bool
    max_position: int
    layers: tuple[LayerSpec, ...]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    decoder: str = "transformer"  # the module class that computes it (models/transformer.py)
    activation: ActivationSpec = ActivationSpec()
    gated_mlp: bool = True
    mlp_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    norm_place: str = "before"  # of attention and MLP: their input, their output, or both
    qk_norm: str | None = None  # RMS norm of queries and keys: of each head, or of the whole projection
    v_norm: bool = False  # RMS norm without a scale of each value head
    sinks: bool = False  # a learned logit per query head that takes probability and has no value
    attention_scale: float | None = None  # None = 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float | None = None
    per_layer_input: PerLayerInputSpec | None = None
    alt_up: AltUpSpec | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "ffn_size", "q_heads", "kv_heads", "head_dim", "max_position"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.layers:
            raise ConfigError("a model needs at least one layer")
        _choice("norm", self.norm.kind, NORMS)
        _choice("norm_place", self.norm_place, NORM_PLACES)
        _choice("qk_norm", self.qk_norm, QK_NORMS)
        _choice("activation", self.activation.name, ACTIVATIONS)
        for index in range(len(self.layers)):
            self._check_layer(index)
        try:
            length_rule(layer.rope for layer in self.layers)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check_layer(self, index: int) -> None:
        layer, kv = self.layers[index], self.kv_shape(index)
        if self.q_heads % kv.kv_heads:
            raise ConfigError(f"q_heads={self.q_heads} must be a multiple of kv_heads={kv.kv_heads}")
        if kv.head_dim % 2:
            raise ConfigError(f"head_dim={kv.head_dim} must be even for rotary embedding")
        if layer.window is not None and layer.window < 1:
            raise ConfigError(f"layer {index}: window={layer.window} must be at least 1, or None for all tokens")
        if layer.kv_from is not None:
            if not 0 <= layer.kv_from < index or self.layers[layer.kv_from].kv_from is not None:
                raise ConfigError(f"layer {index}: kv_from={layer.kv_from} must name an earlier layer that owns K/V")
            if self.layers[layer.kv_from].window != layer.window or self.kv_shape(layer.kv_from) != kv:
                raise ConfigError(
                    f"layer {index}: window and K/V shape must equal those of layer {layer.kv_from}, whose K/V it reads"
                )

    def kv_shape(self, index: int) -> KVShape:
        """KV heads and head_dim of a layer."""
        layer = self.layers[index]
        return KVShape(layer.kv_heads or self.kv_heads, layer.head_dim or self.head_dim)

    def kv_owner(self, index: int) -> int:
        """The layer whose K/V a layer reads: itself, or an earlier one."""
        owner = self.layers[index].kv_from
        return index if owner is None else owner

    @property
    def length_rule(self) -> LengthRule | None:
        """How rotation depends on a sequence's length, if it does."""
        return length_rule(layer.rope for layer in self.layers)


@dataclass(frozen=True)
class KVShape:
    """What a token's K, and its V, is in one layer: `kv_heads` x `head_dim` values."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class PageGroup:
    """Layers whose K/V pages are handed out together: one page table per sequence and group."""

    window: int | None
    shape: KVShape
    layers: tuple[int, ...]  # indices of the K/V-owning layers


def page_groups(config: ModelConfig) -> tuple[PageGroup, ...]:
    """One group per distinct (window, K/V shape), in order of first appearance."""
    owners: dict[tuple[int | None, KVShape], list[int]] = {}
    for index, layer in enumerate(config.layers):
        if layer.kv_from is None:
            owners.setdefault((layer.window, config.kv_shape(index)), []).append(index)
    return tuple(PageGroup(window, shape, tuple(layers)) for (window, shape), layers in owners.items())


def _choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


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
    max_num_seqs: int = _flag(16, "decode slots: sequences that run at once, over all data shards", limits=(1, 16_384))
    max_model_len: int | None = _flag(
        None, "longest prompt plus completion in tokens (default: what the model allows)", limits=(2, 2**31 - 1)
    )
    max_num_batched_tokens: int = _flag(
        512, "token budget of one mixed step of a data shard: decode rows plus prefill chunks", limits=(1, 2**20)
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
        "bytes for K/V pages of each device (default: every slot can reach max_model_len, up to a quarter of memory)",
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
    invariant: bool = _flag(
        False, "a request's bits do not depend on its batch, in bfloat16 too (on CPUs; docs/invariance.md has the cost)"
    )
    mesh: str = _flag(
        "",
        "devices by axis, such as tensor=4,context=2 (axes: pipe, data, context, expert, tensor; default: one device)",
    )
    sequence_parallel: bool = _flag(
        True, "under tensor parallelism, prefill splits the tokens between attention and MLP over the devices too"
    )
    compilation_cache_dir: str | None = _flag(
        None, "persistent compilation cache (default: ~/.cache/jaxinfer/xla; empty string: off)"
    )

    def __post_init__(self) -> None:
        for spec in flag_fields(EngineConfig):
            _check_field(spec, getattr(self, spec.name))
        try:
            MeshConfig.parse(self.mesh)
        except MeshError as error:
            raise ConfigError(str(error)) from error
        if self.min_prefill_bucket > self.max_num_batched_tokens:
            raise ConfigError(
                f"min_prefill_bucket={self.min_prefill_bucket} is over "
                f"max_num_batched_tokens={self.max_num_batched_tokens}"
            )

    @property
    def mesh_sizes(self) -> MeshConfig:
        """The mesh's axes and their sizes."""
        return MeshConfig.parse(self.mesh)

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
