"""In a world whose truth is known, a tiny model comes as close as data allow."""

import pytest
import torch
from evaluate import correlation, score
from pairs import Pairs, load_pairs
from train import main

from tests.reward_models.world import World, backbone, write


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
