"""One piece of work, which both sides do: its sizes, its model, its prompts, and the flags that choose it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hfpg.config import no_progress_bar


PAD, EOS, UNKNOWN = 0, 1, 2
EOS_RATE = 0.04  # chance of EOS at every token of a `ragged` model: about 25 of 48 tokens
RAGGED_PROMPTS = (4, 64)  # tokens
LENGTHS = ("prompt_length", "completion_length")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "T": dict(vocab_size=512, n_embd=64, n_layer=2, n_head=2),  # a toy, for tests
    "S": dict(vocab_size=8192, n_embd=256, n_layer=4, n_head=4),  # 5.4 M parameters
    "M": dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12),  # GPT-2 small
    "Q": dict(  # Qwen2.5-0.5B
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SIZES: dict[str, dict[str, int]] = {
    "T": dict(samples=8, epochs=2, micro_positions=64, prompt_length=6, completion_length=10),
    "S": dict(samples=64, epochs=4, micro_positions=1024),
    "M": dict(samples=16, epochs=2, micro_positions=512),  # and every folder
    "Q": dict(samples=256, epochs=1, micro_positions=16384, prompt_length=64, completion_length=256),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step does. `samples` are completions, `epochs` passes over them with `minibatches` optimizer steps."""

    algorithm: str = "rloo"
    model: str = "S"  # T, S, M, or the name of a folder
    completions: str = "ragged"
    prompts: str = "fixed"
    value: Literal["shared", "separate"] = "shared"
    samples: int = 64
    generations: int = 4  # completions of one prompt; 1 for PPO
    prompt_length: int = 16
    completion_length: int = 48
    epochs: int = 4
    minibatches: int = 1
    micro_positions: int = 1024
    kl_coef: float = 0.05
    learning_rate: float = 1e-9  # so small that the law of the lengths stays what it is
    trainable_layers: int | None = None  # hfpg alone: only so many layers at the top learn
    products: Literal["onednn", "torch"] = "onednn"  # hfpg alone: whose matrix products
    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False  # autocast
    liger: bool = False  # the layers of liger-kernel
    recording: bool = True  # hfpg alone: decode steps of a GPU as CUDA graphs
    threads: int = 1
    steps: int = 3  # measured; one more before them is warm-up
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples % (self.generations * self.minibatches):
            raise SystemExit(
                f"error: {self.samples} samples are no multiple of {self.generations} completions a prompt × "
                f"{self.minibatches} minibatches; try {4 * self.generations * self.minibatches}"
            )

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one step."""
        return self.samples // self.generations

    @property
    def longest_prompt(self) -> int:
        """Most tokens that a prompt can have."""
        return self.prompt_length if self.prompts == "fixed" else RAGGED_PROMPTS[1]

    @property
    def rows(self) -> int:
        """Rows of a micro-batch where rows are counted: the most that divide a minibatch and fit the positions."""
        minibatch = self.samples // self.minibatches
        fit = max(1, self.micro_positions // (self.longest_prompt + self.completion_length))
        return max(n for n in range(1, minibatch + 1) if minibatch % n == 0 and n <= fit)

    def describe(self) -> str:
        """A line for people."""
        critic = f", {self.value} critic" if self.algorithm == "ppo" else ""
        law = f"{self.completions} " if self.model in ARCHITECTURES else ""
        part = "" if self.trainable_layers is None else f", top {self.trainable_layers} layers"
        part += "" if self.products == "onednn" else ", torch's products"
        part += ", bf16" if self.bf16 else ""
        part += ", liger" if self.liger else ""
        part += "" if self.recording else ", no recordings"
        prompts = self.prompt_length if self.prompts == "fixed" else "{}–{}".format(*RAGGED_PROMPTS)
        return (
            f"{self.algorithm.upper()}{critic}, {self.model}{part}, {law}completions ≤ {self.completion_length}, "
            f"prompts {prompts}, {self.samples} samples, {self.epochs} epochs"
        )


# ── flags


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which work; sizes left out are those of the model."""
    add = parser.add_argument
    add("--algorithm", choices=("rloo", "grpo", "ppo"), default="rloo")
    add("--model", default="S", help="S, M, Q or T (random weights, made here), or the folder of a causal LM.")
    add("--completions", choices=("ragged", "fixed"), default="ragged", help="EOS now and then, or never; S, M, T.")
    add("--prompts", choices=("fixed", "ragged"), default="fixed", help="16 tokens each, or 4 to 64.")
    add("--value", choices=("shared", "separate"), default="shared", help="hfpg's critic in PPO; TRL's is separate.")
    add("--products", choices=("onednn", "torch"), default="onednn", help="Matrix products of hfpg.")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--bf16", action="store_true", help="Autocast to bfloat16, on both sides.")
    add("--liger", action="store_true", help="liger-kernel's layers, on both sides; a GPU's.")
    add("--no-recording", dest="recording", action="store_false", help="Decode steps one by one; for hfpg alone.")
    add("--threads", type=int, default=1)
    add("--steps", type=int, default=3, help="Measured steps; one more before them is warm-up.")
    add("--seed", type=int, default=0)
    add("--trainable-layers", type=int, help="Only so many layers at the top learn; for hfpg alone.")
    for name in ("samples", "generations", "epochs", "minibatches", "micro_positions", *LENGTHS):
        add(f"--{name.replace('_', '-')}", type=int, help="Default: the model's work, see docs/performance.md.")


def work_from(args: argparse.Namespace) -> Work:
    """The work that parsed flags say."""
    sizes: dict[str, Any] = dict(SIZES.get(args.model, SIZES["M"]))
    sizes["generations"] = 1 if args.algorithm == "ppo" else 4
    names = {f.name for f in dataclasses.fields(Work)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return Work(**sizes | given | {"model": Path(args.model).name})


# ── model and prompts


def model_folder(model: str, completions: str, into: Path) -> Path:
    """The folder that both sides load: the one given, or a model made here."""
    if model not in ARCHITECTURES:
        if not Path(model, "config.json").exists():
            raise SystemExit(f"error: --model {model} holds no config.json; give the folder of a model, or S, M, Q, T")
        return Path(model).resolve()
    folder, sizes = into / model, ARCHITECTURES[model] | dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
    torch.manual_seed(0)
    lm: Any
    if "n_embd" in sizes:
        lm = GPT2LMHeadModel(GPT2Config(n_positions=512, **NO_DROPOUT, **sizes))
        bake_eos(lm, EOS_RATE if completions == "ragged" else 0.0)
    elif completions == "ragged":
        raise SystemExit(f"error: model {model} has no bias to say how often EOS is drawn; add --completions fixed")
    else:
        lm = Qwen2ForCausalLM(Qwen2Config(**sizes))  # EOS is as likely as any other token: one in 151,936
    config = lm.config
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = EOS, PAD
    with no_progress_bar():
        lm.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


@torch.no_grad()
def bake_eos(lm: Any, rate: float) -> None:
    """Put the chance of EOS into the bias of the last norm, where every library sees it; rate 0: never."""
    row = lm.transformer.wte.weight[EOS]
    logit = math.log(rate * lm.config.vocab_size) if rate else -25.0  # the other logits are near 0
    lm.transformer.ln_f.bias.copy_(row / row.pow(2).sum() * logit)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token per word: w3, w4, …"""
    vocabulary = {"[PAD]": PAD, "[EOS]": EOS, "[UNK]": UNKNOWN} | {f"w{i}": i for i in range(3, size)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", model_max_length=512, **names)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model; `AutoTokenizer` would take one made here for Qwen's own."""
    made = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class") == "TokenizersBackend"
    kind: Any = PreTrainedTokenizerFast if made else AutoTokenizer
    return kind.from_pretrained(folder)


def single_words(tokenizer: Any, count: int = 500) -> list[str]:
    """Words that the tokenizer makes one token of, after a space."""
    found = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.lstrip("Ġ▁")
        plain = len(word) > 1 and word.isascii() and word.isalnum() and word.islower()
        if plain and len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1:
            found.append(word)
        if len(found) == count:
            break
    return found


def prompt_texts(work: Work, tokenizer: Any) -> list[str]:
    """Prompts for warm-up and measured steps, with exactly known lengths: as many words as tokens."""
    generator, words = random.Random(work.seed), single_words(tokenizer)
    shortest = work.prompt_length if work.prompts == "fixed" else RAGGED_PROMPTS[0]
    count = work.prompts_per_step * (work.steps + 2)
    lengths = [generator.randint(shortest, work.longest_prompt) for _ in range(count)]
    return ["".join(f" {generator.choice(words)}" for _ in range(length)) for length in lengths]
