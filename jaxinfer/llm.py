"""`LLM`: an engine in this process, for notebooks and scripts. Prompts in, completions out, or a stream of events."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, SupportsIndex

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxinfer.config import EngineConfig, shipped_model
from jaxinfer.conversation import Conversation
from jaxinfer.engine import Engine
from jaxinfer.request import (
    FinishReason,
    PromptLogprobs,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    check_token_ids,
)
from sharding.group import Group as HostGroup

Prompt = str | Sequence[int] | Conversation
LONGEST_SLEEP_S = 0.02


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
    """A prompt (of a conversation its text) and its completions; `outputs[0].text` is the first. Prints as text."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None  # where SamplingParams.prompt_logprobs asked for them
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
    """A model served in this process. Several threads and open streams may use it at once.

    >>> llm = LLM()                                     # the model that ships with jaxinfer
    >>> llm.generate("def add(a, b):")[0].outputs[0].text
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        warm_up: bool = True,
        group: HostGroup | None = None,
        **engine_options: Any,
    ):
        """Load `model` (a Hugging Face directory; None: the shipped model) and compile.

        `engine_options` are fields of EngineConfig. `warm_up=False` compiles each program when it is first needed.
        `group`: the hosts that run one engine together; this is the first of them, and the others warm up if it does.
        Raises ConfigError or CheckpointError.
        """
        config = EngineConfig(**engine_options)
        self.engine = Engine(shipped_model() if model is None else model, config, group=group)
        if warm_up:
            self.engine.warm_up()
        self._num_requests = 0
        self._lock = threading.RLock()  # who steps the engine
        self._inboxes: dict[str, deque[TokenEvent]] = {}  # request id -> events that its caller did not take yet

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[GenerationResult]:
        """Complete every prompt; results come in the prompts' order.

        A prompt is text, token ids or a Conversation; `sampling` is one SamplingParams for all or one per prompt. All
        requests are checked before any runs: RequestError names the prompt's position. A completion that failed on the
        way has finish_reason ERROR and an `error` text.
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

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> GenerationResult:
        """The answer to a conversation, written into a prompt by the model's chat template.

        `options` are the other fields of Conversation. RequestError as for `generate`.
        """
        return self.generate([Conversation(messages, tools, **options)], sampling, progress=progress)[0]

    def score(
        self, prompts: Prompt | Sequence[Prompt], *, num_top: int = 0, progress: bool = False
    ) -> list[PromptLogprobs]:
        """How the model sees each prompt: per token its log-probability, rank and `num_top` alternatives.

        A prompt's first entry is None. RequestError as for `generate`; RuntimeError when a prompt failed on the way.
        """
        scored = []
        for i, result in enumerate(self.generate(prompts, _reading(num_top), progress=progress)):
            if result.prompt_logprobs is None:
                raise RuntimeError(f"prompts[{i}]: {result.outputs[0].error}")
            scored.append(result.prompt_logprobs)
        return scored

    def prompt_logits(self, prompt: Prompt) -> np.ndarray:
        """The model's logits f32[tokens, vocab] at every position of one prompt, through the engine as it serves.

        RequestError as for `generate`; RuntimeError when the prompt failed on the way.
        """
        blocks: list[np.ndarray] = []
        [(request, _)] = self._requests([prompt], _reading(None))
        for event in self._run([replace(request, on_prompt_logits=lambda _, logits: blocks.append(logits))]):
            if event.finish_reason is FinishReason.ERROR:
                raise RuntimeError(event.error)
        return np.concatenate(blocks)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Events of one prompt as they come. Leaving the loop early aborts the request."""
        [(request, _)] = self._requests([prompt], sampling)
        return self._run([request])

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Request, str | None]]:
        if isinstance(prompts, (bytes, bytearray)):
            raise RequestError("prompts", f"{prompts!r:.40} is bytes; give text or token ids")
        given: list[Any] = [prompts] if isinstance(prompts, (str, Conversation)) else list(prompts)
        if given and isinstance(given[0], SupportsIndex):  # token ids of one prompt
            given = [given]
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(given)
        for params in sampling:
            if not isinstance(params, SamplingParams):
                raise RequestError("sampling", f"{params!r:.80} is not a SamplingParams")
        if len(sampling) != len(given):
            raise RequestError(
                "sampling", f"{len(sampling)} SamplingParams for {len(given)} prompts; give 1 or as many"
            )
        requests = []
        for i, (prompt, params) in enumerate(zip(given, sampling, strict=True)):
            try:
                text, ids = self._read(prompt)
                with self._lock:
                    self._num_requests += 1
                    request = Request(f"llm-{self._num_requests}", ids, params)
                self.engine.check_request(request)
            except ValueError as error:
                raise RequestError(f"prompts[{i}]", str(error)) from error
            requests.append((request, text))
        return requests

    def _read(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """The prompt's text, where it has one, and its ids."""
        if isinstance(prompt, (str, Conversation)):
            tokenizer, template = self.engine.tokenizer, self.engine.chat_template
            if tokenizer is None:
                raise ValueError("is text, but this model has no tokenizer; give token ids")
            if isinstance(prompt, str):
                return prompt, tuple(tokenizer.encode(prompt))
            if template is None:
                raise ValueError("is a conversation, but this model has no chat template; give text")
            text = template.render(prompt)
            return text, tuple(tokenizer.encode(text, add_special_tokens=False))
        if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
            raise ValueError(f"{prompt!r:.40} is neither text nor token ids")
        return None, check_token_ids(prompt)

    def _run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        """Feed the queue as it empties; abort what is left when the caller stops listening."""
        waiting = list(reversed(requests))
        unfinished: dict[str, int] = {}  # request id -> completions still to end
        try:
            while waiting or unfinished:
                with self._lock:
                    self._feed(waiting, unfinished)
                    events = self._take(unfinished) or self._step(unfinished)
                    idle_s = 0.0 if events else self.engine.idle_s()
                yield from events
                if idle_s > 0:
                    time.sleep(min(idle_s, LONGEST_SLEEP_S))  # another thread's request may make it shorter
        finally:
            with self._lock:
                for request_id in unfinished:
                    self.engine.abort(request_id)
                while unfinished:
                    self._step(unfinished)

    def _feed(self, waiting: list[Request], unfinished: dict[str, int]) -> None:
        """Hand over requests, the last first, until the queue is full."""
        while waiting:
            try:
                self.engine.add(waiting[-1])
            except QueueFullError:
                return
            request = waiting.pop()
            unfinished[request.request_id] = request.sampling.n
            self._inboxes[request.request_id] = deque()

    def _step(self, unfinished: dict[str, int]) -> list[TokenEvent]:
        """One engine step; everybody's events go to their inboxes, those of `unfinished` are returned."""
        with interrupts_deferred():
            for event in self.engine.step():
                self._inboxes[event.request_id].append(event)
        return self._take(unfinished)

    def _take(self, unfinished: dict[str, int]) -> list[TokenEvent]:
        """What lies in the inboxes of these requests; those that ended leave `unfinished`."""
        events = []
        for request_id in list(unfinished):
            inbox = self._inboxes[request_id]
            while inbox:
                event = inbox.popleft()
                events.append(event)
                if event.finish_reason is not None:
                    unfinished[request_id] -= 1
            if not unfinished[request_id]:
                del unfinished[request_id], self._inboxes[request_id]
        return events


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C take effect after the block, which would break off half done; a second one takes effect at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


def _reading(num_top: int | None) -> SamplingParams:
    """For prompts that are read, not completed."""
    return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=num_top)


def _collect(result: GenerationResult, event: TokenEvent, elapsed_s: float) -> None:
    output = result.outputs[event.index]
    if event.prompt_logprobs is not None:
        result.prompt_logprobs = event.prompt_logprobs
    if event.token_ids and result.ttft_s is None:
        result.ttft_s = elapsed_s
    output.token_ids += event.token_ids
    output.text += event.text
    if output.logprobs is not None and event.logprobs is not None:
        output.logprobs += event.logprobs
    if event.finish_reason is not None:
        output.finish_reason, output.error, result.total_s = event.finish_reason, event.error, elapsed_s
    result.num_cached_tokens = max(result.num_cached_tokens, event.num_cached_tokens)
