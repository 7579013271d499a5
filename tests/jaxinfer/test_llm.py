"""`LLM` as a notebook uses it: text in and out, stop strings, streams that are left early."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxinfer.llm import LLM
from jaxinfer.request import FinishReason, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = ["def read(path):\n", "import os\n", "class Stack:\n    def __init__(self"]


@pytest.fixture(scope="module")
def llm(shipped_model: Path) -> LLM:
    return LLM(shipped_model, dtype="float32", max_num_seqs=4, max_model_len=256, warm_up=False)


def test_text_is_the_tokens_decoded(llm: LLM) -> None:
    results = llm.generate(PROMPTS, GREEDY, progress=False)
    assert [result.prompt for result in results] == PROMPTS
    for result in results:
        out = result.outputs[0]
        assert len(out.token_ids) == 24 and out.finish_reason is FinishReason.LENGTH
        assert out.text == llm.engine.tokenizer.decode(out.token_ids)
        assert result.ttft_s is not None and result.total_s is not None and result.ttft_s <= result.total_s
    assert str(results[0]).startswith(PROMPTS[0] + results[0].outputs[0].text)


def test_one_prompt_token_ids_and_a_list_of_params(llm: LLM) -> None:
    [by_text] = llm.generate(PROMPTS[0], GREEDY, progress=False)
    ids = llm.engine.tokenizer.encode(PROMPTS[0])
    [by_ids] = llm.generate(ids, GREEDY, progress=False)
    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids and by_ids.prompt is None
    short = llm.generate(PROMPTS[:2], [GREEDY, replace(GREEDY, max_tokens=3)], progress=False)
    assert [len(result.outputs[0].token_ids) for result in short] == [24, 3]


def test_stop_strings_end_the_text_before_or_after_them(llm: LLM) -> None:
    [plain] = llm.generate(PROMPTS[0], GREEDY, progress=False)
    text = plain.outputs[0].text
    stop = text[8:11]
    for include in (False, True):
        params = replace(GREEDY, stop=(stop, "never there"), include_stop_in_output=include)
        [result] = llm.generate(PROMPTS[0], params, progress=False)
        out = result.outputs[0]
        end = text.index(stop) + (len(stop) if include else 0)
        assert out.text == text[:end] and out.finish_reason is FinishReason.STOP
        assert out.token_ids == plain.outputs[0].token_ids[: len(out.token_ids)]
        assert stop in llm.engine.tokenizer.decode(out.token_ids)
    llm.engine.check()


def test_streamed_pieces_are_the_whole(llm: LLM) -> None:
    [whole] = llm.generate(PROMPTS[1], GREEDY, progress=False)
    events = list(llm.stream(PROMPTS[1], GREEDY))
    assert "".join(event.text for event in events) == whole.outputs[0].text
    assert [token for event in events for token in event.token_ids] == whole.outputs[0].token_ids
    assert len(events) > 1 and events[-1].finish_reason is FinishReason.LENGTH


def test_leaving_a_stream_frees_its_slot(llm: LLM) -> None:
    for event in llm.stream(PROMPTS[1], replace(GREEDY, max_tokens=200)):
        assert event.finish_reason is None
        break
    assert not llm.engine.has_work()
    llm.engine.check()


def test_open_streams_share_the_engine(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY, progress=False)[0].outputs[0].text for prompt in PROMPTS]
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    texts = [next(first).text, next(second).text]
    [between] = llm.generate(PROMPTS[2], GREEDY, progress=False)
    texts = [text + "".join(event.text for event in rest) for text, rest in zip(texts, (first, second), strict=True)]
    assert [*texts, between.outputs[0].text] == alone
    llm.engine.check()


def test_threads_share_the_engine(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY, progress=False)[0].outputs[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, GREEDY, progress=False), PROMPTS))
    assert [result.outputs[0].text for [result] in together] == alone
    llm.engine.check()


def test_ctrl_c_takes_effect_between_steps_and_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = llm.engine.step, []

    def interrupted():
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)  # in the middle of a step, as far as the caller can tell
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born ignoring it
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, replace(GREEDY, max_tokens=200), progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not llm.engine.has_work()
    finally:
        signal.signal(signal.SIGINT, before)
    llm.engine.check()
    assert len(llm.generate(PROMPTS[0], GREEDY, progress=False)[0].outputs[0].token_ids) == 24


def test_min_tokens_holds_stop_strings_back(llm: LLM) -> None:
    [plain] = llm.generate(PROMPTS[0], GREEDY, progress=False)
    stop = llm.engine.tokenizer.decode(plain.outputs[0].token_ids[:2])
    [held] = llm.generate(PROMPTS[0], replace(GREEDY, stop=(stop,), min_tokens=2), progress=False)
    assert held.outputs[0].text.startswith(stop) and len(held.outputs[0].token_ids) >= 2
    [early] = llm.generate(PROMPTS[0], replace(GREEDY, stop=(stop,)), progress=False)
    assert early.outputs[0].text == "" and len(early.outputs[0].token_ids) <= 2


def test_arrays_and_iterables_are_prompts(llm: LLM) -> None:
    ids = llm.engine.tokenizer.encode(PROMPTS[0])
    [by_array] = llm.generate(np.array(ids), GREEDY, progress=False)
    results = llm.generate((prompt for prompt in [ids, PROMPTS[0]]), GREEDY, progress=False)
    assert [result.outputs[0].token_ids for result in results] == [by_array.outputs[0].token_ids] * 2
    for prompts, words in (
        (b"abc", "is bytes"),
        (["x", b"abc"], r"prompts\[1\].*neither text"),
        (["\ud800"], r"prompts\[0\]"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate(prompts, GREEDY, progress=False)
    with pytest.raises(RequestError, match="is not a SamplingParams"):
        llm.generate("x", [{"max_tokens": 3}], progress=False)


def test_bad_input_names_the_prompt_and_runs_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompts\[1\].*4096 is outside the vocabulary"):
        llm.generate([[1, 2], [4096]], GREEDY, progress=False)
    with pytest.raises(RequestError, match="2 SamplingParams for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY], progress=False)
    assert not llm.engine.has_work()


def test_text_needs_a_tokenizer() -> None:
    goldens = Path(__file__).parent.parent / "goldens" / "llama"
    llm = LLM(goldens, dtype="float32", max_num_seqs=2, max_model_len=64, warm_up=False)
    with pytest.raises(RequestError, match="no tokenizer; give token ids"):
        llm.generate("text", progress=False)
    assert len(llm.generate([5, 6], replace(GREEDY, max_tokens=4), progress=False)[0].outputs[0].token_ids) == 4


def test_results_print_well(llm: LLM) -> None:
    [result] = llm.generate(PROMPTS[0], replace(GREEDY, max_tokens=4), progress=False)
    console = Console(record=True, width=80)
    console.print(result)
    shown = console.export_text()
    assert "def read(path):" in shown and "4 tokens, length" in shown
