"""`jaxinfer generate`: complete prompts in this process, without a server.

Hides the sampling flags, which come from the fields of SamplingParams, and the JSON that other programs rely on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.config import EngineConfig
from jaxinfer.conversation import Conversation
from jaxinfer.request import FinishReason, SamplingParams, TokenLogprobs
from serving.flags import add_config_flags, add_flag, config_from
from serving.several_hosts import team_of
from sharding.hosts import HostsConfig

if TYPE_CHECKING:
    from jaxinfer.llm import GenerationResult

_SKIP = ("seed",)  # of EngineConfig: here --seed is the request's
_SCALAR_HELP = {
    "min_tokens": "tokens before an end of sequence or a stop may come",
    "temperature": "0 is greedy",
    "top_k": "sample among the k most likely tokens; 0 is off",
    "top_p": "sample among the most likely tokens that together have this probability; 1 is off",
    "min_p": "drop tokens below this fraction of the most likely one's probability; 0 is off",
    "repetition_penalty": "divides the logits of tokens seen; 1 is off",
    "presence_penalty": "subtracted once from tokens generated before",
    "frequency_penalty": "subtracted for each time a token was generated",
    "seed": "seed of the random draws",
    "n": "completions per prompt",
    "include_stop_in_output": "keep the stop string or stop token in the output",
    "ignore_eos": "go on past the model's end of sequence",
    "logprobs": "report the log-probability of each token",
    "top_logprobs": "report as many alternatives per token; needs --logprobs",
    "prompt_logprobs": "report the prompt's own log-probabilities, with as many alternatives (0: none)",
    "skip_special_tokens": "leave special tokens out of the text",
}


def add_generate_parser(subparsers: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `generate` to the CLI."""
    parser = subparsers.add_parser(
        "generate", parents=parents, allow_abbrev=False, help="complete prompts and exit", description=__doc__
    )
    prompts = parser.add_argument_group("prompts (repeat and mix; outputs come in the order given)")
    prompts.add_argument(
        "--prompt", action=_AddPrompt, dest="prompts", metavar="TEXT", type=_text, help="a prompt as text"
    )
    prompts.add_argument(
        "--token-ids", action=_AddPrompt, dest="prompts", metavar="1,2,3", type=_ids, help="a prompt as token ids"
    )
    prompts.add_argument(
        "--chat",
        action=_AddPrompt,
        dest="prompts",
        metavar="TEXT",
        type=_chat,
        help="a user's message, for the model's chat template",
    )
    prompts.add_argument(
        "--messages",
        action=_AddPrompt,
        dest="prompts",
        metavar="FILE",
        type=_conversation,
        help="a conversation as JSON: a list of messages, or an object with messages, tools and so on",
    )
    group = parser.add_argument_group("sampling options")
    group.add_argument(
        "--max-tokens", type=_max_tokens, default=128, metavar="N", help="most tokens, or `none` (default: 128)"
    )
    types_of = typing.get_type_hints(SamplingParams)
    defaults = SamplingParams()
    for name, text in _SCALAR_HELP.items():
        add_flag(group, name, types_of[name], getattr(defaults, name), text)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", type=_text, help="stop string; repeat for more"
    )
    group.add_argument("--stop-token-ids", type=_ids, default=(), metavar="1,2,3", help="ids that end a completion")
    group.add_argument("--allowed-token-ids", type=_ids, metavar="1,2,3", help="choose among these ids alone")
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="added to a logit; repeat for more",
    )
    add_config_flags(parser, EngineConfig, skip=_SKIP)
    add_config_flags(parser, HostsConfig)
    parser.set_defaults(func=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Complete the prompts of the parsed arguments; print text, or one JSON document."""
    if not args.prompts:
        args.usage_error("at least one --prompt, --token-ids, --chat or --messages is needed")
    sampling = sampling_from(args)
    config = config_from(args, EngineConfig, _SKIP)
    from jaxinfer.llm import LLM  # imports jax, which takes seconds

    args.progress.update(f"loading {args.model}")
    team = team_of(args)
    llm = LLM(args.model, warm_up=False, **team.engine_options(), **dataclasses.asdict(config))
    args.progress.clear()
    team.follow(llm.engine)
    results = llm.generate(args.prompts, sampling, progress=sys.stderr.isatty())
    if args.json:
        json.dump(document(results, has_text=llm.engine.tokenizer is not None), sys.stdout)
        print()
    else:
        _print(results)
    llm.engine.close()
    for prompt_index, result in enumerate(results):
        for output in result.outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"prompt {prompt_index}, completion {output.index}: {output.error}")
    return 0


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """The SamplingParams of the parsed flags; RequestError for values it refuses."""
    values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(SamplingParams)}
    values["stop"] = tuple(args.stop)
    values["logit_bias"] = dict(args.logit_bias)
    return SamplingParams(**values)


def document(results: list[GenerationResult], *, has_text: bool) -> dict[str, Any]:
    """What --json prints: one output per completion, prompt after prompt. `text` is null without a tokenizer."""
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    completion_tokens = sum(len(output.token_ids) for result in results for output in result.outputs)
    outputs = [
        {
            "prompt_index": prompt_index,
            "index": output.index,
            "token_ids": output.token_ids,
            "text": output.text if has_text else None,
            "finish_reason": None if output.finish_reason is None else output.finish_reason.value,
            "logprobs": None if output.logprobs is None else _logprobs_json(output.token_ids, output.logprobs),
            "prompt_logprobs": _prompt_logprobs_json(result) if output.index == 0 else None,
            "error": output.error,
        }
        for prompt_index, result in enumerate(results)
        for output in result.outputs
    ]
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {"outputs": outputs, "usage": usage}


def _logprobs_json(token_ids: list[int], logprobs: list[TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": token,
            "logprob": item.logprob,
            "top": _top_json(item.top),
        }
        for token, item in zip(token_ids, logprobs, strict=True)
    ]


def _prompt_logprobs_json(result: GenerationResult) -> list[dict[str, Any] | None] | None:
    if result.prompt_logprobs is None:
        return None
    return [
        None
        if item is None
        else {"token_id": token, "logprob": item.logprob, "rank": item.rank, "top": _top_json(item.top)}
        for token, item in zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
    ]


def _top_json(top: tuple[tuple[int, float], ...]) -> list[dict[str, Any]]:
    return [{"token_id": token, "logprob": value} for token, value in top]


def _print(results: list[GenerationResult]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for result in results:
        console.print(result)


class _AddPrompt(argparse.Action):
    """All kinds of prompts append to one list, so that their order is kept."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.prompts = [*(namespace.prompts or []), values]


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 come from the shell as lone surrogates
        raise argparse.ArgumentTypeError(f"{text!r} is not valid Unicode") from None
    return text


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _chat(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": _text(text)}])


def _conversation(path: str) -> Conversation:
    try:
        given = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as JSON: {error}") from None
    if isinstance(given, list):
        return Conversation(given)
    names = [spec.name for spec in dataclasses.fields(Conversation)]
    if not isinstance(given, dict) or "messages" not in given or not given.keys() <= set(names):
        choices = f"a list of messages nor an object with messages and none but {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{path} holds neither {choices}")
    return Conversation(**given)


def _max_tokens(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor `none`") from None


def _bias(text: str) -> tuple[int, float]:
    token, separator, bias = text.partition("=")
    try:
        if separator:
            return int(token), float(bias)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, for example 42=-1.5")
