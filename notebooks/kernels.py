# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Calling, checking and timing a kernel
#
# `pallas_kernels` is arrays in, arrays out: no model, no mesh, no configuration. Each operation has one contract, an
# oracle, and backends for TPUs, GPUs and CPUs. On a CPU this notebook uses small shapes and takes about a minute.
# As a notebook: `jupytext --to ipynb notebooks/kernels.py`.

# %%
import jax
import jax.numpy as jnp

from pallas_kernels import attention, devices, tensors
from pallas_kernels.attention import KVSpec, Ragged
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.attention.flash import flash_attention
from pallas_kernels.matmul import matmul
from pallas_kernels.timing import compare
from pallas_kernels.workloads import AttentionWork

device = devices.current()
on_cpu = device.platform == "cpu"
print(device if on_cpu else f"{device}: {device.memory_gbps} GB/s, {device.bf16_tflops} TFLOP/s (bfloat16, published)")

# %% [markdown]
# ## Which backend serves what
#
# A backend that does not take a case says why. `jaxinfer info --kernels --device v6e` asks for a device elsewhere.

# %%
spec = KVSpec(kv_heads=2, head_dim=64, page_size=attention.default_page_size(device))
for backend, reason in attention.OP.refusals(spec=spec, q_heads=4, device=device).items():
    print(f"{backend:12} {'takes it' if reason is None else reason}")

# %% [markdown]
# ## Paged attention by hand
#
# Two sequences: one decodes its 6th token, one brings a prompt of 3. `q_start` says where in the packed tokens a
# sequence's queries are, `kv_len` how many rows it has after this call, `page_table` where they lie. Page 0 is trash.

# %%
kv = attention.allocate(spec, num_pages=8)
print("pages of", kv.backend, "hold", spec.token_bytes, "bytes per token")

keys = jax.random.split(jax.random.key(0), 3)
tokens = 1 + 3
q = jax.random.normal(keys[0], (tokens, 4, 64), jnp.bfloat16)
k, v = (jax.random.normal(key, (tokens, 2, 64), jnp.bfloat16) for key in keys[1:])
ragged = Ragged(
    q_start=jnp.array([0, 1, 4], jnp.int32),
    kv_len=jnp.array([6, 3], jnp.int32),
    page_table=jnp.array([[3], [5]], jnp.int32),
    q_position=jnp.array([5, 0, 1, 2], jnp.int32),
    width=1,
    num_decode_seqs=1,
)
attend = jax.jit(attention.attend, donate_argnums=3)
out, lse, kv = attend(q, k, v, kv, ragged)
print("out", out.shape, "log-sum-exp", lse.shape)

# %% [markdown]
# The prompt's part is plain causal attention, which `flash_attention` computes without pages.

# %%
dense, _ = flash_attention(q[None, 1:], k[None, 1:], v[None, 1:])
difference = jnp.max(jnp.abs(dense[0].astype(jnp.float32) - out[1:].astype(jnp.float32)))
print("largest difference", float(difference))
assert difference < 0.02

# %% [markdown]
# ## Checking a backend
#
# One table of cases holds every backend to the oracle: shuffled pages, NaN wherever a call may not read.

# %%
name, _ = attention.choose(spec)
case = attention_cases.CASES["mixed-window"].on_pages_of(spec.page_size)
attention_cases.check(name, case)
print(len(attention_cases.CASES), "cases;", name, "passes", case)

# %% [markdown]
# ## Partial results
#
# Attention over disjoint sets of rows merges exactly by log-sum-exp: long contexts over devices, shared prefixes.

# %%
rows = 40
q, k, v = (jax.random.normal(key, (1, rows, heads, 64)) for key, heads in zip(keys, (4, 2, 2), strict=True))
last = q[:, -1:]
whole, _ = flash_attention(last, k, v)
halves = [flash_attention(last, k[:, part], v[:, part], causal=False) for part in (slice(0, 25), slice(25, rows))]
merged, _ = attention.merge(halves)
assert jnp.allclose(merged, whole, atol=1e-5)

# %% [markdown]
# ## Quantized weights
#
# One layout for every backend; a weight is read once, in its packed form.

# %%
weight = jax.random.normal(keys[0], (512, 1024), jnp.bfloat16)
x = jax.random.normal(keys[1], (4, 1024), jnp.bfloat16)
exact = x.astype(jnp.float32) @ weight.astype(jnp.float32).T
for label, packed in {
    "int8": tensors.quantize(weight, "int8"),
    "int4, groups of 64": tensors.quantize(weight, "int4", group_size=64),
    "W8A8": tensors.quantize(weight, "int8", activation="int8"),
}.items():
    error = jnp.linalg.norm(matmul(x, packed, out_dtype=jnp.float32) - exact) / jnp.linalg.norm(exact)
    print(f"{label:20} {packed.num_bytes / weight.nbytes:.2f} of the bytes, relative error {float(error):.4f}")
    assert error < 0.15

# %% [markdown]
# ## Timing
#
# Programs take turns within one run; a copy of memory tells what this machine can do at all.

# %%
work = AttentionWork("decode", page_size=spec.page_size, seqs=4 if on_cpu else 64, rows=512 if on_cpu else 8192)
willing = attention.OP.refusals(spec=work.spec, q_heads=work.q_heads, device=device)
programs = {
    name: work.call(name, device, filled=True).program()
    for name, reason in willing.items()
    if reason is None and name != "reference"
}
data = jnp.ones((1 << 24 if on_cpu else 1 << 28,), jnp.float32)
copy = jax.jit(lambda x: x + 1)
programs["copy"] = lambda: copy(data)
num_bytes = dict.fromkeys(programs, work.kv_bytes) | {"copy": 2 * data.nbytes}
for name, timing in compare(programs, rounds=5).items():
    rates = [num_bytes[name] / seconds / 1e9 for seconds in (timing.median_s, timing.highest_s, timing.lowest_s)]
    print(f"{name:12} {rates[0]:8.1f} GB/s ({rates[1]:.1f} to {rates[2]:.1f})")
