"""The model card: parses as the Hub parses it, says only what was measured, and survives text from anywhere."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hfpg.algorithms import PRESETS
from hfpg.report.card import CardFacts, model_card, text


FACTS = CardFacts(
    model_name="me/gpt2-positive",
    base_model="openai-community/gpt2",
    algorithm="PPO",
    algorithm_fields={"clip_range": 0.2, "epochs": 4},
    rewards=["positive_words", "length"],
    dataset="imdb",
    steps=100,
    seed=7,
    metrics={"reward": (0.12345, 0.9), "kl_to_ref": (0.0, 3.25)},
    eval_prompts=64,
    config={"learning_rate": 1e-5, "output_dir": "runs/gpt2"},
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    command="hfpg train --algorithm ppo --config positive.yaml",
    hfpg_version="0.1.0",
    seconds=83.4,
    license="mit",
    value_head="linear",
)
HOSTILE = "x | y\n\n---\n# owned\r</td><script>alert(1)</script> ![i](javascript:a) `c` \x1b[31m\u202e ```\n| a | b |"


def card(**changes: Any) -> str:
    return model_card(dataclasses.replace(FACTS, **changes))


def rows(content: str) -> list[list[str]]:
    """The cells of every table row, split at the pipes that are not escaped."""
    lines = [line for line in content.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_front_matter_says_what_it_is():
    assert ModelCard(card()).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hfpg", "ppo", "reinforcement-learning", "policy-gradient"],
        "base_model": "openai-community/gpt2",
        "base_model_relation": "finetune",
        "license": "mit",
        "datasets": ["imdb"],
    }
    assert ModelCard(card(is_adapter=True)).data.to_dict()["base_model_relation"] == "adapter"


def test_the_commands_name_the_branch_and_what_must_be_imported():
    content = card(revision="exp-1", needs_hfpg=True, value_head="linear")
    assert 'pipeline("text-generation", model="me/gpt2-positive", revision="exp-1")' in content
    assert 'pull("me/gpt2-positive", revision="exp-1")' in content and "import hfpg  #" in content
    assert "revision" not in card(value_head="linear") and "import hfpg  #" not in card()


@pytest.mark.parametrize("unknown", [None, "/home/jo/gpt2", "a b", "x\n---\nlicense: mit"])
def test_a_name_or_license_that_the_hub_would_refuse_is_left_out(unknown):
    content = card(base_model=unknown, license=unknown, dataset=unknown)
    assert {"base_model", "base_model_relation", "license", "datasets"}.isdisjoint(ModelCard(content).data.to_dict())
    assert "home" not in content


def test_the_sections():
    content = card()
    assert [line for line in content.splitlines() if re.match("#+ ", line)] == [
        "# me/gpt2-positive",
        "## Quick start",
        "## Value function",
        "## Results",
        "## Training",
        "## Framework versions",
        "## Citation",
    ]
    assert (
        "a fine-tuned version of openai-community/gpt2, trained for 100 steps with PPO on the prompts of imdb"
        in content
    )
    assert "rewarded by positive_words, length" in content
    assert 'pipeline("text-generation", model="me/gpt2-positive")' in content
    assert 'load_actor_critic(pull("me/gpt2-positive"))' in content
    assert "Measured on 64 held-out prompts, before and after this run (one run, seed 7)." in content
    assert ["reward", "0.1235", "0.9"] in rows(content) and ["kl_to_ref", "0", "3.25"] in rows(content)
    assert ["PPO.clip_range", "0.2"] in rows(content) and ["learning_rate", "1e-05"] in rows(content)
    assert ["hfpg", "0.1.0"] in rows(content) and ["torch", "2.13.0"] in rows(content)
    assert "```bash\nhfpg train --algorithm ppo --config positive.yaml\n```" in content
    assert "The run took 83.4 seconds." in content


@pytest.mark.parametrize("name", ["me/gpt2", 'a"b\\', HOSTILE])
def test_the_code_in_a_card_is_python_whatever_the_name(name):
    blocks = re.findall(r"^```python\n(.*?)^```$", card(model_name=name), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


def test_a_fact_that_is_not_known_is_not_there():
    content = model_card(CardFacts(model_name="m", algorithm="MyOwn", hfpg_version="0.1.0", steps=3, seed=11))
    for absent in ("None", "Results", "Value function", "seconds", "rewarded", "prompts of", "@article", "bash"):
        assert absent not in content
    assert "a causal language model" in content and "@software{hfpg" in content


def test_there_are_no_numbers_but_those_given():
    given = {"100", "7", "64", "0.1235", "0.9", "0", "3.25", "0.2", "4", "1e-05", "83.4", "0.1.0", "2.13.0", "5.23.0"}
    body = ModelCard(card()).text.partition("## Citation")[0]
    body = body.replace("gpt2", "").replace('max_new_tokens=32)[0]["generated_text"]', "")
    assert set(re.findall(r"\d[\d.]*\d|\d(?:e-\d+)?", body.replace("1e-05", ""))) <= given


@pytest.mark.parametrize(("algorithm", "paper"), [("PPO", "arXiv:1707.06347"), ("Reinforce", "Williams, Ronald J.")])
def test_the_paper_of_the_algorithm_is_cited(algorithm, paper):
    assert paper in card(algorithm=algorithm)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_paper(name):
    """The one that the class names first: the same arXiv number, or the same first author and year."""
    kind = PRESETS[name]
    named = kind.paper.split(";")[0]
    entry = card(algorithm=kind.__name__).partition("@article{")[2]
    number = re.search(r"arXiv (\d{4}\.\d{5})", named)
    author, year = re.match(r"(\w+).*? (\d{4})", named).groups()
    assert author in entry and f"year    = {{{year}}}" in entry
    assert number is None or f"arXiv:{number[1]}" in entry


PATHS = {
    "/home/jo/models/gpt2": "gpt2",
    "/home/jo smith/my model": "my model",
    "~/private/runs/x": "x",
    "~jo/private/x": "x",
    r"C:\Users\jo\model": "model",
    r"\\fileserver\home\model": "model",
    "file:///home/jo/x": "(address)",
    "https://gpu-7.internal:8000/score?key=1": "(address)",
    "rewards.py:positive": "rewards.py:positive",
    "/home/jo/rewards.py:positive": "rewards.py:positive",
    "['/home/jo/a.jsonl', '/srv/b.jsonl']": "['a.jsonl', 'b.jsonl']",
    "{'path': '/home/jo/a', 'n': 3}": "{'path': 'a', 'n': 3}",
    "data=/home/jo/a.jsonl": "data=a.jsonl",
    "runs/gpt2": "runs/gpt2",
    "and/or": "and/or",
}


@pytest.mark.parametrize(("path", "shown"), PATHS.items())
def test_absolute_paths_and_addresses_do_not_reach_a_card(path, shown):
    assert text(path).replace("\\", "") == shown


def test_nothing_of_this_machine_reaches_a_card():
    command = "/opt/env/bin/hfpg train --train_file '/home/jo smith/p.jsonl' --output_dir=/scratch/jo/run --seed 7"
    content = card(
        model_name="/scratch/jo/run",
        dataset="/home/jo/p.jsonl",
        rewards=["/home/jo/r.py:positive", "http://gpu-7.internal/score"],
        config={"output_dir": Path("/scratch/jo/run"), "files": ["/home/jo/p.jsonl"], "cache": "~/jo/cache"},
        command=command,
    )
    for private in ("/home", "/scratch", "/opt", "smith", "jo/", "~", "gpu-7"):
        assert private not in content
    assert "hfpg train --train_file p.jsonl --output_dir=run --seed 7\n" in content
    assert "/home" not in card(command="hfpg train 'not closed /home/jo/x")
    assert "```bash\n'```'\n```" in card(command="\n```\n")


def test_text_from_outside_cannot_break_the_card():
    everywhere = {f.name: HOSTILE for f in dataclasses.fields(FACTS) if isinstance(getattr(FACTS, f.name), str)}
    hostile = {"rewards": [HOSTILE], "metrics": {HOSTILE: (0.1, 0.2)}, "versions": {HOSTILE: HOSTILE}}
    content = card(**everywhere, **hostile, config={HOSTILE: HOSTILE}, algorithm_fields={HOSTILE: HOSTILE})
    plain = card()
    assert list(ModelCard(content).data.to_dict()) == ["library_name", "pipeline_tag", "tags"]
    headings = [line for line in content.splitlines() if re.match("#+ ", line)]
    assert len(headings) == 7 and headings[1:] == [line for line in plain.splitlines() if line.startswith("## ")]
    assert {len(row) for row in rows(content)} == {2, 3}
    assert len([row for row in rows(content) if len(row) == 3]) == 3
    outside_code = re.sub(r"^```.*?^```$", "", content, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)[<>`]", outside_code) and "](" not in outside_code.replace("\\](", "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", content)


def test_a_long_value_is_cut():
    assert len(text("x" * 5000)) == 200 and text("x" * 5000).endswith("…")
