"""Which layout the weights of a span lie in: plain while one session decodes, packed for several.

In float32 on a CPU the one is nearly twice as fast for single rows, the other for more (see
``swarm.compute.packed_linear``), and memory has room for one of them. So a span follows its load,
a layer after each step: a change of the whole span takes as many steps as it has blocks, and delays
each by milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from swarm.compute.packed_linear import PackedLinear
from swarm.node.engine.freed_memory import return_freed_memory

_FEW_ROWS = 2
_MANY_ROWS = 64
"""From here on the layout makes no difference that counts."""
_MEMORY_STEPS = 8
_TO_PACKED_SHARE = 0.5
_TO_PLAIN_SHARE = 0.25


class SharedSteps:
    """The share of steps, among the latest, that computed several rows. Pure."""

    def __init__(self) -> None:
        self._share = 0.0
        self.wants_packed = False

    def saw(self, rows: int) -> None:
        """A step of ``rows`` tokens; long pieces of prompts say nothing."""
        if rows >= _MANY_ROWS:
            return
        self._share += ((rows > _FEW_ROWS) - self._share) / _MEMORY_STEPS
        if self._share > _TO_PACKED_SHARE:
            self.wants_packed = True
        elif self._share < _TO_PLAIN_SHARE:
            self.wants_packed = False


class Layouts:
    """Moves the layers of a span from one layout to the other. For the device thread."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        changeable = [
            [
                module
                for module in layer.modules()
                if isinstance(module, PackedLinear) and module.can_be_plain
            ]
            for layer in layers
        ]
        self._layers = [linears for linears in changeable if linears]
        self._steps = SharedSteps()
        self._packed_layers = 0
        """So many, from the first on, are packed."""

    def release(self) -> None:
        """Let go of the layers."""
        self._layers.clear()
        self._packed_layers = 0

    def after_step(self, rows: int) -> None:
        """Note a step, and change at most one layer."""
        self._steps.saw(rows)
        if self._steps.wants_packed and self._packed_layers < len(self._layers):
            for linear in self._layers[self._packed_layers]:
                linear.pack()
            self._packed_layers += 1
            return_freed_memory()
        elif not self._steps.wants_packed and self._packed_layers:
            self._packed_layers -= 1
            for linear in self._layers[self._packed_layers]:
                linear.unpack()
            return_freed_memory()
