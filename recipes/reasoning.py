"""A verifiable task: a small GPT-2 learns sums from examples, then from nothing but right or wrong.

    python recipes/reasoning.py                        needs pip install "hfpg[reasoning]"; offline, from scratch
    python recipes/reasoning.py --task basic_arithmetic

The tasks and their exact verifiers are reasoning-gym's. A byte-level GPT-2 is trained by likelihood on worked examples
(SFT), then RLOO raises the share of right answers on other questions: a completion scores 1 when the verifier says so.
Fields of RLOO and TrainConfig are flags.

Measured (2026-11-25, one thread of a shared 2-core CPU, 3 minutes, SFT 70 s of them, seed 42): right answers on 256
held-out questions .35 after SFT → .53 after 100 steps, KL 0.16 nats per completion. More: docs/recipes/reasoning.md.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from hfpg import PolicyGradientTrainer, TrainConfig
from hfpg.algorithms import RLOO
from hfpg.config import field, one_sentence, parse
from hfpg.preflight import refuse_taken
from hfpg.rewards.reasoning import reasoning_task
from hfpg.sft import fine_tune


@dataclass
class Script:
    """The task, and how much of it is shown as examples."""

    task: str = field("chain_sum", "A task of reasoning-gym.")
    task_options: dict = field(dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1), "Its options, as JSON.")
    examples: int = field(2000, "Worked examples for SFT.", least=1)
    sft_epochs: float = field(12.0, "Passes over them.", least=0)


def byte_tokenizer() -> Any:
    """One token per byte; id 0 ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *letters])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def sft(script: Script, tokenizer: Any, rows: list[dict[str, str]]) -> GPT2LMHeadModel:
    """A small GPT-2 after likelihood training on the answers; the question is context only."""
    ends = dict(bos_token_id=0, eos_token_id=0)
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=96, n_layer=2, n_head=4, n_positions=160, **ends)
    )
    questions, answers = [row["prompt"] for row in rows], [" " + row["answer"] for row in rows]
    how: dict[str, Any] = dict(learning_rate=3e-3, per_device_train_batch_size=32)
    fine_tune(model, tokenizer, answers, questions, num_train_epochs=script.sft_epochs, **how)
    return model


def main() -> None:
    """Examples, then right or wrong, then the same questions before and after."""
    rl = dict(num_generations=8, kl_coef=0.01, prompts_per_step=32, max_steps=100, max_completion_length=6)
    rl |= dict(learning_rate=1e-3, adam_beta2=0.99, warmup_steps=5)
    script, rloo, args = parse((Script, RLOO, TrainConfig), description=__doc__, defaults=lambda script: rl)
    refuse_taken(args)
    shown, _ = reasoning_task(script.task, size=script.examples, seed=1, **script.task_options)
    asked, reward = reasoning_task(script.task, size=2000, seed=2, **script.task_options)
    tokenizer = byte_tokenizer()
    model = sft(script, tokenizer, shown)
    trainer = PolicyGradientTrainer(model, rloo, reward, asked[:1744], asked[1744:], args, processing_class=tokenizer)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.summary(trainer.save_model(trainer.output_dir / "final"))


if __name__ == "__main__":
    with one_sentence():
        main()
