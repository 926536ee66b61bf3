"""Learning rates are those of transformers' schedulers; pictures and snapshots are whole."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from swarm.client.finetune.loss_curve import loss_curve
from swarm.client.finetune.settings import FinetuneSettings, learning_rate
from swarm.compute.lora import Method
from swarm.protocol.errors import UsageError


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_of_a_schedule(schedule: str) -> None:
    settings = FinetuneSettings(learning_rate=1.0, schedule=schedule, warmup_steps=4)
    rates = [learning_rate(settings, step, 20) for step in range(1, 21)]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    halfway = learning_rate(settings, 13, 20)
    assert halfway == pytest.approx(1.0 if schedule == "constant" else 0.5)
    if schedule != "constant":
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert rates[-1] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "full"},
        {"loss": "ppo"},
        {"rank": 0},
        {"learning_rate": 0.0},
        {"steps": 0},
        {"micro_batches_in_flight": 0},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        FinetuneSettings(**wrong)  # type: ignore[arg-type]


def test_what_must_not_change_when_a_training_goes_on() -> None:
    one = FinetuneSettings(snapshot_every=5, micro_batches_in_flight=1)
    assert one.fingerprint() == FinetuneSettings().fingerprint()
    assert FinetuneSettings(rank=8).fingerprint() != one.fingerprint()


def test_shapes_by_method() -> None:
    assert FinetuneSettings(method="prompt").adapter_shape("llama").method is Method.NONE
    shape = FinetuneSettings(method="dora", rank=8).adapter_shape("llama")
    assert (shape.method, shape.alpha, shape.target_modules) == (
        Method.DORA,
        16.0,
        ("q_proj", "v_proj"),
    )


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [1.0]}, {"a": [3.0, 2.0], "<b>": [1.0]}])
def test_the_picture_is_well_formed(series: dict[str, list[float]], tmp_path: Path) -> None:
    root = ElementTree.fromstring(loss_curve("loss & more", series))  # noqa: S314 (our own)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == len(series)
