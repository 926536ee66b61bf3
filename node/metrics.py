"""Numbers of a running node in Prometheus' text format, on a loopback port.

:class:`NodeMetrics` has its own registry, so that several nodes fit into one process. It is the
observer that the service reports to; the terminal view reads :meth:`NodeMetrics.totals`. What the
metrics mean: their help texts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.exposition import generate_latest

from swarm.journal import JournalBudget
from swarm.node.engine.api import EngineLoad
from swarm.protocol.errors import ErrorCode

LOOPBACK = "127.0.0.1"
SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class LoadedEngine(Protocol):
    """The part of an engine that is asked when metrics are read."""

    @property
    def load(self) -> EngineLoad: ...


class RunningService(Protocol):
    """The part of a service that is asked when metrics are read."""

    @property
    def session_streams(self) -> int: ...

    @property
    def journals(self) -> JournalBudget: ...


@dataclass(frozen=True, slots=True)
class NodeTotals:
    """Sums since the start, for the terminal view."""

    sessions_open: int = 0
    tokens: int = 0
    refused: int = 0
    decode_block_tokens: int = 0
    """Tokens x blocks computed one token at a time."""
    prefill_block_tokens: int = 0
    computed_s: float = 0.0
    """In which the device worked."""
    sessions: int = 0
    """Opened since the start."""
    energy_j: float = 0.0
    """Of all lives of the node since the start."""


class NodeMetrics:
    """Counters, gauges and histograms of one node. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._info = Info("swarm_node", "What computes on this node.", registry=registry)
        self._sessions_open = Gauge(
            "swarm_node_sessions_open", "Sessions open now.", registry=registry
        )
        self._session_streams = Gauge(
            "swarm_node_session_streams",
            "Streams of peers on which a session, or something for one, runs.",
            registry=registry,
        )
        self._journal_bytes = Gauge(
            "swarm_node_journal_bytes", "Kept of what sessions have sent on.", registry=registry
        )
        self._tasks = Gauge(
            "swarm_node_tasks", "Tasks of the event loop that have not ended.", registry=registry
        )
        self._sessions = Counter(
            "swarm_node_sessions_total", "Sessions opened since the start.", registry=registry
        )
        self._steps = Counter(
            "swarm_node_steps_total",
            "Steps computed; kind is prefill (many tokens) or decode (one token a row).",
            ["kind"],
            registry=registry,
        )
        self._replayed_tokens = Counter(
            "swarm_node_replayed_tokens_total",
            "Tokens (rows x positions) computed again for sessions that heal.",
            registry=registry,
        )
        self._tokens = Counter(
            "swarm_node_tokens_total",
            "Tokens (rows x positions) that went through the whole span of a session.",
            ["kind"],
            registry=registry,
        )
        self._block_tokens = Counter(
            "swarm_node_block_tokens_total",
            "Tokens (rows x positions) x blocks that they went through.",
            ["kind"],
            registry=registry,
        )
        self._computed_seconds = Counter(
            "swarm_node_computed_seconds_total",
            "Time in which the device worked.",
            registry=registry,
        )
        self._energy = Counter(
            "swarm_node_energy_joules_total",
            "Energy of this node's work; 0 when it cannot tell.",
            registry=registry,
        )
        self._batch_size = Histogram(
            "swarm_node_batch_size_steps",
            "Steps of different sessions computed in one batch.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "swarm_node_step_queue_seconds",
            "Time that a step waited for the device.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._compute = Histogram(
            "swarm_node_step_compute_seconds",
            "Time that the batch of a step took on the device.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._refused = Counter(
            "swarm_node_refused_total",
            "Frames, sessions and steps refused; code is the error that the peer was told.",
            ["code"],
            registry=registry,
        )
        self._bytes = Counter(
            "swarm_node_bytes_total",
            "Bytes of frames on session streams; direction is in or out.",
            ["direction"],
            registry=registry,
        )
        self._cache_used = Gauge(
            "swarm_node_cache_tokens_used", "Tokens reserved in the cache.", registry=registry
        )
        self._cache_total = Gauge(
            "swarm_node_cache_tokens_total", "Tokens that the cache can hold.", registry=registry
        )
        self._queued = Gauge(
            "swarm_node_queued_steps", "Steps that wait for the device.", registry=registry
        )
        self._busy = Gauge(
            "swarm_node_busy_ratio",
            "Share of the last 10 s in which the device worked.",
            registry=registry,
        )
        self._lock = threading.Lock()
        self._totals = NodeTotals()

    @property
    def totals(self) -> NodeTotals:
        """A consistent snapshot of the sums."""
        with self._lock:
            return self._totals

    def describe_engine(self, description: Mapping[str, str]) -> None:
        """Labels of ``swarm_node_info``: device, dtype, threads, packed linears, span and so on."""
        self._info.info(dict(description))

    def watch_engine(self, engine: LoadedEngine) -> None:
        """Read cache use and queue from the engine whenever the metrics are read."""
        self._cache_used.set_function(
            lambda: engine.load.cache_tokens_total - engine.load.cache_tokens_free
        )
        self._cache_total.set_function(lambda: engine.load.cache_tokens_total)
        self._queued.set_function(lambda: engine.load.queued_steps)
        self._busy.set_function(lambda: engine.load.busy_fraction)

    def watch_service(self, service: RunningService) -> None:
        """Read what is open, and what is kept for it, whenever the metrics are read."""
        self._session_streams.set_function(lambda: service.session_streams)
        self._journal_bytes.set_function(lambda: service.journals.used_bytes)

    def watch_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the tasks of a running loop whenever the metrics are read."""
        self._tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def forget_engine(self) -> None:
        """No engine is loaded and no service runs any more; neither is held on to."""
        for gauge in (
            *(self._cache_used, self._cache_total, self._queued, self._busy),
            *(self._session_streams, self._journal_bytes),
        ):
            gauge.set_function(lambda: 0)

    def session_opened(self) -> None:
        self._sessions.inc()
        self._sessions_open.inc()
        self._add(sessions_open=1, sessions=1)

    def session_closed(self) -> None:
        self._sessions_open.dec()
        self._add(sessions_open=-1)

    def step_done(
        self, *, rows: int, tokens: int, blocks: int, queue_us: int, compute_us: int
    ) -> None:
        """A step of ``rows x tokens`` went through so many blocks; ``tokens == 1`` is decode."""
        kind = "decode" if tokens == 1 else "prefill"
        self._steps.labels(kind).inc()
        self._tokens.labels(kind).inc(rows * tokens)
        self._queue.observe(queue_us / 1e6)
        self._compute.observe(compute_us / 1e6)
        block_tokens = rows * tokens * blocks
        self._block_tokens.labels(kind).inc(block_tokens)
        decode = block_tokens if tokens == 1 else 0
        self._add(
            tokens=rows * tokens,
            decode_block_tokens=decode,
            prefill_block_tokens=block_tokens - decode,
        )

    def replayed(self, *, tokens: int) -> None:
        """So many tokens (rows x positions) were computed again for a session that heals."""
        self._replayed_tokens.inc(tokens)

    def batch_computed(self, steps: int, compute_s: float) -> None:
        """The device computed ``steps`` steps in one batch, which took ``compute_s``."""
        self._batch_size.observe(steps)
        self._computed_seconds.inc(compute_s)
        self._add(computed_s=compute_s)

    def energy_used(self, more_j: float) -> None:
        """The node's work has taken so much more."""
        self._energy.inc(more_j)
        self._add(energy_j=more_j)

    def refused(self, code: ErrorCode) -> None:
        self._refused.labels(code.name.lower()).inc()
        self._add(refused=1)

    def bytes_moved(self, *, sent: int, received: int) -> None:
        self._bytes.labels("out").inc(sent)
        self._bytes.labels("in").inc(received)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def _add(self, **more: float) -> None:
        with self._lock:
            old = self._totals
            changed = {name: getattr(old, name) + value for name, value in more.items()}
            self._totals = replace(old, **changed)


class MetricsServer:
    """Serves a registry over HTTP on loopback, in a daemon thread of its own."""

    def __init__(self, registry: CollectorRegistry, port: int = 0) -> None:
        """Listen on ``port`` (0: a free one). Raises OSError when it is taken."""
        server, thread = start_http_server(port, addr=LOOPBACK, registry=registry)
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self.url = f"http://{LOOPBACK}:{server.server_port}/metrics"

    def close(self) -> None:
        """Stop and free the port; takes up to half a second, so not for the event loop's thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
