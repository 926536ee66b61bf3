"""Every error of the project, split by who has to act.

::

    SwarmError
    |-- UsageError            we, or our user, asked for something that makes no sense
    |   |-- CheckpointError       the model's files are missing, incomplete or of an unknown family
    |   |-- AdapterError          an adapter's files are refused, or do not fit the model
    |   |-- CapacityError         this computer has not the memory for what was asked
    |   `-- ConfigError           a setting is wrong
    |-- ProtocolError         a peer broke the protocol; the peer is to blame
    |   |-- DecodeError           bytes that are no valid message
    |   `-- RecordError           a directory record that must be dropped
    |-- RemoteError           a peer answered with an error code
    |-- NetworkError          nobody is to blame: the link or the peer is gone
    |   `-- PeerUnreachable       could not even be dialled
    |-- AllowanceRefused      the operator grants the account that has to pay nothing now
    `-- NoRouteError          the swarm cannot serve this now (which blocks, or when to retry)
        |-- PolicyUnmet           nobody that the session's policy allows serves it
        `-- GenerationInterrupted  the same in mid-answer; has the tokens to go on from

Only an :class:`ErrorCode`, a retry hint and a fixed text from :data:`ERROR_TEXTS` cross the wire.
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """Codes on the wire. A removed code stays listed and is never given a new meaning."""

    INTERNAL = 1
    BAD_FRAME = 2
    UNKNOWN_MESSAGE = 3
    BAD_FIELD = 4
    TOO_LARGE = 5
    UNSUPPORTED_VERSION = 6
    UNEXPECTED_MESSAGE = 7
    UNKNOWN_MODEL = 8
    BLOCKS_NOT_HOSTED = 9
    UNKNOWN_SESSION = 10
    NOT_NAMED_BY_SESSION = 11
    NO_CAPACITY = 12
    TOO_MANY_SESSIONS = 13
    BAD_STEP = 14
    STALE_STEP = 15
    GAP = 16
    BAD_POSITION = 17
    BAD_TENSOR = 18
    NOT_FINITE = 19
    NEXT_HOP_LOST = 20
    PREVIOUS_HOP_LOST = 21
    DEADLINE_PASSED = 22
    TOO_SLOW = 23
    SESSION_EXPIRED = 24
    DRAINING = 25
    UNSUPPORTED_DTYPE = 26
    TOO_MANY_STEPS = 27
    NEXT_HOP_UNKNOWN = 28
    JOURNAL_GONE = 29
    INPUT_NOT_FINITE = 30
    ADAPTER_MISSING = 35
    ADAPTER_REFUSED = 36
    ADAPTER_NO_ROOM = 37
    TRAINING_NOT_OFFERED = 40
    UNKNOWN_MICRO_BATCH = 41
    BAD_STATE = 42
    WRONG_OPTIMIZER_STEP = 43
    UNKNOWN_MANIFEST = 50
    CHUNK_NOT_HELD = 51
    TOO_MANY_UPLOADS = 52
    VOUCHER_MISSING = 55
    BAD_SIGNATURE = 56
    FOREIGN_OBJECT = 57
    NOT_VALID_NOW = 58
    ROLLED_BACK = 59
    EQUIVOCATION = 60
    OVER_LIMIT = 61
    BAD_PROOF = 62
    WRONG_SWARM = 63
    PASSPORT_MISSING = 64
    PASSPORT_INVALID = 65
    PASSPORT_EXPIRED = 66
    PASSPORT_REVOKED = 67
    OUTSIDE_POLICY = 68
    INVITATION_USED_UP = 69


ERROR_TEXTS: dict[ErrorCode, str] = {
    ErrorCode.INTERNAL: "the node failed; try another node",
    ErrorCode.BAD_FRAME: "the bytes are no valid frame",
    ErrorCode.UNKNOWN_MESSAGE: "unknown message tag",
    ErrorCode.BAD_FIELD: "a field is missing or has a wrong type or value",
    ErrorCode.TOO_LARGE: "larger than this node accepts",
    ErrorCode.UNSUPPORTED_VERSION: "no protocol version in common; update the older side",
    ErrorCode.UNEXPECTED_MESSAGE: "this message is not allowed now",
    ErrorCode.UNKNOWN_MODEL: "this node does not host that model revision",
    ErrorCode.BLOCKS_NOT_HOSTED: "this node does not host these blocks",
    ErrorCode.UNKNOWN_SESSION: "no such session on this node",
    ErrorCode.NOT_NAMED_BY_SESSION: "the session did not name this peer",
    ErrorCode.NO_CAPACITY: "no room for this session now; retry later",
    ErrorCode.TOO_MANY_SESSIONS: "too many sessions from this peer",
    ErrorCode.BAD_STEP: "step number out of order",
    ErrorCode.STALE_STEP: "the result of this step is no longer kept",
    ErrorCode.GAP: "steps before this one are missing",
    ErrorCode.BAD_POSITION: "position outside of the session",
    ErrorCode.BAD_TENSOR: "tensor does not fit the session",
    ErrorCode.NOT_FINITE: "activations are not finite or too large",
    ErrorCode.NEXT_HOP_LOST: "the next hop is gone",
    ErrorCode.PREVIOUS_HOP_LOST: "the previous hop is gone",
    ErrorCode.DEADLINE_PASSED: "the deadline has passed",
    ErrorCode.TOO_SLOW: "the peer sends too slowly",
    ErrorCode.SESSION_EXPIRED: "the session was idle for too long or lived for too long",
    ErrorCode.DRAINING: "this node is leaving and takes no new sessions",
    ErrorCode.UNSUPPORTED_DTYPE: "dtype or encoding not supported",
    ErrorCode.TOO_MANY_STEPS: "too many steps in flight",
    ErrorCode.NEXT_HOP_UNKNOWN: "the directory knows no such host of this model",
    ErrorCode.JOURNAL_GONE: "this hop no longer has what it sent on",
    ErrorCode.INPUT_NOT_FINITE: "activations that arrived are not finite or too large",
    ErrorCode.ADAPTER_MISSING: "this node does not have the adapter",
    ErrorCode.ADAPTER_REFUSED: "the adapter is damaged or does not fit the model",
    ErrorCode.ADAPTER_NO_ROOM: "no room for another adapter now; retry later",
    ErrorCode.TRAINING_NOT_OFFERED: "this node does not train",
    ErrorCode.UNKNOWN_MICRO_BATCH: "no such micro-batch on this node",
    ErrorCode.BAD_STATE: "the state does not fit the training session",
    ErrorCode.WRONG_OPTIMIZER_STEP: "gradients or steps are missing before this one",
    ErrorCode.VOUCHER_MISSING: "more work than vouchers cover",
    ErrorCode.BAD_SIGNATURE: "the signature is wrong, or not of whom it should be",
    ErrorCode.FOREIGN_OBJECT: "the object is about another node, session, allowance or model",
    ErrorCode.NOT_VALID_NOW: "not valid yet, or no longer",
    ErrorCode.ROLLED_BACK: "less than was signed before",
    ErrorCode.EQUIVOCATION: "another object was signed under the same number",
    ErrorCode.OVER_LIMIT: "more than the allowance grants",
    ErrorCode.BAD_PROOF: "the proof does not hold",
    ErrorCode.WRONG_SWARM: "this peer belongs to another swarm",
    ErrorCode.PASSPORT_MISSING: "this swarm admits only peers with a passport of its authority",
    ErrorCode.PASSPORT_INVALID: "the passport is not valid for this peer in this swarm",
    ErrorCode.PASSPORT_EXPIRED: "the passport is not valid now",
    ErrorCode.PASSPORT_REVOKED: "the passport was revoked",
    ErrorCode.OUTSIDE_POLICY: "the session's policy keeps this peer out",
    ErrorCode.INVITATION_USED_UP: "the invitation is not valid here, has expired or is used up",
    ErrorCode.UNKNOWN_MANIFEST: "this peer knows no such manifest",
    ErrorCode.CHUNK_NOT_HELD: "this peer does not hold that chunk",
    ErrorCode.TOO_MANY_UPLOADS: "this peer sends to as many as it may; retry later",
}


class SwarmError(Exception):
    """Root of all errors that this project raises on purpose."""


class UsageError(SwarmError):
    """The caller asked for something impossible; the text says what to do instead."""


class CheckpointError(UsageError):
    """A model's files are missing, incomplete, damaged or of a family that is not supported."""


class AdapterError(UsageError):
    """An adapter's files are missing, damaged, not allowed or made for another model."""


class CapacityError(UsageError):
    """This computer has not enough memory for the blocks or the cache that were asked for."""


class ConfigError(UsageError):
    """A setting is unknown, malformed or contradicts another one."""


class ProtocolError(SwarmError):
    """A peer broke the protocol. ``code`` is what it is told."""

    def __init__(self, code: ErrorCode, detail: str = "") -> None:
        self.code = code
        self.detail = detail  # for our own log; never sent
        super().__init__(f"{code.name}: {detail or ERROR_TEXTS[code]}")


class DecodeError(ProtocolError):
    """Bytes from a peer are no valid message."""


class RecordError(ProtocolError):
    """A directory record whose signature, owner, schema, size or expiry does not fit."""

    def __init__(self, detail: str) -> None:
        super().__init__(ErrorCode.BAD_FIELD, detail)


class RemoteError(SwarmError):
    """A peer answered with an error code."""

    def __init__(self, code: ErrorCode, *, peer: str = "", retry_after_ms: int = 0) -> None:
        self.code = code
        self.peer = peer
        self.retry_after_ms = retry_after_ms
        super().__init__(f"{peer or 'peer'}: {ERROR_TEXTS[code]}")


class NetworkError(SwarmError):
    """The link or the peer is gone, or did not answer in time."""


class PeerUnreachable(NetworkError):
    """The peer could not be dialled."""


class NoRouteError(SwarmError):
    """The swarm cannot serve the request now. ``missing_blocks`` are covered by nobody."""

    def __init__(
        self, message: str, *, missing_blocks: tuple[int, ...] = (), retry_after_ms: int = 0
    ) -> None:
        self.missing_blocks = missing_blocks
        self.retry_after_ms = retry_after_ms
        super().__init__(message)


class PolicyUnmet(NoRouteError):
    """What the session's policy allows is not enough; nobody else was asked for anything."""

    def __init__(
        self,
        message: str,
        *,
        missing_blocks: tuple[int, ...] = (),
        retry_after_ms: int = 0,
        is_final: bool = False,
    ) -> None:
        """``is_final``: it stays so, whoever joins."""
        self.is_final = is_final
        super().__init__(message, missing_blocks=missing_blocks, retry_after_ms=retry_after_ms)


class AllowanceRefused(SwarmError):
    """The operator's word about the account that has to pay for a session."""

    def __init__(self, *, is_used_up: bool) -> None:
        """``is_used_up``: nothing is left; otherwise the operator does not accept the account."""
        self.is_used_up = is_used_up
        super().__init__(
            "the account has nothing left at the operator"
            if is_used_up
            else "the operator does not accept the account"
        )


class GenerationInterrupted(NoRouteError):
    """Blocks were lost in mid-answer and nobody else has them.

    ``token_ids`` are those of each row up to here, the prompt's included: a session, this one or a
    new one, can go on from them when nodes with these blocks are back.
    """

    def __init__(self, cause: NoRouteError, token_ids: tuple[tuple[int, ...], ...]) -> None:
        self.token_ids = token_ids
        super().__init__(
            str(cause),
            missing_blocks=cause.missing_blocks,
            retry_after_ms=cause.retry_after_ms,
        )
