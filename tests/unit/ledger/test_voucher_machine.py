"""The books hold under everything that may happen; and the check finds planted faults."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from swarm.ledger import channel
from swarm.node import accounts
from swarm.protocol.errors import ProtocolError
from tests.unit.ledger.voucher_machine import VoucherMachine

RUNS = settings(
    max_examples=1000,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SEARCH = settings(RUNS, max_examples=400, phases=(Phase.generate,))


def test_the_books_hold() -> None:
    run_state_machine_as_test(VoucherMachine, settings=RUNS)


FAULTS = [
    (
        "signatures are not checked",
        channel,
        "        signed.verify(Voucher)\n        self._check_terms",
        "        self._check_terms",
    ),
    (
        "vouchers for others are taken",
        channel,
        "            or voucher.session != terms.session\n",
        "",
    ),
    (
        "vouchers for another span are taken",
        channel,
        "or (voucher.first_block, voucher.end_block) != (terms.first_block, terms.end_block)",
        "or False",
    ),
    (
        "lower numbers are taken",
        channel,
        "if voucher.sequence < best.sequence or not voucher.work.covers(best.work):",
        "if not voucher.work.covers(best.work):",
    ),
    (
        "lower counts are taken",
        channel,
        "if voucher.sequence < best.sequence or not voucher.work.covers(best.work):",
        "if voucher.sequence < best.sequence:",
    ),
    (
        "the limit per node is forgotten",
        channel,
        "if self.price(voucher.work) > self.allowance.per_node_units:",
        "if False:",
    ),
    (
        "the lower of two contradicting vouchers counts",
        channel,
        "if self.price(voucher.work) > self.price(best.work):",
        "if True:",
    ),
    (
        "expired allowances pay",
        channel,
        "if not begin - MAX_CLOCK_SKEW_S <= now_unix_s < end + MAX_CLOCK_SKEW_S:",
        "if False:",
    ),
    (
        "receipts are sent before vouchers are kept",
        accounts,
        "        await self._store.keep(pending.voucher, pending.receipt, pending.units)\n",
        "",
    ),
    (
        "repetitions get another receipt",
        accounts,
        "if self._answered is None or self._answered.voucher.payload != signed.payload:",
        "if True:",
    ),
]


@contextmanager
def planted(module: ModuleType, old: str, new: str) -> Iterator[ModuleType]:
    """The module with a fault, beside the real one."""
    assert module.__spec__ is not None
    assert module.__file__ is not None
    with open(module.__file__, encoding="utf-8") as file:
        source = file.read()
    assert source.count(old) == 1, "the place of the fault has changed"
    name = f"{module.__name__}_with_a_fault"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    faulty = importlib.util.module_from_spec(spec)
    sys.modules[name] = faulty
    try:
        exec(compile(source.replace(old, new), module.__file__, "exec"), faulty.__dict__)  # noqa: S102
        yield faulty
    finally:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("module", "old", "new"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_planted_faults_are_found(
    module: ModuleType, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(module, old, new) as faulty:
        if module is channel:
            # The account uses the faulty channel, and knows its exceptions.
            monkeypatch.setattr(accounts, "VoucherChannel", faulty.VoucherChannel)
            monkeypatch.setattr(accounts, "Equivocation", faulty.Equivocation)

        class Faulty(VoucherMachine):
            accounts_module = faulty if module is accounts else accounts

        with pytest.raises((AssertionError, ProtocolError)):
            run_state_machine_as_test(Faulty, settings=SEARCH)
