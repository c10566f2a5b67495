"""The model card: a README.md for the Hub that says what a policy is, how to use it, and what was measured.

A card is public. It holds numbers and settings that the run recorded, and no prompts, local paths or addresses.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from huggingface_hub import ModelCard, ModelCardData

from hfpg.fields import is_repo_id


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a run knows about itself; a fact that it does not know is absent from the card.

    Args:
        model_name: repository id, or the saved folder as `loadable` writes it.
        base_model: Hub id of the model that was tuned; None if it did not come from the Hub.
        is_adapter: the saved policy is a PEFT adapter of `base_model`.
        algorithm: name of the algorithm, such as "PPO".
        algorithm_fields: its hyperparameters.
        rewards: names of the reward functions.
        dataset: Hub id of the data set of prompts.
        steps: steps trained.
        seed: seed of the run.
        metrics: metric -> (before, after) training, on the same held-out prompts.
        eval_prompts: number of those prompts.
        config: settings of the run.
        versions: package -> version.
        command: the command line that started the run.
        hfpg_version: version of hfpg.
        seconds: measured wall-clock time of the run.
        license: identifier of the license as on the Hub, such as "apache-2.0".
        value_head: kind of the value function saved with the policy, such as "linear".
        revision: branch that the model is on, where it is not the main one.
        needs_hfpg: transformers knows the architecture only when hfpg is imported.
        is_chat: the prompts were conversations, which reach the model through its chat template.
    """

    model_name: str
    algorithm: str
    hfpg_version: str
    steps: int
    seed: int
    is_adapter: bool = False
    base_model: str | None = None
    algorithm_fields: Mapping[str, object] = field(default_factory=dict)
    rewards: Sequence[str] = ()
    dataset: str | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    eval_prompts: int | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    seconds: float | None = None
    license: str | None = None
    value_head: str | None = None
    revision: str | None = None
    needs_hfpg: bool = False
    is_chat: bool = False


def readable(folder: Path, here: Path) -> str:
    """A folder as a person names it: from `here` where it lies in that."""
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def loadable(folder: Path) -> str:
    """A saved folder as "./path" from the working folder: no Hub id, such as "gpt2", looks like that.

    A folder elsewhere is "./name", without those above it, as a card is public: it loads from the folder around it.
    """
    whole = folder.resolve()
    return f"./{whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole.name}"


def model_card(facts: CardFacts) -> str:
    """The text of README.md, YAML front matter first.

    Args:
        facts: what the run knows. Text in it may come from anywhere: it is made harmless for Markdown, an absolute
            path is cut down to its last part, and a web address is struck out.

    Returns:
        The card, as `huggingface_hub.ModelCard` parses it.
    """
    sections = [
        _title(facts),
        _quick_start(facts),
        _value_function(facts),
        _results(facts),
        _training(facts),
        _table("## Framework versions", ("package", "version"), {"hfpg": facts.hfpg_version, **facts.versions}),
        _citations(facts.algorithm),
    ]
    front_matter = _metadata(facts).to_yaml()
    return str(ModelCard(f"---\n{front_matter}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"))


def _metadata(facts: CardFacts) -> ModelCardData:
    """The front matter. A base model or license that the Hub would refuse is left out: it would refuse the push."""
    base_model = facts.base_model if is_repo_id(facts.base_model) else None
    known_license = facts.license if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", facts.license or "") else None
    tag = re.sub(r"[^a-z0-9]+", "-", facts.algorithm.lower()).strip("-")
    relation = "adapter" if facts.is_adapter else "finetune"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[t for t in ("hfpg", tag, "reinforcement-learning", "policy-gradient") if t],
        base_model=base_model,
        license=known_license,
        datasets=[str(facts.dataset)] if is_repo_id(facts.dataset) else None,
        base_model_relation=relation if base_model else None,
    )


def _title(facts: CardFacts) -> str:
    kind = "an adapter" if facts.is_adapter else "a fine-tuned version"
    what = f"{kind} of {text(facts.base_model)}" if is_repo_id(facts.base_model) else "a causal language model"
    data = f" on the prompts of {text(facts.dataset)}" if facts.dataset else ""
    rewards = f", rewarded by {', '.join(text(name) for name in facts.rewards)}" if facts.rewards else ""
    title = text(facts.model_name.removeprefix("./"))
    return (
        f"# {title}\n\nThis is {what}, trained for {facts.steps} steps with {text(facts.algorithm)}"
        f"{data}{rewards}. It was made with hfpg, policy-gradient fine-tuning for Transformers."
    )


def _quick_start(facts: CardFacts) -> str:
    first = "import hfpg  # its architecture is hfpg's\n" if facts.needs_hfpg else ""
    branch = f", revision={_literal(facts.revision)}" if facts.revision else ""
    prompt, answer = '"The movie was"', ""
    if facts.is_chat:
        prompt, answer = '[{"role": "user", "content": "Hello!"}]', '[-1]["content"]'
    code = f"""{first}from transformers import pipeline

generator = pipeline("text-generation", model={_literal(facts.model_name)}{branch})
print(generator({prompt}, max_new_tokens=32)[0]["generated_text"]{answer})"""
    return f"## Quick start\n\n{_fenced('python', code)}"


def _value_function(facts: CardFacts) -> str:
    if facts.value_head is None:
        return ""
    branch = f", revision={_literal(facts.revision)}" if facts.revision else ""
    code = f"""from hfpg.hub import pull
from hfpg.saving import load_actor_critic

actor_critic = load_actor_critic(pull({_literal(facts.model_name)}{branch}))"""
    return f"""## Value function

The critic that was trained beside the policy ({text(facts.value_head)}) is part of this repository. Text generation
does not need it; to go on training, or to estimate values, load both with hfpg:

{_fenced("python", code)}"""


def _results(facts: CardFacts) -> str:
    if not facts.metrics:
        return ""
    where = "" if facts.eval_prompts is None else f" on {facts.eval_prompts} held-out prompts"
    rows = "\n".join(f"| {text(k)} | {text(a)} | {text(b)} |" for k, (a, b) in facts.metrics.items())
    return (
        f"## Results\n\nMeasured{where}, before and after this run (one run, seed {facts.seed}).\n\n"
        f"| metric | before | after |\n|---|---|---|\n{rows}"
    )


def _training(facts: CardFacts) -> str:
    parts = ["## Training"]
    if facts.command:
        parts.append(_fenced("bash", _command(facts.command)))
    if facts.seconds is not None:
        parts.append(f"The run took {text(float(facts.seconds))} seconds.")
    settings = {f"{facts.algorithm}.{key}": value for key, value in facts.algorithm_fields.items()} | dict(
        facts.config
    )
    parts.append(_table("", ("setting", "value"), {"steps": facts.steps, "seed": facts.seed, **settings}))
    return "\n\n".join(parts)


def _table(heading: str, columns: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {columns[0]} | {columns[1]} |", "|---|---|"]
    lines += [f"| {text(key)} | {text(value)} |" for key, value in rows.items()]
    return f"{heading}\n\n".lstrip("\n") + "\n".join(lines)


_ROOT = r"(?:~\w*(?=[/\\])|[A-Za-z]:(?=[/\\])|(?=/)|(?=\\\\))"  # of an absolute path, on any system


def text(value: object) -> str:
    """A value from outside as harmless Markdown on one line, fit for a table cell.

    Args:
        value: a number, string, path, or a collection of these.

    Returns:
        The value without control characters, addresses and folders of absolute paths, at most 200 characters long,
        with everything escaped that Markdown or HTML would take for markup.
    """
    plain = f"{value:.4g}" if isinstance(value, float) else _plain(str(value))
    if len(plain) > 200:
        plain = plain[:199] + "…"
    # An underscore within a word is no markup, and most settings have one.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|[\\`*{}\[\]<>|~&!#$]", r"\\\g<0>", plain)


def _plain(value: str) -> str:
    """One line, without control or invisible characters, web addresses, or the folders of absolute paths."""
    visible = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in value)
    without_urls = re.sub(r"\b[a-z][a-z0-9+.-]*://[^\s'\"]*", "(address)", visible, flags=re.IGNORECASE)
    line = without_urls.strip()
    if re.fullmatch(rf"{_ROOT}[/\\][^'\",;()\[\]{{}}]+", line):  # the whole value is one path, spaces and all
        return _last_part(line)
    return re.sub(
        rf"(?<![\w.~/\\-]){_ROOT}(?:[/\\]+[^\s/\\'\",;()\[\]{{}}]+)+[/\\]?", lambda m: _last_part(m[0]), line
    )


def _last_part(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def _command(command: str) -> str:
    """A command line whose every argument, or value of a `--flag=value`, has gone through `_plain`."""
    try:
        arguments = shlex.split(command)
    except ValueError:  # a quote that is not closed
        arguments = command.split()
    parts = [re.match(r"(--?[\w-]+=)?(.*)", argument, flags=re.DOTALL) for argument in arguments]
    return " ".join(shlex.quote((part[1] or "") + _plain(part[2])) for part in parts if part)


def _literal(name: str) -> str:
    """A model name as a Python string in double quotes."""
    return '"' + _plain(name).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _fenced(language: str, code: str) -> str:
    """A code block. Text from outside stands in quotes within a line, where backticks cannot end the block."""
    return f"```{language}\n{code}\n```"


@dataclass(frozen=True)
class _Paper:
    key: str
    title: str
    author: str
    year: int
    where: str

    def bibtex(self) -> str:
        return (
            f"@article{{{self.key},\n  title   = {{{self.title}}},\n  author  = {{{self.author}}},\n"
            f"  year    = {{{self.year}}},\n  journal = {{{self.where}}}\n}}"
        )


_PAPERS = {  # by the class name of the algorithm, in lower case
    "reinforce": _Paper(
        "williams1992simple",
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        "Williams, Ronald J.",
        1992,
        "Machine Learning 8, 229--256",
    ),
    "rloo": _Paper(
        "ahmadian2024back",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "Ahmadian, Arash and Cremer, Chris and Gall{\\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and "
        'Pietquin, Olivier and {\\"U}st{\\"u}n, Ahmet and Hooker, Sara',
        2024,
        "arXiv:2402.14740",
    ),
    "remax": _Paper(
        "li2023remax",
        "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models",
        "Li, Ziniu and Xu, Tian and Zhang, Yushun and Lin, Zhihang and Yu, Yang and Sun, Ruoyu and Luo, Zhi-Quan",
        2023,
        "arXiv:2310.10505",
    ),
    "reinforceplusplus": _Paper(
        "hu2025reinforce",
        "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
        "Hu, Jian and Liu, Jason Klein and Xu, Haotian and Shen, Wei",
        2025,
        "arXiv:2501.03262",
    ),
    "grpo": _Paper(
        "shao2024deepseekmath",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and others",
        2024,
        "arXiv:2402.03300",
    ),
    "drgrpo": _Paper(
        "liu2025understanding",
        "Understanding R1-Zero-Like Training: A Critical Perspective",
        "Liu, Zichen and Chen, Changyu and Li, Wenjun and Qi, Penghui and Pang, Tianyu and Du, Chao and Lee, Wee Sun "
        "and Lin, Min",
        2025,
        "arXiv:2503.20783",
    ),
    "dapo": _Paper(
        "yu2025dapo",
        "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "Yu, Qiying and Zhang, Zheng and Zhu, Ruofei and Yuan, Yufeng and Zuo, Xiaochen and Yue, Yu and others",
        2025,
        "arXiv:2503.14476",
    ),
    "gspo": _Paper(
        "zheng2025group",
        "Group Sequence Policy Optimization",
        "Zheng, Chujie and Liu, Shixuan and Li, Mingze and Chen, Xiong-Hui and Yu, Bowen and others",
        2025,
        "arXiv:2507.18071",
    ),
    "cispo": _Paper(
        "minimax2025m1",
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        "{MiniMax}",
        2025,
        "arXiv:2506.13585",
    ),
    "a2c": _Paper(
        "mnih2016asynchronous",
        "Asynchronous Methods for Deep Reinforcement Learning",
        "Mnih, Volodymyr and Badia, Adri{\\`a} Puigdom{\\`e}nech and Mirza, Mehdi and Graves, Alex and Lillicrap, "
        "Timothy P. and Harley, Tim and Silver, David and Kavukcuoglu, Koray",
        2016,
        "arXiv:1602.01783",
    ),
    "ppo": _Paper(
        "schulman2017proximal",
        "Proximal Policy Optimization Algorithms",
        "Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg",
        2017,
        "arXiv:1707.06347",
    ),
    "trpo": _Paper(
        "schulman2015trust",
        "Trust Region Policy Optimization",
        "Schulman, John and Levine, Sergey and Moritz, Philipp and Jordan, Michael I. and Abbeel, Pieter",
        2015,
        "arXiv:1502.05477",
    ),
}


def _citations(algorithm: str) -> str:
    """hfpg's own entry, and the paper of the algorithm if hfpg knows it."""
    hfpg = "@software{hfpg,\n  title = {hfpg: policy-gradient fine-tuning of Hugging Face language models}\n}"
    paper = _PAPERS.get(algorithm.lower())
    entries = [hfpg] if paper is None else [hfpg, paper.bibtex()]
    return "## Citation\n\n" + _fenced("bibtex", "\n\n".join(entries))
