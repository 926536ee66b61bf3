from __future__ import annotations

from pathlib import Path

import pytest

from swarm.client.config import ClientSettings, SamplingSettings, load_settings, read_settings
from swarm.client.joining import settings_from
from swarm.protocol.errors import ConfigError, UsageError

PEER = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA"
OTHER = "/dns4/example.org/tcp/31330/p2p/12D3KooWB"


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'peers = ["{OTHER}"]\ndtype = "float32"\nstep_timeout_s = 5\n')
    environment = {"SWARM_PEERS": f"{PEER}, {OTHER}"}

    from_file = load_settings({}, environment={}, file_values=read_settings(file))
    assert from_file == ClientSettings((OTHER,), dtype="float32", step_timeout_s=5.0)
    merged = load_settings(
        {"dtype": "bfloat16"}, environment=environment, file_values=read_settings(file)
    )
    assert merged.peers == (PEER, OTHER)
    assert merged.dtype == "bfloat16"
    assert load_settings({"peers": PEER}, environment=environment).peers == (PEER,)


def test_a_file_wins_over_what_commands_do_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SWARM_AUDITS", "SWARM_LEDGER_FILE", "SWARM_PEERS_FILE"):
        monkeypatch.delenv(variable, raising=False)
    by_default = settings_from([PEER], None, None)
    assert by_default.audits
    assert by_default.ledger_file is not None
    file = tmp_path / "client.toml"
    file.write_text(f'audits = false\nledger_file = "{tmp_path / "books"}"\npeers_file = "/p"\n')
    settings = settings_from([PEER], None, file)
    assert not settings.audits
    assert settings.ledger_file == tmp_path / "books"
    assert settings.peers_file == Path("/p")
    monkeypatch.setenv("SWARM_AUDITS", "1")
    assert settings_from([PEER], None, file).audits


def test_flags_that_are_not_given_count_for_nothing() -> None:
    settings = load_settings(
        {"peers": None, "dtype": None, "identity_path": "~/key"}, environment={"SWARM_PEERS": PEER}
    )
    assert settings.peers == (PEER,)
    assert settings.dtype == "auto"
    assert settings.identity_path == Path("~/key").expanduser()


def test_nodes_that_were_met_stand_in_for_missing_peers(tmp_path: Path) -> None:
    file = tmp_path / "peers"
    environment = {"SWARM_PEERS_FILE": str(file)}
    with pytest.raises(ConfigError, match="no peers"):
        load_settings({}, environment=environment)
    file.write_text(f"{PEER}\n")
    settings = load_settings({}, environment=environment)
    assert (settings.peers, settings.peers_file) == ((), file)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "no peers to join through"),
        ({"peers": "192.0.2.7"}, "no peer address"),
        ({"peers": [1]}, "list of texts"),
        ({"peers": PEER, "dtype": "int3"}, "choose one of"),
        ({"peers": PEER, "step_timeout_s": 0}, "step_timeout_s"),
        ({"peers": PEER, "step_timeout_s": "fast"}, "number of seconds"),
        ({"peers": PEER, "colour": "red"}, "unknown setting 'colour'"),
    ],
)
def test_mistakes_are_named(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_settings(flags, environment={})


@pytest.mark.parametrize("content", ["peers = [", "\x00"])
def test_broken_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "client.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="no valid TOML"):
        load_settings({}, environment={}, file_values=read_settings(file))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings({}, environment={}, file_values=read_settings(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_sampling_is_bounded(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingSettings(**wrong)  # type: ignore[arg-type]
