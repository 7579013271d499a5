"""What a step must read and compute, counted from the model's shape alone, and the fraction of a machine that is.

Counts only what no implementation can avoid: matmul weights once per step, the K/V rows that queries see, the
products themselves. Norms, activations, sampling and embedding lookups are left out: the fractions are not flattered.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.config import ModelConfig


def layer_matmul_weights(config: ModelConfig) -> int:
    """Weights that a token is multiplied with in all decoder layers: projections, and the MLP or its own experts."""
    return sum(_matmul_weights(config, index) for index in range(len(config.layers)))


def _matmul_weights(config: ModelConfig, index: int) -> int:
    layer, kv = config.layers[index], config.kv_shape(index)
    num_kv = 0 if layer.kv_from is not None else 1 if layer.k_eq_v else 2
    heads = 2 * config.q_heads + num_kv * kv.kv_heads
    ffn_size = layer.ffn_size or config.ffn_size
    if layer.experts is not None:
        ffn_size = layer.experts.per_token * layer.experts.ffn_size
    return config.embed_size * (heads * kv.head_dim + (3 if config.gated_mlp else 2) * ffn_size)


def unembed_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.embed_size


def kv_row_bytes(config: ModelConfig, index: int, dtype_bytes: int) -> int:
    """Bytes of one K and one V row of a layer."""
    kv = config.kv_shape(index)
    return 2 * kv.kv_heads * kv.head_dim * dtype_bytes


def visible_kv_bytes(config: ModelConfig, kv_rows: float, dtype_bytes: int) -> float:
    """Bytes of K/V that one decode token reads in all layers when its sequence holds `kv_rows`."""
    return sum(
        (kv_rows if layer.window is None else min(kv_rows, layer.window)) * kv_row_bytes(config, index, dtype_bytes)
        for index, layer in enumerate(config.layers)
    )


def decode_step_bytes(config: ModelConfig, kv_rows: Iterable[float], dtype_bytes: int) -> float:
    """Bytes one decode step must read: every matmul weight once, and each sequence's visible K/V rows.

    `kv_rows`: rows held by each running sequence, the new token's included. The token embedding is a lookup; a tied
    table is still read once, as the unembedding. Of a mixture, the experts of one token: others may choose the same.
    """
    weights = layer_matmul_weights(config) + unembed_weights(config)
    return weights * dtype_bytes + sum(visible_kv_bytes(config, n, dtype_bytes) for n in kv_rows)


def prefill_flops(config: ModelConfig, num_tokens: int, *, num_sampled: int = 1) -> float:
    """Floating-point operations (a multiply-add is two) to prefill one prompt of `num_tokens` from nothing.

    Attention counts the causal, windowed pairs only; the unembedding only the `num_sampled` rows.
    """
    linear = 2 * layer_matmul_weights(config) * num_tokens + 2 * unembed_weights(config) * num_sampled
    pairs = 0  # times head_dim
    for index, layer in enumerate(config.layers):
        window = num_tokens if layer.window is None else min(layer.window, num_tokens)
        # the first `window` queries see 1, 2, .. window rows, the others `window` each
        seen = window * (window + 1) // 2 + (num_tokens - window) * window
        pairs += seen * config.kv_shape(index).head_dim
    return float(linear + 4 * pairs * config.q_heads)


def mbu(num_bytes: float, seconds: float, read_bandwidth_gbps: float) -> float:
    """Memory-bandwidth utilization: bytes that must be read, over the time, over what the machine can read."""
    return num_bytes / seconds / (read_bandwidth_gbps * 1e9)


def mfu(flops: float, seconds: float, matmul_tflops: float) -> float:
    """Model FLOPs utilization: operations that must be done, over the time, over the machine's matmul rate."""
    return flops / seconds / (matmul_tflops * 1e12)
