"""What a client makes of errors that hops report in a session, and of results that do not fit.

Who may be at fault for which of them, and who is given up for it, is in ``client.blame``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from swarm.client.blame import INPUT_IS_WRONG, MAY_LIE_BETWEEN
from swarm.client.hops import Hops
from swarm.client.link import Link
from swarm.connection import remote_error
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import Error, StepResult
from swarm.protocol.session import ClientSession

log = logging.getLogger(__name__)

MENDED_FIRST = (ErrorCode.GAP, ErrorCode.STALE_STEP, ErrorCode.TOO_MANY_STEPS)
"""Something between two hops was lost or came twice: a new stream sorts it out."""


class Complaints:
    """The complaints about the hops of one chain."""

    def __init__(self, hops: Hops, session: ClientSession, *, mend: Callable[[Link], None]) -> None:
        """``mend`` is told of a hop that needs a new stream from the one before."""
        self._hops = hops
        self._session = session
        self._mend = mend
        self._unpaid: set[PeerId] = set()
        """Hops that said already that the allowance does not pay for more."""

    def take(self, link: Link, message: Error) -> None:
        """What a hop says went wrong; raises when the hop itself is of no more use."""
        error = remote_error(message, link.peer_id)
        if link.failure is not None:
            return
        match error.code:
            case ErrorCode.NEXT_HOP_LOST:
                if message.route_version == link.route_version:
                    self._mend_after(link)
            case ErrorCode.PREVIOUS_HOP_LOST:
                before = self._hops.previous_of(link)
                if before is not None and message.route_version == before.route_version:
                    self._mend(link)
            case ErrorCode.NOT_NAMED_BY_SESSION:
                log.debug("%s refused a probe", link.peer_id)
            case ErrorCode.STALE_STEP if self._session.is_answered(message.step):
                pass
            case ErrorCode.OVER_LIMIT | ErrorCode.NOT_VALID_NOW if link.peer_id not in self._unpaid:
                # Once it may be ours: an allowance that pays for no more.
                self._unpaid.add(link.peer_id)
                self._hops.purse.refused()
                self._hops.blame.without(link, error)
            case code if code in INPUT_IS_WRONG | MAY_LIE_BETWEEN and link.hop.first_block > 0:
                self._about_input(link, message, error)
            case _:
                raise error

    def _about_input(self, link: Link, message: Error, error: RemoteError) -> None:
        """A hop complains of what another one sent it."""
        before = self._hops.source_of(link)
        if before is None:
            # Whoever sent it is gone already; what is left of the session here is of no use.
            self._hops.blame.without(link, NetworkError("got what is no input"))
        elif 0 < message.route_version < before.route_version:
            log.debug("%s complains of a hop that was replaced", link.peer_id)
        elif error.code in INPUT_IS_WRONG:
            self._hops.blame.all_of((before, link), error)
        elif error.code in MENDED_FIRST and link in self._hops.links:
            self._mend(link)
        else:
            self._hops.blame.joint(before, link, error)

    def misfit(self, link: Link, result: StepResult, error: ProtocolError) -> None:
        """The last hop answered something else than was asked. Raises ``error`` if it did that.

        What each hop checks itself only the last one can have spoilt; position, number and length
        of a step it passes on as they come.
        """
        terms, shape = self._session.terms, result.activations.shape
        is_own = (
            len(self._hops.links) < 2
            or (shape[0], shape[2]) != (terms.rows, terms.hidden_size)
            or result.activations.dtype is not terms.wire_dtype
        )
        if is_own or link not in self._hops.links:
            raise error
        self._hops.blame.all_of(tuple(self._hops.links), error)

    def _mend_after(self, link: Link) -> None:
        links = self._hops.links
        index = links.index(link) + 1 if link in links else len(links)
        if index < len(links):
            self._mend(links[index])
