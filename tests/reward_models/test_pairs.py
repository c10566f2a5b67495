"""Reading preference pairs: what is a pair, what is none, and that nothing held out is learnt."""

import json
import math

import pytest
from pairs import hold_out, load_pairs, read_pairs, shared_prompt

from hfpg.config import ConfigError
from tests.reward_models.world import write


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "good"), ("assistant", "bad")))


def test_text_with_and_without_prompts():
    pairs = read_pairs({"chosen": ["a", "b"], "rejected": ["c", "d"]})
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["", ""], ["a", "b"], ["c", "d"])
    assert not pairs.templated
    assert read_pairs({"prompt": ["p", ""], "chosen": ["a", "b"], "rejected": ["c", "d"]}).prompts == ["p", ""]


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ([USER], [GOOD], [BAD]),
        ([USER], "good", "bad"),
        ("Hi", [USER, GOOD], [USER, BAD]),
        (None, [USER, GOOD], [USER, BAD]),
    ],
)
def test_conversations_in_every_usual_form(prompt, chosen, rejected):
    table = {"chosen": [chosen], "rejected": [rejected]} | ({} if prompt is None else {"prompt": [prompt]})
    pairs = read_pairs(table)
    assert [*pairs.prompts[0], *pairs.chosen[0]] == [USER, GOOD]
    assert [*pairs.prompts[0], *pairs.rejected[0]] == [USER, BAD]
    assert pairs.templated


def test_ties_are_equal_texts_equal_scores_or_told():
    table = {"chosen": ["a", "b", "c", "d"], "rejected": ["a", "x", "y", "z"], "tie": [False, True, False, False]}
    table |= {"score_chosen": [2, 2, 2, 2], "score_rejected": [1, 1, 2, 1]}
    pairs = read_pairs(table)
    assert pairs.ties == [True, True, True, False]
    assert pairs.without_ties().chosen == ["d"]


def test_scores_that_are_missing_make_no_tie():
    assert read_pairs(TWO | {"score_chosen": [None, 2], "score_rejected": [None, 2]}).ties == [False, True]
    assert read_pairs(TWO | {"score_chosen": [1.0, 0.0]}).ties == [False, False]
    assert read_pairs(TWO | {"score_rejected": [1.0, 0.0]}).ties == [False, False]


@pytest.mark.parametrize("no", [False, "False", "no", 0, 0.0, "", None])
@pytest.mark.parametrize("yes", [True, "true", "Yes", 1, 1.0])
def test_a_tie_is_told_in_any_usual_way(no, yes):
    assert read_pairs(TWO | {"tie": [no, yes]}).ties == [False, True]


def test_margins_are_read_where_they_are():
    table = {"chosen": ["a", "b"], "rejected": ["c", "d"], "margin": [0.5, 2], "gap": [1, 1]}
    assert read_pairs(table).margins == [0.5, 2.0]
    assert read_pairs(table, margin_column="gap").margins == [1.0, 1.0]
    assert read_pairs(table, margin_column="").margins == [0.0, 0.0]


TWO = {"chosen": ["a", "b"], "rejected": ["c", "d"]}


@pytest.mark.parametrize(
    "table, words",
    [
        ({"chosen": ["a"], "rejectd": ["b"]}, "has no column 'rejected'.*did you mean 'rejectd'"),
        ({"text": ["a"], "label": [1]}, "has no column 'chosen'; it has"),
        ({"chosen": [], "rejected": []}, "is empty; it needs rows"),
        (TWO | {"chosen": ["a", None]}, r"1 values of 'chosen' .* are empty \(rows \[1\]\); remove"),
        (TWO | {"rejected": ["a", "  "]}, r"1 values of 'rejected' .* are empty \(rows \[1\]\)"),
        (TWO | {"chosen": ["a", 7]}, "'chosen' of row 1 .* is 7; expected text, or a list of messages"),
        (TWO | {"margin": [0.5, math.nan]}, r"1 margins are negative or no number \(rows \[1\]: \[nan\]\)"),
        (TWO | {"margin": [None, -1]}, r"2 margins are negative or no number \(rows \[0, 1\]"),
        (TWO | {"chosen": [[GOOD], "b"]}, "row 0 has a conversation beside a text"),
        (
            TWO | {"tie": [True, "perhaps"]},
            r"1 values of 'tie' are neither true nor false \(rows \[1\]: \['perhaps'\]\)",
        ),
        (
            {"prompt": ["Hi"], "chosen": [[{"role": "user"}, GOOD]], "rejected": [[USER, BAD]]},
            "'chosen' of row 0 .* has the message .* without content; a message is such as",
        ),
        ({"chosen": [[GOOD], "b"], "rejected": [[BAD], "d"]}, "some pairs .* are conversations and the others text"),
        ({"prompt": ["Ho"], "chosen": [[USER, GOOD]], "rejected": [[USER, BAD]]}, "do not begin with it"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_row(table, words):
    with pytest.raises(ConfigError, match=words):
        read_pairs(table)


def test_a_margin_column_that_is_named_must_exist():
    with pytest.raises(ConfigError, match="has no column 'margn'.*"):
        read_pairs(TWO, margin_column="margn")


def test_ties_alone_are_refused():
    with pytest.raises(ConfigError, match="all 2 pairs are ties"):
        read_pairs({"chosen": ["a", "b"], "rejected": ["a", "b"]}).without_ties()


def test_files(tmp_path):
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text("chosen,rejected\na,b\nc,d\n")
    for source in (write(tmp_path / "p.jsonl", rows), str(tmp_path / "p.json"), str(tmp_path / "p.csv")):
        assert load_pairs(source).chosen == ["a", "c"]


@pytest.mark.parametrize(
    "content, words", [("", "is empty; it needs rows"), ("\n", "is empty"), ("{", "cannot load the data set")]
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_pairs(str(path))
    with pytest.raises(ConfigError, match="there is no file"):
        load_pairs(str(tmp_path / "gone.csv"))


def test_pairs_of_one_prompt_stay_together():
    table = {"prompt": [f"p{i // 5}" for i in range(50)]}
    table |= {"chosen": [f"c{i}" for i in range(50)], "rejected": [f"r{i}" for i in range(50)]}
    own, held, dropped = hold_out(read_pairs(table), 7, seed=0)
    assert (len(own), len(held), dropped) == (40, 10, 0)
    assert not set(own.prompts) & set(held.prompts)


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_with_most_of_the_pairs_is_learnt(seed):
    prompts = ["big"] * 40 + [f"p{i}" for i in range(10)]
    table = {"prompt": prompts, "chosen": [f"c{i}" for i in range(50)], "rejected": [f"r{i}" for i in range(50)]}
    own, held, _ = hold_out(read_pairs(table), 1000, seed)
    assert (len(own), len(held)) == (40, 10)
    with pytest.raises(ConfigError, match="at most a fifth of 50 pairs, 10, .* every prompt has 25 or more.*name an"):
        hold_out(read_pairs(table | {"prompt": ["a"] * 25 + ["b"] * 25}), 1, seed)


def test_a_prompt_that_stands_in_the_conversations_is_on_one_side_only():
    def talk(question: int, answer: str) -> list[dict[str, str]]:
        system = {"role": "system", "content": "Be kind."}
        return [system, {"role": "user", "content": f"q{question}"}, {"role": "assistant", "content": answer}]

    chosen, rejected = ([talk(i // 4, f"{side}{i}") for i in range(80)] for side in "cr")
    own, held, dropped = hold_out(read_pairs({"chosen": chosen, "rejected": rejected}), 16, seed=0)
    assert (len(own), len(held), dropped) == (64, 16, 0)
    asked = [{talk[1]["content"] for talk in half.chosen} for half in (own, held)]
    assert not asked[0] & asked[1] and len(asked[1]) == 4


def test_what_two_conversations_share_is_their_prompt():
    assert shared_prompt([USER, GOOD], [USER, BAD]) == [USER]
    assert shared_prompt([USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD]) == [USER, GOOD, USER]
    assert shared_prompt([USER, GOOD, GOOD], [USER, GOOD, BAD]) == [USER]
    assert shared_prompt([GOOD], [BAD]) == shared_prompt("a", "ab") == []
    assert shared_prompt([{"role": "system", "content": "s"}, USER], [{"role": "system", "content": "s"}, BAD]) == []


def test_no_held_out_text_is_learnt():
    texts = [(f"t{i}", f"t{(i + 1) % 60}") for i in range(60)]  # a ring: each text stands in two pairs
    pairs = read_pairs({"chosen": [c for c, _ in texts], "rejected": [r for _, r in texts]})
    own, held, dropped = hold_out(pairs, 6, seed=0)
    assert len(held) == 6
    assert not {*own.chosen, *own.rejected} & {*held.chosen, *held.rejected}
    assert dropped == 60 - len(own) - 6 > 0


def test_too_little_to_hold_out():
    with pytest.raises(ConfigError, match="2 pairs are too few to hold some out: at least 5"):
        hold_out(read_pairs(TWO), 1, seed=0)
    star = read_pairs({"chosen": ["best"] * 10, "rejected": [f"r{i}" for i in range(10)]})
    with pytest.raises(ConfigError, match="no training pair is left beside 2 held-out pairs"):
        hold_out(star, 2, seed=0)
