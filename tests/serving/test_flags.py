"""Flags from config dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from dataclasses import dataclass, field

import pytest

from jaxinfer.config import EngineConfig, flag_fields
from jaxinfer.request import SamplingParams
from serving import generate
from serving.flags import add_config_flags, arguments_from, config_from
from serving.grpc_server import ServerConfig


def _flag(default, text="what it is", choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    count: int = _flag(3)
    ratio: float = _flag(0.5, "100% of it")
    name: str = _flag("a", choices=("a", "b"))
    fast: bool = _flag(True)
    limit: int | None = _flag(None)
    path: str | None = _flag(None)
    hidden: int = 7


def _parser(config_class=Config, **options) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_flags(parser, config_class, **options)
    return parser


def test_no_flags_give_the_defaults():
    assert config_from(_parser().parse_args([]), Config) == Config()
    assert config_from(_parser(ServerConfig).parse_args([]), ServerConfig) == ServerConfig()
    assert config_from(_parser(EngineConfig).parse_args([]), EngineConfig) == EngineConfig()


def test_values_have_the_types_of_their_fields():
    arguments = ["--count", "5", "--ratio", "2", "--name", "b", "--no-fast", "--limit", "9", "--path", "x"]
    config = config_from(_parser().parse_args(arguments), Config)
    assert config == Config(5, 2.0, "b", False, 9, "x")
    assert isinstance(config.ratio, float)


def test_every_field_with_help_is_a_flag():
    for config_class in (EngineConfig, ServerConfig):
        text = _parser(config_class).format_help()
        for spec in flag_fields(config_class):
            assert "--" + spec.name.replace("_", "-") in text
        assert len(flag_fields(config_class)) == len(dataclasses.fields(config_class))


def test_help_shows_defaults_and_choices():
    text = " ".join(_parser().format_help().split())
    for part in ("(default: 3)", "100% of it (default: 0.5)", "{a,b}", "--fast, --no-fast", "(default: on)"):
        assert part in text
    assert "hidden" not in text and "None" not in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--name", "c"], ("--name", "'c'", "'a'", "'b'")),
        (["--count", "many"], ("--count", "'many'")),
        (["--coun", "1"], ("--coun",)),
    ],
)
def test_bad_values_are_named_and_exit_with_2(arguments, parts, capsys):
    with pytest.raises(SystemExit) as caught:
        _parser().parse_args(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts)


def test_other_defaults_are_shown_and_taken():
    parser = _parser(count=21)
    assert "(default: 21)" in " ".join(parser.format_help().split())
    assert config_from(parser.parse_args([]), Config) == Config(count=21)


@pytest.mark.parametrize("config", [Config(), Config(5, -2.5, "b", False, 9, "--x y")])
def test_arguments_give_the_config_again(config):
    assert config_from(_parser().parse_args(arguments_from(config)), Config) == config
    assert arguments_from(Config()) == []


def test_skipped_fields_take_overrides_or_defaults():
    parser = _parser(skip=("count", "limit"))
    assert "--count" not in parser.format_help()
    assert config_from(parser.parse_args([]), Config, count=11) == Config(count=11)
    parser.add_argument("--count", default="somebody else's")
    assert config_from(parser.parse_args([]), Config, skip=("count",)) == Config()
    with pytest.raises(ValueError, match="no flag of Config"):
        _parser(skip=("typo",))


def test_a_type_that_no_flag_can_have_is_an_error():
    @dataclass(frozen=True)
    class Odd:
        pairs: tuple[int, ...] = _flag(())

    with pytest.raises(TypeError, match="pairs"):
        _parser(Odd)


def test_every_sampling_field_has_a_flag():
    parser = argparse.ArgumentParser()
    generate.add_generate_parser(parser.add_subparsers(), [])
    arguments = shlex.split(
        "generate --token-ids 1,2 --prompt x --max-tokens none --min-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.9 "
        "--min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --logit-bias 4=-1.5 "
        "--logit-bias 5=2 --allowed-token-ids 4,5 --seed 8 --n 2 --stop a --stop b --stop-token-ids 6,7 "
        "--include-stop-in-output --ignore-eos --logprobs --top-logprobs 2 --prompt-logprobs 3 --no-skip-special-tokens"
    )
    args = parser.parse_args(arguments)
    sampling = generate.sampling_from(args)
    assert args.prompts == [(1, 2), "x"]
    assert sampling == SamplingParams(
        max_tokens=None,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={4: -1.5, 5: 2.0},
        allowed_token_ids=(4, 5),
        seed=8,
        n=2,
        stop=("a", "b"),
        stop_token_ids=(6, 7),
        include_stop_in_output=True,
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        prompt_logprobs=3,
        skip_special_tokens=False,
    )
    default = SamplingParams()
    unchanged = [
        f.name for f in dataclasses.fields(SamplingParams) if getattr(sampling, f.name) == getattr(default, f.name)
    ]
    assert unchanged == []  # a new field must get a flag, and a value above
    assert generate.sampling_from(parser.parse_args(["generate"])) == default
