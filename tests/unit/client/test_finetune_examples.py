"""Training data: what is learned of a line, in which order, and how it is packed."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarm.client.finetune.examples import (
    Example,
    Order,
    pack,
    read_examples,
    read_pairs,
)
from swarm.protocol.errors import UsageError

END = 1


class Letters:
    """One token per character, and a template like ``<prompt>answer``."""

    end_token_id = END

    def text(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def chat(self, messages: Sequence[dict[str, str]], *, asks: bool) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            is_user = message["role"] == "user"
            tokens += self.text(f"<{message['content']}>" if is_user else message["content"])
        return tokens


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def learned(example: Example) -> str:
    return "".join(
        chr(token) if token != END else "$"
        for token in example.token_ids[max(1, example.first_learned) :]
    )


def test_only_answers_are_learned(tmp_path: Path) -> None:
    conversation = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    path = write(
        tmp_path,
        {"prompt": "ask", "completion": "answer"},
        {"messages": conversation},
        {"text": "story"},
    )
    examples = read_examples(path, Letters(), max_length=100)
    assert [learned(example) for example in examples] == ["answer$", "four$", "tory$"]


class EndedTurns(Letters):
    """A template that ends each turn and puts a line break behind it."""

    def chat(self, messages: Sequence[dict[str, str]], *, asks: bool) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            tokens += [*self.text(message["content"]), END, ord("\n")]
        return tokens


def test_nothing_behind_the_end_of_an_answer_is_learned(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "ask", "completion": "answer"})
    (example,) = read_examples(path, EndedTurns(), max_length=100)
    assert learned(example) == "answer$"


def test_long_examples_are_cut_and_empty_ones_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "a prompt longer than all", "completion": "x"},
        {"prompt": "ask", "completion": "answer"},
    )
    (example,) = read_examples(path, Letters(), max_length=8)
    assert learned(example) == "ans"


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "no completion"},
        {"prompt": 1, "completion": "x"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "no answer"}]},
        ["a list"],
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path: Path, line: object) -> None:
    path = write(tmp_path, {"text": "fine"}, line)
    with pytest.raises(UsageError, match=r"data\.jsonl:2"):
        read_examples(path, Letters(), max_length=10)


def test_pairs(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "ask", "chosen": "good", "rejected": "bad"})
    (pair,) = read_pairs(path, Letters(), max_length=100)
    assert (learned(pair.chosen), learned(pair.rejected)) == ("good$", "bad$")
    with pytest.raises(UsageError, match="expected prompt, chosen and rejected"):
        read_pairs(write(tmp_path, {"prompt": "ask"}), Letters(), max_length=100)


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = Order(10, batch_size=4, seed=3)
    assert order.steps_per_epoch == 3
    epochs = [
        [index for step in range(first, first + 3) for index in order.batch(step)]
        for first in (1, 4, 7)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    again = Order(10, batch_size=4, seed=3)
    assert again.batch(5) == order.batch(5)  # whichever step is asked for first
    assert Order(10, batch_size=4, seed=4).batch(1) != order.batch(1)


def test_packing_keeps_the_limit_and_every_example() -> None:
    groups = pack([5, 9, 3, 3, 12, 1], 10)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert groups == [[0, 2], [1, 5], [3], [4]]  # 12 does not fit anywhere: alone
