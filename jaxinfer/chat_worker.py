"""The process in which chat templates run; started by `jaxinfer.chat` as a script, never imported by it.

Hides the jinja environment, which is the one Hugging Face's templates are written for, and how the process confines
itself: memory, CPU time per call, no file or socket of its own. Imports nothing of this project, so it starts quickly.
"""

from __future__ import annotations

import codecs
import importlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_ERROR_CHARS = 1000
# what jinja, its filters and text methods import when first used, at which time no file can be opened any more
LATE_MODULES = ("html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap")
LATE_CODECS = ("unicode_escape", "ascii", "latin-1", "utf-8", "utf-16", "idna", "punycode")


class TooLongError(Exception):
    """The rendered text is over its limit."""


# ---- what templates may name -----------------------------------------------------------------------------------------


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote; here it is just its body.

    The body is a block that is called, as in transformers: what is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012  jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body_of"), [], [], body, lineno=line)

    def body_of(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the class behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """jinja's namespace; a name with a leading underscore would reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML, which prompts are not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """What transformers gives a chat template: the sandbox, its switches, filters and functions."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda pattern: now().strftime(pattern),
        dict=_Dict(),
        namespace=_PlainNamespace,
    )
    return made


# ---- the process -----------------------------------------------------------------------------------------------------


class Renderer:
    """The templates of one model, compiled; `now` is what strftime_now reads."""

    def __init__(self, sources: dict[str, str]):
        self._now = datetime.min
        jinja = environment(lambda: self._now)
        self._templates = {}
        for name, source in sources.items():
            try:
                self._templates[name] = jinja.from_string(source)
            except TemplateSyntaxError as error:
                raise ValueError(f"{name}: line {error.lineno}: {error.message}") from error
            except Exception as error:
                raise ValueError(f"{name}: {_one_line(error)}") from error

    def render(self, name: str, variables: dict[str, Any], now: str, max_chars: int) -> str:
        """The text; TooLongError past `max_chars`."""
        self._now = datetime.fromisoformat(now)
        pieces, num_chars = [], 0
        for piece in self._templates[name].generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > max_chars:
                raise TooLongError(f"the rendered text is over the limit of {max_chars} characters")
        return "".join(pieces)


def answer(renderer: Renderer, request: dict[str, Any]) -> dict[str, str]:
    """{"text"}, or {"error", "kind"}: `raised` by the template on purpose, `failed` by accident, `limit`."""
    try:
        return {"text": renderer.render(**request)}
    except TooLongError as error:
        return {"kind": "limit", "error": str(error)}
    except MemoryError:
        return {"kind": "limit", "error": "the template took more memory than it may"}
    except Exception as error:
        kind = "raised" if type(error) is TemplateError else "failed"
        return {"kind": kind, "error": _one_line(error) if kind == "failed" else str(error)[:MAX_ERROR_CHARS]}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]


def confine(memory_bytes: int) -> None:
    """No more memory than that; no file or socket can be opened. Where the system does not know a limit, go without."""
    for name in LATE_MODULES:
        importlib.import_module(name)
    for name in LATE_CODECS:
        codecs.lookup(name)
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_NOFILE: 0, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the parent's time limit still holds
            continue


def main() -> None:
    """Serve one JSON line at a time: first the settings and templates, then requests, until the parent closes stdin.

    A call that takes more than `cpu_s` seconds of this process's CPU time ends the process by SIGPROF, whatever runs:
    no handler is needed, so nothing written in C can outlast it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    settings = json.loads(lines.readline())
    confine(settings["memory_bytes"])
    renderer: Renderer | None = None
    line = b"null"
    while line:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])
        request = json.loads(line)
        if renderer is None:
            try:
                renderer, reply = Renderer(settings["templates"]), {"text": ""}
            except ValueError as error:
                reply = {"kind": "failed", "error": str(error)[:MAX_ERROR_CHARS]}
        else:
            reply = answer(renderer, request)
        data = json.dumps(reply).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(data)
        out.flush()
        line = lines.readline()


if __name__ == "__main__":
    main()
