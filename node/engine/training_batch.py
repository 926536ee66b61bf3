"""The sequences of one micro-batch and their attention, with gradients.

It stands where inference has a :class:`~swarm.node.engine.ragged.RaggedBatch`: all tokens lie one
after the other, and attention is the only place where sequences are told apart. So nothing is
padded, and short examples are packed without seeing each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812


class TrainingBatch:
    """``lengths`` of sequences that lie one after the other; none of them has a cache."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)
        # Neighbours of one length are computed together.
        self._groups: list[tuple[int, int, int]] = []  # first token, sequences, tokens of each
        start = 0
        for length in self._lengths:
            if self._groups and self._groups[-1][2] == length:
                first, count, _ = self._groups[-1]
                self._groups[-1] = (first, count + 1, length)
            else:
                self._groups.append((start, 1, length))
            start += length
        self.total_tokens = start

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Each sequence counts from 0: int64 ``[1, total]``."""
        parts = [torch.arange(length, device=device) for length in self._lengths]
        return torch.cat(parts).unsqueeze(0)

    def attend(
        self,
        block: int,
        query: torch.Tensor,
        key_value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """``query`` ``[total, heads, head_dim]``, ``key_value`` ``[total, 2, kv_heads, head_dim]``.

        Returns ``[total, heads, head_dim]``. ``block`` makes no difference.
        """
        outputs = []
        for first, count, length in self._groups:
            end = first + count * length
            outputs.append(
                _causal(
                    query[first:end].view(count, length, *query.shape[1:]),
                    key_value[first:end].view(count, length, *key_value.shape[1:]),
                    scaling,
                    sliding_window,
                    softcap,
                ).reshape(count * length, *query.shape[1:])
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _causal(
    query: torch.Tensor,
    key_value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """``[count, length, heads, dim]`` and ``[count, length, 2, kv_heads, dim]``."""
    length, heads = query.shape[1], query.shape[2]
    repeat = heads // key_value.shape[3]
    query = query.transpose(1, 2)
    key, value = (
        part.transpose(1, 2).repeat_interleave(repeat, dim=1)
        if repeat > 1
        else part.transpose(1, 2)
        for part in key_value.unbind(2)
    )
    mask = None
    if window is not None and window < length:
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < window)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        return attended.transpose(1, 2)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2)
