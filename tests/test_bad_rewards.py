"""Bad judges and bad completions as a person meets them: what is refused and said, what is saved, how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfpg import ConfigError, cli
from hfpg.data import RESERVED_COLUMNS
from hfpg.rewards import RewardError, rules
from tests import build, tiny


ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_loading(monkeypatch):
    """Fail if the policy's weights are touched: these refusals must come before."""
    for module in ("hfpg.trainer", "hfpg.cli"):
        monkeypatch.setattr(f"{module}.load_policy", lambda *a, **k: pytest.fail("the model was loaded"))


def prompts_file(folder: Path, count: int = 80, **columns) -> str:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"The film number {i}", **columns} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(words: list[str], capsys) -> str:
    """The one sentence of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    return next(line for line in said.splitlines() if line.startswith("error: "))


# ── before the model loads


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("command", ["train", "reward check"])
@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_a_reserved_column_is_refused_by_the_commands(name, command, tmp_path, capsys):
    judge = tmp_path / "judge.py"
    judge.write_text("def score(completions):\n    return [0.0] * len(completions)\n")
    words = [*command.split(), "--reward", f"{judge}:score", "--dataset", prompts_file(tmp_path, **{name: 1})]
    assert refusal(words, capsys) == (
        f"error: column ['{name}'] is reserved: reward functions get arguments of that name; rename it"
    )


def test_every_argument_of_a_reward_function_is_a_reserved_column():
    from hfpg.rewards.judge import ARGUMENTS

    assert sorted(RESERVED_COLUMNS) == sorted(ARGUMENTS)


def test_a_recipe_refuses_in_one_sentence_too(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "ppo_gpt2.py"), "--dataset"]
    command += [prompts_file(tmp_path, completions="x"), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and "error: column ['completions'] is reserved" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


JUDGES = {
    "needs": ("def needs(completions, answer):\n    return [0.0] * len(completions)\n", "missing a required argument"),
    "scalar": (
        "def scalar(completions):\n    return 0.5\n",
        "returned 0.5; it must return a list of 2 floats, one per",
    ),
    "short": (
        "def short(completions):\n    return [0.5]\n",
        "returned 1 scores for 2 completions; it must return one",
    ),
    "text": ("def text(completions):\n    return ['good'] * 2\n", "returned 'good' for sample 0 ('good'); a score is"),
    "breaks": ("def breaks(completions):\n    return completions[9]\n", "raised IndexError: list index out of range"),
    "imports": ("import no_such_library\n", "fails: ModuleNotFoundError: No module named 'no_such_library'; judge.py"),
    "NUMBER": ("NUMBER = 3\n", "the reward 3 is not callable; give a function, 'file.py:name' or a classifier"),
    "gone": ("def here(completions):\n    return [0.0]\n", "has no 'gone'; it has ['here']"),
}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("command", ["train", "reward check"])
@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_cannot_be_is_refused_by_the_commands(name, command, tmp_path, capsys):
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGES[name][0])
    words = [*command.split(), "--reward", f"{judge}:{name}", "--dataset", prompts_file(tmp_path, label=1)]
    said = refusal(words, capsys)
    assert JUDGES[name][1] in said
    if name == "needs":
        assert "it is called with the keywords ['completion_ids', 'completions', 'label', 'log_extra'," in said
        assert said.endswith("(the data set's columns are ['label'])")
    if name == "breaks":
        assert said.endswith("(in a dry call on 2 rows, before training; judge.py, line 2)")


@pytest.mark.usefixtures("no_loading")
def test_held_out_rows_without_a_column_are_refused_before_the_first_evaluation(tmp_path):
    def judge(completions, number):
        return [float(n) for n in number]

    held_out = [{"prompt": "aa", "other": 1}] * 4
    sentence = r"missing a required argument: 'number'.*\(the eval data set's columns are \['other'\]\)"
    with pytest.raises(ConfigError, match=sentence):
        build.trainer(tmp_path, reward=judge, eval_dataset=held_out)


@pytest.mark.usefixtures("no_loading")
def test_hidden_randomness_is_said_before_the_model_loads(tmp_path, caplog):
    def noisy(completions):
        return torch.rand(len(completions))

    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        build.trainer(tmp_path, reward=[noisy, tiny.count_a])
    assert [record.getMessage() for record in caplog.records if record.name == "hfpg.preflight"] == [
        "reward function 'noisy' scored the same completions differently when it was asked again: a resumed run is "
        "not the unbroken one, and no baseline takes such noise away; give it a seed"
    ]


# ── in a run


def test_a_reward_that_raises_ends_the_program_with_its_traceback_once_and_what_was_trained_saved(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def score(completions, trainer_state):\n    if trainer_state.global_step == 1:\n"
        "        raise ValueError('the server is gone')\n    return [float(len(c)) for c in completions]\n"
    )
    flags = ["--max_steps", "3", "--prompts_per_step", "4", "--max_completion_length", "4", "--eval_prompts", "2"]
    flags += ["--reward", f"{judge}:score", "--output_dir", str(tmp_path / "run"), "--torch_threads", "1"]
    command = [sys.executable, "-m", "hfpg.cli", "train", "--algorithm", "reinforce", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.count("raise ValueError('the server is gone')") == 1
    assert done.stderr.strip().endswith("RewardError: reward function 'score' raised ValueError: the server is gone")
    assert (tmp_path / "run" / "checkpoint-1" / "hfpg_state.json").is_file()
    assert "stopped at step 1; what was trained is saved: resume_from_checkpoint=True goes on from" in done.stdout


def test_what_is_dropped_is_said_with_the_first_failure_once(tmp_path, capsys):
    def judge(completions):
        return [float("nan") if len(completions) > 2 and i == 3 else float(i) for i in range(len(completions))]

    build.trainer(tmp_path, reward=judge, reward_on_error="drop", max_steps=3).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    beginning = (
        "warning: 1 of 8 completions of this step were dropped; the first: reward function 'judge' returned nan for"
    )
    assert said[0].startswith(f"{beginning} sample 3 ('") and said[0].endswith("(watch `dropped`)")


# ── completions that are not nice


HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "[/b] [bold]x",
    "</script><script>x</script>",
    "x" * 1_000_000,
    "half \ud83d",
    "",
    "a\nb\r\x00\x9b5m",
    "\u202e\u2066\u2028",
]


class Hostile:
    """In place of `batch_decode`: whatever the policy drew, it reads as one of these."""

    def __init__(self):
        self.count = 0

    def __call__(self, rows, **kwargs):
        first, self.count = self.count, self.count + len(rows)
        return [HOSTILE[(first + i) % len(HOSTILE)] for i in range(len(rows))]


def test_hostile_completions_are_judged_as_they_are_and_do_nothing_to_table_log_and_card(tmp_path, capsys):
    heard = []

    def judge(completions, log_extra):
        heard.extend(completions)
        log_extra("said", completions)
        return [float(len(c) > 3) for c in completions]

    tokenizer = tiny.tokenizer()
    tokenizer.batch_decode, tokenizer.decode = Hostile(), lambda ids, **kwargs: ""
    settings = dict(completions_steps=1, num_completions_to_print=8, eval_steps=1, keep_best_by="eval_scores/judge")
    trainer = build.trainer(
        tmp_path, processing_class=tokenizer, reward=judge, eval_dataset=tiny.rows(8), disable_tqdm=True, **settings
    )
    trainer.train()
    trainer.summary(trainer.save_model(tmp_path / "final"), prompts=8)
    assert set(HOSTILE) <= set(heard)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert {row["said"] for row in rows} == set(HOSTILE) and {row["completion"] for row in rows} == set(HOSTILE)
    shown = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert len(shown) < 50_000 and "…" in shown
    for path in [tmp_path / "metrics.jsonl", tmp_path / "run.json", tmp_path / "final" / "README.md"]:
        text = path.read_text(encoding="utf-8")
        assert "<script>" not in text and "\x1b" not in text and len(text) < 100_000


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_judge_that_fails_on_a_hostile_completion_is_named_harmlessly(text, tmp_path):
    def judge(completions):
        return [float("nan") if c == text and len(completions) > 2 else 0.0 for c in completions]

    tokenizer = tiny.tokenizer()
    tokenizer.batch_decode = lambda rows, **kwargs: [text] * len(rows)
    tokenizer.decode = lambda ids, **kwargs: ""
    trainer = build.trainer(tmp_path, processing_class=tokenizer, reward=judge)
    with pytest.raises(RewardError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"reward function 'judge' returned nan for sample 0 ({text[:80]!r}); a score is")
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_rules_judge_any_text(text):
    made = [rules.length_window(1, 5, "words"), rules.repetition_penalty(2, "words"), rules.matches(r"(a|x)+$")]
    made += [rules.contains("cat"), rules.think_format, rules.json_valid(), rules.json_valid({"type": "object"})]
    made += [rules.exact_answer(pattern="is (.+)"), rules.maths_answer(), rules.sentiment_lexicon, rules.readability()]
    given = dict(completions=[text], completion_ids=[[1, 2]], answer=["3"])
    found = [rule(**given)[0] for rule in made]
    assert all(score is None or torch.isfinite(torch.tensor(score)) for score in found)
    assert (found[-1] is None) == (re.search(r"\w", text) is None)  # readability of a text without a word
