"""Rule judges: thin functions over well-kept libraries.

A name in lower case is either a reward function (`sentiment_lexicon`, `think_format`) or makes one
(`length_window(5, 40)`). What is made takes `prompts=, completions=, completion_ids=, **columns`, as TRL's reward
functions do, reads completions as text or as conversations, and gives one float per completion, None where it cannot
judge. `name=` is what scores are logged under; a library that is missing is named when the rule is made.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import regex  # type: ignore[import-untyped]  # transformers' own dependency: as `re`, with a time limit

from hfpg.config import ConfigError, require
from hfpg.rewards.gold import gold_text
from hfpg.rewards.json_schema import schema_checker
from hfpg.types import Text, text_of


Rule = Callable[..., list[float | None]]
"""A reward function: called with keywords, it gives one score per completion, None where it cannot judge."""


def optional(module: str, package: str, extra: str, what: str) -> Any:
    """An optional library.

    Raises:
        ConfigError: it is not installed; the sentence says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f'{what} needs {package}: pip install "hfpg[{extra}]"') from None


def by_text(name: str, score: Callable[[str], float | None]) -> Rule:
    """The rule that scores each completion's text by itself."""

    def rule(completions: list[Text], **columns: Any) -> list[float | None]:
        return [score(text_of(c)) for c in completions]

    return named(rule, name)


def named(rule: Rule, name: str) -> Rule:
    """The rule, called so in logs."""
    rule.__name__ = rule.__qualname__ = name
    return rule


def column_of(name: str, columns: Mapping[str, Any], rule: str) -> Sequence[Any]:
    """The column of the data set that a rule reads.

    Raises:
        ConfigError: there is none; the sentence says which there are.
    """
    given = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    has = sorted(set(columns) - given)
    require(
        name in columns,
        f"{rule} reads the column {name!r}, which the data set lacks; it has {has}; name yours with column=",
    )
    return columns[name]


# ── length


def length_window(
    low: int, high: int, unit: Literal["tokens", "words", "characters"] = "tokens", *, name: str = "length_window"
) -> Rule:
    """1 where low ≤ length ≤ high, else 0. Tokens are those that the policy drew, its end token included."""
    require(unit in ("tokens", "words", "characters"), f"unit={unit!r}; use 'tokens', 'words' or 'characters'")
    require(0 <= low <= high, f"length_window({low}, {high}) is empty; low must be at least 0 and at most high")
    count: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "characters": len}
    if unit != "tokens":
        return by_text(name, lambda text: float(low <= count[unit](text) <= high))

    def rule(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [float(low <= len(ids) <= high) for ids in completion_ids]

    return named(rule, name)


def soft_overlong(max_length: int, zone: int, *, name: str = "soft_overlong") -> Rule:
    """0 up to max_length − zone tokens, falling to −1 at max_length and beyond (DAPO, arXiv 2503.14476, eq. 13)."""
    require(0 <= zone <= max_length, f"zone={zone} must lie between 0 and max_length={max_length}")

    def score(length: int) -> float:
        over = length - (max_length - zone)
        return -1.0 if length > max_length else -over / zone if over > 0 else 0.0

    def rule(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [score(len(ids)) for ids in completion_ids]

    return named(rule, name)


def repetition_penalty(n: int = 3, unit: Literal["tokens", "words"] = "tokens", *, name: str = "") -> Rule:
    """−(share of n-grams that stood before in the same completion), in (−1, 0]; 0 where there is no n-gram."""
    require(n >= 1, f"n={n}; an n-gram has at least one token")
    require(unit in ("tokens", "words"), f"unit={unit!r}; use 'tokens' or 'words'")
    name = name or f"repetition_{n}gram"

    def score(items: Sequence[Any]) -> float:
        grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    if unit == "words":
        return by_text(name, lambda text: score(text.casefold().split()))

    def rule(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [score(ids) for ids in completion_ids]

    return named(rule, name)


# ── form


def matches(pattern: str, *, full: bool = False, seconds: float = 1.0, name: str = "matches") -> Rule:
    r"""1 where the regular expression is found (full: is the whole text), else 0; None if that takes too long.

    Flags stand in the pattern: "(?i)yes", "(?s)<a>.*</a>".

    Args:
        pattern: in the syntax of `re`.
        full: the whole text must match.
        seconds: limit per text: some patterns take exponential time on some texts, and the policy writes the texts.
        name: what scores are logged under.
    """
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"matches: {pattern!r} is no regular expression: {error}") from None
    search = compiled.fullmatch if full else compiled.search

    def score(text: str) -> float | None:
        try:
            return float(search(text, timeout=seconds) is not None)
        except TimeoutError:
            return None

    return by_text(name, score)


def contains(
    words: str | Sequence[str], how: Literal["any", "all"] = "any", *, ignore_case: bool = True, name: str = ""
) -> Rule:
    """1 where any (all) of the words stand in the text as whole words, else 0. A phrase counts as a word."""
    words = [words] if isinstance(words, str) else list(words)
    require(bool(words) and all(words), f"contains({words!r}): give at least one word, and none that is empty")
    require(how in ("any", "all"), f"how={how!r}; use 'any' or 'all'")
    flags = re.IGNORECASE if ignore_case else 0
    found = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags) for word in words]
    enough = any if how == "any" else all
    return by_text(name or f"contains_{how}", lambda text: float(enough(p.search(text) for p in found)))


def think_format(completions: list[Text], **columns: Any) -> list[float | None]:
    """1 for one <think>…</think> at the very beginning and text or nothing behind it, else 0; as TRL's."""
    pattern = r"^<think>(?!.*<think>)(.*?)</think>.*$"
    return [float(re.match(pattern, text_of(c), re.DOTALL | re.MULTILINE) is not None) for c in completions]


def json_valid(schema: Mapping[str, Any] | None = None, *, seconds: float = 1.0, name: str = "") -> Rule:
    """1 where the whole text is JSON (RFC 8259: no NaN) and, with a schema, fits it; else 0.

    A schema needs the extra `json`; references in it to other documents are never fetched. None where its patterns
    take longer than `seconds` for one text.
    """
    fits: Callable[[Any], bool] = lambda value: True  # noqa: E731
    if schema is not None:
        optional("jsonschema", "jsonschema", "json", "json_valid with a schema")
        fits = schema_checker(schema, seconds)

    def no_constant(constant: str) -> None:
        raise ValueError(constant)

    def score(text: str) -> float | None:
        try:
            return float(fits(json.loads(text, parse_constant=no_constant)))
        except TimeoutError:
            return None
        # no JSON, a number of 10,000 digits, 10,000 brackets, 1e999 where a multiple of 0.5 is asked for
        except (ValueError, RecursionError, ArithmeticError):
            return 0.0

    return by_text(name or ("json_valid" if schema is None else "json_schema"), score)


# ── answers


ENDS = " .,;:!?\"'`*"


def plain(text: str) -> str:
    """Upper and lower case, kinds of space and of letters (NFKC), and quotes and full stops at the ends are one.

    No number changes: `.5`, `5!`, `2²` and `½` stay. A text of nothing but such signs stays, too.
    """
    runs = itertools.groupby(text, _is_raised)
    text = "".join("".join(run) if kept else unicodedata.normalize("NFKC", "".join(run)) for kept, run in runs)
    text = " ".join(text.casefold().split())
    core = text.strip(ENDS)
    start = text.find(core)
    before, after = text[:start], text[start + len(core) :]
    if re.search(r"(?<![.,])[.,]$", before) and core[:1].isdigit():
        core = before[-1] + core
    if re.search(r"\d\)*$", core):
        core += after[: len(after) - len(after.lstrip("!"))]
    return core or text


def _is_raised(letter: str) -> bool:
    """A superscript, subscript or fraction, which NFKC would write as digits beside those before it."""
    return unicodedata.decomposition(letter).startswith(("<super>", "<sub>", "<fraction>"))


def written(answer: Any) -> list[str]:
    """An answer as text. A column of floats holds 5 as 5.0: both are it."""
    whole = isinstance(answer, float) and answer.is_integer()
    return [str(answer), str(int(answer))] if whole else [str(answer)]


def exact_answer(
    column: str = "answer",
    *,
    pattern: str | None = None,
    normalise: Callable[[str], str] | None = plain,
    seconds: float = 1.0,
    name: str = "exact_answer",
) -> Rule:
    r"""1 where the completion is the answer of its row, else 0; None where the row has no answer (None or "").

    Args:
        column: column of the data set with the answer, or with a list of answers of which any will do.
        pattern: a regular expression; its first group (or all of it), where it is found last, is what is compared, as
            in r"answer is (.+)". A completion without it is wrong. Default: all that was written.
        normalise: applied to both before they are compared; None: compared as they stand.
        seconds: limit of the search for the pattern in one text; beyond it the text is not judged.
        name: what scores are logged under.
    """
    as_is: Callable[[str], str] = lambda text: text  # noqa: E731
    clean = normalise or as_is
    try:
        finder = regex.compile(pattern) if pattern is not None else None
    except regex.error as error:
        raise ConfigError(f"exact_answer: {pattern!r} is no regular expression: {error}") from None

    def given(text: str) -> str | None:
        if finder is None:
            return text
        found = list(finder.finditer(text, timeout=seconds))
        return found[-1][1 if finder.groups else 0] if found else None

    def score(text: str, answer: Any) -> float | None:
        answers = _each(answer)
        wanted = [form for a in answers for form in written(a)]
        if not wanted:
            return None
        try:
            said = given(text)
        except TimeoutError:
            return None
        return float(said is not None and clean(said) in map(clean, wanted))

    def rule(completions: list[Text], **columns: Any) -> list[float | None]:
        answers = column_of(column, columns, name)
        return [score(text_of(c), a) for c, a in zip(completions, answers, strict=True)]

    return named(rule, name)


def maths_answer(column: str = "answer", *, seconds: int = 5, name: str = "maths_answer") -> Rule:
    r"""1 where the completion's last expression equals the row's answer as mathematics (math-verify), else 0.

    `0.5`, `1/2` and `\boxed{\frac{1}{2}}` are equal. A row's answer may be bare (`2\sqrt{3}`, `(3, 5)`); what a
    completion says beyond plain numbers and fractions must stand between dollars or in a box. Of a list of answers
    any will do. None where the row's answer is missing or cannot be read; a completion in which nothing can be read,
    or whose comparison takes longer than `seconds`, is wrong. The work is done in a process of its own:
    `\boxed{10^{10^{10^{10}}}}` would otherwise stop the run for ever. Extra: `math`.
    """
    require(isinstance(seconds, int) and seconds >= 1, f"seconds={seconds!r} must be a whole number, at least 1")
    require(
        importlib.util.find_spec("math_verify") is not None,
        f'{name} needs math-verify: pip install "hfpg[math]"',
    )
    compare = _MathsProcess(seconds)

    def rule(completions: list[Text], **columns: Any) -> list[float | None]:
        answers = column_of(column, columns, name)
        pairs = zip(completions, answers, strict=True)
        return [_best([compare(gold_text(str(a)), text_of(c)) for a in _each(answers)]) for c, answers in pairs]

    return named(rule, name)


def _each(answers: Any) -> list[Any]:
    return [a for a in (answers if isinstance(answers, list | tuple) else [answers]) if a not in (None, "")]


def _best(scores: Sequence[float | None]) -> float | None:
    return max((s for s in scores if s is not None), default=None)


class _MathsProcess:
    """math-verify in a child process, started at the first use and again after it had to be killed.

    math-verify keeps its time limits by SIGALRM, which works in a main thread only, and judges run in any.
    """

    PROGRAM = """
import json, logging, sys
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
seconds = int(sys.argv[1])
def score(answer, text):
    try:
        gold = parse(answer, parsing_timeout=seconds)
    except Exception:
        gold = None
    try:
        return float(verify(gold, parse(text, parsing_timeout=seconds), timeout_seconds=seconds)) if gold else None
    except Exception:
        return 0.0
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(score(*json.loads(line))), flush=True)
"""
    START, GRACE = 120.0, 5.0  # seconds: to import sympy on a busy machine; beyond the limits of its three steps

    def __init__(self, seconds: int):
        self.seconds, self.lock = seconds, threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, answer: str, text: str) -> float | None:
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([answer, text]) + "\n")
                process.stdin.flush()
                line = self._line(process, 3 * self.seconds + self.GRACE)
            except BaseException:  # interrupted: its answer to this question must not meet the next one
                process.kill()
                process.wait()
                raise
            if line is None:  # a step that no alarm interrupts: what was written is no answer that can be read
                return 0.0
            return json.loads(line)

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-P", "-c", self.PROGRAM, str(self.seconds)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            if self._line(self.process, self.START) is None:
                raise RuntimeError(f"math-verify did not start within {self.START:.0f} s")
        return self.process

    @staticmethod
    def _line(process: subprocess.Popen[str], seconds: float) -> str | None:
        """The child's next line; None if it did not come in time: the child is killed then.

        Raises:
            RuntimeError: the child ended by itself.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        assert process.stdout is not None
        alarm = threading.Timer(seconds, end)
        alarm.daemon = True
        alarm.start()
        try:
            line = process.stdout.readline()
        finally:
            alarm.cancel()
        if line:
            return line
        code = process.wait()
        if not late.is_set():
            raise RuntimeError(f"math-verify's process ended by itself with status {code}")
        return None


# ── style


@functools.cache
def _analyzer() -> Any:
    return optional(
        "vaderSentiment.vaderSentiment", "vaderSentiment", "lexicon", "the sentiment lexicon"
    ).SentimentIntensityAnalyzer()


def sentiment_lexicon(completions: list[Text], **columns: Any) -> list[float | None]:
    """Sentiment of each completion in [−1, 1] by the VADER lexicon (Hutto & Gilbert 2014)."""
    return [float(_analyzer().polarity_scores(text_of(c))["compound"]) for c in completions]


BY_LETTERS = ("automated_readability_index", "coleman_liau_index", "lix", "rix", "gulpease_index")
BY_SYLLABLES = ("flesch_reading_ease", "flesch_kincaid_grade", "gunning_fog", "smog_index", "linsear_write_formula")
BY_WORD_LIST = ("dale_chall_readability_score",)


def readability(metric: str = "automated_readability_index", *, name: str = "") -> Rule:
    """A readability formula of textstat for English, as it stands; None for a text without a word.

    Most give a school grade: higher is harder; `flesch_reading_ease` and `gulpease_index` are the other way round.
    Formulas that count syllables need a dictionary, which is never fetched unasked. Extra: `readability`.
    """
    known = BY_LETTERS + BY_SYLLABLES + BY_WORD_LIST
    require(metric in known, f"readability has no formula {metric!r}; it has {', '.join(known)}")
    formula = getattr(optional("textstat", "textstat", "readability", "readability"), metric)
    if metric not in BY_LETTERS:
        import nltk  # type: ignore[import-untyped]  # textstat's own dependency

        try:
            nltk.data.find("corpora/cmudict")
        except LookupError:
            raise ConfigError(
                f"readability({metric!r}) counts syllables by the CMU dictionary: python -m nltk.downloader cmudict "
                f"fetches it; {', '.join(BY_LETTERS)} need none"
            ) from None
    has_word = re.compile(r"\w").search
    return by_text(name or metric, lambda text: float(formula(text)) if has_word(text) else None)
