"""What a computer with the whole model says of audits: limits for them, and answers to trust.

Limits: how far honest precisions are from float32, measured here.

The operator of a model runs this when it is released; clients then hold nodes to what honest nodes
of their precision reach, times a margin, instead of to what any model may need. Runs spans of the
real model on hidden states of real texts, as prompts and token by token with a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.adapter_push import AdapterSource
from swarm.client.ends import EMBEDDING, HEAD, NORM, no_progress_bars, read_config, read_tensor
from swarm.compute.adapter_merge import merged_weight
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.ledger.audit_rule import (
    CALIBRATION_MARGIN,
    Comparison,
    Floats,
    Limits,
    SpanLimits,
    compare,
)
from swarm.protocol.errors import CheckpointError, UsageError
from swarm.protocol.tensors import DType, WireTensor

WINDOW_TOKENS = 128


class SpanRunner:
    """Spans of one model, in float32 and in other precisions, on hidden states of texts."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the model cannot be loaded."""
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
            )
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the model in {path}: {error}") from error
        self.model: Any = model.eval().requires_grad_(False)
        self._base: Any = self.model.model
        self.layers: Any = self._base.layers

    @property
    def number_of_blocks(self) -> int:
        return len(self.layers)

    def windows(self, texts: Sequence[str], most: int) -> torch.Tensor:
        """Token ids ``[windows, 128]`` of texts, in turns. Raises UsageError for too little."""
        cut: list[list[int]] = []
        ids = [self._tokenizer(text)["input_ids"] for text in texts]
        for start in range(0, max(map(len, ids), default=0), WINDOW_TOKENS):
            for each in ids:
                piece = each[start : start + WINDOW_TOKENS]
                if len(piece) == WINDOW_TOKENS:
                    cut.append(piece)
        if len(cut) < 2:
            raise UsageError("too little text to calibrate with: give a few pages")
        return torch.tensor(cut[:most])

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """States ``[windows, tokens, hidden]`` before each block, rounded as on a bfloat16 wire."""
        states = self.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        return [each.to(torch.bfloat16).to(torch.float32) for each in states[:-1]]

    def copy_of(self, first_block: int, end_block: int, dtype: torch.dtype) -> torch.nn.ModuleList:
        """The blocks of a span in another precision, to be run by :meth:`prefill` or decode."""
        blocks = torch.nn.ModuleList(
            copy.deepcopy(block).to(dtype) for block in self.layers[first_block:end_block]
        )
        for index, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", index)  # noqa: B010 (torch types attributes as modules)
        return blocks

    def prefill(self, blocks: torch.nn.ModuleList, given: torch.Tensor) -> torch.Tensor:
        """All positions at once; the output in float32."""
        with self._as_model(blocks):
            dtype = next(blocks.parameters()).dtype
            return self._base(inputs_embeds=given.to(dtype), use_cache=False)[0].float()  # type: ignore[no-any-return]

    def decode(self, blocks: torch.nn.ModuleList, given: torch.Tensor) -> torch.Tensor:
        """Token by token with a cache; the output in float32."""
        dtype = next(blocks.parameters()).dtype
        cache = DynamicCache()
        outputs = []
        with self._as_model(blocks):
            for position in range(given.shape[1]):
                token = given[:, position : position + 1].to(dtype)
                outputs.append(
                    self._base(inputs_embeds=token, past_key_values=cache, use_cache=True)[0]
                )
        return torch.cat(outputs, dim=1).float()

    @contextmanager
    def _as_model(self, blocks: torch.nn.ModuleList) -> Iterator[None]:
        layers, norm = self._base.layers, self._base.norm
        self._base.layers, self._base.norm = blocks, torch.nn.Identity()
        try:
            yield
        finally:
            self._base.layers, self._base.norm = layers, norm


@torch.no_grad()
def round_to_int8(blocks: torch.nn.ModuleList) -> torch.nn.ModuleList:
    """Weights of linears as eight bits per output channel would have them."""
    for module in blocks.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(dim=1, keepdim=True) / 127
            module.weight.copy_(torch.round(module.weight / scale) * scale)
    return blocks


def compare_windows(
    given: torch.Tensor, answered: torch.Tensor, reference: torch.Tensor
) -> list[Comparison]:
    """One comparison for each window of ``[windows, tokens, hidden]``, position 0 left out."""
    arrays: list[Floats] = [each[:, 1:].float().numpy() for each in (given, answered, reference)]
    return [compare(*(each[index] for each in arrays)) for index in range(given.shape[0])]


@dataclass(frozen=True, slots=True)
class HonestVariant:
    """An honest way to compute, and the precision that a node of it declares."""

    dtype_class: str
    blocks: Callable[[SpanRunner, int, int], torch.nn.ModuleList]
    is_decode: bool = False


def _of(dtype: torch.dtype) -> Callable[[SpanRunner, int, int], torch.nn.ModuleList]:
    return lambda runner, first, end: runner.copy_of(first, end, dtype)


def _int8(runner: SpanRunner, first: int, end: int) -> torch.nn.ModuleList:
    return round_to_int8(runner.copy_of(first, end, torch.float32)).to(torch.bfloat16)


HONEST: Mapping[str, HonestVariant] = {
    "float32 decode": HonestVariant("float32", _of(torch.float32), is_decode=True),
    "bfloat16 prefill": HonestVariant("bfloat16", _of(torch.bfloat16)),
    "bfloat16 decode": HonestVariant("bfloat16", _of(torch.bfloat16), is_decode=True),
    "float16 prefill": HonestVariant("float16", _of(torch.float16)),
    "float16 decode": HonestVariant("float16", _of(torch.float16), is_decode=True),
    "int8 prefill": HonestVariant("int8", _int8),
    "int8 decode": HonestVariant("int8", _int8, is_decode=True),
}


def spans_of(number_of_blocks: int) -> list[tuple[int, int]]:
    """Short, middling and whole spans at both ends and in the middle."""
    spans = {(0, number_of_blocks)}
    for length in (2, max(2, number_of_blocks // 3)):
        for first in (0, (number_of_blocks - length) // 2, number_of_blocks - length):
            spans.add((max(0, first), min(number_of_blocks, first + length)))
    return sorted(spans)


@torch.no_grad()
def calibrate(
    runner: SpanRunner,
    texts: Sequence[str],
    *,
    most_windows: int = 12,
    progress: Callable[[str], None] = lambda _: None,
) -> SpanLimits:
    """The largest honest errors times the margin, by declared precision and length of span."""
    ids = runner.windows(texts, most_windows)
    states = runner.hidden_states(ids)
    largest: dict[str, dict[int, Limits]] = {}
    for first, end in spans_of(runner.number_of_blocks):
        given = states[first]
        reference = runner.prefill(runner.copy_of(first, end, torch.float32), given)
        for name, variant in HONEST.items():
            blocks = variant.blocks(runner, first, end)
            run = runner.decode if variant.is_decode else runner.prefill
            found = compare_windows(given, run(blocks, given), reference)
            median = max(each.median for each in found)
            p95 = max(each.p95 for each in found)
            progress(f"blocks {first}-{end - 1}, {name}: median {median:.4f}, p95 {p95:.4f}")
            by_blocks = largest.setdefault(variant.dtype_class, {})
            before = by_blocks.get(end - first, Limits(0.0, 0.0))
            by_blocks[end - first] = Limits(max(before.median, median), max(before.p95, p95))
    with_margin = {
        dtype_class: {
            blocks: Limits(CALIBRATION_MARGIN * limits.median, CALIBRATION_MARGIN * limits.p95)
            for blocks, limits in by_blocks.items()
        }
        for dtype_class, by_blocks in largest.items()
    }
    # An exact node is compared with one of any precision, so nobody is held to less than 16 bit.
    with_margin["float32"] = with_margin["bfloat16"]
    return SpanLimits(with_margin)


class OwnWeights:
    """Spans of a model computed here in float32: what an audit by own weights compares with.

    One block is in memory at a time: it is read, computed and dropped.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for a family that is not supported, or blocks that are missing."""
        self._checkpoint = checkpoint
        self._config = read_config(checkpoint.path)
        for block in range(checkpoint.number_of_blocks):
            for info in checkpoint.block_tensors(block).values():
                if not info.file.exists():
                    raise CheckpointError(
                        f"{checkpoint.path} lacks the weights of block {block}; "
                        "swarm models pull fetches all of a model"
                    )

    @property
    def largest_block_bytes(self) -> int:
        """What computing takes of memory, but for the activations."""
        blocks = range(self._checkpoint.number_of_blocks)
        return max(self._checkpoint.block_bytes(block, "float32") for block in blocks)

    @torch.no_grad()
    def compute(
        self,
        first_block: int,
        end_block: int,
        given: WireTensor,
        adapter: AdapterSource | None = None,
    ) -> WireTensor:
        """``[rows, tokens, hidden]`` through blocks ``[first_block, end_block)`` as one prompt.

        In float32 on the CPU; takes a while, so not on an event loop. ``adapter`` must fit the
        model. Raises CheckpointError.
        """
        states = tensor_from_wire(given, torch.float32)
        for block in range(first_block, end_block):
            states = self._model_of(block, adapter)(inputs_embeds=states, use_cache=False)[0]
        return tensor_to_wire(states, DType.FLOAT32)

    def _model_of(self, block: int, adapter: AdapterSource | None) -> Any:
        """The family's decoder with this block alone, and ends of no size."""
        config = copy.deepcopy(self._config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [self._config.layer_types[block]]
        config.vocab_size = 1
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        hidden = config.hidden_size
        tensors = {
            EMBEDDING: torch.zeros(1, hidden),
            NORM: torch.zeros(hidden),
            HEAD: torch.zeros(1, hidden),
        }
        for name, info in self._checkpoint.block_tensors(block).items():
            tensors[f"model.layers.0.{name}"] = read_tensor(self._checkpoint, info)
        if adapter is not None:
            for module in adapter.index.of_blocks(block, block + 1):
                name = f"model.layers.0.{module.name}.weight"
                tensors[name] = merged_weight(tensors[name], module, adapter.read(module))
        family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with no_progress_bars():
            model, report = family.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"block {block} lacks {', '.join(missing)}")
        decoder: Any = model.eval().get_decoder()
        decoder.norm = torch.nn.Identity()
        return decoder
