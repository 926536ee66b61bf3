"""What hops say that they handled: compared with the client's ends and among each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swarm.client.finetune.commitments import Commitments
from swarm.ledger.transcript import tensor_hash
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import MicroBatchDone
from swarm.protocol.tensors import DType, WireTensor

HOPS = 3
NUMBER = 7


def tensor(name: str) -> WireTensor:
    return WireTensor(DType.FLOAT32, (1, 1, 2), name.encode().ljust(8))


def digest(name: str) -> bytes:
    return tensor_hash(tensor(name))


def honest(place: int) -> MicroBatchDone:
    """Between hop ``place - 1`` and hop ``place`` lie activations and gradients of that number."""
    return MicroBatchDone(
        NUMBER,
        activations_in=digest(f"a{place}"),
        activations_out=digest(f"a{place + 1}"),
        gradients_in=digest(f"g{place + 1}"),
        gradients_out=digest(f"g{place}"),
    )


def passed(binds: tuple[bool, ...] = (True,) * HOPS) -> Commitments:
    """A micro-batch has gone down and up; no hop has said anything."""
    commitments = Commitments(binds)
    commitments.sent(NUMBER, (1,), tensor("a0"), use_adapter=True)
    commitments.received(NUMBER, tensor(f"a{HOPS}"))
    commitments.sent_gradients(NUMBER, tensor(f"g{HOPS}"))
    commitments.received_gradients(NUMBER, tensor("g0"))
    return commitments


def test_honest_hops_do_not_contradict() -> None:
    commitments = passed()
    for place in range(HOPS):
        commitments.add(place, honest(place))
    assert commitments.conflict() is None
    (record,) = commitments.take()
    assert (record.number, record.tokens, record.done[1]) == (NUMBER, 1, honest(1))
    assert commitments.take() == ()


@pytest.mark.parametrize(
    ("liar", "field", "blamed"),
    [
        (0, "activations_in", (0,)),
        (0, "gradients_out", (0,)),
        (0, "activations_out", (0, 1)),
        (0, "gradients_in", (0, 1)),
        (1, "activations_in", (0, 1)),
        (1, "gradients_out", (0, 1)),
        (1, "activations_out", (1, 2)),
        (1, "gradients_in", (1, 2)),
        (2, "activations_in", (1, 2)),
        (2, "gradients_out", (1, 2)),
        (2, "activations_out", (2,)),
        (2, "gradients_in", (2,)),
    ],
)
def test_a_lie_is_seen_at_one_end_or_by_a_neighbour(
    liar: int, field: str, blamed: tuple[int, ...]
) -> None:
    commitments = passed()
    for place in range(HOPS):
        lie: dict[str, Any] = {field: bytes(32)} if place == liar else {}
        commitments.add(place, replace(honest(place), **lie))
    conflict = commitments.conflict()
    assert conflict is not None
    assert conflict.hops == blamed


def test_who_says_nothing_is_named_unless_it_promised_nothing() -> None:
    commitments, old = passed(), passed((True, False, True))
    for place in (0, 2):
        commitments.add(place, honest(place))
        old.add(place, honest(place))
    conflict = commitments.conflict()
    assert conflict is not None
    assert conflict.hops == (1,)
    assert old.conflict() is None


def test_what_cannot_be_done_yet_is_refused() -> None:
    commitments = Commitments((True,))

    def refused() -> None:
        with pytest.raises(ProtocolError) as error:
            commitments.add(0, honest(0))
        assert error.value.code is ErrorCode.UNEXPECTED_MESSAGE

    refused()  # unknown
    commitments.sent(NUMBER, (1,), tensor("a0"), use_adapter=True)
    refused()  # before its gradient was sent
    commitments.sent_gradients(NUMBER, tensor("g1"))
    commitments.add(0, honest(0))
    refused()  # twice
    commitments.forget(NUMBER)
    refused()


def test_micro_batches_in_the_order_of_their_gradients() -> None:
    commitments = Commitments((True,))
    for number in (1, 2, 3):
        commitments.sent(number, (1,), tensor("a0"), use_adapter=True)
    for number in (2, 1, 3):
        commitments.sent_gradients(number, tensor("g1"))
    assert [record.number for record in commitments.take()] == [2, 1, 3]
