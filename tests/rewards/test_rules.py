"""Rule judges: what each says, when it abstains, what a missing library or column is answered with, and TRL."""

import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from hfpg.config import ConfigError
from hfpg.rewards import Judge, rules
from hfpg.rewards.judge import Log
from hfpg.rewards.rules import (
    contains,
    exact_answer,
    json_valid,
    length_window,
    matches,
    maths_answer,
    readability,
    repetition_penalty,
    sentiment_lexicon,
    soft_overlong,
    think_format,
)
from hfpg.types import plain_text, text_of


def says(content: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


def scores(rule: Callable[..., Any], texts: list[str], ids: list[list[int]] | None = None, **columns: Any) -> list:
    """What the rule says of texts; of the same texts as conversations it says the same."""
    given = dict(prompts=["p"] * len(texts), completion_ids=ids or [[1]] * len(texts), trainer_state=None, **columns)
    found = rule(completions=texts, **given)
    assert rule(completions=[says(t) for t in texts], **given) == found
    return found


# ── length


def test_the_window_counts_tokens_words_or_characters():
    ids = [[1] * n for n in (0, 1, 2, 4, 5)]
    assert scores(length_window(1, 4), ["x"] * 5, ids) == [0, 1, 1, 1, 0]
    assert scores(length_window(2, 3, "words"), ["", "one", "a\n b", "a b c", "a b c d"]) == [0, 0, 1, 1, 0]
    assert scores(length_window(0, 2, unit="characters"), ["", "añ", "abc"]) == [1, 1, 0]


def test_soft_overlong_falls_over_its_zone():
    ids = [[1] * n for n in (0, 80, 81, 90, 100, 101)]
    assert scores(soft_overlong(100, 20), ["x"] * 6, ids) == [0, 0, -0.05, -0.5, -1, -1]
    assert scores(soft_overlong(3, 0), ["x"] * 2, [[1] * 3, [1] * 4]) == [0, -1]


def test_repetition_is_the_share_of_ngrams_that_stood_before():
    ids = [[], [1, 2], [1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 3, 1, 2]]
    assert scores(repetition_penalty(2), ["x"] * 5, ids) == pytest.approx([0, 0, 0, -0.75, -0.25])
    assert scores(repetition_penalty(1, "words"), ["", "the cat The cat", "all new"]) == [0, -0.5, 0]


# ── form


def test_a_pattern_is_searched_or_matched_in_full():
    assert scores(matches(r"\d+"), ["a 12 b", "none", ""]) == [1, 0, 0]
    assert scores(matches(r"\d+", full=True), ["12", "12 b", "12\n"]) == [1, 0, 0]
    assert scores(matches(r"(?is)<a>.*</A>"), ["<A>\n</a>"]) == [1]


def test_a_pattern_that_takes_for_ever_abstains():
    begin = time.monotonic()
    assert scores(matches(r"^(a|a)+$", seconds=0.05), ["a" * 40 + "d", "a"]) == [None, 1]
    assert time.monotonic() - begin < 10


def test_contains_looks_for_whole_words():
    assert scores(contains(["cat", "ice cream"]), ["a Cat.", "category", "Ice cream!", ""]) == [1, 0, 1, 0]
    assert scores(contains(["cat", "dog"], "all"), ["cat, dog", "cat", "dogs cat"]) == [1, 0, 0]
    assert scores(contains("C++", ignore_case=False), ["in C++.", "in c++.", "C+++"]) == [1, 0, 1]


def test_json_is_json_and_nothing_else():
    texts = [
        '{"a": [1, null]}',
        "3",
        "{'a': 1}",
        '{"a": NaN}',
        "Infinity",
        '{"a": 1} done',
        "",
        "[" * 100_000,
        "9" * 9999,
    ]
    assert scores(json_valid(), texts) == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_json_fits_a_schema():
    pytest.importorskip("jsonschema", reason="hfpg[json]")
    schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
    assert scores(json_valid(schema), ['{"age": 3}', '{"age": "3"}', "[]", "no"]) == [1, 0, 0, 0]


def test_a_number_that_cannot_be_divided_is_no_multiple():
    pytest.importorskip("jsonschema", reason="hfpg[json]")
    rule = json_valid({"type": "number", "multipleOf": 0.5})
    assert scores(rule, ["1.5", "1.2", "1e999", "1" + "0" * 400]) == [1, 0, 0, 0]


SLOW = "^(a|a)+$"
HARD = "a" * 40 + "d"


@pytest.mark.parametrize(
    ("schema", "fitting", "other", "slow"),
    [
        ({"pattern": SLOW}, '"aa"', '"b"', f'"{HARD}"'),
        ({"patternProperties": {SLOW: {"type": "integer"}}}, '{"a": 1, "b": ""}', '{"a": ""}', f'{{"{HARD}": 1}}'),
        (
            {"properties": {"b": {}}, "patternProperties": {SLOW: {}}, "additionalProperties": False},
            *('{"a": 1, "b": 2}', '{"c": 1}', f'{{"{HARD}": 1}}'),
        ),
        ({"additionalProperties": {"pattern": SLOW}}, '{"c": "a"}', '{"c": "b"}', f'{{"c": "{HARD}"}}'),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"pattern": SLOW}}}, '"aa"', '"b"', f'"{HARD}"'),
        ({"propertyNames": {"pattern": SLOW}}, '{"a": 1}', '{"b": 1}', f'{{"{HARD}": 1}}'),
    ],
)
def test_a_schemas_pattern_that_takes_for_ever_abstains(schema: dict, fitting: str, other: str, slow: str):
    pytest.importorskip("jsonschema", reason="hfpg[json]")
    begin = time.monotonic()
    assert scores(json_valid(schema, seconds=0.05), [fitting, other, slow]) == [1, 0, None]
    assert time.monotonic() - begin < 10


def test_a_schema_may_refer_to_its_own_parts_and_to_what_it_names_so():
    pytest.importorskip("jsonschema", reason="hfpg[json]")
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "$ref": {"type": "integer"}}}
    assert scores(json_valid(tree), ['{"next": {"next": {}}, "$ref": 1}', '{"next": 1}']) == [1, 0]
    named = {"$id": "https://a.org/s", "$defs": {"x": {"$anchor": "x", "type": "null"}}, "items": {"$ref": "s#x"}}
    assert scores(json_valid(named), ["[null]", "[1]"]) == [1, 0]
    assert scores(json_valid({"const": {"$ref": "gone"}}), ['{"$ref": "gone"}', "1"]) == [1, 0]
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"type": "null"}}}
    assert scores(json_valid(old | {"items": {"$ref": "#/definitions/a"}}), ["[null]", "[1]"]) == [1, 0]
    assert scores(json_valid({"$ref": "https://json-schema.org/draft/2020-12/schema"}), ["{}", "[]"]) == [1, 0]
    assert scores(json_valid(True), ["1"]) == [1]  # type: ignore[arg-type]


def test_thinking_stands_first_and_once():
    texts = [
        "<think>\na\n</think>\nb",
        "<think>a</think>",
        "<think>a",
        "b <think>a</think>",
        "<think><think>a</think>",
    ]
    assert scores(think_format, texts) == [1, 1, 0, 0, 0]


# ── answers


MATHS = maths_answer() if importlib.util.find_spec("math_verify") else None  # one process for many questions


def test_the_answer_is_compared_in_plain_form():
    texts = ["Paris.", " \n**paris** ", "Paris, France", "", "Rome"]
    gold = ["Paris", "Paris", "Paris", "Paris", ["Roma", "Rome"]]
    assert scores(exact_answer(), texts, answer=gold) == [1, 1, 0, 0, 1]
    assert scores(exact_answer("n", normalise=None), ["8", "8.", "8"], n=[8, 8, 9]) == [1, 0, 0]
    assert scores(exact_answer(), ["０"], answer=[0]) == [1]  # a full-width nought


@pytest.mark.parametrize(
    ("said", "gold"),
    [(".5", "5"), ("5!", "5"), ("2²", "22"), ("", "."), ("2½", "21/2"), ("H₂", "H2"), (",5", "5"), ("?", "!")],
)
def test_the_plain_form_changes_no_number(said: str, gold: str):
    assert scores(exact_answer(), [said, gold], answer=[gold, gold]) == [0, 1]
    assert scores(exact_answer(), [said or "-", gold], answer=[said or "-", said or "-"]) == [1, 0]


def test_signs_at_the_ends_are_no_part_of_an_answer():
    texts = ['"5"', "5.", "**5**", "5?", "...5", "5…", "**.5**", "5!.", "Paris!", "`n!`"]
    gold = ["5", "5", "5", "5", "5", "5", ".5", "5!", "paris", "n"]
    assert scores(exact_answer(), texts, answer=gold) == [1] * 10


def test_a_whole_number_in_a_column_of_floats_is_written_either_way():
    texts, gold = ["5", "5.0", "5.5", "5", "05", "5"], [5.0, 5.0, 5.5, 5.5, 5.0, float("inf")]
    assert scores(exact_answer(), texts, answer=gold) == [1, 1, 1, 0, 0, 0]
    assert scores(exact_answer(normalise=None), ["5", "4"], answer=[[4.0, 5.0], 5.0]) == [1, 0]


def test_the_answer_stands_where_the_pattern_says():
    rule = exact_answer(pattern=r"answer is (\w+)")
    assert scores(rule, ["The answer is 4, no, the answer is 5.", "5"], answer=["5", "5"]) == [1, 0]
    assert scores(exact_answer(pattern=r"^(a|a)+$", seconds=0.05), ["a" * 40 + "d"], answer=["x"]) == [None]


def test_a_row_without_an_answer_is_not_judged():
    assert scores(exact_answer(), ["a"] * 4, answer=[None, "", [], [None]]) == [None] * 4


def test_a_missing_answer_column_is_named():
    for rule in (exact_answer("gold"), maths_answer("gold")):
        with pytest.raises(
            ConfigError,
            match=r"reads the column 'gold', which the data set lacks; it has \['answer'\]; name yours with column=",
        ):
            rule(prompts=["p"], completions=["c"], completion_ids=[[1]], answer=["x"])


def test_mathematics_is_compared_as_mathematics():
    pytest.importorskip("math_verify", reason="hfpg[math]")
    texts = [r"so \boxed{\frac{1}{2}}", "It is 0.5", "The answer is 3", r"$\{1, 2\}$", "no idea", "", "5"]
    gold = ["1/2", r"\frac{1}{2}", "4", r"$\{2, 1\}$", "4", "4", "a word"]
    rule = maths_answer()
    assert scores(rule, texts, answer=gold) == [1, 1, 0, 1, 0, 0, None]
    assert scores(rule, ["5", "5"], answer=[5, None]) == [1, None]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"3\pi", r"\boxed{3\pi}", "3"),
        (r"2\sqrt{3}", r"$2\sqrt{3}$", "2"),
        ("2x+3", r"\boxed{3 + 2x}", "2"),
        ("10^{5}", "100,000", "10"),
        ("(3, 5)", "so it is $(3,5)$", "5"),
        ("[1, 2)", "$[1,2)$", "$(1,2)$"),
        ("1,2,3", r"\boxed{3, 2, 1}", "1.2"),
        ("x^2", "$x^2$", "2"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", r"\boxed{\text{Ann}}"),
        ("A", r"\boxed{A}", r"\boxed{B}"),
        ("x=3 or x=5", r"\boxed{x=3 \text{ or } x=5}", "5"),
        ("5!", "120", "5"),
        ("3 1/2", "3.5", "1"),
        ("1e-05", "0.00001", "1"),
        ("−3", "-3", "3"),
        ("2pi", r"\boxed{2\pi}", "2"),
        ("$2$", "2", "3"),
        (r"\boxed{3\pi}", r"$3\pi$", "3"),
        ("She has 2 left.\n#### 3\\pi", r"$3\pi$", "3"),
        ("She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13", "13", "16"),
        *((plain, "72", "71") for plain in ("72", "72.", "#### 72", "The answer is 72", "72 apples", "$72", "72 kg")),
        *((plain, "1234", "1") for plain in ("1,234", "1 234", "1,234.0")),
        ("72%", "72%", "71%"),
        (".5", "0.5", "5"),
        ("-7", "-7", "7"),
        ("ln 2", r"\boxed{\ln 2}", "2"),
        ("log 8", r"$\log 8$", "8"),
        ("sin 30", r"\boxed{\sin 30}", "30"),
        ("2 ln 3", r"$2\ln 3$", "3"),
        ("2*sin(3)", r"\boxed{2\sin(3)}", "2"),
        ("sqrt 3", r"\boxed{\sqrt 3}", "3"),
    ],
)
def test_a_gold_answer_is_read_whole(gold: str, right: str, wrong: str):
    pytest.importorskip("math_verify", reason="hfpg[math]")
    assert scores(MATHS, [right, wrong], answer=[gold, gold]) == [1, 0]


def test_a_gold_answer_that_would_be_misread_is_not_judged():
    pytest.importorskip("math_verify", reason="hfpg[math]")
    golds = ["2√3", "2²", "½", "no number here", "Yes", "sin(x)", "2 1/2 hours", "5 mod 7"]
    assert scores(MATHS, ["2"] * 8, answer=golds) == [None] * 8


def test_any_of_several_gold_answers_will_do():
    pytest.importorskip("math_verify", reason="hfpg[math]")
    golds = [["1/2", "7"], ["1/2", "7"], ["no number", None], []]
    assert scores(MATHS, ["7", "8", "7", "7"], answer=golds) == [1, 0, None, None]


def test_mathematics_ends_in_any_thread():
    pytest.importorskip("math_verify", reason="hfpg[math]")
    rule = maths_answer(seconds=1)
    texts = [r"\boxed{10^{10^{10^{10}}}}", "4", "4\n4\u2028"]
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(rule, completions=texts, answer=["4", "4", "4"]).result(timeout=120)
    assert found == [0, 1, 1]


def test_mathematics_starts_again_after_a_step_that_had_to_be_killed(monkeypatch: pytest.MonkeyPatch):
    program = """
import sys, time
print("ready", flush=True)
for line in sys.stdin:
    time.sleep(60 if "4" in line else 0)
    print("1.0", flush=True)
"""
    monkeypatch.setattr(rules._MathsProcess, "PROGRAM", program)
    monkeypatch.setattr(rules._MathsProcess, "GRACE", -2.5)
    compare = rules._MathsProcess(1)
    assert [compare("5", "5"), compare("4", "4"), compare("5", "5")] == [1, 0, 1]


def test_mathematics_that_is_interrupted_answers_no_later_question(monkeypatch: pytest.MonkeyPatch):
    program = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print(line[2], flush=True)"
    monkeypatch.setattr(rules._MathsProcess, "PROGRAM", program)
    compare = rules._MathsProcess(1)
    assert compare("1", "") == 1
    with monkeypatch.context() as interrupting:
        interrupting.setattr(
            rules._MathsProcess, "_line", staticmethod(lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        )
        with pytest.raises(KeyboardInterrupt):
            compare("2", "")
    assert compare("3", "") == 3


def test_mathematics_that_dies_is_no_score(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rules._MathsProcess, "PROGRAM", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="math-verify's process ended by itself with status 3"):
        rules._MathsProcess(1)("4", "4")


# ── style


def test_the_lexicon_tells_good_from_bad():
    pytest.importorskip("vaderSentiment", reason="the lexicon is an optional dependency: hfpg[lexicon]")
    texts = ["A wonderful, moving film!", "A terrible, boring mess.", "It has two hours.", "", "It is not good."]
    good, bad, flat, empty, negated = scores(sentiment_lexicon, texts)
    assert good > 0.5 and bad < -0.5 and flat == empty == 0 and negated < 0
    assert all(-1 <= s <= 1 for s in (good, bad, flat, empty, negated))


def test_readability_is_textstats():
    textstat = pytest.importorskip("textstat", reason="hfpg[readability]")
    easy, hard = (
        "The cat sat. It was fine.",
        "Notwithstanding considerable institutional resistance, legislation passed.",
    )
    for metric in rules.BY_LETTERS:
        found = scores(readability(metric), [easy, hard, "", "..."])
        assert found == [getattr(textstat, metric)(easy), getattr(textstat, metric)(hard), None, None]
        assert (found[0] < found[1]) == (metric != "gulpease_index")


def test_readability_fetches_no_dictionary(monkeypatch: pytest.MonkeyPatch):
    nltk = pytest.importorskip("nltk", reason="hfpg[readability]")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *a, **k: pytest.fail("fetched"))
    for metric in rules.BY_SYLLABLES + rules.BY_WORD_LIST:
        with pytest.raises(ConfigError, match=r"python -m nltk.downloader cmudict fetches it; automated_.* need none"):
            readability(metric)


# ── what is refused when a rule is made


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: length_window(5, 4), r"length_window\(5, 4\) is empty; low must be at least 0"),
        (lambda: length_window(1, 4, "lines"), r"unit='lines'; use 'tokens', 'words' or 'characters'"),
        (lambda: soft_overlong(10, 11), "zone=11 must lie between 0 and max_length=10"),
        (lambda: repetition_penalty(0), "n=0; an n-gram has at least one token"),
        (lambda: repetition_penalty(2, "lines"), "unit='lines'; use 'tokens' or 'words'"),
        (lambda: matches("("), r"'\(' is no regular expression"),
        (lambda: exact_answer(pattern="("), r"'\(' is no regular expression"),
        (lambda: contains([]), r"contains\(\[\]\): give at least one word"),
        (lambda: contains("a", "some"), "how='some'; use 'any' or 'all'"),
        (lambda: json_valid({"type": "thing"}), "this is no JSON schema: 'thing' is not valid"),
        (lambda: json_valid({"$ref": "#/$defs/x"}), r"the schema's \$ref '#/\$defs/x' leads nowhere in it"),
        (lambda: json_valid({"items": {"$ref": "https://a.org/b"}}), r"\$ref 'https://a.org/b' leads nowhere"),
        (lambda: json_valid({"$ref": "#/a/b", "a": {"b": {"$ref": "#c"}}}), r"\$ref '#c' leads nowhere"),
        (lambda: json_valid({"patternProperties": {"(": {}}}), r"'\(' is "),
        (
            lambda: json_valid({"allOf": [{"patternProperties": {"a": {}}}], "unevaluatedProperties": False}),
            "would search without a time limit; use additionalProperties",
        ),
        (lambda: maths_answer(seconds=0), "seconds=0 must be a whole number, at least 1"),
        (lambda: readability("ease"), "no formula 'ease'; it has automated_readability_index, "),
    ],
)
def test_a_setting_that_cannot_be_is_refused(make: Callable[[], Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    for module in ("jsonschema", "textstat"):
        monkeypatch.setitem(sys.modules, module, None)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "math_verify" else real(n, *a))
    made = {"json": lambda: json_valid({}), "math": maths_answer, "readability": readability}
    for extra, make in made.items():
        with pytest.raises(ConfigError, match=rf'needs .*: pip install "hfpg\[{extra}\]"'):
            make()
    assert json_valid()(completions=["{}"]) == [1]  # needs no library


def test_without_the_lexicon_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    rules._analyzer.cache_clear()
    with pytest.raises(ConfigError, match=r'needs vaderSentiment: pip install "hfpg\[lexicon\]"'):
        sentiment_lexicon(["good"])
    rules._analyzer.cache_clear()


# ── conversations and names


def test_of_a_conversation_the_assistants_words_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    turns = [*says(parts), {"role": "tool", "content": "t"}, {"role": "assistant", "content": None}, *says("c")]
    assert plain_text([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == "Hi"
    assert plain_text([]) == "" and plain_text("x") == "x"
    assert text_of(turns) == "ab\n\nc" and text_of("x") == "x" and text_of([]) == ""


def everything() -> list[Callable[..., Any]]:
    return [
        *(length_window(1, 4), soft_overlong(8, 4), repetition_penalty(), repetition_penalty(2), matches("a")),
        *(contains("a"), contains(["a", "b"], "all"), think_format, json_valid(), json_valid({"type": "object"})),
        *(exact_answer("solution"), maths_answer("solution"), sentiment_lexicon, readability(), readability("rix")),
    ]


NAMES = [
    *("length_window", "soft_overlong", "repetition_3gram", "repetition_2gram", "matches"),
    *("contains_any", "contains_all", "think_format", "json_valid", "json_schema"),
    *("exact_answer", "maths_answer", "sentiment_lexicon", "automated_readability_index", "rix"),
]


def all_extras() -> None:
    for module in ("jsonschema", "math_verify", "textstat", "vaderSentiment"):
        pytest.importorskip(module, reason="the test extra installs it")


def test_every_rule_has_a_name_of_its_own():
    all_extras()
    assert [r.__name__ for r in everything()] == NAMES == Judge(everything()).names
    assert matches("a", name="has_an_a").__name__ == "has_an_a"


# ── the contract with TRL, both ways


TEXTS = [r"<think>hm</think> \boxed{\frac{1}{2}}", r"\boxed{3}", "words", ""]
SOLUTIONS = ["$0.5$", "$4$", "$1$", "not mathematics"]
IDS = [[1] * n for n in (2, 85, 90, 101)]


def test_trls_rewards_run_unchanged_in_hfpg():
    all_extras()
    trl = pytest.importorskip("trl.rewards", reason="the test extra installs it")
    overlong = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    theirs = [trl.accuracy_reward, trl.think_format_reward, overlong]
    ours = [maths_answer("solution"), think_format, soft_overlong(100, 20)]
    log, conversations = Log(), [says(t) for t in TEXTS]
    judge = Judge(theirs, weights=[1, 2, 3])
    judged = judge([says("p")] * 4, conversations, IDS, {"solution": SOLUTIONS}, log=log)
    assert judge.names == ["accuracy_reward", "think_format_reward", "soft_overlong_punishment_reward"]
    table = list(judged.by_function.values())
    assert table == [[1, 0, 0, None], [1, 0, 0, 0], [0, -0.25, -0.5, -1]]
    assert table == [rule(completions=conversations, completion_ids=IDS, solution=SOLUTIONS) for rule in ours]
    assert judged.scores.tolist() == [3, -0.75, -1.5, -3]
    assert log.extra["solution"] == SOLUTIONS and len(log.extra["gold_parsed"]) == 4


def test_hfpgs_rules_run_unchanged_in_trl():
    """TRL's GRPOTrainer._calculate_rewards itself, on what it reads of a trainer."""
    all_extras()
    grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason="the test extra installs it")
    funcs, extra, metrics = everything(), {}, defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=funcs,
        reward_processing_classes=[None] * len(funcs),
        reward_func_names=[grpo.get_callable_name(f) for f in funcs],
        state=SimpleNamespace(global_step=3),
        environments=None,
        args=SimpleNamespace(report_to=[]),
        _log_completion_extra=extra.__setitem__,
        _log_metric=lambda name, value: metrics[name].append(value),
    )
    assert trainer.reward_func_names == NAMES
    inputs = [{"prompt": "p", "solution": s} for s in SOLUTIONS]
    for completions in (TEXTS, [says(t) for t in TEXTS]):
        prompts = ["p"] * 4 if completions is TEXTS else [says("p")] * 4
        found = grpo.GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, IDS)
        ours = Judge(funcs)(prompts, completions, IDS, {"solution": SOLUTIONS}).by_function
        for name, column in zip(NAMES, found.T.tolist(), strict=True):
            expected = [float("nan") if v is None else v for v in ours[name]]
            assert column == pytest.approx(expected, nan_ok=True), name
