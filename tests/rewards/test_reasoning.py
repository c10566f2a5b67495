"""reasoning-gym's tasks as data set and reward. Where the package is missing, a stand-in with its interface is."""

import dataclasses
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hfpg import ConfigError
from hfpg.algorithms import RLOO
from hfpg.rewards.reasoning import from_json, reasoning_task, to_json
from tests import build


@dataclasses.dataclass
class Sums:
    """What reasoning-gym's chain_sum is to a caller."""

    size: int
    seed: int
    max_digits: int = 1

    def __iter__(self):
        for i in range(self.size):
            a, b = (i * 7 + self.seed) % 10**self.max_digits, i % 10
            metadata = {"source_dataset": "chain_sum", "source_index": i}
            yield {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": metadata}

    def score_answer(self, answer, entry):
        """1 for the exact answer."""
        return float(answer == entry["answer"])


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The real package where it is, or the stand-in."""
    if importlib.util.find_spec("reasoning_gym") is None:
        fake = ModuleType("reasoning_gym")
        fake.factory = SimpleNamespace(DATASETS={"chain_sum": Sums})
        fake.create_dataset = lambda name, **config: Sums(**config)
        monkeypatch.setitem(sys.modules, "reasoning_gym", fake)


def test_the_right_answer_scores_one_behind_the_marker_or_alone():
    rows, reward = reasoning_task("chain_sum", size=4, max_digits=1, instruction="Add. ")
    assert len(rows) == 4 and all(row["prompt"].startswith("Add. ") for row in rows)
    entries, right = [row["entry"] for row in rows], [row["answer"] for row in rows]
    assert reward(completions=right, entry=entries) == [1.0] * 4
    assert reward(completions=[f"It is 1 or 2. #### {a} " for a in right], entry=entries) == [1.0] * 4
    assert all(s < 1 for s in reward(completions=["no idea"] * 4, entry=entries))
    talk = [[{"role": "assistant", "content": f"#### {a}"}] for a in right]
    assert reward(completions=talk, entry=entries) == [1.0] * 4
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": f"#### {a}"}]}] for a in right]
    assert reward(completions=parts, entry=entries) == [1.0] * 4
    assert reward(completions=["1"], entry=['{"question": "?"}']) == [None]


ROW = {"question": "?", "answer": "1 2", "metadata": {"grid": ((1, 2), [3]), "by": {1: "a", (2, 3): (4,)}, "n": None}}


def test_a_row_comes_back_from_json_as_it_was():
    assert from_json(to_json(ROW)) == ROW
    assert from_json(to_json({"plain": [1, {"a": "b"}]})) == {"plain": [1, {"a": "b"}]}


@dataclasses.dataclass
class Typed:
    """A task that compares by types, as arc_agi does, and fails on junk, as prime_factorization does."""

    size: int = 2
    seed: int = 0
    held: Any = ((1, 2), (3, 4))
    answer: str = "1 2"

    def __iter__(self):
        return iter([{"question": "?", "answer": self.answer, "metadata": {"held": self.held}}] * self.size)

    def score_answer(self, answer, entry):
        """1 for the first of what is held, with its type."""
        told = [int(word) for word in answer.split()]
        return float(tuple(told) == entry["metadata"]["held"][0])


@pytest.fixture
def typed(monkeypatch):
    """reasoning-gym with the task `typed` alone."""
    fake = ModuleType("reasoning_gym")
    fake.factory = SimpleNamespace(DATASETS={"typed": Typed})
    fake.create_dataset = lambda name, **config: Typed(**config)
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)


def test_a_verifier_sees_the_types_of_the_row(typed):
    rows, reward = reasoning_task("typed", size=2)
    assert reward(completions=["#### 1 2", "2 1"], entry=[row["entry"] for row in rows]) == [1, 0]


def test_a_text_that_a_verifier_fails_on_is_wrong(typed):
    rows, reward = reasoning_task("typed", size=2)
    assert reward(completions=["no idea", ""], entry=[row["entry"] for row in rows]) == [0, 0]


class Foreign:
    """A type that JSON does not have, as text something else."""

    def __getitem__(self, place):
        return (1, 2)

    def __str__(self):
        return "x"


@pytest.mark.parametrize("options", [{"held": Foreign()}, {"marker": " ", "answer": "1 2"}])
def test_a_task_whose_own_answer_would_not_score_is_refused(typed, options):
    with pytest.raises(
        ConfigError, match=r"'typed' scores its own answer '1 2' 1, but 0.0 when it is read from a text"
    ):
        reasoning_task("typed", **options)


if importlib.util.find_spec("reasoning_gym"):  # some of its dependencies need a compiler, so CI has the stand-in

    @pytest.mark.parametrize("name", ["arc_agi", "rearc", "ab", "prime_factorization", "graph_color"])
    def test_tasks_of_the_package_score_their_own_answers(name):
        rows, reward = reasoning_task(name, size=4)
        entries = [row["entry"] for row in rows]
        if name != "graph_color":  # any colouring that fits
            assert reward(completions=[row["answer"] for row in rows], entry=entries) == [1.0] * 4
        assert all(score < 1 for score in reward(completions=["no idea"] * 4, entry=entries))


def test_it_trains_in_one_line(tmp_path):
    rows, reward = reasoning_task("chain_sum", size=16, max_digits=1)
    from tests import tiny

    trainer = build.trainer(
        tmp_path,
        algorithm=RLOO(num_generations=2),
        model=tiny.model("gpt2", vocabulary=257),
        reward=reward,
        train_dataset=rows,
        processing_class=tiny.byte_tokenizer(),
        max_completion_length=4,
        overlong_prompts="truncate",
    )
    assert trainer.train()["scores/chain_sum"] >= 0


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("chain_sums", {}, "no task 'chain_sums'; did you mean 'chain_sum'"),
        ("nosuch", {}, ", such as "),
        ("chain_sum", {"digits": 3}, "cannot be made with {'digits': 3}"),
    ],
)
def test_what_does_not_exist_is_one_sentence(name, options, sentence):
    with pytest.raises(ConfigError) as caught:
        reasoning_task(name, **options)
    assert sentence in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'hfpg\[reasoning\]'"):
        reasoning_task("chain_sum")


def test_the_recipe_for_two_steps(tmp_path, monkeypatch, capsys):
    from recipes import reasoning

    words = ["reasoning.py", "--task_options", '{"max_digits": 1}', "--examples", "64", "--sft_epochs", "1"]
    words += ["--max_steps", "2", "--prompts_per_step", "4", "--num_generations", "2", "--torch_threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--output_dir", str(tmp_path / "run")])
    reasoning.main()
    assert "before → after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    monkeypatch.setattr(reasoning, "sft", lambda *_: pytest.fail("work came before the refusal"))
    with pytest.raises(ConfigError, match="holds a run already"):
        reasoning.main()
