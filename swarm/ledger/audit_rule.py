"""Whether a span's outputs are what the blocks compute, up to honest rounding. Pure; numpy only.

The error of a token is relative to what the span *added*: ``|y - reference| / |reference - x|``.
Plain distances and cosines do not work, since the residual stream dilutes short spans. A segment
fails if the median over its tokens exceeds one limit or the 95th percentile another: the second is
what finds a node that computes only most of the tokens. Position 0 is left out, where attention
sinks make honest rounding large.

Limits depend on the declared precision, and may be calibrated per model and span
(``swarm audit calibrate``): the largest honest value times 1.5.

An adapter may change a span by less than honest rounding does. Sessions with one are therefore also
measured along the direction of its effect: whether the answer is nearer to what the blocks compute
with the adapter, or to what they compute without it. Rounding spreads over all directions and
hardly touches that one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType, WireTensor

Floats = NDArray[np.float32]

CALIBRATION_MARGIN = 1.5
LEAST_ADAPTER_SHARE = 0.4
"""A replica's rounding moves the share towards a half from both sides, all the way for an adapter
that does hardly anything."""
SHARE_ERRORS = 4.0
"""So many standard errors a share must be below that."""
FEW_TOKENS = 16
"""The spread of so many says so little that the error may be twice as large."""
LEAST_ADAPTER_EFFECT = 0.2
"""As a part of the limit of the median; an adapter that does less drowns in two nodes' rounding."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A segment passes if neither is exceeded."""

    median: float
    p95: float


SIXTEEN_BIT = Limits(0.03, 0.05)
EIGHT_BIT_WEIGHTS = Limits(0.06, 0.09)
EIGHT_BIT_ACTIVATIONS = Limits(0.13, 0.16)
FOUR_BIT_WEIGHTS = Limits(0.45, 0.6)

LIMITS: Mapping[str, Limits] = {
    "float32": SIXTEEN_BIT,
    "float16": SIXTEEN_BIT,
    "bfloat16": SIXTEEN_BIT,
    "int8": EIGHT_BIT_WEIGHTS,
    "w8a8": EIGHT_BIT_ACTIVATIONS,
    "int4": FOUR_BIT_WEIGHTS,
}
"""By declared precision. Whoever declares four bits is held to little, and routed accordingly."""


BACKWARD_LIMITS: Mapping[str, Limits] = {
    "float32": Limits(0.08, 0.4),
    "float16": Limits(0.08, 0.4),
    "bfloat16": Limits(0.08, 0.4),
    "int8": Limits(0.16, 0.4),
}
"""For gradients of inputs: some tokens have hardly any, and honest rounding is large there."""


@dataclass(frozen=True, slots=True)
class SpanLimits:
    """Calibrated limits of one model revision: by declared precision, then by span's length."""

    by_blocks: Mapping[str, Mapping[int, Limits]]

    def of(self, dtype_class: str, blocks: int) -> Limits:
        """Of the calibrated length that is nearest, or the general ones. Never looser than those
        of the class, so that a calibration cannot open the door."""
        general = LIMITS.get(dtype_class, SIXTEEN_BIT)
        calibrated = self.by_blocks.get(dtype_class)
        if not calibrated:
            return general
        nearest = calibrated[min(calibrated, key=lambda length: (abs(length - blocks), length))]
        return Limits(min(nearest.median, general.median), min(nearest.p95, general.p95))


UNCALIBRATED = SpanLimits({})


@dataclass(frozen=True, slots=True)
class Comparison:
    """Errors of one segment."""

    tokens: int
    median: float
    p95: float

    def passes(self, limits: Limits) -> bool:
        return self.median <= limits.median and self.p95 <= limits.p95


@dataclass(frozen=True, slots=True)
class AdapterShare:
    """How much of an adapter's effect an answer has."""

    effect: float
    """Median over tokens of what the adapter changes, relative to what the span adds."""
    share: float
    """Median over tokens: about 1 with the adapter and 0 without it."""
    standard_error: float
    """Of the median, by the spread of the tokens; larger for few of them."""

    def passes(self, limits: Limits) -> bool:
        """Also for an adapter that does too little here to be seen."""
        highest = self.share + SHARE_ERRORS * self.standard_error
        is_seen = self.effect >= LEAST_ADAPTER_EFFECT * limits.median
        return not (is_seen and highest < LEAST_ADAPTER_SHARE)


def loosest(first: Limits, second: Limits) -> Limits:
    """What two honest nodes of different precision may differ by."""
    return Limits(max(first.median, second.median), max(first.p95, second.p95))


def to_array(tensor: WireTensor) -> Floats:
    """``[rows, tokens, hidden]`` in float32."""
    data = tensor.data
    if tensor.dtype is DType.FLOAT32:
        array = np.frombuffer(data, dtype="<f4")
    elif tensor.dtype is DType.FLOAT16:
        array = np.frombuffer(data, dtype="<f2").astype(np.float32)
    else:
        widened = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        array = widened.view(np.float32)
    return array.reshape(tensor.shape)


def relative_errors(given: Floats, answered: Floats, reference: Floats) -> Floats:
    """Per token of ``[..., tokens, hidden]``, flattened; what is not finite counts as infinite."""
    if not given.shape == answered.shape == reference.shape:
        raise ProtocolError(ErrorCode.BAD_TENSOR, "shapes of an audit")
    with np.errstate(all="ignore"):
        wrong = np.linalg.norm((answered - reference).astype(np.float64), axis=-1)
        added = np.linalg.norm((reference - given).astype(np.float64), axis=-1)
        errors = wrong / np.maximum(added, 1e-12)
    errors = np.where(np.isfinite(errors), errors, np.inf)
    return errors.reshape(-1).astype(np.float32)


def compare(given: Floats, answered: Floats, reference: Floats) -> Comparison:
    """The segment's errors; position 0 must have been left out already.

    Works on hidden states, gradients and sketches of either alike. Raises ProtocolError for shapes
    that differ, or when there is no token.
    """
    errors = relative_errors(given, answered, reference)
    if not errors.size:
        raise ProtocolError(ErrorCode.BAD_TENSOR, "an audit of nothing")
    ordered = np.sort(errors)
    return Comparison(
        tokens=int(errors.size),
        median=float(ordered[(errors.size - 1) // 2]),
        # the error that 95 % of the tokens do not exceed, without interpolation: inf stays inf
        p95=float(ordered[min(errors.size - 1, int(np.ceil(0.95 * errors.size)) - 1)]),
    )


def adapter_share(given: Floats, answered: Floats, adapted: Floats, bare: Floats) -> AdapterShare:
    """How much an answer has of the way from ``bare``, the span's output without the adapter, to
    ``adapted``; all ``[..., tokens, hidden]`` from the same inputs, or sketches of them.

    Raises ProtocolError for shapes that differ, or when there is no token.
    """
    if not given.shape == answered.shape == adapted.shape == bare.shape or not given.size:
        raise ProtocolError(ErrorCode.BAD_TENSOR, "shapes of an audit")
    with np.errstate(all="ignore"):
        effect = (adapted - bare).astype(np.float64)
        size = np.linalg.norm(effect, axis=-1)
        added = np.linalg.norm((adapted - given).astype(np.float64), axis=-1)
        along = ((answered - bare) * effect).sum(axis=-1)
        shares = along / np.maximum(size, 1e-12) ** 2
        effects = size / np.maximum(added, 1e-12)
    # Not a number is no share; where a replica sends it the rule of errors has failed before.
    shares = np.where(np.isfinite(shares), shares, -1e9).reshape(-1)
    share = float(np.median(shares))
    # By the median of the deviations: a few tokens are far off.
    spread = 1.4826 * float(np.median(np.abs(shares - share)))
    error = 1.2533 * spread / math.sqrt(shares.size) * (1 + FEW_TOKENS / shares.size)
    return AdapterShare(
        effect=float(np.median(np.where(np.isfinite(effects), effects, np.inf))),
        share=share,
        standard_error=error,
    )
