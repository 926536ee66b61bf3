"""Optimizers of adapters: AdamW and Adafactor of torch, and Lion.

Their state is exported by the names of the parameters, so that it can be put together anew from
blocks that were trained on other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from swarm.compute.training_terms import OptimizerKind, OptimizerSettings

_SEPARATOR = "#"


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, algorithm 2), with decoupled decay."""

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the present gradients; ``closure`` is not used."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                direction = torch.lerp(parameter.grad, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)


class NamedOptimizer:
    """One optimizer over named float32 parameters."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = _make(list(self._parameters.values()), settings)

    def apply(self, scale: float, learning_rate: float) -> None:
        """Multiply gradients by ``scale`` (clipping), take one step, and forget the gradients."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                # Without a gradient torch would skip it, and its decay and step count with it.
                parameter.grad = torch.zeros_like(parameter)
            elif scale != 1.0:
                parameter.grad.mul_(scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._parameters:
            self._optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def square_sum(self) -> float:
        """Of all gradients, in double precision."""
        total = 0.0
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                total += float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)) ** 2
        return total

    def export_state(self) -> dict[str, torch.Tensor]:
        """Parameters by their names, and the optimizer's tensors as ``name#key``; shared memory."""
        exported: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            exported[name] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                exported[f"{name}{_SEPARATOR}{key}"] = torch.as_tensor(value, dtype=torch.float32)
        return exported

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes that :meth:`import_state` takes: with or without optimizer tensors."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self._parameters.items():
            shapes[name] = tuple(parameter.shape)
            for key, shape in self._state_shapes(parameter).items():
                shapes[f"{name}{_SEPARATOR}{key}"] = shape
        return shapes

    def import_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what :meth:`export_state` gave, wherever that was; names are complete.

        Gradients are forgotten. Parameters without optimizer tensors begin with an empty state.
        """
        self.forget_gradients()
        self._optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
                state = {
                    key: tensors[f"{name}{_SEPARATOR}{key}"].to(parameter.device).clone()
                    for key in self._state_shapes(parameter)
                    if f"{name}{_SEPARATOR}{key}" in tensors
                }
                if "step" in state:
                    state["step"] = state["step"].cpu()
                if state:
                    self._optimizer.state[parameter] = state

    def _state_shapes(self, parameter: torch.nn.Parameter) -> dict[str, tuple[int, ...]]:
        shape = tuple(parameter.shape)
        match self._optimizer:
            case Lion():
                return {"exp_avg": shape}
            case torch.optim.AdamW():
                return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        if len(shape) < 2:
            return {"step": (), "variance": shape}
        return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def base_name(name: str) -> str:
    """The parameter to which a name out of ``export_state`` belongs."""
    return name.partition(_SEPARATOR)[0]


def state_bytes(kind: OptimizerKind, elements: int) -> int:
    """What gradients, optimizer and parameters of so many float32 elements take, at most."""
    moments = {OptimizerKind.ADAMW: 2, OptimizerKind.LION: 1, OptimizerKind.ADAFACTOR: 1}[kind]
    return elements * 4 * (2 + moments)


def _make(
    parameters: list[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    parameters = parameters or [torch.nn.Parameter(torch.empty(0))]  # torch refuses empty lists
    match settings.kind:
        case OptimizerKind.ADAMW:
            return torch.optim.AdamW(
                parameters,
                lr=0.0,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
            )
        case OptimizerKind.LION:
            return Lion(
                parameters,
                lr=0.0,
                betas=(settings.beta1, settings.beta2),
                weight_decay=settings.weight_decay,
            )
        case OptimizerKind.ADAFACTOR:
            return torch.optim.Adafactor(
                parameters,
                lr=0.0,
                beta2_decay=-settings.beta2,
                weight_decay=settings.weight_decay,
            )
