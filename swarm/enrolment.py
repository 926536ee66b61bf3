"""Invitations are exchanged for passports: the desk's side, and that of whoever was invited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from swarm.connection import Connection
from swarm.membership_files import InvitationText
from swarm.ports import Stream, Transport
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import PassportIssued, RedeemInvitation
from swarm.protocol.version import ENROLMENT_PROTOCOL

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0


class Desk:
    """Answers strangers who bring an invitation; the only door that they may knock at."""

    def __init__(
        self,
        redeem: Callable[[bytes, PeerId], bytes],
        charter: Callable[[], bytes],
        on_issued: Callable[[PeerId], None] = lambda _: None,
    ) -> None:
        """``redeem`` makes a passport or raises ProtocolError; it is called in a thread."""
        self._redeem = redeem
        self._charter = charter
        self._on_issued = on_issued
        self._one_at_a_time = asyncio.Lock()

    async def open(self, transport: Transport) -> None:
        """Begin to answer."""
        await transport.serve(ENROLMENT_PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        connection = Connection(stream, admits_strangers=True)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await connection.answer_hello(TIMEOUT_S)
                request = await connection.receive_only(RedeemInvitation)
                async with self._one_at_a_time:
                    passport = await asyncio.to_thread(
                        self._redeem, request.invitation, connection.peer
                    )
                await connection.send(PassportIssued(passport=passport, charter=self._charter()))
            self._on_issued(connection.peer)
        except ProtocolError as error:
            log.info("refused %s: %s", connection.peer, error)
            await connection.refuse(error)
        except (NetworkError, TimeoutError) as error:
            log.debug("enrolment of %s: %s", connection.peer, error)
        except Exception:
            log.exception("enrolment of %s failed", connection.peer)
            await connection.refuse(ProtocolError(ErrorCode.INTERNAL))
        finally:
            await connection.close()


async def redeem_invitation(transport: Transport, invitation: InvitationText) -> PassportIssued:
    """Ask the desk. Raises NetworkError, RemoteError or ProtocolError."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stream = await transport.open(invitation.desk, ENROLMENT_PROTOCOL, invitation.addresses)
            async with Connection(stream, admits_strangers=True) as connection:
                await connection.say_hello(
                    RedeemInvitation(invitation=invitation.sealed_invitation)
                )
                return await connection.receive_only(PassportIssued)
    except TimeoutError:
        raise NetworkError("the desk that issues passports does not answer") from None
