"""What each process of the two-process tests runs: `worker.py OUT`. Rank 0 writes OUT."""

import sys
from typing import Any

import torch

from hfpg.algorithms import DAPO, PPO, RLOO, TRPO, ReMax
from hfpg.types import TokenLoss
from tests import build, tiny


def parity(prompts: list[str], completions: list[str]) -> list[float]:
    """Half of the prompts score all their completions alike: dynamic sampling has something to do."""
    return [float(sum(map(ord, p)) % 2) * len(c) / 20 for p, c in zip(prompts, completions, strict=True)]


OTHERS = {
    "trpo": TRPO(kl_coef=0.02, max_kl=0.05),
    "trpo-critic": TRPO(kl_coef=0.02, max_kl=0.05, critic="separate", num_generations=1),
    "dapo": DAPO(num_generations=2, resample_rounds=6, soft_overlong=0.0),
    "remax": ReMax(kl_coef=0.02),
    "replay": RLOO(kl_coef=0.02, replay=1, off_policy="truncated"),
    "bootstrap": PPO(kl_coef=0.02, truncation="bootstrap", value_warmup=1, reward_normalization="running"),
    "top-layer": PPO(kl_coef=0.02, value="separate"),
}


def other(folder: str, algorithm: Any) -> dict[str, Any]:
    """Tokens and metrics of three steps."""
    settings = dict(prompts_per_step=6, max_steps=3, max_completion_length=8, learning_rate=1e-3)
    top_layer = folder.endswith("top-layer")
    model = tiny.model("gpt2" if top_layer else "lstm")
    if top_layer:  # states below the trained layer are kept with the rollout and travel with it
        settings["trainable_layers"] = 1
    if isinstance(algorithm, TRPO | ReMax):  # conjugate gradients, and Adam where the advantages are but rounding
        model = model.double()
    trainer = build.trainer(
        folder, model=model, algorithm=algorithm, reward=parity, overwrite_output_dir=True, **settings
    )
    tokens = []
    plain = trainer.report
    trainer.report = lambda rollout, metrics: (tokens.append(rollout.completion_ids), plain(rollout, metrics))
    trainer.train()
    kept = ("score", "loss", "grad_norm", "kl_to_ref", "trust_region_kl", "baseline_score", "effective_sample_size")
    found = [{k: row[k] for k in kept if k in row} for row in trainer.state.log_history]
    return {"tokens": tokens, "metrics": found, "position": trainer.run.position}


def key_bias(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """True for GPT-2's key biases, the middle third of c_attn.bias."""
    flat = torch.zeros(parameter.numel(), dtype=torch.bool)
    if name.endswith("c_attn.bias"):
        flat[parameter.numel() // 3 : 2 * parameter.numel() // 3] = True
    return flat


def main(out: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = tiny.model("gpt2")
    trainer = build.trainer(
        out + ".run",
        model=model,
        algorithm=PPO(epochs=2, minibatches=1, kl_coef=0.05),
        train_dataset=tiny.rows(200, longest=9),
        prompts_per_step=10,
        max_steps=5,
        max_completion_length=12,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_tokens_per_micro_batch=64,
        overwrite_output_dir=True,
    )
    result = {"world": trainer.accelerator.num_processes, "tokens": [], "scores": []}

    # one gradient; `collect` gives the same again until a step is taken, before clipping
    rollout = trainer.rescore(*trainer.collect())
    rewards = torch.randn(rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(1))
    credit, _ = trainer.algorithm.estimate(rollout, rewards * rollout.completion_mask, trainer.algorithm_state)
    trainer.learner.gradient(rollout, credit, trainer.algorithm.loss, "token_mean")
    parameters = list(trainer.learner.actor.parameters())
    result["gradient"] = torch.cat([p.grad.flatten() for p in parameters])
    trainer.learner.optimizer.zero_grad()

    # a minibatch with fewer rows than processes: the other rank takes part with nothing
    one = torch.tensor([3])
    trainer.learner.gradient(
        rollout.take(one), credit.take(one), lambda new, rows, c: TokenLoss(new.logprobs, {}), "sequence_sum"
    )
    result["one_row"] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    trainer.learner.optimizer.zero_grad()

    # more than 100,000 sampled tokens, prompts of different lengths
    trainer.generator.max_tokens = 1 << 15
    trainer.generator.max_completion_length, trainer.generator.stop_token_ids = 64, []
    data = trainer.train_data
    rows = [i % len(data) for i in range(1700)]
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = range(1700 * rank // world, 1700 * (rank + 1) // world)
    ids = torch.arange(mine.start, mine.stop) + 10**6
    prompts, samples = trainer.sample(data, [rows[i] for i in mine], ids)
    gathered = trainer.rescore(samples, trainer.judge_samples(prompts, samples))
    result["many"] = gathered.completion_ids
    trainer.generator.max_completion_length, trainer.generator.stop_token_ids = 12, None

    # ten AdamW steps
    def keep(rollout, metrics):
        result["tokens"].append(rollout.completion_ids)
        result["scores"].append(rollout.scores)

    trainer.report = keep
    trainer.train()
    result["evaluation"] = trainer.evaluate(tiny.rows(7))
    result["key_bias"] = torch.cat([key_bias(n, p) for n, p in trainer.learner.actor.named_parameters()])
    result["parameters"] = torch.cat([p.detach().flatten() for p in parameters])
    result["others"] = {name: other(f"{out}.{name}", algorithm) for name, algorithm in OTHERS.items()}
    if trainer.accelerator.is_main_process:
        torch.save(result, out)


if __name__ == "__main__":
    main(sys.argv[1])
