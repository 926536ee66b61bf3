"""What docs/operators.md and the dashboard tell operators is true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from typer.main import get_command

from swarm.client.cli import app as swarm_app
from swarm.client.gateway.metrics import GatewayMetrics
from swarm.client.gateway.turns import Turns
from swarm.client.metrics import ClientMetrics
from swarm.node.cli import app as node_app
from swarm.node.config import ENVIRONMENT_PREFIX, NodeSettings
from swarm.node.metrics import NodeMetrics
from swarm.status.metrics import StatusMetrics
from swarm.status.snapshot import ModelStatus, Probe, Snapshot, Work

DOCUMENTS = Path(__file__).parents[2] / "docs"
SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def manifests() -> list[dict[str, Any]]:
    page = (DOCUMENTS / "operators.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return [item for item in yaml.safe_load_all(text) if item]


def options(command: list[str]) -> Iterator[tuple[str, set[str]]]:
    """Each option of a command line, and those that the command knows."""
    known: Any = get_command(node_app if command[0] == "swarm-node" else swarm_app)
    for word in command[1:]:
        if word not in getattr(known, "commands", {}):
            break
        known = known.commands[word]
    names = {name for parameter in known.params for name in parameter.opts}
    for word in command[2:]:
        if word.startswith("--"):
            yield word, names


def test_the_manifests_are_complete_and_their_commands_exist() -> None:
    documents = manifests()
    kinds = [document["kind"] for document in documents]
    assert kinds == ["Secret", "Service", "StatefulSet", "StatefulSet", "Deployment"]
    for document in documents:
        if "template" not in document.get("spec", {}):
            continue
        pod = document["spec"]["template"]["spec"]
        assert (
            document["spec"]["selector"]["matchLabels"]
            == (document["spec"]["template"]["metadata"]["labels"])
        )
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        for option, known in options(container["args"]):
            assert option in known, option
        volumes = {volume["name"] for volume in pod["volumes"]} | {
            claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", ())
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for variable in container.get("env", ()):
            if variable["name"].startswith(ENVIRONMENT_PREFIX):
                key = variable["name"].removeprefix(ENVIRONMENT_PREFIX).lower()
                assert key in {field.name for field in fields(NodeSettings)}


def test_the_commands_of_the_page_have_their_options() -> None:
    page = (DOCUMENTS / "operators.md").read_text(encoding="utf-8")
    found = re.findall(
        r"(swarm(?:-node)? (?:join|seed|identity|status-page|gateway)(?: [^`\n]*)?)", page
    )
    assert len(found) > 4
    for line in found:
        words = line.split()
        command = words[:4] if words[2:3] == ["keys"] else words[:2]
        for option, known in options(command + OPTION.findall(line)):
            assert option in known, line


@pytest.fixture
def names() -> set[str]:
    """Of all metrics that nodes, gateways and status pages have."""
    status = StatusMetrics()
    model = ModelStatus(
        "m", "aa", 1, (1,), 1, "thin", 1.0, (), 1.0, 1.0, (), Work(), Probe("aa", 1.0, True)
    )
    status.snapshot = Snapshot(1, 1.0, 1.0, 30.0, models=(model,))
    client = ClientMetrics()
    GatewayMetrics(client, Turns(1, 1))
    registries: list[CollectorRegistry] = [
        NodeMetrics().registry,
        client.registry,
        status.registry,
    ]
    return {
        family.name + suffix
        for registry in registries
        for family in registry.collect()
        for suffix in SUFFIXES
    }


def test_the_dashboard_asks_for_metrics_that_exist(names: set[str]) -> None:
    board = json.loads((DOCUMENTS / "grafana-dashboard.json").read_text(encoding="utf-8"))
    asked = {
        name
        for panel in board["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"swarm_\w+", target["expr"])
    }
    assert len(asked) > 20
    assert asked - names == set()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_the_alarms_of_the_page_exist(names: set[str]) -> None:
    page = (DOCUMENTS / "operators.md").read_text(encoding="utf-8")
    assert set(re.findall(r"swarm_\w+", page)) - names == set()
