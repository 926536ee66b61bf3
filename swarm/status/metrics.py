"""The swarm in Prometheus' text format, and how the page itself does."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from swarm.status.snapshot import Snapshot, Standing

SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class StatusMetrics:
    """Counts what the page does and shows the latest snapshot."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.snapshot: Snapshot | None = None
        self._requests = Counter(
            "swarm_status_requests_total",
            "Requests answered, by kind of page and status code.",
            ["page", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "swarm_status_request_seconds",
            "Time to answer a request.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._look_seconds = Histogram(
            "swarm_status_look_seconds",
            "Time to take one look at the swarm into account.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_SwarmCollector(self))

    def request_done(self, page: str, status: int, duration_s: float) -> None:
        self._requests.labels(page, str(status)).inc()
        self._seconds.observe(duration_s)

    def look_done(self, duration_s: float) -> None:
        self._look_seconds.observe(duration_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _SwarmCollector(Collector):
    """Reads the snapshot when the metrics are read."""

    def __init__(self, metrics: StatusMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []  # nothing to compare with when it is registered

    def collect(self) -> Iterator[Metric]:
        snapshot = self._metrics.snapshot
        if snapshot is None:
            return
        yield from _totals(snapshot)
        yield from _models(snapshot)


def _totals(snapshot: Snapshot) -> Iterator[Metric]:
    totals = snapshot.totals
    for name, text, value in (
        ("heard_timestamp_seconds", "When the newest news was announced.", snapshot.heard_unix_s),
        ("look_timestamp_seconds", "When the swarm was last looked at.", snapshot.taken_unix_s),
        ("volunteers_registered", "Nodes seen so far.", totals.volunteers_registered),
        ("volunteers_online", "Nodes that serve.", totals.volunteers_online),
        ("organisations", "Organisations that serving nodes declare.", totals.organisations),
        ("countries", "Countries that serving nodes declare.", totals.countries),
        ("adapters", "Adapters on serving nodes.", totals.adapters),
        (
            "incidents_open",
            "Incidents that go on.",
            sum(incident.closed_unix_s is None for incident in snapshot.incidents),
        ),
    ):
        yield GaugeMetricFamily(f"swarm_{name}", text, value)
    tokens = CounterMetricFamily(
        "swarm_tokens", "Tokens served since this page began, as announced.", labels=["kind"]
    )
    tokens.add_metric(["generated"], totals.ever.generated_tokens)
    tokens.add_metric(["prompt"], totals.ever.prompt_tokens)
    yield tokens
    yield CounterMetricFamily(
        "swarm_energy_joules", "Energy of nodes that announce it.", totals.ever.energy_j
    )
    yield CounterMetricFamily(
        "swarm_co2_grams", "CO2 equivalent of this energy, by country.", totals.ever.co2_g
    )
    nodes = GaugeMetricFamily("swarm_nodes", "Nodes by state.", labels=["state"])
    for standing in Standing:
        nodes.add_metric([standing], sum(node.standing is standing for node in snapshot.nodes))
    yield nodes


def _models(snapshot: Snapshot) -> Iterator[Metric]:
    labels = ["model", "revision"]
    least = GaugeMetricFamily(
        "swarm_model_least_replicas", "Serving nodes of the weakest block.", labels=labels
    )
    serving = GaugeMetricFamily("swarm_model_nodes", "Serving nodes.", labels=labels)
    blocks = GaugeMetricFamily(
        "swarm_model_blocks",
        "Blocks by how many nodes serve each; replicas 5 means 5 or more.",
        labels=[*labels, "replicas"],
    )
    announced = GaugeMetricFamily(
        "swarm_model_announced_tokens_per_second",
        "One session on the fastest nodes, by their own word.",
        labels=labels,
    )
    probe_up = GaugeMetricFamily(
        "swarm_probe_success", "Whether the latest probe succeeded.", labels=labels
    )
    probe_first = GaugeMetricFamily(
        "swarm_probe_first_token_seconds", "Time to first token when probed.", labels=labels
    )
    probe_speed = GaugeMetricFamily(
        "swarm_probe_tokens_per_second", "Tokens per second when probed.", labels=labels
    )
    probe_at = GaugeMetricFamily(
        "swarm_probe_timestamp_seconds", "When it was probed.", labels=labels
    )
    for model in snapshot.models:
        own = [model.name, model.revision[:16]]
        least.add_metric(own, model.least_replicas)
        serving.add_metric(own, model.nodes_serving)
        announced.add_metric(own, model.announced_tokens_per_s)
        for level in range(6):
            count = sum(min(replicas, 5) == level for replicas in model.replicas)
            blocks.add_metric([*own, str(level)], count)
        if model.probe is not None:
            probe_up.add_metric(own, float(model.probe.succeeded))
            probe_at.add_metric(own, model.probe.at_unix_s)
            if model.probe.succeeded:
                probe_first.add_metric(own, model.probe.time_to_first_token_s)
                probe_speed.add_metric(own, model.probe.tokens_per_s)
    yield from (least, serving, blocks, announced, probe_up, probe_first, probe_speed, probe_at)
