"""The proto and its generated stubs, the way between messages and our types, and errors as statuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.request import (
    EngineDeadError,
    FinishReason,
    Priority,
    PromptLogprob,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from serving import errors, wire
from serving.async_engine import NotReadyError, State
from serving.protos.jaxinfer.v1 import inference_pb2 as pb

REPOSITORY = Path(__file__).parents[2]
IDS = st.integers(0, 2**32 - 1)


def _generator():
    spec = importlib.util.spec_from_file_location("generate_protos", REPOSITORY / "scripts" / "generate_protos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_stubs_are_what_the_protos_give(tmp_path):
    assert _generator().stale(tmp_path) == []


def test_a_stale_stub_is_found(tmp_path, monkeypatch):
    generator = _generator()
    stub = generator.generate(tmp_path / "fresh")[0]
    changed = tmp_path / "repository" / stub
    changed.parent.mkdir(parents=True)
    changed.write_bytes((tmp_path / "fresh" / stub).read_bytes() + b"\n")
    monkeypatch.setattr(generator, "generate", lambda out: [stub])
    monkeypatch.setattr(generator, "REPOSITORY", tmp_path / "repository")
    assert generator.stale(tmp_path / "fresh") == [stub]


def test_every_sampling_field_is_on_the_wire_and_knows_whether_it_is_set():
    descriptor = pb.SamplingParams.DESCRIPTOR
    ours = {spec.name for spec in dataclasses.fields(SamplingParams)}
    assert set(descriptor.fields_by_name) == ours | {"no_max_tokens"}
    for spec in descriptor.fields:
        if not spec.is_repeated:
            assert spec.has_presence, f"{spec.name} must be optional"
            assert spec.type != FieldDescriptor.TYPE_FLOAT, f"{spec.name} would not come through unrounded"


def test_an_empty_message_is_the_default():
    assert wire.sampling_from_proto(pb.SamplingParams()) == SamplingParams()


@st.composite
def _sampling(draw) -> SamplingParams:
    optional = lambda strategy: st.none() | strategy
    max_tokens = draw(optional(st.integers(1, 2**31 - 1)))
    logprobs = draw(st.booleans())
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens or 2**31 - 1)),
        temperature=draw(st.floats(0, 100)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0.01, 100)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=draw(st.dictionaries(IDS, st.floats(-100, 100), max_size=5)),
        allowed_token_ids=draw(optional(st.lists(IDS, max_size=5).map(tuple))),
        seed=draw(optional(st.integers(0, 2**63 - 1))),
        n=draw(st.integers(1, 64)),
        stop=draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), max_size=4).map(tuple)),
        stop_token_ids=draw(st.lists(IDS, max_size=5).map(tuple)),
        include_stop_in_output=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
        logprobs=logprobs,
        top_logprobs=draw(st.integers(0, 20)) if logprobs else 0,
        prompt_logprobs=draw(optional(st.integers(0, 20))),
        skip_special_tokens=draw(st.booleans()),
    )


@given(_sampling())
def test_sampling_settings_come_through_exactly(sampling):
    raw = wire.sampling_to_proto(sampling).SerializeToString()
    assert wire.sampling_from_proto(pb.SamplingParams.FromString(raw)) == sampling


@given(st.binary(max_size=200))
def test_no_bytes_break_the_way_in(raw):
    """What parses as a message either becomes settings or is refused with a field's name."""
    try:
        message = pb.GenerateRequest.FromString(raw)
    except Exception as error:
        assert type(error).__name__ == "DecodeError"
        return
    try:
        wire.sampling_from_proto(message.sampling)
        wire.priority_from_proto(message)
        wire.check_names(message)
    except RequestError as error:
        assert error.field_name


@pytest.mark.parametrize(
    ("sampling", "num_bytes"),
    [
        (SamplingParams(max_tokens=50), 50),
        (SamplingParams(max_tokens=10**9, n=3), 3 * 97),  # the model's length leaves 97
        (SamplingParams(max_tokens=50, n=2, logprobs=True, top_logprobs=5), 2 * 50 * (1 + 11 + 5 * 13)),
        (SamplingParams(max_tokens=None, n=64), 0),
        (SamplingParams(max_tokens=None, n=64, prompt_logprobs=0), 2 * 13),  # of three prompt tokens
        (SamplingParams(max_tokens=50, prompt_logprobs=5), 50 + 2 * (13 + 5 * 13)),
    ],
)
def test_the_least_size_of_an_answer_is_known_beforehand(sampling, num_bytes):
    assert wire.min_answer_bytes(Request("", (1, 2, 3), sampling), max_model_len=100) == num_bytes
    if sampling.max_tokens == 50:
        tokens = [TokenLogprobs(-1.0, ((1, -1.0),) * sampling.top_logprobs)] * 50 if sampling.logprobs else []
        one = pb.Completion(token_ids=[1] * 50, logprobs=wire.logprobs_to_proto(tokens))
        prompt = (None, *[PromptLogprob(-1.0, 1, ((1, -1.0),) * (sampling.prompt_logprobs or 0))] * 2)
        asked = None if sampling.prompt_logprobs is None else wire.prompt_logprobs_to_proto(prompt)
        answer = pb.GenerateResponse(completions=[one] * sampling.n, prompt_logprobs=asked)
        assert num_bytes <= answer.ByteSize() <= 1.3 * num_bytes


def test_priorities_and_finish_reasons_have_numbers():
    for priority in Priority:
        assert wire.priority_from_proto(pb.GenerateRequest(priority=wire.priority_to_proto(priority))) is priority
    for reason in (None, *FinishReason):
        assert wire.finish_from_proto(wire.finish_to_proto(reason)) is reason
    assert wire.finish_from_proto(99) is FinishReason.ERROR


@pytest.mark.parametrize("kind", [pb.GenerateResponse, pb.GenerateStreamResponse])
@pytest.mark.parametrize(
    "logprobs", [None, (None,), (None, PromptLogprob(-0.25, 3, ((4, -0.125), (5, -0.5))), PromptLogprob(-1.0, 1))]
)
def test_prompt_logprobs_come_through(kind, logprobs):
    raw = kind(prompt_logprobs=wire.prompt_logprobs_to_proto(logprobs)).SerializeToString()
    assert wire.prompt_logprobs_from_proto(kind.FromString(raw)) == logprobs


def test_logprobs_come_through():
    logprobs = (TokenLogprobs(-0.25, ((4, -0.25), (5, -2.0))), TokenLogprobs(-1.0))
    assert wire.logprobs_from_proto(wire.logprobs_to_proto(logprobs)) == logprobs
    assert wire.logprobs_from_proto(wire.logprobs_to_proto(None)) is None


def test_the_tally_counts_every_completion_once():
    tally = wire.Tally(2)
    options = {"num_prompt_tokens": 5, "num_cached_tokens": 3}
    for index, generated, reason in ((0, 1, None), (1, 2, FinishReason.STOP), (0, 4, FinishReason.ERROR)):
        event = TokenEvent("r", index, (1,), "", finish_reason=reason, num_generated_tokens=generated, **options)
        assert not tally.finished
        tally.count(event)
    assert tally.finished and tally.failure is None
    assert tally.usage() == pb.Usage(prompt_tokens=5, completion_tokens=6, total_tokens=11, cached_tokens=3)


class _Call(grpc.RpcError):
    """A failed call as a client sees it."""

    def __init__(self, status):
        answer = rpc_status.to_status(status)
        self.code, self.details = lambda: answer.code, lambda: answer.details
        self.trailing_metadata = lambda: answer.trailing_metadata


@pytest.mark.parametrize(
    ("error", "kind", "retry_after_s"),
    [
        (RequestError("top_p", "bad"), errors.InvalidRequestError, None),
        (QueueFullError(4, 1.5), errors.BusyError, 1.5),
        (NotReadyError(State.LOADING), errors.UnavailableError, 2.0),
        (errors.ModelNotFoundError("a", "b"), errors.NotFoundError, None),
        (errors.DuplicateRequestError("a"), errors.AlreadyExistsError, None),
        (errors.RequestTimeoutError(3.0), errors.DeadlineError, None),
        (EngineDeadError("gone"), errors.InternalError, None),
        (errors.CompletionFailedError("NaN"), errors.InternalError, None),
        (ZeroDivisionError("secret"), errors.InternalError, None),
    ],
)
def test_errors_come_through_as_their_kind(error, kind, retry_after_s):
    status, server_retry_s = errors.status_of(error)
    seen = errors.exception_of(_Call(status))
    assert type(seen) is kind
    assert seen.retry_after_s == server_retry_s == retry_after_s
    assert "secret" not in str(seen)
    assert str(seen).startswith(seen.code.name)


def test_field_paths_lead_into_the_request():
    assert errors.field_path("top_p") == "sampling.top_p"
    assert errors.field_path("logit_bias[7]") == "sampling.logit_bias[7]"
    assert errors.field_path("prompt_token_ids") == "token_ids"
    assert errors.field_path("request_id") == "request_id"


@given(st.text(st.characters(codec="utf-8"), max_size=3000))
def test_status_messages_fit_into_headers(text):
    status, _ = errors.status_of(RequestError("stop", text))
    assert len(status.message.encode()) <= errors.MAX_MESSAGE_BYTES
    assert status.ByteSize() <= 3 * errors.MAX_MESSAGE_BYTES


def test_the_client_and_the_help_need_no_jax():
    code = "import sys, serving.client, serving.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0
