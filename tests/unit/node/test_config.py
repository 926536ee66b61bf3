"""Settings: which source wins, what is refused and in which words."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.node.config import (
    BlockSpan,
    NodeSettings,
    PeerSettings,
    SeedSettings,
    load_identity_file,
    load_settings,
    parse_blocks,
    parse_size,
)
from swarm.protocol.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def load(tmp_path: Path, text: str = "", **flags: Any) -> NodeSettings:
    path = tmp_path / "node.toml"
    path.write_text(text)
    return load_settings(NodeSettings, path, {}, {"model": "m", **flags})


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    kind: type[PeerSettings] = SeedSettings if path.stem.startswith("seed") else NodeSettings
    assert load_settings(kind, path, {}, {})


def test_the_node_example_names_every_key() -> None:
    text = (EXAMPLES / "node.toml").read_text()
    assert [item.name for item in fields(NodeSettings) if f"{item.name} =" not in text] == []


def test_the_key_of_a_running_node_or_seed_is_found_by_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "any.toml"
    path.write_text('model = "m"\nrelay = true\nnonsense = 1\ndata_dir = "/srv/file"\n')
    environment = {"SWARM_NODE_DATA_DIR": "/srv/environment", "SWARM_NODE_MODEL": "m"}
    assert load_identity_file(path, {}, None) == Path("/srv/file/identity.key")
    assert load_identity_file(path, environment, None) == Path("/srv/environment/identity.key")
    assert load_identity_file(path, environment, Path("a.key")) == Path("a.key")
    assert load_identity_file(None, {}, None) == PeerSettings().identity_file


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('model = "file"\ndevice = "cuda"\nthreads = 1\n')
    environment = {"SWARM_NODE_MODEL": "environment", "SWARM_NODE_DEVICE": "mps", "HOME": "/"}
    settings = load_settings(NodeSettings, path, environment, {"model": "flag", "peers": None})
    assert (settings.model, settings.device, settings.threads) == ("flag", "mps", 1)
    assert settings.dtype == "auto"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('devise = "cpu"', ["devise", "did you mean 'device'", "node.toml"]),
        ('threads = "many"', ["threads", "whole number"]),
        ('hours = "late"', ["hours", "20:00-08:00"]),
        ("drain_timeout_s = -1", ["drain_timeout_s"]),
        ("threads = true", ["threads", "whole number"]),
        ("metrics = 3", ["metrics", "true or false"]),
        ("peers = [3]", ["peers", "list of texts"]),
        ('blocks = "10:0"', ["10:0", "greater"]),
        ('blocks = "0:10"\nnumber_of_blocks = 3', ["blocks or number_of_blocks"]),
        ('device = "tpu"', ["tpu", "cuda"]),
        ('dtype = "int3"', ["int3", "bfloat16"]),
        ('peers = ["192.0.2.1:80"]', ["192.0.2.1:80", "/p2p/"]),
        ("threads = 0", ["threads", "greater than 0"]),
        ("metrics_port = 70000", ["70000"]),
        ("listen_addresses = []", ["listen_addresses"]),
        ("announce_period_s = 0.1", ["announce_period_s"]),
        ('log_level = "loud"', ["loud"]),
        ('display_name = "a\\nb"', ["display_name"]),
        (f'display_name = "{"ä" * 33}"', ["display_name", "64"]),
        (f'organisation = "{"ä" * 33}"', ["organisation", "64"]),
        ('organisation = "a\\nb"', ["organisation"]),
        ('country = "ke"', ["country", "KE"]),
        ('country = "Kenya"', ["country", "KE"]),
        ("model = ", ["TOML"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_model_is_said() -> None:
    with pytest.raises(ConfigError, match="model is not set"):
        load_settings(NodeSettings, None, {}, {})


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(NodeSettings, tmp_path / "absent.toml", {}, {"model": "m"})


def test_an_unknown_environment_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SWARM_NODE_MODLE.*did you mean 'model'"):
        load_settings(NodeSettings, None, {"SWARM_NODE_MODLE": "x"}, {})


def test_a_seed_ignores_what_the_environment_says_to_nodes() -> None:
    environment = {"SWARM_NODE_CACHE_TOKENS": "64", "SWARM_NODE_DISPLAY_NAME": "both"}
    assert load_settings(SeedSettings, None, environment, {}).display_name == "both"
    with pytest.raises(ConfigError, match="SWARM_NODE_CASH_TOKENS"):
        load_settings(SeedSettings, None, {"SWARM_NODE_CASH_TOKENS": "64"}, {})


def test_lists_come_repeated_or_separated_by_commas(tmp_path: Path) -> None:
    settings = load(tmp_path, peers=["/a/p2p/x,/b/p2p/y", "/c/p2p/z"])
    assert settings.peers == ("/a/p2p/x", "/b/p2p/y", "/c/p2p/z")


def test_sizes_and_paths_are_read(tmp_path: Path) -> None:
    settings = load(tmp_path, 'memory_bytes = "1.5 GiB"\ndata_dir = "/d"')
    assert settings.memory_bytes == 3 * 2**29
    assert settings.identity_file == Path("/d/identity.key")


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("2 kB", 2000), ("2KiB", 2048), ("3m", 3_000_000), ("1TB", 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1023), st.integers(1, 1024))
def test_a_span_survives_being_written_and_read(first: int, end: int) -> None:
    if first < end:
        assert parse_blocks(str(BlockSpan(first, end))) == BlockSpan(first, end)
    else:
        with pytest.raises(ConfigError):
            parse_blocks(f"{first}:{end}")


@given(st.text())
def test_any_text_is_a_span_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert len(parse_blocks(text)) > 0
