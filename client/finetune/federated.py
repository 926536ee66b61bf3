"""Federated averaging (McMahan et al. 2017): one adapter, learned from data that stays apart.

In each round every participant trains the common adapter on its own data, through the swarm, and
gives the change away under masks; the aggregator adds the changes up, weighted by how many examples
each has seen, and moves the adapter by their mean. Data never leave a participant, and neither data
nor a single change can be seen by the aggregator (``secure_sum``). Who drops out is not counted.

How the messages of a round travel is the caller's choice; their order is that of
``secure_sum``'s docstring.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from swarm.client.finetune.secure_sum import SCALE, Words, decode, encode
from swarm.protocol.errors import ErrorCode, ProtocolError, UsageError

Tensors = Mapping[str, torch.Tensor]


def change_vector(before: Tensors, after: Tensors, examples: int, participants: int) -> Words:
    """What a participant puts into the sum: its change times its examples, and their number.

    Tensors of the optimizer (``#`` in their names) stay with the participant.
    """
    if examples < 1:
        raise UsageError("a participant without examples has nothing to say")
    names = adapter_names(before)
    if adapter_names(after) != names:
        raise UsageError("the adapter has other tensors than before")
    changes = [_flat(after[name]) - _flat(before[name]) for name in names]
    weighted = np.concatenate([*changes, np.ones(1)]) * examples
    return encode(weighted, participants)


def vector_length(adapter: Tensors) -> int:
    """Of the vector of a participant."""
    return sum(adapter[name].numel() for name in adapter_names(adapter)) + 1


def counted_examples(total: Words) -> int:
    """Of all who are in the sum. Raises ProtocolError for a sum under masks that are left over.

    Numbers of examples are whole; what is left of a mask hides that, but for one time in 2^24.
    """
    examples, rest = divmod(int(total.view(np.int64)[-1]), int(SCALE))
    if rest or examples < 1:
        raise ProtocolError(ErrorCode.BAD_TENSOR, "the masks do not cancel")
    return examples


def moved(before: Tensors, total: Words) -> dict[str, torch.Tensor]:
    """The adapter after a round: moved by the mean change, weighted by examples."""
    values = decode(total)
    examples = values[-1]
    if examples < 0.5:
        raise UsageError("nobody has given a change")
    mean = values[:-1] / examples
    result: dict[str, torch.Tensor] = {}
    start = 0
    for name in adapter_names(before):
        count = before[name].numel()
        change = torch.from_numpy(mean[start : start + count]).to(torch.float32)
        result[name] = before[name] + change.reshape(before[name].shape)
        start += count
    return result


def adapter_names(tensors: Collection[str] | Tensors) -> list[str]:
    """Names of the adapter's own tensors, in the order in which they lie in a vector."""
    return sorted(name for name in tensors if "#" not in name)


def _flat(tensor: torch.Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().reshape(-1).to(torch.float64).numpy()
    return array
