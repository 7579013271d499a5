"""Errors on the wire: from an exception to a gRPC status with google.rpc details, and back to a typed exception.

Hides the detail messages and the limits of gRPC metadata. Imports no jax, so that clients stay light.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import uuid
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from jaxinfer.conversation import Conversation
from jaxinfer.request import EngineDeadError, QueueFullError, RequestError, SamplingParams
from sharding.control import HostLostError

log = logging.getLogger(__name__)

DOMAIN = "jaxinfer"
MAX_MESSAGE_BYTES = 512  # status travels in HTTP/2 headers, twice and escaped; peers refuse more than 8 KiB of them
_SAMPLING_FIELDS = {spec.name for spec in dataclasses.fields(SamplingParams)}
_CHAT_FIELDS = {spec.name for spec in dataclasses.fields(Conversation)}
RETRY_CALLS_S = 1.0
TOO_LARGE = "MESSAGE_TOO_LARGE"
PUSHBACK_KEY = "grpc-retry-pushback-ms"


# ---- what the server raises beyond jaxinfer.request's errors ----


class ModelNotFoundError(LookupError):
    """The request names a model that is not the served one."""

    def __init__(self, model: str, served: str):
        super().__init__(f"model {model!r} is not served here; the served model is {served!r}")
        self.model = model


class DuplicateRequestError(ValueError):
    """A running request has this request_id: a second one would make `Abort` ambiguous."""

    def __init__(self, request_id: str):
        super().__init__(f"request_id {request_id!r} names a request that is still running; use another, or none")


class CompletionFailedError(RuntimeError):
    """Every completion of a request failed; the message is the first one's error."""


class TooManyCallsError(RuntimeError):
    """The connection has as many open calls as one may have."""

    def __init__(self, limit: int):
        super().__init__(f"this connection has {limit} open calls, the limit; retry when one has ended")
        self.retry_after_s = RETRY_CALLS_S


class AnswerTooLargeError(ValueError):
    """The answer does not, or could not, fit into a message."""

    def __init__(self, num_bytes: int, limit: int):
        super().__init__(
            f"the answer, of {num_bytes} bytes or more, would be over the limit of {limit} per message; use "
            "GenerateStream, ask for less, or raise the server's --max-message-bytes"
        )


class RequestTimeoutError(TimeoutError):
    """The server's own time limit, for calls that bring no deadline."""

    def __init__(self, timeout_s: float):
        super().__init__(f"the server's limit of {timeout_s:g} s has passed; a call with a deadline has its own")


# ---- exception -> status ----


def status_of(error: Exception) -> tuple[status_pb2.Status, float | None]:
    """The rich status that answers `error`, and after how many seconds a retry makes sense (None: not at all)."""
    retry_after_s: float | None = None
    details: list[Message] = []
    text = str(error)
    if isinstance(error, RequestError):
        code = code_pb2.INVALID_ARGUMENT
        path = field_path(error.field_name)
        violation = error_details_pb2.BadRequest.FieldViolation(field=path, description=_clip(text))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, (QueueFullError, TooManyCallsError)):
        code, retry_after_s = code_pb2.RESOURCE_EXHAUSTED, error.retry_after_s
    elif isinstance(error, AnswerTooLargeError):
        code = code_pb2.RESOURCE_EXHAUSTED
        details.append(error_details_pb2.ErrorInfo(reason=TOO_LARGE, domain=DOMAIN))
    elif isinstance(error, ModelNotFoundError):
        code = code_pb2.NOT_FOUND
        details.append(error_details_pb2.ResourceInfo(resource_type="model", resource_name=_clip(error.model)))
    elif isinstance(error, DuplicateRequestError):
        code = code_pb2.ALREADY_EXISTS
    elif isinstance(error, TimeoutError):
        code = code_pb2.DEADLINE_EXCEEDED
    elif hasattr(error, "retry_after_s"):  # NotReadyError: loading or draining
        code, retry_after_s = code_pb2.UNAVAILABLE, error.retry_after_s
    elif isinstance(error, HostLostError):  # without its address, and for good: this server ends
        code, text = code_pb2.UNAVAILABLE, f"{error.host} of this server was lost, and the server ends"
        details.append(error_details_pb2.ErrorInfo(reason="HOST_LOST", domain=DOMAIN))
    elif isinstance(error, (EngineDeadError, CompletionFailedError)):
        code = code_pb2.INTERNAL
        reason = "ENGINE_DEAD" if isinstance(error, EngineDeadError) else "COMPLETION_FAILED"
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    else:  # not foreseen: the log has the traceback, the caller gets a number to ask about
        code = code_pb2.INTERNAL
        incident = uuid.uuid4().hex[:12]
        log.error("incident %s", incident, exc_info=error)
        text = f"internal error; the server's log has it as incident {incident}"
        details.append(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"incident": incident}))
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(retry)
    status = status_pb2.Status(code=code, message=_clip(text))
    for detail in details:
        status.details.add().Pack(detail)
    return status, retry_after_s


def field_path(field_name: str) -> str:
    """Where the field of a RequestError lies in a GenerateRequest: `top_p` is `sampling.top_p`."""
    if field_name == "prompt_token_ids":
        return "token_ids"
    first = re.split(r"[\[.]", field_name, maxsplit=1)[0]
    group = "sampling." if first in _SAMPLING_FIELDS else "chat." if first in _CHAT_FIELDS else ""
    return group + field_name


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End the call with the status of `error`."""
    status, retry_after_s = status_of(error)
    answer = rpc_status.to_status(status)
    trailers = tuple(answer.trailing_metadata)
    if retry_after_s is not None:
        trailers += ((PUSHBACK_KEY, str(round(retry_after_s * 1000))),)
    await context.abort(answer.code, answer.details, trailers)
    raise AssertionError("context.abort raises")


def _clip(text: str) -> str:
    """At most MAX_MESSAGE_BYTES of UTF-8, cut between characters."""
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= MAX_MESSAGE_BYTES else raw[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."


# ---- status -> exception, for clients ----


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that the server refused."""

    field: str
    description: str


@dataclass(eq=False)
class InferenceError(Exception):
    """A call that did not succeed. `retry_after_s` is set when the server says that a retry makes sense, and when."""

    message: str
    code: grpc.StatusCode
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    reason: str = ""  # of ErrorInfo

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class InvalidRequestError(InferenceError):
    """The request cannot be honoured; `violations` name the fields."""


class BusyError(InferenceError):
    """The server's queue is full, or this connection has too many open calls."""


class MessageTooLargeError(InferenceError):
    """The request or its answer is over the limit of a message; a retry would not help."""


class UnavailableError(InferenceError):
    """No server there, or it is loading, draining or gone."""


class NotFoundError(InferenceError):
    """The server does not serve the model that was asked for."""


class AlreadyExistsError(InferenceError):
    """The request_id is in use by a running request."""


class DeadlineError(InferenceError):
    """The call's deadline, or the server's own limit, passed."""


class RequestCancelledError(InferenceError):
    """The call was cancelled."""


class InternalError(InferenceError):
    """The server failed; `reason` says which way."""


_EXCEPTIONS: dict[grpc.StatusCode, type[InferenceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BusyError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.INTERNAL: InternalError,
}


def exception_of(error: Any) -> InferenceError:
    """The typed exception for a failed call, sync or aio, with what its google.rpc details say."""
    code: grpc.StatusCode = error.code()
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    reason = ""
    for detail in _details(error):
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after_s = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds() / 1000
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
    kind = _EXCEPTIONS.get(code, InferenceError)
    message: str = error.details() or ""
    # gRPC's own refusals, on either side, have no details
    if kind is BusyError and (reason == TOO_LARGE or "message larger than max" in message):
        kind = MessageTooLargeError
    return kind(message, code, tuple(violations), retry_after_s, reason)


def refusal_of(error: RequestError) -> InvalidRequestError:
    """What a client raises for a request that it cannot send: the same as for one that the server refuses."""
    violation = FieldViolation(field_path(error.field_name), str(error))
    return InvalidRequestError(str(error), grpc.StatusCode.INVALID_ARGUMENT, (violation,))


def _details(error: Any) -> list:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return list(status_pb2.Status.FromString(value).details)
    return []
