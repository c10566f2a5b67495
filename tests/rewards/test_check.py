"""`hfpg reward check`: what is found, what is warned of, and the command itself."""

import re

import pytest
import torch

from hfpg import cli
from hfpg.rewards import Judge
from hfpg.rewards.check import examine, look, repetition
from tests import build, tiny


PROMPTS = ["p one", "p one", "p two", "p two"]
TEXTS = ["good film", "good good good good film here", "dull film", "the end of it"]
IDS = [[1, 2], [1, 1, 1, 1, 2, 3], [4, 2], [5, 6, 7, 8]]
GROUPS = torch.tensor([0, 0, 1, 1])


def found(function, prompts=PROMPTS, texts=TEXTS):
    return examine(Judge(function), prompts, texts, IDS, {}, GROUPS, tiny.byte_tokenizer())


def test_repetition_is_the_share_of_word_pairs_seen_before():
    assert repetition("a b a b a b") == pytest.approx(1 - 2 / 5) and repetition("a b c") == 0 and repetition("") == 0
    assert repetition([{"role": "assistant", "content": "x x x"}]) == 0.5


def test_a_length_reward_is_called_one():
    seen = found(lambda completions, completion_ids: [float(len(ids)) for ids in completion_ids])
    assert seen.with_length == pytest.approx(1) and any("goes with length" in text for text in seen.warnings())
    assert seen.deterministic and seen.per_second > 0 and (seen.lowest, seen.highest) == (2, 6)


def test_a_constant_and_ties_within_prompts():
    assert any("every completion scores 0.5" in text for text in found(lambda completions: [0.5] * 4).warnings())
    seen = found(lambda prompts: [float(p == "p two") for p in prompts])
    assert seen.tied_groups == 1 and any("in 100% of the prompts" in text for text in seen.warnings())
    assert look(torch.zeros(3), torch.zeros(3), torch.ones(3), ["a"] * 3).warnings() == [
        "no completion was scored: nothing can be learnt"
    ]


def test_noise_is_noticed():
    draws = iter(range(1000))
    seen = found(lambda completions: [float(next(draws) % 7) for _ in completions])
    assert seen.deterministic is False and any("differently the second time" in text for text in seen.warnings())


def test_tricks_that_pay_are_named():
    seen = found(lambda completions: [float(c.count("good") > 3 or not c) for c in completions])
    said = " ".join(seen.warnings())
    assert seen.tricks["an empty text"] == 1 and "an empty text earns +1.00" in said
    assert "repeated earns +1.00" in said


def as_written(completions, completion_ids):
    """1 where the tokens are those of the text, and an end token behind them."""
    tokenizer = tiny.byte_tokenizer()
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    pairs = zip(texts, completion_ids, strict=True)
    return [float(ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text, ids in pairs]


@pytest.mark.parametrize("chat", [False, True])
def test_each_trick_has_token_ids_of_its_own(chat):
    """Those of the original completions would hide a judge of lengths from the empty text."""
    said = [[{"role": "assistant", "content": t}] if chat else t for t in TEXTS]
    asked = [[{"role": "user", "content": p}] if chat else p for p in PROMPTS]
    assert list(found(as_written, asked, said).tricks.values()) == [1.0, 1.0, 1.0]
    tokens = found(lambda completion_ids: [float(len(ids)) for ids in completion_ids], asked, said).tricks
    assert tokens["an empty text"] == 1.0 and tokens["the prompt again"] == len("p one") + 1
    per_token = found(lambda completion_ids: [[1.0] * len(ids) for ids in completion_ids], asked, said).tricks
    assert per_token == tokens


def test_a_trick_that_breaks_the_judge_is_reported_not_raised():
    seen = found(lambda completions: [1.0 / len(c) for c in completions])
    assert seen.tricks["an empty text"] is None and seen.tricks["the prompt again"] is not None


def test_the_command(tmp_path, capsys):
    file = tmp_path / "judge.py"
    file.write_text("def length(completion_ids):\n    return [float(len(ids)) for ids in completion_ids]\n")
    cli.main(["reward", "check", f"{file}:length", "--prompts", "4", "--max_completion_length", "8"])
    out = capsys.readouterr().out
    assert "length on 16 completions" in out and "correlation with length" in out
    assert re.search(r"earns: an empty text +│ \+1\.000 ", out)  # its one token is the end of text


def test_conversations_are_checked_with_a_template_of_ones_own(tmp_path, capsys):
    (tmp_path / "judge.py").write_text(
        "def one(completions):\n    return [1.0 for c in completions if c[0]['role']]\n"
    )
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "A film"}]}\n' * 4)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = ["reward", "check", f"{tmp_path}/judge.py:one", "--dataset", f"{tmp_path}/chat.jsonl"]
    words += ["--prompts", "2", "--max_completion_length", "4"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "name a file with --chat_template" in capsys.readouterr().err
    cli.main([*words, "--chat_template", f"{tmp_path}/chat.jinja"])
    assert "one on 8 completions" in capsys.readouterr().out


def test_the_command_takes_several_judges_and_says_who_is_noisy(tmp_path, capsys, caplog):
    file = tmp_path / "judge.py"
    file.write_text(
        "import random\n\ndef noisy(completions):\n    return [random.random() for _ in completions]\n\n"
        "def flat(completions):\n    return [0.5] * len(completions)\n"
    )
    names = [f"{file}:noisy", f"{file}:flat"]
    cli.main(["reward", "check", *names, "--prompts", "2", "--max_completion_length", "4"])
    out = capsys.readouterr().out
    assert "noisy, flat on 8 completions" in out and re.search(r"the same when asked twice +│ no ", out)
    assert caplog.text.count("scored the same completions differently when it was asked again") == 1
    assert "reward function 'noisy' scored" in caplog.text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reward"], "use `hfpg reward check FILE.py:name"),
        (["reward", "check", "a.py:f", "--reward", "b.py:g"], "judges are named twice, a.py:f and by --reward"),
        (["reward", "check"], "name a judge"),
        (["reward", "check", "no.py:f"], "error: reward 'no.py:f': there is no file no.py\n"),
        (["reward", "check", "no.py:f", "--prompts", "0"], "error: prompts=0 must be at least 1, such as 16\n"),
        (["reward", "check", "no.py:f", "--model", "no/such"], "error: cannot load the model 'no/such': "),
    ],
)
def test_what_is_wrong_is_one_sentence_and_no_model_is_loaded(words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_policy", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_a_run_says_what_its_first_scores_tell(tmp_path, capsys):
    build.trainer(
        tmp_path, reward=lambda completion_ids: [float(len(i)) for i in completion_ids], disable_tqdm=True
    ).train()
    assert capsys.readouterr().out.count("note on the reward: the score goes with length") == 1
