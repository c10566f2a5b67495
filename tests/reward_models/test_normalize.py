"""normalize.py: what is folded into a judge is exactly (score − mean) / std."""

import json

import normalize
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hfpg import embedded
from hfpg.config import ConfigError
from hfpg.rewards import ClassifierReward
from tests import tiny


TEXTS = [" ".join(tiny.WORDS[3 + i : 5 + 3 * i]) for i in range(6)]


def classifier(folder, kind):
    """A classifier with random weights: a head with a bias (BERT), after a LayerNorm (GPT-2), after an RMSNorm."""
    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**size, num_labels=1, pad_token_id=0))
    elif kind == "gpt2":
        config = GPT2Config(
            vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1, pad_token_id=0
        )
        model = GPT2ForSequenceClassification(config)
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**size, num_labels=1, pad_token_id=0))
    torch.nn.init.normal_(normalize.output_layer(model)[1].weight)
    model.save_pretrained(folder)
    tiny.tokenizer(pad_token="<eos>", model_max_length=64).save_pretrained(folder)
    return str(folder)


def scores(folder):
    return torch.tensor(ClassifierReward(str(folder))([""] * len(TEXTS), TEXTS))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_folded_judge_scores_as_the_flags_would(tmp_path, kind):
    folder = classifier(tmp_path / kind, kind)
    before = scores(folder)
    normalize.apply(folder, tmp_path / "folded", 3.25, 0.4, TEXTS)
    torch.testing.assert_close(scores(tmp_path / "folded"), (before - 3.25) / 0.4, rtol=1e-5, atol=1e-5)


def test_a_mean_that_has_no_place_in_the_weights_is_refused_and_nothing_is_written(tmp_path):
    folder = classifier(tmp_path / "llama", "llama")
    with pytest.raises(ConfigError, match="head of LlamaForSequenceClassification has no bias.*--store True"):
        normalize.apply(folder, tmp_path / "folded", 3.25, 0.4, TEXTS)
    assert not (tmp_path / "folded").exists()


def test_moments_are_those_of_the_population():
    assert normalize.moments([1.0, 3.0]) == (2.0, 1.0)
    with pytest.raises(ConfigError, match="all 3 scores are 2: a judge that cannot tell"):
        normalize.moments([2.0, 2.0, 2.0])


@pytest.fixture
def judge(tmp_path):
    """The embedded judge A, in a folder of its own."""
    folder = tmp_path / "judge"
    model = ClassifierReward(embedded.JUDGE_A)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


FEW = ["--samples", "32", "--max_completion_length", "8"]


def said(folder, **how):
    """The judge's scores of a few texts."""
    return torch.tensor(
        ClassifierReward(str(folder), **how)(["A fine", "A bad", "What a"], [" film.", " film.", " mess."])
    )


def test_flags_are_printed_and_the_judge_is_as_before(judge, capsys):
    before, config = said(judge), (judge / "config.json").read_text()
    found = normalize.main(["--judge", str(judge), *FEW])
    told = capsys.readouterr().out
    assert f"--reward_normalization fixed --reward_mean {found['mean']:.6g} --reward_std {found['std']:.6g}" in told
    assert torch.equal(said(judge), before) and (judge / "config.json").read_text() == config


def test_what_is_stored_is_what_hfpg_applies(judge, capsys):
    before = said(judge)
    (judge / "README.md").write_text("# My judge\n")
    found = normalize.main(["--judge", str(judge), "--store", "True", *FEW])
    assert "--reward_mean" not in capsys.readouterr().out, "flags and config would normalise twice"
    config = json.loads((judge / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == (found["mean"], found["std"])
    torch.testing.assert_close(said(judge), (before - found["mean"]) / found["std"])
    assert torch.equal(said(judge, normalize=False), before)
    card = (judge / "README.md").read_text(encoding="utf-8")
    assert card.startswith(
        "# My judge\n\nNormalised to mean 0 and std 1 on 32 completions of tiny-gpt2-reviews: score"
    )
    seen = normalize.main(["--judge", str(judge), *FEW])  # as a run sees it now
    assert (seen["mean"], seen["std"]) == pytest.approx((0, 1), abs=1e-5)


def test_storing_again_measures_the_judge_itself(judge):
    first = normalize.main(["--judge", str(judge), "--store", "True", *FEW])
    assert normalize.main(["--judge", str(judge), "--store", "True", *FEW]) == first
    assert (judge / "README.md").read_text(encoding="utf-8").count("Normalised") == 1


def test_a_stored_scale_is_folded_in_once(judge, tmp_path):
    before = said(judge)
    normalize.store(judge, 5.0, 7.0)  # of another policy
    found = normalize.main(["--judge", str(judge), "--apply", "True", "--output_dir", str(tmp_path / "own"), *FEW])
    torch.testing.assert_close(said(tmp_path / "own"), (before - found["mean"]) / found["std"], rtol=1e-4, atol=1e-5)
    assert "reward_mean" not in json.loads((tmp_path / "own" / "config.json").read_text())
    assert ClassifierReward(str(tmp_path / "own")).name == "own"


def test_after_apply_the_same_policy_has_mean_0_and_std_1(judge, capsys):
    (judge / "README.md").write_text("# My judge\n")
    normalize.main(["--judge", str(judge), "--apply", "True", *FEW])
    again = normalize.main(["--judge", str(judge), *FEW])
    assert again["mean"] == pytest.approx(0, abs=1e-5)
    assert again["std"] == pytest.approx(1, abs=1e-5)
    card = (judge / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# My judge\n\nNormalised to mean 0 and std 1 on 32 completions of tiny-gpt2-reviews")


def test_samples_are_those_of_the_policy_and_the_same_every_time():
    script = normalize.Script(judge="x:y", samples=6, max_completion_length=5)
    prompts, completions = normalize.sample(script)
    assert set(prompts) <= set(embedded.prompts("train"))
    assert len(completions) == 6
    assert normalize.sample(script) == (prompts, completions)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "name the judge with --judge"),
        (["--judge", "user/judge", "--store", "True"], "'user/judge' is no folder to store in"),
        (["--judge", ".", "--store", "True", "--apply", "True"], "that would be twice; use one"),
        (["--judge", "f.py:f", "--apply", "True", "--output_dir", "x"], "'f.py:f' is a function, which keeps no mean"),
        (["--judge", "x", "--samples", "1"], "samples=1 must be at least 2"),
        (["--judge", "x", "--temperature", "0"], "temperature=0.0 must be above 0"),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(ConfigError, match=words):
        normalize.main(flags)
