"""The mean and standard deviation of a judge's scores on a policy's own completions, so that β keeps its meaning.

    python reward_models/normalize.py --judge runs/film-judge                     print the flags
    python reward_models/normalize.py --judge runs/film-judge --store True        or keep them in config.json
    python reward_models/normalize.py --judge runs/film-judge --apply True        or change the judge itself

The policy is the reference of the coming run, untrained (Ziegler et al. 2019, arXiv:1909.08593). What `--store` keeps,
hfpg applies whenever it loads the folder: score' = (score − mean) / std. `--apply` folds the same into the linear
layer that writes the score, so that the folder is normalised for everybody.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate import function_of, scores_of
from pairs import judged_text
from torch import Tensor, nn
from train import forget, output_layer
from transformers import AutoTokenizer

from hfpg import embedded
from hfpg.config import field, one_sentence, parse, require
from hfpg.data import PromptData, decode_completions, load_prompts, order
from hfpg.generation.hf import HFGenerator
from hfpg.pretrained import load_policy
from hfpg.rewards.learned import ClassifierReward
from hfpg.text_config import context_length
from hfpg.types import Text


NOTE = "Normalised"  # how the line on the card begins


@dataclass
class Script:
    """Which judge, on whose completions of which prompts."""

    judge: str = field("", "Classifier (Hub id or folder), 'file.py:name' or 'package.module:name'.")
    policy: str = field(embedded.MODEL, "Hub id or folder of the reference policy. Default: the embedded tiny GPT-2.")
    prompts: str | None = field(
        None, "Hub id or .jsonl/.json/.csv/.parquet/.txt file of prompts. Default: film prompts."
    )
    samples: int = field(512, "Completions that are scored, one a prompt while there are enough prompts.")
    max_completion_length: int = field(20, "Longest completion, in tokens: as in the coming run.")
    temperature: float = field(1.0, "Sampling temperature: as in the coming run.")
    seed: int = field(42, "Of the prompts' order and of the samples.")
    store: bool = field(False, "Write reward_mean and reward_std into the judge's config.json, where hfpg reads them.")
    apply: bool = field(False, "Fold mean and std into the judge's last layer.")
    output_dir: str | None = field(None, "Folder for the judge that --apply makes. Default: the judge's own folder.")

    def __post_init__(self) -> None:
        require(bool(self.judge), "name the judge with --judge, such as a classifier's folder")
        require(self.samples >= 2, f"samples={self.samples} must be at least 2; a few hundred give a mean")
        require(self.temperature > 0, f"temperature={self.temperature} must be above 0, as in the coming run")
        local = Path(self.judge).is_dir()
        require(
            local or not (self.store or (self.apply and self.output_dir is None)),
            f"{self.judge!r} is no folder to store in; use --apply True with --output_dir, or the printed flags",
        )
        require(
            ":" not in self.judge or not (self.store or self.apply),
            f"{self.judge!r} is a function, which keeps no mean and std; use the printed flags",
        )
        require(
            not (self.store and self.apply),
            "--store keeps mean and std beside the judge and --apply folds them in: that would be twice; use one",
        )


def sample(script: Script) -> tuple[list[Any], list[Any]]:
    """Prompts and the policy's completions of them, by hfpg's own generator."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if script.prompts is None:
        rows: Any = [{"prompt": p} for p in embedded.prompts("train")]
    else:
        rows = load_prompts(script.prompts, 1)[0]
    policy = load_policy(script.policy).to(device)
    tokenizer = AutoTokenizer.from_pretrained(script.policy)
    context = context_length(policy.config)
    data = PromptData(rows, tokenizer, max_completion_length=script.max_completion_length, context=context)
    generate = HFGenerator(
        tokenizer,
        seed=script.seed,
        max_completion_length=script.max_completion_length,
        temperature=script.temperature,
    )
    which = order(0, script.samples, len(data), script.seed)
    prompts = data.rows(which, torch.arange(script.samples), 1, device)
    made = generate(policy, prompts)
    return list(prompts.texts), decode_completions(tokenizer, made, prompts.texts)


def moments(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation.

    Raises:
        ConfigError: all scores are equal.
    """
    x = torch.tensor(scores, dtype=torch.float64)
    mean, std = x.mean().item(), x.std(correction=0).item()
    require(
        std > 1e-12 * (1 + abs(mean)),
        f"all {len(x)} scores are {mean:g}: a judge that cannot tell texts apart has no scale; use another judge",
    )
    return mean, std


def score(judge: str, prompts: list[Any], completions: list[Any], normalize: bool = True) -> list[float]:
    """The judge's scores, by the path that training takes; completions that it abstains from are left out.

    Args:
        normalize: False: without the mean and std that its folder already keeps.
    """
    said = scores_of(function_of(judge, normalize), prompts, completions)
    found = [s for s in said if s is not None]
    require(len(found) >= 2, f"the judge {judge!r} scored {len(found)} of {len(completions)} completions; it needs 2")
    return found


def fold(model: Any, mean: float, std: float, probe: dict[str, Tensor]) -> None:
    """score' = (score − mean) / std, in the weights: W' = W / std, b' = (b − mean) / std.

    A head without a bias (that of a decoder) reads w·h with h = LayerNorm(…) + c, and nothing else reads h: the shift
    goes into c' = c − mean · w / ‖w‖², so that w·h' = w·h − mean.

    Args:
        model: the classifier; it is changed in place.
        probe: a batch of inputs, to find the layer norm.
    Raises:
        ConfigError: the head has no bias and the layer before it is no LayerNorm with one (Llama, Qwen).
    """
    head = output_layer(model)[1]
    with torch.no_grad():
        if head.bias is not None:
            head.bias.copy_((head.bias.double() - mean) / std)
        else:
            norm = _norm_before(model, head, probe)
            require(
                norm is not None,
                f"the head of {type(model).__name__} has no bias, and no LayerNorm with one stands before it: a mean "
                "cannot be folded in; use --store True, or the printed flags",
            )
            w = head.weight[0].double()
            norm.bias.copy_(norm.bias.double() - mean * w / (w @ w))
        head.weight.copy_(head.weight.double() / std)


@torch.no_grad()
def _norm_before(model: Any, head: nn.Linear, probe: dict[str, Tensor]) -> Any:
    """The LayerNorm whose output is the head's input: the same memory; None if there is none."""
    outputs: list[tuple[nn.Module, Tensor]] = []  # held, so that no memory is used twice
    read: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, given: read.append(given[0]))]
    for module in model.modules():
        hooks.append(
            module.register_forward_hook(lambda m, _, out: outputs.append((m, out)) if torch.is_tensor(out) else None)
        )
    model(**probe)
    for hook in hooks:
        hook.remove()
    norms = [(m, out) for m, out in outputs if isinstance(m, nn.LayerNorm) and m.bias is not None]
    return next((m for m, out in norms if out.data_ptr() == read[-1].data_ptr()), None)


def apply(judge: str, target: Path, mean: float, std: float, texts: list[Text]) -> None:
    """Fold mean and std into the judge's weights, check it on texts, and save it in `target`.

    Raises:
        ConfigError: the judge has several labels, cannot be folded, or the folded judge scores otherwise than it must.
    """
    reward = ClassifierReward(judge, normalize=False)
    model, tokenizer = reward.model, reward.tokenizer
    require(
        model.config.num_labels == 1,
        f"the judge {judge!r} has {model.config.num_labels} labels; only one can be folded into; use the flags",
    )
    before = torch.tensor(reward([""] * len(texts), texts), dtype=torch.float64)
    probe = tokenizer(texts[:1], return_tensors="pt", truncation=True)
    fold(model, mean, std, {"input_ids": probe["input_ids"], "attention_mask": probe["attention_mask"]})
    after = torch.tensor(reward([""] * len(texts), texts), dtype=torch.float64)
    off = (after - (before - mean) / std).abs().max().item()
    require(
        off <= 1e-4 * (1 + after.abs().max().item()),
        f"{type(model).__name__} is not linear in its last layer: folded scores are {off:.2g} off; use --store True",
    )
    forget(model.config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def store(folder: Path, mean: float, std: float) -> None:
    """Keep mean and std in the folder's config.json, in the place of older ones."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"reward_mean": mean, "reward_std": std}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def note(folder: Path, source: str, line: str) -> None:
    """Say on the card how the judge is normalised, in the place of what was said before; or begin a card."""
    own, other = folder / "README.md", Path(source) / "README.md"
    text = next((path.read_text(encoding="utf-8") for path in (own, other) if path.is_file()), f"# {folder.name}\n")
    kept = "\n".join(old for old in text.splitlines() if not old.startswith(NOTE))
    own.write_text(f"{kept.rstrip()}\n\n{NOTE} {line}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Sample, score, and print the flags, or store or apply them."""
    (script,) = parse((Script,), argv, description=__doc__)
    prompts, completions = sample(script)
    scores = score(script.judge, prompts, completions, normalize=not (script.store or script.apply))
    mean, std = moments(scores)
    name = Path(script.policy).name
    print(f"{len(scores)} completions of {name}: mean {mean:.4f} ± {std / len(scores) ** 0.5:.4f}, std {std:.4f}")
    how = f"to mean 0 and std 1 on {len(scores)} completions of {name}: score' = (score − {mean:.6g}) / {std:.6g}"
    if script.store:
        store(Path(script.judge), mean, std)
        note(Path(script.judge), script.judge, f"{how}, by hfpg when it loads this folder (config.json keeps both).")
        print(f"stored in {Path(script.judge) / 'config.json'}; hfpg applies them when it loads the folder, no flags")
    elif script.apply:
        target = Path(script.output_dir or script.judge)
        tokenizer = AutoTokenizer.from_pretrained(script.judge)
        texts: list[Text] = [judged_text(tokenizer, p, c) for p, c in zip(prompts[:32], completions[:32], strict=True)]
        apply(script.judge, target, mean, std, texts)
        note(target, script.judge, f"{how}, in the weights. The figures above are from before.")
        print(f"folded into {target}: its scores have mean 0 and std 1 there; no flags are needed")
    else:
        print(f"--reward_normalization fixed --reward_mean {mean:.6g} --reward_std {std:.6g}")
    return {"mean": mean, "std": std}


if __name__ == "__main__":
    with one_sentence():
        main()
