"""All messages that peers exchange on streams, and the bounds of every field.

A message is a frozen dataclass with an explicit numeric tag; its fields are numbered too. Neither
is derived from a Python name, so that renaming is free and reusing a number is a visible mistake.
Removed numbers stay in ``RETIRED_TAGS`` and are never given out again.

How messages become bytes: ``codec``. Which message may follow which: ``session``. The text for
other implementations: ``docs/protocol.md``.

The life of a session, client ``C`` and hops ``1 .. h``::

    C -> i    Hello, OpenSession        answered by HelloReply, SessionOpened (for every hop i)
    C -> i    SetRoute(next hop)        hop i dials the next hop:
    i -> i+1  Hello, Attach             answered by HelloReply, Attached
    i -> C    RouteReady
    C -> 1    Step                      activations of new tokens, numbered
    i -> i+1  Step                      straight on to the next hop, never back through C
    h -> C    StepResult
    C -> i    CloseSession              answered by SessionClosed, the explicit end of a stream

When hop ``k`` fails, fresh hops take its place; ``a`` is the oldest step without a result::

    C -> f    Hello, OpenSession(first_step=a)
    C -> k+1  SetPrevious(f)            answered by PreviousSet
    C -> f    SetRoute(k+1)             f dials hop k+1, as above
    C -> k-1  SetRoute(f, replay)       hop k-1 dials f
    k-1 -> f  Replay ...                its journal; then again Step a and those after it
    f -> C    Replayed ...
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

from swarm.protocol.tensors import WireTensor

# --- bounds that hold for every peer (a node may announce tighter ones) ---------------------------
MAX_HEADER_BYTES = 64 * 1024
"""Largest msgpack map of one message."""
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024
"""Largest tensor of one message, as sent and as decompressed. Longer prompts: several steps."""
MAX_BLOCKS = 1024
MAX_ROWS = 64
MAX_TOKENS = 1 << 22
MAX_HOPS = 64
MAX_STEP = (1 << 53) - 1
MAX_DEADLINE_MS = 10 * 60 * 1000
SESSION_ID_BYTES = 16
REVISION_BYTES = 32
DIGEST_BYTES = 32
"""SHA-256."""
SWARM_ID_BYTES = 32
MAX_PASSPORT_BYTES = 768
"""A chain of two certificates."""
MAX_POLICY_BYTES = 2048
MAX_CHUNKS = 1 << 20
"""In all parts of one manifest."""
MAX_OBJECT_BYTES = 4096
"""Payload of a signed object of the ledger."""
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
LINK_BYTES = 3 * 8 + 2 * DIGEST_BYTES
"""One link of a transcript: step, position, tokens, hash of the input, hash of the output."""


# --- field specifications ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Uint:
    """Unsigned integer in ``0 .. maximum``; booleans are refused."""

    maximum: int


@dataclass(frozen=True, slots=True)
class Real:
    """Double-precision number in ``minimum .. maximum``; integers and NaN are refused."""

    minimum: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Bytes:
    """Byte string whose length is in ``minimum .. maximum``."""

    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Text:
    """UTF-8 text of at most ``maximum_bytes`` bytes without control characters."""

    maximum_bytes: int


@dataclass(frozen=True, slots=True)
class Array:
    """At most ``maximum_length`` items of one kind; a tuple in Python."""

    item: Uint | Bytes | Text
    maximum_length: int


@dataclass(frozen=True, slots=True)
class TensorField:
    """The message's one tensor: dtype, encoding and shape in the header, bytes in the payload."""


@dataclass(frozen=True, slots=True)
class BlobField:
    """The message's one byte string that is too long for a header: 1 to ``maximum_bytes`` bytes.

    The header has its size, the payload its bytes.
    """

    maximum_bytes: int


Spec = Uint | Real | Bytes | Text | Array | TensorField | BlobField


@dataclass(frozen=True, slots=True)
class WireField:
    number: int
    spec: Spec


def wire(number: int, spec: Spec, default: Any = MISSING) -> Any:
    """Declare a field: its number on the wire, its bounds, and its value when a sender omits it."""
    metadata = {"wire": WireField(number, spec)}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class Message:
    """Base of all messages; ``TAG`` is its number on the wire."""

    TAG: ClassVar[int]


PEER = Text(64)
"""A libp2p peer id in base58 (``12D3KooW...``)."""


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


# --- hand-over: a node that leaves gives its sessions to another one -----------------------------
@dataclass(frozen=True, slots=True)
class Draining(Message):
    """Hop to client: this node leaves; name a replacement within ``wait_ms``."""

    TAG = 24
    wait_ms: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class HandOver(Message):
    """Client to leaving hop: move the state of this session to ``peer``'s ``session_id``.

    Without ``final`` the hop sends what it has so far and goes on computing. With it the client
    promises that no step is in flight: the hop sends the rest and has done its part.
    """

    TAG = 25
    peer: str = wire(1, PEER)
    session_id: bytes = wire(2, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    final: int = wire(3, Uint(1), 0)


@dataclass(frozen=True, slots=True)
class HandedOver(Message):
    """Leaving hop to client: ``length`` positions are moved; the receiver must have ``digest``."""

    TAG = 26
    length: int = wire(1, Uint(MAX_TOKENS))
    digest: bytes = wire(2, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    code: int = wire(3, Uint(65535), 0)
    """Why it failed; 0: it did not. The session goes on at the leaving hop until it ends."""


@dataclass(frozen=True, slots=True)
class TakeOver(Message):
    """First message of a stream, leaving hop to replacement: state of your session follows."""

    TAG = 27
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))


@dataclass(frozen=True, slots=True)
class CacheChunk(Message):
    """Keys and values of blocks ``[first_block, end_block)`` from ``position`` on.

    ``content`` is ``[blocks x rows x 2 x heads, tokens, head size]``: of each block and row first
    the keys, then the values; in the dtype of the cache. What was there before is overwritten.
    """

    TAG = 28
    first_block: int = wire(1, Uint(MAX_BLOCKS))
    end_block: int = wire(2, Uint(MAX_BLOCKS))
    position: int = wire(3, Uint(MAX_TOKENS))
    content: WireTensor = wire(4, TensorField())


@dataclass(frozen=True, slots=True)
class JournalChunk(Message):
    """A part of the leaving hop's journal: its outputs ``[rows, tokens, hidden]``."""

    TAG = 29
    position: int = wire(1, Uint(MAX_TOKENS))
    activations: WireTensor = wire(2, TensorField())


@dataclass(frozen=True, slots=True)
class TakenOver(Message):
    """Ends a round. Sent by the leaving hop, and answered with what the replacement has.

    After the ``final`` one the replacement goes on from ``length`` with step ``next_step``, and
    tells the client the same. ``left_padding`` has one count per row, in the rows' present order.
    """

    TAG = 30
    length: int = wire(1, Uint(MAX_TOKENS))
    next_step: int = wire(2, Uint(MAX_STEP))
    digest: bytes = wire(3, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    """SHA-256 over all chunks of the stream so far."""
    final: int = wire(4, Uint(1), 0)
    left_padding: tuple[int, ...] = wire(5, Array(Uint(MAX_TOKENS), MAX_ROWS), ())


# --- adapters: a client brings one to a node that lacks it ---------------------------------------
@dataclass(frozen=True, slots=True)
class PushAdapter(Message):
    """First message of a stream: I have this adapter for you; its index has so many bytes."""

    TAG = 35
    adapter_id: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    model_revision: bytes = wire(2, Bytes(REVISION_BYTES, REVISION_BYTES))
    index_bytes: int = wire(3, Uint(512 * 1024))
    catalogue_name: str = wire(4, Text(256), "")
    """``NAME@REVISION`` in the catalogue, from where the node may fetch the tensors itself."""


@dataclass(frozen=True, slots=True)
class AdapterStatus(Message):
    """Node to client: send the index, or the tensors of these blocks; or: it is loaded."""

    TAG = 36
    loaded: int = wire(1, Uint(1))
    first_block: int = wire(2, Uint(MAX_BLOCKS), 0)
    end_block: int = wire(3, Uint(MAX_BLOCKS), 0)


@dataclass(frozen=True, slots=True)
class AdapterIndexPart(Message):
    """The next bytes of the index, in pieces that follow each other."""

    TAG = 37
    pieces: tuple[bytes, ...] = wire(1, Array(Bytes(1, 4096), 15))


@dataclass(frozen=True, slots=True)
class AdapterTensor(Message):
    """Rows of one tensor, ``[1, rows, columns]``; tensors and rows come in the index's order."""

    TAG = 38
    module: int = wire(1, Uint(4095))
    """Its place in the index."""
    tensor: int = wire(2, Uint(2))
    """0 is A, 1 is B, 2 is the magnitude, which has one row."""
    values: WireTensor = wire(3, TensorField())


# --- training: gradients through a chain ---------------------------------------------------------
MAX_SEQUENCES = 256
"""In one micro-batch."""
MAX_MICRO_BATCHES = 64
MAX_RANK = 1024
MAX_TARGETS = 32
MAX_STATE_ELEMENTS = 1 << 30


@dataclass(frozen=True, slots=True)
class OpenTraining(Message):
    """Client to hop: reserve what training an adapter of ``[first_block, end_block)`` takes.

    The life of a training session is that of any other: SetRoute, RouteReady, Attach, Attached,
    CloseSession and SessionClosed mean the same. ``method``: 0 trains nothing here, 1 is LoRA,
    2 DoRA. ``optimizer``: 1 is AdamW, 2 Lion, 3 Adafactor. Initial values and dropout follow from
    ``seed`` and the names of tensors, so that they are the same on any node.
    """

    TAG = 40
    model_revision: bytes = wire(1, Bytes(REVISION_BYTES, REVISION_BYTES))
    first_block: int = wire(2, Uint(MAX_BLOCKS))
    end_block: int = wire(3, Uint(MAX_BLOCKS))
    wire_dtype: int = wire(4, Uint(255))
    previous_peer: str = wire(5, PEER)
    maximum_tokens: int = wire(6, Uint(MAX_TOKENS))
    """Of one micro-batch, all sequences together."""
    micro_batches_in_flight: int = wire(7, Uint(MAX_MICRO_BATCHES))
    method: int = wire(8, Uint(255))
    optimizer: int = wire(9, Uint(255))
    rank: int = wire(10, Uint(MAX_RANK), 0)
    alpha: float = wire(11, Real(0.0, 1e6), 0.0)
    target_modules: tuple[str, ...] = wire(12, Array(Text(64), MAX_TARGETS), ())
    dropout: float = wire(13, Real(0.0, 1.0), 0.0)
    seed: int = wire(14, Uint(MAX_STEP), 0)
    beta1: float = wire(15, Real(0.0, 1.0), 0.9)
    beta2: float = wire(16, Real(0.0, 1.0), 0.999)
    epsilon: float = wire(17, Real(0.0, 1.0), 1e-8)
    weight_decay: float = wire(18, Real(0.0, 1e3), 0.0)
    policy: bytes = wire(40, Bytes(0, MAX_POLICY_BYTES), b"")
    """As of a session that answers (OpenSession)."""


@dataclass(frozen=True, slots=True)
class TrainingOpened(Message):
    """Hop to client. ``session_id`` is made by the hop and valid on this hop only."""

    TAG = 41
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    reserved_bytes: int = wire(2, Uint(MAX_STEP), 0)


@dataclass(frozen=True, slots=True)
class ForwardPart(Message):
    """A part of a micro-batch's activations, ``[1, tokens, hidden]``, on its way to the last block.

    The sequences of a micro-batch lie one after the other, ``lengths`` tokens each; parts come in
    the order of ``first_token``. Numbers of micro-batches grow. From the last hop to the client it
    carries the outputs.
    """

    TAG = 42
    micro_batch: int = wire(1, Uint(MAX_STEP))
    lengths: tuple[int, ...] = wire(2, Array(Uint(MAX_TOKENS), MAX_SEQUENCES))
    first_token: int = wire(3, Uint(MAX_TOKENS))
    activations: WireTensor = wire(4, TensorField())
    use_adapter: int = wire(5, Uint(1), 1)
    """0: as if there were no adapter, for a frozen reference."""
    needs_gradient: int = wire(6, Uint(1), 1)
    """0: no BackwardPart will follow."""


@dataclass(frozen=True, slots=True)
class BackwardPart(Message):
    """A part of the gradient of a micro-batch's outputs, on its way to the first block.

    From the first hop to the client it carries the gradient of the inputs.
    """

    TAG = 43
    micro_batch: int = wire(1, Uint(MAX_STEP))
    first_token: int = wire(2, Uint(MAX_TOKENS))
    gradients: WireTensor = wire(3, TensorField())


@dataclass(frozen=True, slots=True)
class AskGradientNorm(Message):
    """Client to every hop: optimizer step ``step`` is due; how large is your gradient?

    The hop has the gradients of ``micro_batches`` micro-batches since its last step, or refuses.
    """

    TAG = 44
    step: int = wire(1, Uint(MAX_STEP))
    micro_batches: int = wire(2, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class GradientNorm(Message):
    """Hop to client: the sum of the squares of its gradients."""

    TAG = 45
    step: int = wire(1, Uint(MAX_STEP))
    square_sum: float = wire(2, Real(0.0, 1e300))


@dataclass(frozen=True, slots=True)
class ApplyGradients(Message):
    """Client to every hop: multiply the gradients by ``scale`` and let the optimizer take a step.

    A step that was applied before is answered again and not applied twice.
    """

    TAG = 46
    step: int = wire(1, Uint(MAX_STEP))
    scale: float = wire(2, Real(0.0, 1e9))
    learning_rate: float = wire(3, Real(0.0, 1e3))


@dataclass(frozen=True, slots=True)
class GradientsApplied(Message):
    """Hop to client: the step is done."""

    TAG = 47
    step: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class AskState(Message):
    """Client to hop: send adapter and optimizer as they are after ``step``; answered by StateParts
    and one StateEnd."""

    TAG = 48
    step: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class StatePart(Message):
    """Elements ``first_element`` and following of a tensor of ``elements``, as ``[1, 1, n]``.

    ``name`` is that of the tensor in PEFT's files without PEFT's prefix; optimizer tensors append
    ``#`` and their own name. From hop to client in a snapshot, from client to hop to go on from
    one.
    """

    TAG = 49
    name: str = wire(1, Text(256))
    elements: int = wire(2, Uint(MAX_STATE_ELEMENTS))
    first_element: int = wire(3, Uint(MAX_STATE_ELEMENTS))
    values: WireTensor = wire(4, TensorField())


@dataclass(frozen=True, slots=True)
class StateEnd(Message):
    """All of a state has been sent: ``tensors`` of them, as after ``step``."""

    TAG = 50
    step: int = wire(1, Uint(MAX_STEP))
    tensors: int = wire(2, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class StateRestored(Message):
    """Hop to client: it goes on from the state that the client sent."""

    TAG = 51
    step: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class ForgetMicroBatch(Message):
    """Client to every hop: no gradient will come for this micro-batch."""

    TAG = 52
    micro_batch: int = wire(1, Uint(MAX_STEP))


# --- manifests and chunks of models and adapters -------------------------------------------------
@dataclass(frozen=True, slots=True)
class GetManifest(Message):
    """First message of a stream: send me the manifest with this digest."""

    TAG = 60
    manifest_digest: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))


@dataclass(frozen=True, slots=True)
class ManifestPiece(Message):
    """Pieces follow each other until ``total_bytes`` are there; then the signatures."""

    TAG = 61
    total_bytes: int = wire(1, Uint(32 * 1024 * 1024))
    content: bytes = wire(2, BlobField(1024 * 1024))


@dataclass(frozen=True, slots=True)
class ManifestSignatures(Message):
    """Who stands behind the manifest that was just sent; one signature for each publisher."""

    TAG = 62
    publishers: tuple[str, ...] = wire(1, Array(PEER, 16))
    signatures: tuple[bytes, ...] = wire(2, Array(Bytes(64, 64), 16))


@dataclass(frozen=True, slots=True)
class AskChunks(Message):
    """Which chunks of this manifest do you hold? Later ``GetChunk`` are about it too."""

    TAG = 63
    manifest_digest: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))


@dataclass(frozen=True, slots=True)
class ChunksHeld(Message):
    """Two bitmaps of ``ceil(chunks / 8)`` bytes each: chunks held, and chunks being fetched.

    The first chunk is the highest bit of the first byte.
    """

    TAG = 64
    bitmaps: bytes = wire(1, BlobField(2 * MAX_CHUNKS // 8))


@dataclass(frozen=True, slots=True)
class GetChunk(Message):
    """Send me this chunk. Requests may follow each other; they are answered in their order."""

    TAG = 65
    chunk: int = wire(1, Uint(MAX_CHUNKS - 1))


@dataclass(frozen=True, slots=True)
class Chunk(Message):
    """The bytes of a chunk. The receiver checks them by the hash in its manifest."""

    TAG = 66
    chunk: int = wire(1, Uint(MAX_CHUNKS - 1))
    content: bytes = wire(2, BlobField(MAX_PAYLOAD_BYTES))


# --- membership ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RedeemInvitation(Message):
    """To a desk: an invitation that it signed, for a passport for the peer that sends this."""

    TAG = 80
    invitation: bytes = wire(1, Bytes(1, 1024))


@dataclass(frozen=True, slots=True)
class PassportIssued(Message):
    """From a desk: the passport, and the charter as it is now."""

    TAG = 81
    passport: bytes = wire(1, Bytes(1, MAX_PASSPORT_BYTES))
    charter: bytes = wire(2, Bytes(1, 1536))


# --- accounts of work ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SignedVoucher(Message):
    """Client to hop, on the control stream: what you did so far (``ledger_objects.Voucher``)."""

    TAG = 70
    payload: bytes = wire(1, Bytes(1, MAX_OBJECT_BYTES))
    signature: bytes = wire(2, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class SignedReceipt(Message):
    """Hop to client: the voucher is on our disk (``ledger_objects.Receipt``)."""

    TAG = 71
    payload: bytes = wire(1, Bytes(1, MAX_OBJECT_BYTES))
    signature: bytes = wire(2, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class RenewAllowance(Message):
    """Client to hop, on the control stream: later vouchers of this session draw on this allowance.

    They count from zero, and cover what comes after what the former ones covered.
    """

    TAG = 75
    allowance: bytes = wire(1, Bytes(1, MAX_OBJECT_BYTES))
    allowance_signature: bytes = wire(2, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES))
    allowance_issuer: bytes = wire(3, Bytes(PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES))


@dataclass(frozen=True, slots=True)
class ReadTranscript(Message):
    """First message of a stream, by a session's client: show what you handled and sent on.

    Answered by TranscriptPart ..., JournalChunk ..., TranscriptEnd.
    """

    TAG = 72
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    end_position: int = wire(2, Uint(MAX_TOKENS), 0)
    """Positions of the journal that are wanted; 0: none."""


@dataclass(frozen=True, slots=True)
class TranscriptPart(Message):
    """Links of the hash chain, oldest first; each as ``docs/protocol.md`` has it."""

    TAG = 73
    links: tuple[bytes, ...] = wire(1, Array(Bytes(LINK_BYTES, LINK_BYTES), 256))


@dataclass(frozen=True, slots=True)
class TranscriptEnd(Message):
    """Everything was sent. ``start`` is the chain's head before the first link."""

    TAG = 74
    start: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    journal_gone: int = wire(2, Uint(1), 0)
    """1: what was sent on is no longer kept."""


MESSAGE_TYPES: tuple[type[Message], ...] = (
    Hello,
    HelloReply,
    OpenSession,
    SessionOpened,
    SetRoute,
    RouteReady,
    Attach,
    Attached,
    Step,
    StepResult,
    Error,
    Ping,
    Pong,
    CloseSession,
    SessionClosed,
    SetPrevious,
    PreviousSet,
    Replay,
    Replayed,
    AskLoad,
    LoadReport,
    ProbePeer,
    ProbeReport,
    Draining,
    HandOver,
    HandedOver,
    TakeOver,
    CacheChunk,
    JournalChunk,
    TakenOver,
    PushAdapter,
    AdapterStatus,
    AdapterIndexPart,
    AdapterTensor,
    OpenTraining,
    TrainingOpened,
    ForwardPart,
    BackwardPart,
    AskGradientNorm,
    GradientNorm,
    ApplyGradients,
    GradientsApplied,
    AskState,
    StatePart,
    StateEnd,
    StateRestored,
    ForgetMicroBatch,
    GetManifest,
    ManifestPiece,
    ManifestSignatures,
    AskChunks,
    ChunksHeld,
    GetChunk,
    Chunk,
    RedeemInvitation,
    PassportIssued,
    SignedVoucher,
    SignedReceipt,
    ReadTranscript,
    TranscriptPart,
    TranscriptEnd,
    RenewAllowance,
)

RETIRED_TAGS: frozenset[int] = frozenset()
