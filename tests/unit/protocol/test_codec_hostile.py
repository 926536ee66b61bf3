"""Frames of a hostile peer: for any bytes a DecodeError or a valid message, in little memory."""

import math
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swarm.protocol import codec, messages
from swarm.protocol.errors import DecodeError, ErrorCode
from swarm.protocol.messages import Message
from swarm.protocol.tensors import DType, Encoding, WireTensor

TENSOR = WireTensor(DType.FLOAT32, (2, 3, 8), bytes(range(192)))
PEER_ID = "12D3KooWJW6bMxNDtTZ541p4vx3TKSgDJcpztXaH58UWd45yn5LC"
SAMPLES: list[Message] = [
    messages.Hello(1, 3, "software 1.0"),
    messages.HelloReply(2, "software 1.0"),
    messages.OpenSession(bytes(32), 10, 20, 2, 4096, 1, 0, PEER_ID, (0, 3), 7, PEER_ID),
    messages.SessionOpened(bytes(16), 2048, 4, 100_000),
    messages.SetRoute(1, PEER_ID, bytes(16), 7, 512, 1, 1),
    messages.RouteReady(1),
    messages.Attach(bytes(16), 1),
    messages.Attached(1),
    messages.Step(7, 512, 1, TENSOR, (1, 0), 30_000, (120, 90), (5000, 4000)),
    messages.StepResult(7, 512, TENSOR, (120, 90), (5000, 4000)),
    messages.Error(16, 1000, "steps before this one are missing", 7, 2),
    messages.Ping(1),
    messages.Pong(1, 8, 7, 1_800_000_000_000),
    messages.CloseSession(),
    messages.SessionClosed(),
    messages.SetPrevious(2, PEER_ID),
    messages.PreviousSet(2),
    messages.Replay(128, TENSOR, 7),
    messages.Replayed(131),
    messages.AskLoad(bytes(32), 10, 20, 4096),
    messages.LoadReport(1, 3, 100_000, 500, 2),
    messages.ProbePeer(PEER_ID),
    messages.ProbeReport(PEER_ID, 1),
    messages.Draining(60_000),
    messages.HandOver(PEER_ID, bytes(16), 1),
    messages.HandedOver(131, bytes(32)),
    messages.TakeOver(bytes(16)),
    messages.CacheChunk(11, 1, 0, TENSOR),
    messages.JournalChunk(0, TENSOR),
    messages.TakenOver(131, 8, bytes(32)),
    messages.PushAdapter(bytes(32), bytes(32), 100_000, "swahili@00ff"),
    messages.AdapterStatus(0, 10, 20),
    messages.AdapterIndexPart((b"{", b"}" * 3)),
    messages.AdapterTensor(7, 1, TENSOR),
    messages.OpenTraining(bytes(32), 10, 20, 1, PEER_ID, 512, 2, 1, 1, 16, 32.0, ("q_proj",)),
    messages.TrainingOpened(bytes(16), 100_000),
    messages.ForwardPart(7, (3, 4), 0, TENSOR),
    messages.BackwardPart(7, 0, TENSOR),
    messages.AskGradientNorm(3, 2),
    messages.GradientNorm(3, 0.25),
    messages.ApplyGradients(3, 1.0, 2e-3),
    messages.GradientsApplied(3),
    messages.AskState(3),
    messages.StatePart("model.layers.3.mlp.down_proj.lora_A.weight", 96, 0, TENSOR),
    messages.StateEnd(3, 40),
    messages.StateRestored(3),
    messages.ForgetMicroBatch(7),
    messages.MicroBatchDone(7, bytes(32), bytes(32), bytes(32), bytes(32)),
    messages.ShowMicroBatch(7),
    messages.ShownPart(7, 3, 0, TENSOR),
    messages.GetManifest(bytes(32)),
    messages.ManifestPiece(3, b"{}\n"),
    messages.ManifestSignatures((PEER_ID,), (bytes(64),)),
    messages.AskChunks(bytes(32)),
    messages.ChunksHeld(bytes(4)),
    messages.GetChunk(7),
    messages.Chunk(7, b"abc"),
    messages.RedeemInvitation(b"invitation"),
    messages.PassportIssued(b"passport", b"charter"),
    messages.SignedVoucher(b"{}", bytes(64)),
    messages.SignedReceipt(b"{}", bytes(64)),
    messages.ReadTranscript(bytes(16), 5),
    messages.TranscriptPart((bytes(88),)),
    messages.TranscriptEnd(bytes(32)),
    messages.RenewAllowance(b"{}", bytes(64), bytes(32)),
]
TAGS = [sample.TAG for sample in SAMPLES]
HOSTILE = settings(max_examples=2000, deadline=None, derandomize=True, database=None)


def frame_of(message: Message) -> bytes:
    head, payload = codec.encode(message)
    return head + bytes(payload)


def make_frame(tag: int, header: bytes, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">II", len(header) + len(payload), tag << 24 | len(header)) + header + payload
    )


def receive(frame: bytes) -> Message:
    """What a connection does, when the stream ends with the frame."""
    prefix = codec.read_prefix(frame[:8])
    header_end = 8 + prefix.header_bytes
    payload_end = header_end + prefix.payload_bytes
    return codec.decode(prefix, frame[8:header_end], frame[header_end:payload_end])


def refusal(frame: bytes) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        receive(frame)
    return caught.value.code


def step_frame(tensor_header: object, payload: bytes) -> bytes:
    return make_frame(
        messages.Step.TAG, msgpack.packb({1: 0, 2: 0, 3: 1, 4: tensor_header}), payload
    )


@contextmanager
def bounded_memory(limit_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < limit_bytes


def test_there_is_a_sample_of_every_message() -> None:
    assert tuple(map(type, SAMPLES)) == messages.MESSAGE_TYPES
    for sample in SAMPLES:
        assert receive(frame_of(sample)) == sample


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_frames_cut_short_at_every_byte(sample: Message) -> None:
    frame = frame_of(sample)
    for size_bytes in range(len(frame)):
        assert refusal(frame[:size_bytes]) is ErrorCode.BAD_FRAME


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_headers_and_payloads_cut_short_or_too_long(sample: Message) -> None:
    head, payload = codec.encode(sample)
    header, payload = head[8:], bytes(payload)
    for size_bytes in range(len(header)):
        refusal(make_frame(sample.TAG, header[:size_bytes], payload))
    refusal(make_frame(sample.TAG, header + b"\0", payload))
    refusal(make_frame(sample.TAG, header + header, payload))
    refusal(make_frame(sample.TAG, header, payload + b"\0"))
    for size_bytes in range(len(payload)):
        refusal(make_frame(sample.TAG, header, payload[:size_bytes]))


@pytest.mark.parametrize("tag", [tag for tag in range(256) if tag not in TAGS])
def test_unknown_tags(tag: int) -> None:
    assert refusal(make_frame(tag, b"\x80")) is ErrorCode.UNKNOWN_MESSAGE
    assert refusal(make_frame(tag, b"\x80", bytes(100))) is ErrorCode.UNKNOWN_MESSAGE


def test_a_header_under_the_tag_of_another_message() -> None:
    for sample in SAMPLES:
        head, payload = codec.encode(sample)
        for tag in TAGS:
            if tag != sample.TAG:
                decodes_or_refuses(make_frame(tag, head[8:], bytes(payload)))


@pytest.mark.parametrize(
    ("prefix", "code"),
    [
        (b"", ErrorCode.BAD_FRAME),
        (bytes(7), ErrorCode.BAD_FRAME),
        (bytes(9), ErrorCode.BAD_FRAME),
        (bytes(8), ErrorCode.BAD_FRAME),  # not even an empty map
        (struct.pack(">II", 3, 12 << 24 | 4), ErrorCode.BAD_FRAME),
        (struct.pack(">II", 0, 12 << 24 | 4), ErrorCode.BAD_FRAME),
        (struct.pack(">II", 65537, 12 << 24 | 65537), ErrorCode.TOO_LARGE),
        (struct.pack(">II", 2**32 - 1, 12 << 24 | 2**24 - 1), ErrorCode.TOO_LARGE),
        (struct.pack(">II", 2**32 - 1, 9 << 24 | 10), ErrorCode.TOO_LARGE),
        (struct.pack(">II", 2**32 - 1, 99 << 24 | 10), ErrorCode.TOO_LARGE),
        (struct.pack(">II", 10 + 4 * 2**20 + 1, 9 << 24 | 10), ErrorCode.TOO_LARGE),
        (struct.pack(">II", 11, 12 << 24 | 10), ErrorCode.BAD_FRAME),  # a ping with a payload
        (struct.pack(">II", 10, 9 << 24 | 10), ErrorCode.BAD_FRAME),  # a step without one
    ],
)
def test_prefixes_with_absurd_sizes(prefix: bytes, code: ErrorCode) -> None:
    with bounded_memory(64 * 1024), pytest.raises(DecodeError) as caught:
        codec.read_prefix(prefix)
    assert caught.value.code is code


def test_a_receiver_may_set_a_tighter_bound() -> None:
    prefix = struct.pack(">II", 10 + 1000, 9 << 24 | 10)
    assert codec.read_prefix(prefix, maximum_payload_bytes=1000).payload_bytes == 1000
    with pytest.raises(DecodeError) as caught:
        codec.read_prefix(prefix, maximum_payload_bytes=999)
    assert caught.value.code is ErrorCode.TOO_LARGE


ODD_VALUES: list[object] = [
    None,
    True,
    False,
    -1,
    -(2**63),
    2**53,
    2**63,
    2**64 - 1,
    0.0,
    1.5,
    math.nan,
    math.inf,
    "",
    "text",
    "x" * 4096,
    "line\nbreak",
    "\x1b[31mred",
    "right\u202eleft",
    b"",
    b"bytes",
    bytes(4096),
    [],
    {},
    [[]],
    [None],
    [-1],
    [True],
    [math.nan],
    [0] * 256,
    ["text"] * 64,
    {1: 1},
]


def is_allowed(spec: messages.Spec, value: Any) -> bool:
    """The bounds of a field once more, in the plainest words."""
    match spec:
        case messages.Uint(maximum):
            return type(value) is int and 0 <= value <= maximum
        case messages.Real(least, most):
            return type(value) is float and least <= value <= most
        case messages.Bytes(minimum, maximum):
            return type(value) is bytes and minimum <= len(value) <= maximum
        case messages.Text(maximum):
            return type(value) is str and len(value) <= maximum and value in ("", "text")
        case messages.Array(item, maximum):
            return (
                type(value) is list
                and len(value) <= maximum
                and all(is_allowed(item, entry) for entry in value)
            )
        case messages.TensorField() | messages.BlobField():
            return False


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_field_with_values_that_do_not_belong_there(sample: Message) -> None:
    head, payload = codec.encode(sample)
    header = msgpack.unpackb(head[8:], strict_map_key=False)
    for declared in fields(sample):  # type: ignore[arg-type]
        number, spec = declared.metadata["wire"].number, declared.metadata["wire"].spec
        for value in ODD_VALUES:
            frame = make_frame(sample.TAG, msgpack.packb({**header, number: value}), bytes(payload))
            if is_allowed(spec, value):
                receive(frame)
            else:
                assert refusal(frame) in (ErrorCode.BAD_FIELD, ErrorCode.BAD_TENSOR), declared.name


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_missing_and_repeated_fields(sample: Message) -> None:
    head, payload = codec.encode(sample)
    header = msgpack.unpackb(head[8:], strict_map_key=False)
    required = {
        declared.metadata["wire"].number
        for declared in fields(sample)  # type: ignore[arg-type]
        if declared.default is not MISSING
    } ^ set(header)
    for number in header:
        rest = msgpack.packb({key: value for key, value in header.items() if key != number})
        frame = make_frame(sample.TAG, rest, bytes(payload))
        if number in required:
            assert refusal(frame) is ErrorCode.BAD_FIELD
        else:
            receive(frame)
        twice = bytes([head[8] + 1]) + head[9:] + msgpack.packb(number)
        twice += msgpack.packb(header[number])
        frame = make_frame(sample.TAG, twice, bytes(payload))
        assert refusal(frame) is ErrorCode.BAD_FIELD


@pytest.mark.parametrize(
    "header",
    [
        b"\xc0",
        b"\x01",
        b"\x90",
        b"\xa0",
        b"\x91\x92\x01\x05",  # an array that looks like the pairs of a map
        msgpack.packb({"1": 5}),
        msgpack.packb({b"\1": 5}),
        msgpack.packb({1: 5, None: 1}),
        msgpack.packb({True: 5}),
        msgpack.packb({1.0: 5}),
        b"\x81\x91\x01\x05",  # an array as key
        b"\x81\x80\x05",  # a map as key
        b"\x81\x01\xa2\xff\xfe",  # text that is no UTF-8
        b"\x82\x01\x05\x63\xa3\xed\xa0\x80",  # a surrogate
        b"\x81\x01\xc1",  # never used in msgpack
        b"\xde\x00\x41" + b"\x01\x05" * 65,  # more than 64 pairs
        b"\x82\x01\x05\x63\xdc\x01\x01" + b"\x00" * 257,  # more than 256 items
        msgpack.packb({1: 5, 99: "x" * 4097}),
        msgpack.packb({1: 5, 99: bytes(4097)}),
        b"\xdf\xff\xff\xff\xff\x01\x05",
        b"\x82\x01\x05\x63\xdd\xff\xff\xff\xff",
        b"\x82\x01\x05\x63\xdb\xff\xff\xff\xff",
        b"\x82\x01\x05\x63\xc6\xff\xff\xff\xff",
        b"\x82\x01\x05\x63\xc9\xff\xff\xff\xff\x01",
    ],
)
def test_headers_that_are_no_map_of_bounded_fields(header: bytes) -> None:
    with bounded_memory(1 << 20):
        assert refusal(make_frame(messages.Ping.TAG, header)) is ErrorCode.BAD_FIELD


@pytest.mark.parametrize(
    "extension",
    [
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.ExtType(5, b"")),
        msgpack.packb(msgpack.ExtType(64, bytes(16))),
        msgpack.packb(msgpack.Timestamp(1, 1)),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\xc7\x00\xff",
    ],
)
def test_extension_types_are_refused(extension: bytes) -> None:
    for header in (
        extension,
        b"\x81\x01" + extension,
        b"\x82\x01\x05\x63" + extension,
        b"\x82\x01\x05" + extension + b"\x00",
    ):
        assert refusal(make_frame(messages.Ping.TAG, header)) is ErrorCode.BAD_FIELD


@pytest.mark.parametrize("levels", [9, 100, 300, 1000, 3000, 30_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x00", b"\x81"], ids=["array", "map", "key"])
def test_deep_nesting_is_refused(levels: int, opening: bytes) -> None:
    nested = opening * levels + (b"\x00\x00" if opening == b"\x81" else b"\x00")
    for header in (nested, b"\x81\x01" + nested, b"\x82\x01\x05\x63" + nested):
        if len(header) <= messages.MAX_HEADER_BYTES:
            with bounded_memory(8 << 20):
                assert refusal(make_frame(messages.Ping.TAG, header)) is ErrorCode.BAD_FIELD


def test_wide_and_deep_nesting_takes_little_memory() -> None:
    claims = b"\xdc\x01\x00" * 1000  # each claims 256 items and has one: the next array
    for header in (claims, b"\x82\x01\x05\x63" + claims + b"\x00" * 60_000):
        with bounded_memory(8 << 20):
            assert refusal(make_frame(messages.Ping.TAG, header)) is ErrorCode.BAD_FIELD


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ([1, 0, [1, 1, 3]], ErrorCode.BAD_TENSOR),
        ([1, 0, [1, 1, 1]], ErrorCode.BAD_TENSOR),
        ([2, 0, [1, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [1, 1, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, []], ErrorCode.BAD_TENSOR),
        ([1, 0, [0, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [-1, -1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [-1, 1, -2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [True, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [1.0, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [math.nan, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [[1], 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [None, 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, ["1", 1, 2]], ErrorCode.BAD_TENSOR),
        ([1, 0, [2**63, 2, 1]], ErrorCode.TOO_LARGE),  # 0 in 64 bits, with 4 bytes an item
        ([1, 0, [2**62 + 1, 1, 2]], ErrorCode.TOO_LARGE),  # 8 in 64 bits
        ([1, 0, [2**64 - 1] * 3], ErrorCode.TOO_LARGE),
        ([1, 1, [1, 1, 2**20 + 1]], ErrorCode.TOO_LARGE),
        ([0, 0, [1, 1, 2]], ErrorCode.UNSUPPORTED_DTYPE),
        ([4, 0, [1, 1, 2]], ErrorCode.UNSUPPORTED_DTYPE),
        ([2**64 - 1, 0, [1, 1, 2]], ErrorCode.UNSUPPORTED_DTYPE),
        ([-1, 0, [1, 1, 2]], ErrorCode.UNSUPPORTED_DTYPE),
        ([1, 2, [1, 1, 2]], ErrorCode.UNSUPPORTED_DTYPE),
        (["float32", 0, [1, 1, 2]], ErrorCode.BAD_FIELD),
        ([True, 0, [1, 1, 2]], ErrorCode.BAD_FIELD),
        ([1, False, [1, 1, 2]], ErrorCode.BAD_FIELD),
        ([1.0, 0, [1, 1, 2]], ErrorCode.BAD_FIELD),
        ([math.nan, 0, [1, 1, 2]], ErrorCode.BAD_FIELD),
        ([1, 0, 2], ErrorCode.BAD_FIELD),
        ([1, 0, {1: 2}], ErrorCode.BAD_FIELD),
        ([1, 0, b"\1\1\2"], ErrorCode.BAD_FIELD),
        ([1, 0], ErrorCode.BAD_FIELD),
        ([1, 0, [1, 1, 2], 0], ErrorCode.BAD_FIELD),
        ({1: 1}, ErrorCode.BAD_FIELD),
        (None, ErrorCode.BAD_FIELD),
        (8, ErrorCode.BAD_FIELD),
    ],
)
def test_tensor_headers_that_do_not_fit_8_bytes(header: object, code: ErrorCode) -> None:
    with bounded_memory(1 << 20):
        assert refusal(step_frame(header, bytes(8))) is code


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def zstd_without_size(data: bytes, **parameters: Any) -> bytes:
    options = zstandard.ZstdCompressionParameters(**parameters)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return stream.compress(data) + stream.flush()


SHAPE = [1, 16, 64]
SIZE_BYTES = 4 * 16 * 64
GOOD = zstd(bytes(SIZE_BYTES))
SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip"


def with_stated_size(stated_bytes: int, really: bytes) -> bytes:
    """A frame of run-length blocks whose header lies about the size."""
    blocks = b""
    for start in range(0, len(really), 1 << 17):
        size_bytes = min(1 << 17, len(really) - start)
        last = start + size_bytes == len(really)
        blocks += struct.pack("<I", size_bytes << 3 | 1 << 1 | last)[:3] + really[start : start + 1]
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", stated_bytes) + blocks


def test_the_handmade_frames_are_valid() -> None:
    frame = with_stated_size(SIZE_BYTES, bytes(SIZE_BYTES))
    assert isinstance(receive(step_frame([1, 1, SHAPE], frame)), messages.Step)


@pytest.mark.parametrize(
    "payload",
    [
        zstd(bytes(256 << 20)),
        zstd_without_size(bytes(256 << 20)),
        with_stated_size(SIZE_BYTES, bytes(64 << 20)),
        with_stated_size(2**63, bytes(SIZE_BYTES)),
        with_stated_size(2**64 - 3, bytes(SIZE_BYTES)),
        with_stated_size(0, bytes(SIZE_BYTES)),
        with_stated_size(SIZE_BYTES, bytes(SIZE_BYTES - 1)),
        with_stated_size(SIZE_BYTES, bytes(SIZE_BYTES + 1)),
        zstd_without_size(bytes(SIZE_BYTES)),
        zstd_without_size(bytes(SIZE_BYTES), window_log=31),
        zstd(bytes(SIZE_BYTES - 1)),
        zstd(bytes(SIZE_BYTES + 1)),
        zstd(b""),
        GOOD + GOOD,
        zstd(bytes(SIZE_BYTES // 2)) * 2,
        zstd_without_size(bytes(SIZE_BYTES // 2)) * 2,
        GOOD + zstd(b""),
        GOOD + SKIPPABLE,
        SKIPPABLE + GOOD,
        SKIPPABLE,
        GOOD + b"\0",
        *(GOOD[:size_bytes] for size_bytes in range(1, len(GOOD))),
        GOOD[4:],
        b"\x1e\xb5\x2f\xfd" + GOOD[4:],
        bytes(SIZE_BYTES),
        zstd(bytes(SIZE_BYTES), write_checksum=True)[:-1] + b"\xff",
    ],
    ids=lambda payload: f"{len(payload)} bytes {payload[:8].hex()}",
)
def test_decompression_bombs_and_damaged_frames(payload: bytes) -> None:
    frame = step_frame([1, 1, SHAPE], payload)
    with bounded_memory(1 << 20):
        assert refusal(frame) in (ErrorCode.BAD_TENSOR, ErrorCode.TOO_LARGE)


def test_a_dictionary_is_refused() -> None:
    frame = bytearray(with_stated_size(SIZE_BYTES, bytes(SIZE_BYTES)))
    frame[4] |= 1
    frame.insert(5, 77)
    assert refusal(step_frame([1, 1, SHAPE], bytes(frame))) is ErrorCode.TOO_LARGE


def decodes_or_refuses(frame: bytes) -> None:
    try:
        message = receive(frame)
    except DecodeError:
        return
    # whatever was accepted can be sent on, and arrives as it is
    assert receive(frame_of(message)) == message


FRAMES = [frame_of(sample) for sample in SAMPLES]


@HOSTILE
@given(st.sampled_from(FRAMES), st.data())
def test_frames_with_changed_bytes(frame: bytes, data: st.DataObject) -> None:
    changed = bytearray(frame)
    for position, value in data.draw(
        st.lists(
            st.tuples(st.integers(0, min(len(frame), 64) - 1), st.integers(0, 255)),
            min_size=1,
            max_size=4,
        )
    ):
        changed[position] = value
    decodes_or_refuses(bytes(changed))


@HOSTILE
@given(st.sampled_from(TAGS), st.binary(min_size=1, max_size=200), st.binary(max_size=64))
@example(9, b"\x84\x01\x00\x02\x00\x03\x01\x04\x93\x01\x00\x93\x01\x01\x01", bytes(4))
def test_random_headers(tag: int, header: bytes, payload: bytes) -> None:
    decodes_or_refuses(make_frame(tag, header, payload))


@HOSTILE
@given(st.binary(max_size=300))
def test_random_bytes(frame: bytes) -> None:
    decodes_or_refuses(frame)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 64),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.dictionaries(st.one_of(st.integers(0, 10), st.text(max_size=3)), inner, max_size=6),
    ),
    max_leaves=12,
)
TENSOR_HEADERS = st.tuples(
    st.integers(0, 4),
    st.integers(0, 2),
    st.lists(st.one_of(st.integers(1, 4), st.integers(-(2**63), 2**64 - 1)), max_size=4),
)


@settings(HOSTILE, max_examples=500)  # the generator is slow, not the decoder
@given(
    st.sampled_from(TAGS),
    st.dictionaries(st.integers(0, 10), st.one_of(NESTED, TENSOR_HEADERS), max_size=10),
    st.binary(max_size=64),
)
def test_well_formed_maps_with_any_content(
    tag: int, header: dict[int, object], payload: bytes
) -> None:
    decodes_or_refuses(make_frame(tag, msgpack.packb(header), payload))


@settings(HOSTILE, max_examples=1000)
@given(
    TENSOR_HEADERS,
    st.one_of(
        st.binary(min_size=1, max_size=128),
        st.binary(max_size=128).map(zstd),
        st.tuples(st.binary(max_size=64), st.integers(0, 20), st.integers(0, 255)).map(
            lambda parts: damaged(zstd(parts[0]), parts[1], parts[2])
        ),
    ),
)
def test_tensors_with_any_header_and_payload(
    header: tuple[int, int, list[int]], payload: bytes
) -> None:
    decodes_or_refuses(step_frame(header, payload))


def damaged(frame: bytes, position: int, value: int) -> bytes:
    changed = bytearray(frame)
    changed[position % len(changed)] = value
    return bytes(changed)


def test_a_good_frame_still_decodes_after_all_this() -> None:
    tensor = WireTensor(DType.FLOAT32, (1, 16, 64), bytes(SIZE_BYTES), Encoding.ZSTD)
    step = messages.Step(0, 0, 1, tensor)
    assert receive(frame_of(step)) == step
