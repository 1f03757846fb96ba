from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.errors import EvaluationError
from loratune.evaluation.graders import (
    judge,
    pissa_number,
    plain_number,
    read_number,
    strict_number,
)

WHOLE = st.integers(min_value=-(10**15), max_value=10**15)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # The checks of the published grader.
        ("The answer is: 17.6", 18),
        ("The answer is: 3/4", 1),
        ("The answer is: 1,234,567", 1234),
        ("The answer is:18", None),
        # Its other habits.
        ("The answer is: 18", 18),
        ("The answer is: -18", -18),
        ("The answer is: +18", 18),
        ("The answer is: $1,234", 1234),
        ("The answer is: .5", 0),
        ("The answer is: 1.5", 2),
        ("The answer is: 2.5", 2),
        ("The answer is: 1/4", 0),
        ("The answer is: -3/4", -1),
        ("The answer is: 7/0", 7),
        ("The answer is: 7/00", None),
        ("The answer is: /7", None),
        ("The answer is: -/7", None),
        ("The answer is: x = 4", 4),
        ("The answer is: 5 out of 9", 5),
        ("The answer is: 5. No. The answer is: 6.", 6),
        ("The answer is: 5. The answer is: unknown", None),
        ("#### 18", None),
        ("18", None),
        ("", None),
        ("The answer is: ", None),
        ("The answer is: \n\n 9", 9),
        ("the answer is: 9", None),
        ("The answer is: " + "9" * 400, None),
        ("The answer is: " + "9" * 6000, None),
        ("The answer is: -" + "9" * 400, None),
        ("The answer is: 1/" + "9" * 400, 0),
        ("The answer is: " + "9" * 400 + "/3", None),
    ],
)
def test_the_pissa_grader_reads_what_the_published_scripts_read(text, number):
    assert pissa_number(text) == number


@given(WHOLE.filter(lambda n: abs(n) < 2**53))
def test_the_pissa_grader_reads_every_whole_number_written_without_commas(number):
    assert pissa_number(f"so 3 * 4 = 12. The answer is: {number}") == number


@given(st.integers(min_value=-(10**6), max_value=10**6), st.integers(min_value=1, max_value=10**6))
def test_the_pissa_grader_rounds_fractions_as_python_does(top, bottom):
    assert pissa_number(f"The answer is: {top}/{bottom}") == round(top / bottom)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("####18", 18),
        ("####\n18", 18),
        ("6 * 3 = 18\n#### 18\n", 18),
        ("The answer is: 18", 18),
        ("The answer is:18", 18),
        ("The answer is : 18", 18),
        ("The answer is: 18.", 18),
        ("The answer is: 18.\n", 18),
        ("The answer is: 18, so", 18),
        ("The answer is: 18 dollars", 18),
        ("The answer is: 18%", 18),
        ("The answer is: $18", 18),
        ("The answer is: -$18", -18),
        ("The answer is: \\$18", 18),
        ("The answer is: \u221218", -18),
        ("The answer is: +18", 18),
        ("The answer is: 18.0", 18),
        ("The answer is: 018", 18),
        ("The answer is: 17.6", Fraction(176, 10)),
        ("The answer is: .5", Fraction(1, 2)),
        ("The answer is: 3/4", Fraction(3, 4)),
        ("The answer is: -3/4", Fraction(-3, 4)),
        ("The answer is: 3/0", None),
        ("The answer is: 3/4/5", None),
        ("#### 1,234,567", 1234567),
        ("#### 1,234.5", Fraction(12345, 10)),
        ("#### 1,2345", None),
        ("#### 12345,678", None),
        ("#### 1,23", None),
        ("#### 1e5", None),
        ("#### 5x", None),
        ("#### 10:30", None),
        ("#### 2^3", None),
        ("#### 2*3", None),
        ("#### 1.2.3", None),
        ("#### eighteen", None),
        # Markdown's bold, around the number or around all.
        ("**The answer is: 18**", 18),
        ("The answer is: **18**", 18),
        ("**The answer is:** 18", 18),
        ("**The answer is**: $18.", 18),
        ("#### **$1,080**.", 1080),
        ("#### *18*", 18),
        ("#### **2**3", None),
        ("#### 2**3", None),
        # A part of a longer number is not read as the whole.
        ("The answer is: 5 1/2", None),
        ("#### 1 000", None),
        ("#### 1\t000", None),
        ("#### $$5", None),
        ("#### **1** 000", None),
        ("#### 18\n2. Next", 18),
        ("The answer is: $-5", -5),
        ("The answer is: -$5", -5),
        ("### 18", None),
        ("18", None),
        ("", None),
        # The first marker with a number counts: what follows may be another question.
        ("#### 18\n\nQuestion: ...\n#### 5", 18),
        ("The answer is: 18 #### 5", 18),
        ("The answer is: x. The answer is: 18", 18),
        ("#### " + "9" * 6000, None),
        ("#### 1/" + "9" * 6000, None),
    ],
)
def test_the_strict_grader_reads_exactly_what_stands_after_a_marker(text, number):
    assert strict_number(text) == number


@given(WHOLE, st.sampled_from(["#### ", "The answer is: "]), st.booleans())
def test_the_strict_grader_reads_every_whole_number_with_and_without_commas(number, marker, commas):
    assert strict_number(f"{marker}{number:{',' if commas else ''}}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, max_value=Decimal("1e12")))
def test_the_strict_grader_rounds_no_decimal(number):
    assert strict_number(f"#### {number:f}") == Fraction(number)
    assert strict_number(f"#### {number:,f}.") == Fraction(number)


@given(st.text())
def test_no_text_whatever_makes_a_grader_raise(text):
    for grader in ("pissa", "strict"):
        for marker in ("", "The answer is: ", "#### "):
            read_number(marker + text, grader=grader)


@given(st.text(alphabet="0123456789,./-+$ #", max_size=30))
def test_a_plain_number_is_one_that_the_strict_grader_reads_to_the_end(text):
    number = plain_number(text)
    if number is not None:
        assert strict_number(f"#### {text}") == number


@pytest.mark.parametrize("text", ["", "x", "1 2", "18 eggs", "#### 18", "1,2345", "1/0"])
def test_a_plain_number_is_nothing_but_the_number(text):
    assert plain_number(text) is None


@pytest.mark.parametrize(
    ("text", "reference", "grader", "finished", "verdict"),
    [
        ("#### 18", "18", "strict", True, "correct"),
        ("#### 18", "18", "strict", False, "correct"),
        ("#### 18.0", "18", "strict", True, "correct"),
        ("#### 17.6", "18", "strict", True, "wrong"),
        ("#### 1,080", "1,080", "strict", True, "correct"),
        ("The answer is: 17.6", "18", "pissa", True, "correct"),
        ("The answer is: 17.6", "88/5", "pissa", True, "correct"),
        ("The answer is: 1,234,567", "1234567", "pissa", True, "wrong"),
        ("The answer is:18", "18", "pissa", True, "wrong"),
        ("The answer is:18", "18", "pissa", False, "truncated"),
        ("and so on", "18", "strict", True, "wrong"),
        ("and so on and", "18", "strict", False, "truncated"),
        ("", "18", "strict", True, "wrong"),
        ("#### 19", "18", "strict", False, "wrong"),
        ("#### 18", None, "strict", True, "error"),
        ("", None, "pissa", False, "error"),
    ],
)
def test_an_answer_gets_the_verdict_that_its_number_and_its_end_deserve(
    text, reference, grader, finished, verdict
):
    assert judge(text, reference=reference, grader=grader, finished=finished) == verdict


def test_an_unknown_grader_is_named_with_those_there_are():
    with pytest.raises(EvaluationError, match=r"'exact' is unknown; choose pissa or strict"):
        judge("#### 1", reference="1", grader="exact", finished=True)


def test_a_reference_that_is_no_number_is_a_mistake_of_the_task_not_of_the_answer():
    with pytest.raises(EvaluationError, match=r"'x\+1' is no number"):
        judge("#### 1", reference="x+1", grader="strict", finished=True)
