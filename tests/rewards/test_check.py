"""`hfpg reward check`: what is found, what is warned of, and the command itself."""

import pytest
import torch

from hfpg import cli
from hfpg.rewards import Judge
from hfpg.rewards.check import examine, look, repetition
from tests import build


PROMPTS = ["p one", "p one", "p two", "p two"]
TEXTS = ["good film", "good good good good film here", "dull film", "the end of it"]
IDS = [[1, 2], [1, 1, 1, 1, 2, 3], [4, 2], [5, 6, 7, 8]]
GROUPS = torch.tensor([0, 0, 1, 1])


def found(function):
    return examine(Judge(function), PROMPTS, TEXTS, IDS, {}, GROUPS)


def test_repetition_is_the_share_of_word_pairs_seen_before():
    assert repetition("a b a b a b") == pytest.approx(1 - 2 / 5) and repetition("a b c") == 0 and repetition("") == 0
    assert repetition([{"role": "assistant", "content": "x x x"}]) == 0.5


def test_a_length_reward_is_called_one():
    seen = found(lambda completions, completion_ids: [float(len(ids)) for ids in completion_ids])
    assert seen.with_length == pytest.approx(1) and any("goes with length" in text for text in seen.warnings())
    assert seen.deterministic and seen.per_second > 0 and (seen.lowest, seen.highest) == (2, 6)


def test_a_constant_and_ties_within_prompts():
    assert any("every completion scores 0.5" in text for text in found(lambda completions: [0.5] * 4).warnings())
    seen = found(lambda prompts: [float(p == "p two") for p in prompts])
    assert seen.tied_groups == 1 and any("in 100% of the prompts" in text for text in seen.warnings())
    assert look(torch.zeros(3), torch.zeros(3), torch.ones(3), ["a"] * 3).warnings() == [
        "no completion was scored: nothing can be learnt"
    ]


def test_noise_is_noticed():
    draws = iter(range(1000))
    seen = found(lambda completions: [float(next(draws) % 7) for _ in completions])
    assert seen.deterministic is False and any("differently the second time" in text for text in seen.warnings())


def test_tricks_that_pay_are_named():
    seen = found(lambda completions: [float(c.count("good") > 3 or not c) for c in completions])
    said = " ".join(seen.warnings())
    assert seen.tricks["an empty text"] == 1 and "an empty text earns +1.00" in said
    assert "repeated earns +1.00" in said


def test_a_trick_that_breaks_the_judge_is_reported_not_raised():
    seen = found(lambda completions: [1.0 / len(c) for c in completions])
    assert seen.tricks["an empty text"] is None and seen.tricks["the prompt again"] is not None


def test_the_command(tmp_path, capsys):
    file = tmp_path / "judge.py"
    file.write_text("def length(completion_ids):\n    return [float(len(ids)) for ids in completion_ids]\n")
    cli.main(["reward", "check", f"{file}:length", "--prompts", "4", "--max_completion_length", "8"])
    out = capsys.readouterr().out
    assert "length on 16 completions" in out and "correlation with length" in out and "an empty text" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["reward"], "use `hfpg reward check FILE.py:name"), (["reward", "check"], "name a judge")],
)
def test_what_is_missing_is_said(words, sentence, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert sentence in capsys.readouterr().err


def test_a_run_says_what_its_first_scores_tell(tmp_path, capsys):
    build.trainer(
        tmp_path, reward=lambda completion_ids: [float(len(i)) for i in completion_ids], disable_tqdm=True
    ).train()
    assert capsys.readouterr().out.count("note on the reward: the score goes with length") == 1
