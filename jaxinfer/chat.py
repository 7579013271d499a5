"""Conversations to prompt text by a model's chat template, as transformers' apply_chat_template makes it.

Hides where templates are kept, what is checked before one runs, and the process it runs in: nothing inside an
interpreter can stop `'a' * 10**9` or a list that contains itself a billion times; limits of the system on another
process can. The process is kept between calls (docs/chat.md has what it costs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxinfer.chat_process import ChatProcesses, TemplateFailure
from jaxinfer.config import ConfigError
from jaxinfer.conversation import ChatLimits, Continuation, Conversation, variables_of
from jaxinfer.request import RequestError
from jaxinfer.tokenizer_config import TokenizerSettings, read_settings

DEFAULT = "default"
TOOL_USE = "tool_use"


class ChatTemplate:
    """The chat templates of one model directory. Safe to use from several threads."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        limits: ChatLimits | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ):
        """`templates` by name, one of them usually "default"; `special_tokens` are variables such as bos_token.

        `clock` is what strftime_now tells. ConfigError names a template that does not compile.
        """
        self._limits = limits = limits or ChatLimits()
        if len(templates) > limits.max_templates:
            raise ConfigError(f"{len(templates)} chat templates are over the limit of {limits.max_templates}")
        for name, source in templates.items():
            if not isinstance(source, str):
                raise ConfigError(f"chat template {name!r} is a {type(source).__name__}, not text")
            if len(source) > limits.max_template_chars:
                raise ConfigError(
                    f"chat template {name!r}: {len(source)} characters are over the limit of "
                    f"{limits.max_template_chars}"
                )
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._clock = clock
        self._processes = ChatProcesses(
            self._templates, cpu_s=limits.cpu_s, wall_s=limits.wall_s, memory_bytes=limits.memory_bytes
        )
        try:
            self._processes.start()
        except TemplateFailure as error:
            raise ConfigError(f"a chat template cannot be used: {error}") from error

    @classmethod
    def load(
        cls,
        model_dir: Path | str,
        *,
        limits: ChatLimits | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> ChatTemplate | None:
        """The templates of a directory; None when it has none.

        chat_template.jinja and additional_chat_templates/*.jinja come before `chat_template` of
        tokenizer_config.json, as in transformers 5. ConfigError names a file that cannot be used.
        """
        model_dir = Path(model_dir)
        settings = read_settings(model_dir)
        try:
            templates = _template_files(model_dir, limits or ChatLimits()) or _configured(settings)
            return None if not templates else cls(templates, settings.special_tokens, limits=limits, clock=clock)
        except ConfigError as error:
            raise ConfigError(f"{model_dir}: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        """Of the templates; a model with one has "default"."""
        return tuple(self._templates)

    def close(self) -> None:
        """End the process; another call starts it again."""
        self._processes.close()

    def render(self, conversation: Conversation) -> str:
        """The prompt's text, special tokens included: encode it with add_special_tokens=False.

        RequestError names what is wrong with the conversation, or says how the template refused it or failed.
        """
        name = self._choose(conversation)
        variables = {**self._special_tokens, **variables_of(conversation, self._limits)}
        if not conversation.continue_final_message:
            return self._run(name, variables)
        continuation = Continuation(variables["messages"], conversation.continue_final_message, self._templates[name])
        return continuation.cut(self._run(name, variables))

    def _choose(self, conversation: Conversation) -> str:
        name = conversation.template_name
        choices = ", ".join(sorted(self._templates))
        if name is None:
            with_tools = conversation.tools is not None and TOOL_USE in self._templates
            name = TOOL_USE if with_tools else DEFAULT
            if name not in self._templates:
                raise RequestError("template_name", f"must be set: no template is the default one; choose {choices}")
        if not isinstance(name, str) or name not in self._templates:
            raise RequestError("template_name", f"{name!r:.80} is not one of {choices}")
        return name

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        request = {
            "name": name,
            "variables": variables,
            "now": self._clock().isoformat(),
            "max_chars": self._limits.max_output_chars,
        }
        try:
            return self._processes.render(request)
        except TemplateFailure as error:
            how = "the chat template refuses them" if error.on_purpose else "the chat template failed on them"
            raise RequestError("messages", f"{how}: {error}") from error


# ---- files -----------------------------------------------------------------------------------------------------------


def _template_files(model_dir: Path, limits: ChatLimits) -> dict[str, str]:
    found = {DEFAULT: model_dir / "chat_template.jinja"}
    found |= {path.stem: path for path in sorted(model_dir.glob("additional_chat_templates/*.jinja"))}
    templates = {}
    for name, path in found.items():
        if path.is_file():
            if path.stat().st_size > 4 * limits.max_template_chars:  # bytes of UTF-8
                raise ConfigError(
                    f"{path} has {path.stat().st_size} bytes; a chat template may have "
                    f"{limits.max_template_chars} characters"
                )
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8: {error}") from error
    return templates


def _configured(settings: TokenizerSettings) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: a text, a list of {"name", "template"}, or a dict by name."""
    match settings.chat_template:
        case None:
            return {}
        case str(source):
            return {DEFAULT: source}
        case list(entries) if all(isinstance(e, dict) and {"name", "template"} <= e.keys() for e in entries):
            return {str(entry["name"]): entry["template"] for entry in entries}
        case dict(templates):
            return templates
        case other:
            raise ConfigError(
                f"tokenizer_config.json: chat_template={other!r:.80} is neither text nor a list of "
                '{"name": ..., "template": ...}'
            )
