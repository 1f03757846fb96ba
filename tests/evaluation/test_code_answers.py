import json

import pytest

from loratune.errors import EvaluationError
from loratune.evaluation.code_answers import (
    CodeReference,
    extract_code,
    grade_code,
    program_of,
    read_reference,
)
from loratune.evaluation.sandbox import Isolation, Limits

NONE = Isolation("none")
REFERENCE = CodeReference(
    prefix='def add(a, b):\n    """Add."""\n',
    tests="assert add(1, 2) == 3",
    names=("add",),
    setup="",
)


@pytest.mark.parametrize(
    ("text", "code", "has_end"),
    [
        ("    return a + b", "    return a + b", False),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n", True),
        ("```py\nx = 1\n```", "x = 1\n", True),
        ("```\nx = 1\n```", "x = 1\n", True),
        ("```Python \r\nx = 1\n```", "x = 1\n", True),
        ("```python\nx = 1", "x = 1", False),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n", True),
        ("```bash\npip install x\n```\n```python\nx = 1\n```", "x = 1\n", True),
        ('x = 1\nif __name__ == "__main__":\n    f()', "x = 1\n", True),
        ("x = 1\n\n# Example usage:\nf()", "x = 1\n\n", True),
        ("x = 1\nassert x == 1\ny = 2", "x = 1\n", True),
        ("x = 1\nassert x\n# Example usage\nif", "x = 1\n", True),
        ("x = asserted", "x = ", True),  # as published: the word may be a part of another
        ("", "", False),
    ],
)
def test_the_code_in_an_answer_is_what_the_published_rules_leave(text, code, has_end):
    assert extract_code(text) == (code, has_end)


def test_the_rest_of_a_function_and_the_whole_function_both_follow_the_prompt():
    for text in ("    return a + b\n", "```python\ndef add(a, b):\n    return a + b\n```"):
        names = {}
        exec(program_of(text, REFERENCE), names)
        assert names["add"](1, 2) == 3


@pytest.mark.parametrize(
    ("text", "finished", "verdict"),
    [
        ("    return a + b", True, "correct"),
        ("    return a + b\n\ndef other(", True, "wrong"),
        ("    return a - b", True, "wrong"),
        ("    return a + b", False, "correct"),
        ("    return a +", False, "truncated"),
        ("```python\ndef add(a, b):\n    retu", False, "truncated"),
        ("```python\ndef add(a, b):\n    return a\n```\nThis fun", False, "wrong"),
        ("    return a\n\nassert add(1, 2", False, "wrong"),
        ("    while True: pass", True, "wrong"),
        ("", True, "wrong"),
    ],
)
def test_an_answer_is_correct_wrong_or_cut_off(text, finished, verdict):
    ((found, reason),) = grade_code(
        [text],
        [REFERENCE.to_text()],
        finished=[finished],
        isolation=NONE,
        limits=Limits(cpu_seconds=1),
    )
    assert found == verdict
    assert (reason == "") == (verdict == "correct")


def test_every_answer_has_its_verdict_whatever_the_others_are():
    no_tests = CodeReference(prefix="", tests="pass", names=("add",), setup="")
    references = [REFERENCE.to_text(), None, no_tests.to_text(), REFERENCE.to_text()]
    texts = ["    return a + b", "    return a + b", "", "    return 0"]
    graded = grade_code(texts, references, finished=[True] * 4, isolation=NONE)
    assert [verdict for verdict, _ in graded] == ["correct", "error", "error", "wrong"]
    assert [reason for _, reason in graded][1:3] == [
        "the question has no tests",
        "the tests never called the program",
    ]


def test_a_sandbox_that_does_not_start_is_an_error_with_its_reason(monkeypatch):
    from loratune.evaluation.sandbox import isolation

    monkeypatch.setattr(isolation, "_START", "raise SystemExit('no such wall')")
    ((verdict, reason),) = grade_code(
        ["    return a + b"], [REFERENCE.to_text()], finished=[True], isolation=NONE
    )
    assert verdict == "error"
    assert "did not start" in reason
    assert "no such wall" in reason


def test_a_reference_survives_being_a_text():
    assert read_reference(REFERENCE.to_text()) == REFERENCE
    assert read_reference(REFERENCE.to_text()).to_text() == REFERENCE.to_text()


@pytest.mark.parametrize("text", ["18", "{}", "[", json.dumps({"names": []}), '{"names": 3}'])
def test_a_reference_of_another_task_is_refused(text):
    with pytest.raises(EvaluationError, match="holds no tests"):
        read_reference(text)
