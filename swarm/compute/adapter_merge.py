"""Several adapters made into one, and adapters written in PEFT's format.

*Linear*: the sum of what the adapters do, each with its weight; exact, its rank is the sum of the
ranks. *TIES* (arXiv 2306.01708): of each adapter only its largest changes, and where they disagree
in sign only those of the majority; then a low-rank approximation.

Both work on what adapters do to a layer, ``scaling * B A``, so that adapters of different rank,
scaling and modules can be merged. The names of tensors are those of ``swarm.compute.lora``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from swarm.catalogue.adapter import REVISION_KEY, WEIGHTS_NAME, AdapterFiles
from swarm.catalogue.peft_config import CONFIG_NAME
from swarm.compute.lora import LORA_A, LORA_B, peft_name, tensor_name
from swarm.compute.wire_tensors import TORCH_DTYPES
from swarm.protocol.adapter_index import MAX_RANK, ModuleSpec
from swarm.protocol.errors import AdapterError

_EXACT_SVD_SIZE = 1536
"""Above, in both dimensions, the leading part only is computed, by iteration."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A change ``B A`` of one layer: ``a`` ``[rank, in]``, ``b`` ``[out, rank]``; float32."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def product(self) -> torch.Tensor:
        return self.b @ self.a


@dataclass(frozen=True, slots=True)
class Merged:
    """By block and module; ``lost`` is the share of the change that the rank had no room for."""

    modules: Mapping[tuple[int, str], Factors]
    lost: float


def merge_linear(
    adapters: Sequence[AdapterFiles], weights: Sequence[float], rank: int | None = None
) -> Merged:
    """The weighted sum; exact without ``rank``, else the best approximation of that rank."""
    places = _places(adapters)
    merged: dict[tuple[int, str], Factors] = {}
    lost = _Lost()
    for place, members in places.items():
        parts = [(weights[index], _factors(adapters[index], module)) for index, module in members]
        whole = Factors(
            torch.cat([factors.a for _, factors in parts]),
            torch.cat([weight * factors.b for weight, factors in parts], dim=1),
        )
        merged[place] = whole if rank is None else _reduced(whole, rank, lost)
    return Merged(merged, lost.share)


def merge_ties(
    adapters: Sequence[AdapterFiles],
    weights: Sequence[float],
    *,
    density: float,
    rank: int | None = None,
) -> Merged:
    """TIES with the share ``density`` of each adapter's changes, signs elected by total.

    ``rank`` is by default the sum of the ranks at each layer.
    """
    if not 0 < density <= 1:
        raise AdapterError("the density is a share above 0 and at most 1")
    merged: dict[tuple[int, str], Factors] = {}
    lost = _Lost()
    for place, members in _places(adapters).items():
        changes = []
        ranks = 0
        for index, module in members:
            factors = _factors(adapters[index], module)
            ranks += factors.rank
            changes.append(trimmed(factors.product(), density))
        together = elected(torch.stack(changes), [weights[index] for index, _ in members])
        merged[place] = _decomposed(together, min(rank or ranks, MAX_RANK), lost)
    return Merged(merged, lost.share)


def trimmed(change: torch.Tensor, density: float) -> torch.Tensor:
    """Only the largest values of ``change`` by magnitude, a share of them; the rest is 0."""
    kept = max(1, int(density * change.numel()))
    indices = change.abs().flatten().topk(kept).indices
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[indices] = True
    return change * mask.view(change.shape)


def elected(changes: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """``[adapters, out, in]``: the weighted mean of the values whose sign is that of their sum."""
    agrees = (changes.sign() == changes.sum(dim=0).sign()) & (changes != 0)
    weighted = changes * torch.tensor(weights)[:, None, None]
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


class _Lost:
    """Adds up what approximations leave out."""

    def __init__(self) -> None:
        self._whole = self._left_out = 0.0

    def add(self, whole: float, left_out: float) -> None:
        self._whole += whole
        self._left_out += left_out

    @property
    def share(self) -> float:
        """As Frobenius norms: 0 is nothing, 1 everything."""
        return float((self._left_out / self._whole) ** 0.5) if self._whole else 0.0


def _reduced(whole: Factors, rank: int, lost: _Lost) -> Factors:
    """The best approximation, without making the whole matrix: by the factors' own bases."""
    if whole.rank <= rank:
        return whole
    q_b, r_b = torch.linalg.qr(whole.b)
    q_a, r_a = torch.linalg.qr(whole.a.t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t())
    lost.add(float(s.square().sum()), float(s[rank:].square().sum()))
    root = s[:rank].sqrt()
    return Factors(root[:, None] * (v[:rank] @ q_a.t()), (q_b @ u[:, :rank]) * root)


def _decomposed(change: torch.Tensor, rank: int, lost: _Lost) -> Factors:
    rank = min(rank, *change.shape)
    if min(change.shape) <= _EXACT_SVD_SIZE:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        u, s, right = torch.svd_lowrank(change, q=min(rank + 16, *change.shape), niter=4)
        v = right.t()
    whole = float(change.square().sum())
    lost.add(whole, max(0.0, whole - float(s[:rank].square().sum())))
    root = s[:rank].sqrt()
    return Factors(root[:, None] * v[:rank], u[:, :rank] * root)


def _places(
    adapters: Sequence[AdapterFiles],
) -> dict[tuple[int, str], list[tuple[int, ModuleSpec]]]:
    """Who changes what: for each layer the adapters' numbers and modules."""
    if len(adapters) < 2:
        raise AdapterError("merging takes at least two adapters")
    revisions = {files.model_revision for files in adapters} - {b""}
    if len(revisions) > 1:
        raise AdapterError("the adapters were made for different models")
    places: dict[tuple[int, str], list[tuple[int, ModuleSpec]]] = {}
    for index, files in enumerate(adapters):
        for module in files.index.modules:
            if module.magnitude is not None:
                raise AdapterError(
                    f"{files.directory} is a DoRA adapter; magnitudes cannot be added up"
                )
            places.setdefault((module.block, module.name), []).append((index, module))
    for (block, name), members in places.items():
        if len({(module.out_features, module.in_features) for _, module in members}) > 1:
            raise AdapterError(f"block {block}, {name}: the adapters are for different models")
    return places


def _factors(files: AdapterFiles, module: ModuleSpec) -> Factors:
    a, b = _tensors(module, files.read(module))
    return Factors(a, module.scaling * b)


def _tensors(module: ModuleSpec, data: Sequence[bytes]) -> list[torch.Tensor]:
    """A, B and perhaps the magnitude, in float32."""
    return [
        torch.frombuffer(bytearray(each), dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape).float()
        for spec, each in zip(module.tensors, data, strict=True)
    ]


def merged_weight(weight: torch.Tensor, module: ModuleSpec, data: Sequence[bytes]) -> torch.Tensor:
    """A layer's weight ``[out, in]`` with an adapter in it, in float32.

    ``data`` is what an adapter has for the module: the bytes of its tensors.
    """
    a, b, *magnitude = _tensors(module, data)
    merged = torch.addmm(weight.float(), b, a, alpha=module.scaling)
    for each in magnitude:  # DoRA: rows of this length
        merged *= (each / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def write_adapter(
    directory: Path,
    modules: Mapping[tuple[int, str], Factors],
    *,
    base_model: str,
    model_revision: bytes,
) -> AdapterFiles:
    """Write a LoRA adapter as PEFT does, and read it back. Raises AdapterError."""
    ranks = {f"model.layers.{block}.{name}": each.rank for (block, name), each in modules.items()}
    largest = max(ranks.values())
    if largest > MAX_RANK:
        raise AdapterError(f"the result is of rank {largest}; bound it by --rank {MAX_RANK}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != largest},
        "alpha_pattern": {path: rank for path, rank in ranks.items() if rank != largest},
        "target_modules": sorted(_targets(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    tensors: dict[str, torch.Tensor] = {}
    for (block, name), factors in modules.items():
        tensors[peft_name(tensor_name(block, name, LORA_A))] = factors.a.contiguous()
        tensors[peft_name(tensor_name(block, name, LORA_B))] = factors.b.contiguous()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        metadata = {"format": "pt"}
        if model_revision:
            metadata[REVISION_KEY] = model_revision.hex()
        save_file(tensors, directory / WEIGHTS_NAME, metadata=metadata)
    except OSError as error:
        raise AdapterError(f"cannot write to {directory}: {error.strerror}") from error
    return AdapterFiles.open(directory)


def _targets(modules: Mapping[tuple[int, str], Factors]) -> set[str]:
    return {name.rpartition(".")[2] for _, name in modules}
