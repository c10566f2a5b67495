"""The table of ready judges: every cell is filled, and what is named can be loaded."""

from pathlib import Path

import pytest

from hfpg.rewards import Judge


ROOT = Path(__file__).parents[2]
TITLES = ["name", "kind", "data", "pair accuracy", "r", "length r", "licence", "command"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def ready_judges() -> list[dict[str, str]]:
    text = (ROOT / "reward_models" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.split("## Ready judges")[1].split("\n\n")[1].splitlines() if line.startswith("|")]
    assert cells(lines[0]) == TITLES
    return [dict(zip(TITLES, cells(line), strict=True)) for line in lines[2:]]


def test_every_judge_has_every_fact():
    rows = ready_judges()
    assert len(rows) >= 4
    for row in rows:
        assert all(row.values()), row["name"]
        assert 0.5 < float(row["pair accuracy"]) < 1 and abs(float(row["length r"])) < 1
        command = row["command"].split("`")[1].split()
        assert command[0] == "pip" or (ROOT / command[1]).is_file(), row["command"]


AT_HAND = [name for name in (row["name"].strip("`") for row in ready_judges()) if not name.startswith("runs/")]


@pytest.mark.parametrize("name", AT_HAND)  # the film judge is made by its command: test_film_judge.py
def test_a_ready_judge_is_loaded_by_its_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    scores = Judge([name])(["A "] * 2, ["wonderful film.", "dreadful film."], [[1]] * 2, {}).scores
    assert scores[0] > scores[1]
