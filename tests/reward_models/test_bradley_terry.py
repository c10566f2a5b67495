"""The loss is the formula; and in a world whose truth is known, a tiny model comes as close as data allow."""

import math

import pytest
import torch
from evaluate import correlation, score
from pairs import Pairs, load_pairs
from torch.nn.functional import logsigmoid
from train import bradley_terry, centering, main

from tests.reward_models.world import World, backbone, write


C = torch.tensor([1.5, -0.25, 40.0, -300.0])
R = torch.tensor([0.5, 0.75, -40.0, 300.0])
ZERO, ONE = torch.zeros(4), torch.ones(4)


def test_loss_is_minus_the_log_of_the_chosen_probability():
    expected = [math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(1.0)), 0.0, 600.0]  # the last overflows in exp
    torch.testing.assert_close(bradley_terry(C, R, ZERO, ONE), torch.tensor(expected))


def test_margin_is_what_the_difference_must_exceed():
    margin = torch.tensor([1.0, 0.5, 2.0, 0.0])
    torch.testing.assert_close(bradley_terry(C, R, margin, ONE), -logsigmoid(C - R - margin))
    assert bradley_terry(C, R, margin, ONE)[0] == pytest.approx(math.log(2))


def test_a_tie_is_learnt_as_a_fair_coin():
    near = torch.tensor([0.3, 0.0], requires_grad=True)
    loss = bradley_terry(near, torch.zeros(2), torch.zeros(2), torch.full((2,), 0.5))
    torch.testing.assert_close(loss[1].item(), math.log(2))
    loss.sum().backward()
    assert near.grad[0] > 0  # pulled down to equality
    assert near.grad[1] == 0


def test_half_precision_scores_make_an_fp32_loss():
    loss = bradley_terry(C.bfloat16(), R.bfloat16(), ZERO, ONE)
    assert loss.dtype == torch.float32


def test_a_function_of_the_prompt_changes_no_loss_and_centering_fixes_it():
    shift = torch.tensor([4.0, -2.0, 8.0, 16.0])
    assert torch.equal(bradley_terry(C + shift, R + shift, ZERO, ONE), bradley_terry(C, R, ZERO, ONE))
    base = torch.tensor(0.0, requires_grad=True)
    centering(torch.tensor([3.0]) + base, torch.tensor([1.0]) + base).sum().backward()
    assert base.grad == 4 * (3 + 1)  # d (r_c + r_r)² / d shift: 0 only at r_c = −r_r


def test_choices_do_not_depend_on_what_the_prompt_adds():
    assert World.make(0, prompt_weight=5.0).pairs(50, seed=3) == World.make(0).pairs(50, seed=3)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge of the world, trained by the command line, and 2,000 pairs that it has not seen."""
    folder = tmp_path_factory.mktemp("world")
    world = World.make(0, prompt_weight=2.0)
    data, fresh = write(folder / "train.jsonl", world.pairs(10_000, 1)), world.pairs(2_000, 2)
    held = write(folder / "held_out.jsonl", fresh)
    words = f"--model {backbone(folder / 'lm')} --dataset {data} --eval_dataset {held} --output_dir {folder / 'judge'}"
    how = (
        "--learning_rate 3e-3 --num_train_epochs 4 --per_device_train_batch_size 64 --disable_tqdm True --use_cpu True"
    )
    main([*words.split(), *how.split()])
    return world, str(folder / "judge"), load_pairs(held)


def true_differences(world: World, pairs: Pairs) -> torch.Tensor:
    rows = zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)
    return torch.tensor([world.reward(p, c) - world.reward(p, r) for p, c, r in rows])


def test_a_tiny_model_is_within_a_hundredth_of_bayes(judge):
    world, folder, pairs = judge
    chosen, rejected = (torch.tensor(s) for s in score(folder, pairs))
    true = true_differences(world, pairs)
    right = torch.where(chosen > rejected, true, -true).sigmoid()  # how probable the judge's choice is, in truth
    bayes = true.abs().sigmoid()
    print(f"Bayes {bayes.mean():.4f}, judge {right.mean():.4f}")
    assert right.mean() >= bayes.mean() - 0.01


def test_scores_correlate_with_the_truth_up_to_a_function_of_the_prompt(judge):
    world, folder, pairs = judge
    chosen, rejected = (torch.tensor(s) for s in score(folder, pairs))
    true = true_differences(world, pairs)
    r = correlation((chosen - rejected).tolist(), true.tolist())
    slope = ((chosen - rejected) @ true / (true @ true)).item()
    print(f"r {r:.4f}, slope {slope:.3f}")
    assert r >= 0.98
    assert 0.85 <= slope <= 1.15  # the scale of the logit is that of the choices

    def within_prompts(values: torch.Tensor) -> list[float]:
        prompts = torch.tensor([sorted(set(pairs.prompts)).index(p) for p in pairs.prompts])
        means = torch.stack([values[prompts == i].mean() for i in range(int(prompts.max()) + 1)])
        return (values - means[prompts]).tolist()

    rewards = torch.tensor([world.reward(p, c) for p, c in zip(pairs.prompts, pairs.chosen, strict=True)])
    assert correlation(within_prompts(chosen), within_prompts(rewards)) >= 0.98
    assert correlation(chosen.tolist(), rewards.tolist()) < 0.9  # the prompt's term, 2 a prompt, cannot be known
