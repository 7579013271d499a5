"""Which stored tensors each parameter is made of: sources resolved, and everything that does not fit named.

Hides fused tensors (whose parts must tile them), one tensor per expert, and quantized weights, which are several
tensors each. Reads headers only.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.models import ignored_weights, weight_source
from jaxinfer.models.dense_tensors import dense_jobs
from jaxinfer.models.quantized_checkpoint import pieces_of, quantized_jobs
from jaxinfer.models.quantized_layouts import Piece
from jaxinfer.models.regions import Job, Region, Target, num_elements
from jaxinfer.models.safetensors_files import FLOATING, CheckpointError, StoredTensor, some
from jaxinfer.models.sources import Source
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from jaxinfer.weight_formats import StoredFormat

logger = logging.getLogger(__name__)
_IRRELEVANT = re.compile(r".*\brotary_emb\.inv_freq")  # derived from config.json; old files carry it


@dataclass(frozen=True)
class Wanted:
    """One parameter and the stored tensors it is made of: a `StoredParameter`."""

    spec: ParameterSpec
    source: Source
    rows: slice  # the outputs it takes of the stored tensor's
    full_shape: tuple[int, ...]  # of all parts together, in our layout
    stored_as: StoredFormat | None  # None: as it is
    tensors: tuple[Mapping[str, StoredTensor], ...]  # by piece; one mapping, or one per expert

    @property
    def name(self) -> str:
        """Of its first stored tensor."""
        return next(iter(self.tensors[0].values())).name

    def num_bytes(self, region: Region) -> int:
        """The region's share of its stored tensors' bytes."""
        total = sum(tensor.num_bytes for pieces in self.tensors for tensor in pieces.values())
        return total * num_elements(region) // max(math.prod(self.full_shape), 1)

    def jobs(self, targets: Sequence[Target]) -> list[Job]:
        """What fills the targets."""
        if self.stored_as is None:
            return dense_jobs(self.source, self.rows, tuple(pieces["weight"] for pieces in self.tensors), targets)
        return quantized_jobs(
            self.stored_as, self.full_shape, self.rows, self.tensors, targets, per_expert=self.source.per_expert
        )


def match(
    specs: Mapping[str, ParameterSpec], stored: Mapping[str, StoredTensor], config: ModelConfig, directory: Path
) -> dict[str, Wanted]:
    """The stored tensors of each parameter by its name, in order; CheckpointError for everything that does not fit."""
    sources = {name: weight_source(config, name) for name in specs}
    rows = _rows(specs, sources)
    wanted: dict[str, Wanted] = {}
    matched, missing, used = [], [], set()
    for name, spec in specs.items():
        source, (selected, full_shape) = sources[name], rows[name]
        stored_as = _stored_as(config, source, spec)
        expected = _expected(source, stored_as, full_shape)
        absent = [piece.name for pieces in expected for piece in pieces.values() if _lacks(piece, stored)]
        missing += absent
        used |= {piece.name for pieces in expected for piece in pieces.values()}
        if not absent:
            tensors = tuple(
                {role: stored[piece.name] for role, piece in pieces.items() if piece.name in stored}
                for pieces in expected
            )
            wanted[name] = Wanted(spec, source, selected, full_shape, stored_as, tensors)
            matched.append((wanted[name], expected))
    _check_names(list(dict.fromkeys(missing)), used, stored, config, directory)
    for item, expected in matched:
        _check_pieces(item, expected)
    return wanted


def stored_pieces(config: ModelConfig) -> dict[str, tuple[str, Piece]]:
    """Name -> role and piece of every tensor that a checkpoint has to have, in the order the model uses them."""
    specs = abstract_parameters(config, jnp.dtype(jnp.float32))
    sources = {name: weight_source(config, name) for name in specs}
    return {
        piece.name: (role, piece)
        for name, (_, full_shape) in _rows(specs, sources).items()
        for pieces in _expected(sources[name], _stored_as(config, sources[name], specs[name]), full_shape)
        for role, piece in pieces.items()
        if piece.required
    }


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the same tensors."""
    return {name: piece.shapes[0] for name, (_, piece) in stored_pieces(config).items()}


def _lacks(piece: Piece, stored: Mapping[str, StoredTensor]) -> bool:
    return piece.required and piece.name not in stored


def _rows(
    specs: Mapping[str, ParameterSpec], sources: Mapping[str, Source]
) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """For each parameter its rows of the stored tensor, and the shape of all that tensor's parts together."""
    sharing: dict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        sharing[source.name].append(name)
    found = {}
    for stored_name, names in sharing.items():
        names.sort(key=lambda name: sources[name].part)
        first, shape = sources[names[0]], specs[names[0]].shape
        if len(names) == first.of == 1:
            found[names[0]] = slice(0, shape[-2] if len(shape) > 1 else math.prod(shape), 1), shape
            continue
        ways = {(s.of, s.axis, s.interleaved, s.transposed) for s in (sources[name] for name in names)}
        if len(ways) > 1 or [sources[name].part for name in names] != list(range(first.of)):
            raise CheckpointError(f"{', '.join(names)} do not take {stored_name!r} apart into {first.of} parts")
        sizes = [specs[name].shape[first.axis] for name in names]
        if first.interleaved and len(set(sizes)) > 1:
            raise CheckpointError(f"{', '.join(names)} are interleaved in {stored_name!r} and differ in size: {sizes}")
        for index, name in enumerate(names):
            start = index if first.interleaved else sum(sizes[:index])
            stop, step = (sum(sizes), first.of) if first.interleaved else (start + sizes[index], 1)
            whole = (*shape[: first.axis], sum(sizes), *shape[first.axis + 1 :])
            found[name] = slice(start, stop, step), whole
    return found


def _stored_as(config: ModelConfig, source: Source, spec: ParameterSpec) -> StoredFormat | None:
    """How the files hold the parameter, which the model made for `spec.format`."""
    if spec.format is None or config.quantization is None:
        return None
    ways = {config.quantization.stored_as(name) for name in source.names(spec.shape[0])}
    stored_as = ways.pop()
    if ways or stored_as is None or stored_as.held != spec.format:
        raise CheckpointError(
            f"{source.name!r}: quantization_config quantizes its experts in different ways, which is not supported; "
            "quantize all experts of a layer alike"
        )
    return stored_as


def _expected(
    source: Source, stored_as: StoredFormat | None, full_shape: tuple[int, ...]
) -> tuple[dict[str, Piece], ...]:
    """The tensors to look for: a mapping by piece, or one per expert."""
    shape = full_shape[1:] if source.per_expert else full_shape
    names = source.names(full_shape[0])
    if stored_as is not None:
        return tuple(pieces_of(stored_as, name, shape) for name in names)
    if source.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return tuple({"weight": Piece(name, FLOATING, (shape,))} for name in names)


def _check_names(
    missing: list[str], used: set[str], stored: Mapping[str, StoredTensor], config: ModelConfig, directory: Path
) -> None:
    tied = {weight_source(config, "unembedding.weight").name} if config.tie_embeddings else set()
    ignored = re.compile(ignored_weights(config) or "(?!)")
    unknown, skipped = [], []
    for name, tensor in stored.items():
        if name in used or name in tied or _IRRELEVANT.fullmatch(name) or _is_no_bias(tensor, config):
            continue
        if ignored.fullmatch(name):
            skipped.append(tensor)
        else:
            unknown.append(f"{tensor.name} ({Path(str(tensor.file.name)).name})")
    if missing or unknown:
        parts = [f"missing tensors: {some(missing)}"] * bool(missing)
        parts += [f"unknown tensors: {some(unknown)}"] * bool(unknown)
        quantized = f", quantized by {config.quantization.method}" if config.quantization is not None else ""
        raise CheckpointError(
            f"{directory} does not hold the {config.architecture} of config.json{quantized}; {'; '.join(parts)}"
        )
    if skipped:
        num_bytes = sum(tensor.num_bytes for tensor in skipped)
        logger.info(
            "%s: %d tensors of %d bytes are not of the text model and are not read", directory, len(skipped), num_bytes
        )


def _is_no_bias(tensor: StoredTensor, config: ModelConfig) -> bool:
    """Whether it is the bias of zeros that GPTQ's first tools wrote for every linear map."""
    module, _, kind = tensor.name.rpartition(".")
    if config.quantization is None or kind != "bias" or tensor.dtype_code not in FLOATING:
        return False
    stored_as = config.quantization.stored_as(module)
    return stored_as is not None and stored_as.layout in ("gptq", "gptq_v2") and not tensor.read().any()


def _check_pieces(wanted: Wanted, expected: tuple[dict[str, Piece], ...]) -> None:
    """Dtypes and shapes of one parameter's tensors."""
    for tensors, pieces in zip(wanted.tensors, expected, strict=True):
        for role, tensor in tensors.items():
            piece = pieces[role]
            if tensor.dtype_code not in piece.codes:
                raise CheckpointError(f"{tensor} is {tensor.dtype_code}; supported: {', '.join(piece.codes)}")
            if tensor.shape not in piece.shapes:
                shapes = " or ".join(str(list(shape)) for shape in piece.shapes)
                raise CheckpointError(f"{tensor} has shape {list(tensor.shape)}; config.json makes it {shapes}")
