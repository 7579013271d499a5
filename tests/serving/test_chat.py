"""Conversations over the real wire to a real engine: a tiny model with the tokenizer and templates of a family."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.request import RequestError, SamplingParams
from serving import cli
from serving.async_engine import AsyncEngine
from serving.chat_wire import conversation_from_proto, conversation_to_proto
from serving.client import AsyncClient, Conversation, InvalidRequestError
from serving.grpc_server import GrpcServer, ServerConfig
from serving.protos.jaxinfer.v1 import inference_pb2 as pb

over_the_wire = pytest.mark.asyncio(loop_scope="module")
ROOT = Path(__file__).parents[2]
FAMILY = ROOT / "tests" / "goldens_chat" / "command_r"  # with templates default, tool_use and rag
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_model_len": 512,
    "max_num_batched_tokens": 64,
    "min_prefill_bucket": 64,
    "max_prefill_seqs": 1,
    "loop_steps": 4,
}
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello"}]
CASES = json.loads((FAMILY / "golden.json").read_text(encoding="utf-8"))["conversations"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "model"
    make = runpy.run_path(str(ROOT / "scripts" / "make_random_model.py"))["main"]
    shape = "--hidden-size 64 --layers 2 --heads 4 --kv-heads 2 --intermediate-size 96 --vocab-size 704"
    assert make(["--arch", "llama", "--dtype", "float32", *shape.split(), "--out", str(out)]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FAMILY / name, out)
    return out


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model: Path):
    engine = AsyncEngine(lambda progress: Engine(model, EngineConfig(**OPTIONS)))
    front = GrpcServer(engine, ServerConfig(port=0, max_prompt_chars=5000), model_name="chat")
    await front.start()
    engine.start()
    await engine.until_ready()
    yield SimpleNamespace(engine=engine, address=front.address)
    await engine.drain(30)
    assert await engine.stop()
    await front.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: SimpleNamespace):
    async with AsyncClient(server.address) as client:
        yield client


@over_the_wire
@pytest.mark.parametrize("name", ["question", "turns", "unicode", "tool_answered", "continued", "documents"])
async def test_a_conversation_is_the_prompt_transformers_makes(name: str, client: AsyncClient) -> None:
    case = CASES[name]
    answer = await client.generate(Conversation(**case["conversation"]), GREEDY)
    by_ids = await client.generate(case["ids"], GREEDY)
    assert answer.usage.prompt_tokens == len(case["ids"])
    assert answer.completions[0].token_ids == by_ids.completions[0].token_ids
    pieces = [chunk.text async for chunk in client.stream(Conversation(**case["conversation"]), GREEDY)]
    assert "".join(pieces) == answer.text


@over_the_wire
async def test_the_templates_of_a_model_are_told(client: AsyncClient) -> None:
    info = await client.model_info()
    assert info.chat_templates == ("default", "tool_use", "rag") == tuple(info.engine["chat_templates"])


@over_the_wire
@pytest.mark.parametrize(
    ("conversation", "field", "message"),
    [
        (Conversation([]), "chat.messages", "is empty"),
        (Conversation([{"role": "user", "content": 3}]), "chat.messages[0].content", "3 is neither text nor a list"),
        (Conversation(HELLO * 2), "chat.messages", "the chat template refuses them: Take turns."),
        (Conversation(HELLO, template_name="x"), "chat.template_name", "'x' is not one of default, rag, tool_use"),
        (Conversation(HELLO, tools=[3]), "chat.tools[0]", "3 is not a dict"),  # type: ignore[list-item]
        (Conversation(HELLO, variables={"tools": 1}), "chat.variables", "'tools' is set by the conversation itself"),
        (Conversation([{"role": "user", "content": "\ud800"}]), "chat.messages[0].content", "a lone surrogate"),
        (Conversation([{"role": "user", "content": "x" * 5000}]), "chat", "characters are over the limit of 5000"),
        (Conversation(HELLO, continue_final_message="name"), "chat.continue_final_message", "no 'name' to continue"),
    ],
)
async def test_refusals_name_the_field(
    conversation: Conversation, field: str, message: str, client: AsyncClient
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        await client.generate(conversation, GREEDY)
    [violation] = error.value.violations
    assert violation.field == field and message in violation.description


@over_the_wire
async def test_what_cannot_be_sent_is_refused_here(client: AsyncClient) -> None:
    for conversation, field in (
        (Conversation([{"role": "user", "content": object()}]), "chat.messages"),
        (Conversation(HELLO, template_name="\ud800"), "chat.template_name"),
    ):
        with pytest.raises(InvalidRequestError) as error:
            await client.generate(conversation, GREEDY)
        assert error.value.violations[0].field == field
    with pytest.raises(InvalidRequestError, match="a chat template writes them itself"):
        await client.generate(Conversation(HELLO), GREEDY, add_special_tokens=False)


@over_the_wire
async def test_a_model_without_a_template_says_so(serving: Any, fakes: Any) -> None:
    async with serving(fakes.Engine()) as running, AsyncClient(running.address) as client:
        with pytest.raises(InvalidRequestError, match="this model has no chat template; send text"):
            await client.generate(Conversation(HELLO), GREEDY)
        assert (await client.model_info()).chat_templates == ()


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_is_lost_on_the_wire(name: str) -> None:
    given = Conversation(**CASES[name]["conversation"])
    sent = conversation_from_proto(pb.Chat.FromString(conversation_to_proto(given).SerializeToString()))
    continued = "content" if given.continue_final_message is True else given.continue_final_message or ""
    assert sent.continue_final_message == continued
    for field in ("messages", "tools", "add_generation_prompt", "template_name", "variables"):
        assert json.dumps(getattr(sent, field)) == json.dumps(getattr(given, field))  # the order of keys, too


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Chat(messages_json="["), "chat.messages_json"),
        (pb.Chat(messages_json="[" * 100_000), "chat.messages_json"),
        (pb.Chat(messages_json="[]", tools_json="x"), "chat.tools_json"),
        (pb.Chat(messages_json="[]", variables_json=""), "chat.variables_json"),
    ],
)
def test_what_is_no_json_is_named(message: pb.Chat, field: str) -> None:
    with pytest.raises(RequestError, match="is not JSON") as error:
        conversation_from_proto(message)
    assert error.value.field_name == field


# ---- without a server ----


def test_llm_chat(model: Path) -> None:
    llm = LLM(model, warm_up=False, **OPTIONS)
    for name in ("question", "tool_call", "continued"):
        case = CASES[name]
        given = dict(case["conversation"])
        result = llm.chat(given.pop("messages"), GREEDY, **given)
        assert result.prompt == case["text"] and list(result.prompt_token_ids) == case["ids"]
        [by_ids] = llm.generate([case["ids"]], GREEDY, progress=False)
        assert result.outputs[0].token_ids == by_ids.outputs[0].token_ids
    mixed = llm.generate(["Hello", Conversation(HELLO), [5, 6]], GREEDY, progress=False)
    assert [result.prompt for result in mixed] == ["Hello", CASES_PROMPT, None]
    with pytest.raises(RequestError, match=r"prompts\[0\]: messages: is empty"):
        llm.chat([], GREEDY)
    with pytest.raises(RequestError, match=r"prompts\[1\]: messages: the chat template refuses them: Take turns"):
        llm.generate(["Hello", Conversation(HELLO * 2)], GREEDY, progress=False)
    llm.engine.close()


CASES_PROMPT = CASES["question"]["text"].replace("What is 2 + 2?", "Hello")


def test_generate_takes_conversations(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text(json.dumps(CASES["turns"]["conversation"]["messages"]))
    (tmp_path / "object.json").write_text(json.dumps(CASES["documents"]["conversation"]))
    files = [flag for name in ("list", "object") for flag in ("--messages", str(tmp_path / f"{name}.json"))]
    options = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    asked = ["--chat", "What is 2 + 2?", *files, "--max-tokens", "2", "--temperature", "0", "--json"]
    assert cli.main(["generate", str(model), *asked, *options]) == 0
    document = json.loads(capsys.readouterr().out)
    num_tokens = sum(len(CASES[name]["ids"]) for name in ("question", "turns", "documents"))
    assert document["usage"]["prompt_tokens"] == num_tokens and len(document["outputs"]) == 3


@pytest.mark.parametrize("content", ["{", "3", '{"tools": []}', '{"messages": [], "unknown": 1}', None])
def test_generate_names_a_file_that_is_no_conversation(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "messages.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate", "--messages", str(path)])
    assert exit_info.value.code == 2
    assert f"{path} " in capsys.readouterr().err
