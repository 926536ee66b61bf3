"""Messages to frames and back.

A frame is a prefix of 8 bytes, a msgpack map and the bytes of the message's tensor, if it has one::

    4 bytes  unsigned, big endian: bytes that follow the prefix (map + tensor)
    1 byte   message tag
    3 bytes  unsigned, big endian: bytes of the map

A receiver reads the prefix, asks ``read_prefix`` whether it may go on, reads the two parts, and
hands them to ``decode``. Nothing is allocated by what a peer claims before the claim is checked;
whatever the bytes, the outcome is a valid message or a DecodeError. Cross-field rules and the rules
of a session are checked by ``session``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack
import zstandard

from swarm.protocol.errors import DecodeError, ErrorCode, UsageError
from swarm.protocol.messages import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MESSAGE_TYPES,
    Message,
)
from swarm.protocol.schema import Schema, unpack
from swarm.protocol.tensors import ITEM_BYTES, DType, Encoding, WireTensor

PREFIX_BYTES = 8
TENSOR_DIMENSIONS = 3
ZSTD_LEVEL = 1
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_ZSTD_WINDOW_BYTES = MAX_PAYLOAD_BYTES

Payload = bytes | bytearray | memoryview

_PREFIX = struct.Struct(">II")
_SCHEMAS: dict[int, Schema[Message]] = {kind.TAG: Schema(kind) for kind in MESSAGE_TYPES}
_DTYPES: dict[object, DType] = {int(dtype): dtype for dtype in DType}
_ENCODINGS: dict[object, Encoding] = {int(encoding): encoding for encoding in Encoding}


@dataclass(frozen=True, slots=True)
class FramePrefix:
    """How many bytes to read next: first the header, then the payload."""

    tag: int
    header_bytes: int
    payload_bytes: int


def encode(message: Message) -> tuple[bytes, Payload]:
    """Prefix and header together, and the payload (empty without a tensor; not copied if RAW).

    Raises UsageError for a message of ours that no peer would accept.
    """
    schema = _SCHEMAS[message.TAG]
    header_map = schema.to_map(message)
    payload: Payload = b""
    if schema.tensor_index is not None:
        tensor: WireTensor = getattr(message, schema.tensor_name)
        encoding, payload = _encode_tensor(tensor)
        header_map[schema.tensor_number] = (int(tensor.dtype), int(encoding), tensor.shape)
    elif schema.blob_index is not None:
        payload = getattr(message, schema.blob_name)
        if not 0 < len(payload) <= schema.blob_maximum_bytes:
            raise UsageError(f"{type(message).__name__}.{schema.blob_name} is out of its bounds")
        header_map[schema.blob_number] = len(payload)
    header: bytes = msgpack.packb(header_map)
    if len(header) > MAX_HEADER_BYTES:
        raise UsageError(f"{type(message).__name__} is larger than a frame may be")
    prefix = _PREFIX.pack(len(header) + len(payload), message.TAG << 24 | len(header))
    return prefix + header, payload


def read_prefix(prefix: bytes, *, maximum_payload_bytes: int = MAX_PAYLOAD_BYTES) -> FramePrefix:
    """Check the sizes that a peer claims. Raises DecodeError(BAD_FRAME or TOO_LARGE).

    An unknown tag passes, so that the frame can be read to its end and answered with an error.
    """
    if len(prefix) != PREFIX_BYTES:
        raise DecodeError(ErrorCode.BAD_FRAME, "a prefix has 8 bytes")
    body_bytes, tag_and_header_bytes = _PREFIX.unpack(prefix)
    tag, header_bytes = tag_and_header_bytes >> 24, tag_and_header_bytes & 0xFFFFFF
    payload_bytes = body_bytes - header_bytes
    if header_bytes == 0 or payload_bytes < 0:
        raise DecodeError(ErrorCode.BAD_FRAME, "the sizes contradict each other")
    if header_bytes > MAX_HEADER_BYTES:
        raise DecodeError(ErrorCode.TOO_LARGE, "header")
    if payload_bytes > min(maximum_payload_bytes, MAX_PAYLOAD_BYTES):
        raise DecodeError(ErrorCode.TOO_LARGE, "payload")
    schema = _SCHEMAS.get(tag)
    if schema is not None and (payload_bytes > 0) != schema.has_payload:
        raise DecodeError(ErrorCode.BAD_FRAME, "a payload where none belongs, or none")
    return FramePrefix(tag, header_bytes, payload_bytes)


def decode(prefix: FramePrefix, header: bytes, payload: Payload) -> Message:
    """The message of a frame. Raises DecodeError.

    A RAW tensor's ``data`` is ``payload`` itself, without a copy.
    """
    if len(header) != prefix.header_bytes or len(payload) != prefix.payload_bytes:
        raise DecodeError(ErrorCode.BAD_FRAME, "the parts are not as long as the prefix says")
    schema = _SCHEMAS.get(prefix.tag)
    if schema is None:
        raise DecodeError(ErrorCode.UNKNOWN_MESSAGE, f"tag {prefix.tag}")
    values = schema.read_fields(unpack(header))
    if schema.tensor_index is not None:
        values[schema.tensor_index] = _decode_tensor(values[schema.tensor_index], payload)
    elif schema.blob_index is not None:
        if values[schema.blob_index] != len(payload):
            raise DecodeError(ErrorCode.BAD_FIELD, "the payload is not as long as it says")
        values[schema.blob_index] = bytes(payload)
    elif payload:
        raise DecodeError(ErrorCode.BAD_FRAME, "a payload where none belongs")
    return schema.owner(*values)


def _encode_tensor(tensor: WireTensor) -> tuple[Encoding, Payload]:
    """Compression that does not shrink is left out; a receiver accepts RAW in its place."""
    if (
        len(tensor.shape) != TENSOR_DIMENSIONS
        or min(tensor.shape) < 1
        or len(tensor.data) != tensor.size_bytes
        or len(tensor.data) > MAX_PAYLOAD_BYTES
    ):
        raise UsageError(f"no peer accepts a tensor {tensor.shape} of {len(tensor.data)} bytes")
    if tensor.encoding is Encoding.ZSTD:
        compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(tensor.data)
        if len(compressed) < len(tensor.data):
            return Encoding.ZSTD, compressed
    return Encoding.RAW, tensor.data


def _decode_tensor(header: list[object], payload: Payload) -> WireTensor:
    dtype_code, encoding_code, shape = header
    if type(dtype_code) is not int or type(encoding_code) is not int or type(shape) is not list:
        raise DecodeError(ErrorCode.BAD_FIELD, "malformed tensor header")
    dtype = _DTYPES.get(dtype_code)
    encoding = _ENCODINGS.get(encoding_code)
    if dtype is None or encoding is None:
        raise DecodeError(ErrorCode.UNSUPPORTED_DTYPE, f"{dtype_code} with {encoding_code}")
    if len(shape) != TENSOR_DIMENSIONS:
        raise DecodeError(ErrorCode.BAD_TENSOR, "a tensor has 3 dimensions")
    size_bytes = ITEM_BYTES[dtype]
    for dimension in shape:
        if type(dimension) is not int or dimension < 1:
            raise DecodeError(ErrorCode.BAD_TENSOR, "dimensions are integers of at least 1")
        size_bytes *= dimension
    if size_bytes > MAX_PAYLOAD_BYTES:
        raise DecodeError(ErrorCode.TOO_LARGE, "tensor")
    if encoding is Encoding.ZSTD:
        payload = _decompress(payload, size_bytes)
    if len(payload) != size_bytes:
        raise DecodeError(ErrorCode.BAD_TENSOR, "the payload does not fit the shape")
    return WireTensor(dtype, tuple(shape), payload, encoding)


def _decompress(payload: Payload, size_bytes: int) -> bytes:
    """Decompress one frame that states its size, ``size_bytes``.

    The frame's own claims are read first, since ``decompress`` allocates the size that a frame
    states whatever ``max_output_size`` says, and its window whatever its size. Frames that state no
    size are refused: without a size ``decompress`` reads on into a second frame.
    """
    if payload[:4] != ZSTD_MAGIC:  # also keeps out skippable frames
        raise DecodeError(ErrorCode.BAD_TENSOR, "not a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(payload)
        if frame.content_size != size_bytes:
            raise DecodeError(ErrorCode.BAD_TENSOR, "the zstd frame states another size, or none")
        if frame.window_size > MAX_ZSTD_WINDOW_BYTES or frame.dict_id:
            raise DecodeError(ErrorCode.TOO_LARGE, "zstd window, or a dictionary")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
        return decompressor.decompress(payload, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DecodeError(ErrorCode.BAD_TENSOR, "damaged zstd frame") from error
