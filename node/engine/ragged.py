"""One ragged batch: steps of several sessions at different positions, and their attention.

All tokens of a batch lie one after the other, session by session, row by row. Attention is the only
place where they are told apart: each session's keys and values go into its own cache, and its
queries see that cache only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from swarm.node.engine.cache import SpanCache

_FOLDED_QUERY_TOKENS = 16
"""Up to here the heads of a group are folded into the query axis: one product per key head."""


@dataclass(slots=True)
class _Attention:
    """One attention call: ``rows`` rows of one session, ``tokens`` queries each."""

    start: int
    """First token in the batch."""
    rows: int
    tokens: int
    keys: Sequence[torch.Tensor]
    """Per block ``[rows, kv_heads, visible, head_dim]``."""
    values: Sequence[torch.Tensor]
    mask: torch.Tensor | None
    """Additive, broadcastable to ``[rows, 1, tokens, visible]``; None when all is visible."""
    is_causal: bool


class RaggedBatch:
    """Where each session's part lies, and what it may see. Built once, used by every block."""

    def __init__(
        self, caches: Sequence[SpanCache], positions: Sequence[int], tokens: Sequence[int]
    ) -> None:
        self._sessions = list(zip(caches, positions, tokens, strict=True))
        self.total_tokens = sum(cache.request.rows * count for cache, _, count in self._sessions)
        # An attention per window: sliding and full layers of one model see different keys.
        self._attentions: dict[int | None, list[_Attention]] = {}
        self._writes: list[tuple[int, int, int, Sequence[torch.Tensor]]] = []
        self._covers_all = True
        self._rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        start = 0
        for cache, position, count in self._sessions:
            rows = cache.request.rows
            destinations = cache.key_values[..., position : position + count, :].unbind(0)
            self._writes.append((start, rows, count, destinations))
            start += rows * count

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Positions as rotary embeddings count them (padding excluded): int64 ``[1, total]``."""
        parts = []
        for cache, position, count in self._sessions:
            positions = torch.arange(position, position + count, device=device)
            if cache.has_padding:
                parts += [(positions - padding).clamp_(min=0) for padding in cache.padding]
            else:
                parts += [positions] * cache.request.rows
        return torch.cat(parts).unsqueeze(0)

    def rotation(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine ``[total, 1, head_dim]`` for ``x * cos + roll(x) * sin``.

        The sign of ``rotate_half`` is moved into the sine, once per batch instead of per block.
        """
        cosine, sine = position_embeddings
        found = self._rotations.get(id(cosine))
        if found is None:
            half = sine.shape[-1] // 2
            signed = torch.cat((-sine[0, :, :half], sine[0, :, half:]), dim=-1)
            found = (cosine[0].unsqueeze(1), signed.unsqueeze(1))
            self._rotations[id(cosine)] = found
        return found

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
        """Store keys and values, and attend.

        ``block`` counts from the first block of the batch. ``query`` is ``[total, heads,
        head_dim]``, ``key_value`` ``[total, 2, kv_heads, head_dim]``; returns ``[total, heads,
        head_dim]``. A token sees itself and the ``sliding_window - 1`` positions before it, or
        all. Padding tokens get zeros.
        """
        for start, rows, count, destinations in self._writes:
            source = key_value[start : start + rows * count]
            if count == 1:
                destinations[block].copy_(source.unsqueeze(3))
            else:
                source = source.view(rows, count, *source.shape[1:])
                destinations[block].copy_(source.permute(0, 2, 3, 1, 4))
        attentions = self._attentions.get(sliding_window)
        if attentions is None:
            attentions = self._prepare(sliding_window, query)
        if len(attentions) == 1 and self._covers_all:
            return _attend(attentions[0], block, query, scaling, softcap)
        output = torch.zeros_like(query) if not self._covers_all else torch.empty_like(query)
        for part in attentions:
            end = part.start + part.rows * part.tokens
            output[part.start : end] = _attend(
                part, block, query[part.start : end], scaling, softcap
            )
        return output

    def _prepare(self, window: int | None, query: torch.Tensor) -> list[_Attention]:
        attentions: list[_Attention] = []
        start = 0
        for cache, position, count in self._sessions:
            rows = cache.request.rows
            if count == 1 and not cache.has_padding:
                first = 0 if window is None else max(0, position + 1 - window)
                attentions.append(
                    _view(cache, slice(0, rows), first, position + 1, start, 1, None, False)
                )
            elif count == 1 and position >= max(cache.padding):
                attentions.append(_padded_decode(cache, position, window, start, query))
            else:
                for row in range(rows):
                    part = _row(cache, row, position, count, window, start + row * count, query)
                    if part is None or part.tokens < count:
                        self._covers_all = False
                    if part is not None:
                        attentions.append(part)
            start += rows * count
        self._attentions[window] = attentions
        return attentions


def _view(
    cache: SpanCache,
    rows: slice,
    first: int,
    end: int,
    start: int,
    tokens: int,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> _Attention:
    visible = cache.key_values[:, rows, :, :, first:end]
    return _Attention(
        start=start,
        rows=rows.stop - rows.start,
        tokens=tokens,
        keys=visible[:, :, 0].unbind(0),
        values=visible[:, :, 1].unbind(0),
        mask=mask,
        is_causal=is_causal,
    )


def _padded_decode(
    cache: SpanCache, position: int, window: int | None, start: int, query: torch.Tensor
) -> _Attention:
    """One new token in each of several rows that are padded differently."""
    first = min(cache.padding)
    if window is not None:
        first = max(first, position + 1 - window)
    keys = torch.arange(first, position + 1, device=query.device)
    padding = torch.tensor(cache.padding, device=query.device)
    mask = _additive(keys[None, :] >= padding[:, None], query.dtype)[:, None, None, :]
    rows = slice(0, cache.request.rows)
    return _view(cache, rows, first, position + 1, start, 1, mask, False)


def _row(
    cache: SpanCache,
    row: int,
    position: int,
    count: int,
    window: int | None,
    start: int,
    query: torch.Tensor,
) -> _Attention | None:
    """Several new tokens of one row, without those that are padding; None when all are."""
    padding = cache.padding[row]
    skipped = min(count, max(0, padding - position))
    if skipped == count:
        return None
    first_query, end = position + skipped, position + count
    first = padding if window is None else max(padding, first_query + 1 - window)
    fits_window = window is None or end - first <= window
    is_causal = first == first_query and fits_window
    mask = None
    if not is_causal and end - first_query > 1:
        queries = torch.arange(first_query, end, device=query.device)[:, None]
        keys = torch.arange(first, end, device=query.device)[None, :]
        visible = keys <= queries
        if window is not None and not fits_window:
            visible &= keys > queries - window
        mask = _additive(visible, query.dtype)
    tokens = count - skipped
    rows = slice(row, row + 1)
    return _view(cache, rows, first, end, start + skipped, tokens, mask, is_causal)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))


def _attend(
    part: _Attention,
    block: int,
    query: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """``query`` ``[rows * tokens, heads, head_dim]`` against one block's keys; same shape back."""
    keys, values = part.keys[block], part.values[block]
    rows, tokens = part.rows, part.tokens
    heads, head_dim = query.shape[-2:]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    if tokens == 1 and softcap is None:
        folded = F.scaled_dot_product_attention(
            query.view(rows, kv_heads, group, head_dim),
            keys,
            values,
            attn_mask=part.mask,
            scale=scaling,
        )
        return folded.reshape(rows, heads, head_dim)
    queries = query.view(rows, tokens, heads, head_dim).transpose(1, 2)
    if softcap is not None:
        return _attend_capped(part, queries, keys, values, scaling, softcap)
    if tokens <= _FOLDED_QUERY_TOKENS:
        mask = part.mask if part.mask is not None else _causal_mask(part, queries, keys.shape[2])
        folded = F.scaled_dot_product_attention(
            queries.reshape(rows, kv_heads, group * tokens, head_dim),
            keys,
            values,
            attn_mask=mask.repeat(group, 1),
            scale=scaling,
        )
        attended = folded.view(rows, heads, tokens, head_dim)
    else:
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=part.mask,
            is_causal=part.is_causal,
            scale=scaling,
            enable_gqa=group > 1,
        )
    return attended.transpose(1, 2).reshape(rows * tokens, heads, head_dim)


def _causal_mask(part: _Attention, queries: torch.Tensor, visible: int) -> torch.Tensor:
    """The mask that ``is_causal`` stands for, kept in ``part`` for the blocks after this one."""
    ones = torch.ones(part.tokens, visible, dtype=torch.bool, device=queries.device)
    part.mask = _additive(ones.tril(visible - part.tokens), queries.dtype)
    part.is_causal = False
    return part.mask


def _attend_capped(
    part: _Attention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Scores through ``softcap * tanh(score / softcap)`` (gemma 2); no fused kernel has it."""
    rows, heads, tokens, head_dim = queries.shape
    group = heads // keys.shape[1]
    mask = part.mask
    if mask is None and tokens > 1:
        mask = _causal_mask(part, queries, keys.shape[2])
    scores = queries @ keys.repeat_interleave(group, 1).transpose(2, 3)
    scores = torch.tanh(scores * ((scaling or head_dim**-0.5) / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    attended = weights @ values.repeat_interleave(group, 1)
    return attended.transpose(1, 2).reshape(rows * tokens, heads, head_dim)
