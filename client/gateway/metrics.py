"""Numbers of a gateway in Prometheus' text format. Labels never hold what clients send freely."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from swarm.client.gateway.turns import Turns
from swarm.client.metrics import ClientMetrics

SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class GatewayMetrics:
    """What HTTP adds to a client's metrics; one registry for both."""

    def __init__(self, client: ClientMetrics, turns: Turns) -> None:
        self._registry = registry = client.registry
        self._requests = Counter(
            "swarm_gateway_requests_total",
            "Requests answered, by route and HTTP status; 499 is a client that left.",
            ["route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "swarm_gateway_request_seconds",
            "Time from a request's headers to the end of its answer.",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._first_token_seconds = Histogram(
            "swarm_gateway_first_token_seconds",
            "Time from a request's headers to its first text, waiting for a turn included.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            "swarm_gateway_tokens_total",
            "Tokens of prompts and answers.",
            ["model", "kind"],
            registry=registry,
        )
        self._limited = Counter(
            "swarm_gateway_limited_total",
            "Requests refused by a limit: requests, tokens, answers or queue.",
            ["limit"],
            registry=registry,
        )
        running = Gauge(
            "swarm_gateway_answers_running", "Answers in the making.", registry=registry
        )
        running.set_function(lambda: turns.running)
        waiting = Gauge(
            "swarm_gateway_requests_waiting", "Requests that wait for a turn.", registry=registry
        )
        waiting.set_function(lambda: turns.waiting)

    def answered(self, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(duration_s)

    def first_token(self, duration_s: float) -> None:
        self._first_token_seconds.observe(duration_s)

    def tokens(self, model: str, prompt: int, completion: int) -> None:
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "completion").inc(completion)

    def limited(self, limit: str) -> None:
        self._limited.labels(limit).inc()

    def text(self) -> str:
        return generate_latest(self._registry).decode()
