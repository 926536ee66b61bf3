"""Who speaks: requests are signed by the participant's key, answers by the aggregator's. Pure.

A request's signature covers the federation, method, path (which names round and phase), time and
the hash of the body, so it is checked before a byte of the body is read, and is worth nothing in
another round, phase or federation. An answer's covers the request's signature and the answer's
hash. The time bounds how long a request can be repeated by somebody who overheard it; repeating
changes nothing (``rounds``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import Identity, PeerId, verify

REQUEST_CONTEXT = b"federated request v1"
ANSWER_CONTEXT = b"federated answer v1"
PEER, TIME, BODY, SIGNATURE = "Swarm-Peer", "Swarm-Time", "Swarm-Body", "Swarm-Signature"
LONGEST_SKEW_S = 300
_DIGITS = re.compile("[0-9]{1,12}")
_HASH = re.compile("[0-9a-f]{64}")
_SIGNED = re.compile("[0-9a-f]{128}")


def request_headers(
    identity: Identity, federation_id: bytes, method: str, path: str, body: bytes, unix_s: int
) -> dict[str, str]:
    """What goes with a request; ``path`` is from ``/v1`` on, with its query."""
    digest = hashlib.sha256(body).hexdigest()
    signed = _request_bytes(federation_id, method, path, str(unix_s), digest)
    return {
        PEER: identity.peer_id,
        TIME: str(unix_s),
        BODY: digest,
        SIGNATURE: identity.sign(REQUEST_CONTEXT, signed).hex(),
    }


def check_request(
    headers: Mapping[str, str],
    federation_id: bytes,
    invited: Collection[PeerId],
    method: str,
    path: str,
    unix_s: float,
) -> tuple[PeerId, str]:
    """Who asks, and the hash in hexadecimal that the body must have.

    Raises ProtocolError: NOT_NAMED_BY_SESSION for strangers, NOT_VALID_NOW for old requests,
    BAD_SIGNATURE.
    """
    peer = PeerId(headers.get(PEER, ""))
    if peer not in invited:
        raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "not invited")
    time_text, digest = headers.get(TIME, ""), headers.get(BODY, "")
    signature = headers.get(SIGNATURE, "")
    if not (
        _DIGITS.fullmatch(time_text) and _HASH.fullmatch(digest) and _SIGNED.fullmatch(signature)
    ):
        raise ProtocolError(ErrorCode.BAD_FIELD, "headers of no signed request")
    signed = _request_bytes(federation_id, method, path, time_text, digest)
    _verify(peer, REQUEST_CONTEXT, signed, signature)
    if abs(int(time_text) - unix_s) > LONGEST_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "signed at another time; check the clocks")
    return peer, digest


def answer_headers(identity: Identity, request_signature: str, body: bytes) -> dict[str, str]:
    """``request_signature`` is empty for requests without one."""
    signed = _answer_bytes(request_signature, body)
    return {SIGNATURE: identity.sign(ANSWER_CONTEXT, signed).hex()}


def check_answer(
    headers: Mapping[str, str], aggregator: PeerId, request_signature: str, body: bytes
) -> None:
    """Raises ProtocolError(BAD_SIGNATURE) when the answer is not the aggregator's."""
    signature = headers.get(SIGNATURE, "")
    if not _SIGNED.fullmatch(signature):
        raise ProtocolError(ErrorCode.BAD_SIGNATURE, "an answer that is not signed")
    _verify(aggregator, ANSWER_CONTEXT, _answer_bytes(request_signature, body), signature)


def _verify(peer: PeerId, context: bytes, signed: bytes, signature: str) -> None:
    try:
        verify(peer, context, signed, bytes.fromhex(signature))
    except ProtocolError as error:
        raise ProtocolError(ErrorCode.BAD_SIGNATURE) from error


def _request_bytes(federation_id: bytes, method: str, path: str, time: str, digest: str) -> bytes:
    return "\n".join((federation_id.hex(), method, path, time, digest)).encode()


def _answer_bytes(request_signature: str, body: bytes) -> bytes:
    return request_signature.encode() + b"\n" + hashlib.sha256(body).digest()
