from __future__ import annotations

import io

import pytest
from rich.console import Console

from swarm.client.listing import ServedModel, describe_coverage, models_table
from swarm.membership import ModelSummary
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType

SUMMARY = ModelSummary("tiny", bytes(range(32)), 6, 32, 1)


def node(
    first_block: int, end_block: int, name: str = "", state: NodeState = NodeState.ONLINE
) -> NodeRecord:
    return NodeRecord(
        peer_id=f"12D3KooW{first_block}{end_block}",  # type: ignore[arg-type]
        model_name="tiny",
        model_revision=SUMMARY.model_revision,
        number_of_blocks=6,
        shards=1,
        first_block=first_block,
        end_block=end_block,
        state=state,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=1,
        expires_unix_s=1,
        display_name=name,
    )


def test_missing_blocks_and_replicas() -> None:
    model = ServedModel.of(SUMMARY, [node(2, 4), node(0, 3), node(4, 6, state=NodeState.JOINING)])
    assert model.replicas_per_block == (1, 1, 2, 1, 0, 0)
    assert model.missing_blocks == (4, 5)
    as_json = model.to_json()
    assert as_json["complete"] is False
    assert as_json["missing_blocks"] == [4, 5]
    assert [entry["first_block"] for entry in as_json["nodes"]] == [0, 2, 4]
    assert as_json["nodes"][2]["state"] == "joining"
    assert as_json["revision"] == SUMMARY.model_revision.hex()


@pytest.mark.parametrize(
    ("replicas", "text"),
    [([], ""), ([1, 1, 1], "0:3 x1"), ([2, 1, 1, 0], "0:1 x2  1:3 x1  3:4 none")],
)
def test_coverage_in_words(replicas: list[int], text: str) -> None:
    assert describe_coverage(replicas) == text


def test_names_of_strangers_are_no_markup() -> None:
    screen = io.StringIO()
    table = models_table([ServedModel.of(SUMMARY, [node(0, 6, name="[red]x[/nonsense]")])])
    Console(file=screen, width=140).print(table)
    assert "[red]x[/nonsense]" in screen.getvalue()
    assert "yes" in screen.getvalue()
