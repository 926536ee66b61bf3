"""Cutting activations along their tokens, and putting results together again. Pure bytes.

A long prompt goes through a chain in pieces, and so does a journal that is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swarm.protocol.tensors import ITEM_BYTES, WireTensor


def pieces(tensor: WireTensor, tokens_per_piece: int) -> Iterator[tuple[int, WireTensor]]:
    """``[rows, tokens, hidden]`` in pieces, each with the index of its first token."""
    tokens = tensor.shape[1]
    for first in range(0, tokens, tokens_per_piece):
        yield first, slice_tokens(tensor, first, min(first + tokens_per_piece, tokens))


def slice_tokens(tensor: WireTensor, first: int, last: int) -> WireTensor:
    """Tokens ``first .. last`` of ``[rows, tokens, hidden]``; no copy when there is one row."""
    rows, tokens, hidden = tensor.shape
    if (first, last) == (0, tokens):
        return tensor
    view = memoryview(tensor.data)
    token_bytes = hidden * ITEM_BYTES[tensor.dtype]
    parts = [
        view[(row * tokens + first) * token_bytes : (row * tokens + last) * token_bytes]
        for row in range(rows)
    ]
    data = parts[0] if rows == 1 else b"".join(parts)
    return WireTensor(tensor.dtype, (rows, last - first, hidden), data)


def join_tokens(pieces: Sequence[WireTensor], output_tokens: int) -> WireTensor:
    """Concatenate ``[rows, *, hidden]`` pieces along tokens and keep the last ``output_tokens``."""
    if len(pieces) == 1:
        return slice_tokens(pieces[0], pieces[0].shape[1] - output_tokens, pieces[0].shape[1])
    rows, _, hidden = pieces[0].shape
    token_bytes = hidden * ITEM_BYTES[pieces[0].dtype]
    data = bytearray()
    for row in range(rows):
        joined = b"".join(
            memoryview(piece.data)[
                row * piece.shape[1] * token_bytes : (row + 1) * piece.shape[1] * token_bytes
            ]
            for piece in pieces
        )
        data += memoryview(joined)[len(joined) - output_tokens * token_bytes :]
    return WireTensor(pieces[0].dtype, (rows, output_tokens, hidden), data)
