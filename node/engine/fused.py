"""Faster stand-ins for modules of transformers' decoder layers on a CPU.

The families stay those of transformers; single modules are exchanged after loading, where the
replacement computes the same function (up to rounding) and was measured to be faster:

- packed linears (``swarm.compute.packed_linear``), one product for Q, K and V, one for gate and up;
- RMS norms without temporaries and casts;
- rotation of queries and keys in place, and hand-over to the ragged attention without copies.

A module is exchanged only if its class is known here by name, so that an unknown variant is left
alone: slower, never wrong. What was exchanged is counted and reported by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from swarm.compute.packed_linear import can_pack, pack_linear, pack_linears
from swarm.node.engine.ragged import RaggedBatch

_PREFIXES = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma3")
_ATTENTIONS = frozenset(f"{prefix}Attention" for prefix in _PREFIXES)
_GATED_MLPS = frozenset(f"{prefix}MLP" for prefix in _PREFIXES)
_RMS_NORMS = frozenset(f"{prefix}RMSNorm" for prefix in (*_PREFIXES, "Phi3"))
_ONE_PLUS_WEIGHT_NORMS = frozenset({"Gemma3RMSNorm"})


@dataclass(frozen=True, slots=True)
class Replacements:
    """How many modules of each kind were exchanged."""

    attentions: int = 0
    gated_mlps: int = 0
    rms_norms: int = 0
    packed_linears: int = 0

    def __add__(self, other: Replacements) -> Replacements:
        return Replacements(
            self.attentions + other.attentions,
            self.gated_mlps + other.gated_mlps,
            self.rms_norms + other.rms_norms,
            self.packed_linears + other.packed_linears,
        )


class FusedRMSNorm(nn.Module):
    """Root-mean-square norm in five operators; float32 inside, rounded once at the end.

    ``torch.nn.functional.rms_norm`` is slower on a CPU: it is composed of ten.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        """``weight`` is the factor itself, ``[features]``; kept in float32."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
        self.epsilon = nn.Buffer(torch.tensor(epsilon, dtype=torch.float32), persistent=False)
        self._scale = 1.0 / weight.shape[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(hidden, 2, -1, keepdim=True, dtype=torch.float32)
        factor = torch.addcmul(self.epsilon, norm, norm, value=self._scale).rsqrt_()
        return (hidden * factor).mul_(self.weight).to(hidden.dtype)


class FusedGatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` with gate and up in one product."""

    FUSED_PARTS: ClassVar = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
    """Which layers of the model each of ours is made of, in the order of its outputs."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = pack_linear(mlp.gate_proj, mlp.up_proj)
        self.down = pack_linear(mlp.down_proj)
        self.act_fn = mlp.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        output: torch.Tensor = self.down(self.act_fn(gate).mul_(up))
        return output


class FusedAttention(nn.Module):
    """Projections, optional per-head norms, rotation and ragged attention of one block."""

    FUSED_PARTS: ClassVar = {"qkv": ("q_proj", "k_proj", "v_proj"), "output": ("o_proj",)}
    """As in ``FusedGatedMLP``."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.sliding_window = _sliding_window(attention)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.qkv = pack_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = pack_linear(attention.o_proj)
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        ragged_batch: RaggedBatch,
        block_offset: int,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """``hidden_states`` ``[1, total, hidden]``; returns the same shape, and no weights."""
        total, heads = hidden_states.shape[1], self.heads
        rotated_heads = heads + self.kv_heads
        qkv = self.qkv(hidden_states).view(total, -1, self.head_dim)
        rotated = qkv[:, :rotated_heads]
        if self.q_norm is not None and self.k_norm is not None:
            normed = torch.cat((self.q_norm(qkv[:, :heads]), self.k_norm(rotated[:, heads:])), 1)
        else:
            normed = rotated
        cosine, signed_sine = ragged_batch.rotation(position_embeddings)
        turned = torch.roll(normed, self.head_dim // 2, -1).mul_(signed_sine)
        torch.addcmul(turned, normed, cosine, out=rotated)
        attended = ragged_batch.attend(
            self.layer_idx - block_offset,
            qkv[:, :heads],
            qkv[:, heads:].view(total, 2, self.kv_heads, self.head_dim),
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )
        output: torch.Tensor = self.output(attended.reshape(1, total, heads * self.head_dim))
        return output, None


def _sliding_window(attention: Any) -> int | None:
    """As the family's own forward passes it to the attention interface."""
    if type(attention).__name__ in ("MistralAttention", "MixtralAttention"):
        window = getattr(attention.config, "sliding_window", None)
    else:
        window = getattr(attention, "sliding_window", None)
    return None if window is None else int(window)


def replace_modules(layer: nn.Module) -> Replacements:
    """Exchange what can be exchanged inside one decoder layer on a CPU, in place.

    The original weights are freed one by one, so that memory peaks at one module more.
    """
    if not any(can_pack(parameter) for parameter in layer.parameters()):
        return Replacements()
    done = _replace_known(layer)
    return done + Replacements(packed_linears=pack_linears(layer))


def _replace_known(module: nn.Module) -> Replacements:
    done = Replacements()
    for name, child in list(module.named_children()):
        # Inner norms first: an exchanged attention takes over the norms of its original.
        done += _replace_known(child)
        kind = type(child).__name__
        if kind in _RMS_NORMS:
            setattr(module, name, _fused_norm(child))
            done += Replacements(rms_norms=1)
        elif kind in _GATED_MLPS:
            setattr(module, name, FusedGatedMLP(child))
            done += Replacements(gated_mlps=1, packed_linears=2)
        elif kind in _ATTENTIONS:
            setattr(module, name, FusedAttention(child))
            done += Replacements(attentions=1, packed_linears=2)
    return done


def _fused_norm(norm: Any) -> FusedRMSNorm:
    if type(norm).__name__ in _ONE_PLUS_WEIGHT_NORMS:
        return FusedRMSNorm(1.0 + norm.weight.float(), norm.eps)
    return FusedRMSNorm(norm.weight, norm.variance_epsilon)
