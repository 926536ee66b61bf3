"""The pure part of the network lab: when a packet arrives."""

from __future__ import annotations

import random

import pytest

from scripts.link_emulator import Link, Pipe

PACKET_BYTES = 1250  # 10,000 bits: 1 ms at 10 Mbit/s


def pipe(link: Link, seed: int = 1) -> Pipe:
    return Pipe(link, random.Random(seed))


def test_latency_and_serialisation_add_up() -> None:
    wire = pipe(Link(latency_ms=20, rate_mbit_s=10))
    assert wire.arrival_s(5.0, PACKET_BYTES) == pytest.approx(5.021)
    assert wire.arrival_s(5.0, PACKET_BYTES) == pytest.approx(5.022)
    assert wire.arrival_s(6.0, PACKET_BYTES) == pytest.approx(6.021)


def test_a_full_queue_drops_the_last_packet() -> None:
    wire = pipe(Link(rate_mbit_s=10, queue_ms=2))
    arrivals = [wire.arrival_s(0.0, PACKET_BYTES) for _ in range(5)]
    assert arrivals == [
        pytest.approx(0.001),
        pytest.approx(0.002),
        pytest.approx(0.003),
        None,
        None,
    ]
    assert (wire.packets, wire.lost, wire.size_bytes) == (3, 2, 3 * PACKET_BYTES)


def test_jitter_keeps_the_order_and_its_bounds() -> None:
    wire = pipe(Link(latency_ms=10, jitter_ms=30))
    sent = [index / 1000 for index in range(500)]
    arrivals = [wire.arrival_s(now, PACKET_BYTES) or 0.0 for now in sent]
    assert arrivals == sorted(arrivals)
    assert all(0.010 <= late - now <= 0.040 for now, late in zip(sent, arrivals, strict=True))


def test_loss_is_the_same_for_the_same_seed() -> None:
    def lost(seed: int) -> list[bool]:
        wire = pipe(Link(loss=0.25), seed)
        return [wire.arrival_s(0.0, PACKET_BYTES) is None for _ in range(2000)]

    assert lost(7) == lost(7)
    assert lost(7) != lost(8)
    assert 0.2 < sum(lost(7)) / 2000 < 0.3
