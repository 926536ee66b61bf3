"""Frames that are as they should be: round trips, sizes, what is left out, what is not copied."""

from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol import codec, messages
from swarm.protocol.errors import ErrorCode, UsageError
from swarm.protocol.messages import Message
from swarm.protocol.tensors import ITEM_BYTES, DType, Encoding, WireTensor


@st.composite
def tensors(draw: st.DrawFn) -> WireTensor:
    dtype = draw(st.sampled_from(DType))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=3, max_size=3)))
    size_bytes = shape[0] * shape[1] * shape[2] * ITEM_BYTES[dtype]
    data = draw(st.one_of(st.just(bytes(size_bytes)), st.binary(min_size=size_bytes)))
    return WireTensor(dtype, shape, data[:size_bytes], draw(st.sampled_from(Encoding)))


def values(spec: messages.Spec) -> st.SearchStrategy[Any]:
    """All values that a field may have."""
    match spec:
        case messages.Uint(maximum):
            return st.one_of(st.integers(0, maximum), st.sampled_from([0, maximum]))
        case messages.Real(least, most):
            return st.floats(least, most)
        case messages.Bytes(minimum, maximum):
            return st.binary(min_size=minimum, max_size=maximum)
        case messages.Text(maximum_bytes):
            alphabet = st.characters(
                exclude_categories=["Cc", "Cs"],
                exclude_characters=[
                    chr(code) for code in [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]
                ],
            )
            return st.text(alphabet, max_size=maximum_bytes // 4)
        case messages.Array(item, maximum_length):
            return st.lists(values(item), max_size=min(maximum_length, 8)).map(tuple)
        case messages.TensorField():
            return tensors()
        case messages.BlobField():
            return st.binary(min_size=1, max_size=64)


def messages_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    arguments = {
        declared.name: values(declared.metadata["wire"].spec)
        for declared in fields(kind)  # type: ignore[arg-type]
    }
    return st.builds(kind, **arguments)


def through_bytes(message: Message) -> Message:
    head, payload = codec.encode(message)
    prefix = codec.read_prefix(head[: codec.PREFIX_BYTES])
    assert prefix.tag == message.TAG
    return codec.decode(prefix, head[codec.PREFIX_BYTES :], payload)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.one_of([messages_of(kind) for kind in messages.MESSAGE_TYPES]))
def test_every_message_survives_the_wire(message: Message) -> None:
    received = through_bytes(message)
    for declared in fields(message):  # type: ignore[arg-type]
        sent = getattr(message, declared.name)
        if isinstance(sent, WireTensor):
            # compression that does not pay is left out
            encoding = getattr(received, declared.name).encoding
            assert encoding in {sent.encoding, Encoding.RAW}
            message = replace(message, **{declared.name: replace(sent, encoding=encoding)})  # type: ignore[type-var]
    assert received == message
    assert type(received) is type(message)


def decode_step(tensor: WireTensor) -> messages.Step:
    return messages.Step(step=7, position=512, output_tokens=1, activations=tensor)


def test_a_raw_payload_is_not_copied() -> None:
    data = bytearray(b"\x3f" * 8 * 4)
    step = decode_step(WireTensor(DType.FLOAT32, (1, 1, 8), memoryview(data)))
    head, payload = codec.encode(step)
    assert payload is step.activations.data
    body = bytes(payload)
    received = codec.decode(codec.read_prefix(head[:8]), head[8:], body)
    assert isinstance(received, messages.Step)
    assert received.activations.data is body


def test_zstd_shrinks_what_can_be_shrunk() -> None:
    size_bytes = 512 * 576 * 2
    tensor = WireTensor(DType.BFLOAT16, (1, 512, 576), bytes(size_bytes), Encoding.ZSTD)
    head, payload = codec.encode(decode_step(tensor))
    assert len(payload) < 1000
    received = codec.decode(codec.read_prefix(head[:8]), head[8:], payload)
    assert isinstance(received, messages.Step)
    assert received.activations == tensor


@pytest.mark.parametrize("encoding", Encoding)
def test_a_payload_may_be_a_part_of_a_larger_buffer(encoding: Encoding) -> None:
    tensor = WireTensor(DType.BFLOAT16, (1, 64, 8), bytes(1024), encoding)
    head, payload = codec.encode(decode_step(tensor))
    body = memoryview(head[8:] + bytes(payload))
    prefix = codec.read_prefix(head[:8])
    received = codec.decode(prefix, bytes(body[: prefix.header_bytes]), body[prefix.header_bytes :])
    assert received == decode_step(tensor)


def test_a_decode_step_costs_few_bytes() -> None:
    tensor = WireTensor(DType.FLOAT32, (1, 1, 576), bytes(4 * 576))
    head, payload = codec.encode(decode_step(tensor))
    assert len(head) <= 32
    assert len(payload) == 4 * 576


def test_values_that_are_the_default_are_left_out() -> None:
    head, payload = codec.encode(messages.Error(code=ErrorCode.GAP))
    assert msgpack.unpackb(head[8:], strict_map_key=False) == {1: 16}
    assert not payload


def test_unknown_fields_are_ignored() -> None:
    header = msgpack.packb({1: 5, 200: "a later version", 201: [1, {2: 3}], -1: None})
    prefix = codec.FramePrefix(messages.Ping.TAG, len(header), 0)
    assert codec.decode(prefix, header, b"") == messages.Ping(nonce=5)


def test_unknown_fields_may_be_nested_a_little() -> None:
    header = b"\x82\x01\x05\x63" + b"\x91" * 8 + b"\x00"
    prefix = codec.FramePrefix(messages.Ping.TAG, len(header), 0)
    assert codec.decode(prefix, header, b"") == messages.Ping(nonce=5)


def test_tags_and_field_numbers_are_unique() -> None:
    tags = [kind.TAG for kind in messages.MESSAGE_TYPES]
    assert len(set(tags)) == len(tags)
    assert not set(tags) & messages.RETIRED_TAGS
    assert all(0 < tag < 256 for tag in tags)


@pytest.mark.parametrize(
    "message",
    [
        messages.Ping(nonce=-1),
        messages.Ping(nonce=1 << 53),
        messages.Ping(nonce=1.0),  # type: ignore[arg-type]
        messages.Hello(1, 1, software="x" * 65),
        messages.Hello(1, 1, software="a\nb"),
        messages.Hello(1, 1, software="\ud800"),
        messages.Attach(session_id=bytes(15), route_version=1),
        messages.SetRoute(route_version=1, next_session_id=bytes(17)),
        decode_step(WireTensor(DType.FLOAT32, (1, 8), bytes(32))),
        decode_step(WireTensor(DType.FLOAT32, (1, 0, 8), b"")),
        decode_step(WireTensor(DType.FLOAT32, (1, 1, 8), bytes(31))),
        decode_step(WireTensor(DType.FLOAT16, (1, 1, 3 << 20), bytes(6 << 20))),
    ],
)
def test_we_do_not_send_what_no_peer_accepts(message: Message) -> None:
    with pytest.raises(UsageError):
        codec.encode(message)
