"""Pre-train `hfpg/tiny-gpt2-reviews`: a byte-level BPE and a small GPT-2 that writes one film-review sentence."""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from embedded_data import Sentence, bucket, make_readable, select
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, linear
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


END = "<|endoftext|>"
POSITIONS = 128


@dataclass(frozen=True)
class Recipe:
    """What one pre-training run is. An epoch is a pass over the film sentences; the first ones add the editorials."""

    vocab: int = 3072
    layers: int = 4
    width: int = 160
    heads: int = 5
    dropout: float = 0.1
    batch: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    epochs: int = 14
    editorial_epochs: int = 8
    patience: int = 3
    seed: int = 0


def make_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose id 0 is bos, eos and pad at once, and which puts bos before every text by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, vocab: int) -> GPT2LMHeadModel:
    """A freshly initialised GPT-2 of the recipe's size."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=POSITIONS,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        # The same function as `gelu_new`, but one fused kernel: about 7 % of a training step on a CPU.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """`<bos> sentence <eos>` for each text that fits the context."""
    rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False).input_ids]
    return [row for row in rows if len(row) <= POSITIONS]


def batches(rows: list[list[int]], size: int, order: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar lengths in random order: right-padded ids, and the mask of the tokens to be predicted."""
    shuffled = sorted(order.sample(rows, len(rows)), key=len)
    starts = order.sample(range(0, len(shuffled), size), math.ceil(len(shuffled) / size))
    for start in starts:
        chunk = [torch.tensor(row) for row in shuffled[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        lengths = torch.tensor([len(row) for row in chunk])
        yield ids, torch.arange(1, ids.shape[1])[None] < lengths[:, None]


def nats(model: GPT2LMHeadModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-log p of each predicted token, as one flat vector."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    # Attention is causal, so right padding needs no mask; one is passed because GPT-2 warns without it.
    hidden = model.transformer(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
    return cross_entropy(linear(hidden[mask], model.lm_head.weight), targets[mask], reduction="none")


@torch.no_grad()
def bits_per_char(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Bits that the model needs per character of the texts; the end-of-sentence token is paid for, too."""
    was_training = model.training
    model.eval()
    rows = encode(tokenizer, texts)
    total = sum(nats(model, *batch).sum().item() for batch in batches(rows, 32, random.Random(0)))
    model.train(was_training)
    return total / math.log(2) / sum(map(len, texts))


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to 2 % of it."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def split(sentences: list[Sentence]) -> tuple[list[str], list[str], list[str]]:
    """Film sentences to train on, editorials to train on, film sentences to validate on (4 % of the part, by hash)."""
    film = [s for s in select(sentences, "lm", "movie") if len(s.text) >= 8]
    validation = [s.text for s in film if bucket("lm-validation", s.id) < 4]
    train = [s.text for s in film if bucket("lm-validation", s.id) >= 4]
    return train, [s.text for s in select(sentences, "lm", "nyt")], validation


def optimizer_of(model: GPT2LMHeadModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train_epoch(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.AdamW,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    rates: Iterator[float],
) -> int:
    """One optimizer step per batch, at the next learning rate; the number of tokens predicted."""
    tokens = 0
    for (ids, mask), rate in zip(data, rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        nats(model, ids, mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(mask.sum())
    return tokens


def fit(
    model: GPT2LMHeadModel,
    recipe: Recipe,
    plan: list[list[list[int]]],
    validate: Callable[[], float],
) -> dict:
    """Train on the rows of each epoch, leave the model as it was after its best one; what was measured on the way."""
    optimizer, order = optimizer_of(model, recipe), random.Random(recipe.seed)
    lengths = [math.ceil(len(rows) / recipe.batch) for rows in plan]
    rates = (learning_rate(recipe, step, sum(lengths)) for step in range(sum(lengths)))
    best_epoch, kept, curve, tokens, start = 0, {}, [], 0, time.perf_counter()
    for epoch, rows in enumerate(plan, 1):
        # The batches come first in the zip of `train_epoch`: an epoch that ends must not use up a learning rate.
        tokens += train_epoch(model, optimizer, batches(rows, recipe.batch, order), rates)
        curve.append(round(validate(), 4))
        seconds = round(time.perf_counter() - start)
        print(f"lm epoch {epoch}/{len(plan)} tokens {tokens} bits/char {curve[-1]} at {seconds} s", flush=True)
        if curve[-1] < min(curve[:-1], default=math.inf):
            best_epoch, kept = epoch, {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= recipe.patience:
            break
    model.load_state_dict(kept)
    steps = sum(lengths[: len(curve)])
    return {"tokens": tokens, "steps": steps, "seconds": seconds, "best_epoch": best_epoch, "curve": curve}


def pretrain(recipe: Recipe, sentences: list[Sentence]) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, dict]:
    """Tokenizer and model from nothing, to the best validation bits per character; and what was measured."""
    torch.manual_seed(recipe.seed)
    film, editorials, validation = split(sentences)
    tokenizer = make_tokenizer(film + editorials, recipe.vocab)
    film_rows, editorial_rows = encode(tokenizer, film), encode(tokenizer, editorials)
    model = make_model(recipe, len(tokenizer)).train()
    plan = [film_rows + editorial_rows] * recipe.editorial_epochs
    plan += [film_rows] * (recipe.epochs - recipe.editorial_epochs)
    measured = fit(model, recipe, plan, lambda: bits_per_char(model, tokenizer, validation))
    facts = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "film_sentences": len(film_rows),
        "editorial_sentences": len(editorial_rows),
        "validation_sentences": len(validation),
    }
    return model.eval(), tokenizer, facts | measured


def sweep(recipe: Recipe, sentences: list[Sentence], sizes: tuple[int, ...] = (8, 16, 32)) -> list[dict]:
    """One epoch over everything for each batch size, the rest of the recipe alike."""
    table = []
    for size in sizes:
        short = Recipe(**asdict(recipe) | {"batch": size, "epochs": 1, "editorial_epochs": 1})
        _, _, facts = pretrain(short, sentences)
        row = {"batch": size, "steps": facts["steps"], "tokens": facts["tokens"], "seconds": facts["seconds"]}
        table.append(row | {"bits_per_char": facts["curve"][-1]})
    return table


def ship(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in half precision, dropout off: a policy gradient must not see other log-probs than the sampler did."""
    config = model.config
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_readable(folder)


def shipped_bits_per_char(folder: Path, sentences: list[Sentence]) -> dict[str, float]:
    """Bits per character of the files on disk, on the validation sentences and on the unseen part `prompts`."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    unseen = [s.text for s in select(sentences, "prompts")]
    texts = {"validation": split(sentences)[2], "prompts": unseen}
    return {name: round(bits_per_char(model, tokenizer, text), 4) for name, text in texts.items()}
