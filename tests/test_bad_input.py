"""Wrong input gets one clear sentence before any work is lost: the value seen, the rule broken, a value that works."""

import dataclasses
import signal
import sys
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, TrainerCallback, TrainingArguments

from hfpg import ConfigError, PolicyGradientTrainer, TrainConfig
from hfpg.algorithms import PPO, Reinforce, ReMax
from hfpg.distributed import launch
from hfpg.generation.hf import HFGenerator
from tests import build, tiny


def no_loading(monkeypatch):
    """Fail if the policy's weights are touched: these refusals must come before."""

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded before the bad input was found")

    monkeypatch.setattr("hfpg.trainer.load_policy", refuse)


CASES = {
    "batch": (
        dict(algorithm=PPO(minibatches=3, num_generations=4)),
        r"minibatches=3 does not divide the 32 rollouts of a step \(8 prompts × 4 samples\); try 2 or 4",
    ),
    "small data": (
        dict(train_dataset=tiny.rows(5)),
        "the data set has 5 prompts and a step takes prompts_per_step=8; set it to 5 or less",
    ),
    "empty data": (dict(train_dataset=[]), "the data set is empty"),
    "empty prompt": (
        dict(train_dataset=[{"prompt": "aa"}, {"prompt": " "}, {"prompt": None}] * 4),
        r"8 prompts are empty or missing \(rows \[1, 2, 4\], counted from 0\)",
    ),
    "no prompt column": (
        dict(train_dataset=[{"prompts_": "aa"}] * 9),
        r"no column 'prompt'; it has \['prompts_'\]; did you mean 'prompts_'\?",
    ),
    "too long": (
        dict(train_dataset=[{"prompt": "aa " * 95}] * 9),
        r"9 prompts have more than 90 tokens \(rows \[0, 1, 2\], counted from 0; the longest has 95\)",
    ),
    "no room": (
        dict(max_completion_length=96),
        "max_completion_length=96 leaves no room for a prompt in the 96 tokens .*choose a shorter one, such as 48",
    ),
    "all dropped": (
        dict(train_dataset=[{"prompt": "aa " * 95}] * 9, overlong_prompts="drop"),
        "9 prompts have more than 90 tokens .* overlong_prompts='drop' leaves none; use 'truncate', or a smaller",
    ),
    "reward length": (
        dict(reward=lambda completions, **k: [1.0]),
        "returned 1 scores for 2 completions",
    ),
    "reward nan": (
        dict(reward=lambda completions, **k: [float("nan")] * len(completions)),
        r"returned nan for sample 0 .* a score is a finite number, or None.*in a dry call on 2 rows, before training",
    ),
    "reward signature": (
        dict(reward=lambda completions, label: [0.0] * len(completions)),
        r"does not fit: missing a required argument: 'label'; it is called with .* columns are \['number'\]",
    ),
    "reward raises": (
        dict(reward=lambda completions, **k: 1 / 0),
        "raised ZeroDivisionError: division by zero .in a dry call",
    ),
    "reward exits": (
        dict(reward=lambda completions, **k: sys.exit("bye")),
        "reward function .* raised SystemExit: bye .in a dry call",
    ),
    "reward name": (dict(reward="no_such_file.py:judge"), "there is no file no_such_file.py"),
    "reward model": (dict(reward="no/such-classifier"), "cannot load the reward model 'no/such-classifier'"),
    "weights": (dict(reward_weights=[1.0, 2.0]), "reward_weights has 2 entries for 1 reward functions"),
    "hub without name": (dict(push_to_hub=True), "push_to_hub=True needs hub_model_id, such as 'me/gpt2-positive'"),
    "evaluation without prompts": (dict(eval_steps=2), "eval_steps need held-out prompts; give an eval_dataset"),
    "tracker": (dict(report_to=["no_such_tracker"]), "report_to='no_such_tracker': that tracker is not installed"),
    "schedule": (dict(lr_scheduler_type="foo"), "lr_scheduler_type='foo' is unknown; choose from"),
    "adam": (dict(adam_beta1=1.5), "adam_beta1=1.5 must be at least 0 and below 1"),
    "no folder": (dict(output_dir=""), "output_dir='' is no folder; name one, such as 'runs/mine'"),
    "threads": (dict(torch_threads=-1), "torch_threads=-1 must be at least 1"),
    "only watchers": (dict(reward_weights=[0.0]), "leaves no function that scores"),
    "temperature": (dict(temperature=0.0), "a policy gradient needs a random policy"),
    "algorithm's name": (
        dict(algorithm="rloo"),
        r"algorithm='rloo' is no instance of a method; .* such as RLOO\(\) from",
    ),
    "algorithm's class": (
        dict(algorithm=PPO),
        r"algorithm=<class .*PPO'> is no instance .*, such as PPO\(\) from hfpg",
    ),
    "model of another kind": (dict(model=3), "model=3 is no model; give a Hub id such as 'gpt2', a folder"),
    "reference of another kind": (dict(ref_model={"a": 1}), "ref_model={'a': 1} is no model; give a Hub id"),
    "callback of another kind": (dict(callbacks=[3]), "callbacks has 3, which is no transformers.TrainerCallback"),
    "callbacks that are no list": (dict(callbacks=TrainerCallback), "callbacks=<class .*> is no list; give one, such"),
    "peft dict": (dict(peft_config={"r": 4}), r"peft_config={'r': 4} is a dict; give a peft.LoraConfig, such as"),
    "generator of another kind": (dict(generator=3), r"generator=3 cannot be called; give a function of \(policy"),
    "not a tokenizer": (dict(processing_class=object()), "processing_class is a object; hfpg trains text models"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_sentence_before_the_model_loads(name, tmp_path, monkeypatch):
    settings, message = CASES[name]
    no_loading(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        build.trainer(tmp_path / "run", **settings)


def test_a_method_of_ones_own_without_its_settings(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine:
        kl_coef: float = 0.0

        def init(self, *_): ...

        rewards = estimate = update = init

    with pytest.raises(ConfigError, match=r"the algorithm Mine has no num_generations, value; a method says how many"):
        build.trainer(tmp_path / "run", algorithm=Mine())


@pytest.mark.parametrize("args", [{}, TrainingArguments(output_dir="run")], ids=["dict", "transformers"])
def test_settings_of_another_kind(args):
    with pytest.raises(ConfigError, match=f"args is a {type(args).__name__}; give a hfpg.TrainConfig"):
        PolicyGradientTrainer(tiny.model(), PPO(), tiny.count_a, tiny.rows(), args=args)


def test_a_model_that_is_forgotten(tmp_path):
    with pytest.raises(ConfigError, match="model=None is no model; give a Hub id"):
        PolicyGradientTrainer(None, PPO(), tiny.count_a, tiny.rows())


def test_a_folder_as_a_path_is_a_model(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    assert build.trainer(tmp_path / "run", model=tmp_path / "model").model_name == str(tmp_path / "model")


@pytest.mark.parametrize("first", [False, True])
def test_a_second_precision_in_one_process(first, tmp_path):
    """Accelerate would raise for bf16 after fp32, and compute in bf16 after bf16 whatever is asked for."""
    launch(TrainConfig(use_cpu=True, bf16=first))
    with pytest.raises(ConfigError, match=f"an earlier one in this process had .* use bf16={first} here too"):
        build.trainer(tmp_path, bf16=not first)


def test_a_signal_in_a_reward_function_is_not_its_own_exit(tmp_path):
    """SIGTERM ends the run as it ends any program, saved; see hfpg/interrupt.py."""
    trainer = build.trainer(tmp_path, reward=lambda completions, **k: [0.0] * len(completions))
    trainer.judge.functions[0] = dataclasses.replace(
        trainer.judge.functions[0], call=lambda **k: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGTERM


def test_a_model_that_is_not_causal(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ConfigError, match="BertLMHeadModel is not causal"):
        build.trainer(tmp_path, model=BertLMHeadModel(config))


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(
        ConfigError, match="cannot load the model 'no/such'.*a Hub id such as 'gpt2' or a local folder"
    ):
        build.trainer(tmp_path, model="no/such")


def test_a_stop_token_that_the_model_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match=r"stop_token_ids has \[9999\]; the model's tokens are 0 to 63"):
        build.trainer(tmp_path, stop_token_ids=[0, 9999])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_half_precision_are_not_trained(dtype, tmp_path):
    with pytest.raises(ConfigError, match="the parameters to train are b?float16.* dtype=torch.float32"):
        build.trainer(tmp_path, model=tiny.model().to(dtype))


def test_a_reference_that_nobody_asks(tmp_path):
    with pytest.raises(ConfigError, match="ref_model is given, but kl_coef=0"):
        build.trainer(tmp_path, algorithm=PPO(kl_coef=0.0), ref_model=tiny.model())


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    with pytest.raises(ConfigError, match="the tokenizer has 64 tokens and the model 50 embeddings"):
        build.trainer(tmp_path, model=tiny.model(vocabulary=50))


def test_an_occupied_output_folder_is_not_written_over(tmp_path):
    build.trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match="holds a run already; continue it with resume_from_checkpoint=True"):
        build.trainer(tmp_path).train()
    assert (tmp_path / "checkpoint-1").is_dir()
    (tmp_path / "precious.txt").write_text("mine")
    build.trainer(tmp_path, overwrite_output_dir=True, max_steps=3, save_steps=2)
    assert (tmp_path / "checkpoint-1").exists(), "what is removed is removed when training begins"
    build.trainer(tmp_path, overwrite_output_dir=True, max_steps=3, save_steps=2).train()
    assert not (tmp_path / "checkpoint-1").exists() and (tmp_path / "precious.txt").exists()


@pytest.mark.parametrize(
    "settings",
    [
        dict(trainable_layers=9),
        dict(generation_kwargs={"num_beams": 2}),
        dict(stop_token_ids=[99]),
        dict(resume_from_checkpoint="nowhere"),
    ],
    ids=str,
)
def test_a_refused_run_leaves_no_folder_and_removes_no_run(settings, tmp_path):
    with pytest.raises(ConfigError):
        build.trainer(tmp_path / "runs" / "new", **settings)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "old" / "final").mkdir(parents=True)
    with pytest.raises(ConfigError):
        build.trainer(tmp_path / "old", overwrite_output_dir=True, **settings)
    assert (tmp_path / "old" / "final").is_dir()


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="output_dir='.*run' is a link to nothing; remove it, or name a folder"):
        build.trainer(tmp_path / "run")


def test_the_newest_checkpoint_of_no_folder(tmp_path, monkeypatch):
    """It would train from the start, in a new folder."""
    monkeypatch.chdir(tmp_path)
    message = "resume_from_checkpoint=True goes on from the newest checkpoint of output_dir, and none is given"
    with pytest.raises(ConfigError, match=message):
        build.trainer(None, output_dir=None, resume_from_checkpoint="True")
    assert not (tmp_path / "runs").exists()
    trainer = build.trainer(None, output_dir=None, max_steps=1)
    with pytest.raises(ConfigError, match=message):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        build.trainer(tmp_path / "run")


def test_a_checkpoint_that_is_none_lists_what_there_is(tmp_path):
    build.trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match=r"is no hfpg checkpoint .* has \['checkpoint-1'\]"):
        build.trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "nothing"))


@pytest.mark.parametrize("tokenizer", [{}, {"padding_side": "right"}, {"pad_token": "<eos>"}], ids=str)
def test_any_padding_of_the_tokenizer_gives_the_same_run(tokenizer, tmp_path):
    """No pad token, right padding, pad = EOS: masks come from positions, and the tokenizer is left as it was."""
    made = tiny.tokenizer(**tokenizer)
    side = made.padding_side
    trainer = build.trainer(tmp_path / "a", processing_class=made)
    reference = build.trainer(tmp_path / "b", processing_class=tiny.tokenizer(padding_side="left"))
    for one in (trainer, reference):
        one.train()
    a, b = ([p.detach() for p in t.learner.actor.parameters()] for t in (trainer, reference))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert made.padding_side == side


def test_every_completion_of_one_token_and_never_an_eos(tmp_path):
    """Both ends of the lengths are finite: completions of one token, and none that ends by itself."""
    one = build.trainer(tmp_path / "one", max_completion_length=1).train()
    never = build.trainer(tmp_path / "never", stop_token_ids=[], algorithm=Reinforce(baseline="value")).train()
    assert one["length"] == 1 and never["finished"] == 0
    assert all(v == v for metrics in (one, never) for v in metrics.values())


# ── what a generator returns

SAMPLES: dict[str, tuple[Any, str]] = {
    "a mask that begins later": (
        lambda s: dict(completion_mask=torch.cat([~s.completion_mask[:, :1], s.completion_mask[:, :-1]], 1)),
        r"generator own returned \d+ of 8 completions, rows .*, whose completion_mask is False in the first column",
    ),
    "an empty completion": (
        lambda s: dict(completion_mask=s.completion_mask & (torch.arange(8) != 3)[:, None]),
        r"1 of 8 completions, rows \[3\], .*; a completion begins there and has at least one token, its stop token",
    ),
    "no column at all": (
        lambda s: dict(completion_ids=s.completion_ids[:, :0], completion_mask=s.completion_mask[:, :0]),
        "8 of 8 completions, rows",
    ),
    "a mask of numbers": (
        lambda s: dict(completion_mask=s.completion_mask.long()),
        r"with a torch.int64 completion_mask of shape \(8, \d\); masks are bool, and they",
    ),
    "a mask of another width": (
        lambda s: dict(completion_mask=torch.cat([s.completion_mask, s.completion_mask], 1)),
        r"masks are bool, and they and sampler_logprobs have the shape of the ids",
    ),
    "log-probs of another width": (
        lambda s: dict(sampler_logprobs=torch.zeros(8, 1)),
        r"masks are bool, and they and sampler_logprobs have the shape of the ids",
    ),
    "another order": (lambda s: dict(sample_ids=s.sample_ids.flip(0)), "return one sample per row of the prompts"),
    "other groups": (lambda s: dict(group_ids=0 * s.group_ids), "with their sample_ids and group_ids"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_that_break_the_contract_are_one_sentence(name, tmp_path):
    change, message = SAMPLES[name]

    def own(policy, prompts):
        samples = HFGenerator(tiny.tokenizer(), seed=0, max_completion_length=6, stop_token_ids=[])(policy, prompts)
        samples = dataclasses.replace(samples, completion_mask=samples.completion_mask & (torch.arange(6) < 4))
        samples = dataclasses.replace(samples, sampler_logprobs=None, sampler_entropy=None)
        for field, value in change(samples).items():
            object.__setattr__(samples, field, value)  # shapes of a new one are checked here, but not in use
        return samples

    trainer = build.trainer(tmp_path, generator=own, eval_dataset=tiny.rows(8))
    for verb in (trainer.collect, trainer.evaluate):
        with pytest.raises(ConfigError, match=message):
            verb()


def test_greedy_samples_are_looked_at_too(tmp_path):
    class Own:
        def __init__(self):
            self.inner = HFGenerator(tiny.tokenizer(), seed=0, max_completion_length=6)

        def __call__(self, policy, prompts):
            return self.inner(policy, prompts)

        def greedy(self, policy, prompts):
            samples = self.inner.greedy(policy, prompts)
            return dataclasses.replace(samples, completion_mask=torch.zeros_like(samples.completion_mask))

    with pytest.raises(ConfigError, match="generator Own returned 8 of 8 completions"):
        build.trainer(tmp_path, generator=Own(), algorithm=ReMax()).collect()


def test_a_folder_without_a_tokenizer_is_not_the_data_sets_fault(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="has no tokenizer .transformers makes an empty"):
        build.trainer(tmp_path / "run", model=str(tmp_path / "m"), processing_class=None)


@pytest.mark.parametrize(
    ("name", "said"), [("tokenizer.json", "the tokenizer of"), ("model.safetensors", "the model")]
)
def test_a_file_that_was_copied_half_is_one_sentence(tmp_path, name, said):
    tiny.model().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    whole = (tmp_path / "m" / name).read_bytes()
    (tmp_path / "m" / name).write_bytes(b"{}" if name == "tokenizer.json" else whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=f"cannot load {said}"):
        build.trainer(tmp_path / "run", model=str(tmp_path / "m"), processing_class=None)


def test_a_model_that_ends_texts_at_no_token_of_its_own_is_refused(tmp_path):
    model = tiny.model()
    model.generation_config.eos_token_id = [50256]
    with pytest.raises(ConfigError, match=r"ends texts at \[50256\], and its tokens are 0 to 63; say where.*\[0\]"):
        build.trainer(tmp_path, model=model)
    build.trainer(tmp_path, model=model, stop_token_ids=[0])
