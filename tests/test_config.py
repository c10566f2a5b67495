"""Settings: YAML first, then flags; every wrong one is named with the rule and a value that works."""

import ast
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml

import hfpg
from hfpg.algorithms import PPO, PRESETS, RLOO
from hfpg.checkpoint import MAY_CHANGE
from hfpg.config import ConfigError, TrainConfig, field, parse
from hfpg.generation.hf import HARMLESS_OPTIONS


@dataclasses.dataclass(kw_only=True)
class Script:
    """Arguments of a script: one that must be given, and one list of numbers."""

    model: str = dataclasses.field(metadata={"help": "The model."})
    betas: list[float] = field([], "Numbers.")


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(folder: Path, text: str | bytes, *flags: str) -> TrainConfig:
    """TrainConfig from a YAML text and flags."""
    return parse((TrainConfig,), ["--config", write(folder, text), *flags])[0]


def refusal(folder: Path, text: str | bytes, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *flags)
    return str(caught.value)


# ── values


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path):
    config = read(tmp_path, "max_steps: 7\nseed: 3\n", "--seed", "5", "--run_name=x")
    assert (config.max_steps, config.seed, config.run_name) == (7, 5, "x")
    assert config.prompts_per_step == TrainConfig().prompts_per_step


def test_several_classes_share_one_namespace(tmp_path: Path):
    path = write(tmp_path, "clip_range: 0.1\nmax_steps: 4\nbetas: [-1.5, 2]\nmodel: gpt2\n")
    script, ppo, config = parse((Script, PPO, TrainConfig), ["--config", path, "--kl_coef", "0"])
    assert (ppo.clip_range, ppo.kl_coef, config.max_steps, script.betas) == (0.1, 0.0, 4, [-1.5, 2.0])
    assert script.model == "gpt2"  # a field without a default may stand in the file


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1.0e-05", "'1e-5'"])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str):
    """YAML 1.1 takes 1e-5 for a string."""
    assert read(tmp_path, f"learning_rate: {text}\n").learning_rate == 1e-5


@pytest.mark.parametrize(("text", "value"), [("true", True), ("no", False), ("'yes'", True), ("0", False)])
def test_booleans(tmp_path: Path, text: str, value: bool):
    assert read(tmp_path, f"bf16: {text}\n").bf16 is value


def test_a_boolean_flag_may_stand_alone():
    assert parse((TrainConfig,), ["--disable_tqdm"])[0].disable_tqdm is True
    assert parse((TrainConfig,), ["--disable_tqdm", "false"])[0].disable_tqdm is False


def test_null_is_the_default_and_one_value_is_a_list_of_one(tmp_path: Path):
    config = read(tmp_path, "output_dir: null\nreport_to: tensorboard\nstop_token_ids: [3, 5]\n")
    assert config.output_dir is None and config.report_to == ["tensorboard"] and config.stop_token_ids == [3, 5]


@pytest.mark.parametrize("text", ["['--', '-end']", "['=', 'a b', ' ']"])
def test_strings_in_a_list_stay_as_written(tmp_path: Path, text: str):
    """Also those that look like flags: `--` ends many a signature."""
    assert read(tmp_path, f"stop_strings: {text}\n").stop_strings == ast.literal_eval(text)


@pytest.mark.parametrize("text", ["--x", "a=b", "-1", "two words"])
def test_a_string_stays_as_written(tmp_path: Path, text: str):
    assert read(tmp_path, f"run_name: '{text}'\n").run_name == text


def test_a_mapping_field_is_yaml_in_the_file_and_json_as_a_flag(tmp_path: Path):
    assert read(tmp_path, "generation_kwargs: {use_cache: true}\n").generation_kwargs == {"use_cache": True}
    config = parse((TrainConfig,), ["--generation_kwargs", '{"use_cache": false}'])[0]
    assert config.generation_kwargs == {"use_cache": False}


def test_defaults_are_not_shared():
    one, other = TrainConfig(), TrainConfig()
    one.report_to.append("wandb")
    assert other.report_to == ["none"]


def test_to_dict_gives_back_the_same_config():
    config = TrainConfig(max_steps=3, stop_strings=["x"])
    assert TrainConfig(**config.to_dict()) == config


# ── refusals


def test_all_unknown_keys_are_named_at_once_with_line_and_nearest(tmp_path: Path):
    message = refusal(tmp_path, "seed: 1\nlearning_rat: 1\n\nzzz: 2\n")
    path = tmp_path / "run.yaml"
    assert message.splitlines() == [
        f"{path}:2: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        f"{path}:4: unknown key 'zzz'",
    ]


def test_all_unknown_flags_are_named_at_once_with_nearest():
    with pytest.raises(ConfigError) as caught:
        parse((TrainConfig,), ["--learning_rat", "0.1", "--seeed=3"])
    assert str(caught.value).splitlines() == [
        "unknown flag '--learning_rat'; did you mean '--learning_rate'?",
        "unknown flag '--seeed=3'; did you mean '--seed'?",
    ]
    with pytest.raises(ConfigError, match="unknown flag '--learn'"):  # no abbreviations: they break with new fields
        parse((TrainConfig,), ["--learn", "0.1"])


def test_a_key_that_stands_twice(tmp_path: Path):
    message = refusal(tmp_path, "seed: 1\nmax_steps: 3\nseed: 2\n")
    assert message == f"{tmp_path / 'run.yaml'}:3: key 'seed' stands twice; keep one"


@pytest.mark.parametrize("text", ["- seed\n- 1\n", "seed\n", "", "# nothing\n"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str):
    assert f"{tmp_path / 'run.yaml'}:1: expected lines of the form `key: value`, found" in refusal(tmp_path, text)


def test_a_file_that_is_no_yaml_names_the_line(tmp_path: Path):
    assert f"{tmp_path / 'run.yaml'}:2: not valid YAML: " in refusal(tmp_path, "seed: 1\n\tmax_steps: 3\n")


@pytest.mark.parametrize(
    "text",
    [
        b"run_name: \xe9\n",  # Latin-1
        b"run_name: 'a\x00b'\n",  # a control character
        b"seed: !!python/object:os.system {}\n",
        b"? [a, b]\n: 1\n",
        b"run_name: 2024-13-45\n",  # looks like a date
    ],
    ids=["bytes", "control", "tag", "list-key", "date"],
)
def test_whatever_stands_in_the_file_the_answer_names_it(tmp_path: Path, text: bytes):
    try:
        assert read(tmp_path, text).run_name == "2024-13-45"
    except ConfigError as error:
        assert "run.yaml" in str(error)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read the config file .*no.yaml: No such file"):
        parse((TrainConfig,), ["--config", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: abc", ["learning_rate", "float", "abc"]),
        ("max_steps: 1.5", ["max_steps", "int", "1.5"]),
        ("bf16: maybe", ["bf16", "maybe"]),
        ("overlong_prompts: cut", ["overlong_prompts", "cut", "truncate", "drop"]),
        ("generation_kwargs: 3", ["generation_kwargs", "3"]),
        ("max_steps: [1, 2]", ["max_steps"]),
        ("stop_strings: [[a]]", ["stop_strings", "expected one value", "['a']"]),
    ],
)
def test_a_value_of_the_wrong_type_names_the_field(tmp_path: Path, text: str, words: list[str]):
    message = refusal(tmp_path, text + "\n")
    assert all(word in message for word in words), message


def test_a_number_below_the_least_of_its_field_is_refused(tmp_path: Path):
    @dataclasses.dataclass
    class Least:
        texts: int = field(8, "Texts.", least=1)
        epochs: float = field(2.0, "Passes.", least=0)

    (settings,) = parse((Least,), ["--texts", "1", "--epochs", "0"])
    assert (settings.texts, settings.epochs) == (1, 0.0)
    with pytest.raises(ConfigError, match="texts=0 must be at least 1, such as 8"):
        parse((Least,), ["--texts", "0"])
    with pytest.raises(ConfigError, match=r"epochs=-0.5 must be at least 0, such as 2.0"):
        parse((Least,), ["--config", write(tmp_path, "epochs: -0.5")])


def test_a_flag_of_the_wrong_type_names_the_field():
    with pytest.raises(ConfigError, match="argument --seed.*'x'"):
        parse((TrainConfig,), ["--seed", "x"])
    with pytest.raises(ConfigError, match="argument --generation_kwargs.*{'a'"):
        parse((TrainConfig,), ["--generation_kwargs", "{'a': 1}"])


def test_a_field_that_two_classes_share_is_refused():
    @dataclasses.dataclass
    class Other:
        seed: int = 0

    with pytest.raises(ConfigError, match="field 'seed' stands in .*TrainConfig.* and in .*Other"):
        parse((TrainConfig, Other), [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"prompts_per_step": 0}, "prompts_per_step=0 must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
        ({"max_tokens_per_micro_batch": -1}, "max_tokens_per_micro_batch=-1 must be at least 1"),
        (
            {"temperature": 0.0},
            "temperature=0.0: a policy gradient needs a random policy; use a value above 0, like 1.0",
        ),
        ({"temperature": float("nan")}, "temperature=nan: a policy gradient needs a random policy"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1 (1: no cut)"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1 (1: no cut)"),
        ({"top_k": -1}, "top_k=-1 must be 0 (no cut) or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0, such as 1.0"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05 must be finite and not negative"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be finite and not negative, such as 1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be finite and not negative, such as 1e-05"),
        (
            {"value_learning_rate": float("inf")},
            "value_learning_rate=inf must be finite and not negative, such as 1e-05",
        ),
        ({"adam_epsilon": -1.0}, "adam_epsilon=-1.0 must be finite and not negative, such as 1e-08"),
        ({"weight_decay": -1}, "weight_decay=-1 must be finite and not negative, such as 0.01"),
        ({"temperature": float("inf")}, "temperature=inf: a policy gradient needs a random policy"),
        ({"reward_weights": [1.0, float("nan")]}, "reward_weights=[1.0, nan] must be finite, such as 1.0"),
        ({"num_completions_to_print": -1}, "num_completions_to_print=-1 must be 0 (off) or more"),
        ({"stop_strings": ""}, "stop_strings=['']: an empty text ends nothing; leave it out"),
        ({"logging_steps": 0}, "logging_steps=0 must be at least 1"),
        ({"eval_steps": -1}, "eval_steps=-1 must be 0 (off) or more"),
        ({"save_steps": -1}, "save_steps=-1 must be 0 (off) or more"),
        ({"completions_steps": -1}, "completions_steps=-1 must be 0 (off) or more"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 (off) or more"),
        ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1, or absent to keep all"),
        ({"push_to_hub": True}, "push_to_hub=True needs hub_model_id, such as 'me/gpt2-positive'"),
        (
            {"hub_license": "Apache 2.0"},
            "hub_license='Apache 2.0' is no identifier of a license; write it as the Hub does",
        ),
        ({"hub_dataset": "a/b/c"}, "hub_dataset='a/b/c' is no name of a data set of the Hub, such as"),
    ],
)
def test_a_setting_that_cannot_be_says_why(changes: dict, sentence: str):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**changes)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("cls", "changes", "sentence"),
    [
        (TrainConfig, {"learning_rate": "1e-5"}, "learning_rate='1e-5' is a str; it must be a number, such as 1e-05"),
        (TrainConfig, {"max_steps": "5"}, "max_steps='5' is a str; it must be a whole number, such as 5"),
        (TrainConfig, {"max_steps": 8.0}, "max_steps=8.0 is a float; it must be a whole number, such as 8"),
        (TrainConfig, {"max_steps": True}, "max_steps=True is a bool; it must be a whole number, such as 100"),
        (TrainConfig, {"bf16": "no"}, "bf16='no' is a str; it must be True or False, such as False"),
        (
            TrainConfig,
            {"reward_weights": 1.0},
            "reward_weights=1.0 is a float; it must be a list, each item a number or None, such as [1.0]",
        ),
        (
            TrainConfig,
            {"stop_token_ids": 5},
            "stop_token_ids=5 is a int; it must be a list, each item a whole number or None, such as [5]",
        ),
        (TrainConfig, {"generation_kwargs": "x"}, "generation_kwargs='x' is a str; it must be a dict or None"),
        (
            TrainConfig,
            {"prompt_column": None},
            "prompt_column=None is a NoneType; it must be a text, such as 'prompt'",
        ),
        (PPO, {"clip_range": "0.1"}, "clip_range='0.1' is a str; it must be a number, such as 0.1"),
        (PPO, {"epochs": 2.0}, "epochs=2.0 is a float; it must be a whole number, such as 2"),
    ],
)
def test_a_value_of_another_type_is_one_sentence_in_python_too(cls: type, changes: dict, sentence: str):
    with pytest.raises(ConfigError) as caught:
        cls(**changes)
    assert str(caught.value) == sentence


def test_what_serves_for_a_type(tmp_path: Path):
    """A whole number for a float, a path for a text, a tuple for a list, one text for a list of one."""
    config = TrainConfig(learning_rate=1, output_dir=tmp_path, stop_token_ids=(1, 2), stop_strings="the")
    assert (config.output_dir, config.stop_strings) == (str(tmp_path), ["the"])
    assert TrainConfig(output_dir="run", resume_from_checkpoint=True).resume_from_checkpoint == "True"


def test_the_edges_that_are_allowed():
    edges = dict(top_p=1.0, top_k=0, learning_rate=0.0, save_steps=0, eval_steps=0, completions_steps=0)
    assert TrainConfig(**edges).to_dict().items() >= edges.items()
    assert TrainConfig(push_to_hub=True, hub_model_id="me/x", save_total_limit=1).hub_model_id == "me/x"


# ── every field does something


def reads(cls: type) -> Iterator[str]:
    """Names read as `args.NAME`, `config.NAME`, `algorithm.NAME` anywhere, or as `self.NAME` in the class itself or
    in one that it inherits from, outside of the checks of the values."""
    owners, family = {"args", "config"} if cls is TrainConfig else {"algorithm"}, {c.__name__ for c in cls.__mro__}
    for path in Path(hfpg.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in family:
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                methods = [n for n in methods if n.name != "__post_init__" and not n.name.startswith("_check")]
                for inner in (n for method in methods for n in ast.walk(method)):
                    if isinstance(inner, ast.Attribute) and getattr(inner.value, "id", "") == "self":
                        yield inner.attr
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner in owners:
                    yield node.attr
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                owner = getattr(node.args[0], "id", getattr(node.args[0], "attr", ""))
                if owner in owners and isinstance(node.args[1], ast.Constant):
                    yield node.args[1].value


@pytest.mark.parametrize("cls", [TrainConfig, *PRESETS.values()])
def test_every_field_is_read_somewhere(cls: type):
    ignored = {f.name for f in dataclasses.fields(cls)} - set(reads(cls))
    assert not ignored, f"{cls.__name__} accepts and ignores {sorted(ignored)}"


@pytest.mark.parametrize("cls", [TrainConfig, *PRESETS.values()])
def test_every_field_has_a_help_text(cls: type):
    assert not [f.name for f in dataclasses.fields(cls) if not f.metadata.get("help")]


@pytest.mark.parametrize("cls", PRESETS.values())
def test_no_name_is_both_a_method_knob_and_a_run_knob(cls: type):
    assert not {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(TrainConfig)}


def test_a_field_of_a_method_of_the_users_own_may_have_its_own_default():
    @dataclasses.dataclass(frozen=True)
    class Own(RLOO):
        cap: float = math.inf
        how: Literal["a", "b"] | None = None

    assert Own().cap == math.inf
    with pytest.raises(ConfigError, match=r"how='c' is a str; it must be one of \['a', 'b'\] or None"):
        Own(how="c")
    with pytest.raises(ConfigError, match="cap=nan must be a finite number"):
        Own(cap=math.nan)


@pytest.mark.parametrize("cls", [TrainConfig, *PRESETS.values()])
def test_every_field_comes_back_from_a_file(tmp_path: Path, cls: type):
    """Also those that are True by default: argparse has a second flag of the same name for them."""
    for changed in (False, True):
        values = dataclasses.asdict(cls())
        if changed:
            values |= {name: not value for name, value in values.items() if value is True}
        path = write(tmp_path, yaml.safe_dump(values))
        assert dataclasses.asdict(parse((cls,), ["--config", path])[0]) == values
        assert dataclasses.asdict(parse((cls,), [], defaults=lambda made, own=values: own)[0]) == values


def test_texts_of_a_file_are_as_they_are_written(tmp_path: Path):
    text = "stop_strings: [yes, No, 1.0, 1e3, 007]\nmodel_revision: 0012345\nrun_name: 1.10\nhub_model_id: 12:30:00\n"
    config = read(tmp_path, text)
    assert config.stop_strings == ["yes", "No", "1.0", "1e3", "007"]
    assert (config.model_revision, config.run_name, config.hub_model_id) == ("0012345", "1.10", "12:30:00")


def test_negative_numbers_may_have_an_exponent():
    config = parse((TrainConfig,), ["--reward_weights", "1", "-1e-3"])[0]
    assert config.reward_weights == [1, -0.001]


def test_numbers_of_numpy_become_plain_ones():
    config = TrainConfig(max_steps=np.int64(3), learning_rate=np.float32(0.5), reward_weights=[np.float32(1)])
    assert json.loads(json.dumps(config.to_dict()))["max_steps"] == 3
    assert type(config.max_steps) is int and type(config.learning_rate) is float
    assert type(RLOO(num_generations=np.int64(4)).num_generations) is int


def test_help_tells_the_defaults_that_the_run_would_use(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(
            (TrainConfig,),
            ["--help", "--config", write(tmp_path, "max_steps: 12\n")],
            "First line.\n\n    an example",
            defaults=lambda made: {"learning_rate": 0.125, "max_steps": 11},
            prog="hfpg x",
        )
    said = capsys.readouterr().out
    assert said.startswith("usage: hfpg x [--config FILE.yaml] [--FIELD VALUE …]\n\nFirst line.\n\n    an example\n")
    flat = " ".join(said.split())
    assert "(default: 0.125)" in flat and "(default: 12)" in flat and "(default: 11)" not in flat


def test_the_page_of_settings_is_true():
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    defaults = dataclasses.asdict(TrainConfig())
    assert rows == [
        f"| `{f.name}` | `{defaults[f.name]!r}` | {f.metadata['help']} |" for f in dataclasses.fields(TrainConfig)
    ]
    assert ", ".join(f"`{name}`" for name in sorted(MAY_CHANGE)) in page
    assert ", ".join(f"`{name}`" for name in HARMLESS_OPTIONS) in page
