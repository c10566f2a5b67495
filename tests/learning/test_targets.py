"""Every kind of method learns what it must, and what must not be learned is not.

Bounds leave room for every seed that was tried: docs/learning.md has the measured numbers.
"""

import contextlib
import io
import math

import pytest
import torch

from hfpg import ConfigError
from hfpg.algorithms import GRPO, RLOO
from tests.learning.tasks import (
    CONTROLS,
    EIGHT,
    EOS,
    TARGETS,
    TASKS,
    VOCABULARY,
    completions,
    copy,
    gap,
    length,
    match,
    trainer,
)


pytestmark = pytest.mark.learning


@pytest.mark.parametrize("name", TARGETS)
def test_it_learns(name):
    target = TARGETS[name]
    run = target.run()
    assert target.least <= run.end <= target.most, f"{name}: {run.start:.3f} → {run.end:.6f}"
    assert not target.least <= run.start <= target.most, f"{name} has nothing to learn: it starts at {run.start:.3f}"


WHY = {
    "length/none": "the method learns, and without a baseline not as well: `length` measures the baseline's work",
    "match/rloo": "a prompt whose samples all score 0 has no gradient: `match` measures exploration",
    "copy/shuffled": "scores in the wrong rows teach nothing: what is learned comes from which row has which score",
    "bandit/k3-in-loss": "k3 in the loss has another optimum, at a known distance: the gap can tell objectives apart",
    "table/k3-in-loss": "the same where a token leads somewhere",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_stays_where_it_belongs(name):
    control = CONTROLS[name]
    run = control.run()
    assert control.least <= run.end <= control.most, f"{name}: {run.start:.3f} → {run.end:.6f}; {WHY[name]}"


def test_every_control_says_what_it_proves():
    assert set(WHY) == set(CONTROLS)


@pytest.mark.parametrize("algorithm", [RLOO(**EIGHT), GRPO(**EIGHT)], ids=["rloo", "grpo"])
def test_equal_scores_change_no_bit(algorithm, tmp_path):
    """A baseline that is not exactly the score, or an advantage made of rounding, would move the parameters."""
    with contextlib.redirect_stdout(io.StringIO()):
        made = trainer(
            TASKS["copy"], algorithm, 0, str(tmp_path), lambda completions: [0.1] * len(completions), max_steps=5
        )
        before = [p.detach().clone() for p in made.learner.actor.parameters()]
        made.train()
    after = list(made.learner.actor.parameters())
    assert all(map(torch.equal, before, after)) and made.state.log_history[-1]["optimizer_steps"] == 1


def test_k1_in_the_loss_is_refused():
    """It would have no KL at all, and drift to the best arm: 2 − β log 8 on the bandit, a gap of 0.41."""
    with pytest.raises(ConfigError, match="regularises nothing"):
        RLOO(kl_in="loss", kl_estimator="k1")


def test_reuse_without_weights_is_refused():
    with pytest.raises(ConfigError, match="off_policy='truncated'"):
        RLOO(replay=2)


# ── the measures measure: what is known without training


def test_scores_of_the_tasks():
    full, short = [2] * 6, [2, 2, EOS]
    assert copy([full, short, [3, 2, 2, 2, 2, 2]], [2, 2, 2]) == [1.0, 2 / 6, 5 / 6]
    assert length([short, short, full, [EOS]], [3, 1, 6, 6]) == pytest.approx([1, 4 / 6, 4 / 6, 1 / 6])
    assert match([full, short, [2, 0, 0, 0, 0, 2], [2] * 5 + [0], [2] * 5 + [EOS]], [2] * 5) == [1, 0, 1, 0, 0]


def test_the_gap_of_a_uniform_policy_is_known(tmp_path):
    """J* − J for a policy that is its own reference: β log mean e^{r/β} − mean r."""
    made = trainer(TASKS["bandit"], RLOO(kl_coef=0.5), 0, str(tmp_path))
    with torch.no_grad():
        for head in (made.learner.actor.policy.lm_head, made.reference.scorer.policy.lm_head):
            head.weight.zero_(), head.bias.zero_()
    worth = [2 * i / 7 for i in range(VOCABULARY)]
    best = 0.5 * math.log(sum(math.exp(r / 0.5) for r in worth) / VOCABULARY)
    assert best == pytest.approx(1.37096, abs=1e-5)
    assert gap(made, TASKS["bandit"]) == pytest.approx(best - 1, abs=1e-6)


def test_where_k3_in_the_loss_ends_is_known():
    """It climbs E r − β KL(ref ‖ π), whose best is π_i = β ref_i / (λ − r_i): measured from J*, 0.0362 too low."""
    beta, worth = 0.5, torch.linspace(0, 2, VOCABULARY, dtype=torch.float64)
    low, high = 2.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((beta / VOCABULARY / (middle - worth)).sum()) > 1 else (low, middle)
    p = beta / VOCABULARY / (low - worth)
    reached = float((p * (worth - beta * (p * VOCABULARY).log())).sum())
    best = beta * float((worth / beta).logsumexp(0) - math.log(VOCABULARY))
    assert best - reached == pytest.approx(0.0362, abs=1e-4)
    assert CONTROLS["bandit/k3-in-loss"].least < best - reached < CONTROLS["bandit/k3-in-loss"].most


def test_every_completion_is_enumerated_once():
    assert len(completions(1)) == 8 and len(completions(2)) == 1 + 7 * 8
    assert len({tuple(y) for y in completions(2)}) == 57
