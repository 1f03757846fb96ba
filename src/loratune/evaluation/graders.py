"""Judging an answer: the number in it, its text, or how likely each choice is.

A score always names the grader that made it. Two read the number out of a worked answer, and on
the same answers they can be several points apart:

- `pissa` is what PiSSA's and MiLoRA's published scripts do (the reading comes from MetaMath's
  evaluation), oddities included: 17.6 counts as 18, 3/4 as 1, and 1,234,567 is read as 1234. It
  exists to reproduce their numbers.
- `strict` reads GSM8K's own `#### n` and MetaMathQA's `The answer is: n`, in Markdown's bold too,
  compares exactly and rounds nothing.

- `number` takes an answer, or what a task's own expression extracts from it, that is one number and
  nothing else; `exact` compares texts, white space at both ends and its kind apart.
- `plain` and `normalised` are for choices: the one with the highest log-likelihood, or with the
  highest one divided by its length in characters, as lm-evaluation-harness's acc and acc_norm.
- `tests` judges programs by running them, in code_answers.py.

The first two do not look at the working, and neither understands units (18 cents are 18), words for
numbers, LaTeX or `\\boxed{}`: an answer without its marker cannot be read. Of a mixed number (5
1/2) and of digits grouped by spaces (1 000) `strict` reads nothing, and `pissa` the first part.

This file knows nothing of models. What a grader reads is part of the version of every task whose
answers are texts, a user's own included: whoever changes it raises `VERSION`.
"""

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from loratune.errors import EvaluationError

VERSION = "2"

Verdict = Literal["correct", "wrong", "truncated", "error"]

_PISSA_MARKER = "The answer is: "
_PISSA_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")

# int() and Fraction() refuse texts of more than 4300 digits. No answer needs so many; a model that
# repeats one digit up to the token limit does write them.
_MOST_DIGITS = 1000

# A minus may also be the typographic one, U+2212. A number may have a dollar sign before it or
# after its sign, groups of three digits parted by commas, a decimal part, and one whole number to
# divide by.
_SIGN = "[-+\u2212]?"
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_DOLLAR = r"\\?\$"
_NUMBER = (
    rf"(?:{_DOLLAR}(?=[-+\u2212]))?(?P<sign>{_SIGN})(?:{_DOLLAR})?"
    rf"(?P<size>{_UNSIGNED})(?:/(?P<divisor>[0-9]+))?"
)
# Asterisks around marker or number are Markdown's bold. What may not follow: anything that makes
# the number a part of something longer, such as the 1 of 1,2345 or 1e5 or 1:30, or the 5 of 5 1/2.
# A full stop at the end of a sentence may.
_BEHIND = r"(?:\*{1,3}(?!\w))?(?![\w^*]|[.,/:]\w|[ \t]+[0-9])"
_STRICT = re.compile(rf"(?:####|The answer is\*{{0,3}} *:)[\s*]*{_NUMBER}{_BEHIND}")
_WHOLE = re.compile(rf"\s*{_NUMBER}\s*")


def pissa_number(text: str) -> Fraction | None:
    """The number that the `pissa` grader reads in an answer, always a whole one; None: none.

    Of the text after the last "The answer is: " (with its space), the first match of
    `[\\-+]?\\d*[\\.,/]?\\d+`: a fraction is divided out, commas are dropped, and Python's round()
    makes it whole (a half goes to the even side). Division by 0 gives the numerator, as published;
    where the published scripts would crash (an infinite float) there is no number.
    """
    _, marker, tail = text.rpartition(_PISSA_MARKER)
    match = _PISSA_NUMBER.search(tail) if marker else None
    if match is None or len(match[0]) > _MOST_DIGITS:
        return None
    numerator, slash, denominator = match[0].replace(",", "").partition("/")
    if slash and not numerator.lstrip("+-"):
        return None
    try:
        value = float(numerator)
        if slash and denominator != "0":
            value = int(numerator) / int(denominator)
        return Fraction(round(value))
    except (OverflowError, ZeroDivisionError):
        return None


def strict_number(text: str) -> Fraction | None:
    """The number that the `strict` grader reads in an answer, exactly; None: there is none.

    It stands after `####` or `The answer is:`, whichever comes first with a readable number: a
    model that goes on to invent further questions is judged by its answer to the first.
    """
    match = _STRICT.search(text)
    return None if match is None else _value(match)


def plain_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else, such as "1,080"; None: it is not."""
    match = _WHOLE.fullmatch(text)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    size, divisor = match["size"], match["divisor"]
    if len(size) + len(divisor or "") > _MOST_DIGITS:
        return None
    value = Fraction(Decimal(size.replace(",", "")))
    if divisor is not None:
        if int(divisor) == 0:
            return None
        value /= int(divisor)
    return -value if match["sign"] in ("-", "\u2212") else value


_READERS: dict[str, Callable[[str], Fraction | None]] = {
    "pissa": pissa_number,
    "strict": strict_number,
    "number": plain_number,
}
NUMBER_GRADERS = tuple(_READERS)
CHOICE_GRADERS = ("plain", "normalised")


def extracted(text: str, expression: str | None) -> str | None:
    """What a task's expression takes of an answer: its first group; None where it does not match.

    Without an expression that is the whole answer.
    """
    if expression is None:
        return text
    match = re.search(expression, text)
    return None if match is None else match[1]


def judge_exact(text: str | None, *, reference: str | None, finished: bool) -> Verdict:
    """Compare an answer, or what was extracted from it, with the reference, word by word."""
    if reference is None:
        return "error"
    if text is not None and text.split() == reference.split():
        return "correct"
    return "wrong" if finished or text is not None else "truncated"


def judge_choice(
    log_likelihoods: Sequence[float], choices: Sequence[str], *, reference: str | None, grader: str
) -> Verdict:
    """Whether the right choice is the likeliest; of equal ones the first, as numpy's argmax has it.

    Args:
        log_likelihoods: of each choice after the prompt, summed over its tokens, in nats.
        choices: their texts, for `normalised`.
        reference: the number of the right one, from 0; None: an error.
        grader: plain or normalised.
    """
    if reference is None or any(math.isnan(one) for one in log_likelihoods):
        return "error"
    scores = [
        one / max(1, len(text)) if grader == "normalised" else one
        for one, text in zip(log_likelihoods, choices, strict=True)
    ]
    return "correct" if scores.index(max(scores)) == int(reference) else "wrong"


def read_number(text: str, *, grader: str) -> Fraction | None:
    """The number that `grader` reads in an answer; None: it finds none.

    Raises:
        EvaluationError: no such grader.
    """
    if grader not in _READERS:
        raise EvaluationError(f"grader {grader!r} is unknown; choose {' or '.join(_READERS)}")
    return _READERS[grader](text)


def judge(text: str, *, reference: str | None, grader: str, finished: bool) -> Verdict:
    """Judge one answer.

    Args:
        text: the whole answer, stop strings and EOS cut off.
        reference: the right number as a plain text ("18", "-3/4"); None where the reference could
            not be read, so that no answer to it can be judged.
        finished: False where the answer ran into the token limit.

    Returns:
        "error" without a reference. Otherwise, where a number can be read, "correct" or "wrong",
        finished or not; where none can, "wrong" for an answer that came to its end and "truncated"
        for one that did not.

    Raises:
        EvaluationError: no such grader, or `reference` is no number (a mistake of the task: it must
            give None instead).
    """
    found = read_number(text, grader=grader)
    if reference is None:
        return "error"
    expected = plain_number(reference)
    if expected is None:
        raise EvaluationError(f"reference {reference!r} is no number; expected one such as '-1080'")
    if found is None:
        return "wrong" if finished else "truncated"
    if grader == "pissa":
        # The published references are whole numbers. For others the reference goes through the
        # same rounding, or a model that repeats it word for word would be wrong.
        expected = Fraction(round(expected))
    return "correct" if found == expected else "wrong"
