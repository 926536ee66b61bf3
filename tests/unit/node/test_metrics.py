"""Metrics: names, types and values in Prometheus' text format, and a server that stops."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarm.client.metrics import ClientMetrics
from swarm.journal import JournalBudget
from swarm.node.engine.api import EngineLoad
from swarm.node.metrics import MetricsServer, NodeMetrics, NodeTotals
from swarm.protocol.errors import ErrorCode


class IdleEngine:
    load = EngineLoad(
        cache_tokens_total=100, cache_tokens_free=40, queued_steps=3, busy_fraction=0.5
    )


@pytest.fixture
def metrics() -> NodeMetrics:
    metrics = NodeMetrics()
    metrics.describe_engine({"device": "cpu", "dtype": "float32"})
    metrics.watch_engine(IdleEngine())
    metrics.session_opened()
    metrics.session_opened()
    metrics.session_closed()
    metrics.step_done(rows=2, tokens=5, blocks=3, queue_us=1500, compute_us=30_000)
    metrics.step_done(rows=2, tokens=1, blocks=3, queue_us=0, compute_us=3_000)
    metrics.batch_computed(4, 0.5)
    metrics.refused(ErrorCode.BAD_TENSOR)
    metrics.bytes_moved(sent=10, received=20)
    return metrics


def samples(text: str) -> dict[str, float]:
    return {
        sample.name
        + "".join(f",{key}={value}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class BusyService:
    def __init__(self) -> None:
        self.session_streams = 2
        self.journals = JournalBudget()
        self.journals.take(48)


async def test_what_is_open_and_what_runs_is_read_with_the_metrics() -> None:
    metrics = NodeMetrics()
    metrics.watch_service(BusyService())
    metrics.watch_tasks(asyncio.get_running_loop())
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ended.wait())
        # Metrics are read in the thread of their server.
        found = samples(await asyncio.to_thread(metrics.text))
        ended.set()
    assert found["swarm_node_session_streams"] == 2
    assert found["swarm_node_journal_bytes"] == 48
    assert found["swarm_node_tasks"] == 4  # with this one
    assert samples(metrics.text())["swarm_node_tasks"] == 1


def test_what_happened_is_counted(metrics: NodeMetrics) -> None:
    found = samples(metrics.text())
    assert found["swarm_node_info,device=cpu,dtype=float32"] == 1
    assert found["swarm_node_sessions_open"] == 1
    assert found["swarm_node_sessions_total"] == 2
    assert found["swarm_node_steps_total,kind=prefill"] == 1
    assert found["swarm_node_tokens_total,kind=prefill"] == 10
    assert found["swarm_node_tokens_total,kind=decode"] == 2
    assert found["swarm_node_batch_size_steps_bucket,le=3.0"] == 0
    assert found["swarm_node_batch_size_steps_bucket,le=4.0"] == 1
    assert found["swarm_node_step_queue_seconds_sum"] == pytest.approx(0.0015)
    assert found["swarm_node_step_compute_seconds_count"] == 2
    assert found["swarm_node_refused_total,code=bad_tensor"] == 1
    assert found["swarm_node_bytes_total,direction=in"] == 20
    assert found["swarm_node_bytes_total,direction=out"] == 10
    assert found["swarm_node_cache_tokens_used"] == 60
    assert found["swarm_node_cache_tokens_total"] == 100
    assert found["swarm_node_queued_steps"] == 3
    assert found["swarm_node_busy_ratio"] == 0.5


def test_totals_for_the_view(metrics: NodeMetrics) -> None:
    assert metrics.totals == NodeTotals(
        sessions_open=1,
        tokens=12,
        refused=1,
        sessions=2,
        decode_block_tokens=6,
        prefill_block_tokens=30,
        computed_s=0.5,
    )


def test_every_metric_has_a_type_and_a_help_text(metrics: NodeMetrics) -> None:
    families = list(text_string_to_metric_families(metrics.text() + ClientMetrics().text()))
    assert len(families) > 15
    assert [f.name for f in families if not f.documentation or f.type == "unknown"] == []


def test_two_nodes_in_one_process_do_not_share_numbers(metrics: NodeMetrics) -> None:
    assert samples(NodeMetrics().text())["swarm_node_sessions_open"] == 0


def test_the_server_answers_on_loopback_and_frees_port_and_thread(metrics: NodeMetrics) -> None:
    before = set(threading.enumerate())
    with MetricsServer(metrics.registry) as server:
        assert server.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(server.url, timeout=5) as answer:  # noqa: S310 (loopback)
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert samples(answer.read().decode())["swarm_node_sessions_open"] == 1
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(OSError, match="in use"):
            MetricsServer(metrics.registry, port)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # the one that answered may still be on its way out
        assert not thread.is_alive()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_client_metrics() -> None:
    metrics = ClientMetrics()
    metrics.chain_pass(2, 3, 0.1)
    metrics.hops_through_client(0)
    metrics.retried("next_hop_lost")
    metrics.sent(1, 100)
    metrics.received(1, 5)
    found = samples(metrics.text())
    assert found["swarm_client_hops_through_client_total"] == 0
    assert found["swarm_client_chain_passes_total"] == 1
    assert found["swarm_client_tokens_total"] == 6
    assert found["swarm_client_retries_total,reason=next_hop_lost"] == 1
    assert found["swarm_client_bytes_total,direction=out,hop=1"] == 100
