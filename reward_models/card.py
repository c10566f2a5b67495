"""The card of a reward model: what it was made from, how well it agrees with people, and what to watch."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from hfpg.report.card import text


CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, hfpg]{license}
---

# {title}

A reward model: one logit that says how much people would like a text, trained on preference pairs (Bradley–Terry).
Only differences between texts that answer the same prompt mean something.

```python
trainer = PolicyGradientTrainer(model, algorithm, reward_funcs="FOLDER")   # or --reward FOLDER
```

| | |
|---|---|
| backbone | {model} |
| parameters | {parameters:,} |
| data | {dataset} |
| training pairs | {train_pairs:,}; {shared}; {tie_rule} |
| held-out pairs | {pairs:,}{held_out_from} |
| **pair accuracy**, held out | **{accuracy:.3f}** (95 %: {low:.3f} to {high:.3f}, Wilson, independent pairs) |
| NLL per held-out pair | {nll:.3f} |
| calibration error of σ(r_c − r_r) | {ece:.3f} |
| **length correlation** of the score | **{length_r}** (characters) |
| the longer text is chosen | in {longer_train} of training pairs, {longer_chosen} of held-out pairs |
| the longer text is scored higher | in {longer_scored} of held-out pairs |
| training | {steps} steps of {batch} pairs, learning rate {learning_rate:g}, seed {seed} |
| time | {minutes:.1f} minutes on {device} |
| loss | −log σ(r_c − r_r − m), centering {centering:g}{lora} |

A policy that is pushed hard finds what this judge gets wrong: watch a second judge that training never sees.
{about}
## How it was made

```
{command}
```
"""


def fill(template: str, **values: object) -> str:
    """A template of the folder `cards` with every $name replaced; a name without a value is an error."""
    text = (Path(__file__).parent / "cards" / template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shared(left_out: dict[str, int]) -> str:
    if "overlap" in left_out:
        return f"{left_out['overlap']} of the held-out ones share a text with them"
    return f"{left_out['shared_text']} left out that share a text with held-out ones"


def _ties(left_out: dict[str, int]) -> str:
    learnt = left_out["learnt_ties"]
    return f"{left_out['ties']} ties dropped" + (f", {learnt} learnt as probability .5" if learnt else "")


def write_card(folder: Path, script: Any, args: Any, facts: dict[str, Any], command: str, about: str = "") -> None:
    """Write README.md from the settings and from what was measured; `about`: Markdown on the data, and citations."""
    held = facts["held_out"]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    card = CARD.format(
        license=f"\nlicense: {text(script.license)}" if script.license else "",
        title=text(folder.resolve().name),
        model=text(script.model),
        parameters=facts["parameters"],
        dataset=text(script.dataset),
        train_pairs=facts["train_pairs"],
        shared=_shared(facts["left_out"]),
        tie_rule=_ties(facts["left_out"]),
        pairs=held["pairs"],
        held_out_from=f", {text(script.eval_dataset)}" if script.eval_dataset else "",
        accuracy=held["accuracy"],
        low=held["accuracy_95"][0],
        high=held["accuracy_95"][1],
        nll=held["nll"],
        ece=held["ece"],
        length_r=_share(held["length_r"]),
        longer_chosen=_share(held["longer_chosen"]),
        longer_scored=_share(held["longer_scored"]),
        longer_train=_share(facts["longer_chosen_in_training"]),
        steps=f"{facts['steps']:,}",
        batch=batch,
        learning_rate=args.learning_rate,
        minutes=facts["minutes"],
        device=args.device.type,
        seed=args.seed,
        centering=script.centering,
        lora=f", LoRA r = {script.lora_r}, α = {script.lora_alpha}, merged" if script.lora_r else "",
        about=f"\n## Data\n\n{about.strip()}\n" if about else "",
        command=command or "python reward_models/train.py …",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
