"""Nodes that compute rightly and speak falsely: to the next hop, or to the client about others.

``EvilTransport`` wraps any transport. Everything of the node above it is the real thing; what it
sends is decoded, changed and encoded again, so that others get frames as a volunteer with changed
code would make them. Each does so only after some steps of a session: a node that has served well
is not suspected for what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from swarm.connection import error_message
from swarm.ports import Buffer, Stream, StreamHandler, Transport
from swarm.protocol.codec import PREFIX_BYTES, decode, encode, read_prefix
from swarm.protocol.errors import ErrorCode
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import Message, RouteReady, SessionOpened, Step, StepResult
from swarm.protocol.session import LONGEST_STEP_TOKENS
from swarm.protocol.tensors import DType, WireTensor

HONEST_STEPS = 3


class Foul(Enum):
    """What a dishonest node says."""

    TOO_LONG = "sends steps of more tokens than anybody takes"
    BEYOND_THE_END = "sends steps that end beyond what the session reserved"
    BAD_FIELD = "asks the next hop for more positions than the step has"
    OTHER_DTYPE = "sends another precision than agreed on"
    NO_MESSAGE = "sends bytes that are no message"
    SHIFTED = "sends steps at the position before theirs"
    AHEAD = "sends each step twice, the second time under the next number"
    SKIPS = "leaves numbers out"
    HOARDS = "cuts the stream to the next hop instead of sending"
    CANNOT_REACH = "says that the next hop cannot be reached"
    SLANDER = "says that what it got does not fit the session"


class EvilTransport:
    """The transport of one dishonest node."""

    def __init__(self, transport: Transport, foul: Foul) -> None:
        self._transport = transport
        self._foul = foul
        self._controls: list[Stream] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        async def handle(stream: Stream) -> None:
            await handler(EvilStream(stream, self._foul, self._controls))

        await self._transport.serve(protocol, handle)

    async def open(
        self,
        peer: PeerId,
        protocol: str,
        addresses: Sequence[str] = (),
        *,
        direct_within_s: float = 0.0,
    ) -> Stream:
        stream = await self._transport.open(
            peer, protocol, addresses, direct_within_s=direct_within_s
        )
        return EvilStream(stream, self._foul, self._controls)


@dataclass
class EvilStream:
    """A stream on which something else goes out than was sent."""

    inner: Stream
    foul: Foul
    controls: list[Stream]
    """To clients of sessions."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def send(self, *buffers: Buffer) -> None:
        for message in _messages(b"".join(buffers)):
            await self._send(message)

    async def _send(self, message: Message) -> None:
        match message:
            case SessionOpened():
                self.controls.append(self.inner)
            case RouteReady() if self.foul is Foul.CANNOT_REACH:
                message = error_message(
                    ErrorCode.NEXT_HOP_LOST, route_version=message.route_version
                )
            case Step() | StepResult() if message.step > HONEST_STEPS:
                match self.foul:
                    case Foul.NO_MESSAGE:
                        await self.inner.send(bytes(64))
                        return
                    case Foul.HOARDS:
                        await self.inner.close()
                        return
                    case Foul.SLANDER:
                        slander = error_message(ErrorCode.BAD_TENSOR, step=message.step)
                        await self.controls[-1].send(*encode(slander)[:1])
                        return
                if isinstance(message, Step):
                    for changed in _changed(message, self.foul):
                        await self.inner.send(*encode(changed))
                    return
        await self.inner.send(*(part for part in encode(message) if len(part)))


def _changed(step: Step, foul: Foul) -> list[Step]:
    rows, tokens, hidden = step.activations.shape
    tensor = step.activations
    match foul:
        case Foul.TOO_LONG:
            return [replace(step, activations=_repeated(tensor, LONGEST_STEP_TOKENS + 1))]
        case Foul.BEYOND_THE_END:
            return [replace(step, activations=_repeated(tensor, LONGEST_STEP_TOKENS))]
        case Foul.BAD_FIELD:
            return [replace(step, output_tokens=tokens + 1)]
        case Foul.OTHER_DTYPE:
            narrow = WireTensor(DType.FLOAT16, tensor.shape, bytes(rows * tokens * hidden * 2))
            return [replace(step, activations=narrow)]
        case Foul.SHIFTED:
            return [replace(step, position=step.position - 1)]
        case Foul.AHEAD:
            return [step, replace(step, step=step.step + 1)]
        case Foul.SKIPS:
            return [replace(step, step=step.step + 1)]
    return [step]


def _repeated(tensor: WireTensor, tokens: int) -> WireTensor:
    """The first token of a tensor of one row, so many times."""
    _, had, hidden = tensor.shape
    token = bytes(tensor.data)[: len(tensor.data) // had]
    return WireTensor(tensor.dtype, (1, tokens, hidden), token * tokens)


def _messages(content: bytes) -> Iterator[Message]:
    while content:
        prefix = read_prefix(content[:PREFIX_BYTES])
        header_end = PREFIX_BYTES + prefix.header_bytes
        end = header_end + prefix.payload_bytes
        yield decode(prefix, content[PREFIX_BYTES:header_end], memoryview(content)[header_end:end])
        content = content[end:]
