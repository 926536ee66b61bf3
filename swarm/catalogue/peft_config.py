"""PEFT's ``adapter_config.json``: what it means for each module, and what cannot be served.

Settings that only matter while an adapter is trained are ignored. A setting that would change the
result and is not known here is refused: a wrong answer must not look like a right one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from swarm.protocol.adapter_index import MAX_RANK
from swarm.protocol.bounded_json import parse_json
from swarm.protocol.errors import AdapterError, DecodeError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 256 * 1024
_DEPTH = 6
_MAX_PATTERNS = 512
_SAFE_PATTERN = re.compile(r"\^?[A-Za-z0-9_.\\\[\]\-]*[*+]?[A-Za-z0-9_.\\\[\]\-]*\$?")
"""At most one quantifier and no groups: matching stays quadratic in short names."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        # They say which modules were made; the file has those, and no others.
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
    }
)
_READ_BELOW = frozenset(
    {
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
_INERT: tuple[object, ...] = (None, False, "none", [], {})
"""Values by which a setting says that it is not used."""
_PLAIN_STARTS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin the training that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ
change it."""


@dataclass(frozen=True)
class PeftLoraConfig:
    """A LoRA or DoRA configuration."""

    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    target_modules: tuple[str, ...]
    """Names or ends of names; empty when the configuration has a regular expression instead."""
    use_rslora: bool
    use_dora: bool
    base_model: str
    """As the author called it; may be empty."""

    def rank_of(self, path: str) -> int:
        """``path`` is the module's in the whole model: ``model.layers.3.self_attn.q_proj``."""
        return next((r for key, r in self.rank_pattern.items() if key.match(path)), self.rank)

    def scaling_of(self, path: str) -> float:
        """What ``B A x`` is multiplied by; rank-stabilised LoRA divides by the root of the rank."""
        alpha = next((a for key, a in self.alpha_pattern.items() if key.match(path)), self.alpha)
        rank = self.rank_of(path)
        return alpha / (sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT would put an adapter there."""
        names = self.target_modules
        return not names or any(path == name or path.endswith("." + name) for name in names)


def read_peft_json(directory: Path) -> dict[str, Any]:
    """The object in ``adapter_config.json``. Raises AdapterError."""
    path = directory / CONFIG_NAME
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise AdapterError(f"{directory} is no adapter: it has no {CONFIG_NAME}") from None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from error
    try:
        value = parse_json(data, maximum_bytes=MAX_CONFIG_BYTES, maximum_depth=_DEPTH)
    except DecodeError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error.detail}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{CONFIG_NAME} is no JSON object")
    return value


def lora_config(value: Mapping[str, Any]) -> PeftLoraConfig:
    """What ``value`` says. Raises AdapterError for settings that cannot be served."""
    if value.get("peft_type") != "LORA":
        raise AdapterError(f"adapters of the type {value.get('peft_type')!r} are not supported")
    for key, setting in value.items():
        if key not in _WITHOUT_EFFECT | _READ_BELOW and setting not in _INERT:
            raise AdapterError(f"the setting {key} = {str(setting)[:60]!r} is not supported")
    start = value.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights = {str(start)[:60]!r} changes the base model; convert the adapter "
            "to plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    targets = value.get("target_modules")
    return PeftLoraConfig(
        rank=_rank("r", value.get("r", 8)),
        alpha=_number("lora_alpha", value.get("lora_alpha", 8)),
        rank_pattern={
            _pattern(key): _rank("rank_pattern", rank)
            for key, rank in _patterns(value, "rank_pattern").items()
        },
        alpha_pattern={
            _pattern(key): _number("alpha_pattern", alpha)
            for key, alpha in _patterns(value, "alpha_pattern").items()
        },
        target_modules=tuple(map(str, targets)) if isinstance(targets, list) else (),
        use_rslora=value.get("use_rslora") is True,
        use_dora=value.get("use_dora") is True,
        base_model=str(value.get("base_model_name_or_path") or "")[:256],
    )


def _patterns(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    patterns = value.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise AdapterError(f"{key} is no table of at most {_MAX_PATTERNS} patterns")
    return patterns


def _pattern(key: str) -> re.Pattern[str]:
    """As PEFT matches it: a module's whole path, or the end of it after a dot."""
    if len(key) > 128 or not _SAFE_PATTERN.fullmatch(key):
        raise AdapterError(f"the pattern {key[:60]!r} is too complicated")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error:
        raise AdapterError(f"the pattern {key[:60]!r} is no regular expression") from None


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{key}: a rank of {str(value)[:20]}; 1 to {MAX_RANK} are allowed")
    return value


def _number(key: str, value: object) -> float:
    if type(value) not in (int, float) or not isfinite(float(value)):  # type: ignore[arg-type]
        raise AdapterError(f"{key} is no number: {str(value)[:20]}")
    return float(value)  # type: ignore[arg-type]
