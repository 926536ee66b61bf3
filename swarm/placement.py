"""Which blocks a node should host: pure choices from what nodes announce of themselves.

Every node maximises the same bounded potential by its own span, so that selfish best responses end
in a fixed point (a potential game): a node that moves raises what all others maximise as well.

    F = sum over blocks of f(block)
    f = - (mean / (throughput + 0.02 mean))^3         the weakest block is the swarm's speed
        - 0.3 (3 - expected replicas)+^2              a node that just came may go again
        - 1.0 (2 - organisations)+^2                  one organisation fails as one
        - 1.0 spare (3 - organisations)+^2            and the second one's node may go meanwhile
        - 0.01 share (its mean / its throughput)^3    a country with nodes to spare stands alone

``throughput`` of a block is the sum of (batched speed / blocks hosted) of its nodes and ``mean``
all speed / blocks of the model, which no placement can exceed. A block without any throughput
costs 125,000 (the 0.02), so that coverage comes before everything else. ``spare`` grows from 0 to
1 between three and four copies of the model: with fewer a third organisation costs throughput and
saves nothing. Where replicas are scarce the exponent is 2: replicas and organisations weigh more
then, and nodes move less often.

A node counts where it will be: JOINING and MOVING nodes at their target. A move must never uncover
a block, so leaving counts only others that serve it now and do not mean to leave it: movers publish
MOVING, read the directory *after that*, and ask :func:`may_leave` again. Of two movers that would
uncover a block together the later one then sees the other.

No clock, no randomness and no I/O here: draws and times are arguments. ``model_health`` says in
words what these numbers mean for an operator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from swarm.block_vectors import BlockVectors, Counts, PlacedNode, Vector, with_node


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """Weights and thresholds; the whole swarm should use the same ones."""

    exponent: float = 3.0
    """How much more the weakest block counts than others."""
    scarce_exponent: float = 2.0
    """The same where replicas are scarce: they matter more then, and nodes move less often."""
    throughput_floor: float = 0.02
    """Share of the mean that is added to every block's throughput."""
    wanted_replicas: float = 3.0
    replica_weight: float = 0.3
    wanted_organisations: int = 2
    organisation_weight: float = 1.0
    spare_organisation_weight: float = 1.0
    """Of one organisation more than the wanted ones, where there are replicas to spare."""
    kept_redundancy: float = 3.0
    """Copies of the model; the next one is to spare for a third organisation."""
    country_weight: float = 0.01
    """Enough to close a country's gaps (each counts 125,000 of these); more costs moves."""
    country_redundancy: float = 1.5
    """A country with less stands alone anyhow for nobody: no term for it."""
    swarm_redundancy: float = 4.0
    """A swarm with less has no nodes to spare for borders."""
    patience_s: float = 900.0
    """A span that loads so long is worth half."""
    urgent_patience_s: float = 300.0
    """The same while some block has no node: then soon is better than good."""
    hysteresis: float = 1.5
    """A move must gain so many fair shares of the potential; one below ``swarm_redundancy``."""
    safe_replicas: int = 2
    """Others that must go on serving a block that is left."""
    scarce_replicas: float = 3.0
    """Below this mean of expected replicas they are scarce; one safe replica suffices then."""
    emergency_replicas: float = 1.5
    """A block with fewer: decide every ``emergency_interval_s``."""
    interval_s: float = 300.0
    """Mean time between two decisions of a node."""
    emergency_interval_s: float = 60.0
    urgent_interval_s: float = 10.0
    """The same while some block has no node."""
    view_age_s: float = 60.0
    """How old what a node knows of the others may be."""


DEFAULTS = PlacementSettings()


@dataclass(frozen=True, slots=True)
class SpanChoice:
    """Where a node should go: ``[first_block, end_block)``, and what it adds to the potential."""

    first_block: int
    end_block: int
    gain: float


def span_size(fitting_blocks: int, speed_one_session: float, longest_pass_s: float = 0.15) -> int:
    """How many blocks to host: what fits, but no more than a token passes in ``longest_pass_s``.

    A slow computer with much memory would otherwise be a slow hop for everybody. Its speed is not
    lost: it spreads over fewer blocks. ``speed_one_session`` in tokens/s through one block.
    """
    return max(1, min(fitting_blocks, int(speed_one_session * longest_pass_s)))


def gains(
    others: BlockVectors, node: PlacedNode, size: int, settings: PlacementSettings = DEFAULTS
) -> Vector:
    """What ``node`` adds to the potential for each first block ``[number_of_blocks - size + 1]``.

    Prefix sums over blocks: the cost does not depend on the number of nodes.
    """
    total = others.number_of_blocks
    share = node.speed / size
    mean = max((others.speed + node.speed) / total, 1e-9)
    exponent = _exponent(others, node, size, settings)
    spare = min(max(others.redundancy + size / total - settings.kept_redundancy, 0.0), 1.0)
    organisations = others.organisations()
    own = others.of_organisation.get(node.organisation)
    is_new = np.ones(total, dtype=np.int64) if own is None else (own == 0).astype(np.int64)
    gained = _value(
        others.throughput + share,
        others.replicas + node.availability,
        organisations + is_new,
        mean,
        exponent,
        spare,
        settings,
    ) - _value(others.throughput, others.replicas, organisations, mean, exponent, spare, settings)
    gained += _gained_in_country(others, node, size, exponent, settings)
    sums = np.concatenate(([0.0], np.cumsum(gained)))
    return np.asarray(sums[size:] - sums[:-size], dtype=np.float64)


def _exponent(
    others: BlockVectors, node: PlacedNode, size: int, settings: PlacementSettings
) -> float:
    replicas = float(others.replicas.sum()) + size * node.availability
    scarce = replicas < settings.scarce_replicas * others.number_of_blocks
    return settings.scarce_exponent if scarce else settings.exponent


def _value(
    throughput: Vector,
    replicas: Vector,
    organisations: Counts,
    mean: float,
    exponent: float,
    spare: float,
    s: PlacementSettings,
) -> Vector:
    weak = (mean / (throughput + s.throughput_floor * mean)) ** exponent
    lonely = np.maximum(0.0, s.wanted_replicas - replicas) ** 2
    missing = s.wanted_organisations - organisations
    dependent = s.organisation_weight * np.maximum(0, missing) ** 2
    dependent = dependent + s.spare_organisation_weight * spare * np.maximum(0, missing + 1) ** 2
    return np.asarray(-weak - s.replica_weight * lonely - dependent)


def _gained_in_country(
    others: BlockVectors,
    node: PlacedNode,
    size: int,
    exponent: float,
    settings: PlacementSettings,
) -> Vector:
    """The country's term."""
    total = others.number_of_blocks
    if not _country_counts(others, node, size, settings):
        return np.zeros(total)
    throughput = others.of_country.get(node.country, np.zeros(total))
    speed = float(throughput.sum()) + node.speed
    mean = max(speed / total, 1e-9)
    weight = settings.country_weight * speed / max(others.speed + node.speed, 1e-9)

    def weak(throughput: Vector) -> Vector:
        return np.asarray((mean / (throughput + settings.throughput_floor * mean)) ** exponent)

    return np.asarray(weight * (weak(throughput) - weak(throughput + node.speed / size)))


def _country_counts(
    others: BlockVectors, node: PlacedNode, size: int, settings: PlacementSettings
) -> bool:
    """Whether ``node``'s country and the swarm have nodes to spare for a border."""
    total = others.number_of_blocks
    hosted = others.hosted_in_country.get(node.country, 0) + size
    return (
        bool(node.country)
        and hosted >= settings.country_redundancy * total
        and others.redundancy + size / total >= settings.swarm_redundancy
    )


def loading_s(number_of_blocks: int, on_disk: Collection[int], seconds_per_block: float) -> Vector:
    """Time to get each block ``[number_of_blocks]``: none for those on the disk."""
    return np.array(
        [0.0 if block in on_disk else seconds_per_block for block in range(number_of_blocks)]
    )


def choose_span(
    others: BlockVectors,
    node: PlacedNode,
    size: int,
    load_s: Vector,
    settings: PlacementSettings = DEFAULTS,
) -> SpanChoice:
    """Where a joining node helps most, given how long each block ``[number_of_blocks]`` loads.

    ``node``'s own span is ignored and it must not be counted in ``others``. Of equal choices the
    first one is taken. A ``size`` beyond the model is cut.
    """
    if size < 1:
        raise ValueError("a span has at least one block")
    size = min(size, others.number_of_blocks)
    gained = gains(others, node, size, settings)
    load_span_s = _sums(load_s, size)
    first = _first_best(gained * settings.patience_s / (settings.patience_s + load_span_s))
    return SpanChoice(first, first + size, float(gained[first]))


class Stay(StrEnum):
    """Why a node stays."""

    BEST = "no span is worth the move"
    UNSAFE = "too few others serve the blocks that would be left"
    NOT_URGENT = "blocks that nobody serves come first"
    DAMPED = "enough others will decide in the same minute"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a serving node should do."""

    target: SpanChoice | None
    reason: Stay | None = None


def decide_move(
    others: BlockVectors,
    node: PlacedNode,
    load_s: Vector,
    *,
    chance: float,
    size: int | None = None,
    settings: PlacementSettings = DEFAULTS,
) -> Decision:
    """Whether a serving ``node``, not counted in ``others``, should move; ``chance`` in [0, 1).

    Worth it: the gain beyond that of the present span, less what is lost while loading, exceeds
    ``hysteresis`` fair shares of the potential. Allowed: :func:`may_leave`. Damped: with the
    probability that the shortage is larger than what the others who decide before they see this
    can bring.

    ``size`` blocks can be hosted. While blocks have no node at all a smaller span that only closes
    such a gap may be chosen, since it loads faster.
    """
    hosted = node.end_block - node.first_block
    size = min(size or hosted, others.number_of_blocks)
    urgent = is_urgent(with_node(others, node))
    patience_s = settings.urgent_patience_s if urgent else settings.patience_s
    here = float(gains(others, node, hosted, settings)[node.first_block])
    options = [_best_option(others, node, size, here, load_s, patience_s, settings)]
    if urgent and (rescue := min(_longest_gap(with_node(others, node)), size)) < size:
        options.append(_best_option(others, node, rescue, here, load_s, patience_s, settings))
    worth, target = max(options, key=lambda option: option[0])
    fair_share = 3.0 * node.speed / max((others.speed + node.speed) / others.number_of_blocks, 1e-9)
    redundancy = others.redundancy + hosted / others.number_of_blocks
    at_ease = redundancy >= settings.swarm_redundancy
    if worth <= (settings.hysteresis if at_ease else 1.0) * fair_share:
        return Decision(None, Stay.BEST)
    unserved = _unserved(others, node)
    if unserved.any() and not unserved[target.first_block : target.end_block].any():
        return Decision(None, Stay.NOT_URGENT)
    if not may_leave(others, node, (target.first_block, target.end_block), settings):
        return Decision(None, Stay.UNSAFE)
    if chance >= _needed_share(others, node, settings):
        return Decision(None, Stay.DAMPED)
    return Decision(target)


def _best_option(
    others: BlockVectors,
    node: PlacedNode,
    size: int,
    here: float,
    load_s: Vector,
    patience_s: float,
    settings: PlacementSettings,
) -> tuple[float, SpanChoice]:
    """The best span of ``size`` blocks, and what going there is worth."""
    there = gains(others, node, size, settings)
    load_span_s = _sums(load_s, size)
    worth = ((there - here) * patience_s - abs(here) * load_span_s) / (patience_s + load_span_s)
    if size == node.end_block - node.first_block:
        worth[node.first_block] = -np.inf
    first = _first_best(worth)
    return float(worth[first]), SpanChoice(first, first + size, float(there[first]))


def _longest_gap(others: BlockVectors) -> int:
    """Of blocks that nobody has or will have."""
    longest = length = 0
    for nodes in others.planned.tolist():
        length = 0 if nodes else length + 1
        longest = max(longest, length)
    return longest


def may_leave(
    others: BlockVectors,
    node: PlacedNode,
    target: tuple[int, int],
    settings: PlacementSettings = DEFAULTS,
) -> bool:
    """Whether enough others stay with every block that ``node`` would leave for ``target``.

    To be asked again right before the swap, with what was read after MOVING was announced.
    """
    left = np.zeros(others.number_of_blocks, dtype=bool)
    left[node.first_block : node.end_block] = True
    left[slice(*target)] = False
    if not left.any():
        return True
    rescues = bool(_unserved(others, node)[slice(*target)].any())
    relaxed = rescues or _mean_replicas(others, node) < settings.scarce_replicas
    needed = 1 if relaxed else settings.safe_replicas
    return bool(others.staying[left].min() >= needed)


def _unserved(others: BlockVectors, node: PlacedNode) -> npt.NDArray[np.bool_]:
    """Blocks that nobody serves, ``node`` included."""
    unserved: npt.NDArray[np.bool_] = others.staying == 0
    unserved[node.first_block : node.end_block] = False
    return unserved


def _mean_replicas(others: BlockVectors, node: PlacedNode) -> float:
    own = node.availability * (node.end_block - node.first_block)
    return (float(others.replicas.sum()) + own) / others.number_of_blocks


def decision_interval_s(vectors: BlockVectors, settings: PlacementSettings = DEFAULTS) -> float:
    """The mean time between two decisions of a node."""
    if is_urgent(vectors):
        return settings.urgent_interval_s
    if vectors.replicas.min() < settings.emergency_replicas:
        return settings.emergency_interval_s
    return settings.interval_s


def is_urgent(vectors: BlockVectors) -> bool:
    """Whether some block has no node and none is on its way there."""
    return bool((vectors.planned == 0).any())


def _needed_share(others: BlockVectors, node: PlacedNode, settings: PlacementSettings) -> float:
    """The share of the deciding nodes that are needed, in [0, 1]."""
    nodes = others.nodes + 1
    mean = (others.speed + node.speed) / others.number_of_blocks
    mean_speed = max((others.speed + node.speed) / nodes, 1e-9)
    hosted = node.end_block - node.first_block
    mean_size = float(others.planned.sum() + hosted) / nodes
    too_slow = float(np.maximum(0.0, mean - others.throughput).sum()) / mean_speed
    too_few = float(np.maximum(0.0, settings.wanted_replicas - others.replicas).sum()) / mean_size
    interval_s = decision_interval_s(with_node(others, node), settings)
    deciding_share = min(1.0, settings.view_age_s / interval_s)
    needed = max(too_slow, too_few) / nodes
    if _country_counts(others, node, hosted, settings):
        # Nobody but its own nodes can fill a country's gap.
        lacking = others.lacking_in(node.country)
        lacking[node.first_block : node.end_block] = False
        in_country = others.hosted_in_country.get(node.country, 0) + hosted
        needed = max(needed, float(lacking.sum()) / in_country)
    return min(1.0, needed / deciding_share)


def _first_best(values: Vector) -> int:
    """The first of the largest values; what rounding adds makes none the largest."""
    largest = float(values.max())
    if not np.isfinite(largest):
        return 0
    return int(np.argmax(values >= largest - 1e-9 * abs(largest)))


def _sums(values: Vector, size: int) -> Vector:
    """Of each window ``[len(values) - size + 1]``."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray(sums[size:] - sums[:-size], dtype=np.float64)
