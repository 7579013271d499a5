"""How long a decode step or a prefill chunk takes at the least on a mesh, by published figures of its devices.

Counts what this way of splitting a model makes a device read, multiply and send, and nothing else: no norms, sampling,
launches, or time from link to link. A ring's all-reduce sends 2 (n - 1) / n of its bytes, a gather half of that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from jaxinfer.config import KVShape, ModelConfig
from jaxinfer.perf.roofline import layer_matmul_weights, unembed_weights
from pallas_kernels.devices import Device
from sharding.mesh_config import MeshConfig, kv_shards


@dataclass(frozen=True)
class WeightBytes:
    """Of one device's weights."""

    dense: float  # what every step reads
    experts: float = 0.0  # of a mixture; a step reads those that its tokens choose
    tables: float = 0.0  # only looked up, such as an untied token embedding


@dataclass(frozen=True)
class Work:
    """What one device does in a step."""

    weight_bytes: float
    kv_bytes: float
    flops: float
    sent_bytes: float  # of a chip, over all its links


@dataclass(frozen=True)
class Bound:
    """Seconds that each part takes alone."""

    hbm_s: float
    mxu_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        """The least there can be: the largest part, if everything else runs beside it."""
        return max(self.hbm_s, self.mxu_s, self.links_s)

    @property
    def serial_s(self) -> float:
        """If nothing is sent while something is computed: reading and multiplying always overlap."""
        return max(self.hbm_s, self.mxu_s) + self.links_s

    @property
    def by(self) -> str:
        """The part that bounds: "HBM", "MXU" or "links"."""
        parts = {"HBM": self.hbm_s, "MXU": self.mxu_s, "links": self.links_s}
        return max(parts, key=lambda part: parts[part])


def bound(work: Work, device: Device, links: int, *, products: Collection[str | None] = ()) -> Bound:
    """`links`: of a chip, that it can use at once. Nothing crosses a link inside one chip.

    products: what activations are quantized to, "int8" or "float8_e4m3fn", in some products: all are counted at the
    fastest rate, if the device has a unit for it.
    """
    rates = {"int8": device.int8_tops, "float8_e4m3fn": device.fp8_tflops}
    tflops = max(device.bf16_tflops, *(rates.get(each or "", 0) for each in products), 0)
    return Bound(
        hbm_s=(work.weight_bytes + work.kv_bytes) / (device.memory_gbps * 1e9),
        mxu_s=work.flops / (tflops * 1e12),
        links_s=work.sent_bytes / (links * device.link_gbps * 1e9) if links else 0.0,
    )


def decode_step(
    model: ModelConfig,
    weights: WeightBytes,
    mesh: MeshConfig,
    device: Device,
    *,
    batch: int,
    context: float,
    kv_token_bytes: Callable[[KVShape], int],
    activation_bytes: int = 2,
) -> Work:
    """One token for each of `batch` sequences, over all data shards, that hold `context` rows each.

    kv_token_bytes: what one device holds of a token's K and V in a layer of that shape. In a pipeline a step is one
    pass of every micro-batch, and each reads the weights of its stage again.
    """
    rows = batch / mesh.data
    sent = _sums_sent(model, mesh, device, rows * model.embed_size * activation_bytes)
    for index in range(len(model.layers)):  # each shard's partial results, to every shard
        results = _query_bytes(model, mesh, index, 4 + 4 / model.kv_shape(index).head_dim)
        sent += (mesh.context - 1) * rows * results * device.devices_per_chip / mesh.pipe
    return Work(
        weight_bytes=mesh.pipe * (weights.dense + weights.experts * _experts_read(model, rows / mesh.pipe)),
        kv_bytes=rows * _held_bytes(model, mesh, context, kv_token_bytes),
        flops=_linear_flops(model, mesh, rows, rows)
        + _attention_flops(model, mesh, lambda window: rows * min(context, window or context)),
        sent_bytes=sent,
    )


def prefill_chunk(
    model: ModelConfig,
    weights: WeightBytes,
    mesh: MeshConfig,
    device: Device,
    *,
    tokens: int,
    start: int = 0,
    longest: int | None = None,
    kv_token_bytes: Callable[[KVShape], int],
    activation_bytes: int = 2,
) -> Work:
    """`tokens` tokens of one sequence in each data shard, after the `start` that it holds already.

    longest: that a sequence gets; what is left of the tokens are others' from their beginning on.
    """
    lengths = _lengths(tokens, start, longest)
    own = tokens / mesh.context
    sent = _sums_sent(model, mesh, device, own * model.embed_size * activation_bytes)
    for index in range(len(model.layers)):
        shape = model.kv_shape(index)
        new_rows = 2 * shape.kv_heads / kv_shards(shape.kv_heads, mesh.group) * shape.head_dim * activation_bytes
        queries = _query_bytes(model, mesh, index, activation_bytes)
        results = _query_bytes(model, mesh, index, 4 + 4 / shape.head_dim)
        # new rows to every shard, queries round a ring, results back to their owners
        sent += (mesh.context - 1) * own * (new_rows + queries + results) * device.devices_per_chip / mesh.pipe
    return Work(
        weight_bytes=mesh.pipe * (weights.dense + weights.experts * _experts_read(model, own / mesh.pipe)),
        kv_bytes=sum(_held_bytes(model, mesh, before + new, kv_token_bytes) for before, new in lengths),
        flops=_linear_flops(model, mesh, own, len(lengths))
        + _attention_flops(model, mesh, lambda window: sum(_causal_pairs(*each, window) for each in lengths)),
        sent_bytes=sent,
    )


def _lengths(tokens: int, start: int, longest: int | None) -> list[tuple[int, int]]:
    """(rows held, new tokens) of each sequence of a chunk."""
    first = tokens if longest is None else max(0, min(tokens, longest - start))
    found, left = [(start, first)], tokens - first
    while left:
        found.append((0, min(left, longest or left)))
        left -= found[-1][1]
    return found


def _linear_flops(model: ModelConfig, mesh: MeshConfig, tokens: float, sampled: float) -> float:
    """Of `tokens` tokens, `sampled` of which enter the unembedding."""
    weights = tokens * layer_matmul_weights(model) + sampled * unembed_weights(model)
    return 2 * weights / (mesh.group * mesh.pipe)


def _attention_flops(model: ModelConfig, mesh: MeshConfig, pairs: Callable[[int | None], float]) -> float:
    """Products of queries with keys and with values; `pairs`: how many a layer of that window sees."""
    total = sum(
        4 * model.q_heads / mesh.group * model.kv_shape(index).head_dim * pairs(layer.window)
        for index, layer in enumerate(model.layers)
    )
    return total / (mesh.context * mesh.pipe)


def _causal_pairs(start: int, tokens: int, window: int | None) -> float:
    """Rows that queries at positions [start, start + tokens) see, themselves included."""
    last = start + tokens
    whole = min(max(start, window or last), last)  # from here on, a query sees `window` rows
    before = (whole * (whole + 1) - start * (start + 1)) / 2
    return before + (last - whole) * (window or 0)


def _query_bytes(model: ModelConfig, mesh: MeshConfig, index: int, bytes_per_value: float) -> float:
    """Of the heads of one token that a device has."""
    return model.q_heads / mesh.group * model.kv_shape(index).head_dim * bytes_per_value


def _held_bytes(
    model: ModelConfig, mesh: MeshConfig, context: float, kv_token_bytes: Callable[[KVShape], int]
) -> float:
    """What one device holds, and reads, of a sequence's K/V."""
    visible = (
        min(context, layer.window or context) * kv_token_bytes(model.kv_shape(index))
        for index, layer in enumerate(model.layers)
    )
    return sum(visible) / (mesh.context * mesh.pipe)


def _experts_read(model: ModelConfig, tokens: float) -> float:
    """The share of all experts that so many tokens choose, if they choose evenly and apart from one another."""
    experts = [layer.experts for layer in model.layers if layer.experts is not None]
    if not experts:
        return 0.0
    return sum(1 - (1 - e.per_token / e.num_experts) ** tokens for e in experts) / len(experts)


def _sums_sent(model: ModelConfig, mesh: MeshConfig, device: Device, activation: float) -> float:
    """A chip, for two sums per layer, the embedding and the next stage; `activation`: bytes between layers."""
    group, all_but_rows = (_share(size, device) for size in (mesh.group, mesh.group * mesh.pipe))
    sums = 2 * len(model.layers) / mesh.pipe * 2 * group * activation
    stages = 0.0 if mesh.pipe == 1 else (1 + 2 * _share(mesh.pipe, device)) * activation
    return sums + all_but_rows * activation + stages


def _share(num_devices: int, device: Device) -> float:
    """(n - 1) / n of the chips of a group: devices on one chip need no link."""
    chips = max(1, num_devices // device.devices_per_chip)
    return (chips - 1) / chips
