"""Tiny models and tokenizers, built in code."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hfpg.models import LSTMConfig, LSTMForCausalLM


VOCABULARY = 64
WORDS = ["<eos>", "<unk>"] + [chr(97 + i % 26) + chr(97 + i // 26) for i in range(VOCABULARY - 2)]
ARCHITECTURES = ("gpt2", "llama", "qwen2", "opt", "gemma2", "mistral", "lstm")


def tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """One token per two-letter word; EOS is id 0; no pad token unless given."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(prefix="##")  # joins words with spaces
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>", **kwargs)


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """One token per byte, as the byte-level tokenizers of real models; EOS is id 0; 257 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(["<eos>", *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", **kwargs)


def model(kind: str = "gpt2", seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    """A two-layer causal LM of the given architecture with random weights, larger than usual: its logits matter."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    rope = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    if kind == "gpt2":
        settings = dict(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=96, **ids)
        made = GPT2LMHeadModel(GPT2Config(**(settings | changes)))
    elif kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**(dict(vocab_size=vocabulary, **rope, **ids) | changes)))
    elif kind == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**(dict(vocab_size=vocabulary, **rope, **ids) | changes)))
    elif kind == "opt":
        settings = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16)
        settings |= dict(vocab_size=vocabulary, max_position_embeddings=96, **ids, do_layer_norm_before=True)
        made = OPTForCausalLM(OPTConfig(**(settings | {"pad_token_id": 1} | changes)))
    elif kind == "gemma2":
        settings = dict(
            vocab_size=vocabulary, head_dim=16, final_logit_softcapping=2.0, sliding_window=8, **rope, **ids
        )
        made = Gemma2ForCausalLM(Gemma2Config(**(settings | changes)))
    elif kind == "mistral":
        settings = dict(vocab_size=vocabulary, sliding_window=4, **rope, **ids)
        made = MistralForCausalLM(MistralConfig(**(settings | changes)))
    elif kind == "lstm":
        settings = dict(vocab_size=vocabulary, hidden_size=32, embedding_size=16, num_hidden_layers=2, **ids)
        settings |= dict(initializer_range=0.2)  # its states are small: 0.02 is uniform even when it is enlarged
        made = LSTMForCausalLM(LSTMConfig(**(settings | changes)))
    else:
        raise ValueError(f"no architecture {kind!r}; there are {ARCHITECTURES}")
    return enlarged(made)


@torch.no_grad()
def enlarged(made: Any) -> Any:
    """A model whose matrices are four times as large: the usual 0.02 leaves every distribution uniform."""
    for parameter in made.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(4)
    return made.eval()


def nested_gemma(**changes: Any) -> Any:
    """Gemma 3 with its eyes: what its text model is stands one level down in the configuration."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    text = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16, **ids)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=32, max_position_embeddings=96)
    text |= dict(layer_types=["sliding_attention", "full_attention"], initializer_range=0.2)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(image_size=8, patch_size=4, **small)
    config = Gemma3Config(text_config=text | changes, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config).eval()


def rows(count: int = 40, longest: int = 5) -> list[dict[str, Any]]:
    """Prompts of 1 to `longest` words with one more column."""
    return [
        {"prompt": " ".join(WORDS[2 + (i * 7 + j * 3) % 60] for j in range(1 + i % longest)), "number": i}
        for i in range(count)
    ]


def count_a(completions: list[str], **columns: Any) -> list[float]:
    """A reward that a tiny model can learn: words that begin with a, b or c."""
    return [sum(w[0] in "abc" for w in c.split()) / 8 for c in completions]
