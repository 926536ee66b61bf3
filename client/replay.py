"""One span's work done again elsewhere: an ordinary session with one hop, paid like any other.

For audits. The replica sees a prompt like any other; what it answers is compared by
``client.auditing``.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TypeVar

from swarm.client.adapter_push import bring_adapter
from swarm.client.hops import SessionRequest
from swarm.client.link import HopFailed, Link
from swarm.client.vouchers import Grant
from swarm.connection import remote_error
from swarm.pieces import join_tokens, pieces
from swarm.ports import Clock, Transport
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, SwarmError
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    CloseSession,
    Error,
    Message,
    OpenSession,
    RouteReady,
    SessionClosed,
    SetRoute,
    SignedReceipt,
    Step,
    StepResult,
)
from swarm.protocol.prices import step_work
from swarm.protocol.session import accepted_step_tokens
from swarm.protocol.tensors import WireTensor
from swarm.routing import Hop as PlannedHop

M = TypeVar("M", bound=Message)

OPEN_S = 3.0
ANSWER_S = 60.0
GOODBYE_S = 2.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replica computed, and the precision that it declared."""

    output: WireTensor
    dtype_class: str


async def replay_through(
    transport: Transport,
    hop: PlannedHop,
    activations: WireTensor,
    request: SessionRequest,
    grant: Grant,
    clock: Clock,
) -> Replayed:
    """``[rows, tokens, hidden]`` through one hop, all positions back. Raises HopFailed."""
    rows, tokens, hidden_size = activations.shape
    message = OpenSession(
        model_revision=request.model_revision,
        first_block=hop.first_block,
        end_block=hop.end_block,
        rows=rows,
        maximum_tokens=tokens,
        wire_dtype=int(request.wire_dtype),
        wire_encoding=int(request.wire_encoding),
        previous_peer=transport.peer_id,
        left_padding=request.left_padding,
        adapter_id=request.adapter_id,
        policy=b"" if request.policy is None else request.policy.to_bytes(),
        allowance=grant.signed.payload,
        allowance_signature=grant.signed.signature,
        allowance_issuer=grant.signed.public_key,
    )
    try:
        link = await _open(transport, hop, message, request, grant, clock)
    except HopFailed as error:
        if error.code is not ErrorCode.ADAPTER_MISSING or request.adapter is None:
            raise
        await bring_adapter(
            transport,
            hop,
            request.adapter,
            model_revision=request.model_revision,
            only_for=None if request.policy is None else request.policy.check,
        )
        link = await _open(transport, hop, message, request, grant, clock)
    most = min(
        link.opened.maximum_step_tokens,
        accepted_step_tokens(hidden_size, request.wire_dtype),
    )
    try:
        link.connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
        async with asyncio.timeout(ANSWER_S):
            await link.connection.send(SetRoute(route_version=1))
            await _answer(link, RouteReady)
            outputs = []
            for number, (position, piece) in enumerate(
                pieces(activations, max(1, most // rows)), 1
            ):
                outputs.append(await _step(link, number, position, piece))
        await _say_goodbye(link)
        return Replayed(join_tokens(outputs, tokens), link.opened.dtype_class)
    except TimeoutError:
        reason = NetworkError(f"no answer within {ANSWER_S:.0f} s")
        raise HopFailed(hop, reason) from reason
    except HopFailed:
        raise
    except SwarmError as error:
        raise HopFailed(hop, error) from error
    finally:
        await link.connection.close()


async def _open(
    transport: Transport,
    hop: PlannedHop,
    message: OpenSession,
    request: SessionRequest,
    grant: Grant,
    clock: Clock,
) -> Link:
    return await Link.open(
        transport,
        hop,
        message,
        clock=clock,
        timeout_s=OPEN_S,
        only_for=None if request.policy is None else request.policy.check,
        grant=grant,
    )


async def _step(link: Link, number: int, position: int, piece: WireTensor) -> WireTensor:
    rows, tokens, _ = piece.shape
    step = Step(step=number, position=position, output_tokens=tokens, activations=piece)
    voucher = link.account.before_step(step_work(rows, tokens)) if link.account else None
    await link.connection.send(*([voucher] if voucher is not None else []), step)
    result = await _answer(link, StepResult)
    answered = result.activations
    if result.step != number or answered.shape != piece.shape or answered.dtype != piece.dtype:
        raise ProtocolError(ErrorCode.BAD_TENSOR, f"result of shape {answered.shape}")
    return answered


async def _answer(link: Link, kind: type[M]) -> M:
    """The next message of a kind; receipts are taken, other news of the hop do not matter here."""
    while True:
        message = await link.connection.receive()
        if isinstance(message, kind):
            return message
        if isinstance(message, Error):
            raise remote_error(message, link.peer_id)
        if isinstance(message, SignedReceipt) and link.account is not None:
            link.account.take(message)


async def _say_goodbye(link: Link) -> None:
    """Pay and close; what the replica answers to that changes nothing."""
    voucher = link.account.sign_all() if link.account is not None else None
    with contextlib.suppress(TimeoutError, SwarmError):
        async with asyncio.timeout(GOODBYE_S):
            if voucher is not None:
                await link.connection.send(voucher)
            await link.connection.send(CloseSession())
            await _answer(link, SessionClosed)
