"""What work is worth: units from the model's size and a versioned price table, never from claims.

One unit is one MFLOP-equivalent of canonical work, whatever the hardware and its precision; 10^9
units are one credit. All arithmetic is on integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import Work
from swarm.protocol.strict_json import MAX_INTEGER

UNITS_PER_CREDIT = 10**9
REFERENCE_CONTEXT = 2048
"""Positions that a token attends to, for the price of a block."""


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Weights of the kinds of work; an allowance names the ``epoch`` that it pays by."""

    epoch: int
    prefill_weight: int = 1
    decode_weight: int = 10
    """Decoding is bound by memory traffic: a token alone costs what a dozen together do."""
    backward_weight: int = 2
    bytes_per_unit: int = 32
    fee_permille: int = 30
    royalty_permille: int = 50

    def units(self, work: Work, *, blocks: int, mflop_per_block_token: int) -> int:
        """The price of cumulative work. Raises ProtocolError(OVER_LIMIT) beyond 2^53 - 1."""
        weighted = (
            self.prefill_weight * work.prefill_tokens
            + self.decode_weight * work.decode_tokens
            + self.backward_weight * work.backward_tokens
        )
        units = blocks * mflop_per_block_token * weighted + work.moved_bytes // self.bytes_per_unit
        if units > MAX_INTEGER:
            raise ProtocolError(ErrorCode.OVER_LIMIT, "more than can be counted")
        return units


PRICE_TABLES: dict[int, PriceTable] = {1: PriceTable(epoch=1)}
"""Tables that every peer knows; an operator may publish others."""
CURRENT_EPOCH = 1


def price_table(epoch: int) -> PriceTable:
    """Raises ProtocolError(BAD_FIELD) for an epoch that nobody has published."""
    table = PRICE_TABLES.get(epoch)
    if table is None:
        raise ProtocolError(ErrorCode.BAD_FIELD, f"unknown price epoch {epoch}")
    return table


def mflop_per_block_token(active_parameters: int, attention_width: int) -> int:
    """Canonical MFLOP of one token through one block, at least 1.

    ``active_parameters`` of a block take part in one multiplication and one addition each;
    ``attention_width`` (query heads times head size) meets every key and value of the reference
    context.
    """
    attention = 4 * attention_width * REFERENCE_CONTEXT
    return max(1, (2 * active_parameters + attention) // 10**6)


def step_work(rows: int, tokens: int) -> Work:
    """The work of one forward pass of ``tokens`` new positions for each of ``rows`` rows.

    The first position of each row pays for reading the weights and counts as decoding; those that
    come along in the same pass (a prompt, drafts to verify) cost as much as prefill.
    """
    return Work(prefill_tokens=rows * (tokens - 1), decode_tokens=rows)
