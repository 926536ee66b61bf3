"""The adapters that a node holds in memory: admitted by size, loaded tensor by tensor, evicted.

Rules:

- Nothing is allocated for an adapter before its whole index was checked against the model and
  there is room for it. Each tensor counts only with the SHA-256 that the index says.
- The least recently used adapter goes when room is needed; one that a session uses never goes.
- A session whose adapter is not here is refused. No session ever gets the bare model instead.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from swarm.catalogue.adapter import check_fits, is_finite
from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.wire_tensors import TORCH_DTYPES
from swarm.node.engine.adapted_layers import Delta, LoadedAdapter, Place
from swarm.node.engine.span_loader import Span, read_tensor
from swarm.protocol.adapter_index import AdapterIndex, ModuleSpec
from swarm.protocol.errors import AdapterError, ErrorCode, ProtocolError
from swarm.threads import run_in_own_thread

DEFAULT_ADAPTER_BYTES = 256 * 1024 * 1024


class AdapterStore:
    """Implements ``api.Adapters`` for one span. All methods are for the event loop."""

    def __init__(
        self, span: Span, checkpoint: Checkpoint, maximum_bytes: int = DEFAULT_ADAPTER_BYTES
    ) -> None:
        self._span = span
        self._checkpoint = checkpoint
        self._maximum_bytes = maximum_bytes
        self._loaded: OrderedDict[bytes, LoadedAdapter] = OrderedDict()
        self._sessions: dict[bytes, int] = {}
        self._loading: set[AdapterLoading] = set()

    @property
    def adapter_ids(self) -> tuple[bytes, ...]:
        """What is loaded, the most recently used last."""
        return tuple(self._loaded)

    @property
    def size_bytes(self) -> int:
        """What is taken, by adapters being loaded too."""
        reserved = sum(loading.size_bytes for loading in self._loading)
        return reserved + sum(adapter.size_bytes for adapter in self._loaded.values())

    def __contains__(self, adapter_id: bytes) -> bool:
        return adapter_id in self._loaded

    def acquire(self, adapter_id: bytes) -> LoadedAdapter:
        """Use an adapter in a session until :meth:`release`.

        Raises ProtocolError(ADAPTER_MISSING).
        """
        adapter = self._loaded.get(adapter_id)
        if adapter is None:
            raise ProtocolError(ErrorCode.ADAPTER_MISSING, adapter_id.hex()[:16])
        self._loaded.move_to_end(adapter_id)
        self._sessions[adapter_id] = self._sessions.get(adapter_id, 0) + 1
        return adapter

    def release(self, adapter_id: bytes) -> None:
        """A session with this adapter has ended."""
        self._sessions[adapter_id] -= 1
        if not self._sessions[adapter_id]:
            del self._sessions[adapter_id]

    def admit(self, index: AdapterIndex) -> AdapterLoading:
        """Check an adapter against the model and make room for it.

        Raises ProtocolError: ADAPTER_REFUSED when it does not fit the model, ADAPTER_NO_ROOM.
        """
        span = self._span
        blocks = range(span.first_block, span.end_block)
        try:
            check_fits(index, self._checkpoint, blocks=blocks)
        except AdapterError as error:
            raise ProtocolError(ErrorCode.ADAPTER_REFUSED, str(error)) from None
        loading = AdapterLoading(self, span, self._checkpoint, index)
        self._make_room(loading.size_bytes)
        self._loading.add(loading)
        return loading

    def _make_room(self, size_bytes: int) -> None:
        idle = [each for each in self._loaded if each not in self._sessions]
        to_free = self.size_bytes + size_bytes - self._maximum_bytes
        if to_free > sum(self._loaded[each].size_bytes for each in idle):
            raise ProtocolError(
                ErrorCode.ADAPTER_NO_ROOM, f"{size_bytes} bytes of {self._maximum_bytes}"
            )
        for adapter_id in idle:
            if to_free <= 0:
                break
            to_free -= self._loaded.pop(adapter_id).size_bytes

    def loaded(self, loading: AdapterLoading, adapter: LoadedAdapter | None) -> None:
        """For ``AdapterLoading``: it ended, with an adapter or without."""
        self._loading.discard(loading)
        if adapter is not None:
            # Of two that load the same adapter at a time, the first one is in use already.
            self._loaded.setdefault(adapter.adapter_id, adapter)


class AdapterLoading:
    """Implements ``api.IncomingAdapter``: modules are loaded one after the other, in any order."""

    def __init__(
        self, store: AdapterStore, span: Span, checkpoint: Checkpoint, index: AdapterIndex
    ) -> None:
        self.wanted = index.of_blocks(span.first_block, span.end_block)
        self._store = store
        self._span = span
        self._checkpoint = checkpoint
        self._index = index
        self._tensors: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._deltas: dict[tuple[int, str], Delta] = {}
        self._specs = {(module.block, module.name): module for module in self.wanted}
        self._places = {
            (span.first_block + place.layer, part): place
            for place in span.adapted.places
            for part in place.parts
        }
        if missing := self._specs.keys() - self._places.keys():
            raise ProtocolError(ErrorCode.ADAPTER_REFUSED, f"no linear layer {min(missing)}")
        self._by_place: dict[Place, list[ModuleSpec]] = {}
        for spec in self.wanted:
            self._by_place.setdefault(self._places[spec.block, spec.name], []).append(spec)
        self.size_bytes = sum(
            self._delta_elements(place, specs) * span.dtype.itemsize
            for place, specs in self._by_place.items()
        )

    async def load_module(self, module: ModuleSpec, tensors: Sequence[bytes | bytearray]) -> None:
        """Take the tensors of one module; hashed and converted in a thread.

        Raises ProtocolError(ADAPTER_REFUSED) for bytes that the index does not name, or that are
        no finite numbers.
        """
        await run_in_own_thread(partial(self._load_module, module, tensors))

    def _load_module(self, module: ModuleSpec, tensors: Sequence[bytes | bytearray]) -> None:
        key = (module.block, module.name)
        if self._specs.get(key) != module or len(tensors) != len(module.tensors):
            raise ProtocolError(ErrorCode.ADAPTER_REFUSED, f"{key} was not wanted")
        converted = []
        for tensor, data in zip(module.tensors, tensors, strict=True):
            if len(data) != tensor.size_bytes or hashlib.sha256(data).digest() != tensor.sha256:
                raise ProtocolError(ErrorCode.ADAPTER_REFUSED, f"{key}: corrupted tensor")
            if not is_finite(tensor.dtype, data):
                raise ProtocolError(ErrorCode.ADAPTER_REFUSED, f"{key}: not finite")
            values = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[tensor.dtype])
            converted.append(values.view(tensor.shape).to(torch.float32))
        self._tensors[key] = converted
        place = self._places[key]
        specs = self._by_place[place]
        if all((spec.block, spec.name) in self._tensors for spec in specs):
            self._deltas[place.layer, place.name] = self._delta(place, specs)
            for spec in specs:
                del self._tensors[spec.block, spec.name]

    def finish(self) -> None:
        """Let sessions use it. Raises ProtocolError(ADAPTER_REFUSED) when modules are missing."""
        if len(self._deltas) != len(self._by_place):
            raise ProtocolError(ErrorCode.ADAPTER_REFUSED, "incomplete")
        self._store.loaded(
            self, LoadedAdapter(self._index.adapter_id, self._deltas, self.size_bytes)
        )

    def abandon(self) -> None:
        """Give the room back; does nothing after :meth:`finish`."""
        self._store.loaded(self, None)

    def _out_features(self, place: Place) -> list[int]:
        tensors = self._checkpoint.block_tensors(self._span.first_block + place.layer)
        return [tensors[f"{part}.weight"].shape[0] for part in place.parts]

    def _delta_elements(self, place: Place, specs: Sequence[ModuleSpec]) -> int:
        rank, out = sum(spec.rank for spec in specs), sum(self._out_features(place))
        vectors = 2 if any(spec.magnitude is not None for spec in specs) else 0
        return rank * specs[0].in_features + (rank + vectors) * out

    def _delta(self, place: Place, specs: Sequence[ModuleSpec]) -> Delta:
        by_part: Mapping[str, ModuleSpec] = {spec.name: spec for spec in specs}
        out = self._out_features(place)
        rank = sum(spec.rank for spec in specs)
        a = torch.zeros(rank, specs[0].in_features)
        b = torch.zeros(sum(out), rank)
        gain, shift = torch.ones(sum(out)), torch.zeros(sum(out))
        row = column = 0
        for part, out_features in zip(place.parts, out, strict=True):
            rows = slice(row, row + out_features)
            row += out_features
            spec = by_part.get(part)
            if spec is None:
                continue
            tensors = self._tensors[spec.block, spec.name]
            columns = slice(column, column + spec.rank)
            column += spec.rank
            a[columns] = tensors[0]
            b[rows, columns] = spec.scaling * tensors[1]
            if spec.magnitude is not None:
                self._magnitude(spec, tensors, gain[rows], shift[rows])
                b[rows, columns] *= gain[rows, None]

        def placed(values: torch.Tensor) -> torch.Tensor:
            return values.to(device=self._span.device, dtype=self._span.dtype)

        has_gain = any(spec.magnitude is not None for spec in specs)
        return Delta(
            placed(a).t(),
            placed(b.t().contiguous()),
            placed(gain) if has_gain else None,
            placed(shift) if has_gain else None,
        )

    def _magnitude(
        self,
        spec: ModuleSpec,
        tensors: Sequence[torch.Tensor],
        gain: torch.Tensor,
        shift: torch.Tensor,
    ) -> None:
        """DoRA: outputs are scaled to ``magnitude / |W + scaling B A|``, row by row of W."""
        stored = self._checkpoint.block_tensors(spec.block)
        weight = read_tensor(self._checkpoint, stored[f"{spec.name}.weight"], self._span.dtype)
        a, b, magnitude = tensors
        merged = torch.addmm(weight.float(), b, a, alpha=spec.scaling)
        norm = torch.linalg.vector_norm(merged, dim=1)
        if not bool((norm > 0).all()):
            raise ProtocolError(ErrorCode.ADAPTER_REFUSED, f"{spec.name}: a row without length")
        gain.copy_(magnitude / norm)
        if f"{spec.name}.bias" in stored:
            bias = read_tensor(self._checkpoint, stored[f"{spec.name}.bias"], self._span.dtype)
            shift.copy_(bias.float() * (1 - gain))
