"""Numbers of a client in Prometheus' text format; nothing is counted unless a program asks for it.

Serve them with ``prometheus_client.start_http_server(port, addr="127.0.0.1",
registry=metrics.registry)`` or print :meth:`ClientMetrics.text`.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

SECONDS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class ClientMetrics:
    """Counters of one client. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._passes = Counter(
            "swarm_client_chain_passes_total",
            "Steps that went through a whole chain.",
            registry=registry,
        )
        self._tokens = Counter(
            "swarm_client_tokens_total",
            "Tokens (rows x positions) sent through chains.",
            registry=registry,
        )
        self._pass_seconds = Histogram(
            "swarm_client_chain_pass_seconds",
            "Time from sending a step to its result.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._hops_through_client = Counter(
            "swarm_client_hops_through_client_total",
            "Activations between two hops that came through the client: 0 by design.",
            registry=registry,
        )
        self._retries = Counter(
            "swarm_client_retries_total",
            "Hops given up for another one, by reason.",
            ["reason"],
            registry=registry,
        )
        self._healing_seconds = Histogram(
            "swarm_client_healing_seconds",
            "Time in which a chain was made whole again.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._replayed_tokens = Counter(
            "swarm_client_replayed_tokens_total",
            "Tokens (rows x positions) that the client itself sent again to fill a hop's cache.",
            registry=registry,
        )
        self._replayed_bytes = Counter(
            "swarm_client_replayed_bytes_total",
            "Bytes of activations that the client itself sent again.",
            registry=registry,
        )
        self._bytes = Counter(
            "swarm_client_bytes_total",
            "Bytes of frames on session streams, by the hop's number in its chain, from 0.",
            ["hop", "direction"],
            registry=registry,
        )

    def chain_pass(self, rows: int, tokens: int, duration_s: float) -> None:
        """A step of ``rows x tokens`` came back after ``duration_s``."""
        self._passes.inc()
        self._tokens.inc(rows * tokens)
        self._pass_seconds.observe(duration_s)

    def hops_through_client(self, count: int) -> None:
        """``count`` tensors crossed the client between two hops of one chain."""
        self._hops_through_client.inc(count)

    def retried(self, reason: str) -> None:
        """``reason`` is one of a few fixed words, never a peer's text."""
        self._retries.labels(reason).inc()

    def healed(self, duration_s: float, replayed_tokens: int, replayed_bytes: int) -> None:
        """A chain was made whole again; hops count what they replay to each other themselves."""
        self._healing_seconds.observe(duration_s)
        self._replayed_tokens.inc(replayed_tokens)
        self._replayed_bytes.inc(replayed_bytes)

    def sent(self, hop: int, size_bytes: int) -> None:
        """Bytes of frames on the stream to a hop; the first one of a chain is 0."""
        self._bytes.labels(str(hop), "out").inc(size_bytes)

    def received(self, hop: int, size_bytes: int) -> None:
        self._bytes.labels(str(hop), "in").inc(size_bytes)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
