"""Checkpoints that were damaged, swapped or meant for another run; and what a resumed run must remember."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from hfpg import ConfigError
from hfpg import checkpoint as checkpoint_module
from hfpg.algorithms import PPO, RLOO, TRPO
from hfpg.checkpoint import CheckpointError, checkpoints, damage, undamaged
from hfpg.config import GuardStop
from hfpg.report.recorder import Recorder
from hfpg.sft import fine_tune
from tests import build, tiny


HELD = [{"prompt": "ab"}, {"prompt": "ba"}]
FILES = ("model.safetensors", "optimizer.safetensors", "value_head.safetensors", "config.json", "trainer_state.json")


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.learner.actor.parameters()])


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, and its parameters at the end."""
    folder = tmp_path_factory.mktemp("finished")
    run = build.trainer(folder, max_steps=4, save_steps=1)
    run.train()
    return folder, parameters(run)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", [*FILES, "hfpg_state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, harm, finished, tmp_path, capsys):
    folder, end = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], folder)
    harm(folder / "checkpoint-4" / name)
    run = build.trainer(folder, max_steps=4, save_steps=1)
    run.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(run), end)
    said = capsys.readouterr().out.replace("\n", " ")
    if name != "hfpg_state.json" or harm is not Path.unlink:  # without it the folder is no checkpoint
        assert f"warning: the checkpoint {folder / 'checkpoint-4'} is damaged: {name} " in said
        assert "trying checkpoint-3" in said and (folder / "checkpoint-4.abandoned").is_dir()
    assert damage(folder / "checkpoint-4") is None, "written anew"


def test_a_damaged_checkpoint_that_was_named_is_refused(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    flip(folder / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"checkpoint-2 is damaged: model.safetensors holds other bytes than "):
        build.trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for path in checkpoints(folder):
        cut(path / "optimizer.safetensors")
    with pytest.raises(ConfigError, match="optimizer.safetensors has .* bytes, .* were written; start anew in"):
        build.trainer(folder).train(resume_from_checkpoint=True)


def test_a_run_goes_on_with_the_prompts_and_the_model_that_it_began_with(tmp_path):
    build.trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match=r"train_dataset: '\d+ prompts \(\w+\)' then, '\d+ prompts \(\w+\)' now"):
        build.trainer(tmp_path, train_dataset=tiny.rows()[::-1]).train(resume_from_checkpoint=True)
    other = tiny.model()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(ConfigError, match=r"reference: 'weights \w+' then, 'weights \w+' now"):
        build.trainer(tmp_path, model=other).train(resume_from_checkpoint=True)
    free = dict(max_steps=1, algorithm=RLOO(kl_coef=0.0))
    build.trainer(tmp_path / "free", **free).train()
    free["max_steps"] = 2
    build.trainer(tmp_path / "free", model=other, **free).train(resume_from_checkpoint=True)  # nothing of it is left


def test_an_adapter_goes_on_with_its_own_settings(tmp_path):
    def run(alpha, steps):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["c_attn"], task_type="CAUSAL_LM")
        return build.trainer(tmp_path, peft_config=config, max_steps=steps)

    run(8, 1).train()
    with pytest.raises(ConfigError, match=r"adapter: \{.*then, \{.*'lora_alpha': 16.*now"):
        run(16, 2).train(resume_from_checkpoint=True)


CONFIGS = {
    "embedding": lambda: LoraConfig(r=2, target_modules=["c_attn", "wte"], task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "adalora": lambda: AdaLoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", total_step=9),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_random_start_of_an_adapter_is_no_part_of_what_a_run_began_from(kind, tmp_path):
    def run(seed):
        model = tiny.model("llama" if kind == "loha" else "gpt2")
        torch.manual_seed(seed)
        return build.trainer(tmp_path, model=model, peft_config=CONFIGS[kind](), max_steps=3, save_steps=1)

    whole, again = run(1), run(2)
    assert not torch.equal(parameters(whole), parameters(again))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(whole), parameters(again))


def test_a_reference_may_move_and_a_policy_may_be_passed_again(tmp_path):
    tiny.model().save_pretrained(tmp_path / "ref")
    policy = tiny.model()
    build.trainer(tmp_path / "run", model=policy, ref_model=str(tmp_path / "ref"), max_steps=1).train()
    (tmp_path / "ref").rename(tmp_path / "moved")
    again = build.trainer(tmp_path / "run", model=policy, ref_model=str(tmp_path / "moved"), max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_files_that_a_resumed_run_does_not_read_may_change(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    flip(tmp_path / "run" / "checkpoint-4" / "generation_config.json")
    (tmp_path / "run" / "checkpoint-4" / "tokenizer.json").unlink()
    assert damage(tmp_path / "run" / "checkpoint-4") is None


def test_another_judge_is_allowed_and_said(tmp_path, capsys):
    build.trainer(tmp_path, max_steps=1).train()
    build.trainer(tmp_path, reward=lambda completions: [1.0 * len(c) for c in completions]).train(True)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "note: checkpoint-1 was rewarded by ['count_a'], and from here on by ['<lambda>']" in said


def named(*names, train="rl"):
    """A model with adapters of these names, one of them active."""
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_adapter(train)
    return model


@pytest.mark.parametrize("names", [("rl",), ("default", "rl")], ids=["named", "second"])
def test_an_adapter_with_a_name_is_saved_and_resumed(names, tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    whole = build.trainer(tmp_path / "whole", model=named(*names), max_steps=3, save_steps=1)
    whole.train()
    again = build.trainer(tmp_path / "whole", model=named(*names), max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters(whole), parameters(again))
    folder = whole.save_model(tmp_path / "saved")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    ids = torch.tensor([[3, 4, 5]])
    logits = whole.learner.actor.policy(input_ids=ids).logits
    torch.testing.assert_close(tuned(input_ids=ids).logits, logits, rtol=0, atol=1e-6)
    assert (tuned(input_ids=ids).logits - tiny.model()(input_ids=ids).logits).abs().max() > 1e-4


def test_what_an_adapter_would_not_save_is_not_trained(tmp_path):
    model = named("default", train="default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter.requires_grad or "ln_f" in name
    with pytest.raises(ConfigError, match=r"2 parameters outside of the adapter 'default' require a gradient"):
        build.trainer(tmp_path, model=model)
    model = named("default", "rl")
    model.base_model.set_adapter(["default", "rl"])
    with pytest.raises(ConfigError, match=r"the adapters \['default', 'rl'\] are active together; set one"):
        build.trainer(tmp_path, model=model)


def test_two_runs_are_not_mixed_in_one_folder(tmp_path):
    first, second = build.trainer(tmp_path / "a"), build.trainer(tmp_path / "a")
    first.train()
    with pytest.raises(ConfigError, match="holds a run already"):
        second.train()
    build.trainer(tmp_path / "b", max_steps=3, save_steps=1).train()
    other = str(tmp_path / "b" / "checkpoint-1")
    with pytest.raises(ConfigError, match="holds a run already"):
        build.trainer(tmp_path / "a").train(resume_from_checkpoint=other)
    build.trainer(tmp_path / "c").train(resume_from_checkpoint=other)
    assert [p.name for p in checkpoints(tmp_path / "c")] == ["checkpoint-2"]


def test_no_other_process_trains_in_the_folder_meanwhile(tmp_path):
    other = build.trainer(tmp_path, resume_from_checkpoint="True")

    def judge(completions):
        if not said:
            said.append(1)
            with pytest.raises(ConfigError, match="another process trains in output_dir=.*; wait for its end"):
                other.train()
        return [0.0] * len(completions)

    said = [1]  # not in the dry call
    run = build.trainer(tmp_path, reward=judge)
    said.clear()
    run.train()
    assert said and run.state.global_step == 2
    other.train()  # it resumes, when the first is done
    assert other.state.global_step == 2


def test_patience_is_counted_on(tmp_path):
    def run(steps):
        patience = EarlyStoppingCallback(early_stopping_patience=3)
        same = dict(reward=lambda completions: [0.5] * len(completions), eval_dataset=HELD, eval_steps=1)
        return build.trainer(tmp_path, callbacks=[patience], max_steps=steps, save_steps=1, **same)

    whole = run(9)
    whole.train()
    assert whole.state.global_step == 4
    resumed = run(9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_the_card_of_a_resumed_run_tells_of_the_whole(tmp_path, capsys):
    settings = dict(eval_dataset=HELD, eval_on_start=True, eval_steps=1)
    first = build.trainer(tmp_path, max_steps=2, **settings)
    first.train()
    again = build.trainer(tmp_path, max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    again.evaluate()
    assert again.run.seconds > first.run.seconds
    assert [e["step"] for e in again.evaluations] == [0, 2, 3, 4, 4] and again.evaluations[0] == first.evaluations[0]
    before, after = (again.evaluations[i]["metrics"]["eval_length"] for i in (0, -1))
    assert f"| eval_length | {before:.4g} | {after:.4g} |" in again.model_card()
    again.summary(tmp_path / "final")
    assert "after 4 steps" in capsys.readouterr().out


def test_the_best_model_of_an_abandoned_branch_is_set_aside(tmp_path):
    def run(folder, steps):
        held = dict(eval_dataset=HELD, eval_steps=1, save_steps=1, keep_best_by="eval_scores/watcher")
        judges = dict(reward=[tiny.count_a, watcher], reward_weights=[1.0, 0.0])
        return build.trainer(folder, max_steps=steps, **held, **judges)

    def watcher(completions, trainer_state):
        worth = {1: 1.0, 2: 5.0, 3: 2.0, 4: 9.0}  # a later step of the other branch is no better than its own best
        return [worth.get(trainer_state.global_step, 0.0)] * len(completions)

    run(tmp_path / "a", 4).train()
    best = tmp_path / "a" / "best"
    assert (best / "hfpg_step").read_text() == "4"
    resumed = run(tmp_path / "a", 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert (best / "hfpg_step").read_text() == "3" and resumed.run.watch["best_step"] == 3
    assert (tmp_path / "a" / "best.abandoned" / "hfpg_step").read_text() == "4"
    fresh = run(tmp_path / "b", 3)
    fresh.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert (tmp_path / "b" / "best" / "hfpg_step").read_text() == "3"


@pytest.mark.parametrize("save_steps", [1, 2], ids=["found when saving", "found when sampling"])
def test_a_policy_that_is_broken_is_not_kept(save_steps, tmp_path, capsys):
    run = build.trainer(tmp_path, max_steps=9, save_steps=save_steps, algorithm=PPO(epochs=1, kl_coef=0.05))
    rates = iter([1e-3, 1e-3])
    plain = run.learner.step

    def step():
        now = next(rates, 1e38)
        for group in run.learner.optimizer.param_groups:
            group["lr"] = now
        plain()

    run.learner.step = step
    said = "tokens a log-prob that is not finite" if save_steps == 2 else "weights that are not finite are not saved"
    with pytest.raises(GuardStop, match=f"the policy is broken: .*{said}"):
        run.train()
    kept = [p.name for p in checkpoints(tmp_path)]
    assert kept[-1] == "checkpoint-2"
    assert f"stopped at step 3: it is not saved; checkpoints: {kept}" in capsys.readouterr().out.replace("\n", " ")
    assert all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(tmp_path / kept[-1]).parameters())
    with pytest.raises(ConfigError, match="learning_rate: 0.001 then, 0.0001 now"):
        build.trainer(tmp_path, learning_rate=1e-4, algorithm=PPO(epochs=1)).train(resume_from_checkpoint=True)


def test_how_products_are_made_is_tried_once_in_a_run(tmp_path):
    setup = dict(algorithm=TRPO(), model=tiny.model("lstm"))
    run = build.trainer(tmp_path, max_steps=1, **setup)
    assert run.train()["fisher_exact"] == 1 and run.learner.fisher_trial == 0
    run.run.fisher_trial = run.learner.fisher_trial = 1  # as if it had come out otherwise
    run.saved_step = -1
    run.save_checkpoint()
    again = build.trainer(tmp_path, algorithm=TRPO(), model=tiny.model("lstm"), max_steps=2)
    assert again.train(resume_from_checkpoint=True)["fisher_exact"] == 0


def test_a_disk_that_is_full_while_metrics_are_rewound_takes_nothing_away(tmp_path, monkeypatch):
    run = build.trainer(tmp_path, max_steps=3)
    run.train()
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(self, text, **kwargs):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        Recorder(tmp_path, run.accelerator, "").rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_texts_are_not_learnt_for_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hfpg.sft.Trainer", None)
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; name another"):
        fine_tune(tiny.model(), tiny.tokenizer(), ["aa ba"], output_dir=tmp_path / "file" / "sft")


# ── the edges of going on


def test_a_signal_while_a_checkpoint_is_read_leaves_it_as_it_is(tmp_path, monkeypatch):
    def run():
        return build.trainer(tmp_path, algorithm=RLOO(replay=1, off_policy="token"), save_steps=2)

    run().train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "replay.safetensors" in before
    again = run()

    def stop(*_):
        raise SystemExit(143)

    monkeypatch.setattr(again.replay, "load", stop)
    with pytest.raises(SystemExit):
        again.train(resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before


def test_a_run_that_is_begun_again_after_a_load_that_failed_is_saved(tmp_path, monkeypatch):
    run = build.trainer(tmp_path / "a", save_steps=1)
    run.train()
    again = build.trainer(tmp_path / "b", max_steps=9)
    load = again.replay.load

    def stop(*_):
        raise SystemExit(143)

    monkeypatch.setattr(again.replay, "load", stop)
    with pytest.raises(SystemExit):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    monkeypatch.setattr(again.replay, "load", load)
    again.add_callback(Fails("on_step_end", 4))
    with pytest.raises(OSError, match="the tracker is down"):
        again.train()
    assert (tmp_path / "b" / "checkpoint-4").is_dir()


def test_an_empty_mark_of_the_best_model_is_another_ones(tmp_path):
    settings = dict(eval_dataset=HELD, eval_steps=1, save_steps=1, keep_best_by="eval_scores/count_a")
    build.trainer(tmp_path, **settings).train()
    (tmp_path / "best" / "hfpg_step").write_text("")
    build.trainer(tmp_path, max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert (tmp_path / "best.abandoned").is_dir() and (tmp_path / "best" / "hfpg_step").read_text() == "3"


def test_nothing_is_removed_for_a_resume_that_is_refused(finished, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(finished[0], tmp_path / name)
    with pytest.raises(ConfigError, match="was trained with other settings"):
        build.trainer(tmp_path / "a", learning_rate=1e-2, overwrite_output_dir=True).train(
            resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
        )
    assert (tmp_path / "a" / "checkpoint-4").is_dir() and (tmp_path / "a" / "metrics.jsonl").is_file()


def test_a_link_to_a_checkpoint_of_the_same_folder_is_that_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "a")
    (tmp_path / "latest").symlink_to(tmp_path / "a" / "checkpoint-2")
    run = build.trainer(tmp_path / "a", max_steps=4, save_steps=1, overwrite_output_dir=True)
    run.train(resume_from_checkpoint=str(tmp_path / "latest"))
    assert torch.equal(parameters(run), finished[1]) and (tmp_path / "a" / "checkpoint-1").is_dir()


def kinds(folder):
    """(step, what it is) of every line of metrics.jsonl."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], "evaluation" if "eval_score" in row else "step") for row in rows]


def test_the_evaluation_before_the_first_step_stays_where_there_is_nothing_to_resume(tmp_path):
    for _ in range(2):  # a folder that is new, and one in which a run has died before its first checkpoint
        run = build.trainer(tmp_path, eval_dataset=HELD)
        run.evaluate()
        run.train(resume_from_checkpoint=True)
        assert kinds(tmp_path) == [(0, "evaluation"), (1, "step"), (2, "step")]
        shutil.rmtree(tmp_path / "checkpoint-2")


class Fails(TrainerCallback):
    """Raises at one event of one step, once."""

    def __init__(self, event, step):
        setattr(self, event, self.fail)
        self.step, self.done = step, False

    def fail(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.done:
            self.done = True
            raise OSError("the tracker is down")


class EndsEpoch(TrainerCallback):
    """Goes on with the next epoch at step 2."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2


class Tracker(Recorder):
    """Its tracker fails at step 2, behind the line in the file."""

    def metrics(self, step, values):
        super().metrics(step, values)
        if step == 2:
            raise OSError("the tracker is down")


@pytest.mark.parametrize("event", ["on_step_end", "on_log", None])
def test_a_step_whose_callback_or_tracker_fails_is_written_down_and_is_over(event, tmp_path):
    settings = dict(max_steps=4, completions_steps=1)
    whole = build.trainer(tmp_path / "whole", callbacks=[EndsEpoch()], **settings)
    whole.train()
    failed = build.trainer(
        tmp_path / "run", callbacks=[EndsEpoch(), *([Fails(event, 2)] if event else [])], **settings
    )
    if event is None:
        failed.recorder.__class__ = Tracker
    with pytest.raises(OSError, match="the tracker is down"):
        failed.train()
    again = build.trainer(tmp_path / "run", callbacks=[EndsEpoch()], **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert [step for step, _ in kinds(tmp_path / "run")] == [1, 2, 3, 4]
    assert [row["step"] for row in again.state.log_history] == [1, 2, 3, 4]
    texts = [(tmp_path / name / "completions.jsonl").read_text() for name in ("run", "whole")]
    assert texts[0] == texts[1]


def test_a_step_that_cannot_be_written_down_is_saved_all_the_same(tmp_path, monkeypatch, capsys):
    run = build.trainer(tmp_path)
    monkeypatch.setattr("hfpg.trainer.describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert (tmp_path / "checkpoint-1").is_dir() and "step 1 could not be written down" in capsys.readouterr().out


def full_disk(monkeypatch, folder, times):
    """The next checkpoints in a folder fail."""
    plain, left = checkpoint_module.save_actor_critic, [times]

    def save(actor, where):
        if where.parent == folder and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        plain(actor, where)

    monkeypatch.setattr(checkpoint_module, "save_actor_critic", save)


def test_a_checkpoint_that_cannot_take_its_place_is_one_that_could_not_be_written(tmp_path, monkeypatch):
    """The run tries again at the next step."""
    plain, left = checkpoint_module.replace_folder, [1]

    def replace(whole, target):
        if left and left.pop():
            raise OSError(5, "Input/output error")
        plain(whole, target)

    monkeypatch.setattr(checkpoint_module, "replace_folder", replace)
    build.trainer(tmp_path, max_steps=3, save_steps=1).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, tmp_path, 2)
    build.trainer(tmp_path, max_steps=5, save_steps=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("is not saved, the next one may be") == 2


def test_a_disk_that_stays_full_ends_it_and_the_run_goes_on_from_another_place(tmp_path, monkeypatch, capsys):
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    full_disk(monkeypatch, tmp_path / "run", 99)
    plain = Path.open

    def too_full(path, mode="r", *args, **kwargs):  # for lines, too
        if path == tmp_path / "run" / "metrics.jsonl" and mode == "a":
            raise OSError(28, "No space left on device")
        return plain(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", too_full)
    settings = dict(max_steps=6, save_steps=1)
    with pytest.raises(CheckpointError, match="No space left"):
        build.trainer(tmp_path / "run", **settings).train()
    saved = next(place.glob("hfpg-*/checkpoint-3"))
    assert list(place.iterdir()) == [saved.parent]
    assert [step for step, _ in kinds(saved.parent)] == [1, 2, 3]
    assert "saved in another place" in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    again, whole = (build.trainer(tmp_path / name, **settings) for name in ("again", "whole"))
    again.train(resume_from_checkpoint=str(saved))
    whole.train()
    assert torch.equal(parameters(again), parameters(whole))


def test_lines_that_cannot_be_written_wait(tmp_path, monkeypatch):
    plain, left = Path.open, [0]  # the second and the third time that lines are added fail

    def full(path, mode="r", *args, **kwargs):
        file = plain(path, mode, *args, **kwargs)
        if path.name != "metrics.jsonl" or mode != "a":
            return file
        left[0] += 1
        if not 2 <= left[0] <= 3:
            return file
        file.write('{"step": ')  # and half a line is there
        file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    run = build.trainer(tmp_path, max_steps=5)
    run.train()
    assert [step for step, _ in kinds(tmp_path)] == [1, 2, 3, 4, 5] and not run.recorder.waiting


def test_a_folder_that_is_cleared_away_is_made_again(tmp_path):
    class Clears(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                shutil.rmtree(tmp_path / "run")

    build.trainer(tmp_path / "run", max_steps=3, callbacks=[Clears]).train()
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert [step for step, _ in kinds(tmp_path / "run")] == [2, 3]


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    newest = max(folder.glob("checkpoint-*"))
    plain = Path.open

    def broken(path, *args, **kwargs):
        if newest.name in str(path) and path.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    found = undamaged(newest, False, print)
    assert found != newest and "Input/output error" in capsys.readouterr().out


def test_a_run_that_its_evaluations_have_ended_stays_ended(tmp_path, capsys):
    def run(patience):
        same = dict(reward=lambda completions: [0.5] * len(completions), eval_dataset=HELD, eval_steps=1)
        return build.trainer(tmp_path, callbacks=[EarlyStoppingCallback(patience)], max_steps=9, save_steps=1, **same)

    ended = run(2)
    ended.train()
    for patience, steps in ((2, ended.state.global_step), (4, ended.state.global_step + 2)):
        again = run(patience)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == steps
    assert f"ended at step {ended.state.global_step}, by EarlyStoppingCallback(2); a larger one goes on" in (
        capsys.readouterr().out.replace("\n", " ")
    )


def test_a_run_that_its_gold_judge_has_ended_stays_ended(tmp_path, capsys):
    settings = dict(eval_dataset=HELD, eval_steps=1, save_steps=1, keep_best_by="eval_scores/count_a")
    build.trainer(tmp_path, max_steps=1, **settings).train()
    for limit, steps in ((2, 1), (3, 2)):
        run = build.trainer(tmp_path, stop_overoptimized=limit, **settings)
        load = run.replay.load  # the last to be loaded

        def fallen(*given, of=run, then=load):
            of.run.watch["falling"] = 2
            return then(*given)

        run.replay.load = fallen
        run.train(resume_from_checkpoint=True)
        assert run.state.global_step == steps
    assert "ended at step 1, by stop_overoptimized=2; a larger one goes on" in capsys.readouterr().out


def test_a_judge_may_change_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def wanders(completions):
        os.chdir(tmp_path / "elsewhere")
        return tiny.count_a(completions)

    run = build.trainer("runs/r", reward=wanders, save_steps=1)
    run.train()
    assert sorted(p.name for p in (tmp_path / "runs" / "r").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_card_of_a_run_that_was_at_its_end_has_its_results(tmp_path):
    settings = dict(eval_dataset=HELD, eval_on_start=True, eval_steps=1)
    whole = build.trainer(tmp_path, **settings)
    whole.train()
    again = build.trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    results = [run.model_card().split("## Results")[1].split("## ")[0] for run in (whole, again)]
    assert results[0] == results[1]


def test_a_metric_of_a_judge_may_be_called_like_one_of_an_evaluation(tmp_path):
    run = build.trainer(tmp_path, max_steps=1)
    for values in ({"score": 1.0, "logged/eval_time": 2.0}, {"eval_score": 1.0}):
        run.recorder.metrics(1, values)
    run.recorder.rewind(1, evaluation=True)
    assert kinds(tmp_path) == [(1, "step")]


def test_a_method_with_a_function_among_its_settings_can_be_resumed(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shaped(RLOO):
        shape: object = None

    for steps in (1, 2):
        build.trainer(tmp_path, algorithm=Shaped(shape=lambda x: x), max_steps=steps).train(
            resume_from_checkpoint=True
        )
    assert [step for step, _ in kinds(tmp_path)] == [1, 2]


def test_another_length_of_a_run_whose_rate_falls_is_said(finished, tmp_path, capsys):
    for kind, said in (("linear", True), ("constant", False)):
        folder = tmp_path / kind
        build.trainer(folder, max_steps=1, lr_scheduler_type=kind).train()
        build.trainer(folder, max_steps=2, lr_scheduler_type=kind).train(resume_from_checkpoint=True)
        assert ("note: max_steps was 1 and is 2: the linear" in capsys.readouterr().out.replace("\n", " ")) == said
