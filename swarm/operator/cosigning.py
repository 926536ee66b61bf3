"""Asks witnesses to cosign a checkpoint, each with the proof that it follows the one before."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from swarm.ledger.notes import (
    MAX_NOTE_BYTES,
    Checkpoint,
    Note,
    Signature,
    VerifierKey,
    decimal,
    parse_signatures,
)
from swarm.operator.settings import Witness
from swarm.protocol.errors import ErrorCode, ProtocolError

logger = logging.getLogger(__name__)

WITNESS_TIMEOUT_S = 20.0

ConsistencyProof = Callable[[int], Awaitable[Sequence[bytes]]]
"""From an older size to the proof that the checkpoint continues it."""


def submission(old_size: int, proof: Sequence[bytes], note: Note) -> bytes:
    """The body of C2SP's add-checkpoint."""
    hashes = "".join(base64.b64encode(digest).decode() + "\n" for digest in proof)
    return f"old {old_size}\n{hashes}\n{note}".encode()


async def cosignatures(
    session: aiohttp.ClientSession,
    witnesses: Sequence[Witness],
    known_sizes: dict[bytes, int],
    note: Note,
    proof: ConsistencyProof,
) -> list[Signature]:
    """What the witnesses answered, checked; who does not answer is missing from it.

    ``known_sizes`` is what each witness has seen, by key id; it is brought up to date.
    """
    answers = await asyncio.gather(
        *(_cosignature(session, witness, known_sizes, note, proof) for witness in witnesses)
    )
    return [answer for answer in answers if answer is not None]


async def _cosignature(
    session: aiohttp.ClientSession,
    witness: Witness,
    known_sizes: dict[bytes, int],
    note: Note,
    proof: ConsistencyProof,
) -> Signature | None:
    size = Checkpoint.parse(note.text).size
    key_id = witness.key.key_id
    try:
        for _ in range(2):
            old_size = known_sizes.get(key_id, 0)
            if old_size > size:
                logger.error("witness %s has seen a longer log: were books restored?", witness.url)
                return None
            body = submission(old_size, await proof(old_size), note)
            status, text = await _post(session, f"{witness.url}/add-checkpoint", body)
            if status != 409:
                break
            known_sizes[key_id] = decimal(text.strip())
        if status != 200:
            logger.warning("witness %s refused with status %d", witness.url, status)
            return None
        signature = _by(witness.key, note, text)
        known_sizes[key_id] = size
        return signature
    except (aiohttp.ClientError, TimeoutError, ProtocolError, UnicodeDecodeError) as error:
        logger.warning("witness %s: %s", witness.url, type(error).__name__)
        return None


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[int, str]:
    async with asyncio.timeout(WITNESS_TIMEOUT_S), session.post(url, data=body) as response:
        answer = await response.content.read(MAX_NOTE_BYTES)
        return response.status, answer.decode()


def _by(key: VerifierKey, note: Note, lines: str) -> Signature:
    answered = Note(note.text, parse_signatures(lines)).verified_by([key])
    if not answered:
        raise ProtocolError(ErrorCode.BAD_SIGNATURE, "the witness has not signed")
    return answered[0]
