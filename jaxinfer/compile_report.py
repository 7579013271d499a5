"""What an engine's programs would be on devices that are not here: whether they fit, what they send, how fast at best.

Everything is of one device. Hides how the compiler is asked, and how K/V that does not fit is cut, more than once if
need be, so that the programs can be compiled all the same; the report says so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax

from jaxinfer import memory
from jaxinfer.batch import device_kv_spec, page_size_of
from jaxinfer.blueprint import Blueprint, device_bytes
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig, page_groups
from jaxinfer.model_presets import model_of
from jaxinfer.perf import mesh_roofline
from jaxinfer.perf.mesh_roofline import WeightBytes
from jaxinfer.placement import PlacedParameter, mesh_of
from jaxinfer.program_shapes import Shape
from sharding import copies, topology, traffic
from sharding.program import Program
from sharding.tpu_slice import Slice

# Of memory, left for temporaries where K/V has to be cut for a program to compile: the first that will do. Temporaries
# do not depend on how many pages there are.
SPARE_SHARES = (0.02, 0.08, 0.32)
LENGTHS = (2048, 8192, 32768, 131072)  # of sequences: how many of each would fit
LARGE_BYTES = 1 << 20  # of an argument whose copy is reported
_ALL = 1 << 62  # bytes for K/V: whatever the batch needs

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to compile, and for what."""

    name: str
    model: ModelConfig
    config: EngineConfig  # its max_num_seqs is the batch, its max_model_len the context
    piece: Slice
    prefill_chunk: int  # tokens of a mixed step; 0: only the decode loop
    weights: str | None = None  # as if they were stored so

    @property
    def batch(self) -> int:
        return self.config.max_num_seqs

    @property
    def context(self) -> int:
        return memory.max_model_len(self.model, self.config)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one device, before anything is compiled."""

    limit: int
    weights: int
    kv: int  # pages for the whole batch at its context
    page_counts: tuple[tuple[int, ...], ...]  # to compile with, in turn, until a program fits: of each page group


def request_of(
    model: str,
    device: str,
    config: EngineConfig,
    *,
    weights: str | None = None,
    prefill_chunk: int = 0,
) -> Request:
    """`model`: a directory or a preset; `device`: "v6e:4x4", or "v6e" for the slice with as many devices as the mesh.

    A mesh that is not given is a tensor axis over all devices. Raises ConfigError for what does not exist.
    """
    name, loaded = model_of(model, weights)
    try:
        if ":" in device:
            piece = Slice.parse(device)
        else:
            piece = Slice.smallest(device, config.mesh_sizes.num_devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not config.mesh and piece.num_devices > 1:
        config = dataclasses.replace(config, mesh=f"tensor={piece.num_devices}")
    return Request(name, loaded, config, piece, prefill_chunk, weights)


def report(
    request: Request, say: Say = lambda text: None, keep_text: Path | None = None, only: str | None = None
) -> dict[str, Any]:
    """The report, as JSON has it. `keep_text`: an existing directory for the HLO; `only`: "decode" or "prefill".

    Raises ConfigError where model, options and mesh do not fit together; RuntimeError where nothing can be compiled.
    """
    found = topology.devices_of(request.piece)
    mesh = mesh_of(request.model, request.config, found)
    assert mesh is not None  # given devices, there is one, of one device too
    if mesh.config.num_devices != len(found):
        try:
            fits = f"{Slice.smallest(request.piece.device.name, mesh.config.num_devices).name}, or "
        except ValueError:  # no slice has as many
            fits = ""
        raise ConfigError(
            f"mesh={str(mesh)!r} has {mesh.config.num_devices} devices, {request.piece.name} has {len(found)}; "
            f"use {fits}a mesh of {len(found)}"
        )
    with topology.targeting(request.piece.device, mesh.mesh):
        limit = topology.memory_limit_bytes(request.piece)
        began = time.perf_counter()
        blueprint = Blueprint(request.model, request.config, mesh, num_pages=_pages(request))
        sizes = _sized(request, blueprint, limit)
        planning_s = time.perf_counter() - began
        shapes = {"decode": Shape(blueprint.limits.slots)}
        if request.prefill_chunk:
            shapes["prefill"] = Shape(blueprint.limits.slots, request.prefill_chunk)
        programs = {
            name: _program(request, blueprint, shape, sizes, say, keep_text)
            for name, shape in shapes.items()
            if only in (None, name)
        }
        found_memory = _memory(request, sizes, programs)
    return {
        "versions": versions(),
        "model": request.name,
        "device": _device(request.piece),
        "mesh": str(mesh),
        "num_devices": mesh.config.num_devices,
        "batch": request.batch,
        "context": request.context,
        "dtype": request.config.dtype,
        "kv_dtype": request.config.kv_dtype,
        "weights": _weight_dtypes(blueprint.placed),
        "planning_s": planning_s,
        "memory": found_memory,
        "programs": programs,
    }


def versions() -> dict[str, str | None]:
    """Of what compiles; None where a package does not say."""
    found: dict[str, str | None] = {"jax": jax.__version__}
    try:
        found["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # a nightly build has another name
        found["libtpu"] = None
    return found


def _weight_dtypes(placed: tuple[PlacedParameter, ...]) -> dict[str, int]:
    """How many of the model's parameters are held as what."""
    specs = [part.spec for each in placed for part in each.parts or (each,)]
    return dict(Counter(spec.format.dtype if spec.format else str(spec.dtype) for spec in specs))


def _device(piece: Slice) -> dict[str, Any]:
    return {
        "name": piece.name,
        "chips": piece.num_chips,
        "devices_per_chip": piece.device.devices_per_chip,
        "hbm_gbps": piece.device.memory_gbps,
        "bf16_tflops": piece.device.bf16_tflops,
        "links": piece.device.links,
        "link_gbps": piece.device.link_gbps,
    }


# ---- memory


def _sized(request: Request, blueprint: Blueprint, limit: int) -> Sizes:
    """What the arrays take, `blueprint` having all the pages that are wanted, and which pages fit beside the rest."""
    wanted = _pages(request)
    weights, slots = (sum(map(device_bytes, jax.tree.leaves(x))) for x in (blueprint.parameters, blueprint.state.slots))
    kv = _kv_bytes(request, wanted)
    room = [limit - weights - int(share * limit) - slots for share in SPARE_SHARES]
    cut = [tuple(max(2, min(count, int(count * left / kv))) for count in wanted) for left in room if left > 0]
    return Sizes(limit, weights, kv, tuple(dict.fromkeys(cut)) or (wanted,))


def _pages(request: Request, length: int | None = None, batch: int | None = None) -> tuple[int, ...]:
    """Pages of each group on one device for `batch` sequences, over all data shards, of `length` tokens; as asked."""
    length, batch = request.context if length is None else length, request.batch if batch is None else batch
    config = dataclasses.replace(request.config, kv_memory_bytes=_ALL, max_num_seqs=batch, max_model_len=None)
    return memory.pages_per_group(request.model, config, length)


def _kv_bytes(request: Request, counts: tuple[int, ...]) -> int:
    """Of so many pages of each group, on one device."""
    config = request.config
    return (
        sum(
            count * page_size_of(config) * device_kv_spec(group.shape, config).token_bytes * len(group.layers)
            for count, group in zip(counts, page_groups(request.model), strict=True)
        )
        // config.mesh_sizes.pipe
    )


def _memory(request: Request, sizes: Sizes, programs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sum of it, by what each program needs at most beside weights and K/V.

    Where a program could not be compiled at all, that is not known: "needed_bytes" is too little, and there is no
    "capacity".
    """
    compiled = [program for program in programs.values() if "error" not in program]
    temporaries = max((program["temporary_bytes"] + program["result_bytes"] for program in compiled), default=0)
    others = max((program["other_argument_bytes"] for program in compiled), default=0)
    needed = sizes.weights + sizes.kv + temporaries + others
    left = sizes.limit - needed + sizes.kv
    whole = len(compiled) == len(programs)
    compiled_with = min((program["kv_bytes"] for program in compiled), default=None)
    refused = any(program["refused"] for program in compiled)
    if refused and compiled_with is not None:  # the compiler needs more than the sum says
        left = min(left, compiled_with)
    return {
        "limit_bytes": sizes.limit,
        "weight_bytes": sizes.weights,
        "kv_bytes": sizes.kv,
        "slot_bytes": others,
        "temporary_bytes": temporaries,
        "needed_bytes": needed,
        "headroom_bytes": sizes.limit - needed,
        "fits": needed <= sizes.limit and whole and not refused,
        "compiled_with_kv_bytes": compiled_with,
        "default_kv_bytes": int(sizes.limit * memory.KV_SHARE),
        "capacity": [{"length": length, "sequences": count} for length, count in _capacity(request, left) if whole],
    }


def _capacity(request: Request, left: int) -> list[tuple[int, int]]:
    """(length, how many sequences of it at once) over all data shards, in `left` bytes of each device."""
    data, found = request.config.mesh_sizes.data, []
    for length in (*(n for n in LENGTHS if n < request.model.max_position), request.model.max_position):
        one, two = (_kv_bytes(request, _pages(request, length, n * data)) for n in (1, 2))
        found.append((length, data * max(0, 1 + (left - one) // (two - one)) if left >= one else 0))
    return found


# ---- programs


def _program(
    request: Request, blueprint: Blueprint, shape: Shape, sizes: Sizes, say: Say, keep_text: Path | None
) -> dict[str, Any]:
    """One program, compiled: its memory, collectives, copies, seconds, and the least time it can take."""
    say(f"{request.name} on {request.piece.name}: {shape}")
    found: dict[str, Any] = {"program": str(shape), "roofline": _roofline(request, blueprint, shape)}
    refused = ""  # the compiler's words
    for counts in sizes.page_counts:
        if refused:
            say(f"{request.name} on {request.piece.name}: {shape} does not fit: with fewer pages, {counts}")
        if counts != blueprint.limits.num_pages:
            blueprint = Blueprint(request.model, request.config, blueprint.mesh, num_pages=counts)
        cpu_began = time.process_time()
        with topology.timed_stages() as seconds:
            lowered = blueprint.lower(shape)
            try:
                compiled = topology.compile_lowered(lowered, request.piece.device, blueprint.compiler_options)
                break
            except topology.OutOfMemory as error:
                refused = str(error).splitlines()[0]
    else:
        return {**found, "error": refused}
    if keep_text is not None:
        (keep_text / _text_name(request, shape)).write_text(compiled.text)
    program = compiled.program
    collectives = traffic.collectives(program)
    step = traffic.of_step(collectives, program)
    kv_bytes = _kv_bytes(request, counts)
    return {
        **found,
        "refused": refused,
        "kv_bytes": kv_bytes,
        "seconds": {**seconds, "cpu": time.process_time() - cpu_began},
        "temporary_bytes": compiled.temporary_bytes,
        "result_bytes": max(0, compiled.output_bytes - compiled.aliased_bytes),
        "other_argument_bytes": compiled.argument_bytes - sizes.weights - kv_bytes,
        "code_bytes": compiled.code_bytes,
        "kernels": len(compiled.fast_memory_bytes),
        "collectives": _grouped(collectives),
        "sent_bytes": traffic.sent_bytes(step),
        "overlap": traffic.overlap(step),
        "copies": _copies(program, blueprint.placed),
    }


def _text_name(request: Request, shape: Shape) -> str:
    """Of a file: another for everything that makes it another program."""
    options = sha256(repr((request.model, request.config)).encode()).hexdigest()[:8]
    words = (request.name, request.weights, request.piece.name, request.config.mesh, shape, options)
    return re.sub(r"[^\w.-]+", "-", "_".join(str(word) for word in words if word)) + ".hlo"


def _grouped(collectives: tuple[traffic.Collective, ...]) -> list[dict[str, Any]]:
    """Collectives that are alike as one line, the largest traffic first."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for one in collectives:
        counts[one.place, one.kind, one.payload_bytes, one.group_size, one.sent_bytes, bool(one.beside)] += one.times
    names = ("place", "kind", "payload_bytes", "group_size", "sent_bytes", "overlapped")
    lines = [{**dict(zip(names, key, strict=True)), "count": count} for key, count in counts.items()]
    return sorted(lines, key=lambda line: -line["sent_bytes"] * line["count"])


def _copies(program: Program, placed: tuple[PlacedParameter, ...]) -> list[dict[str, Any]]:
    """Weights and K/V that are written anew; a weight by our name for it, K/V by jax's name of the argument."""
    leaves = [parameter.label for parameter in placed for _ in jax.tree.leaves(parameter.abstract())]
    names = {f"parameters[{index}]": name for index, name in enumerate(leaves)}
    found = copies.copied_arguments(
        program,
        lambda name, array: array.num_bytes >= LARGE_BYTES and (name in names or name.startswith("state.cache")),
    )
    return [
        {
            "argument": names.get(each.argument, each.argument),
            "shape": list(each.array.dims),
            "bytes": each.array.num_bytes,
            "place": each.place,
        }
        for each in found
    ]


def _roofline(request: Request, blueprint: Blueprint, shape: Shape) -> dict[str, Any]:
    """The least seconds of a step, and tokens per second of the whole mesh: with everything overlapped, and nothing."""
    config, model, piece = request.config, request.model, request.piece
    mesh = config.mesh_sizes
    shared: dict[str, Any] = {
        "kv_token_bytes": lambda kv_shape: device_kv_spec(kv_shape, config).token_bytes,
        "activation_bytes": 2 if config.dtype == "bfloat16" else 4,
    }
    weights = _weight_bytes(blueprint.placed, tied=model.tie_embeddings)
    if shape.prefill_tokens:
        tokens = shape.prefill_tokens * mesh.data
        work = mesh_roofline.prefill_chunk(
            model, weights, mesh, piece.device, tokens=shape.prefill_tokens, longest=request.context, **shared
        )
    else:
        tokens = request.batch
        work = mesh_roofline.decode_step(
            model, weights, mesh, piece.device, batch=request.batch, context=request.context, **shared
        )
    links = piece.links(mesh.num_devices // mesh.data)
    activations = {p.spec.format.activation for p in blueprint.placed if p.spec.format is not None}
    found = mesh_roofline.bound(work, piece.device, links, products=activations)
    return {
        **dataclasses.asdict(work),
        **dataclasses.asdict(found),
        "links": links,
        "bound_by": found.by,
        "seconds": found.seconds,
        "serial_s": found.serial_s,
        "tokens_per_s": tokens / found.seconds,
        "serial_tokens_per_s": tokens / found.serial_s,
    }


def _weight_bytes(placed: tuple[PlacedParameter, ...], *, tied: bool) -> WeightBytes:
    """By how a step reads them: a table of embeddings only where it serves as the unembedding too."""
    sums = {"dense": 0, "experts": 0, "tables": 0}
    for parameter in placed:
        axes = parameter.spec.axes
        looked_up = "columns" in axes or (parameter.names[0] == "embed.weight" and not tied)
        kind = "tables" if looked_up else "experts" if "experts" in axes and len(axes) == 3 else "dense"
        sums[kind] += sum(map(device_bytes, jax.tree.leaves(parameter.abstract())))
    return WeightBytes(**{kind: float(total) for kind, total in sums.items()})
