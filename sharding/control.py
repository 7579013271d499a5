"""What hosts say to each other: length-prefixed frames of a kind, a small header and raw little-endian int32 buffers.

Every limit is checked before memory is taken for what it limits; nothing a peer sends is ever executed or unpickled.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FRAME = struct.Struct("<B3xI")  # kind, bytes of the body
MAX_READER_BYTES = 32
CALL = struct.Struct(f"<IIIB3x{MAX_READER_BYTES}s")  # num_slots, prefill_tokens, call, number of buffers, reader
BUFFER = struct.Struct("<B3x4I")  # number of dimensions, dimensions (unused ones are 0)
LOSS = struct.Struct("<IH")  # host id, bytes of its address; then the address, then the reason
MAX_CALL_BYTES = 1 << 28
MAX_BUFFERS = 16
MAX_DIMS = 4
MAX_TEXT_BYTES = 2048
MAX_ADDRESS_BYTES = 512
MAX_FACTS_BYTES = 1 << 16


class ProtocolError(ValueError):
    """Bytes that are no frame of ours."""


class HostLostError(RuntimeError):
    """A host of the group is gone, and with it the group. `host` is how to call it: "host 1 of 4"."""

    def __init__(self, host_id: int, num_hosts: int, address: str, reason: str):
        self.host_id = host_id
        self.host = f"host {host_id} of {num_hosts}"
        self.reason = reason
        super().__init__(f"{self.host} ({address}) was lost: {reason}")


class Kind(enum.IntEnum):
    """Of a frame."""

    CHALLENGE = 1  # host 0 to whoever connects: a nonce
    HELLO = 2  # the answer: who it is, and that it has the token
    WELCOME = 3  # all are there
    REFUSED = 4  # the text says why
    BEAT = 5  # a sign of life
    AGREE = 6  # JSON of what must be the same everywhere, and host 0's verdict
    LOST = 7  # a host is gone: which, where, why
    LEAVE = 8  # a follower was asked to stop; the text says by what
    CALL = 9  # a device call
    RESET = 10  # a device call failed: allocate the device state anew
    STOP = 11  # the orderly end
    PREPARE = 12  # compile the program of a call that will come


FROM_FOLLOWER: Mapping[Kind, int] = {
    Kind.BEAT: 0,
    Kind.AGREE: MAX_FACTS_BYTES,
    Kind.LOST: MAX_TEXT_BYTES,
    Kind.LEAVE: MAX_TEXT_BYTES,
}
FROM_LEADER: Mapping[Kind, int] = {
    Kind.BEAT: 0,
    Kind.AGREE: MAX_TEXT_BYTES,
    Kind.LOST: MAX_TEXT_BYTES,
    Kind.CALL: MAX_CALL_BYTES,
    Kind.RESET: 0,
    Kind.STOP: 0,
    Kind.PREPARE: CALL.size,
}


def frame(kind: Kind, *parts: Any) -> list[Any]:
    """The header and the parts of a body, bytes-like, to be sent one after the other."""
    return [FRAME.pack(kind, sum(memoryview(part).nbytes for part in parts)), *parts]


class FrameReader:
    """Bytes in as they come, whole frames out. `limits`: the kinds that may come, and the most bytes of each."""

    def __init__(self, limits: Mapping[Kind, int]):
        self._limits = limits
        self._header = bytearray(FRAME.size)
        self._kind: Kind | None = None  # of the body that is being read
        self._into = memoryview(self._header)
        self._filled = 0

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._into[self._filled :]

    def advance(self, num_bytes: int) -> tuple[Kind, memoryview] | None:
        """`num_bytes` were written to `room()`; the frame, if that was the last of it. Raises ProtocolError."""
        self._filled += num_bytes
        if self._filled < len(self._into):
            return None
        if self._kind is None:
            number, size = FRAME.unpack(self._header)
            if number not in self._limits or self._header[1:4] != b"\0\0\0":
                raise ProtocolError(f"a frame of kind {number}, which is not one that may come here")
            kind = Kind(number)
            if size > self._limits[kind]:
                raise ProtocolError(f"a {kind.name} frame of {size:,} bytes; the limit is {self._limits[kind]:,}")
            if size:
                self._kind, self._into, self._filled = kind, memoryview(bytearray(size)), 0
                return None
            self._filled = 0
            return kind, memoryview(b"")
        done = (self._kind, self._into)
        self._kind, self._into, self._filled = None, memoryview(self._header), 0
        return done


@dataclass(frozen=True, eq=False)
class Message:
    """What host 0 tells the others to do: a device call (its program and host buffers), PREPARE, RESET, or STOP."""

    kind: Kind
    num_slots: int = 0
    prefill_tokens: int = 0
    reader: str = ""
    call: int = 0  # the step's number; a reader's is that of the step whose rows it reads
    buffers: tuple[np.ndarray, ...] = ()  # i32, of any shape

    def encode(self) -> list[Any]:
        """The frame's parts, bytes-like; buffers are not copied. ValueError for what no frame can hold."""
        if self.kind in (Kind.RESET, Kind.STOP):
            return frame(self.kind)
        if self.kind not in (Kind.CALL, Kind.PREPARE):
            raise ValueError(f"a message's kind must be CALL, PREPARE, RESET or STOP, not {self.kind!r}")
        if self.kind is Kind.PREPARE and self.buffers:
            raise ValueError(f"PREPARE with {len(self.buffers)} buffers; it has none")
        reader = self.reader.encode()
        if len(reader) > MAX_READER_BYTES or b"\0" in reader:
            raise ValueError(f"reader {self.reader!r} is over {MAX_READER_BYTES} bytes")
        if len(self.buffers) > MAX_BUFFERS:
            raise ValueError(f"{len(self.buffers)} buffers are over {MAX_BUFFERS}")
        head = CALL.pack(self.num_slots, self.prefill_tokens, self.call, len(self.buffers), reader)
        for buffer in self.buffers:
            if buffer.dtype != np.int32 or buffer.ndim > MAX_DIMS or not buffer.size:
                raise ValueError(
                    f"a buffer {buffer.dtype}{list(buffer.shape)} must be i32, not empty, of 4 dims at most"
                )
            head += BUFFER.pack(buffer.ndim, *buffer.shape, *(0,) * (MAX_DIMS - buffer.ndim))
        num_bytes = len(head) + sum(buffer.nbytes for buffer in self.buffers)
        if num_bytes > MAX_CALL_BYTES:
            raise ValueError(
                f"a call's buffers of {num_bytes:,} bytes are over the limit of {MAX_CALL_BYTES:,}; a smaller "
                "max_model_len or max_prefill_seqs makes them smaller"
            )
        little = [np.asarray(buffer, "<i4", order="C").reshape(-1) for buffer in self.buffers]
        return frame(self.kind, head, *(memoryview(array).cast("B") for array in little))

    @classmethod
    def decode(cls, kind: Kind, body: memoryview) -> Message:
        """The message of a frame; buffers are views of `body`. Raises ProtocolError."""
        if kind in (Kind.RESET, Kind.STOP) and not body:
            return cls(kind)
        if kind not in (Kind.CALL, Kind.PREPARE) or len(body) < CALL.size:
            raise ProtocolError(f"{len(body)} bytes of kind {kind.name} are no message")
        num_slots, prefill_tokens, call, num_buffers, reader = CALL.unpack_from(body)
        at = CALL.size + num_buffers * BUFFER.size
        if num_buffers > MAX_BUFFERS or at > len(body):
            raise ProtocolError(f"{num_buffers} buffers in {len(body)} bytes")
        buffers = []
        for index in range(num_buffers):
            ndim, *dims = BUFFER.unpack_from(body, CALL.size + index * BUFFER.size)
            shape = dims[:ndim]
            size = math.prod(shape)  # of whole numbers without a limit
            if ndim > MAX_DIMS or any(dims[ndim:]) or not 0 < size <= (len(body) - at) // 4:
                raise ProtocolError(f"a buffer of {ndim} dims {dims} in {len(body) - at} bytes")
            buffers.append(np.frombuffer(body, "<i4", size, at).astype(np.int32, copy=False).reshape(shape))
            at += 4 * size
        if at != len(body):
            raise ProtocolError(f"{len(body) - at} bytes more than the buffers have")
        return cls(kind, num_slots, prefill_tokens, decode_text(reader.rstrip(b"\0")), call, tuple(buffers))


def encode_loss(host_id: int, address: str, reason: str) -> bytes:
    """Body of a LOST frame."""
    where = clip(address, MAX_ADDRESS_BYTES)
    return LOSS.pack(host_id, len(where)) + where + clip(reason, MAX_TEXT_BYTES - LOSS.size - len(where))


def decode_loss(body: memoryview) -> tuple[int, str, str]:
    """(host id, address, reason) of a LOST frame. Raises ProtocolError."""
    if len(body) < LOSS.size:
        raise ProtocolError("a LOST frame that names no host")
    host_id, size = LOSS.unpack_from(body)
    return host_id, decode_text(body[LOSS.size :][:size]), decode_text(body[LOSS.size :][size:])


def clip(text: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """UTF-8 of at most `limit` bytes, cut between characters."""
    return text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore").encode()


def decode_text(raw: bytes | memoryview) -> str:
    """The text of a body. Raises ProtocolError."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("a text that is not UTF-8") from None
