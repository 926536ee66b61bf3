"""The pure parts of the status page: texts, block map, uptime, work, incidents, charts, queries."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.status.block_map import block_cells, join_command, weak_spans
from swarm.status.carbon import GridFactors
from swarm.status.charts import Axes, line_chart, nice_scale
from swarm.status.incidents import Finding, changes, is_mass_loss, named_blocks
from swarm.status.languages import LANGUAGES, negotiated, read_languages
from swarm.status.plain_text import ADDRESS, plain_text
from swarm.status.presence import extended, since, uptime
from swarm.status.snapshot import Incident, Work
from swarm.status.work import MOST_TOKENS_PER_S, Counters, work_between

DAY_S = 86_400.0
RECORD = NodeRecord(
    peer_id=Identity.generate().peer_id,
    model_name="tiny",
    model_revision=bytes(32),
    number_of_blocks=30,
    shards=1,
    first_block=0,
    end_block=10,
    state=NodeState.ONLINE,
    dtype=DType.FLOAT32,
    minimum_version=1,
    maximum_version=1,
    sequence=1,
    expires_unix_s=2,
    started_unix_s=1000,
)


# --- texts of strangers --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("declared", "shown"),
    [
        ("University of Nairobi", "University of Nairobi"),
        ("  two\n lines\t", "two lines"),
        ("evil \u202egnp.exe\u202c", "evil gnp.exe"),
        ("क्षत्रिय", "क्षत्रिय"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # noqa: RUF001
        ("call me at 41.90.1.2:31330", "call me at …"),
        ("/ip4/10.0.0.1/tcp/1/p2p/12D3", "…"),
        ("/dns4/seed.example.org/tcp/1", "…"),
        ("２００．１．２．３", "…"),  # noqa: RUF001
        ("at 2001:db8::1 now", "at … now"),
        ("[fe80::1]:80", "…"),
        ("version 1.2.3", "version 1.2.3"),
        ("12:30 to 13:45", "12:30 to 13:45"),
        ("x" * 70, "x" * 63 + "…"),
    ],
)
def test_names_are_made_plain(declared: str, shown: str) -> None:
    assert plain_text(declared) == shown


@given(st.text(max_size=80))
def test_no_text_brings_an_address_or_a_second_line(text: str) -> None:
    shown = plain_text(text)
    assert len(shown) <= 64
    assert "\n" not in shown
    assert ADDRESS.search(shown) is None
    assert plain_text(shown) == shown


# --- block map -----------------------------------------------------------------------------------
def test_the_weakest_blocks_are_named_with_the_line_that_helps() -> None:
    spans = weak_spans("SmolLM2", [2, 2, 0, 0, 0, 1, 0, 3])
    assert [(span.first_block, span.end_block, span.replicas) for span in spans] == [
        (2, 5, 0),
        (6, 7, 0),
    ]
    assert spans[0].command == 'swarm-node join SmolLM2 --blocks 2:5 --peers "$SWARM_PEERS"'


def test_a_healthy_model_has_no_weak_blocks() -> None:
    assert weak_spans("m", [5, 6, 7]) == ()


@pytest.mark.parametrize("name", ["$(id)", "a;b", "--config=/etc/passwd", "a b", "`id`", "x\ny"])
def test_no_name_of_a_model_reaches_the_shell_of_who_copies_a_line(name: str) -> None:
    assert join_command(name, 0, 1, peers="P") == 'swarm-node join MODEL --blocks 0:1 --peers "P"'


@given(st.lists(st.integers(0, 9), min_size=1, max_size=400))
def test_cells_cover_every_block_once(replicas: list[int]) -> None:
    cells = block_cells(replicas)
    assert [
        cell.replicas for cell in cells for _ in range(cell.first_block, cell.end_block)
    ] == replicas


# --- uptime --------------------------------------------------------------------------------------
def test_uptime_counts_only_the_time_in_which_the_page_looked() -> None:
    present = extended(extended((), None, 0.0), 0.0, 100.0)
    watched = ((0.0, 200.0), (500.0, 600.0))
    share = uptime(present, watched, window_s=DAY_S, registered_unix_s=0.0, now_unix_s=600.0)
    assert share == pytest.approx(100 / 300)


def test_a_node_that_comes_back_begins_a_new_interval() -> None:
    seen = extended((), None, 10.0)
    seen = extended(seen, 10.0, 20.0)
    seen = extended(seen, 30.0, 40.0)  # it was not there at 30
    assert seen == ((10.0, 20.0), (40.0, 40.0))
    assert since(seen, 25.0) == ((40.0, 40.0),)


def test_nobody_has_an_uptime_before_the_page_has_looked() -> None:
    assert uptime((), (), window_s=DAY_S, registered_unix_s=5.0, now_unix_s=5.0) is None


# --- work ----------------------------------------------------------------------------------------
def test_work_is_the_growth_of_the_counters_in_shares_of_the_model() -> None:
    before = Counters(1000, 3000, 600, 50)
    record = replace(
        RECORD, decode_block_tokens=6000, prefill_block_tokens=1200, energy_j=3_600_050
    )
    work = work_between(before, record, elapsed_s=600.0, grams_per_kwh=70.0)
    assert work == Work(100.0, 20.0, 3_600_000.0, 70.0, 120.0)


def test_a_node_that_started_anew_counts_from_zero() -> None:
    before = Counters(500, 1_000_000, 0, 0)
    work = work_between(
        before, replace(RECORD, decode_block_tokens=300), elapsed_s=30.0, grams_per_kwh=None
    )
    assert work.generated_tokens == 10.0


def test_absurd_counters_are_cut_to_what_a_computer_can_do() -> None:
    record = replace(RECORD, decode_block_tokens=2**53 - 1, energy_j=2**53 - 1)
    work = work_between(Counters(1000, 0, 0, 0), record, elapsed_s=30.0, grams_per_kwh=None)
    assert work.generated_tokens == pytest.approx(MOST_TOKENS_PER_S * 30 / 3)
    assert work.energy_j <= 20_000 * 30


def test_a_counter_that_falls_takes_nothing_away() -> None:
    assert work_between(Counters(1000, 900, 0, 0), RECORD, elapsed_s=9.0, grams_per_kwh=None) == (
        Work()
    )


def test_the_table_of_grid_factors_names_year_and_source_of_each_country() -> None:
    factors = GridFactors.read()
    assert factors.grams_per_kwh("FR") is not None
    assert factors.grams_per_kwh("") is None
    for factor in factors.factors.values():
        assert 0 < factor.grams_per_kwh < 1500
        assert factor.year > 2015
        assert factor.source


# --- incidents -----------------------------------------------------------------------------------
OPEN = Incident(1, "blocks_missing", "aa", "m", "0-9", 100.0)


def test_an_incident_goes_on_while_it_is_found_and_ends_with_it() -> None:
    found = Finding("blocks_missing", "aa", "m", "0-4")
    assert changes([OPEN], [found]) == ([], [(OPEN, found)], [])
    assert changes([OPEN], []) == ([], [], [OPEN])
    assert changes([], [found]) == ([found], [], [])


def test_a_blind_page_ends_no_incident() -> None:
    blind = Finding("page_blind")
    assert changes([OPEN], [blind]) == ([blind], [], [])


def test_many_nodes_at_once_are_an_incident_and_few_are_not() -> None:
    assert is_mass_loss(3, 10)
    assert not is_mass_loss(2, 2)
    assert not is_mass_loss(10, 1000)


def test_blocks_are_named_in_runs() -> None:
    assert named_blocks([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert named_blocks(range(0, 40, 2)).endswith("…")


# --- charts --------------------------------------------------------------------------------------
@given(st.floats(0, 1e12))
def test_an_axis_holds_its_highest_value_in_few_round_steps(highest: float) -> None:
    top, step = nice_scale(highest)
    assert top >= highest * 0.99999
    assert round(top / step) <= 5


def test_a_gap_in_time_is_a_gap_in_the_line() -> None:
    axes = Axes(0.0, 1000.0, 10.0, 2, str, str)
    points = [(0.0, 1.0), (10.0, 2.0), (500.0, 3.0), (510.0, 1.0)]
    assert line_chart(points, axes, "<label>").count("<polyline") == 2
    assert "&lt;label&gt;" in line_chart(points, axes, "<label>")


def test_counts_have_whole_steps_and_rare_looks_are_joined() -> None:
    axes = Axes(0.0, 40_000.0, 300.0, 2, str, lambda value: f"[{value}]")
    hourly = [(hour * 3600.0, 1.0) for hour in range(10)]
    chart = line_chart(hourly, axes, "replicas", whole=True)
    assert "[0.0]" in chart
    assert "[1.0]" in chart
    assert "[0.5]" not in chart
    assert chart.count("<polyline") == 1


# --- languages -----------------------------------------------------------------------------------
def test_every_language_has_every_message_with_the_same_placeholders() -> None:
    languages = read_languages()
    english = languages["en"].messages

    def placeholders(message: object) -> set[str]:
        texts = [message] if isinstance(message, str) else list(message.values())  # type: ignore[attr-defined]
        return {name for text in texts for name in re.findall(r"{(\w+)}", text)}

    for code in LANGUAGES:
        own = languages[code].messages
        assert {key for key in own if not key.startswith("unit.")} == {
            key for key in english if not key.startswith("unit.")
        }
        for key, message in own.items():
            if not key.startswith("unit."):
                assert placeholders(message) == placeholders(english[key]), (code, key)


def test_numbers_follow_the_language() -> None:
    languages = read_languages()
    assert languages["en"].amount(3_400_000) == "3.4 million"
    assert languages["fr"].amount(3_400_000) == "3,4 millions"
    assert languages["hi"].amount(3_400_000) == "34 लाख"
    assert languages["sw"].amount(3_400_000) == "milioni 3.4"
    assert languages["en"].percent(0.99999) == "99.9%"
    assert languages["fr"].percent(1.0) == "100\xa0%"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("", "en"),
        ("de, *", "en"),
        ("fr-CH, fr;q=0.9, en;q=0.8", "fr"),
        ("en;q=0.3, hi-IN;q=0.9", "hi"),
        ("sw;q=0", "en"),
        ("sw;q=banana, fr", "fr"),
        ("," * 5000, "en"),
    ],
)
def test_the_readers_language_is_chosen(header: str, code: str) -> None:
    assert negotiated(header) == code
