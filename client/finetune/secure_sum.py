"""A sum of vectors of which nobody sees a single one: pairwise masks (Bonawitz et al. 2017).

Every pair of participants shares a secret and adds, one of them subtracts, the numbers that follow
from it; in the sum of all these cancel to the last bit. Everybody adds a mask of their own too, so
that a vector that comes late is no more readable than others. The secrets are shared out among the
participants before, so that the masks of those who drop out, and only these pairwise ones, and the
own masks of those who stay, can be taken away by the others together.

A round has four messages of each participant to the aggregator, all plain data::

    advertise   public keys, signed by the participant's identity
    share       shares of both secrets for each other participant, encrypted for them
    masked      the vector under its masks
    unmask      of each participant one share: of its own mask if it stayed, of its key if it left

Participants accept only keys that are signed by peers they expect, and never give both shares of
one participant away. Honest but curious: an aggregator who tells participants different lists of
who stayed is caught by the threshold only (more than half of all).

Numbers are fixed point in 64 bits, modulo 2^64: see :func:`encode` for the bounds.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from swarm.client.finetune.shamir import SHARE_BYTES, join_secret, split_secret
from swarm.protocol.errors import ErrorCode, NoRouteError, ProtocolError, UsageError
from swarm.protocol.identity import Identity, PeerId, verify

SCALE = 2.0**24
LARGEST = 2.0**62
CONTEXT = b"federated keys v1"
ENCRYPTED_SHARE_BYTES = 2 * SHARE_BYTES + 16
"""Of both secrets, and the cipher's tag."""

Words = NDArray[np.uint64]


def encode(values: NDArray[np.float64], participants: int) -> Words:
    """Fixed point with 24 bits behind the point; the sum of all must stay below 2^62.

    Raises UsageError for values that are too large for so many participants.
    """
    scaled = np.rint(values * SCALE)
    if not np.all(np.abs(scaled) < LARGEST / participants):
        raise UsageError("an update has numbers that are too large, or none")
    return scaled.astype(np.int64).view(np.uint64)


def decode(total: Words) -> NDArray[np.float64]:
    """Inverse of :func:`encode` for a sum."""
    return total.view(np.int64).astype(np.float64) / SCALE


@dataclass(frozen=True, slots=True)
class Advertised:
    """``channel_key`` encrypts shares, ``mask_key`` makes pairwise masks; X25519, raw."""

    peer: PeerId
    channel_key: bytes
    mask_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Unmasking:
    """What one participant gives away; keys are participants."""

    own_mask_shares: Mapping[PeerId, bytes]
    key_shares: Mapping[PeerId, bytes]


def threshold_of(participants: int) -> int:
    """How many must stay to the end: more than half."""
    return participants // 2 + 1


class Participant:
    """One participant in one round. The methods are called in their order."""

    def __init__(self, identity: Identity, round_id: bytes, expected: Collection[PeerId]) -> None:
        """``expected`` are all who were invited, this one among them."""
        self._identity = identity
        self._round_id = round_id
        self._expected = frozenset(expected)
        self._channel_key = X25519PrivateKey.generate()
        self._mask_key = X25519PrivateKey.generate()
        self._own_seed = secrets.token_bytes(32)
        self._others: dict[PeerId, Advertised] = {}
        self._places: dict[PeerId, int] = {}
        self._sharing: frozenset[PeerId] = frozenset()
        self._shares: dict[PeerId, bytes] = {}
        self._has_unmasked = False

    def advertise(self) -> Advertised:
        channel = self._channel_key.public_key().public_bytes_raw()
        mask = self._mask_key.public_key().public_bytes_raw()
        signature = self._identity.sign(CONTEXT, self._round_id + channel + mask)
        return Advertised(self._identity.peer_id, channel, mask, signature)

    def share(self, advertised: Sequence[Advertised]) -> dict[PeerId, bytes]:
        """Encrypted shares for each of the others. Raises ProtocolError for keys of strangers."""
        own = self._identity.peer_id
        for one in advertised:
            if one.peer not in self._expected or one.peer in self._others:
                raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "a participant not invited")
            signed = self._round_id + one.channel_key + one.mask_key
            verify(one.peer, CONTEXT, signed, one.signature)
            self._others[one.peer] = one
        if own not in self._others:
            raise ProtocolError(ErrorCode.BAD_FIELD, "the own keys are missing")
        peers = sorted(self._others)
        self._places = {peer: place for place, peer in enumerate(peers, 1)}
        threshold = threshold_of(len(peers))
        seed_shares = split_secret(self._own_seed, len(peers), threshold)
        key_shares = split_secret(self._mask_key.private_bytes_raw(), len(peers), threshold)
        return {
            peer: ChaCha20Poly1305(self._channel(peer)).encrypt(
                bytes(12), seed_shares[place] + key_shares[place], (own + peer).encode()
            )
            for peer, place in self._places.items()
        }

    def masked(self, values: Words, received: Mapping[PeerId, bytes]) -> Words:
        """``values`` under all masks; ``received`` are the shares for us, by their senders.

        Raises ProtocolError when too few participants are left or a share is damaged.
        """
        own = self._identity.peer_id
        if len(received) < threshold_of(len(self._others)) or own not in received:
            raise ProtocolError(ErrorCode.NO_CAPACITY, "too few participants share their secrets")
        for peer, encrypted in received.items():
            if peer not in self._others:
                raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "a share of a stranger")
            try:
                shares = ChaCha20Poly1305(self._channel(peer, sent=False)).decrypt(
                    bytes(12), encrypted, (peer + own).encode()
                )
            except InvalidTag:
                raise ProtocolError(ErrorCode.BAD_FIELD, "a damaged share") from None
            if len(shares) != 2 * SHARE_BYTES:
                raise ProtocolError(ErrorCode.BAD_FIELD, "a share of a wrong size")
            self._shares[peer] = shares
        self._sharing = frozenset(received)
        total = values + expand(self._own_seed, self._round_id, len(values))
        for peer in self._sharing - {own}:
            mask_key = self._others[peer].mask_key
            total += pair_mask(self._mask_key, mask_key, own, peer, self._round_id, len(values))
        return total

    def unmask(self, stayed: Collection[PeerId]) -> Unmasking:
        """Shares that take away the masks of this sum. Only once: two lists would tell too much."""
        present = frozenset(stayed)
        if self._has_unmasked or not present <= self._sharing:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "unmasking")
        if len(present) < threshold_of(len(self._others)):
            raise ProtocolError(ErrorCode.NO_CAPACITY, "too few participants stayed")
        self._has_unmasked = True
        return Unmasking(
            {peer: self._shares[peer][:SHARE_BYTES] for peer in present},
            {peer: self._shares[peer][SHARE_BYTES:] for peer in self._sharing - present},
        )

    def _channel(self, peer: PeerId, *, sent: bool = True) -> bytes:
        """A key for each direction: every key encrypts one message only, so the nonce may be 0."""
        own = self._identity.peer_id
        direction = f"{own}>{peer}" if sent else f"{peer}>{own}"
        secret = _exchanged(self._channel_key, self._others[peer].channel_key)
        return _derive(secret, self._round_id + direction.encode())


class Aggregator:
    """Collects one round and adds it up; sees no vector but under its masks.

    Keeps the sum, not the vectors: its memory does not grow with the participants.
    """

    def __init__(self, round_id: bytes, invited: Collection[PeerId], length: int) -> None:
        self._round_id = round_id
        self._invited = frozenset(invited)
        self._length = length
        self._advertised: dict[PeerId, Advertised] = {}
        self._shares: dict[PeerId, Mapping[PeerId, bytes]] = {}
        self._masked: set[PeerId] = set()
        self._sum: Words = np.zeros(length, dtype=np.uint64)

    def add_keys(self, keys: Advertised) -> None:
        """Keys that others could not use are refused here: they would stop everybody."""
        if keys.peer not in self._invited or keys.peer in self._advertised:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "not invited, or twice")
        signed = self._round_id + keys.channel_key + keys.mask_key
        verify(keys.peer, CONTEXT, signed, keys.signature)
        for public_key in (keys.channel_key, keys.mask_key):
            _exchanged(X25519PrivateKey.generate(), public_key)
        self._advertised[keys.peer] = keys

    def all_keys(self) -> list[Advertised]:
        """Raises NoRouteError when fewer than two took part: a sum of one is that one's."""
        if len(self._advertised) < 2:
            raise NoRouteError("a round needs two participants at least")
        return [self._advertised[peer] for peer in sorted(self._advertised)]

    def add_shares(self, sender: PeerId, shares: Mapping[PeerId, bytes]) -> None:
        if sender not in self._advertised or shares.keys() != self._advertised.keys():
            raise ProtocolError(ErrorCode.BAD_FIELD, "shares for other participants")
        if any(len(share) != ENCRYPTED_SHARE_BYTES for share in shares.values()):
            raise ProtocolError(ErrorCode.BAD_FIELD, "a share of a wrong size")
        self._shares[sender] = shares

    def shares_for(self, receiver: PeerId) -> dict[PeerId, bytes]:
        return {sender: shares[receiver] for sender, shares in self._shares.items()}

    def add_masked(self, sender: PeerId, values: Words) -> None:
        if sender not in self._shares or values.shape != (self._length,):
            raise ProtocolError(ErrorCode.BAD_TENSOR, "a vector of another length")
        if sender in self._masked:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "a second vector")
        self._masked.add(sender)
        self._sum += values

    def stayed(self) -> list[PeerId]:
        """Raises NoRouteError when too few are left to take the masks away."""
        needed = threshold_of(len(self._advertised))
        if len(self._masked) < needed:
            raise NoRouteError(f"{len(self._masked)} participants are left, {needed} are needed")
        return sorted(self._masked)

    def check_unmasking(self, sender: PeerId, unmasking: Unmasking) -> None:
        """Raises ProtocolError unless it has one share of each participant, of the right kind."""
        if sender not in self._masked:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "unmasking by one who left")
        gone = self._shares.keys() - self._masked
        shares = (*unmasking.own_mask_shares.values(), *unmasking.key_shares.values())
        if (
            unmasking.own_mask_shares.keys() != self._masked
            or unmasking.key_shares.keys() != gone
            or any(len(share) != SHARE_BYTES for share in shares)
        ):
            raise ProtocolError(ErrorCode.BAD_FIELD, "shares of other participants")

    def total(self, unmaskings: Mapping[PeerId, Unmasking]) -> Words:
        """The exact sum of those who stayed. Raises NoRouteError, ProtocolError."""
        needed = threshold_of(len(self._advertised))
        if len(unmaskings) < needed:
            raise NoRouteError(f"{len(unmaskings)} participants unmask, {needed} are needed")
        for sender, unmasking in unmaskings.items():
            self.check_unmasking(sender, unmasking)
        places = {peer: place for place, peer in enumerate(sorted(self._advertised), 1)}
        present = self.stayed()
        total = self._sum.copy()
        for peer in present:
            seed = _join({places[p]: u.own_mask_shares[peer] for p, u in unmaskings.items()})
            total -= expand(seed, self._round_id, self._length)
        for gone in self._shares.keys() - set(present):
            secret = _join({places[p]: u.key_shares[gone] for p, u in unmaskings.items()})
            key = X25519PrivateKey.from_private_bytes(secret)
            if key.public_key().public_bytes_raw() != self._advertised[gone].mask_key:
                raise ProtocolError(ErrorCode.BAD_FIELD, "shares of another key")
            for peer in present:
                # What the one who is gone would have added cancels what the other one did.
                total += pair_mask(
                    key,
                    self._advertised[peer].mask_key,
                    gone,
                    peer,
                    self._round_id,
                    self._length,
                )
        return total


def pair_mask(
    own_key: X25519PrivateKey,
    other_key: bytes,
    own: PeerId,
    other: PeerId,
    round_id: bytes,
    length: int,
) -> Words:
    """What ``own`` adds for the pair; ``other`` adds the negative, modulo 2^64."""
    secret = _exchanged(own_key, other_key)
    words = expand(_derive(secret, b"mask" + round_id), round_id, length)
    return words if own < other else np.uint64(0) - words


def expand(seed: bytes, round_id: bytes, length: int) -> Words:
    """``length`` words that look random to whoever lacks ``seed``: ChaCha20's stream."""
    key = _derive(seed, b"words" + round_id)
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * length)), dtype="<u8").astype(np.uint64)


def _exchanged(own_key: X25519PrivateKey, public_key: bytes) -> bytes:
    """The secret of a pair. Raises ProtocolError for a key of a wrong length or of small order."""
    try:
        return own_key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise ProtocolError(ErrorCode.BAD_FIELD, "a public key that cannot be used") from None


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(secret)


def _join(shares: Mapping[int, bytes]) -> bytes:
    try:
        return join_secret(shares)
    except ValueError:
        raise ProtocolError(ErrorCode.BAD_FIELD, "shares that do not fit") from None
