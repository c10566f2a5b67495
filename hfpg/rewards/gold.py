r"""A gold answer as math-verify reads it: mathematics stands between dollars.

Outside of dollars math-verify looks for plain numbers alone: it reads `3\pi` as 3 and `(3, 5)` as 5.
"""

from __future__ import annotations

import re


MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")  # says itself where the mathematics stands
NUMBER = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)(?:\.\d*)?\.?\s*%?|\.\d+")
POWER = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")  # as Python writes small and large floats
MIXED = re.compile(r"(-?\d+) (\d+)/(\d+)")
PI, TEX_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "
FUNCTION, TEX_FUNCTION = re.compile(r"(?<![A-Za-z\\])(ln|log|sin|cos|tan|exp)(?![A-Za-z])"), r"\\\1 "
ROOT, TEX_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*(\d+)"), r"\\sqrt{\1}"
MODULO = re.compile(r"(?<![A-Za-z\\])mod(?![A-Za-z])")
UNREAD = re.compile(r"[√∛∜∞½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞²³¹⁰⁴-⁹]")  # math-verify reads 2√3 and 2² as 2

# what has letters and is no word: commands, text in braces, names in indices, connectives of lists
NO_WORD = re.compile(
    r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname|begin|end)\s*\{[^{}]*\}|_\{[^{}]*\}|\\[A-Za-z]+"
    r"|\b(?:and|or)\b|(?<![A-Za-z])(?:pi|sqrt)(?![A-Za-z])"
)
WORD = re.compile(
    r"\b[A-Za-z]{3,}\b|\b[A-Z][a-z]+\b|[A-Za-z\d]\s+[A-Za-z]{2,}\b|\b[A-Za-z]{2,}\s+[A-Za-z\d]|\d\s+\w+/\w"
)


def gold_text(answer: str) -> str:
    r"""The answer with dollars around it, where it is bare mathematics; "" where it would be misread.

    What says itself where its mathematics stands, plain numbers and sentences stay as they are. Of a worked solution
    as in GSM8K, what stands behind the last "####" is the answer.
    """
    answer = (answer.rpartition("####")[2].strip() or answer.strip()).replace("−", "-")
    if MARKED.search(answer):
        return answer
    if power := POWER.fullmatch(answer):
        return rf"${power[1]} \cdot 10^{{{int(power[2])}}}$"
    if mixed := MIXED.fullmatch(answer):
        return rf"${mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}$"
    answer = ROOT.sub(TEX_ROOT, FUNCTION.sub(TEX_FUNCTION, answer)) if any(c.isdigit() for c in answer) else answer
    if MIXED.search(answer) or MODULO.search(answer):
        return ""
    if NUMBER.fullmatch(answer) or WORD.search(NO_WORD.sub(" ; ", answer)):
        return answer
    if UNREAD.search(answer):
        return ""
    return f"${PI.sub(TEX_PI, answer)}$"
