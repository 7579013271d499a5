"""Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness does it, and in its JSON layouts.

Hides the two forms a question may come in, how context and continuation are tokenized, and how length is taken out of
the comparison.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.evaluation.statistics import mean_with_stderr
from jaxinfer.request import PromptLogprobs

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

TARGET_DELIMITER = " "  # between a question and a choice, lm-evaluation-harness's default
METRICS = ("acc", "acc_norm", "acc_bytes")
BATCH = 64  # prompts handed to the engine at once

Score = Callable[[Sequence[tuple[int, ...]]], list[PromptLogprobs]]


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations (`choices` joined by `delimiter`), and which of them is right."""

    doc_id: int
    doc: dict[str, Any]
    context: str
    choices: tuple[str, ...]
    gold: int
    delimiter: str

    @property
    def continuations(self) -> list[str]:
        return [self.delimiter + choice for choice in self.choices]


@dataclass(frozen=True)
class Answer:
    """What a model makes of a question: per choice its log-likelihood and whether greedy decoding would give it."""

    loglikelihoods: tuple[float, ...]
    is_greedy: tuple[bool, ...]


# ---- questions -------------------------------------------------------------------------------------------------------


def read_questions(path: str | Path, *, limit: int | None = None) -> tuple[list[Question], int]:
    """The questions of a JSONL file, the first `limit` of them, and how many it has. ConfigError names the line.

    A line is a processed document (`query`, `choices`, `gold`, and maybe `target_delimiter`), or a sample logged by
    lm-evaluation-harness with --log_samples (`arguments`, `target`; one continuation per choice).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON texts may hold U+2028, where splitlines cuts
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task file {str(path)!r} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"task file {str(path)!r} holds no question")
    questions: list[Question] = []
    for number, line in numbered[:limit]:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("is not a JSON object")
            questions.append(_question(len(questions), record))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            text = f"has no field {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{path}, line {number}: {text}") from error
    return questions, len(numbered)


def _question(doc_id: int, record: dict[str, Any]) -> Question:
    if "arguments" in record:
        return _logged_question(doc_id, record)
    context, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(choices, list):
        raise ValueError(f"choices {choices!r:.80} must be a list of texts")
    delimiter = record.get("target_delimiter", TARGET_DELIMITER)
    return _checked(Question(doc_id, record, context, tuple(choices), gold, delimiter))


def _logged_question(doc_id: int, record: dict[str, Any]) -> Question:
    """From a logged sample. Its continuations begin with the delimiter, which does not count for length."""
    pairs = record["arguments"]
    if isinstance(pairs, dict):  # {"gen_args_0": {"arg_0": context, "arg_1": continuation}, ...}
        pairs = [(pair["arg_0"], pair["arg_1"]) for pair in pairs.values()]
    contexts = {context for context, _ in pairs}
    if len(contexts) != 1:
        raise ValueError(f"{len(contexts)} contexts, where every choice must continue the same one")
    target = record["target"]
    if isinstance(target, str) and target.strip().isdigit():
        target = int(target)
    continuations = [continuation for _, continuation in pairs]
    shared = all(c.startswith(TARGET_DELIMITER) for c in continuations)
    delimiter = TARGET_DELIMITER if shared else ""
    choices = tuple(c.removeprefix(delimiter) for c in continuations)
    return _checked(Question(doc_id, record.get("doc", {}), contexts.pop(), choices, target, delimiter))


def _checked(question: Question) -> Question:
    texts = (question.context, question.delimiter, *question.choices)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("context, delimiter and choices must be text")
    if len(question.choices) < 2 or not all(question.choices):
        raise ValueError(f"choices {question.choices!r} must be two texts at least, none of them empty")
    gold = question.gold
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(question.choices):
        raise ValueError(f"the right answer {gold!r} must be a number from 0 to {len(question.choices) - 1}")
    return question


# ---- answers ---------------------------------------------------------------------------------------------------------


def encode_pair(context: str, continuation: str, tokenizer: Tokenizer, model: ModelConfig) -> tuple[list[int], int]:
    """Token ids of context and continuation together, and how many of them are the context's.

    Spaces that end the context go to the continuation, and the whole is tokenized before it is cut: at the cut tokens
    are those of the running text. An empty context is the model's BOS, or end of sequence where it has none.
    """
    kept = context.rstrip()
    if not kept:
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        prefix = model.bos_token_id if model.bos_token_id is not None else next(iter(model.eos_token_ids), None)
        if prefix is None:
            raise ConfigError("an empty context needs a bos_token_id or eos_token_id in config.json, and there is none")
        return (ids, 1) if ids[:1] == [prefix] else ([prefix, *ids], 1)
    whole = tokenizer.encode(context + continuation)
    return whole, len(tokenizer.encode(kept))


def answer_all(
    questions: Sequence[Question],
    score: Score,
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    longest: int,
    on_prompt: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Score every choice of every question. ConfigError for a prompt of over `longest` tokens: nothing is cut off.

    on_prompt hears how many prompts are done.
    """
    pairs = [
        (question, *encode_pair(question.context, continuation, tokenizer, model))
        for question in questions
        for continuation in question.continuations
    ]
    for question, ids, num_context in pairs:
        if len(ids) > longest:
            raise ConfigError(f"question {question.doc_id} takes {len(ids)} tokens; at most {longest} fit the model")
        if not 1 <= num_context < len(ids):
            raise ConfigError(f"question {question.doc_id}: a choice of {question.choices!r} has no token of its own")
    results: list[tuple[float, bool]] = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        for (_, _, num_context), values in zip(batch, score([tuple(ids) for _, ids, _ in batch]), strict=True):
            own = [value for value in values[num_context:] if value is not None]
            results.append((math.fsum(value.logprob for value in own), all(value.rank == 1 for value in own)))
        if on_prompt is not None:
            on_prompt(len(results))
    answers, taken = [], 0
    for question in questions:
        part = results[taken : taken + len(question.choices)]
        taken += len(part)
        answers.append(Answer(tuple(value for value, _ in part), tuple(greedy for _, greedy in part)))
    return answers


def metrics(question: Question, answer: Answer) -> dict[str, float]:
    """1 or 0 for each of METRICS: the likeliest choice is right, as it is, per character, per UTF-8 byte."""
    values = answer.loglikelihoods
    per_character = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
    per_byte = [value / len(choice.encode()) for value, choice in zip(values, question.choices, strict=True)]
    picks = (values, per_character, per_byte)
    return {
        name: float(max(range(len(picked)), key=picked.__getitem__) == question.gold)  # the first among equals
        for name, picked in zip(METRICS, picks, strict=True)
    }


# ---- reports ---------------------------------------------------------------------------------------------------------


def results_document(
    task: str, questions: Sequence[Question], answers: Sequence[Answer], *, num_original: int, config: dict[str, Any]
) -> dict[str, Any]:
    """lm-evaluation-harness's results layout, without dates and durations, so that equal runs give equal bytes."""
    scored = [metrics(question, answer) for question, answer in zip(questions, answers, strict=True)]
    row: dict[str, Any] = {"name": task, "alias": task, "sample_len": len(questions)}
    for name in METRICS:
        mean, stderr = mean_with_stderr([each[name] for each in scored])
        row[f"{name},none"] = mean
        row[f"{name}_stderr,none"] = "N/A" if stderr is None else stderr
    metric_list = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
    return {
        "results": {task: row},
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task,
                "output_type": "multiple_choice",
                "num_fewshot": 0,
                "metric_list": metric_list,
                "target_delimiter": questions[0].delimiter,
            }
        },
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(METRICS, True)},
        "n-samples": {task: {"original": num_original, "effective": len(questions)}},
        "config": config,
    }


def sample_record(question: Question, answer: Answer) -> dict[str, Any]:
    """One line of lm-evaluation-harness's --log_samples file."""
    pairs = [(question.context, continuation) for continuation in question.continuations]
    responses = [[str(v), str(greedy)] for v, greedy in zip(answer.loglikelihoods, answer.is_greedy, strict=True)]
    return {
        "doc_id": question.doc_id,
        "doc": question.doc,
        "target": str(question.gold),
        "arguments": {f"gen_args_{i}": {"arg_0": pair[0], "arg_1": pair[1]} for i, pair in enumerate(pairs)},
        "resps": [[response] for response in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": list(METRICS),
        "doc_hash": _sha256(json.dumps(question.doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(pairs[0][0]),
        "target_hash": _sha256(str(question.gold)),
        **metrics(question, answer),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
