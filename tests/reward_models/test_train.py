"""train.py: padding changes nothing, adapters and accumulation do what they must, and the folder is a plain judge."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import normalize
import pytest
import torch
import train
from pairs import judged_text, read_pairs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
)

from hfpg.config import ConfigError
from hfpg.rewards import ClassifierReward
from tests import tiny
from tests.reward_models.world import World, backbone, write


LONG = " ".join(tiny.WORDS[20:40])
TEMPLATE = "{% for m in messages %}{{ m['role'][0:2] }} {{ m['content'] }} <eos>{% endfor %}"


def script(model: str, **changes: Any) -> train.Script:
    return train.Script(**({"model": model, "dataset": "pairs.jsonl"} | changes))


def run(folder: Path, base: str, rows: list[dict[str, Any]], *flags: str) -> dict[str, Any]:
    """Train by the command line into folder / "judge"."""
    data = write(folder / "pairs.jsonl", rows)
    words = f"--model {base} --dataset {data} --output_dir {folder / 'judge'} --use_cpu True --disable_tqdm True"
    return train.main([*words.split(), "--learning_rate", "3e-3", *flags])


@pytest.fixture
def rows():
    """Sixty pairs, each with a prompt of its own."""
    return [row | {"prompt": f"{tiny.WORDS[i + 2]} "} for i, row in enumerate(World.make(0).pairs(60, 1))]


@pytest.fixture
def base(tmp_path):
    return backbone(tmp_path / "lm")


@pytest.fixture
def trainer(base, tmp_path):
    """A RewardTrainer on a fresh backbone; `make(batch, accumulation, centering)`."""

    def make(batch: int = 8, accumulation: int = 1, **changes: Any) -> train.RewardTrainer:
        torch.manual_seed(0)
        model, tokenizer = train.load_backbone(script(base))
        train.without_dropout(model)
        args = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        columns = {k: [r[k] for r in World.make(0).pairs(8, 1)] for k in ("prompt", "chosen", "rejected")}
        table = train.table(read_pairs(columns), tokenizer)
        return train.RewardTrainer(model, args, train.Collator(tokenizer, True), table, **changes)

    return make


# --- the score is read at the last real token ---


@torch.no_grad()
def by_position(model: Any, tokenizer: Any, text: str) -> float:
    """The score at the last token of a text that stands alone: no padding, no search by id."""
    ids = torch.tensor([tokenizer(text).input_ids])
    hidden = model.transformer(ids).last_hidden_state
    return model.score(hidden[:, -1])[0, 0].item()


@pytest.mark.parametrize("pad", [None, 0, 1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_padding_id_change_no_score_even_where_padding_was_eos(tmp_path, pad, side):
    folder = backbone(tmp_path / "lm", pad_token_id=pad)
    name = None if pad is None else tiny.WORDS[pad]
    tiny.tokenizer(pad_token=name, padding_side=side, model_max_length=24).save_pretrained(folder)
    torch.manual_seed(0)
    model, tokenizer = train.load_backbone(script(folder))
    texts = [f"{tiny.WORDS[9]} <eos>", f"{LONG} <eos> <eos>", tiny.WORDS[9], "<eos>"]
    expected = [by_position(model, tokenizer, t) for t in texts]
    rows = train.Collator(tokenizer, True)([dict(chosen=t, rejected=t, margin=0.0, tie=False) for t in texts])
    found = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[: len(texts), 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ClassifierReward(model, tokenizer)([""] * 4, texts), expected, rtol=1e-5, atol=1e-5)
    assert expected[0] != pytest.approx(expected[2], abs=1e-4)  # the end of the text is read


def test_padding_that_only_pads_is_kept(tmp_path):
    folder = backbone(tmp_path / "lm", pad_token_id=7)
    tiny.tokenizer(pad_token=tiny.WORDS[7]).save_pretrained(folder)
    model, tokenizer = train.load_backbone(script(folder))
    assert tokenizer.pad_token_id == model.config.pad_token_id == 7
    assert model.get_input_embeddings().num_embeddings == tiny.VOCABULARY


def test_a_backbone_whose_score_depends_on_its_padding_is_refused(base, monkeypatch):
    model, tokenizer = train.load_backbone(script(base))
    forward = model.forward
    shifted = lambda **given: SimpleNamespace(logits=forward(**given).logits + given["input_ids"].shape[1])  # noqa: E731
    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(ConfigError, match="alone and .* with padding behind it.*use another backbone"):
        train.check_padding(model, tokenizer)


def test_truncation_keeps_the_end(base):
    _, tokenizer = train.load_backbone(script(base, max_length=4))
    row = dict(chosen=LONG, rejected=LONG, margin=0.0, tie=False)
    ids = train.Collator(tokenizer, True)([row])["input_ids"][0]
    assert tokenizer.decode(ids).split() == LONG.split()[-4:]


def test_a_backbone_whose_positions_begin_later_takes_fewer_tokens(tmp_path):
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1)
    config = RobertaConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=26, **size)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "lm")
    tiny.tokenizer(pad_token=tiny.WORDS[1], model_max_length=512).save_pretrained(tmp_path / "lm")
    model, tokenizer = train.load_backbone(script(str(tmp_path / "lm")))
    assert tokenizer.model_max_length == 24  # positions 2 to 25
    text = " ".join(tiny.WORDS[20:60])
    rows = train.Collator(tokenizer, True)([dict(chosen=text, rejected=text, margin=0.0, tie=False)])
    assert rows["input_ids"].shape[1] == 24
    assert model(rows["input_ids"], rows["attention_mask"]).logits.isfinite().all()


# --- head, dropout, loss ---


def test_a_new_head_has_variance_one_over_d_plus_one_and_bias_zero():
    head = torch.nn.Linear(255, 1)
    torch.manual_seed(0)
    train.init_head(head)
    assert head.bias.item() == 0
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(256), rel=0.15)


def test_a_trained_head_stays_and_one_with_other_labels_is_replaced(base, tmp_path):
    model, tokenizer = train.load_backbone(script(base))
    torch.nn.init.constant_(model.score.weight, 0.25)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    again, _ = train.load_backbone(script(str(tmp_path / "judge")))
    assert (again.score.weight == 0.25).all()
    three = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    replaced, _ = train.load_backbone(script(str(tmp_path / "three")))
    assert replaced.score.weight.shape[0] == 1


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_no_dropout_of_either_kind_is_left(kind):
    size = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    if kind == "bert":
        drop = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        model: Any = BertForSequenceClassification(BertConfig(**size, **drop, num_labels=1))
    else:
        config = LlamaConfig(**size, attention_dropout=0.5, num_labels=1, pad_token_id=0)
        model = LlamaForSequenceClassification(config)
    ids = torch.arange(1, 9)[None]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    train.without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_batch_loss_is_the_mean_over_pairs_with_margins_ties_and_centering(trainer):
    made = trainer(centering=0.5)
    rows = [{**made.train_dataset[i], "margin": 0.1 * i, "tie": i == 3} for i in range(8)]
    batch = made.data_collator(rows)
    assert batch["margin"].tolist() == pytest.approx([0, 0.1, 0.2, 0, 0.4, 0.5, 0.6, 0.7])  # none in a tie
    loss = made.compute_loss(made.model, batch).item()
    judge = ClassifierReward(made.model, made.data_collator.tokenizer)
    chosen, rejected = (judge([""] * 8, [r[side] for r in rows]) for side in ("chosen", "rejected"))
    expected = 0.0
    for i, (c, r) in enumerate(zip(chosen, rejected, strict=True)):
        d = c - r - (0 if i == 3 else 0.1 * i)
        expected += (math.log1p(math.exp(-d)) + (math.log1p(math.exp(d)) if i == 3 else math.log1p(math.exp(-d)))) / 2
        expected += 0.5 * (c + r) ** 2
    assert loss == pytest.approx(expected / 8, rel=1e-5)


def test_accumulation_changes_no_step(trainer):
    def step(*how: int) -> torch.Tensor:
        made = trainer(*how)
        before = torch.cat([p.detach().flatten().clone() for p in made.model.parameters()])
        made.train()
        return torch.cat([p.detach().flatten() for p in made.model.parameters()]) - before

    whole = step(8, 1)
    assert whole.norm() > 0.1
    torch.testing.assert_close(step(2, 4), whole, rtol=1e-4, atol=1e-6)


# --- the folder ---


def test_the_folder_is_a_judge_by_name_with_card_and_measurements(base, tmp_path, rows):
    rows += [{"prompt": "", "chosen": tiny.WORDS[5], "rejected": tiny.WORDS[5]}]
    facts = run(tmp_path, base, rows, "--num_train_epochs", "2", "--license", "mit")
    folder = tmp_path / "judge"
    judge = ClassifierReward(str(folder))
    (score,) = judge(["aa "], ["ba ca"])
    assert math.isfinite(score)
    assert not list(folder.glob("*.bin"))  # no pickle
    assert judge.model.config.id2label == {0: "reward"}
    low, high = facts["held_out"]["accuracy_95"]
    assert 0 <= low <= facts["held_out"]["accuracy"] <= high <= 1
    assert json.loads((folder / "eval.json").read_text())["pairs"] == facts["held_out"]["pairs"] == 12
    card = (folder / "README.md").read_text(encoding="utf-8")
    needed = ["license: mit", "pairs.jsonl", "| 48; ", "1 ties dropped", "95 %", "length correlation", "| lm |"]
    assert [words for words in needed if words not in card] == []
    assert "python reward_models/train.py --model lm --dataset pairs.jsonl" in card
    assert str(tmp_path) not in card


def test_ties_are_learnt_when_asked_to(base, tmp_path, rows):
    rows = [row | {"tie": i % 2 == 0} for i, row in enumerate(rows)]
    dropped = run(tmp_path, base, rows)
    kept = run(tmp_path, base, rows, "--ties", "half")
    assert (dropped["train_pairs"], kept["train_pairs"]) == (24, 54)
    assert dropped["held_out_pairs"] == kept["held_out_pairs"] == 6, "ties are not held out: they measure nothing"
    card = (tmp_path / "judge" / "README.md").read_text(encoding="utf-8")
    assert "0 ties dropped, 30 learnt as probability .5" in card


def test_lora_trains_and_its_merged_folder_loads_without_an_adapter(base, tmp_path, rows):
    run(tmp_path, base, rows, "--lora_r", "4", "--max_steps", "3")
    folder = tmp_path / "judge"
    assert not (folder / "adapter_config.json").exists()
    tuned = AutoModelForSequenceClassification.from_pretrained(folder)
    before = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    assert not torch.equal(tuned.transformer.h[0].mlp.c_fc.weight, before.transformer.h[0].mlp.c_fc.weight)
    frozen = tuned.transformer.wte.weight[: tiny.VOCABULARY]
    assert torch.equal(frozen, before.transformer.wte.weight)
    assert "LoRA r = 4" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_adapter_that_fits_nothing_is_refused(base, tmp_path, rows):
    with pytest.raises(
        ConfigError,
        match=r"the adapter fits no module \['q_proj'\]; there are \['c_attn', 'c_fc', 'c_proj', 'score'\]",
    ):
        run(tmp_path, base, rows, "--lora_r", "4", "--lora_target_modules", "q_proj")


def test_conversations_go_through_the_chat_template_as_they_do_in_training(base, tmp_path, rows):
    talks = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    with pytest.raises(ConfigError, match="the pairs are conversations.*--chat_template"):
        run(tmp_path, base, talks)
    run(tmp_path, base, talks, "--max_steps", "2", "--chat_template", str(tmp_path / "template.jinja"))
    judge = ClassifierReward(str(tmp_path / "judge"))  # has the template
    prompt, answer = talks[0]["prompt"], talks[0]["chosen"]
    assert judge.text(prompt, answer) == judged_text(judge.tokenizer, prompt, answer)
    assert judge.text("one ", "two") == judged_text(judge.tokenizer, "one ", "two")
    assert math.isfinite(judge([prompt], [answer])[0])


def test_a_judge_that_is_trained_on_forgets_its_scale(base, tmp_path, rows):
    run(tmp_path, base, rows, "--max_steps", "1")
    normalize.store(tmp_path / "judge", 3.0, 2.0)
    os.replace(tmp_path / "judge", tmp_path / "first")
    run(tmp_path, str(tmp_path / "first"), rows, "--max_steps", "1")
    assert ClassifierReward(str(tmp_path / "judge")).std == 1
    assert "reward_std" not in (tmp_path / "judge" / "config.json").read_text()


def test_data_and_citation_stand_on_the_card_where_they_are_told(base, tmp_path, rows):
    run(tmp_path, base, rows, "--max_steps", "1")
    assert "## Data" not in (tmp_path / "judge" / "README.md").read_text(encoding="utf-8")


# --- going on from a checkpoint ---


@pytest.mark.parametrize("flags", ["", "--lora_r 4"])
def test_a_resumed_run_ends_where_the_unbroken_one_does(base, tmp_path, rows, flags, monkeypatch):
    steps: list[int] = []
    step = train.RewardTrainer.training_step
    monkeypatch.setattr(train.RewardTrainer, "training_step", lambda *a, **k: steps.append(1) or step(*a, **k))
    every = f"--max_steps 4 --per_device_train_batch_size 8 --save_strategy steps --save_steps 2 {flags}".split()
    run(tmp_path, base, rows, *every)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").state_dict()
    first = tmp_path / "judge" / "checkpoint-2"
    facts = run(tmp_path, base, rows, *every, "--resume_from_checkpoint", str(first))
    assert facts["steps"] == 4 and len(steps) == 4 + 2
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").state_dict()
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_true_resumes_the_newest_checkpoint(base, tmp_path, rows):
    run(tmp_path, base, rows, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    args = TrainingArguments(str(tmp_path / "judge"), resume_from_checkpoint="True")
    assert train.checkpoint_of(args, lora=False) == str(tmp_path / "judge" / "checkpoint-2")
    args.resume_from_checkpoint = "False"
    assert train.checkpoint_of(args, lora=False) is None


@pytest.mark.parametrize("given", ["True", "nowhere"])
def test_a_path_that_is_no_checkpoint_is_refused(base, tmp_path, rows, given):
    with pytest.raises(
        ConfigError, match=f"resume_from_checkpoint='{given}' is no checkpoint .*no trainer_state.json"
    ):
        run(tmp_path, base, rows, "--resume_from_checkpoint", given)


def test_the_loss_of_a_resumed_run_is_that_of_its_own_steps(base, tmp_path, rows):
    every = "--max_steps 4 --save_strategy steps --save_steps 2 --logging_steps 1".split()
    run(tmp_path, base, rows, *every)
    second = tmp_path / "judge" / "checkpoint-2"
    facts = run(tmp_path, base, rows, *every, "--resume_from_checkpoint", str(second))
    logged = json.loads((tmp_path / "judge" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert facts["train_loss"] == pytest.approx(sum(row["loss"] for row in logged[2:4]) / 2, rel=1e-3)
    assert facts["resumed_at"] == 2


def test_a_run_that_was_at_its_end_is_only_saved(base, tmp_path, rows):
    every = "--max_steps 2 --save_strategy steps --save_steps 2 --lr_scheduler_type constant".split()
    run(tmp_path, base, rows, *every)
    folder = tmp_path / "judge"
    whole = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    for name in ("training.json", "model.safetensors"):
        (folder / name).unlink()
    facts = run(tmp_path, base, rows, *every, "--resume_from_checkpoint", "True")
    again = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert facts["steps"] == 2 and (folder / "training.json").is_file()


def test_an_adapter_does_not_go_on_from_a_whole_model(base, tmp_path, rows):
    every = "--max_steps 2 --save_strategy steps --save_steps 1".split()
    run(tmp_path, base, rows, *every)
    with pytest.raises(ConfigError, match="holds all weights, and lora_r=above 0 trains an adapter"):
        run(tmp_path, base, rows, *every, "--lora_r", "2", "--resume_from_checkpoint", "True")


def test_a_training_that_diverges_leaves_the_judge_that_was_there(base, tmp_path, rows):
    run(tmp_path, base, rows, "--max_steps", "2")
    folder = tmp_path / "judge"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=r"weights are not finite after training.*nothing was saved"):
        run(tmp_path, base, rows, "--max_steps", "4", "--learning_rate", "1e30", "--max_grad_norm", "0")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_a_judge_whose_saving_is_cut_short_does_not_count_as_made(base, tmp_path, rows, monkeypatch):
    run(tmp_path, base, rows, "--max_steps", "2")
    monkeypatch.setattr(train, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, base, rows, "--max_steps", "3")
    left = {p.name for p in (tmp_path / "judge").iterdir()}
    assert not left & {"training.json", "eval.json", "README.md"} and "model.safetensors" in left


def test_held_out_pairs_of_ones_own_are_compared_with_the_training_pairs(base, tmp_path, rows):
    own = write(tmp_path / "held.jsonl", [*rows[:3], {"prompt": "p ", "chosen": "only here", "rejected": "nor there"}])
    run(tmp_path, base, rows, "--max_steps", "2", "--eval_dataset", own)
    card = (tmp_path / "judge" / "README.md").read_text(encoding="utf-8")
    assert "| 60; 3 of the held-out ones share a text with them; 0 ties dropped |" in card


def test_dropout_that_a_model_reads_from_its_configuration_is_off_and_comes_back():
    config = FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, hidden_dropout=0.5, num_labels=1
    )
    model = FalconForSequenceClassification(config).train()
    model.config.pad_token_id = 0
    had = train.without_dropout(model)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert had["hidden_dropout"] == 0.5


# --- bad settings ---


def test_a_backbone_that_is_none_is_refused_in_a_sentence(tmp_path, rows):
    with pytest.raises(ConfigError, match="cannot load the backbone"):
        run(tmp_path, str(tmp_path / "nowhere"), rows)
    tiny.model("lstm").save_pretrained(tmp_path / "lstm")
    tiny.tokenizer().save_pretrained(tmp_path / "lstm")
    with pytest.raises(ConfigError, match="cannot load the backbone.*LSTM"):
        run(tmp_path, str(tmp_path / "lstm"), rows)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "name the backbone with --model"),
        ("--model m", "name the pairs with --dataset"),
        ("--model m --dataset d --lora_r -1", "lora_r=-1 must be 0"),
        ("--model m --dataset d --centering -1", "centering=-1.0 must not be negative"),
        ("--model m --dataset d --held_out 0", "held_out=0 must be at least 1"),
        ("--model m --dataset d --max_length 1", "max_length=1 must be at least 2"),
        ("--model m --dataset d --learnin_rate 1", "did you mean '--learning_rate'"),
        ("--model m --dataset gone.jsonl", "there is no file 'gone.jsonl'"),
        ("--model m --dataset d --label_smoothing_factor 0.1", "label_smoothing_factor=0.1 is of other losses"),
        ("--model m --dataset d --push_to_hub True", "push_to_hub pushes nothing here"),
        ("--model m --dataset d --trust_remote_code True", "unknown flag '--trust_remote_code'"),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(ConfigError, match=words):
        train.main(flags.split())


def test_the_command_on_the_card_has_no_folders_and_no_token():
    told = train.public_command(["--model", "/home/me/lm", "--dataset=/data/p.jsonl", "--x", "hf_" + "a" * 30])
    assert told == "python reward_models/train.py --model lm --dataset=p.jsonl --x 'hf_***'"


def test_the_saved_tokenizer_pads_on_the_right_and_cuts_the_beginning(base, tmp_path, rows):
    run(tmp_path, base, rows, "--max_steps", "1", "--max_length", "8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge")
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length) == ("right", "left", 8)
