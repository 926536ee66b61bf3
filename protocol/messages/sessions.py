"""What client and hops say in a session: opening, steps, healing, and what is asked before it."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.messages.fields import (
    DIGEST_BYTES,
    MAX_BLOCKS,
    MAX_DEADLINE_MS,
    MAX_HOPS,
    MAX_OBJECT_BYTES,
    MAX_PASSPORT_BYTES,
    MAX_POLICY_BYTES,
    MAX_ROWS,
    MAX_STEP,
    MAX_TOKENS,
    PEER,
    PUBLIC_KEY_BYTES,
    REVISION_BYTES,
    SESSION_ID_BYTES,
    SIGNATURE_BYTES,
    SWARM_ID_BYTES,
    Array,
    Bytes,
    Message,
    TensorField,
    Text,
    Uint,
    wire,
)
from swarm.protocol.tensors import WireTensor


# --- first message of every stream ---------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The versions that the dialling side speaks. ``software`` is only information."""

    TAG = 1
    minimum_version: int = wire(1, Uint(65535))
    maximum_version: int = wire(2, Uint(65535))
    software: str = wire(3, Text(64), "")
    passport: bytes = wire(10, Bytes(0, MAX_PASSPORT_BYTES), b"")
    """The sender's, in a swarm with a charter; empty: it has none."""
    swarm_id: bytes = wire(11, Bytes(0, SWARM_ID_BYTES), b"")
    """Of its charter; empty: it has none."""


@dataclass(frozen=True, slots=True)
class HelloReply(Message):
    """The highest version in common; it holds for the rest of the stream."""

    TAG = 2
    version: int = wire(1, Uint(65535))
    software: str = wire(2, Text(64), "")
    passport: bytes = wire(10, Bytes(0, MAX_PASSPORT_BYTES), b"")
    swarm_id: bytes = wire(11, Bytes(0, SWARM_ID_BYTES), b"")


# --- opening a session ---------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class OpenSession(Message):
    """Client to hop: reserve a cache of ``rows x maximum_tokens`` for ``[first_block, end_block)``.

    ``left_padding`` (empty, or one count per row) says how many leading positions of each row are
    padding and must never be attended to. ``previous_peer`` is the only peer whose activations the
    session accepts; for the first hop it is the client itself.
    """

    TAG = 3
    model_revision: bytes = wire(1, Bytes(REVISION_BYTES, REVISION_BYTES))
    first_block: int = wire(2, Uint(MAX_BLOCKS))
    end_block: int = wire(3, Uint(MAX_BLOCKS))
    rows: int = wire(4, Uint(MAX_ROWS))
    maximum_tokens: int = wire(5, Uint(MAX_TOKENS))
    wire_dtype: int = wire(6, Uint(255))
    wire_encoding: int = wire(7, Uint(255))
    previous_peer: str = wire(8, PEER)
    left_padding: tuple[int, ...] = wire(9, Array(Uint(MAX_TOKENS), MAX_ROWS), ())
    first_step: int = wire(10, Uint(MAX_STEP), 1)
    """Number of the first step that this hop will see; above 1 when it takes another's place."""
    state_from: str = wire(11, PEER, "")
    """The only peer that may hand this session's state over; empty: nobody."""
    adapter_id: bytes = wire(20, Bytes(0, DIGEST_BYTES), b"")
    """The adapter to compute with; empty: the bare model. A hop that lacks it refuses."""
    policy: bytes = wire(40, Bytes(0, MAX_POLICY_BYTES), b"")
    """Who may see anything of the session, as ``policy`` writes it; empty: everybody."""
    allowance: bytes = wire(30, Bytes(0, MAX_OBJECT_BYTES), b"")
    """Payload of the allowance that the session's vouchers draw on; empty: there are none."""
    allowance_signature: bytes = wire(31, Bytes(0, SIGNATURE_BYTES), b"")
    allowance_issuer: bytes = wire(32, Bytes(0, PUBLIC_KEY_BYTES), b"")
    """Public key of who signed it."""


@dataclass(frozen=True, slots=True)
class SessionOpened(Message):
    """Hop to client. ``session_id`` is made by the hop and valid on this hop only."""

    TAG = 4
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    maximum_step_tokens: int = wire(2, Uint(MAX_TOKENS))
    """Most ``rows x tokens`` in one step."""
    maximum_steps_in_flight: int = wire(3, Uint(1024))
    free_cache_tokens: int = wire(4, Uint(MAX_STEP), 0)
    adapter_id: bytes = wire(20, Bytes(0, DIGEST_BYTES), b"")
    """As asked for. A hop that does not know adapters leaves it out, and the client leaves it."""
    keeps_books: int = wire(30, Uint(1), 0)
    """1: it took the allowance and wants vouchers."""
    mflop_per_block_token: int = wire(31, Uint(MAX_STEP), 0)
    """What it counts a token through one block for."""
    dtype_class: str = wire(32, Text(16), "")
    """The precision that its answers are held to when they are audited."""
    takes_renewals: int = wire(33, Uint(1), 0)
    """1: RenewAllowance may take the place of the allowance."""


@dataclass(frozen=True, slots=True)
class SetRoute(Message):
    """Client to hop: where the outputs of this session go.

    An empty ``next_peer`` means back to the client on this very stream (the last hop).
    ``route_version`` grows with every change of the route. No address: the hop dials only peers
    that it finds in the directory as hosts of the same model, so that nobody can aim it elsewhere.

    When the next hop takes the place of one that failed, the hop first replays its journal of the
    positions ``0 .. replay_end`` to it, then sends the steps from ``resume_step`` on that it still
    keeps again, and only then goes on. It refuses with JOURNAL_GONE what it no longer has.
    """

    TAG = 5
    route_version: int = wire(1, Uint(MAX_STEP))
    next_peer: str = wire(2, PEER, "")
    next_session_id: bytes = wire(3, Bytes(0, SESSION_ID_BYTES), b"")
    resume_step: int = wire(4, Uint(MAX_STEP), 0)
    """The first step to send again; 0: none."""
    replay_end: int = wire(5, Uint(MAX_TOKENS), 0)
    """How many positions of the journal to replay, or all that there are; 0: none."""
    forward_replays: int = wire(6, Uint(1), 0)
    """1: the next hop lacks what this hop gets replayed; pass the outputs on as replays."""
    prepare: int = wire(7, Uint(1), 0)
    """1: only attach to the next hop; the same route set again without this goes into force."""


@dataclass(frozen=True, slots=True)
class RouteReady(Message):
    """Hop to client: the next hop has accepted the attachment."""

    TAG = 6
    route_version: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Hop to next hop: this stream carries the steps of your session ``session_id``."""

    TAG = 7
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    route_version: int = wire(2, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Attached(Message):
    """Next hop to hop: the stream belongs to the session; steps may follow."""

    TAG = 8
    route_version: int = wire(1, Uint(MAX_STEP))


# --- steps ---------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Step(Message):
    """New tokens for a session: activations ``[rows, tokens, hidden]`` at ``position``.

    A position below what is cached drops the rest of the cache first (rollback). ``row_order``
    (empty, or one source row for each row) permutes the cache before the step (beam search).
    ``output_tokens`` (at least 1) is how many trailing positions the client wants back from the
    last hop; hops in between always get all of them. ``hop_queue_us`` and ``hop_compute_us`` have
    one entry per hop passed so far.
    """

    TAG = 9
    step: int = wire(1, Uint(MAX_STEP))
    position: int = wire(2, Uint(MAX_TOKENS))
    output_tokens: int = wire(3, Uint(MAX_TOKENS))
    activations: WireTensor = wire(4, TensorField())
    row_order: tuple[int, ...] = wire(5, Array(Uint(MAX_ROWS - 1), MAX_ROWS), ())
    deadline_ms: int = wire(6, Uint(MAX_DEADLINE_MS), 0)
    """What is left of the client's deadline when this is sent; 0 means none."""
    hop_queue_us: tuple[int, ...] = wire(7, Array(Uint(MAX_STEP), MAX_HOPS), ())
    hop_compute_us: tuple[int, ...] = wire(8, Array(Uint(MAX_STEP), MAX_HOPS), ())


@dataclass(frozen=True, slots=True)
class StepResult(Message):
    """Last hop to client: the last positions, ``[rows, output_tokens, hidden]``."""

    TAG = 10
    step: int = wire(1, Uint(MAX_STEP))
    position: int = wire(2, Uint(MAX_TOKENS))
    activations: WireTensor = wire(3, TensorField())
    hop_queue_us: tuple[int, ...] = wire(4, Array(Uint(MAX_STEP), MAX_HOPS), ())
    hop_compute_us: tuple[int, ...] = wire(5, Array(Uint(MAX_STEP), MAX_HOPS), ())


# --- any time ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Error(Message):
    """Something was refused or failed; ``step`` (if not 0) names the step that it concerns."""

    TAG = 11
    code: int = wire(1, Uint(65535))
    retry_after_ms: int = wire(2, Uint(MAX_DEADLINE_MS), 0)
    text: str = wire(3, Text(128), "")
    step: int = wire(4, Uint(MAX_STEP), 0)
    route_version: int = wire(5, Uint(MAX_STEP), 0)
    """The route that it concerns; 0: none. An error about an older route is of no interest."""


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there? Allowed at any time after ``HelloReply``."""

    TAG = 12
    nonce: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """Here I am. On a control stream it also says how far the session's steps have come."""

    TAG = 13
    nonce: int = wire(1, Uint(MAX_STEP))
    received_step: int = wire(2, Uint(MAX_STEP), 0)
    """The latest step that arrived; a chain that stands still breaks where this falls."""
    computed_step: int = wire(3, Uint(MAX_STEP), 0)
    unix_ms: int = wire(4, Uint(MAX_STEP), 0)
    """What the sender's clock says; 0: it does not tell."""


@dataclass(frozen=True, slots=True)
class CloseSession(Message):
    """Client to hop: free everything of this session."""

    TAG = 14


@dataclass(frozen=True, slots=True)
class SessionClosed(Message):
    """Hop to client: everything is freed. A stream that stops without this broke."""

    TAG = 15


# --- healing: a hop that failed is replaced ------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SetPrevious(Message):
    """Client to hop: from now on the session's activations come from ``previous_peer``.

    The hop takes steps of the former peer until the new one has sent its first.
    """

    TAG = 16
    route_version: int = wire(1, Uint(MAX_STEP))
    previous_peer: str = wire(2, PEER)


@dataclass(frozen=True, slots=True)
class PreviousSet(Message):
    """Hop to client: the new previous hop may attach."""

    TAG = 17
    route_version: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Replay(Message):
    """Hop to a hop that lacks them: activations ``[rows, tokens, hidden]`` of steps long done.

    They fill the cache like a step but have no number and no result. ``rows_as_of_step``: the rows
    are already in the order that this step and those before it asked for.
    """

    TAG = 18
    position: int = wire(1, Uint(MAX_TOKENS))
    activations: WireTensor = wire(2, TensorField())
    rows_as_of_step: int = wire(3, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Replayed(Message):
    """Hop to client: so many positions are in the cache again."""

    TAG = 19
    length: int = wire(1, Uint(MAX_TOKENS))


# --- questions -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class AskLoad(Message):
    """First message of a stream: would you serve ``tokens`` (rows x positions) of these blocks?"""

    TAG = 20
    model_revision: bytes = wire(1, Bytes(REVISION_BYTES, REVISION_BYTES))
    first_block: int = wire(2, Uint(MAX_BLOCKS))
    end_block: int = wire(3, Uint(MAX_BLOCKS))
    tokens: int = wire(4, Uint(MAX_STEP))
    adapter_id: bytes = wire(20, Bytes(0, DIGEST_BYTES), b"")
    """With this adapter; empty: with none."""


@dataclass(frozen=True, slots=True)
class LoadReport(Message):
    """How busy a node is at this moment."""

    TAG = 21
    accepting: int = wire(1, Uint(1))
    """0: it takes no new sessions, or not these blocks, or has not the room."""
    queued_steps: int = wire(2, Uint(MAX_STEP))
    cache_tokens_free: int = wire(3, Uint(MAX_STEP))
    busy_permille: int = wire(4, Uint(1000))
    """Share of the last seconds in which the device worked."""
    sessions: int = wire(5, Uint(MAX_STEP))
    has_adapter: int = wire(20, Uint(1), 0)
    """1: the adapter that was asked for is loaded."""


@dataclass(frozen=True, slots=True)
class ProbePeer(Message):
    """Client to hop, on the session's control stream: can you reach this hop of the session?"""

    TAG = 22
    peer: str = wire(1, PEER)


@dataclass(frozen=True, slots=True)
class ProbeReport(Message):
    """Hop to client: whether ``peer`` answered a ping."""

    TAG = 23
    peer: str = wire(1, PEER)
    reachable: int = wire(2, Uint(1))
