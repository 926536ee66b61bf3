"""Agreement on a protocol version."""

import pytest

from swarm.protocol import version
from swarm.protocol.errors import ErrorCode, ProtocolError


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 9), (4, 4), 4)],
)
def test_the_highest_version_in_common_is_chosen(
    ours: tuple[int, int], theirs: tuple[int, int], agreed: int
) -> None:
    assert version.negotiate(*ours, *theirs) == agreed


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((1, 1), (2, 2)), ((2, 3), (1, 1)), ((1, 5), (4, 3)), ((1, 1), (65535, 0))],
)
def test_nothing_in_common_is_an_error(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError) as caught:
        version.negotiate(*ours, *theirs)
    assert caught.value.code is ErrorCode.UNSUPPORTED_VERSION


def test_our_own_range_is_in_order() -> None:
    assert 1 <= version.MINIMUM_VERSION <= version.MAXIMUM_VERSION


def test_software_version_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    version.software_version.cache_clear()
    assert version.software_version()
    monkeypatch.setattr(version, "DISTRIBUTION", "a-distribution-that-is-not-installed")
    version.software_version.cache_clear()
    assert version.software_version() == "unknown"
    version.software_version.cache_clear()
