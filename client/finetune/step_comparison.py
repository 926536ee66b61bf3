"""Whether two nodes made the same of one step of a training, up to honest rounding. Pure; numpy.

Activations and gradients of inputs are compared by the rule of ``swarm.ledger.audit_rule``, each
micro-batch for itself, so that none hides among the others. Of the adapter's gradient two things
are known: its norm, and what became of the state. Changes are compared relative to their size:

- The moments of an optimizer are sums of gradients or of their squares, and differ as these do.
- The parameters move by hardly more than the sign of a gradient. Where that is nearly zero honest
  rounding turns it around, so that much has to be allowed. A node that does not train is off by 1,
  one that trains against the gradient by 2.

These limits are 1.8 times the largest of 432 honest steps, or more
(``scripts.bench.training_audits``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.ledger.audit_rule import (
    BACKWARD_LIMITS,
    LIMITS,
    Comparison,
    Limits,
    adapter_share,
    compare,
    loosest,
    to_array,
)
from swarm.protocol.tensors import WireTensor

State = Mapping[str, WireTensor]

LEAST_TOKENS = 8
"""Micro-batches with fewer say too little."""
NORM_LIMIT = 0.25
"""Of the sum of squares of the adapter's gradient, relative to the larger one."""
MOMENTS_LIMIT = 0.6
PARAMETERS_LIMIT = 0.8


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a span was given in a step; tensors ``[1, tokens, hidden]`` by micro-batch."""

    lengths: tuple[tuple[int, ...], ...]
    activations: tuple[WireTensor, ...]
    gradients: tuple[WireTensor, ...]
    state: State
    """Before the step."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What somebody made of it."""

    activations: tuple[WireTensor, ...]
    gradients: tuple[WireTensor, ...]
    dtype_classes: tuple[str, ...]
    square_sum: float | None = None
    """None, like ``state``, where it was not the whole step."""
    state: State | None = None
    without_adapter: tuple[WireTensor, ...] = ()
    """Outputs of the bare blocks; replicas compute them."""


@dataclass(frozen=True, slots=True)
class StepDifference:
    """How far two works are apart."""

    forward: tuple[Comparison, ...]
    backward: tuple[Comparison, ...]
    norm: float = 0.0
    moments: float = 0.0
    parameters: float = 0.0
    has_adapter: bool = True

    def passes(self, dtype_classes: Sequence[str]) -> bool:
        """By the limits of the loosest precision that one of the two declared."""
        forward = _loosest(LIMITS, dtype_classes)
        backward = _loosest(BACKWARD_LIMITS, dtype_classes)
        return (
            all(each.passes(forward) for each in self.forward)
            and all(each.passes(backward) for each in self.backward)
            and self.norm <= NORM_LIMIT
            and self.moments <= MOMENTS_LIMIT
            and self.parameters <= PARAMETERS_LIMIT
            and self.has_adapter
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was long enough to be compared."""
        return not self.forward


def difference(given: StepInputs, work: StepWork, reference: StepWork) -> StepDifference:
    """Raises ProtocolError for shapes that differ."""
    forward, backward = [], []
    has_adapter = True
    limits = _loosest(LIMITS, (*work.dtype_classes, *reference.dtype_classes))
    for index, lengths in enumerate(given.lengths):
        counts = _counted(lengths)
        if counts.sum() < LEAST_TOKENS:
            continue
        inputs, answered, right = (
            to_array(each[index])[:, counts]
            for each in (given.activations, work.activations, reference.activations)
        )
        forward.append(compare(inputs, answered, right))
        if reference.without_adapter:
            bare = to_array(reference.without_adapter[index])[:, counts]
            share = adapter_share(inputs, answered, right, bare)
            has_adapter = has_adapter and share.passes(limits)
        gradients = (
            to_array(each[index])[:, counts]
            for each in (given.gradients, work.gradients, reference.gradients)
        )
        backward.append(compare(*gradients))
    norm = moments = parameters = 0.0
    if work.square_sum is not None and reference.square_sum is not None:
        norm = _relative(work.square_sum, reference.square_sum)
    if work.state is not None and reference.state is not None:
        parameters, moments = state_differences(given.state, work.state, reference.state)
    return StepDifference(tuple(forward), tuple(backward), norm, moments, parameters, has_adapter)


def state_differences(before: State, after: State, reference: State) -> tuple[float, float]:
    """Of the parameters' change and of the moments', the largest of these; relative to what the
    reference changed. Infinite where the tensors are not the same ones."""
    if after.keys() != reference.keys():
        return np.inf, np.inf
    parameters, moments = 0.0, 0.0
    for key in sorted({name.partition("#")[2] for name in reference}):
        wrong = changed = 0.0
        for name in reference:
            if name.partition("#")[2] != key:
                continue
            right, found = _flat(reference[name]), _flat(after[name])
            if right.shape != found.shape:
                return np.inf, np.inf
            begun = _flat(before[name]) if name in before else np.zeros_like(right)
            with np.errstate(all="ignore"):
                wrong += float(np.square(found - right).sum())
                changed += float(np.square(right - begun).sum())
        error = _quotient(wrong, changed)
        if key:
            moments = max(moments, error)
        else:
            parameters = error
    return parameters, moments


def _quotient(wrong: float, changed: float) -> float:
    """Root of the quotient of two sums of squares; what did not change must not be wrong."""
    if not np.isfinite(wrong):
        return np.inf
    if changed == 0.0:
        return 0.0 if wrong == 0.0 else np.inf
    return float(np.sqrt(wrong / changed))


def _relative(one: float, other: float) -> float:
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0


def _flat(tensor: WireTensor) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = to_array(tensor).reshape(-1).astype(np.float64)
    return flat


def _counted(lengths: Sequence[int]) -> NDArray[np.bool_]:
    """All but the first token of each sequence, where honest rounding is large."""
    counted = np.ones(sum(lengths), dtype=np.bool_)
    counted[list(_starts(lengths))] = False
    return counted


def _starts(lengths: Sequence[int]) -> Iterator[int]:
    start = 0
    for length in lengths:
        yield start
        start += length


def _loosest(table: Mapping[str, Limits], dtype_classes: Sequence[str]) -> Limits:
    """Of precisions that the table does not know, the widest that it has for eight bits."""
    limits = table["float32"]
    for dtype_class in dtype_classes:
        if dtype_class:
            limits = loosest(limits, table.get(dtype_class, table["int8"]))
    return limits
