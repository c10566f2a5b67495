"""Preference pairs become a reward model: Bradley–Terry on any backbone of the Hub, with transformers' Trainer.

    python reward_models/train.py --model Qwen/Qwen2.5-0.5B --dataset user/preferences --output_dir runs/judge
    python reward_models/train.py --model FOLDER --dataset pairs.jsonl --lora_r 16 --learning_rate 1e-4

Columns: `chosen` and `rejected`, and if there is one `prompt`; text or conversations. Every field of Script and of
transformers.TrainingArguments is a flag, and `--config FILE.yaml` reads them from a file. The output folder is an
ordinary classifier with its tokenizer and a card: `reward_funcs="runs/judge"`, or `--reward runs/judge`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from card import write_card
from datasets import Dataset
from evaluate import evaluate, show
from pairs import Pairs, hold_out, load_pairs, plain
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from hfpg.config import SECRET, ConfigError, field, no_progress_bar, one_sentence, parse, require
from hfpg.data import read_chat_template
from hfpg.fields import first_line
from hfpg.ops.preference import bradley_terry, centering, pair_accuracy
from hfpg.rewards.model_judge import longest_input


DONE = "training.json"  # written last: a folder that has it is whole


@dataclass
class Script:
    """What is trained, on what, and how; the optimizer's settings are TrainingArguments."""

    model: str = field("", "Hub id or folder of the backbone: any model with a sequence classification head.")
    dataset: str = field("", "Hub id or .json/.jsonl/.csv file with the columns chosen and rejected, perhaps prompt.")
    dataset_config: str | None = field(None, "Configuration of the data set on the Hub.")
    split: str = field("train", "Split of the data set on the Hub.")
    eval_dataset: str | None = field(None, "Held-out pairs, as --dataset. Default: --held_out of the training pairs.")
    eval_split: str = field("test", "Split of --eval_dataset on the Hub.")
    held_out: int = field(1000, "Pairs held out for measuring, at most a fifth; without --eval_dataset.")
    margin_column: str = field("margin", "Column with m ≥ 0 in −log σ(r_c − r_r − m), where it exists; '': none.")
    ties: Literal["drop", "half"] = field("drop", "Pairs without a preference: left out, or learnt as probability .5.")
    centering: float = field(0.0, "λ in + λ (r_c + r_r)²: keeps scores around 0; try 0.01. 0: off.")
    max_length: int | None = field(None, "Longest text in tokens; its end is kept. Default: what the backbone takes.")
    chat_template: str | None = field(None, "File with a Jinja chat template, for tokenizers that have none.")
    disable_dropout: bool = field(True, "Train without the backbone's dropout.")
    lora_r: int = field(0, "Rank of a LoRA adapter, merged when it is trained. 0: train every weight.")
    lora_alpha: int = field(32, "Scale of the adapter, α / r.")
    lora_dropout: float = field(0.0, "Dropout of the adapter.")
    lora_target_modules: list[str] | None = field(None, "Modules that get an adapter. Default: all linear ones.")
    license: str | None = field(None, "Licence of the weights, for the card.")

    def __post_init__(self) -> None:
        require(bool(self.model), "name the backbone with --model, such as Qwen/Qwen2.5-0.5B or a folder")
        require(bool(self.dataset), "name the pairs with --dataset, such as user/preferences or pairs.jsonl")
        require(self.held_out >= 1, f"held_out={self.held_out} must be at least 1: a judge must be measured")
        require(self.centering >= 0, f"centering={self.centering} must not be negative; 0.01 is usual")
        require(self.lora_r >= 0, f"lora_r={self.lora_r} must be 0 (off) or more, such as 16")
        require(self.ties in ("drop", "half"), f"ties={self.ties!r} is unknown; choose 'drop' or 'half'")
        length = self.max_length
        require(length is None or length >= 2, f"max_length={length} must be at least 2 tokens, or absent")


def defaults(script: Script) -> dict[str, Any]:
    """One epoch (a second one learns the training pairs by heart); an adapter takes larger steps than all weights."""
    rate = 1e-4 if script.lora_r else 1e-5
    schedule = dict(learning_rate=rate, num_train_epochs=1, warmup_steps=0.05, lr_scheduler_type="cosine")
    batch = dict(per_device_train_batch_size=16, per_device_eval_batch_size=32)
    run = dict(output_dir="runs/reward-model", save_strategy="no", report_to="none", logging_steps=20)
    return schedule | batch | run


class RewardTrainer(Trainer):
    """transformers' Trainer with the loss of Bradley and Terry; batches come from `Collator`."""

    def __init__(self, *args: Any, centering: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.centering = centering
        # Ours is a mean over pairs, which Trainer must divide by the number of accumulation steps, whatever it makes
        # of the model's **kwargs.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch; chosen and rejected texts go through the model in one forward pass."""
        scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
        chosen, rejected = scores.float().chunk(2)
        loss = bradley_terry(chosen, rejected, inputs["margin"], inputs["preference"]).mean()
        if self.centering:
            loss = loss + self.centering * centering(chosen, rejected).mean()
        return (loss, {"difference": chosen - rejected}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Loss, score differences and preferences of a batch of held-out pairs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs["difference"], inputs["preference"]


def held_out_accuracy(prediction: Any) -> dict[str, float]:
    """Trainer's `compute_metrics`: pair accuracy of the pairs that are no ties; nothing where there is no number."""
    d = torch.as_tensor(prediction.predictions[prediction.label_ids == 1])
    return {"accuracy": pair_accuracy(d, torch.zeros_like(d))[0]} if len(d) and d.isfinite().all() else {}


class Collator:
    """Rows of texts → one batch: the chosen texts, then the rejected ones, tokenised and padded on the right."""

    def __init__(self, tokenizer: Any, special: bool):
        self.tokenizer, self.special = tokenizer, special

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids and attention_mask [2B, T]; margin and preference [B]."""
        texts = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        ids = self.tokenizer(texts, truncation=True, add_special_tokens=self.special).input_ids
        width = max(1, max(map(len, ids)))
        fill = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([row + [fill] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "margin": torch.tensor([0.0 if row["tie"] else row["margin"] for row in rows]),
            "preference": torch.tensor([0.5 if row["tie"] else 1.0 for row in rows]),
        }


def table(pairs: Pairs, tokenizer: Any) -> Dataset:
    """The rows that `Collator` takes. `length` lets --train_sampling_strategy group_by_length save padding."""
    chosen, rejected = pairs.sides(tokenizer)
    longest = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    columns = dict(chosen=chosen, rejected=rejected, margin=pairs.margins, tie=pairs.ties, length=longest)
    return Dataset.from_dict(columns)


def load_backbone(script: Script) -> tuple[Any, Any]:
    """The classifier in fp32 with one output, and its tokenizer, both ready: head, padding, truncation.

    Raises:
        ConfigError: it cannot be loaded, has no sequence classification head, or scores depend on the padding.
    """
    try:
        with no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(script.model)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                script.model,
                num_labels=1,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the head of a classifier with other labels is replaced
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the backbone {script.model!r}: {first_line(error)}") from error
    model.config.problem_type = "regression"
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    forget(model.config)
    if script.chat_template:
        tokenizer.chat_template = read_chat_template(script.chat_template)
    limit = longest_input(model, tokenizer)
    tokenizer.model_max_length = min(limit, script.max_length or limit)
    tokenizer.truncation_side = "left"  # the completion stands at the end
    tokenizer.padding_side = "right"  # position ids are then right in every architecture
    give_padding(model, tokenizer)
    name, head = output_layer(model)
    missing = [m if isinstance(m, str) else m[0] for m in (*info["missing_keys"], *info["mismatched_keys"])]
    if any(m.startswith(f"{name}.") for m in missing):
        init_head(head)
    check_padding(model, tokenizer)
    return model, tokenizer


def forget(config: Any) -> None:
    """Take a stored mean and std out of a config: they are those of the weights that it came with."""
    for name in ("reward_mean", "reward_std"):
        vars(config).pop(name, None)


def output_layer(model: Any) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that writes the score: the last one with a single output.

    Raises:
        ConfigError: there is none.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    require(
        bool(found), f"{type(model).__name__} has no linear layer with one output to score with; use another model"
    )
    return found[-1]


def init_head(head: nn.Linear) -> None:
    """Weights N(0, 1/(d + 1)), bias 0 (Stiennon et al. 2020, arXiv:2009.01325): scores start with variance near 1."""
    with torch.no_grad():
        head.weight.normal_(0, (head.in_features + 1) ** -0.5)
        if head.bias is not None:
            head.bias.zero_()


def give_padding(model: Any, tokenizer: Any) -> None:
    """A padding token that stands in no text, so that a decoder's last token is found by id as it would by position.

    `…ForSequenceClassification` of a decoder reads the score at the last token whose id is not the padding id. Where
    padding is EOS (or BOS), a text that ends with EOS would be scored one token too early.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id} - {None}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        names = ["<|padding|>", *(f"<|padding_{i}|>" for i in range(9))]
        tokenizer.add_special_tokens({"pad_token": next(n for n in names if n not in tokenizer.get_vocab())})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def check_padding(model: Any, tokenizer: Any) -> None:
    """Score two texts alone and together.

    Raises:
        ConfigError: the shorter one's score depends on the padding beside it.
    """
    texts = ["A text.", "Another text, which is a good deal longer than the first one, and then some."]
    collate = Collator(tokenizer, special=True)

    def scores(*batch: str) -> Tensor:
        rows = collate([dict(chosen=t, rejected=t, margin=0.0, tie=False) for t in batch])
        return model.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[: len(batch), 0]

    alone, together = scores(texts[0])[0].item(), scores(*texts)[0].item()
    require(
        abs(alone - together) <= 1e-3 * (1 + abs(alone)),
        f"{type(model).__name__} scores a text {alone:.4f} alone and {together:.4f} with padding behind it: its score "
        "would depend on the batch; use another backbone",
    )


def without_dropout(model: Any) -> dict[str, float]:
    """Set every dropout probability to 0, that of functional dropout (an attribute of its module, or read from the
    configuration in every pass), too. Returns what the configuration had, which belongs into the saved one.
    """
    config = model.config.get_text_config()
    had = {name: value for name, value in vars(config).items() if "drop" in name and isinstance(value, float)}
    for name in had:
        setattr(config, name, 0.0)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (isinstance(module, nn.Dropout) or "drop" in name):
                setattr(module, name, 0.0)
    return had


def with_lora(model: Any, script: Script) -> Any:
    """The model with a trainable adapter; the score's layer is trained whole.

    Raises:
        ConfigError: a target module does not exist.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules or "all-linear",
        modules_to_save=[output_layer(model)[0]],
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        leaves = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        raise ConfigError(f"the adapter fits no module {script.lora_target_modules}; there are {leaves}") from error


def deal_out(script: Script, seed: int) -> tuple[Pairs, Pairs, dict[str, int]]:
    """Training pairs, held-out pairs, and how many pairs were left out for which reason."""
    pairs = load_pairs(
        script.dataset, split=script.split, config=script.dataset_config, margin_column=script.margin_column
    )
    ties, overlap = sum(pairs.ties), 0
    clear = pairs.without_ties()  # refuses data of ties alone
    pairs = clear if script.ties == "drop" else pairs
    if script.eval_dataset is None:
        train, held, shared = hold_out(pairs, script.held_out, seed)
    else:
        held = load_pairs(script.eval_dataset, split=script.eval_split, margin_column="")
        train, shared = pairs, 0
        seen = {plain(text) for text in (*train.chosen, *train.rejected)}
        overlap = sum(bool({plain(c), plain(r)} & seen) for c, r in zip(held.chosen, held.rejected, strict=True))
    train = train.without_ties() if script.ties == "drop" else train
    same = train.templated == held.templated
    require(same, "the training pairs are text and the held-out pairs conversations, or the other way round; use one")
    learnt = sum(train.ties)
    return (
        train,
        held.without_ties(),
        {"ties": ties - learnt, "learnt_ties": learnt, "shared_text": shared}
        | ({"overlap": overlap} if script.eval_dataset else {}),
    )


def checkpoint_of(args: TrainingArguments, lora: bool) -> str | None:
    """The checkpoint that the run goes on from: a folder, or with "True" the newest one of output_dir.

    Raises:
        ConfigError: it is none.
    """
    given, folder = str(args.resume_from_checkpoint or ""), args.output_dir or ""
    if given.lower() in ("", "false"):
        return None
    newest = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    path = newest if given.lower() == "true" else given
    require(
        path is not None and (Path(path) / TRAINER_STATE_NAME).is_file(),
        f"resume_from_checkpoint={given!r} is no checkpoint of this script: there is no {TRAINER_STATE_NAME} in "
        f"{path or f'any folder {folder}/checkpoint-N'}; give one such as {newest or 'runs/judge/checkpoint-500'} "
        "(--save_strategy steps writes them), or leave it out",
    )
    adapter = Path(str(path), "adapter_config.json").is_file()
    require(
        adapter == lora,
        f"{path} holds {'an adapter' if adapter else 'all weights'}, and lora_r={'above 0' if lora else '0'} trains "
        f"{'an adapter' if lora else 'all weights'}; resume with the settings of its run",
    )
    return path


def refuse_unread(args: TrainingArguments) -> None:
    """Raise ConfigError for flags of TrainingArguments that this script would not obey."""
    smoothing = args.label_smoothing_factor
    require(
        smoothing == 0, f"label_smoothing_factor={smoothing} is of other losses; ties='half' knows uncertain pairs"
    )
    require(
        not args.push_to_hub,
        "push_to_hub pushes nothing here, as the card is written last; when it is done, `hf upload REPOSITORY FOLDER`",
    )


def run(trainer: Trainer, checkpoint: str | None) -> dict[str, Any]:
    """Train, from a checkpoint on where one is given; of a run that was at its end only the weights are read."""
    start, begun = time.perf_counter(), 0
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        begun = state.global_step
        if begun >= state.max_steps > 0 and trainer.args.max_steps in (-1, state.max_steps):
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return {"steps": begun, "train_loss": None, "minutes": 0.0, "resumed_at": begun}
    result = trainer.train(resume_from_checkpoint=checkpoint)
    minutes = (time.perf_counter() - start) / 60
    facts = {"steps": trainer.state.global_step, "train_loss": result.training_loss, "minutes": minutes}
    return facts | ({} if checkpoint is None else {"resumed_at": begun})  # loss and minutes are those from there on


def train(script: Script, args: TrainingArguments, command: str = "", about: str = "") -> dict[str, Any]:
    """Train, save the folder, measure it the way hfpg will use it, and write its card. Returns what was measured.

    Args:
        command: how it was made, for the card.
        about: Markdown for the card: where the data come from, and whom to cite.
    """
    set_seed(args.seed)
    args.remove_unused_columns = False  # the collator reads all columns
    args.dataloader_pin_memory = torch.cuda.is_available()
    refuse_unread(args)
    checkpoint = checkpoint_of(args, script.lora_r > 0)
    train_pairs, held_pairs, left_out = deal_out(script, args.seed)
    model, tokenizer = load_backbone(script)
    dropout = without_dropout(model) if script.disable_dropout else {}
    if script.lora_r:
        model = with_lora(model, script)
    trainer = RewardTrainer(
        model,
        args,
        Collator(tokenizer, special=not train_pairs.templated),
        table(train_pairs, tokenizer),
        table(held_pairs, tokenizer),
        compute_metrics=held_out_accuracy,
        centering=script.centering,
    )
    ran = run(trainer, checkpoint)
    facts: dict[str, Any] = {
        "train_pairs": len(train_pairs),
        "held_out_pairs": len(held_pairs),
        "left_out": left_out,
        "longer_chosen_in_training": _longer_chosen(train_pairs),
        **ran,
    }
    folder = Path(args.output_dir or "runs/reward-model")
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.merge_and_unload() if script.lora_r else model
        facts["parameters"] = model.num_parameters()
        for name, value in dropout.items():
            setattr(model.config.get_text_config(), name, value)
        broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        require(
            not broken,
            f"{len(broken)} weights are not finite after training, such as {broken[:1]}: nothing was saved; use a "
            f"smaller learning_rate than {args.learning_rate}, such as {args.learning_rate / 10:g}",
        )
        for name in (DONE, "eval.json", "README.md"):  # those of an earlier judge in this folder
            (folder / name).unlink(missing_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        facts["held_out"] = evaluate(str(folder), held_pairs)
        (folder / "eval.json").write_text(json.dumps(facts["held_out"], indent=1) + "\n", encoding="utf-8")
        write_card(folder, script, args, facts, command, about)
        (folder / DONE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"\n{show(facts['held_out'])}\n\ntrained in {facts['minutes']:.1f} minutes; use it as --reward {folder}")
    return facts


def _longer_chosen(pairs: Pairs) -> float | None:
    """How often the chosen text is the longer one: what a judge could learn instead of quality."""
    lengths = [(len(plain(c)), len(plain(r))) for c, r in zip(pairs.chosen, pairs.rejected, strict=True)]
    apart = [c > r for c, r in lengths if c != r]
    return sum(apart) / len(apart) if apart else None


def public_command(argv: Sequence[str], script: str = "train.py") -> str:
    """The command line for the card, without the folders of absolute paths and without access tokens."""
    words = [SECRET.sub("hf_***", re.sub(r"(^|=)/.*/(?=.)", r"\1", word)) for word in argv]
    return shlex.join(["python", f"reward_models/{script}", *words])


def parse_flags(argv: Sequence[str]) -> tuple[Script, TrainingArguments]:
    """What is trained and how, from command-line words."""
    script, args = parse((Script, TrainingArguments), argv, description=__doc__, defaults=defaults)
    return script, args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line and train."""
    words = list(sys.argv[1:] if argv is None else argv)
    return train(*parse_flags(words), public_command(words))


if __name__ == "__main__":
    with one_sentence():
        main()
