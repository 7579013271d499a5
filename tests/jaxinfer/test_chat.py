"""Prompts and ids against transformers (tests/goldens_chat); what conversations and templates may do, and may not."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.filters import FILTERS

from jaxinfer import chat_process
from jaxinfer.chat import ChatLimits, ChatTemplate, Conversation
from jaxinfer.config import ConfigError
from jaxinfer.request import RequestError
from jaxinfer.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent.parent / "goldens_chat"
FAMILIES = sorted(path.name for path in GOLDENS.iterdir())
HELLO = Conversation([{"role": "user", "content": "Hello"}])


def golden_of(family: str) -> dict[str, Any]:
    return json.loads((GOLDENS / family / "golden.json").read_text(encoding="utf-8"))


def template(source: str, limits: ChatLimits | None = None, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, special_tokens, limits=limits)


# ---- as transformers ----


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_ids_equal_transformers(family: str) -> None:
    golden, tokenizer = golden_of(family), Tokenizer.load(GOLDENS / family)
    chat = ChatTemplate.load(GOLDENS / family, clock=lambda: datetime.fromisoformat(golden["now"]))
    assert tokenizer is not None and chat is not None
    for name, case in golden["conversations"].items():
        conversation = Conversation(**case["conversation"])
        if "error" in case:
            with pytest.raises(RequestError) as refused:
                chat.render(conversation)
            assert refused.value.field_name == "messages", name
            assert case["error"] in str(refused.value), name
            assert ("refuses them" in str(refused.value)) == case["on_purpose"], name
            continue
        text = chat.render(conversation)
        assert text == case["text"], name
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"], name
    chat.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_special_tokens_equal_transformers(family: str) -> None:
    golden, tokenizer = golden_of(family), Tokenizer.load(GOLDENS / family)
    assert tokenizer is not None
    for case in golden["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids_without_special"], case["text"]
    for case in [*golden["texts"], *golden["conversations"].values()]:
        for skip, field in ((False, "decoded"), (True, "decoded_without_special")):
            if field in case:
                assert tokenizer.decode(case["ids"], skip_special_tokens=skip) == case[field]
                decoder = tokenizer.incremental(skip_special_tokens=skip)
                pieces = [decoder.push([token]) for token in case["ids"]] + [decoder.flush()]
                assert "".join(pieces) == case[field]


def test_goldens_are_small_and_cover_what_they_claim() -> None:
    assert len(FAMILIES) >= 10
    sizes = [sum(path.stat().st_size for path in (GOLDENS / family).iterdir()) for family in FAMILIES]
    assert max(sizes) <= 80_000 and sum(sizes) <= 700_000
    cases = [case for family in FAMILIES for case in golden_of(family)["conversations"].values()]
    given = [case["conversation"] for case in cases]
    assert sum("ids" in case for case in cases) > 150 and sum("error" in case for case in cases) > 15
    for option in ("tools", "continue_final_message", "add_generation_prompt", "template_name", "variables"):
        assert sum(option in conversation for conversation in given) >= 3, option
    decoders = [json.loads((GOLDENS / family / "tokenizer.json").read_text())["decoder"]["type"] for family in FAMILIES]
    assert decoders.count("ByteLevel") >= 3 and decoders.count("Sequence") >= 3


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("chatml", lambda config: config.pop("added_tokens_decoder")),  # <tool_call> is then not special
        ("phi3", lambda config: config.pop("added_tokens_decoder")),  # <|user|> is then no token
        ("llama2", lambda config: config.update(legacy=True)),  # there is then a space after special tokens
        ("mistral", lambda config: config.pop("eos_token")),
    ],
)
def test_goldens_notice_settings_that_are_not_applied(family: str, change: Any, tmp_path: Path) -> None:
    for path in (GOLDENS / family).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    change(config)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    golden, tokenizer, chat = golden_of(family), Tokenizer.load(tmp_path), ChatTemplate.load(tmp_path)
    assert tokenizer is not None and chat is not None
    wrong = 0
    for case in golden["conversations"].values():
        if "text" in case and "continue_final_message" not in case["conversation"]:
            ids = tokenizer.encode(chat.render(Conversation(**case["conversation"])), add_special_tokens=False)
            wrong += ids != case["ids"] or tokenizer.decode(case["ids"]) != case["decoded_without_special"]
    assert wrong


# ---- files ----


def test_no_template_is_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert ChatTemplate.load(tmp_path) is None


def test_files_come_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config", "eos_token": {"content": "</s>"}}')
    chat = ChatTemplate.load(tmp_path)
    assert chat is not None and chat.names == ("default",) and chat.render(HELLO) == "config"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}\n")
    chat = ChatTemplate.load(tmp_path)
    assert chat is not None and chat.render(HELLO) == "file </s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    chat = ChatTemplate.load(tmp_path)
    assert chat is not None and chat.names == ("default", "tool_use")
    assert chat.render(HELLO) == "file </s>"
    assert chat.render(Conversation(HELLO.messages, tools=[{}, {}])) == "2 tools"
    assert chat.render(Conversation(HELLO.messages, tools=[{}], template_name="default")) == "file </s>"
    with pytest.raises(RequestError, match="template_name: 'rag' is not one of default, tool_use"):
        chat.render(Conversation(HELLO.messages, template_name="rag"))


def test_without_a_default_a_name_is_needed() -> None:
    chat = ChatTemplate({"a": "A", "b": "B"}, {})
    assert chat.render(Conversation(HELLO.messages, template_name="b")) == "B"
    with pytest.raises(RequestError, match="template_name: must be set: no template is the default one; choose a, b"):
        chat.render(HELLO)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, not list"),
        ('{"chat_template": 3}', "chat_template=3 is neither text nor a list"),
        ('{"chat_template": [{"name": "x"}]}', "is neither text nor a list"),
        ('{"chat_template": [{"name": "x", "template": 3}]}', "chat template 'x' is a int, not text"),
        ('{"chat_template": "{% if %}"}', "default: line 1: Expected an expression"),
        ('{"chat_template": "{{ x | nofilter }}"}', "default: line 1: No filter named 'nofilter'"),
        ('{"chat_template": "{% for a in b %}"}', "default: line 1: Unexpected end of template"),
        ('{"chat_template": "%s"}' % ("x" * 300_000), "300000 characters are over the limit of 262144"),
        ('{"chat_template": "x", "bos_token": 3}', "bos_token: 3 is neither a token's text nor an object"),
        ('{"chat_template": "x", "added_tokens_decoder": []}', "is not a dict by token id"),
        ('{"chat_template": "x", "added_tokens_decoder": {"a": {}}}', "'a' is not a token id"),
        ('{"chat_template": "x", "added_tokens_decoder": {"1": {}}}', "neither a token's text nor an object"),
        ('{"chat_template": "x", "fast_tokenizer_files": ["tokenizer.4.0.json"]}', "fast_tokenizer_files="),
    ],
)
def test_files_that_cannot_be_used_are_named(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match=message) as error:
        ChatTemplate.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [b"\xff", b"x" * (4 * 2**18 + 1)])
def test_template_files_that_cannot_be_used_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja (is not UTF-8|has 1048577 bytes)"):
        ChatTemplate.load(tmp_path)


# ---- conversations ----


class Opaque:
    pass


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
WIDE: Any = 1
for _ in range(40):  # 2**40 values, made of 40 lists
    WIDE = [WIDE, WIDE]


def user(content: object, **fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content, **fields}]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: is empty"),
    ({"messages": "Hello"}, "messages: 'Hello' is not a list of messages"),
    ({"messages": ["Hello"]}, "messages[0]: 'Hello' is not a message such as"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: None is not text such as user or assistant"),
    ({"messages": user(3)}, "messages[0].content: 3 is neither text nor a list of parts"),
    ({"messages": user(["a"])}, "messages[0].content[0]: 'a' is not a part such as"),
    (
        {"messages": [*user("a"), *user([IMAGE])]},
        "messages[1].content[0]: a part of type 'image_url' cannot be served; text parts can",
    ),
    ({"messages": user([{"audio": "x"}])}, "messages[0].content[0]: a part of type 'audio' cannot be served"),
    ({"messages": user([{"type": "text"}])}, "messages[0].content[0].text: None is not text"),
    ({"messages": user("a", extra=Opaque())}, "messages[0].extra: <"),
    ({"messages": user("a", extra={1: 2})}, "messages[0].extra: 1 is not text, as the keys of JSON objects are"),
    ({"messages": user("a", extra=2**64)}, "messages[0].extra: 18446744073709551616 is not plain JSON data"),
    ({"messages": user("a\ud800")}, "messages[0].content: text has a lone surrogate at position 1"),
    ({"messages": user("a", extra=CYCLE)}, "nested more than 64 deep"),
    ({"messages": user("a", extra=WIDE)}, "more than 131072 values in all"),
    ({"messages": user("a" * 2**22)}, "messages[0].content: more than 4194304 characters in all"),
    ({"messages": user("a") * 10_001}, "messages: 10001 are over the limit of 10000"),
    ({"messages": user("a"), "tools": {}}, "tools: {} is not a list of JSON schemas"),
    ({"messages": user("a"), "tools": [len]}, "tools[0]: <built-in function len> is not a dict"),
    ({"messages": user("a"), "template_name": ["default"]}, "template_name: ['default'] is not one of default"),
    ({"messages": user("a"), "continue_final_message": 1}, "continue_final_message: 1 is neither true, false nor"),
    ({"messages": user("a"), "add_generation_prompt": "no"}, "add_generation_prompt: 'no' is neither true, false"),
    ({"messages": user("a"), "variables": []}, "variables: [] is not a dict by variable name"),
    ({"messages": user("a"), "variables": {"messages": 1}}, "variables: 'messages' is set by the conversation itself"),
    (
        {"messages": user("a"), "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt: true excludes continue_final_message",
    ),
    (
        {"messages": [{"role": "user"}], "continue_final_message": True},
        "continue_final_message: the last message has no 'content' to continue",
    ),
    (
        {"messages": user([]), "continue_final_message": True},
        "continue_final_message: the last message has no text to continue",
    ),
    (
        {"messages": user("a"), "continue_final_message": "name"},
        "continue_final_message: the last message has no 'name' to continue",
    ),
    (
        {"messages": user("a", name="n"), "continue_final_message": "name"},
        "continue_final_message: the chat template does not read 'name'",
    ),
    (
        {"messages": [*user("a"), {"role": "hidden", "content": "b"}], "continue_final_message": True},
        "continue_final_message: the chat template does not write the last message as it is",
    ),
]


@pytest.fixture(scope="module")
def plain_chat() -> ChatTemplate:
    return template("{% for m in messages if m.role != 'hidden' %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_is_wrong_is_named(options: dict[str, Any], message: str, plain_chat: ChatTemplate) -> None:
    with pytest.raises(RequestError) as error:
        plain_chat.render(Conversation(**options))
    assert message in str(error.value)


def test_the_callers_messages_are_left_alone(plain_chat: ChatTemplate) -> None:
    messages = [{"role": "user", "content": "One,", "name": None, "thinking": "t"}]
    before = json.dumps(messages)
    assert plain_chat.render(Conversation(messages, continue_final_message=True)) == "user: One,"
    assert json.dumps(messages) == before


def test_numbers_and_order_arrive_as_they_are() -> None:
    chat = template("{{ tools | tojson }}|{{ n }}|{{ f }}|{{ b }}")
    tools = [{"z": 1, "a": 1.0, "big": 2**63, "text": "é<&'\u2028"}]
    given = Conversation(HELLO.messages, tools=tools, variables={"n": None, "f": 1e-7, "b": True})
    assert chat.render(given) == json.dumps(tools, ensure_ascii=False) + "|None|1e-07|True"


def test_the_clock_is_given() -> None:
    chat = ChatTemplate(
        {"default": "{{ strftime_now('%Y-%m-%d %H:%M') }}"}, {}, clock=lambda: datetime(2001, 2, 3, 4, 5)
    )
    assert chat.render(HELLO) == "2001-02-03 04:05"
    before = datetime.now().strftime("%Y-%m-%d")
    assert template("{{ strftime_now('%Y-%m-%d') }}").render(HELLO) in (before, datetime.now().strftime("%Y-%m-%d"))


# ---- hostile templates ----

TOO_LONG = r"took more than 0\.3 s of CPU time"
TOO_LARGE = f"more memory than it may|{TOO_LONG}"  # whichever comes first: it depends on the machine
TIGHT = ChatLimits(cpu_s=0.3, memory_bytes=2**28, max_output_chars=100_000)
GROW = (
    "{%% set ns = namespace(a=%s) %%}{%% for i in range(60) %%}{%% set ns.a = %s %%}{%% endfor %%}{{ ns.a | length }}"
)
ATTACKS = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TOO_LONG),
    "macros": ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}", TOO_LONG),
    "endless macro": ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "RecursionError"),
    "recursive loop": ("{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "RecursionError"),
    "repeated text": ("{{ 'a' * 10**9 }}", TOO_LARGE),
    "repeated list": ("{{ ([0] * 10**9) | length }}", TOO_LARGE),
    "doubled text": (GROW % ("'ab'", "ns.a ~ ns.a"), TOO_LARGE),
    "doubled list": (GROW % ("[1]", "ns.a + ns.a"), TOO_LARGE),
    "doubled block": (
        "{% set ns = namespace(a='ab') %}{% for i in range(60) %}"
        "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}",
        TOO_LARGE,
    ),
    "list in lists": ((GROW % ("[1]", "[ns.a, ns.a]")) + "{{ ns.a }}", TOO_LONG),
    "lists compared": ((GROW % ("[1]", "[ns.a, ns.a]")) + "{{ ns.a == ns.a[:] + [1] or ns.a | tojson }}", TOO_LONG),
    "percent format": ("{{ '%0999999999d' % 1 }}", TOO_LARGE),
    "format filter": ("{{ '%999999999s' | format('a') }}", TOO_LARGE),
    "format method": ("{{ '{:>999999999}'.format(1) }}", TOO_LARGE),
    "center": ("{{ 'x' | center(999999999) }}", TOO_LARGE),
    "indent": ("{{ 'x\ny' | indent(999999999) }}", TOO_LARGE),
    "power": ("{{ (9 ** (9 ** 9)) % 7 }}", TOO_LONG),
    "powers": (GROW % ("9", "ns.a * ns.a"), TOO_LONG),
    "filters": ("{% for i in range(9999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}", TOO_LONG),
    "sort": ("{% for i in range(9999) %}{{ range(99999) | sort(reverse=true) | length }}{% endfor %}", TOO_LONG),
    "slice": ("{{ [1] | slice(10**8) | list | length }}", TOO_LONG),
    "batch": ("{{ [1] | batch(10**9, 'x') | list | length }}", TOO_LARGE),
    "replace": ("{{ ('a' * 10**5) | replace('a', 'a' * 10**5) | length }}", TOO_LARGE),
    "join": ("{{ range(99999) | join('x' * 100000) | length }}", TOO_LARGE),
    "json": ("{{ [[1]] | tojson(indent=10**9) }}", TOO_LARGE),
    "long output": ("{% for a in range(99999) %}{{ 'abcdefgh' }}{% endfor %}", "over the limit of 100000 characters"),
    "long range": ("{{ range(10**9) | list | length }}", "OverflowError: Range too big"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "attributes by filter": ("{{ (raise_exception | attr('__globals__')).x }}", "SecurityError"),
    "format attributes": ("{{ '{0.__class__.x}'.format(messages) }}", "SecurityError"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "namespace": ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "long refusal": ("{{ raise_exception('no' * 10**6) }}", "refuses them: nono"),
}


@pytest.mark.parametrize(("source", "message"), ATTACKS.values(), ids=ATTACKS)
def test_hostile_templates_are_ended(source: str, message: str) -> None:
    started_s = time.monotonic()
    with pytest.raises((RequestError, ConfigError)) as error:  # what is constant is computed when it is compiled
        template(source, TIGHT).render(HELLO)
    assert re.search(message, str(error.value)) and len(str(error.value)) < 1200
    assert time.monotonic() - started_s < 30  # not a measurement: without a bound these take from minutes to for ever


@pytest.mark.parametrize("source", ["(" * 9000 + ")" * 9000, "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}"])
def test_deep_templates_are_refused_or_rendered(source: str) -> None:
    if "{{" not in source:
        assert template(source).render(HELLO) == source
        return
    with pytest.raises(ConfigError, match="RecursionError"):
        template(source)


def test_a_template_after_an_ended_one() -> None:
    """The process that was ended is replaced, and the others' calls do not notice."""
    chat = template("{% if messages[0].content == 'x' %}" + ATTACKS["nested loops"][0] + "{% endif %}fine", TIGHT)
    for _ in range(2):
        with pytest.raises(RequestError, match=TOO_LONG):
            chat.render(Conversation(user("x")))
        assert chat.render(HELLO) == "fine"


def test_a_process_that_died_while_idle_is_replaced() -> None:
    chat = template("fine")
    [process] = chat._processes._idle
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert chat.render(HELLO) == "fine"


def test_a_process_that_stands_still_is_ended() -> None:
    chat = template("fine", ChatLimits(wall_s=0.5))
    [process] = chat._processes._idle
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(RequestError, match=r"took longer than 0\.5 s"):
        chat.render(HELLO)
    assert chat.render(HELLO) == "fine"


def test_a_process_that_reads_no_more_is_ended() -> None:
    chat = ChatTemplate({"default": "{{ messages[0].content }}"}, {}, limits=ChatLimits(wall_s=3.0))
    process = chat._processes._idle[0]
    os.kill(process._process.pid, signal.SIGSTOP)
    long = "x" * 2**20  # more than a pipe holds, so that writing it cannot end
    with pytest.raises(RequestError, match=r"longer than 3 s"):
        chat.render(Conversation([{"role": "user", "content": long}]))
    assert chat.render(Conversation([{"role": "user", "content": long}])) == long
    chat.close()


def test_a_process_killed_while_it_renders_is_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    ask, kills = chat_process._Process.ask, [2]

    def killed_before_it_answers(process: Any, request: Any) -> Any:
        if "name" in request and kills[0]:  # not the settings that a new process is given first
            kills[0] -= 1
            os.kill(process._process.pid, signal.SIGSTOP)
            threading.Timer(0.2, os.kill, (process._process.pid, signal.SIGKILL)).start()
        return ask(process, request)

    monkeypatch.setattr(chat_process._Process, "ask", killed_before_it_answers)
    hello = Conversation([{"role": "user", "content": "Hello"}])
    with pytest.raises(RequestError, match=r"status -9"):  # a template may be what gets its processes killed
        chat.render(hello)
    kills[0] = 1
    assert chat.render(hello) == "Hello" and not kills[0]
    chat.close()


def test_processes_end_with_their_template() -> None:
    chat = template("fine")
    [process] = chat._processes._idle
    chat.close()
    assert process._process.returncode == -signal.SIGKILL
    assert chat.render(HELLO) == "fine"  # starts another
    [process] = chat._processes._idle
    del chat
    assert process._process.returncode == -signal.SIGKILL


def test_calls_from_several_threads() -> None:
    chat, texts = template("{{ messages[0].content }}"), {}

    def call(index: int) -> None:
        texts[index] = [chat.render(Conversation(user(f"{index} {i}"))) for i in range(20)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {index: [f"{index} {i}" for i in range(20)] for index in range(4)}
    assert len(chat._processes._idle) <= 2


def test_a_template_can_open_nothing() -> None:
    """What jinja would import late is imported before: every filter works where no file can be opened."""
    arguments = {"attr": "('x')", "default": "('x')", "d": "('x')", "format": "(1)", "groupby": "(0)", "slice": "(2)"}
    arguments |= {"replace": "('a', 'b')", "batch": "(2)", "map": "('upper')"}
    given = dict.fromkeys(FILTERS, "'ab cd'")
    given |= dict.fromkeys(("abs", "round", "int", "float", "filesizeformat"), "-3.5") | {"format": "'%d'"}
    given |= dict.fromkeys(("dictsort", "items", "xmlattr"), "{'a': 1}") | {"sum": "[1, 2]"}
    start, end = "{% set made %}{% for v in [", "] %}{{ v }}{% endfor %}{% endset %}ok"
    sources = {name: f"{start}{given[name]} | {name}{arguments.get(name, '')}{end}" for name in FILTERS}
    sources["lipsum"] = "{{ 'ok' if lipsum(n=1) | length > 9 }}"
    chat = ChatTemplate(sources, {}, limits=ChatLimits(max_templates=len(sources)))
    for name in sources:
        assert chat.render(Conversation(HELLO.messages, template_name=name)) == "ok", name
    with pytest.raises(ConfigError, match="chat templates are over the limit of 32"):
        ChatTemplate(sources, {})
