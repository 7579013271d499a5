"""Frames and messages: what is sent comes back, and no bytes whatever crash the reader or make it take much memory."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sharding import control
from sharding.control import FROM_FOLLOWER, FROM_LEADER, FrameReader, Kind, Message, ProtocolError

buffers = st.lists(
    arrays.arrays(np.int32, arrays.array_shapes(min_dims=0, max_dims=4, max_side=5)), max_size=control.MAX_BUFFERS
)
calls = st.builds(
    Message,
    st.just(Kind.CALL),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
    st.integers(0, 2**32 - 1),
    buffers.map(tuple),
)

others = st.sampled_from([Message(Kind.RESET), Message(Kind.STOP), Message(Kind.PREPARE, 4, 64, "scores")])


def fed(reader: FrameReader, raw: bytes, chunks: list[int]) -> list[tuple[Kind, bytes]]:
    """The frames of `raw`, given to the reader in pieces of at most these sizes, over and over."""
    frames, at, turn = [], 0, 0
    while at < len(raw):
        room = reader.room()
        assert len(room)
        count = min(len(room), len(raw) - at, chunks[turn % len(chunks)])
        room[:count] = raw[at : at + count]
        at, turn = at + count, turn + 1
        done = reader.advance(count)
        if done is not None:
            frames.append((done[0], bytes(done[1])))
    return frames


def same(a: Message, b: Message) -> bool:
    heads = [(m.kind, m.num_slots, m.prefill_tokens, m.reader, m.call, [x.shape for x in m.buffers]) for m in (a, b)]
    return heads[0] == heads[1] and all(map(np.array_equal, a.buffers, b.buffers))


@given(messages=st.lists(calls | others, max_size=4), data=st.data())
def test_messages_survive_the_wire(messages: list[Message], data: st.DataObject) -> None:
    chunks = data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=5))
    raw = b"".join(bytes(part) for message in messages for part in message.encode())
    frames = fed(FrameReader(FROM_LEADER), raw, chunks)
    received = [Message.decode(kind, memoryview(body)) for kind, body in frames]
    assert len(received) == len(messages) and all(map(same, messages, received))
    assert all(buffer.dtype == np.int32 for message in received for buffer in message.buffers)


@given(raw=st.binary(max_size=200), limits=st.sampled_from([FROM_FOLLOWER, FROM_LEADER]))
def test_any_bytes_are_frames_or_a_protocol_error(raw: bytes, limits: dict[Kind, int]) -> None:
    try:
        frames = fed(FrameReader(limits), raw, [7, 1, 50])
    except ProtocolError:
        return
    assert all(kind in limits and len(body) <= limits[kind] for kind, body in frames)


@given(body=st.binary(max_size=300), kind=st.sampled_from(list(Kind)))
def test_any_body_is_a_message_or_a_protocol_error(body: bytes, kind: Kind) -> None:
    try:
        message = Message.decode(kind, memoryview(body))
    except ProtocolError:
        return
    assert sum(buffer.nbytes for buffer in message.buffers) <= len(body)


@given(message=calls, data=st.data())
def test_a_changed_body_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    """Closer to the real thing than random bytes: one byte of a true call differs, or its end is missing."""
    body = bytearray(b"".join(bytes(part) for part in message.encode()[1:]))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    try:
        found = Message.decode(Kind.CALL, memoryview(body))
    except ProtocolError:
        return
    assert sum(buffer.nbytes for buffer in found.buffers) <= len(body)


def test_limits_come_before_memory() -> None:
    """The largest sizes that headers can claim are refused, or cost nothing until their bytes come."""
    huge = struct.pack("<IIIB3x32s", 1, 1, 1, 1, b"") + struct.pack("<B3x4I", 4, *[2**32 - 1] * 4) + b"\0" * 64
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="a buffer of 4 dims"):
        Message.decode(Kind.CALL, memoryview(huge))
    for kind, limit in [*FROM_FOLLOWER.items(), *FROM_LEADER.items()]:
        limits = FROM_FOLLOWER if FROM_FOLLOWER.get(kind) == limit else FROM_LEADER
        with pytest.raises(ProtocolError, match=f"the limit is {limit:,}"):
            fed(FrameReader(limits), struct.pack("<B3xI", kind, limit + 1), [8])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [Kind.CALL, Kind.RESET, Kind.STOP, Kind.HELLO, 0, 200])
def test_a_follower_may_not_say_everything(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"a frame of kind {int(kind)}, "):
        fed(FrameReader(FROM_FOLLOWER), struct.pack("<B3xI", kind, 0), [8])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Message(Kind.BEAT), "kind must be CALL, PREPARE, RESET or STOP"),
        (Message(Kind.PREPARE, buffers=(np.zeros(1, np.int32),)), "PREPARE with 1 buffers; it has none"),
        (Message(Kind.CALL, buffers=(np.zeros(3, np.float32),)), r"float32\[3\] must be i32"),
        (Message(Kind.CALL, buffers=(np.zeros((3, 0), np.int32),)), r"int32\[3, 0\] must be i32, not empty"),
        (Message(Kind.CALL, buffers=(np.zeros(1, np.int32),) * 17), "17 buffers are over 16"),
        (Message(Kind.CALL, reader="x" * 33), "is over 32 bytes"),
        (Message(Kind.CALL, buffers=(np.broadcast_to(np.int32(1), (1 << 26,)),)), "over the limit of 268,435,456"),
    ],
)
def test_what_no_frame_holds_is_refused(message: Message, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        message.encode()


def test_losses_and_long_texts() -> None:
    assert control.decode_loss(memoryview(control.encode_loss(3, "node, ip", "why"))) == (3, "node, ip", "why")
    body = control.encode_loss(3, "ü" * 5000, "é" * 5000)
    assert len(body) <= control.MAX_TEXT_BYTES
    host_id, address, reason = control.decode_loss(memoryview(body))
    assert host_id == 3 and set(address) == {"ü"} and set(reason) == {"é"}
    with pytest.raises(ProtocolError):
        control.decode_loss(memoryview(b"\0"))
    with pytest.raises(ProtocolError, match="not UTF-8"):
        control.decode_text(b"\xff")
