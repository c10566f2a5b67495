"""The whole RLHF road on real ratings, in one command: likelihood → preference pairs → reward model → PPO.

    python recipes/rlhf_pipeline.py                    offline but for one small sdist that pip fetches
    python recipes/rlhf_pipeline.py --model gpt2 --pairs preferences.jsonl

1. About twenty people rated each film-review sentence (Hutto & Gilbert 2014); sentences rated apart make pairs.
2. The model learns the chosen texts by negative log-likelihood (SFT).
3. A reward model learns the pairs (reward_models/train.py, Bradley-Terry).
4. PPO raises the reward model's score, with the KL to the SFT model as its price. A gold judge that no stage has seen
   (judge B: other features, other sentences) is evaluated beside it; the best model by it is kept.

What each stage makes stays in --work and is used again. Fields of PPO and TrainConfig are flags. Measured:
docs/recipes/rlhf_pipeline.md.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from hfpg import PolicyGradientTrainer, TrainConfig, embedded
from hfpg.algorithms import PPO
from hfpg.config import field, one_sentence, parse


QUIET: dict[str, Any] = dict(report_to="none", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False)
MAKERS = Path(__file__).resolve().parents[1] / "reward_models"


@dataclass
class Script:
    """The stages and what they start from."""

    model: str = field(embedded.MODEL, "Causal LM to tune: Hub id or folder. Default: the embedded tiny GPT-2.")
    pairs: str | None = field(None, "Preferences (.jsonl with chosen and rejected). Default: made from the ratings.")
    judge: str | None = field(None, "A reward model that exists. Default: trained on the pairs.")
    work: str = field("runs/rlhf", "Folder of the stages.")
    sft_epochs: float = field(1.0, "Passes over the chosen texts.")
    eval_prompts: int = field(256, "Held-out prompts.")


def defaults(script: Script) -> dict[str, Any]:
    """Measured on the embedded model; the gold judge watches every ten steps."""
    rl: dict[str, Any] = dict(
        prompts_per_step=64, max_completion_length=20, epochs=3, minibatches=2, max_steps=60, learning_rate=1e-4
    )
    rl |= dict(kl_coef=0.15, entropy_coef=0.02, adam_beta2=0.99, reward_normalization="running", value_warmup=2)
    watch = dict(reward_weights=[1.0, 0.0], eval_steps=10, eval_on_start=True, keep_best_by="eval_scores/judge_b")
    return rl | watch | dict(output_dir=f"{script.work}/ppo", stop_overoptimized=3)


def preferences(script: Script, work: Path) -> tuple[Path, str]:
    """The pairs' file and the reward model's folder, made where they are not given."""
    folder = work / "judge"
    if script.pairs is None and not (folder / "config.json").exists():
        maker = [sys.executable, MAKERS / "film_judge.py", "--output_dir", folder]
        subprocess.run([*map(str, maker)], check=True)
    elif script.judge is None and not (folder / "config.json").exists():
        maker = [sys.executable, MAKERS / "train.py", "--dataset", script.pairs, "--output_dir", folder]
        subprocess.run([*map(str, maker), "--model", script.model], check=True)
    return Path(script.pairs or "build/film-judge/train.jsonl"), script.judge or str(folder)


def sft(script: Script, pairs: Path, folder: Path) -> str:
    """The model after likelihood fine-tuning on the chosen texts, end of text included."""
    if (folder / "config.json").exists():
        return str(folder)
    tokenizer, model = (kind.from_pretrained(script.model) for kind in (AutoTokenizer, AutoModelForCausalLM))
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    texts = sorted({row["chosen"] for row in rows if not row.get("tie")})
    texts = [text for text in texts if text[:1].isupper() and text[-1:] in ".!?"] or texts  # whole sentences, if any
    context = model.config.max_position_embeddings - 1
    ids = [tokenizer(text).input_ids[:context] + [tokenizer.eos_token_id] for text in texts]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # labels are padded with −100: EOS is learnt
    args = TrainingArguments(str(folder), num_train_epochs=script.sft_epochs, learning_rate=1e-4, **QUIET)
    table = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = Trainer(model.float(), args, DataCollatorForSeq2Seq(tokenizer), table, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return str(folder)


def main() -> None:
    """Every stage in turn, then the same prompts before and after."""
    script, ppo, args = parse((Script, PPO, TrainConfig), description=__doc__, defaults=defaults)
    work = Path(script.work)
    pairs, judge = preferences(script, work)
    start = sft(script, pairs, work / "sft")
    prompts, held_out = ([{"prompt": p} for p in embedded.prompts(part)] for part in ("train", "eval"))
    rewards = [judge, embedded.judge_b]
    trainer = PolicyGradientTrainer(start, ppo, rewards, prompts, held_out[: script.eval_prompts], args)
    trainer.train()
    trainer.evaluate()
    trainer.summary(trainer.save_model(trainer.output_dir / "final"))


if __name__ == "__main__":
    with one_sentence():
        main()
