import json
import os
from importlib import import_module
from pathlib import Path

import pytest

from loratune.errors import EvaluationError
from loratune.evaluation import humaneval
from loratune.evaluation.code_answers import grade_code, read_reference
from loratune.evaluation.sandbox import Isolation, available_isolations
from loratune.study.schema import Source

# In HumanEval's format, with what makes it hard: a helper of the prompt that the tests call.
ROW = {
    "task_id": "Ours/0",
    "prompt": "def encode(s: str):\n    return s[::-1]\n\n\n"
    'def decode(s: str):\n    """Undoes encode."""\n',
    "entry_point": "decode",
    "canonical_solution": "    return s[::-1]\n",
    "test": "def check(candidate):\n    for s in ('abc', 'de'):\n"
    "        assert candidate(encode(s)) == s\n",
}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def question(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    (one,) = humaneval.load(Source(file=path.name), tmp_path)
    return one


def verdict_of(text, question):
    ((verdict, _),) = grade_code(
        [text], [question.reference], finished=[True], isolation=Isolation("none")
    )
    return verdict


def test_the_question_is_the_prompt_and_the_reference_holds_the_tests_alone(question):
    assert question.text == ROW["prompt"]
    assert ROW["canonical_solution"] not in question.reference
    assert read_reference(question.reference).names == ("decode",)


def test_the_reference_solution_passes_and_another_does_not(question):
    assert verdict_of(ROW["canonical_solution"], question) == "correct"
    assert verdict_of("    return s\n", question) == "wrong"
    assert verdict_of("```python\ndef decode(s):\n    return s[::-1]\n```", question) == "correct"
    assert verdict_of("```python\ndef other(s):\n    return s[::-1]\n```", question) == "wrong"


def test_a_program_that_defines_the_tests_helper_anew_is_judged_with_the_prompts(question):
    fake = "    return s\n\ndef encode(s):\n    return s\n"
    assert verdict_of(fake, question) == "wrong"
    names = {}  # and it would pass in one process
    exec(ROW["prompt"] + fake + ROW["test"] + "\ncheck(decode)", names)


def test_a_prompt_without_a_docstring_is_no_hindrance(tmp_path):
    row = {**ROW, "prompt": ROW["prompt"].replace('    """Undoes encode."""\n', "")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (question,) = humaneval.load(Source(file="rows.jsonl"), tmp_path)
    assert verdict_of(ROW["canonical_solution"], question) == "correct"


@pytest.mark.parametrize("field", ["prompt", "entry_point", "test"])
def test_a_row_without_a_field_is_refused(field, tmp_path):
    row = {name: value for name, value in ROW.items() if name != field}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(EvaluationError, match=f"task humaneval: rows.jsonl, row 1 .*'{field}'"):
        humaneval.load(Source(file="rows.jsonl"), tmp_path)


@pytest.mark.slow
def test_all_canonical_solutions_pass(monkeypatch):
    """164 of 164, behind every isolation; the data is not shipped."""
    folder = os.environ.get("LORATUNE_CODE_DATA")
    if folder is None:
        pytest.skip("LORATUNE_CODE_DATA names no folder with humaneval/ and mbpp/")
    monkeypatch.syspath_prepend(BENCHMARKS)
    grade_references = import_module("code_references").grade_references
    path = Path(folder) / "humaneval" / "HumanEval.jsonl.gz"
    for isolation in available_isolations():
        verdicts, _ = grade_references(humaneval, "canonical_solution", path, isolation)
        assert [verdict for verdict, _ in verdicts] == ["correct"] * 164
