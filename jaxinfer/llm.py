"""`LLM`: an engine in this process, for notebooks and scripts. Prompts in, completions out, or a stream of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxinfer.config import EngineConfig, shipped_model
from jaxinfer.engine import Engine
from jaxinfer.request import (
    FinishReason,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    check_token_ids,
)

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One of a prompt's `n` completions."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class GenerationResult:
    """A prompt and its completions. Prints as text; `outputs[0].text` is the first completion."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[Completion]
    num_cached_tokens: int = 0
    ttft_s: float | None = None  # from the call of generate() to this prompt's first token, waiting included
    total_s: float | None = None

    def __str__(self) -> str:
        shown = self.prompt if self.prompt is not None else str(list(self.prompt_token_ids))
        return "\n".join(f"{shown}{out.text or list(out.token_ids)}" for out in self.outputs)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.prompt if self.prompt is not None else str(list(self.prompt_token_ids))
        for out in self.outputs:
            text = Text(shown, style="dim") + Text(out.text or str(out.token_ids))
            yield Panel(Group(text), title=f"{len(out.token_ids)} tokens, {out.finish_reason}", title_align="left")


class LLM:
    """A model served in this process.

    >>> llm = LLM()                                     # the model that ships with jaxinfer
    >>> llm.generate("def add(a, b):")[0].outputs[0].text
    """

    def __init__(self, model: str | Path | None = None, *, warm_up: bool = True, **engine_options: Any):
        """Load `model` (a Hugging Face directory; None: the shipped model) and compile.

        `engine_options` are fields of EngineConfig. `warm_up=False` compiles each program when it is first needed.
        Raises ConfigError or CheckpointError.
        """
        self.engine = Engine(shipped_model() if model is None else model, EngineConfig(**engine_options))
        if warm_up:
            self.engine.warm_up()
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[GenerationResult]:
        """Complete every prompt; results come in the prompts' order.

        A prompt is text or token ids; `sampling` is one SamplingParams for all or one per prompt. All requests are
        checked before any runs: RequestError names the prompt's position. A completion that failed on the way has
        finish_reason ERROR and an `error` text.
        """
        requests = self._requests(prompts, sampling)
        results = [
            GenerationResult(
                prompt=text,
                prompt_token_ids=request.prompt_token_ids,
                outputs=[
                    Completion(i, logprobs=[] if request.sampling.logprobs else None) for i in range(request.sampling.n)
                ],
            )
            for request, text in requests
        ]
        place = {request.request_id: i for i, (request, _) in enumerate(requests)}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        started_s, num_tokens = time.perf_counter(), 0
        with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
            task = bar.add_task("generating", total=sum(len(result.outputs) for result in results))
            for event in self._run([request for request, _ in requests]):
                elapsed_s = time.perf_counter() - started_s
                _collect(results[place[event.request_id]], event, elapsed_s)
                num_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    bar.update(task, advance=1, description=f"{num_tokens / elapsed_s:,.0f} tokens/s")
        return results

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Events of one prompt as they come. Leaving the loop early aborts the request."""
        [(request, _)] = self._requests([prompt], sampling)
        return self._run([request])

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Request, str | None]]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[assignment, list-item]
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise RequestError(
                "sampling", f"{len(sampling)} SamplingParams for {len(prompts)} prompts; give 1 or as many"
            )
        requests = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            text = prompt if isinstance(prompt, str) else None
            if isinstance(prompt, str):
                if self.engine.tokenizer is None:
                    raise RequestError(f"prompts[{i}]", "is text, but this model has no tokenizer; give token ids")
                ids: Sequence[int] = self.engine.tokenizer.encode(prompt)
            else:
                ids = check_token_ids(prompt)  # type: ignore[arg-type]
            self._num_requests += 1
            request = Request(f"llm-{self._num_requests}", tuple(ids), params)
            try:
                self.engine.check_request(request)
            except RequestError as error:
                raise RequestError(f"prompts[{i}]", str(error)) from error
            requests.append((request, text))
        return requests

    def _run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        """Feed the queue as it empties; abort what is left when the caller stops listening."""
        waiting = list(reversed(requests))
        unfinished: dict[str, int] = {}  # request id -> completions still to end

        def step() -> list[TokenEvent]:
            events = self.engine.step()
            for event in events:
                if event.finish_reason is not None:
                    unfinished[event.request_id] -= 1
                    if unfinished[event.request_id] == 0:
                        del unfinished[event.request_id]
            return events

        try:
            while waiting or unfinished:
                while waiting:
                    try:
                        self.engine.add(waiting[-1])
                    except QueueFullError:
                        break
                    request = waiting.pop()
                    unfinished[request.request_id] = request.sampling.n
                yield from step()
                if unfinished and (idle_s := self.engine.idle_s()) > 0:
                    time.sleep(idle_s)
        finally:
            for request_id in list(unfinished):
                self.engine.abort(request_id)
            while self.engine.has_work():
                step()


def _collect(result: GenerationResult, event: TokenEvent, elapsed_s: float) -> None:
    output = result.outputs[event.index]
    if event.token_ids and result.ttft_s is None:
        result.ttft_s = elapsed_s
    output.token_ids += event.token_ids
    output.text += event.text
    if output.logprobs is not None and event.logprobs is not None:
        output.logprobs += event.logprobs
    if event.finish_reason is not None:
        output.finish_reason, output.error, result.total_s = event.finish_reason, event.error, elapsed_s
    result.num_cached_tokens = max(result.num_cached_tokens, event.num_cached_tokens)
