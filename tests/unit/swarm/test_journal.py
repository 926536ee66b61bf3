"""The journal against plain lists, and its share of the memory."""

from __future__ import annotations

from random import Random

import pytest

from swarm.journal import Journal, JournalBudget
from swarm.protocol.tensors import DType, WireTensor

HIDDEN = 2
TOKEN_BYTES = HIDDEN * 4


def tensor(random: Random, rows: int, tokens: int) -> WireTensor:
    return WireTensor(
        DType.FLOAT32, (rows, tokens, HIDDEN), random.randbytes(rows * tokens * TOKEN_BYTES)
    )


def journal(rows: int, budget: JournalBudget) -> Journal:
    return Journal(rows=rows, hidden_size=HIDDEN, dtype=DType.FLOAT32, budget=budget)


@pytest.mark.parametrize("seed", range(30))
def test_it_follows_cuts_and_row_orders(seed: int) -> None:
    random = Random(seed)
    rows = random.choice((1, 2, 4))
    budget = JournalBudget()
    kept = journal(rows, budget)
    reference: list[list[bytes]] = [[] for _ in range(rows)]
    for _ in range(60):
        length = len(reference[0])
        position = random.choice((length, length, length, random.randint(0, length)))
        order = tuple(random.randrange(rows) for _ in range(rows)) if random.random() < 0.5 else ()
        tokens = random.choice((1, 1, 2, 9))
        sent = tensor(random, rows, tokens)
        kept.append(position, sent, order)
        reference = [row[:position] for row in reference]
        if order:
            reference = [list(reference[source]) for source in order]
        for row in range(rows):
            for token in range(tokens):
                offset = (row * tokens + token) * TOKEN_BYTES
                reference[row].append(bytes(sent.data)[offset : offset + TOKEN_BYTES])
        length = position + tokens
        assert kept.length == length
        first = random.randint(0, length)
        end = random.randint(first, length + 3)
        read = kept.read(first, end)
        assert read.shape == (rows, min(end, length) - first, HIDDEN)
        assert bytes(read.data) == b"".join(b"".join(row[first:end]) for row in reference)
    assert budget.used_bytes == kept.length * rows * TOKEN_BYTES
    kept.drop()
    assert budget.used_bytes == 0


def test_a_journal_without_room_is_dropped_and_says_so() -> None:
    random = Random(1)
    budget = JournalBudget(10 * TOKEN_BYTES)
    first, second = journal(1, budget), journal(1, budget)
    first.append(0, tensor(random, 1, 6))
    second.append(0, tensor(random, 1, 4))
    second.append(4, tensor(random, 1, 1))
    assert second.is_gone
    assert not first.is_gone
    assert budget.used_bytes == 6 * TOKEN_BYTES
    second.append(5, tensor(random, 1, 1))
    assert second.is_gone, "what follows a gap is of no use"
    second.append(0, tensor(random, 1, 2))
    assert not second.is_gone
    assert second.length == 2


def test_a_gap_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="gap"):
        journal(1, JournalBudget()).append(1, tensor(Random(1), 1, 1))
