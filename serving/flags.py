"""Command-line flags from config dataclasses, and the dataclasses back from parsed flags.

A field becomes a flag when its metadata has "help": `max_num_seqs: int` is `--max-num-seqs`, a bool is
`--name / --no-name`, `X | None` takes an X and defaults to None. Choices come from metadata["choices"].
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Collection
from typing import Any

from jaxinfer.config import flag_fields

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_config_flags(
    parser: argparse.ArgumentParser, config_class: type, skip: Collection[str] = (), **defaults: Any
) -> None:
    """Add one flag per field of `config_class` that has help text, except the fields named in `skip`.

    `defaults` replace the dataclass's own.

    A value that does not parse, or is not one of the field's choices, ends the program with exit code 2 and a message
    that names the value and the choices (argparse's own behaviour).
    """
    names = {f.name for f in flag_fields(config_class)}
    for name in (*skip, *defaults):
        if name not in names:
            raise ValueError(f"{name!r} is no flag of {config_class.__name__}: {', '.join(sorted(names))}")
    types_of = typing.get_type_hints(config_class)
    group = parser.add_argument_group(f"{config_class.__name__} options")
    for spec in flag_fields(config_class):
        if spec.name not in skip:
            choices = spec.metadata.get("choices")
            default = defaults.get(spec.name, spec.default)
            add_flag(group, spec.name, types_of[spec.name], default, spec.metadata["help"], choices)


def config_from[Config](
    args: argparse.Namespace, config_class: type[Config], skip: Collection[str] = (), **overrides: Any
) -> Config:
    """The `config_class` that the parsed flags describe; skipped fields keep their default, or take `overrides`.

    Raises whatever the dataclass raises for values it refuses (ConfigError for ours).
    """
    names = {f.name for f in flag_fields(config_class)} - set(skip)
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return config_class(**{**values, **overrides})


def arguments_from(config: Any) -> list[str]:
    """The command-line arguments that give this config dataclass again, where it differs from the defaults."""
    arguments = []
    for spec in flag_fields(type(config)):
        value = getattr(config, spec.name)
        flag = spec.name.replace("_", "-")
        if value == spec.default:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments.append(f"--{flag}={value}")
    return arguments


def add_flag(
    group: argparse._ActionsContainer,
    name: str,
    annotation: Any,
    default: Any,
    help_text: str,
    choices: tuple[str, ...] | None = None,
) -> None:
    """Add the flag of one field, `annotation` being its type: int, float, str, bool, or one of them or None."""
    flag = "--" + name.replace("_", "-")
    text = help_text.replace("%", "%%")
    value_type = _value_type(name, annotation)
    if value_type is bool:
        text += f" (default: {'on' if default else 'off'})"
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    if default is not None:
        text += f" (default: {default})"
    metavar = None if choices else _METAVARS[value_type]
    group.add_argument(flag, dest=name, type=value_type, default=default, choices=choices, metavar=metavar, help=text)


def flag_type(parse: Any) -> Any:
    """`parse` for argparse: its ValueError text reaches the user."""

    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def _positive(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise ValueError(f"{text!r} must be a whole number of at least 1")
    return value


positive = flag_type(_positive)


def _value_type(name: str, annotation: Any) -> type:
    """int, float, str or bool for an annotation that is one of them, or one of them or None."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [t for t in typing.get_args(annotation) if t is not type(None)]
        annotation = members[0] if len(members) == 1 else annotation
    if annotation not in (bool, int, float, str):
        raise TypeError(f"field {name}: no flag can be made of {annotation}; use bool, int, float, str, or X | None")
    return annotation
