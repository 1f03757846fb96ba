import json
import os
from importlib import import_module
from pathlib import Path

import pytest

from loratune.errors import EvaluationError
from loratune.evaluation import mbpp
from loratune.evaluation.code_answers import grade_code, read_reference
from loratune.evaluation.sandbox import Isolation, available_isolations
from loratune.study.schema import Source

# In MBPP's sanitized format, with what makes it hard: a function that is named as a builtin, and
# a module that the tests take from the reference code.
ROW = {
    "task_id": 1,
    "prompt": "Write a function to add two numbers.",
    "code": "import sys\ndef sum(a, b):\n    '\\w'\n    return a + b",
    "test_imports": ["import math"],
    "test_list": [
        "assert sum(1, 2) == 3",
        "assert math.isclose(sum(0.1, 0.2), 0.3)",
        "assert sum(sys.maxsize, 1) > sys.maxsize",
    ],
}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(row, folder):
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    (question,) = mbpp.load(Source(file="rows.json"), folder)
    return question


def verdict_of(text, question):
    ((verdict, _),) = grade_code(
        [text], [question.reference], finished=[True], isolation=Isolation("none")
    )
    return verdict


def test_the_question_is_the_papers_with_the_tests(tmp_path):
    question = load(ROW, tmp_path)
    assert question.text == (
        "You are an expert Python programmer, and here is your task: Write a function to add two "
        "numbers. Your code should pass these tests:\n\n" + "\n".join(ROW["test_list"]) + "\n"
    )
    assert question.reference is not None
    assert read_reference(question.reference).names == ("sum",)


def test_the_reference_passes_and_what_it_imports_does_not_have_to_be_imported(tmp_path):
    question = load(ROW, tmp_path)
    assert verdict_of(ROW["code"], question) == "correct"
    assert verdict_of("```python\ndef sum(a, b): return a + b\n```", question) == "correct"
    assert verdict_of("def sum(a, b): return a - b", question) == "wrong"
    assert verdict_of("def add(a, b): return a + b", question) == "wrong"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_list": "assert sum(1, 2) == 3"}, "field 'test_list' is no list of texts"),
        ({"test_imports": None}, "field 'test_imports' is no list of texts"),
        ({"code": "def sum("}, "code or tests are no Python"),
        ({"test_list": ["assert add(1, 2)"]}, "the tests use nothing that the code defines"),
        ({"prompt": None}, "field 'prompt' is null"),
    ],
)
def test_a_row_in_another_format_is_refused(changes, message, tmp_path):
    with pytest.raises(EvaluationError, match=f"task mbpp: rows.json, row 1: {message}"):
        load({**ROW, **changes}, tmp_path)


@pytest.mark.slow
def test_all_sanitized_references_pass(monkeypatch):
    """427 of 427, behind every isolation; the data is not shipped."""
    folder = os.environ.get("LORATUNE_CODE_DATA")
    if folder is None:
        pytest.skip("LORATUNE_CODE_DATA names no folder with humaneval/ and mbpp/")
    monkeypatch.syspath_prepend(BENCHMARKS)
    grade_references = import_module("code_references").grade_references
    path = Path(folder) / "mbpp" / "sanitized-mbpp.json"
    for isolation in available_isolations():
        verdicts, _ = grade_references(mbpp, "code", path, isolation)
        assert [verdict for verdict, _ in verdicts] == ["correct"] * 427
