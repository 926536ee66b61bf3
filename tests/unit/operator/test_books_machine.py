"""2,000 random histories of an operator, and eleven ways to break its books that they must find."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from swarm.operator import allowances, books, journal, nodes, settlement
from tests.unit.operator.machine import OperatorMachine

RUNS = 2000
STEPS = 10
QUIET = settings(
    max_examples=RUNS,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
HUNT = settings(QUIET, phases=[Phase.generate], derandomize=True, max_examples=1000)


@pytest.mark.timeout(900)  # half a minute of one core; more where it is shared
def test_no_history_breaks_the_books() -> None:
    run_state_machine_as_test(OperatorMachine, settings=QUIET)


FAULTS: dict[str, tuple[ModuleType, str, str]] = {
    "each voucher pays its whole value": (settlement, "due = best - paid", "due = best"),
    "a cheaper voucher lowers the channel": (
        settlement,
        "best = max(value, known_value)",
        "best = value",
    ),
    "anybody's voucher pays": (settlement, "voucher.node != batch.node", "False"),
    "signatures are not checked": (
        settlement,
        'verified(Voucher, sealed, allowance["voucher_key"])',
        "pass",
    ),
    "one node may take the whole allowance": (
        settlement,
        'allowance["per_node"] - allowance["used_here"]',
        'allowance["maximum"]',
    ),
    "vouchers of one settlement do not see each other": (
        settlement,
        'allowance["used_here"] += granted',
        "pass",
    ),
    "allowances are given back again and again": (allowances, "SET is_open = 0", "SET is_open = 1"),
    "a failed transaction leaves its leaves in the tree": (
        journal,
        "self._pending.clear()\n            if",
        "if",
    ),
    "what was forfeited can be forfeited again": (
        nodes,
        'journal.db.execute("DELETE FROM lot WHERE node = ?", (node,))',
        "pass",
    ),
    "one organisation frees a node": (nodes, "agreed < policy.validators_to_decide", "False"),
    "what is over can be brought in again": (
        nodes,
        "UPDATE verdict SET outcome = 'closed' WHERE node = ? AND outcome = ?",
        "DELETE FROM verdict WHERE node = ? AND outcome = ?",
    ),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong = FAULTS[fault]
    source = inspect.getsource(module)
    assert source.count(right) == 1, "the planted fault has no place any more"
    broken = _module(module, source.replace(right, wrong))
    machine: type[OperatorMachine] = OperatorMachine
    if module is journal:
        machine = type("Broken", (OperatorMachine,), {"journal_class": broken.Journal})
    else:
        monkeypatch.setattr(books, module.__name__.rpartition(".")[2], broken)
    with pytest.raises(BaseException) as found:  # noqa: PT011 - also a database's own checks
        run_state_machine_as_test(machine, settings=HUNT)
    assert not isinstance(found.value, KeyboardInterrupt | SystemExit)


def _module(original: ModuleType, source: str) -> ModuleType:
    """A second copy of a module, from other source."""
    name = f"{original.__name__}_with_a_fault"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    broken = importlib.util.module_from_spec(spec)
    broken.__package__ = original.__package__
    sys.modules[name] = broken  # dataclasses look their module up
    try:
        exec(compile(source, name, "exec"), broken.__dict__)  # noqa: S102
    finally:
        del sys.modules[name]
    return broken
