"""A conversation as a prompt, and the plain data that a chat template is given of it.

Hides what is checked before a template sees anything, the names reasoning goes by, and how the end of a message that
is to be continued is found in the rendered text. Imports neither jax nor tokenizers: clients have conversations, too.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.request import RequestError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
GIVEN_VARIABLES = ("messages", "tools", "add_generation_prompt")  # not for `variables`
NOT_TEXT = ("image", "image_url", "video", "video_url", "audio", "input_audio", "file")


@dataclass(frozen=True)
class Conversation:
    """A prompt as messages, in the form that transformers' chat templates take.

    A message is a dict with `role` and, as the template likes, `content` (text, or a list of
    {"type": "text", "text": ...}), `tool_calls`, `tool_call_id`, `name`, `reasoning_content` and so on. A tool is a
    dict with the JSON schema of a function. `add_generation_prompt=None` is true unless the final message is to be
    continued; `continue_final_message` may name another field than `content`, such as `reasoning_content`.
    `variables` are passed to the template, such as {"enable_thinking": False}; all is plain JSON data.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str = False
    template_name: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatLimits:
    """What a template and a conversation may take. The CPU time and the memory are of the template's process."""

    max_template_chars: int = 2**18  # of each; the longest of well-known models have some 20,000
    max_templates: int = 32
    max_messages: int = 10_000
    max_values: int = 2**17  # strings, numbers, lists and dicts in a conversation, all together
    max_input_chars: int = 2**22
    max_depth: int = 64
    max_output_chars: int = 2**22
    cpu_s: float = 2.0
    wall_s: float = 60.0  # for a machine too busy to give the process its CPU time
    memory_bytes: int = 2**29


def variables_of(conversation: Conversation, limits: ChatLimits) -> dict[str, Any]:
    """What the template is given: copies of plain data, the conversation's own names last, so that they win.

    RequestError names what is wrong and where.
    """
    continued, add_prompt = conversation.continue_final_message, conversation.add_generation_prompt
    if not isinstance(continued, (bool, str)):
        raise RequestError("continue_final_message", f"{continued!r:.80} is neither true, false nor a field's name")
    if not (add_prompt is None or isinstance(add_prompt, bool)):
        raise RequestError("add_generation_prompt", f"{add_prompt!r:.80} is neither true, false nor None")
    if add_prompt and continued:
        raise RequestError("add_generation_prompt", "true excludes continue_final_message: there is one end")
    plain = _Plain(limits)
    messages = _messages(conversation.messages, plain, limits.max_messages)
    return {
        "documents": None,
        **_variables(conversation.variables, plain),
        "messages": messages,
        "tools": _tools(conversation.tools, plain),
        "add_generation_prompt": not continued if add_prompt is None else add_prompt,
    }


class _ProblemError(Exception):
    """Something a conversation may not hold, and the steps to it, the last first."""

    def __init__(self, message: str):
        self.message = message
        self.steps: list[str] = []


class _Plain:
    """Copies of plain JSON data, within the limits on all of a conversation together.

    Templates come from strangers: an object with methods would be theirs to call.
    """

    def __init__(self, limits: ChatLimits):
        self._limits = limits
        self._num_values = 0
        self._num_chars = 0

    def copy(self, value: Any, where: str) -> Any:
        """RequestError names the place below `where` of what is not plain data or too much of it."""
        try:
            return self._copy(value, 0)
        except _ProblemError as problem:
            raise RequestError(where + "".join(reversed(problem.steps)), problem.message) from None

    def _copy(self, value: Any, depth: int) -> Any:
        self._num_values += 1
        if self._num_values > self._limits.max_values:
            raise _ProblemError(f"more than {self._limits.max_values} values in all")
        if depth > self._limits.max_depth:
            raise _ProblemError(f"nested more than {self._limits.max_depth} deep")
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int) and abs(value) < 2**64:
            return int(value)
        if isinstance(value, (list, tuple)):
            return self._list(value, depth + 1)
        if isinstance(value, Mapping):
            return self._dict(value, depth + 1)
        raise _ProblemError(f"{value!r:.80} is not plain JSON data (text, numbers, true, false, null, lists, dicts)")

    def _list(self, items: Sequence[Any], depth: int) -> list[Any]:
        copies = []
        for index, item in enumerate(items):
            try:
                copies.append(self._copy(item, depth))
            except _ProblemError as problem:
                problem.steps.append(f"[{index}]")
                raise
        return copies

    def _dict(self, items: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        copies = {}
        for key, item in items.items():
            if not isinstance(key, str):
                raise _ProblemError(f"{key!r:.80} is not text, as the keys of JSON objects are")
            name = self._text(key)
            try:
                copies[name] = self._copy(item, depth)
            except _ProblemError as problem:
                problem.steps.append(f".{name:.80}")
                raise
        return copies

    def _text(self, text: str) -> str:
        self._num_chars += len(text)
        if self._num_chars > self._limits.max_input_chars:
            raise _ProblemError(f"more than {self._limits.max_input_chars} characters in all")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                message = f"text has a lone surrogate at position {error.start}: it is not valid Unicode"
                raise _ProblemError(message) from None
        return str(text)


def _messages(messages: object, plain: _Plain, max_messages: int) -> list[dict[str, Any]]:
    """Plain messages. A field that is None counts as absent, and reasoning is found under each of its names."""
    if not isinstance(messages, (list, tuple)):
        raise RequestError("messages", f"{messages!r:.80} is not a list of messages")
    if not messages:
        raise RequestError("messages", "is empty; at least one message is needed")
    if len(messages) > max_messages:
        raise RequestError("messages", f"{len(messages)} are over the limit of {max_messages}")
    copies = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(
                where, f"{message!r:.80} is not a message such as {{'role': 'user', 'content': 'Hello'}}"
            )
        copy = plain.copy({key: item for key, item in message.items() if item is not None}, where)
        if not isinstance(copy.get("role"), str):
            raise RequestError(f"{where}.role", f"{copy.get('role')!r:.80} is not text such as user or assistant")
        _check_content(copy.get("content"), f"{where}.content")
        reasoning = next((copy[name] for name in REASONING_FIELDS if name in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        copies.append(copy)
    return copies


def _check_content(content: object, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RequestError(where, f"{content!r:.80} is neither text nor a list of parts")
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise RequestError(
                f"{where}[{index}]", f'{part!r:.80} is not a part such as {{"type": "text", "text": ...}}'
            )
        kind = part.get("type", next((name for name in NOT_TEXT if name in part), "text"))
        if kind != "text":
            raise RequestError(f"{where}[{index}]", f"a part of type {kind!r} cannot be served; text parts can")
        if "type" in part and not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{index}].text", f"{part.get('text')!r:.80} is not text")


def _tools(tools: object, plain: _Plain) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise RequestError("tools", f"{tools!r:.80} is not a list of JSON schemas of functions")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{index}]", f"{tool!r:.80} is not a dict with a function's JSON schema")
    return plain.copy(tools, "tools")


def _variables(variables: object, plain: _Plain) -> dict[str, Any]:
    if not isinstance(variables, Mapping):
        raise RequestError("variables", f"{variables!r:.80} is not a dict by variable name")
    for name in GIVEN_VARIABLES:
        if name in variables:
            raise RequestError("variables", f"{name!r} is set by the conversation itself")
    return plain.copy(variables, "variables")


class Continuation:
    """Where the final message's text ends: appended to it before rendering, and found again after."""

    def __init__(self, messages: list[dict[str, Any]], continued: bool | str, source: str):
        """Marks a field of the last message, in every copy of it that a template may read."""
        name = continued if isinstance(continued, str) else "content"
        self._mark = f"end{uuid.uuid4().hex} "  # the space shows whether the template trims
        final = messages[-1]
        value = final.get(name)
        if value is None:
            raise RequestError("continue_final_message", f"the last message has no {name!r} to continue")
        copies = [n for n in REASONING_FIELDS if final.get(n) == value] if name in REASONING_FIELDS else [name]
        if not any(copy in source for copy in copies):
            raise RequestError("continue_final_message", f"the chat template does not read {name!r}")
        self._text = value
        if isinstance(value, list):
            part = next((part for part in reversed(value) if isinstance(part.get("text"), str)), None)
            if part is None:
                raise RequestError("continue_final_message", "the last message has no text to continue")
            self._text = part["text"]
            part["text"] += self._mark
        elif isinstance(value, str):
            final.update(dict.fromkeys(copies, value + self._mark))
        else:
            raise RequestError("continue_final_message", f"{name}={value!r:.80} of the last message is not text")

    def cut(self, rendered: str) -> str:
        """The rendered text up to the end of the final message."""
        mark = self._mark.strip()
        place = rendered.rfind(mark)
        if place < 0 or self._text.strip() not in rendered:
            raise RequestError(
                "continue_final_message", "the chat template does not write the last message as it is, so it has no end"
            )
        kept = rendered.startswith(self._mark, place)
        return rendered[:place] if kept else rendered[:place].rstrip()
