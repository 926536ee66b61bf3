"""What an audit of one hop rests on, as it can be told to others: pure.

A client keeps its findings to itself; a validating organisation signs them (``client.validator``),
and a verdict has to name what it was found from: the hop's own signed receipt, and hashes of what
went in, what came out and what somebody else computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from swarm.ledger.audit_rule import Floats, Limits
from swarm.ledger.channel import Signed
from swarm.protocol.ledger_objects import Receipt
from swarm.protocol.tensors import WireTensor

NOTHING = bytes(hashlib.sha256().digest_size)
"""Where a hash should be and nothing was hashed: the hop contradicted its receipt before."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One segment: positions up to ``end_position`` of a session at one hop."""

    receipt: Receipt
    signed: Signed
    """The receipt as the hop signed it: it binds the segment."""
    end_position: int
    limits: Limits | None = None
    """What its errors were held to; None when it did not come to measuring."""
    input_hash: bytes = NOTHING
    output_hash: bytes = NOTHING
    """Of what the hop answered; of the last hop's answers the client has sketches only."""
    reference_hash: bytes = NOTHING
    """Of what the other one computed, in float32."""
    is_by_reference: bool = False
    """Whether the other one was the auditor's own weights."""

    @property
    def segment(self) -> str:
        """How a verdict names it: SHA-256 of the receipt's payload."""
        return hashlib.sha256(self.signed.payload).hexdigest()

    def of_work(self, given: WireTensor, answered: Floats, end_position: int) -> Evidence:
        """With what went in, and what came out of it."""
        return replace(
            self,
            input_hash=hashlib.sha256(given.data).digest(),
            output_hash=hashlib.sha256(answered.tobytes()).digest(),
            end_position=end_position,
        )

    def against(self, reference: Floats, limits: Limits, *, is_trusted: bool) -> Evidence:
        """With what it was compared with."""
        return replace(
            self,
            reference_hash=hashlib.sha256(reference.tobytes()).digest(),
            limits=limits,
            is_by_reference=is_trusted,
        )
