"""config.json's `quantization_config` as a `Quantization`: which weights are stored in which format.

Read as strictly as the rest of the file: a field that nothing reads is an error, and so is what cannot be served with
exactly the values that are stored. Imports no jax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.models.hugging_face import Fields
from jaxinfer.weight_formats import Quantization, StoredFormat, WeightFormat

_FIELD = "quantization_config."
_LAYERS = r".*\blayers\..*"  # GPTQ and AWQ quantize linear maps in layers, and neither routers nor the unembedding
_ROUTERS = r".*\.(?:gate|router)"
_PARTS = {8: "int8", 4: "int4"}  # what packed values of so many bits are held as
_MXFP4_GROUP = 32  # the format's own

# What a quantizer notes of its run, or says to other runtimes.
_GPTQ_NOTES = (
    "act_group_aware",
    "autoround_version",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "desc_act",  # whether inputs are out of order is looked up in the tensors themselves
    "disable_exllama",
    "enable_minmax_tuning",
    "enable_quanted_input",
    "exllama_config",
    "hyb_act",
    "iters",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "mse",
    "pack_impl",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)
_AWQ_NOTES = ("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse")


def read_quantization(hf: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a config.json, of its `text_config` where it has one; None: its weights are plain.

    Raises ConfigError naming the field, its value and what is supported.
    """
    text = hf.get("text_config")
    table = hf.get("quantization_config")
    if table is None and isinstance(text, dict):
        table = text.get("quantization_config")
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigError(f"quantization_config={table!r} must be an object")
    fields = Fields(table, prefix=_FIELD)
    method = fields.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise ConfigError(
            f"{_FIELD}quant_method={method!r} is not supported; supported: {', '.join(_READERS)}. Convert the model to "
            "one of them, for example with llm-compressor, or serve the model it was made of"
        )
    quantization = _READERS[method](fields)
    fields.finish()
    return quantization


def _gptq(fields: Fields) -> Quantization:
    fields.fixed({"is_marlin_format": False, "pack_dtype": "int32", "lm_head": False})
    if fields.get("dynamic"):
        raise ConfigError(f"{_FIELD}dynamic changes the format of some modules; supported: its absence")
    fields.skip(*_GPTQ_NOTES)
    fields.fixed({"data_type": "int"})
    bits = _one_of(fields, "bits", (4, 8))
    layouts = ("gptq", "gptq_v2")
    layout = _one_of(fields, "checkpoint_format", layouts, _one_of(fields, "format", layouts, "gptq"))
    held = WeightFormat(_PARTS[bits], _group_size(fields), zero_points=not fields.boolean("sym", True))
    modules = _strings(fields, "modules_in_block_to_quantize", flatten=True)
    pattern = _LAYERS if not modules else rf".*\blayers\.\d+\.(?:{'|'.join(map(re.escape, modules))})"
    return Quantization("gptq", ((pattern, StoredFormat(layout, held, bits)),), (_ROUTERS,))


def _awq(fields: Fields) -> Quantization:
    fields.skip(*_AWQ_NOTES)
    bits = _one_of(fields, "bits", (4,), _one_of(fields, "w_bit", (4,), 4))
    versions = ("gemm", "GEMM")
    _one_of(fields, "version", versions, _one_of(fields, "format", versions, "gemm"))
    fields.fixed({"zero_point": True})
    held = WeightFormat("int4", _group_size(fields), zero_points=True)
    kept = _kept(_strings(fields, "modules_to_not_convert"))
    return Quantization("awq", ((_LAYERS, StoredFormat("awq", held, bits)),), (_ROUTERS, *kept))


def _fp8(fields: Fields) -> Quantization:
    """FP8 with a scale per block. Activations stay as they are, where its own runtimes round them to FP8 as well."""
    fields.fixed({"activation_scheme": "dynamic", "fmt": "e4m3", "expert_dtype": "fp8", "dequantize": False})
    _one_of(fields, "scale_fmt", ("float", "ue8m0"), "float")
    if modules := fields.get("modules_to_convert"):
        raise ConfigError(f"{_FIELD}modules_to_convert={modules!r} is not supported; supported: its absence")
    block_outputs, group_size = _block(fields, "weight_block_size")
    stored = StoredFormat("fp8-block", WeightFormat("float8_e4m3fn", group_size), 8, block_outputs=block_outputs)
    kept = _kept([*_strings(fields, "modules_to_not_convert"), *_strings(fields, "ignored_layers")])
    return Quantization("fp8", ((".*", stored),), kept)


def _mxfp4(fields: Fields) -> Quantization:
    fields.fixed({"dequantize": False})
    held = WeightFormat("int8", _MXFP4_GROUP, scale_dtype="bfloat16")
    kept = _kept(_strings(fields, "modules_to_not_convert"))
    return Quantization("mxfp4", ((r".*\.experts\..*", StoredFormat("mxfp4", held, 4)),), kept)


def _compressed_tensors(fields: Fields) -> Quantization:
    fields.skip("global_compression_ratio", "quantization_status", "version")
    fields.fixed({"kv_cache_scheme": None, "moe_sparsity_config": None})
    for name in ("sparsity_config", "transform_config"):
        value = fields.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise ConfigError(f"{_FIELD}{name}={value!r} is not supported; supported: its absence")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{_FIELD}config_groups={groups!r} must name groups of modules and their weights' format")
    default = fields.get("format")
    formats: list[tuple[int, str, StoredFormat]] = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise ConfigError(f"{_FIELD}config_groups.{name}={group!r} must be an object with targets and weights")
        inner = Fields(group, prefix=f"{_FIELD}config_groups.{name}.")
        stored = _group_format(inner, default)
        formats += [(*_target(target), stored) for target in _strings(inner, "targets")]
        inner.finish()
    formats.sort(key=lambda entry: entry[0])
    ignored = tuple(pattern for _, pattern in map(_target, _strings(fields, "ignore")))
    return Quantization("compressed-tensors", tuple((pattern, stored) for _, pattern, stored in formats), ignored)


_READERS: Mapping[str, Callable[[Fields], Quantization]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}


def _group_format(group: Fields, default: Any) -> StoredFormat:
    """A group of compressed-tensors: its weights, and whether activations are quantized."""
    group.fixed({"output_activations": None})
    format_name = group.get("format") or default
    weights = group.table("weights")
    if weights is None:
        raise ConfigError(f"{group.prefix}weights is missing; only weights, or weights and activations, are quantized")
    weights.fixed({"dynamic": False})
    if weights.get("actorder") is not False:
        _one_of(weights, "actorder", ("weight", "static", None))
    weights.skip("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_online")
    kind, bits = weights.get("type") or "int", weights.integer("num_bits", 8)
    symmetric = weights.boolean("symmetric", True)
    strategy, group_size, block_outputs = _scaling(weights)
    weights.finish()
    layout, dtype = _layout(format_name, kind, bits, group.prefix)
    if not symmetric and dtype == "float8_e4m3fn":
        raise ConfigError(f"{weights.prefix}symmetric=False is not supported for weights of type float")
    activation = _activation(group, dtype, per_output=group_size is None and symmetric)
    held = WeightFormat(dtype, group_size, zero_points=not symmetric, activation=activation)
    return StoredFormat(layout, held, bits, block_outputs=block_outputs, per_tensor=strategy == "tensor")


def _scaling(weights: Fields) -> tuple[str, int | None, int]:
    """Which values share a scale: the strategy, the inputs (None: all) and the outputs."""
    default = "tensor" if weights.get("group_size") is None else "group"
    strategy = _one_of(weights, "strategy", ("tensor", "channel", "group", "block"), default)
    structure = weights.get("block_structure")
    if strategy == "block":
        block_outputs, group_size = _block(weights, "block_structure")
        return strategy, group_size, block_outputs
    if structure is not None:
        raise ConfigError(f"{weights.prefix}block_structure={structure!r} needs strategy='block', not {strategy!r}")
    if strategy != "group":
        return strategy, None, 1
    group_size = weights.integer("group_size")
    if group_size < 1:
        raise ConfigError(f"{weights.prefix}group_size={group_size} must be at least 1")
    return strategy, group_size, 1


_FORMATS = "int-quantized (8 bits), float-quantized (8 bits), pack-quantized (4 or 8 bits), naive-quantized (8 bits)"


def _layout(format_name: Any, kind: Any, bits: int, prefix: str) -> tuple[str, str]:
    """The layout of a compressed-tensors format, and what its values are held as."""
    if bits == 8 and (format_name, kind) in (("int-quantized", "int"), ("naive-quantized", "int")):
        return "scaled", "int8"
    if bits == 8 and (format_name, kind) in (("float-quantized", "float"), ("naive-quantized", "float")):
        return "scaled", "float8_e4m3fn"
    if bits in _PARTS and (format_name, kind) == ("pack-quantized", "int"):
        return "packed", _PARTS[bits]
    raise ConfigError(
        f"{prefix}format={format_name!r} with weights of type {kind!r} and {bits} bits is not "
        f"supported; supported: {_FORMATS}"
    )


def _activation(group: Fields, dtype: str, per_output: bool) -> str | None:
    """What activations are rounded to, row by row.

    Where weights have a scale per group or block, activations stay as they are: nothing multiplies groups of both.
    """
    inputs = group.table("input_activations")
    if inputs is None:
        return None
    kind, bits, strategy = inputs.get("type") or "int", inputs.integer("num_bits", 8), inputs.get("strategy")
    if inputs.get("dynamic") is not True or not inputs.boolean("symmetric", True):
        raise ConfigError(
            f"{inputs.prefix[:-1]} must be dynamic and symmetric, not dynamic={inputs.get('dynamic')!r}, "
            f"symmetric={inputs.get('symmetric')!r}: scales that are stored for activations are not supported"
        )
    inputs.fixed({"actorder": None, "block_structure": None})
    inputs.skip("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "group_size", "is_online")
    inputs.finish()
    wanted = "float8_e4m3fn" if (kind, bits) == ("float", 8) else "int8" if (kind, bits) == ("int", 8) else None
    if strategy == "group" and not per_output and wanted is not None:
        return None
    if strategy != "token" or wanted != dtype or not per_output:
        raise ConfigError(
            f"{inputs.prefix[:-1]} of type {kind!r}, {bits} bits and strategy {strategy!r} is not supported with these "
            "weights; supported: 8 bits per token, of the weights' own type, where weights are symmetric and have one "
            "scale per tensor or output"
        )
    return wanted


def _target(target: str) -> tuple[int, str]:
    """How narrow a target of compressed-tensors is, narrowest first, and the pattern of module names that it means."""
    if target.startswith("re:"):
        return 1, _pattern(rf"(?:{target[3:]}).*")
    if target == "Linear":
        return 2, ".*"
    if not re.search(r"[._]", target) and target[:1].isupper():
        raise ConfigError(
            f"{_FIELD}config_groups or ignore names the class {target!r}; supported: Linear, names, re:..."
        )
    return 0, re.escape(target)


def _kept(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns of the modules that `modules_to_not_convert` means: an expression for all up to a dot, or an ending.

    Source: transformers, `should_convert_module`.
    """
    return tuple(_pattern(rf"(?:{name})(?:(?<=\.)|(?=\.|$)).*|.*{re.escape(name)}") for name in names)


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{_FIELD[:-1]} has a pattern that is not a regular expression: {pattern!r}: {error}"
        ) from error
    return pattern


def _one_of(fields: Fields, name: str, choices: tuple[Any, ...], default: Any = None) -> Any:
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or value not in choices:
        raise ConfigError(
            f"{fields.prefix}{name}={value!r} is not supported; supported: {', '.join(map(str, choices))}"
        )
    return value


def _group_size(fields: Fields) -> int | None:
    """Inputs per scale; -1 in the file, None here: all of them."""
    name = "group_size" if fields.has("group_size") else "q_group_size"
    value = fields.integer(name, 128)
    if value != -1 and value < 1:
        raise ConfigError(f"{_FIELD}{name}={value} must be at least 1, or -1 for all inputs")
    return None if value == -1 else value


def _block(fields: Fields, name: str) -> tuple[int, int]:
    value = fields.get(name)
    fits = isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
    if not fits:
        raise ConfigError(
            f"{fields.prefix}{name}={value!r} must be the [outputs, inputs] that share a scale, as [128, 128]; FP8 "
            "with other scales is supported as compressed-tensors"
        )
    return value[0], value[1]


def _strings(fields: Fields, name: str, *, flatten: bool = False) -> list[str]:
    value = fields.get(name) or []
    if flatten and isinstance(value, list):
        value = [entry for part in value for entry in (part if isinstance(part, list) else [part])]
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{fields.prefix}{name}={value!r} must be a list of names")
    return value
