"""Snapshots: the newest whole one counts, old ones go, and optimizers come back from them."""

from pathlib import Path

import pytest
import torch

from swarm.client.finetune.snapshots import KEPT, Snapshot, Snapshots
from swarm.compute.optimizers import NamedOptimizer
from swarm.compute.training_terms import OptimizerKind, OptimizerSettings


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"a": torch.full((3,), float(step))}, (1.0,) * step, {"model": "m"})


def test_the_newest_whole_one_is_loaded(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    assert snapshots.load_latest() is None
    paths = [snapshots.save(snapshot(step)) for step in (1, 2, 3)]
    assert [path.exists() for path in paths] == [False, True, True]
    assert KEPT == 2
    paths[2].write_bytes(paths[2].read_bytes()[:-4])  # the disk was full, say
    (paths[2].parent / "step-00000009.unfinished").write_bytes(b"half")
    loaded = snapshots.load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.losses, loaded.identity) == (2, (1.0, 1.0), {"model": "m"})
    assert torch.equal(loaded.tensors["a"], torch.full((3,), 2.0))
    snapshots.clear()
    assert snapshots.load_latest() is None


@pytest.mark.parametrize("kind", OptimizerKind)
def test_an_optimizer_goes_on_from_its_state(kind: OptimizerKind) -> None:
    """Three steps in one go, and with all tensors taken out and put into another one between."""

    def make() -> NamedOptimizer:
        torch.manual_seed(0)
        parameters = {
            "matrix": torch.nn.Parameter(torch.randn(4, 3)),
            "vector": torch.nn.Parameter(torch.randn(5)),
        }
        return NamedOptimizer(parameters, OptimizerSettings(kind, 0.9, 0.9, weight_decay=0.1))

    def step(optimizer: NamedOptimizer, number: int) -> None:
        torch.manual_seed(number)
        for parameter in optimizer._parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.apply(0.5, 0.1)

    straight, first = make(), make()
    for number in (1, 2, 3):
        step(straight, number)
    for number in (1, 2):
        step(first, number)
    state = {name: tensor.clone() for name, tensor in first.export_state().items()}
    shapes = first.state_shapes()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    second = make()
    second.import_state(state)
    step(second, 3)
    for name, tensor in straight.export_state().items():
        assert torch.equal(tensor, second.export_state()[name]), name


def test_lion_moves_by_the_sign() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = NamedOptimizer({"p": parameter}, OptimizerSettings(OptimizerKind.LION, 0.9, 0.99))
    parameter.grad = torch.tensor([0.3, -7.0])
    optimizer.apply(1.0, 0.1)
    assert torch.allclose(parameter.detach(), torch.tensor([0.9, -1.9]))
    momentum = optimizer.export_state()["p#exp_avg"]
    assert torch.allclose(momentum, torch.tensor([0.003, -0.07]))
