"""Every recipe: short, with a header that says what it needs and what was measured, and run for two steps."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
RUN_BY = {
    "ppo_gpt2": ("tests/test_recipe.py", '"--max_steps", "2"'),
    "reasoning": ("tests/rewards/test_reasoning.py", '"--max_steps", "2"'),
    "reinforce_lstm": ("tests/test_reinforce_lstm.py", '"--max_steps", "2"'),
    "rlhf_pipeline": ("tests/test_rlhf_pipeline.py", '"--max_steps", "2"'),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_was_measured(path):
    code = path.read_text(encoding="utf-8")
    assert len(code.splitlines()) < 80
    header = ast.get_docstring(ast.parse(code)) or ""
    assert re.search(rf"(python|accelerate launch) recipes/{path.name}", header), "the command"
    measured = header[header.index("Measured (") :]
    assert re.search(r"\b(CPU|GPU)\b", measured), "the hardware"
    assert re.search(r"\d+ minutes?\b", measured), "the time"
    assert re.search(r"\d\)?( \w+)* → ", measured) and re.search("held.out", measured), "before → after, on what"
    (page,) = re.findall(r"docs/[\w/]+\.md", measured)
    assert (ROOT / page).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_run_for_two_steps_by_a_test(path):
    test, flag = RUN_BY[path.stem]
    code = (ROOT / test).read_text(encoding="utf-8")
    assert path.stem in code and flag in code
