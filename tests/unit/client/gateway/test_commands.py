from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarm.client import cli
from swarm.client.gateway.settings import GatewaySettings, load_gateway_settings
from swarm.protocol.errors import ConfigError
from swarm.protocol.identity import Identity


def test_keys_by_the_command(tmp_path: Path) -> None:
    file = ["--keys-file", str(tmp_path / "keys.json")]

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["gateway", "keys", *arguments, *file])
        assert result.exit_code == code, result.output
        return result.stdout

    account = Identity.load_or_create(tmp_path / "account.key")
    paid = ("--account", str(tmp_path / "account.key"), "--budget", "schools")
    made = json.loads(run("add", "Library", *paid, "--json"))
    run("add", "Nobody", "--account", str(tmp_path / "missing.key"), code=2)
    assert made["key"].startswith(f"sk-swarm-{made['id']}-")
    assert run("add", "Other").startswith("sk-swarm-")
    listed = json.loads(run("list", "--json"))["keys"]
    assert [key["name"] for key in listed] == ["Library", "Other"]
    assert "secret_sha256" not in listed[0]
    assert listed[0]["account"] == account.peer_id
    assert listed[0]["account_budget"] == "schools"
    assert "Library" in run("list")
    assert "revoked" in run("revoke", "Library")
    run("revoke", "Library", code=2)
    run("add", "", code=2)


def test_settings_of_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('peers = ["/x"]\n[gateway]\nport = 1\ngrace_s = 5\nmodels = ["a"]\n')
    settings, rest = load_gateway_settings({"port": 0, "host": None}, file)
    assert settings == GatewaySettings(port=0, grace_s=5.0, models=("a",))
    assert rest == {"peers": ["/x"]}


@pytest.mark.parametrize(
    "content",
    ["[gateway]\nports = 1", '[gateway]\nport = "1"', "[gateway]\nport = 70000", "gateway = 1"],
)
def test_settings_that_are_wrong(tmp_path: Path, content: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(content)
    with pytest.raises(ConfigError):
        load_gateway_settings({}, file)


def test_a_gateway_without_peers_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["gateway", "--model", str(tmp_path)], env={})
    assert result.exit_code == 2
    assert "--peers" in result.stderr


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("192.0.2.1", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert GatewaySettings(host=host).is_loopback is loopback
