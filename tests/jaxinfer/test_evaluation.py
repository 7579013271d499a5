"""The mathematics of evaluation against plain restatements, and the engine's numbers against the oracle's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from ascii_model import ascii_model, ascii_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from safetensors.numpy import save_file

from jaxinfer.config import ConfigError
from jaxinfer.evaluation import agreement, choices, divergence, perplexity, statistics
from jaxinfer.evaluation.choices import Answer, Question
from jaxinfer.evaluation.text import TokenizedText, Window, WindowOptions, read_text, tokenize, windows
from jaxinfer.llm import LLM
from jaxinfer.models import load_config
from jaxinfer.tokenizer import Tokenizer

ENGINE = {"dtype": "float32", "max_model_len": 128, "page_size": 8, "max_num_seqs": 4, "min_prefill_bucket": 16}
TEXT = "It was the best of times, it was the worst of times; " * 9


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_model(tmp_path_factory.mktemp("ascii"))


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(model_dir, warm_up=False, max_num_batched_tokens=64, **ENGINE)


def plain_nats(logits: np.ndarray, targets: list[int]) -> list[float]:
    """-log softmax at the targets, row by row, in plain Python."""
    found = []
    for row, target in zip(logits.astype(np.float64), targets, strict=True):
        largest = max(row)
        found.append(largest + math.log(math.fsum(math.exp(x - largest) for x in row)) - row[target])
    return found


# ---- statistics


def test_wilson_interval_has_its_published_values() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3); 0 of 20 begins at 0, and 20 of 20 ends at 1."""
    low, high = statistics.proportion(81, 263).ci95
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert [round(x, 4) for x in statistics.proportion(0, 20).ci95] == [0.0, 0.1611]
    assert [round(x, 4) for x in statistics.proportion(20, 20).ci95] == [0.8389, 1.0]


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_wilson_interval_holds_its_value(trials: int, share: float) -> None:
    estimate = statistics.proportion(round(share * trials), trials)
    assert 0 <= estimate.ci95[0] <= estimate.value <= estimate.ci95[1] <= 1


def test_mean_per_token_weighs_windows_by_their_tokens() -> None:
    estimate = statistics.mean_per_token([10.0, 1.0], [5, 1], seed=0)
    assert estimate.value == 11 / 6
    residuals = [10 - 5 * 11 / 6, 1 - 11 / 6]
    assert estimate.stderr == pytest.approx(math.sqrt(2 * sum(r * r for r in residuals)) / 6)


def test_interval_covers_the_truth_about_95_times_of_100() -> None:
    """200 texts of 40 windows whose windows differ; the truth is 2 nats per token."""
    random = np.random.default_rng(0)
    covered = {"bootstrap": 0, "normal": 0}
    for _ in range(200):
        counts = random.integers(20, 60, 40)
        totals = counts * random.normal(2.0, 0.3, 40)
        estimate = statistics.mean_per_token(totals.tolist(), counts.tolist(), seed=1)
        covered["bootstrap"] += estimate.ci95[0] <= 2.0 <= estimate.ci95[1]
        covered["normal"] += abs(estimate.value - 2.0) <= statistics.Z95 * estimate.stderr
    assert 180 <= covered["bootstrap"] <= 197 and 180 <= covered["normal"] <= 197


def test_intervals_repeat_for_a_seed_and_vary_with_it() -> None:
    totals, counts = [3.0, 1.0, 4.0, 1.0, 5.0], [2, 1, 3, 2, 2]
    first, again, other = (statistics.mean_per_token(totals, counts, seed=seed) for seed in (7, 7, 8))
    assert first == again and first.ci95 != other.ci95 and first.value == other.value
    alone = statistics.mean_per_token(totals[:1], counts[:1], seed=7)
    assert alone.stderr is None and alone.ci95 is None and alone.value == 1.5
    with pytest.raises(ValueError, match="each count at least 1"):
        statistics.mean_per_token([1.0], [0], seed=0)


def test_exponential_and_scaling_carry_the_ends() -> None:
    estimate = statistics.Estimate(2.0, 0.5, (1.0, 3.0))
    assert estimate.exponential() == statistics.Estimate(math.exp(2), 0.5 * math.exp(2), (math.e, math.exp(3)))
    assert estimate.scaled(2).json() == {"value": 4.0, "stderr": 1.0, "ci95": [2.0, 6.0]}


# ---- windows


def text_of(num_tokens: int, prefix: tuple[int, ...] = ()) -> TokenizedText:
    return TokenizedText(tuple(range(100, 100 + num_tokens)), prefix, num_tokens, "")


def guide(num_tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """Hugging Face's loop, restated: (begin, end, how many of the last tokens have labels)."""
    found, previous = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        found.append((begin, end, end - previous))
        previous = end
        if end == num_tokens:
            return found
    return found


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_windows_are_those_of_the_guide(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    text = text_of(num_tokens)
    model = SimpleNamespace(bos_token_id=None)
    found = windows(text, WindowOptions(length, stride, "none"), model)
    expected = []
    for begin, end, labelled in guide(num_tokens, length, stride):
        scored = end - begin - labelled
        scored += scored == 0  # a label shifts onto its predecessor, so a window's first token has none
        if scored < end - begin:
            expected.append(Window(text.token_ids[begin:end], scored))
    assert found == expected


@given(st.integers(1, 200), st.integers(2, 40), st.data())
def test_with_bos_before_every_window_each_token_is_scored_once(num: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    found = windows(text_of(num), WindowOptions(length, stride, "window"), SimpleNamespace(bos_token_id=7))
    assert [t for w in found for t in w.token_ids[w.scored :]] == list(range(100, 100 + num))
    assert all(w.token_ids[0] == 7 and w.scored >= 1 and len(w.token_ids) <= length for w in found)


def test_what_the_tokenizer_puts_first_is_context_only() -> None:
    found = windows(text_of(5, prefix=(1,)), WindowOptions(4, 4, "start"), SimpleNamespace(bos_token_id=1))
    assert found == [Window((1, 100, 101, 102), 1), Window((103, 104), 1)]
    assert windows(text_of(5, prefix=(1,)), WindowOptions(9, 4, "none"), None)[0].scored == 1


def test_options_and_texts_that_cannot_be_are_refused(tmp_path: Path, model_dir: Path) -> None:
    options = WindowOptions.checked(None, None, "start", max_model_len=100)
    assert options == WindowOptions(99, 49, "start")
    for arguments, words in (
        ((100, None, "start"), "window=100 must be from 2 to 99"),
        ((50, 51, "start"), "stride=51 must be from 1 to the window's 50"),
        ((50, 50, "both"), "bos='both' is not one of start, window, none"),
    ):
        with pytest.raises(ConfigError, match=words):
            WindowOptions.checked(*arguments, max_model_len=100)
    with pytest.raises(ConfigError, match="1 tokens; none has a predecessor"):
        windows(text_of(1), WindowOptions(9, 4, "none"), SimpleNamespace(bos_token_id=None))
    with pytest.raises(ConfigError, match="needs a bos_token_id"):
        windows(text_of(9), WindowOptions(9, 4, "window"), SimpleNamespace(bos_token_id=None))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, words in (("empty", "is empty"), ("latin", "is not UTF-8: byte 3"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            read_text(tmp_path / name)
    with pytest.raises(ConfigError, match="no tokenizer"):
        tokenize("x", None)


def test_a_limit_takes_a_beginning_whose_bytes_are_counted(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    whole, some = tokenize(TEXT, tokenizer), tokenize(TEXT, tokenizer, limit=20)
    assert some.token_ids == whole.token_ids[:20] and some.num_bytes == 20 and whole.num_bytes == len(TEXT)
    assert whole.prefix == some.prefix == (1,) and tokenize(TEXT, tokenizer, limit=10**6) == whole


# ---- perplexity


@pytest.mark.parametrize("options", [WindowOptions(100, 50, "start"), WindowOptions(33, 33, "window")])
def test_perplexity_is_the_plain_computation(options: WindowOptions, llm: LLM, oracle: Oracle) -> None:
    text = tokenize(TEXT, llm.engine.tokenizer)
    found = windows(text, options, llm.engine.model)
    nats = perplexity.window_nats(found, llm.score)
    report = perplexity.perplexity_report(text, options, found, nats, seed=0)
    plain = []
    for window in found:
        logits = oracle.logits(list(window.token_ids))[window.scored - 1 : -1]
        plain += plain_nats(logits, list(window.token_ids[window.scored :]))
    assert len(plain) == report["num_scored_tokens"] == len(TEXT)
    mean = math.fsum(plain) / len(plain)
    assert report["nats_per_token"]["value"] == pytest.approx(mean, rel=1e-6)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert report["bits_per_byte"]["value"] == pytest.approx(math.fsum(plain) / math.log(2) / len(TEXT), rel=1e-6)
    low, high = report["perplexity"]["ci95"]
    assert low < report["perplexity"]["value"] < high


@pytest.mark.parametrize(
    "changes", [{"max_num_batched_tokens": 16, "max_prefill_seqs": 1}, {"max_num_seqs": 2}, {"prefix_caching": False}]
)
def test_reports_do_not_depend_on_batches_and_chunks(changes: dict, llm: LLM, model_dir: Path) -> None:
    other = LLM(model_dir, warm_up=False, **{"max_num_batched_tokens": 64, **ENGINE, **changes})
    options = WindowOptions(100, 30, "start")
    text = tokenize(TEXT, llm.engine.tokenizer)
    found = windows(text, options, llm.engine.model)
    reports = [
        json.dumps(
            [
                perplexity.perplexity_report(text, options, found, perplexity.window_nats(found, each.score), seed=3),
                divergence.comparison_report(
                    text,
                    options,
                    found,
                    divergence.window_divergences(found, each.prompt_logits, each.prompt_logits),
                    seed=3,
                ),
            ]
        )
        for each in (llm, other)
    ]
    assert reports[0] == reports[1]
    assert json.loads(reports[0])[1]["kl"]["max"] == 0.0


# ---- divergence


def test_divergence_is_the_plain_computation() -> None:
    random = np.random.default_rng(1)
    a = random.normal(0, 3, (70, 50)).astype(np.float32)
    b = (a + random.normal(0, 0.5, a.shape)).astype(np.float32)
    b[::3] = a[::3]
    targets = random.integers(0, 50, 70).tolist()
    found = divergence.divergence(a, b, targets)
    for row in range(70):
        nats_a, nats_b = (plain_nats(np.repeat(x[row : row + 1], 50, 0), list(range(50))) for x in (a, b))
        kl = math.fsum(math.exp(-p) * (q - p) for p, q in zip(nats_a, nats_b, strict=True))
        assert found.kl[row] == pytest.approx(max(kl, 0), abs=1e-12)
        assert found.agrees[row] == (a[row].argmax() == b[row].argmax())
        assert found.logprob_a[row] == pytest.approx(-nats_a[targets[row]])
        assert found.logprob_b[row] == pytest.approx(-nats_b[targets[row]])
    assert (found.kl[::3] == 0).all() and 0 < found.agrees.mean() < 1


def test_divergence_names_what_it_cannot_take() -> None:
    fine = np.zeros((40, 8), np.float32)
    bad = fine.copy()
    bad[35, 2] = np.inf
    with pytest.raises(ValueError, match="second logits of row 35 are not finite"):
        divergence.divergence(fine, bad, [0] * 40)
    with pytest.raises(ValueError, match="must be of the same rows"):
        divergence.divergence(fine, fine[:, :4], [0] * 40)


def test_comparison_of_a_perturbed_model(llm: LLM) -> None:
    """B's logits are A's with noise of a known size: to second order, KL is half its variance under A."""
    random = np.random.default_rng(0)
    options = WindowOptions(100, 50, "start")
    text = tokenize(TEXT, llm.engine.tokenizer)
    found = windows(text, options, llm.engine.model)

    def noisy(ids: tuple[int, ...]) -> np.ndarray:
        logits = llm.prompt_logits(ids)
        return logits + random.normal(0, 0.1, logits.shape).astype(np.float32)

    rows = divergence.window_divergences(found, llm.prompt_logits, noisy)
    report = divergence.comparison_report(text, options, found, rows, seed=0)
    kl = report["kl"]
    squares = []
    for window in found:
        own = np.exp(divergence.log_softmax(llm.prompt_logits(window.token_ids)[window.scored - 1 : -1]))
        squares += (own**2).sum(axis=1).tolist()
    assert kl["value"] == pytest.approx(0.5 * 0.1**2 * (1 - np.mean(squares)), rel=0.1)
    assert kl["median"] < kl["p99"] <= kl["max"]
    assert report["num_scored_tokens"] == len(TEXT) == sum(len(each.kl) for each in rows)
    assert 0.5 < report["top1_agreement"]["value"] < 1
    nats = report["b"]["nats_per_token"]["value"] - report["a"]["nats_per_token"]["value"]
    assert report["nats_per_token_difference"]["value"] == pytest.approx(nats, abs=1e-12)
    own = perplexity.perplexity_report(text, options, found, perplexity.window_nats(found, llm.score), seed=0)
    assert report["a"]["perplexity"]["value"] == pytest.approx(own["perplexity"]["value"], rel=1e-6)


# ---- multiple choice

QUESTION = Question(0, {"id": "a"}, "The sky is", ("blue", "a large green cheese"), 0, " ")


def test_metrics_by_hand() -> None:
    assert choices.metrics(QUESTION, Answer((-4.0, -5.0), (False, False))) == {"acc": 1, "acc_norm": 0, "acc_bytes": 0}
    umlauts = replace(QUESTION, choices=("äöü", "abcd"))
    assert choices.metrics(umlauts, Answer((-3.3, -4.0), (False, False))) == {"acc": 1, "acc_norm": 0, "acc_bytes": 1}
    tie = replace(QUESTION, choices=("a", "b"))
    assert choices.metrics(tie, Answer((-1.0, -1.0), (True, False)))["acc"] == 1.0  # the first, as numpy's argmax


def test_mean_and_stderr_as_the_harness_computes_them() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    mean, stderr = statistics.mean_with_stderr(values)
    assert mean == 0.6 and stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert statistics.mean_with_stderr([1.0]) == (1.0, None)


class Merging:
    """A tokenizer that makes one token of " b" and one of each other character; BOS (1) comes first."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(c) for c in text.replace(" b", "\x02")]
        return [1, *ids] if add_special_tokens else ids


def test_pairs_are_cut_from_the_whole_and_spaces_move_over() -> None:
    model = SimpleNamespace(bos_token_id=1, eos_token_ids=(2,))
    encode = lambda context, continuation: choices.encode_pair(context, continuation, Merging(), model)
    assert encode("ab", " b") == ([1, 97, 98, 2], 3)
    assert encode("ab ", "b") == ([1, 97, 98, 2], 3)  # not [..., 32, 98]
    assert encode("", " b") == ([1, 2], 1)
    assert encode(" ", "b") == ([1, 2], 1)
    assert choices.encode_pair("", "a", Merging(), SimpleNamespace(bos_token_id=None, eos_token_ids=(9,))) == (
        [9, 97],
        1,
    )
    with pytest.raises(ConfigError, match="bos_token_id or eos_token_id"):
        choices.encode_pair("", "a", Merging(), SimpleNamespace(bos_token_id=None, eos_token_ids=()))


def task_file(path: Path) -> Path:
    lines = [
        {"query": "One plus one is", "choices": ["two", "three and a half"], "gold": 0},
        {"query": "Q:", "choices": ["x", "y", "z"], "gold": 2, "target_delimiter": ""},
        {"query": "", "choices": ["a b", "b a"], "gold": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return path


def test_answers_are_the_plain_computation(tmp_path: Path, llm: LLM, oracle: Oracle) -> None:
    questions, num_original = choices.read_questions(task_file(tmp_path / "t.jsonl"))
    assert num_original == 3
    answers = choices.answer_all(questions, llm.score, llm.engine.tokenizer, llm.engine.model, longest=127)
    for question, answer in zip(questions, answers, strict=True):
        for continuation, value, greedy in zip(
            question.continuations, answer.loglikelihoods, answer.is_greedy, strict=True
        ):
            context = [1, *map(ord, question.context)]  # the tokenizer's BOS, and a token for each character
            tokens = [*context, *map(ord, continuation)]
            logits = oracle.logits(tokens)[len(context) - 1 : -1]
            assert value == pytest.approx(-math.fsum(plain_nats(logits, tokens[len(context) :])), abs=1e-3)
            assert greedy == (logits.argmax(axis=1).tolist() == tokens[len(context) :])
    limited, of = choices.read_questions(tmp_path / "t.jsonl", limit=1)
    assert limited == questions[:1] and of == 3


def test_results_have_the_harness_layout_and_samples_come_back(tmp_path: Path) -> None:
    questions, _ = choices.read_questions(task_file(tmp_path / "t.jsonl"))
    answers = [
        Answer((-1.0, -9.0), (True, False)),
        Answer((-1.0, -2.0, -3.0), (False,) * 3),
        Answer((-5.0, -4.0), (False, True)),
    ]
    report = choices.results_document("t", questions, answers, num_original=7, config={"model": "jaxinfer"})
    row = report["results"]["t"]
    assert row["acc,none"] == pytest.approx(2 / 3)
    assert row["acc_stderr,none"] == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3))
    assert report["n-samples"] == {"t": {"original": 7, "effective": 3}} and report["n-shot"] == {"t": 0}
    assert {"results", "configs", "versions", "higher_is_better", "config", "group_subtasks"} <= set(report)
    assert row["name"] == row["alias"] == "t" and row["sample_len"] == 3
    logged = tmp_path / "samples.jsonl"
    logged.write_text(
        "\n".join(json.dumps(choices.sample_record(*pair)) for pair in zip(questions, answers, strict=True))
    )
    again, _ = choices.read_questions(logged)
    assert [(q.context, q.continuations, q.gold) for q in again] == [
        (q.context, q.continuations, q.gold) for q in questions
    ]
    assert json.loads(logged.read_text().splitlines()[0])["filtered_resps"] == [["-1.0", "True"], ["-9.0", "False"]]


LOGGED = {  # by lm-evaluation-harness 0.4.13 with --log_samples
    "doc_id": 0,
    "doc": {"query": "é ü", "choices": ["naïve café", "x = 1"], "gold": 0},
    "target": "0",
    "arguments": {
        "gen_args_0": {"arg_0": "é ü", "arg_1": " naïve café"},
        "gen_args_1": {"arg_0": "é ü", "arg_1": " x = 1"},
    },
    "resps": [[["-73.66743469238281", "False"]], [["-19.170656204223633", "False"]]],
    "filtered_resps": [["-73.66743469238281", "False"], ["-19.170656204223633", "False"]],
    "filter": "none",
    "metrics": ["acc", "acc_norm", "acc_bytes"],
    "doc_hash": "3a2d1c8d01c9e006d967ce9e1652e4e0e4241176c816d1754b7275a117b778fb",
    "prompt_hash": "2633dce95b1d3d34e2af8618a19c1835ffc4c6a38d491163979200376fe3916f",
    "target_hash": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9",
    "acc": 0.0,
    "acc_norm": 0.0,
    "acc_bytes": 0.0,
}


def test_a_sample_that_the_harness_logged_is_read_and_written_alike(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    answer = Answer((-73.66743469238281, -19.170656204223633), (False, False))
    for record in (LOGGED, LOGGED["doc"]):
        path.write_text(json.dumps(record))
        [question], _ = choices.read_questions(path)
        assert choices.sample_record(question, answer) == LOGGED


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "is not a JSON object"),
        ("{", "Expecting property name"),
        ('{"query": "a", "choices": ["b", "c"]}', "no field 'gold'"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "right answer 2 must be a number from 0 to 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "must be two texts at least"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "none of them empty"),
        ('{"query": 3, "choices": ["b", "c"], "gold": 0}', "must be text"),
        ('{"arguments": [["a", " b"], ["x", " c"]], "target": 0}', "2 contexts"),
        ('{"query": "a", "choices": "yes", "gold": 0}', "choices 'yes' must be a list of texts"),
        pytest.param("[" * 200_000, "recursion", id="deep"),
    ],
)
def test_bad_questions_are_refused_by_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n' + line)
    with pytest.raises(ConfigError, match=f"line 2: .*{words}"):
        choices.read_questions(path)


def test_only_line_feeds_end_a_question(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\u2029"  # which JSON texts may hold as they are
    line = json.dumps({"query": text, "choices": ["b", "c"], "gold": 0}, ensure_ascii=False)
    path = tmp_path / "t.jsonl"
    path.write_bytes(f"{line}\r\n\n{line}".encode())
    questions, num_original = choices.read_questions(path)
    assert [question.context for question in questions] == [text, text] and num_original == 2


def test_questions_that_do_not_fit_are_refused(llm: LLM) -> None:
    ask = lambda question: choices.answer_all([question], llm.score, llm.engine.tokenizer, llm.engine.model, longest=20)
    with pytest.raises(ConfigError, match=r"question 0 takes 3\d tokens; at most 20 fit"):
        ask(QUESTION)


# ---- agreement


def dump(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


def read(path: Path, model_dir: Path) -> list[agreement.Dump]:
    return list(agreement.read_dumps(path, load_config(model_dir), longest=50))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_agreement_measures_a_known_error(dtype: type, tmp_path: Path, model_dir: Path) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(0, 4, (6, 192)).astype(dtype)
    [found] = read(dump(tmp_path / "d", tokens=np.arange(6, dtype=np.int64), logits=logits), model_dir)
    ours = logits.astype(np.float32)
    assert found.token_ids == tuple(range(6)) and np.array_equal(found.logits, ours)
    same = agreement.agreement(found, lambda ids: ours)
    assert same["relative_error"] == 0 and same["kl"]["max"] == 0 and same["top1_agreement"] == 1
    moved = ours.copy()
    moved[4, 17] += 0.5
    other = agreement.agreement(found, lambda ids: moved)
    assert other["worst"]["position"] == 4 and other["worst"]["token_id"] == 17
    assert other["relative_error"] == pytest.approx(0.5 / np.abs(ours).max(), rel=1e-5)
    assert other["kl"]["max"] > 0


def test_a_narrower_file_is_compared_by_its_columns(tmp_path: Path, model_dir: Path) -> None:
    logits = np.random.default_rng(3).normal(size=(3, 150)).astype(np.float32)
    [found] = read(dump(tmp_path / "d", tokens=np.arange(3, dtype=np.int32), logits=logits), model_dir)
    ours = np.pad(logits, ((0, 0), (0, 42)), constant_values=9.0)
    report = agreement.agreement(found, lambda ids: ours)
    assert report["relative_error"] == 0 and report["num_columns"] == 150 and report["num_columns_ignored"] == 42


def test_several_prompts_come_in_order(tmp_path: Path, model_dir: Path) -> None:
    tensors = {}
    for i in range(11):  # .10 comes after .9
        tensors |= {f"tokens.{i}": np.full(i + 1, i, np.int32), f"logits.{i}": np.ones((i + 1, 192), np.float32)}
    assert [len(each.token_ids) for each in read(dump(tmp_path / "d", **tensors), model_dir)] == list(range(1, 12))


ONES = np.ones((3, 192), np.float32)
IDS = np.arange(3, dtype=np.int32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"tokens": IDS}, "holds tokens; it must hold `tokens` and `logits`"),
        ({"tokens.1": IDS, "logits.1": ONES}, "holds logits.1, tokens.1; it must"),
        ({"tokens": IDS.astype(np.float32), "logits": ONES}, "must be whole numbers"),
        ({"tokens": IDS[:2], "logits": ONES}, r"a row for each of tokens"),
        ({"tokens": IDS, "logits": ONES.astype(np.int32)}, "must be float32, float16 or bfloat16"),
        ({"tokens": IDS + 190, "logits": ONES}, "holds 190 to 192; the model's ids are 0 to 191"),
        ({"tokens": IDS, "logits": np.ones((3, 193), np.float32)}, "193 columns, over the model's vocabulary of 192"),
        ({"tokens": IDS, "logits": ONES * np.nan}, "not finite in row 0"),
        ({"tokens": IDS, "logits": ONES * 0}, "zero everywhere"),
        ({"tokens": np.zeros(51, np.int32), "logits": np.ones((51, 192), np.float32)}, "51 tokens; at most 50 fit"),
    ],
)
def test_bad_dumps_are_refused(tensors: dict, words: str, tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read(dump(tmp_path / "d", **tensors), model_dir)


def test_a_file_that_is_none_is_refused(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "d").write_text("not a header")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        read(tmp_path / "d", model_dir)


def test_the_ascii_tokenizer_is_what_these_tests_think() -> None:
    assert ascii_tokenizer().encode("az").ids == [1, 97, 122]
