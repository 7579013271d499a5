"""What a step must read and compute, counted from the model's shape alone, and the fraction of a machine that is.

Counts only what no implementation can avoid: matmul weights once per step, the K/V rows that queries see, the
products themselves. Norms, activations, sampling and embedding lookups are left out: the fractions are not flattered.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.config import ModelConfig


def layer_matmul_weights(config: ModelConfig) -> int:
    """Weights that all decoder layers multiply with: q, k, v, o, gate, up and down."""
    q_size, kv_size = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    mlp = 3 * config.embed_size * config.ffn_size
    total = 0
    for layer in config.layers:
        kv = 2 * config.embed_size * kv_size if layer.kv_from is None else 0
        total += 2 * config.embed_size * q_size + kv + mlp
    return total


def unembed_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.embed_size


def kv_row_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of one K and one V row of one layer."""
    return 2 * config.kv_heads * config.head_dim * dtype_bytes


def visible_rows(config: ModelConfig, kv_rows: float) -> float:
    """K/V rows that one decode token reads, summed over layers, when its sequence holds `kv_rows`."""
    return sum(kv_rows if layer.window is None else min(kv_rows, layer.window) for layer in config.layers)


def decode_step_bytes(config: ModelConfig, kv_rows: Iterable[float], dtype_bytes: int) -> float:
    """Bytes one decode step must read: every matmul weight once, and each sequence's visible K/V rows.

    `kv_rows`: rows held by each running sequence, the new token's included. The token embedding is a lookup; a tied
    table is still read once, as the unembedding.
    """
    weights = layer_matmul_weights(config) + unembed_weights(config)
    rows = sum(visible_rows(config, n) for n in kv_rows)
    return weights * dtype_bytes + rows * kv_row_bytes(config, dtype_bytes)


def prefill_flops(config: ModelConfig, num_tokens: int, *, num_sampled: int = 1) -> float:
    """Floating-point operations (a multiply-add is two) to prefill one prompt of `num_tokens` from nothing.

    Attention counts the causal, windowed pairs only; the unembedding only the `num_sampled` rows.
    """
    linear = 2 * layer_matmul_weights(config) * num_tokens + 2 * unembed_weights(config) * num_sampled
    pairs = 0
    for layer in config.layers:
        window = num_tokens if layer.window is None else min(layer.window, num_tokens)
        # the first `window` queries see 1, 2, .. window rows, the others `window` each
        pairs += window * (window + 1) // 2 + (num_tokens - window) * window
    return float(linear + 4 * pairs * config.q_heads * config.head_dim)


def mbu(num_bytes: float, seconds: float, read_bandwidth_gbps: float) -> float:
    """Memory-bandwidth utilization: bytes that must be read, over the time, over what the machine can read."""
    return num_bytes / seconds / (read_bandwidth_gbps * 1e9)


def mfu(flops: float, seconds: float, matmul_tflops: float) -> float:
    """Model FLOPs utilization: operations that must be done, over the time, over the machine's matmul rate."""
    return flops / seconds / (matmul_tflops * 1e12)
