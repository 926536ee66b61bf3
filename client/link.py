"""The control stream to one hop of a session: questions, their answers, and what the hop tells.

A link has one reader, ``Chain``; any task may ask over it. It fails once, for one reason, and
whoever waits for an answer then gets that reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from swarm.client.hop_speed import HopSpeed
from swarm.client.vouchers import Grant, HopAccount
from swarm.connection import Connection, PassportCheck, remote_error
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ERROR_TEXTS,
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    Error,
    HandedOver,
    Message,
    OpenSession,
    Ping,
    Pong,
    PreviousSet,
    ProbeReport,
    RenewAllowance,
    Replayed,
    RouteReady,
    SessionOpened,
    SetPrevious,
    SetRoute,
    SignedReceipt,
    TakenOver,
)
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import Hop as PlannedHop
from swarm.suspicion import PhiAccrual

SIGNS_INTERVAL_S = 0.4
LEAST_DEVIATION_S = 0.1

DIRECT_WITHIN_S = 1.0
"""The stream lives as long as the session: so long it waits for a hole through routers."""

Answer = RouteReady | PreviousSet | ProbeReport | HandedOver
A = TypeVar("A", bound=Answer)


class HopFailed(NetworkError):
    """A hop refused, broke the protocol or is gone; ``peer_id`` says which, the cause says why."""

    def __init__(
        self, hop: PlannedHop, cause: SwarmError, suspects: Collection[PeerId] = ()
    ) -> None:
        """``suspects``: all who may be to blame, when it cannot be told that it is this hop."""
        self.hop = hop
        self.suspects = frozenset(suspects)
        self.is_counted = False
        self.peer_id = hop.peer_id
        self.code = cause.code if isinstance(cause, RemoteError | ProtocolError) else None
        self.retry_after_ms = cause.retry_after_ms if isinstance(cause, RemoteError) else 0
        name = hop.display_name or hop.peer_id
        reason = ERROR_TEXTS[cause.code] if isinstance(cause, RemoteError) else str(cause)
        super().__init__(f"{name} (blocks {hop.first_block}-{hop.end_block - 1}): {reason}")
        self.__cause__ = cause


@dataclass(slots=True)
class HopTimes:
    """What one hop reported for the latest step, in microseconds."""

    queue_us: int = 0
    compute_us: int = 0


class Link:
    """One hop of a session, seen by its client."""

    def __init__(
        self,
        hop: PlannedHop,
        connection: Connection,
        opened: SessionOpened,
        clock: Clock,
        rows: int,
    ) -> None:
        self.hop = hop
        self.connection = connection
        self.opened = opened
        self.times = HopTimes()
        self.route_version = 0
        """Of the route that the client last asked for."""
        self.received_step = 0
        """What the hop said last of its progress."""
        self.computed_step = 0
        self.replayed_length = 0
        self.mended = 0
        """How often the stream from the hop before was made anew since the latest result."""
        self.round_trip_s = 0.0
        """Of the latest ping."""
        # What was expected is of one row; how much longer several take depends on the device.
        self.speed = HopSpeed(hop.promised_s if rows == 1 else 0.0)
        self.failure: HopFailed | None = None
        self.account: HopAccount | None = None
        """What the hop is vouched for; None when it keeps no books."""
        self._former_account: HopAccount | None = None
        """Of the allowance before; its last receipts may still come."""
        self._clock = clock
        self._taken_over: asyncio.Future[TakenOver] = asyncio.get_running_loop().create_future()
        self._expected: dict[tuple[type[Message], int | str], asyncio.Future[Answer]] = {}
        self._replayed = asyncio.Event()
        self._signs = PhiAccrual(
            SIGNS_INTERVAL_S, clock.monotonic_s(), least_deviation_s=LEAST_DEVIATION_S
        )
        self._ping: Ping | None = None
        self._is_sending_ping = False
        self._pinged_s = 0.0

    @classmethod
    async def open(
        cls,
        transport: Transport,
        hop: PlannedHop,
        request: OpenSession,
        *,
        clock: Clock,
        timeout_s: float,
        only_for: PassportCheck | None = None,
        grant: Grant | None = None,
    ) -> Link:
        """Open a session on a hop, if its passport passes ``only_for``.

        Raises HopFailed; nothing stays open then.
        """
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = Connection(
                    await transport.open(
                        hop.peer_id,
                        STREAM_PROTOCOL,
                        hop.addresses,
                        direct_within_s=DIRECT_WITHIN_S,
                    )
                )
                await connection.say_hello(request, only_for=only_for)
                opened = await connection.receive_only(SessionOpened)
                if opened.maximum_step_tokens < 1 or opened.maximum_steps_in_flight < 1:
                    raise ProtocolError(ErrorCode.BAD_FIELD, "accepts no steps")
                if opened.adapter_id != request.adapter_id:
                    # Older nodes do not know the field: they would answer as the bare model.
                    raise ProtocolError(ErrorCode.BAD_FIELD, "computes without the adapter")
                link = cls(hop, connection, opened, clock, request.rows)
                if grant is not None and opened.keeps_books:
                    link.account = HopAccount(grant, hop.peer_id, request, opened, clock)
                return link
        except TimeoutError:
            if connection is not None:
                await connection.close()
            reason = NetworkError(f"did not open the session within {timeout_s:.0f} s")
            raise HopFailed(hop, reason) from reason
        except SwarmError as error:
            if connection is not None:
                await connection.close()
            raise HopFailed(hop, error) from error
        except asyncio.CancelledError:
            if connection is not None:
                await connection.close()
            raise

    @property
    def peer_id(self) -> PeerId:
        return self.hop.peer_id

    async def receive(self) -> Message:
        """The next message that is for the chain. Raises SwarmErrors of the stream."""
        while True:
            message = await self.connection.receive()
            self._signs.heard(self._clock.monotonic_s())
            match message:
                case RouteReady() | PreviousSet():
                    self._settle(type(message), message.route_version, message)
                case ProbeReport():
                    self._settle(ProbeReport, message.peer, message)
                case HandedOver():
                    self._settle(HandedOver, 0, message)
                case TakenOver() if not self._taken_over.done():
                    self._taken_over.set_result(message)
                case Error() if message.route_version and self._refuse(message):
                    pass
                case Replayed():
                    self.replayed_length = message.length
                    self._replayed.set()
                case Pong():
                    self._signs.answered(self._clock.monotonic_s())
                    if self._ping is not None and message.nonce == self._ping.nonce:
                        self.round_trip_s = self._clock.monotonic_s() - self._pinged_s
                        self.speed.add_round_trip(self.round_trip_s)
                        self._ping = None
                    self.received_step = max(self.received_step, message.received_step)
                    self.computed_step = max(self.computed_step, message.computed_step)
                    return message
                case _:
                    return message

    # --- signs of life
    @property
    def is_pinging(self) -> bool:
        """Whether a ping has not even been sent yet: the stream is congested, or worse."""
        return self._is_sending_ping

    async def ping(self, ping: Ping) -> None:
        """Ask for a sign of life. Raises NetworkError."""
        if self._ping is None:
            self._ping, self._pinged_s = ping, self._clock.monotonic_s()
        self._is_sending_ping = True
        try:
            await self.connection.send(ping)
        finally:
            self._is_sending_ping = False

    def expect_signs(self, interval_s: float) -> None:
        """From now on pings come this often; the silence so far counts for nothing."""
        self._signs = PhiAccrual(
            interval_s, self._clock.monotonic_s(), least_deviation_s=LEAST_DEVIATION_S
        )

    def phi(self) -> float:
        """How unlikely the present silence is."""
        return self._signs.phi(self._clock.monotonic_s())

    # --- questions
    async def set_route(self, message: SetRoute, timeout_s: float) -> None:
        """Raises RemoteError when the hop refuses, HopFailed when it is gone."""
        self.route_version = message.route_version
        await self.ask(message, RouteReady, message.route_version, timeout_s)

    async def set_previous(self, message: SetPrevious, timeout_s: float) -> None:
        """Raises RemoteError when the hop refuses, HopFailed when it is gone."""
        await self.ask(message, PreviousSet, message.route_version, timeout_s)

    async def ask(self, question: Message, kind: type[A], key: int | str, timeout_s: float) -> A:
        """Send a question and wait for its answer, which carries ``key``."""
        if self.failure is not None:
            raise self.failure
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._expected[kind, key] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self.connection.send(question)
                answer = await future
        except TimeoutError:
            reason = NetworkError(f"no answer to {type(question).__name__} in {timeout_s:.0f} s")
            raise HopFailed(self.hop, reason) from None
        except HopFailed:
            raise
        except NetworkError as error:
            raise HopFailed(self.hop, error) from error
        finally:
            self._expected.pop((kind, key), None)
        if not isinstance(answer, kind):
            raise TypeError(f"{type(answer).__name__} under the key of {kind.__name__}")
        return answer

    async def took_over(self, timeout_s: float) -> TakenOver:
        """What the hop has after another one has handed its state over. Raises HopFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._taken_over)
        except TimeoutError:
            raise HopFailed(self.hop, NetworkError("does not say what it took over")) from None

    async def replayed_to(self, length: int, stall_s: float) -> None:
        """Wait until the hop has ``length`` positions again. Raises HopFailed.

        It may take as long as it goes on; after ``stall_s`` without progress it has failed.
        """
        while self.replayed_length < length:
            if self.failure is not None:
                raise self.failure
            self._replayed.clear()
            try:
                async with asyncio.timeout(stall_s):
                    await self._replayed.wait()
            except TimeoutError:
                reason = NetworkError("is not getting on with what it has to catch up")
                raise HopFailed(self.hop, reason) from None

    async def renew(self, account: HopAccount, grant: Grant) -> HopAccount:
        """Vouch for the rest of ``account``, and for what comes with ``grant``; the new account.

        Raises HopFailed.
        """
        # Vouchers that were handed to another task go first: they are of the former allowance.
        await asyncio.sleep(0)
        voucher = None if account.has_ended else account.sign_all()
        signed = grant.signed
        fresh = self.account = account.renewed(grant)
        self._former_account = account
        try:
            await self.connection.send(
                *([voucher] if voucher is not None else []),
                RenewAllowance(signed.payload, signed.signature, signed.public_key),
            )
        except NetworkError as error:
            raise HopFailed(self.hop, error) from error
        return fresh

    def take_receipt(self, message: SignedReceipt) -> None:
        """Of the account that it is for. Raises ProtocolError."""
        former = self._former_account
        if former is not None and former.is_receipt_for(message):
            former.take(message)
        elif self.account is not None:
            self.account.take(message)

    def fail(self, error: HopFailed) -> None:
        """Note why this hop is given up; whoever waits for it gets the reason."""
        if self.failure is not None:
            return
        self.failure = error
        for future in self._expected.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # its waiter may have been cancelled
        if not self._taken_over.done():
            self._taken_over.set_exception(error)
            self._taken_over.exception()  # nobody may be waiting
        self._replayed.set()

    def _settle(self, kind: type[Answer], key: int | str, answer: Answer) -> None:
        future = self._expected.get((kind, key))
        if future is not None and not future.done():
            future.set_result(answer)

    def _refuse(self, error: Error) -> bool:
        for kind in (RouteReady, PreviousSet):
            future = self._expected.get((kind, error.route_version))
            if future is not None and not future.done():
                future.set_exception(remote_error(error, self.peer_id))
                return True
        return False
