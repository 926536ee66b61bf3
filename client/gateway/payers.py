"""Which account of the operator pays for what a key asks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.client.gateway.errors import ApiError
from swarm.client.gateway.keys import Payer
from swarm.client.gateway.shelf import SwarmView
from swarm.protocol.errors import SwarmError
from swarm.protocol.identity import Identity

if TYPE_CHECKING:
    from swarm.client.grants import OperatorGrants

log = logging.getLogger(__name__)


class Payers:
    """The accounts whose keys this gateway holds; each is read when it is first needed."""

    def __init__(self, client: SwarmView) -> None:
        self._client = client
        self._known: dict[Payer, OperatorGrants | None] = {}

    def grants_of(self, payer: Payer | None) -> OperatorGrants | None:
        """None: nobody but the gateway itself pays, or there is no operator.

        Raises ApiError 503 when the account's key cannot be read: nobody else pays in its place.
        """
        if payer is None:
            return None
        if payer not in self._known:
            try:
                account = Identity.load(Path(payer.key_path))
            except (SwarmError, OSError) as error:
                log.error("the key of account %s cannot be read: %s", payer.account, error)
                raise _unavailable() from None
            if account.peer_id != payer.account:
                log.error("%s is the key of another account than %s", payer.key_path, payer.account)
                raise _unavailable()
            self._known[payer] = self._client.paid_by(account, payer.budget)
        return self._known[payer]


def _unavailable() -> ApiError:
    return ApiError(
        503, "the account of this key cannot be used now; tell who runs the gateway",
        code="account_unavailable", retry_after_s=60,
    )  # fmt: skip
