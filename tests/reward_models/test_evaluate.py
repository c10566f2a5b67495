"""evaluate.py: its numbers against worked examples and limits."""

import json
import math
import random

import pytest
from evaluate import correlation, main, measure, reliability

from hfpg.config import ConfigError
from tests.reward_models.world import write


def test_a_judge_whose_logits_are_the_truth_has_no_calibration_error_and_twice_them_has():
    draw = random.Random(0)
    logits = [draw.gauss(0, 1.5) for _ in range(20_000)]
    differences = [d if draw.random() < 1 / (1 + math.exp(-d)) else -d for d in logits]

    def error(scale: float) -> float:
        zeros = [0.0] * len(differences)
        return measure([scale * d for d in differences], zeros, [1] * len(zeros), [1] * len(zeros))["ece"]

    assert error(1) < 0.01
    assert error(2) > 0.08


def test_a_reliability_row_says_confidence_and_accuracy():
    d = math.log(0.82 / 0.18)
    (row,) = reliability([d, d, d, -d], bins=10)
    assert (row["pairs"], row["accuracy"]) == (4, 0.75)
    assert row["confidence"] == pytest.approx(0.82)
    assert (row["from"], row["to"]) == pytest.approx((0.8, 0.85))
    assert sum(r["pairs"] for r in reliability([0.0, 1e9, -1e9, 0.3])) == 4


def test_accuracy_counts_equal_scores_half():
    facts = measure([2, 1, 1, 0], [1, 1, 2, 0], [3, 3, 3, 3], [3, 3, 3, 3])
    assert (facts["accuracy"], facts["equal_scores"]) == (0.5, 2)
    assert facts["length_r"] is None
    assert facts["longer_chosen"] is None


def test_length_that_is_the_score_is_seen():
    facts = measure([5, 9, 2], [1, 3, 4], [5, 9, 2], [1, 3, 4])
    assert facts["length_r"] == pytest.approx(1)
    assert facts["longer_scored"] == 1
    assert facts["longer_chosen"] == pytest.approx(2 / 3)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "def longer(prompts, completions, **columns):\n"
        "    return [float(len(p + c)) for p, c in zip(prompts, completions)]\n"
        "def shy(completions, **columns):\n    return [None if c == 'b' else 1.0 for c in completions]\n"
        "def mute(completions, **columns):\n    return [None for c in completions]\n"
        "def lost(completions, **columns):\n    return [float('nan') if c == 'b' else 1.0 for c in completions]\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "def wordy(completions, **columns):\n    return ['good' for c in completions]\n"
        "def fails(completions, **columns):\n    raise ValueError('no model')\n"
        "def scalar(completions):\n    return 1.0\n"
        "def answers(completions, answer):\n    return [1.0 for c in completions]\n"
        "def told(completions, trainer_state, log_metric, log_extra):\n"
        "    log_metric('n', trainer_state.global_step)\n"
        "    log_extra('x', completions)\n    return [float(len(c)) for c in completions]\n"
        "async def slow(completions, **columns):\n    return [1.0 for c in completions]\n"
    )
    rows = [{"prompt": "p", "chosen": "aaa", "rejected": "b"}, {"prompt": "p", "chosen": "c", "rejected": "dd"}]
    return path, write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "p", "chosen": "e", "rejected": "e"}])


def test_the_command_line_prints_a_table_and_writes_the_numbers(judge, tmp_path, capsys):
    path, data = judge
    facts = main(["--judge", f"{path}:longer", "--dataset", data, "--output", str(tmp_path / "out" / "eval.json")])
    assert (facts["accuracy"], facts["pairs"], facts["ties_dropped"]) == (0.5, 2, 1)
    assert facts["length_r"] == pytest.approx(1)
    assert "pair accuracy         0.500   95 %: 0.095 … 0.905" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["nll"] == pytest.approx(facts["nll"])


def test_pairs_that_the_judge_abstains_from_are_counted(judge, tmp_path):
    path, data = judge
    facts = main(["--judge", f"{path}:shy", "--dataset", data, "--output", str(tmp_path / "eval.json")])
    assert (facts["pairs"], facts["abstained"]) == (1, 1)
    with pytest.raises(ConfigError, match="abstained from all 2 pairs"):
        main(["--judge", f"{path}:mute", "--dataset", data])
    with pytest.raises(ConfigError, match="is async"):
        main(["--judge", f"{path}:slow", "--dataset", data])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lost", "reward function 'lost' returned nan for sample 0"),
        ("wordy", "reward function 'wordy' returned .*good"),
        ("short", "reward function 'short' returned 1 scores for 2 completions"),
        ("fails", "reward function 'fails' raised ValueError: no model"),
        ("scalar", "reward function 'scalar' returned"),
        ("answers", "reward function 'answers' .*answer"),
    ],
)
def test_a_failed_score_is_never_a_number(judge, name, sentence):
    path, data = judge
    with pytest.raises(ConfigError, match=sentence):
        main(["--judge", f"{path}:{name}", "--dataset", data])


def test_a_judge_gets_what_it_gets_in_training(judge, tmp_path):
    path, data = judge
    facts = main(["--judge", f"{path}:told", "--dataset", data, "--output", str(tmp_path / "eval.json")])
    assert facts["accuracy"] == 0.5


def test_margins_are_not_read(judge, tmp_path):
    path, _ = judge
    rows = [{"prompt": "p", "chosen": "aaa", "rejected": "b", "margin": -1.0}]
    data = write(tmp_path / "margins.jsonl", rows)
    assert main(["--judge", f"{path}:longer", "--dataset", data, "--output", str(tmp_path / "e.json")])["pairs"] == 1


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="name the judge with --judge"):
        main([])
    with pytest.raises(ConfigError, match="name the pairs with --dataset"):
        main(["--judge", "x"])
