from __future__ import annotations

import stat
from pathlib import Path

import pytest

from swarm.client.gateway.keys import CHECK_PERIOD_S, KeyFile, Payer, make_key
from swarm.protocol.errors import ConfigError, UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "keys.json"


def test_a_key_is_found_by_its_text_only(path: Path) -> None:
    keys = KeyFile(path)
    payer = Payer("12D3KooW", "/keys/library.key", "schools")
    key, text = make_key("Library", payer=payer, answers=3)
    assert key.payer == payer
    other, other_text = make_key("Other")
    keys.add(key)
    keys.add(other)
    assert keys.find(text, 0) == key
    assert keys.find(other_text, 0) == other
    assert KeyFile(path).find(text, 0) == key
    mixed = text[: text.rindex("-", 0, 26)] + "-" + other_text.rpartition("-")[2]
    for wrong in ("", text[:-1], text + "A", text.upper(), mixed, key.secret_sha256, "sk-swarm-"):
        assert keys.find(wrong, 0) is None


def test_the_file_holds_no_secret_and_is_the_owner_s(path: Path) -> None:
    key, text = make_key("Library")
    KeyFile(path).add(key)
    content = path.read_text()
    assert text.removeprefix(f"sk-swarm-{key.key_id}-") not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyFile(path).all()


def test_changes_by_others_are_noticed(path: Path) -> None:
    serving, managing = KeyFile(path), KeyFile(path)
    key, text = make_key("Library")
    assert serving.find(text, 0) is None
    managing.add(key)
    assert serving.find(text, CHECK_PERIOD_S) == key
    managing.revoke("Library")
    assert serving.find(text, 2 * CHECK_PERIOD_S) is None
    with pytest.raises(UsageError, match="no valid key"):
        managing.revoke(key.key_id)


def test_a_damaged_file_takes_nothing_away_from_a_running_gateway(path: Path) -> None:
    keys = KeyFile(path)
    key, text = make_key("Library")
    keys.add(key)
    path.write_text("{")
    with pytest.raises(ConfigError, match="no file of API keys"):
        KeyFile(path).all()
    assert keys.find(text, 10) == key


def test_two_keys_of_one_name_are_revoked_by_id(path: Path) -> None:
    keys = KeyFile(path)
    for _ in range(2):
        keys.add(make_key("Library")[0])
    with pytest.raises(UsageError, match="several keys"):
        keys.revoke("Library")
    first = keys.all()[0]
    keys.revoke(first.key_id)
    assert [key.revoked_unix_s is None for key in keys.all()] == [False, True]


@pytest.mark.parametrize("name", ["", "x" * 101, "line\nbreak"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError):
        make_key(name)
