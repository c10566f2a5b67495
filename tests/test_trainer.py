"""The page, end to end on a tiny GPT-2: learning, callbacks, evaluation, saving, resuming."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from hfpg import ConfigError, session
from hfpg.algorithms import (
    A2C,
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    DrGRPO,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
)
from hfpg.checkpoint import CheckpointError
from hfpg.ops.masked import row_mean
from hfpg.report.card import loadable
from hfpg.saving import load_actor_critic
from tests import build, tiny


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.learner.actor.parameters()])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ALGORITHMS = {
    "ppo": PPO(epochs=2, minibatches=2, kl_coef=0.02),
    "ppo-separate": PPO(epochs=2, kl_coef=0.02, value="separate", entropy_coef=0.001, kl_target=3.0, dual_clip=3.0),
    "none": Reinforce(baseline="none", kl_coef=0.0, num_generations=2),
    "ema": Reinforce(baseline="ema", kl_coef=0.02),
    "batch": Reinforce(baseline="batch", kl_coef=0.02, entropy_coef=0.001),
    "a2c": A2C(kl_coef=0.02, entropy_coef=0.001, kl_target=2.0),
    "rloo": RLOO(kl_coef=0.02),
    "value": Reinforce(baseline="value", kl_coef=0.02, kl_target=2.0),
    "remax": ReMax(kl_coef=0.02),
    "input": Reinforce(baseline="input", kl_coef=0.02, entropy_coef=0.001),
    "grpo": GRPO(num_generations=4, kl_coef=0.01),
    "dr_grpo": DrGRPO(num_generations=4, epochs=2),
    "dapo": DAPO(num_generations=4, resample_rounds=1),
    "gspo": GSPO(num_generations=4, minibatches=2, clip_range=3e-2, clip_range_high=4e-2),
    "cispo": CISPO(num_generations=4, epochs=2),
    "reinforce++": ReinforcePlusPlus(kl_coef=0.02, epochs=2),
    "replay": RLOO(kl_coef=0.02, replay=1, off_policy="truncated", self_normalize=True),
    "warmup": PPO(epochs=2, kl_coef=0.02, lam=0.95, value_warmup=3, truncation="bootstrap"),
    "shaped": PPO(epochs=2, kl_coef=0.02, reward_normalization="running", reward_clip=3.0, soft_overlong=0.2),
    "full-kl": GRPO(num_generations=4, kl_coef=0.01, kl_estimator="full"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_raises_the_score(name, tmp_path):
    trainer = build.trainer(
        tmp_path, algorithm=ALGORITHMS[name], max_steps=25, prompts_per_step=16, learning_rate=5e-3, adam_beta2=0.99
    )
    trainer.train()
    scores = [row["score"] for row in lines(tmp_path / "metrics.jsonl")]
    assert len(scores) == 25 and sum(scores[-5:]) > sum(scores[:5]) * 1.3
    assert all(math.isfinite(v) for v in trainer.state.log_history[-1].values())


def test_a_flipped_reward_lowers_the_score(tmp_path):
    """Guards the test above: with the sign turned, the same run must go down."""
    trainer = build.trainer(
        tmp_path,
        reward=[lambda completions, **k: [-s for s in tiny.count_a(completions)]],
        algorithm=ALGORITHMS["batch"],
        max_steps=25,
        prompts_per_step=16,
        learning_rate=5e-3,
    )
    trainer.train()
    scores = [-row["score"] for row in lines(tmp_path / "metrics.jsonl")]
    assert sum(scores[-5:]) < sum(scores[:5])


def test_constant_reward_without_kl_leaves_the_parameters_alone(tmp_path):
    """With a leave-one-out baseline there is nothing to learn, bit for bit."""
    trainer = build.trainer(
        tmp_path,
        algorithm=Reinforce(baseline="batch", kl_coef=0.0),
        reward=lambda completions, **k: [0.5] * len(completions),
        prompts_per_step=8,
        max_steps=3,
    )
    before = parameters(trainer)
    trainer.train()
    assert torch.equal(before, parameters(trainer))


def test_metrics_of_the_first_step(tmp_path):
    trainer = build.trainer(tmp_path, max_steps=1)
    metrics = trainer.train()
    assert abs(metrics["kl_to_ref"]) < 1e-5 and metrics["first_log_ratio_max"] < 1e-5
    assert metrics["optimizer_steps"] == 2 and metrics["learning_rate"] == 1e-3
    recorded = lines(tmp_path / "metrics.jsonl")[0]
    assert recorded["step"] == 1 and recorded["score"] == pytest.approx(metrics["score"])
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["seed"] == 42 and about["algorithm"]["name"] == "PPO" and about["versions"]["torch"]
    assert about["config"]["prompts_per_step"] == 8 and about["rewards"] == ["count_a"]


def test_the_public_verbs_make_the_same_run_as_train(tmp_path):
    whole = build.trainer(tmp_path / "a", max_steps=3)
    whole.train()
    own = build.trainer(tmp_path / "b", max_steps=3)
    while own.state.global_step < 3:
        samples, scores = own.collect()
        own.step(own.rescore(samples, scores))
    assert torch.equal(parameters(whole), parameters(own))


def test_abstained_rows_do_not_count(tmp_path):
    def judge(completions, **k):
        return [None if i % 2 else s for i, s in enumerate(tiny.count_a(completions))]

    trainer = build.trainer(tmp_path, reward=judge, max_steps=1)
    rollout = trainer.rescore(*trainer.collect())
    assert rollout.weights.tolist() == [1, 0] * 4
    assert float(row_mean(rollout.scores, rollout.weights)) == pytest.approx(float(rollout.scores[::2].mean()))
    assert trainer.train()["unscored"] == 0.5


def test_columns_reach_the_judge_and_extras_the_files(tmp_path):
    seen = {}

    def judge(prompts, completions, completion_ids, number, trainer_state, log_extra, log_metric):
        seen.update(number=number, ids=completion_ids, state=trainer_state)
        log_extra("half", [n / 2 for n in number])
        log_metric("judge/mean_number", sum(number) / len(number))
        return [0.0] * len(completions)

    trainer = build.trainer(
        tmp_path, reward=judge, max_steps=1, completions_steps=1, algorithm=Reinforce(num_generations=2)
    )
    metrics = trainer.train()
    assert len(seen["number"]) == 16 and seen["number"][::2] == seen["number"][1::2]
    assert seen["state"].global_step == 0 and seen["state"].max_steps == 1  # a copy, of before the step
    assert all(isinstance(i, int) for row in seen["ids"] for i in row)
    assert metrics["judge/mean_number"] == pytest.approx(sum(seen["number"]) / 16)
    rows = lines(tmp_path / "completions.jsonl")
    assert len(rows) == 16 and {"prompt", "completion", "score", "half"} <= rows[0].keys()


def test_evaluation_repeats_and_does_not_disturb_training(tmp_path):
    plain = build.trainer(tmp_path / "a", max_steps=3)
    plain.train()
    watched = build.trainer(
        tmp_path / "b", max_steps=3, eval_steps=1, eval_on_start=True, eval_dataset=Dataset.from_list(tiny.rows(11))
    )
    first = watched.evaluate()
    assert first == watched.evaluate() and abs(first["eval_kl_to_ref"]) < 1e-5
    watched.train()
    assert torch.equal(parameters(plain), parameters(watched))
    assert [row["step"] for row in lines(tmp_path / "b" / "metrics.jsonl") if "eval_score" in row][-3:] == [1, 2, 3]
    assert watched.evaluations[-1]["metrics"] != first


def test_conversations_train(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}zb {% endif %}"
    )
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in tiny.rows()]
    seen = []

    def judge(prompts, completions, **k):
        seen.extend(completions)
        assert prompts[0][0]["role"] == "user"
        return [len(c[0]["content"]) / 10 for c in completions]

    trainer = build.trainer(tmp_path, train_dataset=chats, processing_class=tokenizer, reward=judge, max_steps=1)
    trainer.train()
    assert seen[-1][0]["role"] == "assistant"
    assert 'generator([{"role": "user", "content": "Hello!"}]' in trainer.model_card()
    assert 'generator("The movie was"' in build.trainer(tmp_path / "texts").model_card()


def test_the_card_names_license_and_data_set(tmp_path):
    trainer = build.trainer(tmp_path, hub_license="apache-2.0", hub_dataset="stanfordnlp/imdb")
    front = ModelCard(trainer.model_card()).data.to_dict()
    assert (front["license"], front["datasets"]) == ("apache-2.0", ["stanfordnlp/imdb"])


def test_trackers_of_accelerate_get_the_metrics(tmp_path):
    build.trainer(tmp_path, report_to=["tensorboard"], max_steps=2).train()
    written = [p for p in tmp_path.rglob("events.out.tfevents*") if p.stat().st_size > 0]
    assert written and any(b"kl_to_ref" in p.read_bytes() for p in written)


# ── callbacks


class Diary(TrainerCallback):
    """Writes down every event; sets the flags that it is told to."""

    def __init__(self, **wishes):
        self.events, self.wishes, self.seen = [], wishes, None

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(args, state, control, **kwargs):
            self.events.append(name)
            self.seen = (args, kwargs.get("model"), kwargs.get("processing_class"))
            if name == "on_step_end" and state.global_step in self.wishes:
                setattr(control, self.wishes[state.global_step], True)
            return control

        return event


def test_all_events_fire_with_real_arguments(tmp_path):
    diary = Diary()
    trainer = build.trainer(
        tmp_path,
        callbacks=[diary],
        max_steps=6,
        eval_steps=3,
        save_steps=3,
        eval_dataset=tiny.rows(3),
        max_tokens_per_micro_batch=40,
    )
    trainer.train()
    wanted = {"on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin"}
    wanted |= {"on_step_end", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_log", "on_save"}
    assert wanted | {"on_evaluate"} <= set(diary.events)
    assert diary.events.count("on_step_end") == 6 and diary.events.count("on_optimizer_step") == 12
    assert diary.events.count("on_evaluate") == 2 and diary.events.count("on_save") == 2
    assert diary.events.count("on_epoch_begin") == diary.events.count("on_epoch_end") == 2, "48 of 40 prompts"
    args, model, tokenizer = diary.seen
    assert isinstance(args, TrainingArguments) and args.max_steps == 6 and args.learning_rate == 1e-3
    assert model is trainer.learner.actor.policy and tokenizer is trainer.processing_class


@pytest.mark.parametrize(
    ("flag", "event", "times"),
    [("should_save", "on_save", 2), ("should_evaluate", "on_evaluate", 1), ("should_log", "on_log", 1)],
)
def test_flags_that_callbacks_set_are_obeyed(flag, event, times, tmp_path):
    diary = Diary(**{})
    diary.wishes = {2: flag}
    trainer = build.trainer(
        tmp_path, callbacks=[diary], max_steps=4, logging_steps=100, eval_dataset=tiny.rows(3), completions_steps=0
    )
    trainer.train()
    assert diary.events.count(event) == times  # the last step is always saved


def test_a_callback_can_stop_the_run_and_end_an_epoch(tmp_path):
    diary = Diary()
    diary.wishes = {2: "should_training_stop"}
    trainer = build.trainer(tmp_path / "a", callbacks=[diary], max_steps=9)
    trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "a" / "checkpoint-2").is_dir()
    diary.wishes, diary.events = {1: "should_epoch_stop"}, []
    trainer = build.trainer(tmp_path / "b", callbacks=[diary], max_steps=2)
    trainer.train()
    assert trainer.run.position == 40 + 8 and diary.events.count("on_epoch_begin") == 2


# ── saving and resuming


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_save_model_is_a_plain_folder_with_the_value_head_beside(value, tmp_path):
    trainer = build.trainer(tmp_path / "run", algorithm=PPO(value=value), max_steps=2)
    trainer.train()
    folder = trainer.save_model(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    policy = trainer.learner.actor.policy
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), policy.parameters(), strict=True))
    text = pipeline("text-generation", model=str(folder))("aa ba", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("aa ba")
    again = load_actor_critic(folder)
    assert torch.equal(again.value.linear.weight, trainer.learner.actor.value.linear.weight)
    assert again.value.linear.weight.abs().max() > 0
    assert "PPO" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder)("aa").input_ids == tiny.tokenizer()("aa").input_ids


@pytest.mark.parametrize(
    "algorithm",
    [PPO(epochs=2, minibatches=2, kl_target=1.0), Reinforce(baseline="ema"), PPO(value="separate")],
    ids=["ppo", "reinforce", "separate"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(algorithm, lora, tmp_path):
    settings = dict(algorithm=algorithm, max_steps=6, save_steps=3, lr_scheduler_type="cosine", warmup_steps=2)
    if lora:
        settings["peft_config"] = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    whole = build.trainer(tmp_path / "a", **settings)
    whole.train()

    stop = Diary()
    stop.wishes = {3: "should_training_stop"}
    torch.manual_seed(1)  # nothing may hang on the global generator, except a fresh adapter's first weights
    first = build.trainer(tmp_path / "b", callbacks=[stop], **settings)
    first.train()
    torch.manual_seed(99)
    second = build.trainer(tmp_path / "b", resume_from_checkpoint="True", **settings)
    assert not torch.equal(parameters(second), parameters(whole))
    second.train()
    assert second.state.global_step == 6
    if lora:  # the adapter's random start differs between the two runs; resuming the first one must not
        third = build.trainer(tmp_path / "c", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"), **settings)
        third.train()
        second = third
    assert torch.equal(parameters(whole), parameters(second))
    states = [t.learner.optimizer_state() for t in (whole, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert whole.algorithm_state == second.algorithm_state and whole.run == second.run


def test_resuming_rewinds_the_metrics_and_keeps_the_learning_rate(tmp_path):
    trainer = build.trainer(tmp_path, max_steps=4, save_steps=2)
    trainer.train()
    rows = lines(tmp_path / "metrics.jsonl")
    again = build.trainer(tmp_path, max_steps=4, save_steps=2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again.train()
    new = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in new] == [1, 2, 3, 4]
    for name in ("score", "loss", "learning_rate", "kl_to_ref", "num_tokens", "epoch"):
        assert [r[name] for r in new] == [r[name] for r in rows], name


def test_a_checkpoint_is_a_model_folder_without_pickles(tmp_path):
    trainer = build.trainer(tmp_path, max_steps=3, save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    files = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert files <= {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".lock"}


def test_a_full_disk_is_one_sentence_and_spoils_nothing(tmp_path, monkeypatch):
    trainer = build.trainer(tmp_path, max_steps=6, save_steps=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))

    def full(tensors, path):  # every disk is
        if trainer.state.global_step >= 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("hfpg.checkpoint.save_file", full)
    sentence = r"checkpoint-5 could not be written: .*No space left on device.*MiB are free there.*'checkpoint-2'"
    with pytest.raises(CheckpointError, match=sentence):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not list((tmp_path / "elsewhere").iterdir())
    monkeypatch.undo()
    again = build.trainer(tmp_path, max_steps=6, save_steps=1, resume_from_checkpoint="True")
    again.train()
    assert again.state.global_step == 6


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    trainer = build.trainer(tmp_path, max_steps=2, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-2" / "hfpg_state.json").unlink()
    (tmp_path / "checkpoint-9.tmp").mkdir()
    again = build.trainer(tmp_path, max_steps=2, save_steps=1, resume_from_checkpoint="True")
    session.begin(again, None)
    assert again.state.global_step == 1


def test_what_was_trained_is_saved_when_a_judge_fails(tmp_path):
    calls = []

    def judge(completions, **k):
        calls.append(1)
        if len(calls) == 6:  # the dry call is the first two
            raise ValueError("the server is gone")
        return [0.0] * len(completions)

    trainer = build.trainer(tmp_path, reward=judge, max_steps=9)
    with pytest.raises(RuntimeError, match="reward function 'judge' raised ValueError: the server is gone"):
        trainer.train()
    assert (tmp_path / "checkpoint-3" / "hfpg_state.json").is_file()
    again = build.trainer(tmp_path, max_steps=4, resume_from_checkpoint="True")
    again.train()
    assert again.state.global_step == 4


def test_resume_by_the_argument_of_train(tmp_path):
    """The README's line, in a fresh process: the constructor must not refuse the folder that is to be continued."""
    build.trainer(tmp_path / "a", max_steps=4).train()
    build.trainer(tmp_path / "b", max_steps=2, lr_scheduler_type="constant").train()
    constant = build.trainer(tmp_path / "c", max_steps=4, lr_scheduler_type="constant")
    constant.train()
    again = build.trainer(tmp_path / "b", max_steps=4, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and torch.equal(parameters(again), parameters(constant))


@pytest.mark.parametrize(("where", "call"), [("score", 4), ("gradient", 6)])
def test_an_interrupt_inside_a_step_leaves_an_exact_place_to_resume(where, call, tmp_path, monkeypatch):
    whole = build.trainer(tmp_path / "a", max_steps=5)
    whole.train()
    trainer = build.trainer(tmp_path / "b", max_steps=5, save_steps=1)
    original, calls = getattr(trainer.learner, where), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer.learner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert 0 < trainer.state.global_step < 5
    again = build.trainer(tmp_path / "b", max_steps=5, save_steps=1, resume_from_checkpoint="True")
    again.train()
    assert torch.equal(parameters(whole), parameters(again)) and whole.run == again.run


def test_sigterm_saves_what_was_trained(tmp_path, capsys):
    def judge(completions, trainer_state, **k):
        if trainer_state is not None and trainer_state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return [0.0] * len(completions)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        build.trainer(tmp_path, reward=judge, max_steps=9).train()
    assert ended.value.code == 143 and (tmp_path / "checkpoint-2").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before
    said = f"what was trained is saved: resume_from_checkpoint=True goes on from {tmp_path / 'checkpoint-2'}"
    assert said in capsys.readouterr().out


def test_going_back_in_the_same_trainer_is_exact(tmp_path):
    trainer = build.trainer(tmp_path, max_steps=4, save_steps=2, warmup_steps=1)
    trainer.train()
    end = parameters(trainer).clone()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(trainer), end)


def test_resuming_an_older_checkpoint_sets_the_later_ones_aside(tmp_path, capsys):
    build.trainer(tmp_path, max_steps=6, save_steps=2).train()
    path = str(tmp_path / "checkpoint-2")
    build.trainer(tmp_path, max_steps=3, save_total_limit=2, resume_from_checkpoint=path).train()
    names = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4.abandoned", "checkpoint-6.abandoned"]
    said = " ".join(capsys.readouterr().out.split())
    assert "under other names: checkpoint-4.abandoned, checkpoint-6.abandoned" in said
    build.trainer(tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"], "they go with the run"
    build.trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    assert "the run is done: step 1; a larger max_steps goes on" in capsys.readouterr().out


def test_other_settings_are_refused_on_resume(tmp_path):
    build.trainer(tmp_path, max_steps=1).train()
    again = build.trainer(tmp_path, max_steps=2, seed=7, algorithm=PPO(epochs=2, kl_coef=0.5))
    with pytest.raises(ConfigError, match=r"other settings \(kl_coef: 0.05 then, 0.5 now; seed: 42 then, 7 now\)"):
        again.train(resume_from_checkpoint=True)
    other = build.trainer(tmp_path, max_steps=2, algorithm=Reinforce())
    with pytest.raises(ConfigError, match="algorithm: 'PPO' then, 'Reinforce' now"):
        other.train(resume_from_checkpoint=True)


def test_resuming_where_there_is_nothing_starts_fresh_and_says_so(tmp_path, capsys):
    trainer = build.trainer(tmp_path, max_steps=1, resume_from_checkpoint="True")
    trainer.train()
    assert trainer.state.global_step == 1 and "to resume from: starting at step 0" in capsys.readouterr().out


def test_a_run_that_is_stuck_stops_and_says_why(tmp_path):
    trainer = build.trainer(tmp_path, reward=lambda completions, **k: [None] * len(completions), max_steps=9)
    with pytest.raises(RuntimeError, match="3 steps in a row changed nothing"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_the_kl_coefficient_that_is_logged_is_the_one_that_was_used(tmp_path):
    build.trainer(tmp_path, algorithm=PPO(kl_coef=0.1, kl_target=3.0), max_steps=2).train()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["kl_coef"] == 0.1 and second["kl_coef"] == pytest.approx(0.098)


def test_a_saved_value_head_goes_on(tmp_path, capsys):
    first = build.trainer(tmp_path / "a", max_steps=2)
    first.train()
    head = first.learner.actor.value.linear.weight.detach().clone()
    saved = str(first.save_model(tmp_path / "saved"))
    again = build.trainer(tmp_path / "b", model=saved, max_steps=1)
    assert torch.equal(again.learner.actor.value.linear.weight, head) and head.abs().max() > 0
    again.train()
    assert "the value head goes on from the one saved" in capsys.readouterr().out
    other = build.trainer(tmp_path / "c", model=saved, algorithm=PPO(value="separate"))
    assert (other.learner.actor.value.linear.weight == 0).all(), "a head of another kind does not fit"


def test_a_save_takes_the_place_of_one_of_another_kind(tmp_path):
    """An adapter beside the weights of another run would be put on them."""
    ids, near = torch.tensor([[3, 4, 5]]), dict(rtol=0, atol=1e-6)
    tiny.model().save_pretrained(tmp_path / "base")
    lora = dict(peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    kinds = [lora, {}, lora, dict(algorithm=PPO(value="separate")), dict(algorithm=RLOO())]
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    for number, kind in enumerate(kinds):
        trainer = build.trainer(tmp_path / f"{number}", model=str(tmp_path / "base"), **kind)
        trainer.train()
        folder = trainer.save_model(tmp_path / "saved")
        logits = trainer.learner.actor.policy(input_ids=ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, logits, **near)
        names = {path.name for path in folder.iterdir()}
        assert ("adapter_config.json" in names) == ("model.safetensors" not in names) == (kind is lora)
        head = getattr(trainer.algorithm, "value", None) is not None
        assert ("value_head.safetensors" in names) == head
        assert any((folder / "value_model").glob("*")) == (number == 3)
        assert (folder / "notes.txt").read_text() == "mine" and not any(n.startswith(".") for n in names)


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    trainer = build.trainer(tmp_path / "run")
    folder = trainer.save_model(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trainer.train()
    monkeypatch.setattr(type(trainer), "model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_dropout_of_an_adapter_is_said_to_do_nothing(tmp_path, caplog):
    for dropout in (0.0, 0.5):
        lora = LoraConfig(r=2, lora_dropout=dropout, target_modules=["c_attn"], task_type="CAUSAL_LM")
        build.trainer(tmp_path / f"{dropout}", peft_config=lora)
    assert caplog.text.count("does nothing here: what was sampled is what is trained") == 1
    assert "lora_dropout=0.5" in caplog.text


def test_an_adapter_does_not_take_the_place_of_its_base(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    trainer = build.trainer(tmp_path / "run", model=str(tmp_path / "base"), peft_config=lora)
    with pytest.raises(ConfigError, match="holds the base model, without which the adapter is nothing; name another"):
        trainer.save_model(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_callbacks_that_stop_follow_the_metric_that_is_kept_by(tmp_path, capsys):
    """And nothing but the evaluations of the run's own five prompts."""
    gold, calls = iter([0.1, 0.5, 0.4, 0.3]), []  # its best is the second; eval_score rises and rises

    def proxy(completions):
        calls.append(1)
        return [float(len(calls))] * len(completions)

    def judge(completions):
        return [next(gold) if len(completions) == 5 else 0.0] * len(completions)

    class Looks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            trainer.evaluate(tiny.rows(2))

    trainer = build.trainer(
        tmp_path,
        reward=[proxy, judge],
        reward_weights=[1.0, 0.0],
        callbacks=[Looks(), EarlyStoppingCallback(early_stopping_patience=2)],
        eval_dataset=tiny.rows(5),
        eval_steps=1,
        keep_best_by="eval_scores/judge",
        max_steps=9,
    )
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step, trainer.state.best_metric) == (4, 2, 0.5)
    assert len([row for row in lines(tmp_path / "metrics.jsonl") if "eval_score" in row]) == 4
    assert "ended at step 4 of 9, by EarlyStoppingCallback(2)" in capsys.readouterr().out


def test_early_stopping_of_transformers_works(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = build.trainer(
        tmp_path, callbacks=[stopping], max_steps=9, eval_steps=1, eval_dataset=tiny.rows(8), learning_rate=0.0
    )
    trainer.train()
    assert trainer.state.global_step == 3, "the first evaluation is the best; two without a gain end the run"


def test_the_card_says_before_and_after_only_of_what_is(tmp_path):
    trainer = build.trainer(tmp_path, max_steps=2, eval_steps=1, eval_dataset=tiny.rows(8))
    trainer.train()
    assert "eval_score" not in trainer.model_card(), "the first evaluation was after a step"
    trainer = build.trainer(tmp_path / "b", max_steps=2, eval_steps=2, eval_dataset=tiny.rows(8), eval_on_start=True)
    trainer.train()
    trainer.evaluate(tiny.rows(3))
    before, after = (e["metrics"]["eval_score"] for e in trainer.evaluations)
    assert len(trainer.evaluations) == 2 and f"{before:.3g}" in trainer.model_card()


def test_the_card_names_the_folder_it_is_saved_in(tmp_path, monkeypatch):
    """And not that of the run, which may be called like a model of the Hub: "gpt2"."""
    monkeypatch.chdir(tmp_path)
    trainer = build.trainer("runs/gpt2")
    for folder, named in (("tuned", "./tuned"), (tmp_path / "runs" / "a", "./runs/a"), (None, "./runs/gpt2")):
        card = (trainer.save_model(folder) / "README.md").read_text()
        assert f'pipeline("text-generation", model="{named}")' in card
        AutoModelForCausalLM.from_pretrained(named)
    assert 'pull("me/tuned")' in (trainer.save_model("tuned", repo_id="me/tuned") / "README.md").read_text()
    assert loadable(Path("/data/jo/gpt2")) == "./gpt2"


def test_a_reference_of_the_users_own_is_left_alone(tmp_path):
    """Frozen, or the very model that is trained: it is copied."""
    frozen = tiny.model(seed=1).requires_grad_(False)
    trainer = build.trainer(tmp_path / "a", ref_model=frozen, max_steps=1)
    assert trainer.train()["kl_to_ref"] != 0 and not any(p.requires_grad for p in frozen.parameters())
    model = tiny.model()
    trainer = build.trainer(tmp_path / "b", model=model, ref_model=model, max_steps=2)
    start = parameters(trainer).clone()
    assert trainer.train()["kl_to_ref"] != 0
    assert not torch.equal(start, parameters(trainer)) and all(p.requires_grad for p in model.parameters())


# ── adapters


def test_lora_trains_the_adapter_alone_and_saves_it(tmp_path):
    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    trainer = build.trainer(
        tmp_path / "run",
        model=str(tmp_path / "base"),
        peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"),
        max_steps=3,
    )
    metrics = trainer.train()
    assert metrics["kl_to_ref"] != 0 and trainer.reference.adapter_off
    folder = trainer.save_model(tmp_path / "adapter")
    assert not (folder / "model.safetensors").exists()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    ids = torch.tensor([[3, 4, 5]])
    policy = trainer.learner.actor.policy
    near = dict(rtol=0, atol=1e-6)  # GELU is one kernel in a policy, and several operations in transformers
    torch.testing.assert_close(tuned(input_ids=ids).logits, policy(input_ids=ids).logits, **near)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(input_ids=ids).logits, base(input_ids=ids).logits, **near)
    trained = build.trainer(tmp_path / "more", model=str(folder), max_steps=1)
    assert abs(trained.train()["kl_to_ref"]) < 1e-5, "a tuned adapter is its own reference"


def test_a_generator_of_the_users_own(tmp_path):
    """`generator=` takes anything that maps (policy, prompts) to Samples; without log-probs of its own is fine."""
    from hfpg.generation.hf import HFGenerator

    inner = HFGenerator(tiny.tokenizer(), seed=1, max_completion_length=4)

    def generator(policy, prompts):
        return dataclasses.replace(inner(policy, prompts), sampler_logprobs=None)

    trainer = build.trainer(tmp_path, generator=generator, max_steps=1)
    assert "sampler_gap" not in trainer.train()


def test_evaluate_without_prompts_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="evaluate needs held-out prompts; give the trainer an eval_dataset"):
        build.trainer(tmp_path).evaluate()


def test_an_update_that_is_interrupted_leaves_a_folder_to_start_from(tmp_path, monkeypatch):
    trainer = build.trainer(tmp_path, max_steps=3)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.learner, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    where = tmp_path / "interrupted"
    assert AutoTokenizer.from_pretrained(where)("aa").input_ids == tiny.tokenizer()("aa").input_ids
    build.trainer(tmp_path / "again", model=str(where), processing_class=None).train()


def test_minibatches_that_nobody_scored_are_passed_over(tmp_path):
    """Rows of weight 0 are nothing unusual: the others of the step are trained all the same."""

    def judge(completions):
        return [1.0 * len(c) if i % 8 == 0 else None for i, c in enumerate(completions)]

    trainer = build.trainer(tmp_path, algorithm=PPO(minibatches=8, epochs=2, kl_coef=0.0), reward=judge, max_steps=5)
    trainer.train()
    logged = trainer.state.log_history
    assert [row["optimizer_steps"] for row in logged] == [2.0] * 5 and not any(row["skipped_steps"] for row in logged)


@pytest.mark.parametrize("word", ["False", "false", False])
def test_not_resuming_is_not_resuming(word, tmp_path):
    build.trainer(tmp_path, save_steps=1).train()
    with pytest.raises(ConfigError, match="holds a run already"):
        build.trainer(tmp_path, resume_from_checkpoint=word).train()
    with pytest.raises(ConfigError, match="holds a run already"):
        build.trainer(tmp_path).train(resume_from_checkpoint=word)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_an_evaluation_between_step_and_report_leaves_the_steps_figures(tmp_path):
    def judge(completions, log_extra):
        log_extra("size", [len(completions)] * len(completions))
        return [float(len(completions))] * len(completions)

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            trainer.evaluate(tiny.rows(3))

    trainer = build.trainer(
        tmp_path, reward=judge, completions_steps=1, callbacks=[Look()], num_completions_to_print=0
    )
    trainer.train()
    assert {row["size"] for row in lines(tmp_path / "completions.jsonl")} == {8}


def test_a_run_that_ended_by_max_dropped_goes_on_with_a_larger_one(tmp_path):
    settings = dict(reward_on_error="drop", save_steps=1)
    build.trainer(tmp_path, max_dropped=0.1, **settings).train()
    more = dict(max_dropped=0.9, judge_chunks=2, max_steps=3, resume_from_checkpoint="True")
    trainer = build.trainer(tmp_path, **(settings | more))
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_resumed_rank_knows_that_it_is_not_the_main_one(tmp_path, monkeypatch):
    """The state was written by the main process; every rank reads it."""
    build.trainer(tmp_path, save_steps=1).train()
    trainer = build.trainer(tmp_path, save_steps=1, max_steps=3, resume_from_checkpoint="True")
    monkeypatch.setattr(type(trainer.accelerator), "is_main_process", property(lambda self: False))
    monkeypatch.setattr(trainer, "on_main", lambda do: None)
    session.begin(trainer, None)
    assert not trainer.state.is_world_process_zero and not trainer.state.is_local_process_zero


def test_bf16_on_a_machine_without_a_gpu(tmp_path):
    """Whether or not the CPU is asked for by name; a head in fp32, so old log-probs are scored again and agree."""
    trainer = build.trainer(tmp_path, bf16=True, use_cpu=False)
    found = trainer.train()
    assert trainer.run.sampler_gap is None and found["first_log_ratio_max"] < 1e-4
