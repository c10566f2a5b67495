"""Small tasks whose best score is known, and what every method must reach on them.

    python -m tests.learning.tasks --seeds 5 [NAME …]      the table of docs/learning.md, measured anew

Everything runs through PolicyGradientTrainer: an LSTM with 8 tokens that starts almost uniform, prompts of one token,
completions of at most 6. A result is the mean score of 200 fresh completions per prompt, before and after training.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfpg import PolicyGradientTrainer, TrainConfig
from hfpg.algorithms import A2C, GRPO, PPO, RLOO, TRPO, Reinforce, ReMax
from hfpg.lstm import LSTMConfig, LSTMForCausalLM
from hfpg.types import Samples


VOCABULARY, EOS, LONGEST = 8, 1, 6
WORDS = [f"t{i}" for i in range(VOCABULARY)]
TOKENS = [i for i in range(VOCABULARY) if i != EOS]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word t0 … t7; t1 ends a completion."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=WORDS[EOS])


def policy(seed: int) -> LSTMForCausalLM:
    """16 → 32, with an LM head so small that the first samples are almost uniform."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_hidden_layers=1, initializer_range=0.01)
    return LSTMForCausalLM(LSTMConfig(**sizes, eos_token_id=EOS, pad_token_id=None)).eval()


# ── tasks: prompts, and a score in 0 … 1 per completion


@dataclass(frozen=True)
class Task:
    """Prompts and a reward function."""

    rows: list[dict[str, Any]]
    reward: Callable[..., list[float]]
    longest: int = LONGEST


def prompts(count: int) -> list[dict[str, Any]]:
    """One prompt per token: the token's text, its id, its number from 1 on."""
    return [{"prompt": WORDS[t], "token": t, "number": n + 1} for n, t in enumerate(TOKENS[:count])]


def copy(completion_ids: list[list[int]], token: list[int]) -> list[float]:
    """Share of the six places that hold the prompt's token."""
    return [ids.count(t) / LONGEST for ids, t in zip(completion_ids, token, strict=True)]


def length(completion_ids: list[list[int]], number: list[int]) -> list[float]:
    """1 − |L − n| / 6 for a completion that ends as token L; one that does not end counts as L = 8."""
    lengths = [len(ids) if EOS in ids else LONGEST + 2 for ids in completion_ids]
    return [1 - abs(long - n) / LONGEST for long, n in zip(lengths, number, strict=True)]


def match(completion_ids: list[list[int]], token: list[int]) -> list[float]:
    """1 if the first and the sixth token are the prompt's, else 0: (1/8)² (7/8)⁴ = 0.009 of uniform samples."""
    pairs = zip(completion_ids, token, strict=True)
    return [float(len(ids) == LONGEST and ids[0] == ids[-1] == t) for ids, t in pairs]


def table(completion_ids: list[list[int]], number: list[int]) -> list[float]:
    """An arbitrary score in 0 … 2 per prompt and completion of at most two tokens, with an offset per prompt."""
    keys = [
        n + sum((i + 1) * (t + 0.7) ** 2 for i, t in enumerate(ids))
        for ids, n in zip(completion_ids, number, strict=True)
    ]
    return (torch.tensor(keys, dtype=torch.float64).mul(3.1).sin() + 1).tolist()


def arms(completion_ids: list[list[int]], number: list[int]) -> list[float]:
    """A bandit: token i is worth 2 i / 7."""
    return [2 * ids[0] / (VOCABULARY - 1) for ids in completion_ids]


TASKS = {
    "copy": Task(prompts(7), copy),
    "length": Task(prompts(6), length),
    "match": Task(prompts(7), match),
    "bandit": Task(prompts(1), arms, longest=1),
    "table": Task(prompts(3), table, longest=2),
}


# ── what is measured


def score(made: Any, task: Task) -> float:
    """The mean score of 200 completions per prompt, by the task's own reward whatever the trainer's judge says."""
    data = made.eval_data
    given, samples = made.sample(data, range(len(data)), -1 - torch.arange(len(data)))
    tokens = [ids[mask].tolist() for ids, mask in zip(samples.completion_ids, samples.completion_mask, strict=True)]
    return float(torch.tensor(scores(task, tokens, given.columns)).mean())


def scores(task: Task, tokens: list[list[int]], columns: dict[str, list]) -> list[float]:
    """Of completions, given as token ids, by the task's own reward."""
    return task.reward(
        tokens,
        **{name: columns[name] for name in inspect.signature(task.reward).parameters if name != "completion_ids"},
    )


def gap(made: Any, task: Task) -> float:
    """J* − J of J = E[score] − β KL(π ‖ reference), both exact: every completion of every prompt is enumerated.

    J* = mean over prompts of β log Σ_y π_ref(y) e^{score / β} is what the best policy of all reaches.
    """
    every = completions(task.longest)
    data, beta = made.train_data, made.algorithm.kl_coef
    given = data.rows(range(len(data)), torch.arange(len(data) * len(every)), len(every), "cpu")
    tokens = every * len(data)
    ids = torch.tensor([y + [0] * (task.longest - len(y)) for y in tokens])
    mask = torch.arange(task.longest) < torch.tensor([len(y) for y in tokens])[:, None]
    finished = (ids.gather(1, mask.sum(1, keepdim=True) - 1) == EOS)[:, 0]
    said = made.learner.score(Samples(given.ids, given.mask, ids, mask, finished, given.sample_ids, given.group_ids))
    by_prompt = [x.double().sum(1).view(len(data), -1) for x in (said.logprobs, said.ref_logprobs)]
    logp, reference = (x - x.logsumexp(1, keepdim=True) for x in by_prompt)
    worth = torch.tensor(scores(task, tokens, given.columns), dtype=torch.float64).view(len(data), -1)
    reached = (logp.exp() * (worth - beta * (logp - reference))).sum(1)
    return float((beta * (reference + worth / beta).logsumexp(1) - reached).mean())


def completions(longest: int) -> list[list[int]]:
    """Every completion of at most `longest` tokens: it ends with EOS or is cut."""
    bodies = [list(b) for n in range(longest) for b in itertools.product(TOKENS, repeat=n)]
    return [b + [last] for b in bodies for last in range(VOCABULARY) if last == EOS or len(b) == longest - 1]


# ── runs


@dataclass
class Run:
    """What a run has come to: the measure before and after, and its trainer."""

    start: float
    end: float
    seconds: float
    trainer: Any = field(repr=False)

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of every step."""
        return [row for row in self.trainer.state.log_history if "score" in row]


def trainer(task: Task, algorithm: Any, seed: int, folder: str, reward: Any = None, **settings: Any) -> Any:
    """A trainer on this task; `settings` are fields of TrainConfig."""
    config = dict(
        output_dir=folder,
        seed=seed,
        max_steps=300,
        prompts_per_step=len(task.rows),
        max_completion_length=task.longest,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        completions_steps=0,
        save_steps=0,
        disable_tqdm=True,
        torch_threads=1,
        use_cpu=True,
        max_tokens_per_micro_batch=16384,
    )
    return PolicyGradientTrainer(
        policy(seed),
        algorithm,
        reward or task.reward,
        train_dataset=task.rows,
        eval_dataset=[row for row in task.rows for _ in range(200)],
        args=TrainConfig(**(config | settings)),
        processing_class=tokenizer(),
    )


def train(
    name: str,
    algorithm: Any,
    seed: int = 0,
    measure: Callable[[Any, Task], float] = score,
    reward: Any = None,
    **settings: Any,
) -> Run:
    """Train on a task, and measure before and after."""
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        begun = time.process_time()
        made = trainer(task, algorithm, seed, folder, reward, **settings)
        start = measure(made, task)
        made.train()
        return Run(start, measure(made, task), time.process_time() - begun, made)


def shuffled(reward: Callable[..., list[float]], seed: int) -> Callable[..., list[float]]:
    """The same scores, dealt to the wrong completions."""
    noise = torch.Generator().manual_seed(seed)

    @functools.wraps(reward)  # keeps the signature: the trainer asks for it
    def wrong(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        found = reward(completion_ids, **columns)
        return [found[i] for i in torch.randperm(len(found), generator=noise).tolist()]

    return wrong


# ── targets


@dataclass(frozen=True)
class Target:
    """A run, and the bounds that its measure must end in; those of a control exclude what a working method reaches."""

    task: str
    algorithm: Any
    least: float = -math.inf
    most: float = math.inf
    measure: Callable[[Any, Task], float] = score
    reward: Callable[[int], Any] = lambda seed: None  # another judge than the task's own, by seed
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, seed: int = 0) -> Run:
        """Train once."""
        return train(self.task, self.algorithm, seed, self.measure, self.reward(seed), **self.settings)


EIGHT: dict[str, Any] = dict(num_generations=8, kl_coef=0.0)
SPARSE: dict[str, Any] = dict(num_generations=32, kl_coef=0.0)

# one line a target: another method needs one more
TARGETS = {
    "copy/rloo": Target("copy", RLOO(**EIGHT), least=0.97),
    "copy/ppo": Target("copy", PPO(**EIGHT | dict(num_generations=16)), least=0.97, settings=dict(max_steps=100)),
    "length/ema": Target("length", Reinforce(**EIGHT), least=0.96),
    "length/remax": Target("length", ReMax(**EIGHT), least=0.98),
    "length/grpo": Target("length", GRPO(**EIGHT), least=0.98),
    "length/a2c": Target("length", A2C(**EIGHT), least=0.98),
    "copy/trpo": Target("copy", TRPO(**EIGHT, max_kl=0.1), least=0.95, settings=dict(max_steps=120)),
    "length/replay": Target("length", RLOO(**EIGHT, replay=2, off_policy="truncated"), least=0.95),
    "match/ppo+entropy": Target("match", PPO(**SPARSE, entropy_coef=0.05), least=0.95, settings=dict(max_steps=200)),
    "match/rloo+entropy": Target("match", RLOO(**SPARSE, entropy_coef=0.03), least=0.95),
    "bandit/k1-in-reward": Target("bandit", RLOO(num_generations=64, kl_coef=0.5), most=1e-4, measure=gap),
    "table/k1-in-reward": Target("table", RLOO(num_generations=128, kl_coef=0.3), most=2e-3, measure=gap),
}

CONTROLS = {
    "length/none": Target("length", Reinforce(**EIGHT, baseline="none"), least=0.75, most=0.975),
    "match/rloo": Target("match", RLOO(**SPARSE), most=0.75),
    "copy/shuffled": Target("copy", RLOO(**EIGHT), most=0.25, reward=lambda seed: shuffled(copy, seed)),
    "bandit/k3-in-loss": Target(
        "bandit",
        RLOO(num_generations=64, kl_coef=0.5, kl_in="loss", kl_estimator="k3"),
        least=0.03,
        most=0.045,
        measure=gap,
    ),
    "table/k3-in-loss": Target(
        "table",
        RLOO(num_generations=64, kl_coef=0.3, kl_in="loss", kl_estimator="k3"),
        least=0.02,
        measure=gap,
    ),
}


def main() -> None:
    """Run every target and control with seeds 0 … and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = TARGETS | CONTROLS
    print("| run | start | end, seed by seed | bound | CPU s |\n|---|---|---|---|---|")
    for name in arguments.names or every:
        runs = [every[name].run(seed) for seed in range(arguments.seeds)]
        bounds = [f"≥ {every[name].least:g}"] * (every[name].least > -math.inf)
        bounds += [f"≤ {every[name].most:g}"] * (every[name].most < math.inf)
        start, seconds = (sum(getattr(r, x) for r in runs) / len(runs) for x in ("start", "seconds"))
        ends = " ".join(f"{r.end:.4f}" if every[name].measure is score else f"{r.end:.1e}" for r in runs)
        print(f"| `{name}` | {start:.3f} | {ends} | {', '.join(bounds)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
