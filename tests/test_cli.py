"""The command `hfpg`, as a user types it."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hfpg import cli
from hfpg.algorithms import PRESETS
from hfpg.config import ConfigError


def test_every_algorithm_has_a_row_and_a_page(capsys):
    cli.main(["algorithms"])
    table = capsys.readouterr().out
    for name, kind in PRESETS.items():
        assert name in table
        cli.main(["algorithms", name])
        page = capsys.readouterr().out
        assert kind.paper.split(",")[0] in page and "bias" in page and "formula" in page
        for knob in dataclasses.fields(kind):
            assert f"--{knob.name[:12]}" in page


def test_every_algorithm_has_a_page_in_the_docs():
    for name in PRESETS:
        assert Path("docs/algorithms", f"{name}.md").is_file(), f"docs/algorithms/{name}.md is missing"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tran"], "unknown command 'tran'; did you mean 'train'?; use train or algorithms or reward"),
        (["train", "--algorithm", "rlo"], "algorithm='rlo' is unknown; did you mean 'rloo'?"),
        (["train", "--algorithm", "missing.py:Mine"], "algorithm 'missing.py:Mine': there is no file missing.py"),
        (["train", "--algorithm", "rloo", "--epochs", "2"], "unknown flag '--epochs'"),
        (["train", "--algorithm", "grpo", "--num_generations", "1"], "set it to 8, or use Reinforce"),
        (
            ["train", "--algorithm", "grpo", "--value=shared"],
            "unknown flag '--value=shared': grpo has none; a2c, ppo have",
        ),
        (["train", "--algorithm"], "error: argument --algorithm: expected one argument"),
        (["train", "--config"], "error: argument --config: expected one argument"),
        (
            ["train", "--generation_kwargs", "no"],
            "--generation-kwargs: expected a JSON object such as '{\"use_cache\": true}', found 'no'",
        ),
        (["algorithms", "pop"], "algorithm='pop' is unknown"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in said and "Traceback" not in said


def test_ctrl_c_is_no_traceback(capsys, monkeypatch):
    def train(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", train)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_without_words_it_explains_itself(capsys):
    cli.main([])
    assert "hfpg train --algorithm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--version"], f"hfpg {metadata.version('hfpg')}\n"),
        (["algorithms", "--help"], "hfpg algorithms NAME"),
        (["reward", "--help"], "--step_marker"),
        (["train", "--help"], "--clip_range"),
    ],
)
def test_help_and_version(words, said, capsys):
    with contextlib.suppress(SystemExit):
        cli.main(words)
    shown = capsys.readouterr()
    assert said in shown.out and not shown.err


def test_the_algorithm_may_stand_in_the_config_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: gspo\nminibatches: 2\n")
    assert cli.named_in(["--config", str(file)]) == "gspo"
    assert cli.named_in(["--config", str(file), "--algorithm", "rloo"]) == "rloo"
    assert cli.named_in([]) == "ppo"


def test_a_class_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom hfpg.algorithms import RLOO\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(RLOO):\n    '''Mine.'''\n\n"
        "class Other:\n    pass\n"
    )
    assert cli.find_algorithm(f"{file}:Mine").__name__ == "Mine"
    with pytest.raises(ConfigError, match="must be a dataclass with init, rewards, estimate and update"):
        cli.find_algorithm(f"{file}:Other")


@pytest.mark.parametrize("name", ["rloo", "dapo"])
def test_it_trains(name, tmp_path):
    """Two steps of the embedded model, by the console script's own module."""
    flags = ["--max_steps", "2", "--prompts_per_step", "4", "--num_generations", "2", "--max_completion_length", "6"]
    flags += ["--eval_prompts", "8", "--torch_threads", "1", "--output_dir", str(tmp_path / "run")]
    flags += ["--run_name", "my run"]
    command = [sys.executable, "-m", "hfpg.cli", "train", "--algorithm", name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["algorithm"]["name"] == PRESETS[name].__name__
    again = f"python -m hfpg.cli train --algorithm {name} --max_steps 2"
    assert run["command"].startswith(again) and run["command"].endswith("--run_name 'my run'")
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert f"\n{again}" in card and "--run_name 'my run'\n" in card


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dataset", "me/prompts"], "me/prompts"),
        (["--dataset", "me/prompts", "--hub_dataset", "me/others"], "me/others"),
        (["--dataset", "prompts.jsonl"], None),
        ([], None),
    ],
)
def test_the_card_will_name_a_data_set_of_the_hub(flags, named, monkeypatch):
    class Ready(Exception):
        pass

    def trainer(*given):
        raise Ready(given[-1].hub_dataset)

    monkeypatch.setattr(cli, "load_prompts", lambda source, held_out: ([], []))
    monkeypatch.setattr(cli, "PolicyGradientTrainer", trainer)
    with pytest.raises(Ready) as ready:
        cli.train(["--algorithm", "rloo", *flags])
    assert ready.value.args == (named,)


def test_a_judge_that_fails_on_a_completion_is_one_sentence(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "It is"}\n' * 3)  # few: nothing is held out
    (tmp_path / "judge.py").write_text(
        "def f(completions):\n    return [float('nan') if len(completions) > 2 else 1.0 for c in completions]\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reward", "check", f"{tmp_path}/judge.py:f", "--dataset", str(tmp_path / "rows.jsonl")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "the judge failed on a completion: reward function 'f' returned nan" in said
