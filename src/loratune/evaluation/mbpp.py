"""MBPP (Austin et al. 2021, arXiv 2108.07732): short functions to write from a sentence.

The sanitized problems: the test split of the hub's google-research-datasets/mbpp, 257 of the 427,
or any data in its format: `prompt`, `code`, `test_imports` and `test_list`. The question holds the
tests, as in the paper: without them nobody could know the function's name. The reference `code` is
read for the names that tests call and for the modules that they take from it; it is not run.
"""

import ast
import warnings
from pathlib import Path
from typing import Any, cast

from loratune.data.sources import read_rows, source_name
from loratune.data.templates import value_of
from loratune.errors import DataError, EvaluationError
from loratune.evaluation.code_answers import CodeReference
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import Source

HUB_SOURCE = Source(id="google-research-datasets/mbpp", subset="sanitized", split="test")

# The paper's words.
_QUESTION = (
    "You are an expert Python programmer, and here is your task: {prompt} "
    "Your code should pass these tests:\n\n{tests}\n"
)


def load(source: Source | None, folder: Path) -> tuple[Question, ...]:
    """The questions in their order.

    Raises:
        EvaluationError: the data cannot be had, or a row is not in the format.
    """
    source = HUB_SOURCE if source is None else source
    questions: list[Question] = []
    try:
        for number, row in enumerate(read_rows(source, folder=folder), start=1):
            where = f"{source_name(source)}, row {number}"
            tests = "\n".join(_texts(row, "test_list", where=where))
            imports = "\n".join(_texts(row, "test_imports", where=where))
            reference = _reference(
                value_of(row, "code", where=where), tests=tests, imports=imports, where=where
            )
            text = _QUESTION.format(prompt=value_of(row, "prompt", where=where), tests=tests)
            questions.append(Question(text, reference.to_text()))
    except DataError as error:
        raise EvaluationError(f"task mbpp: {error}") from error
    return tuple(questions)


def _texts(row: dict[str, Any], field: str, *, where: str) -> list[str]:
    value = row.get(field)
    texts = cast("list[Any]", value) if isinstance(value, list) else [None]
    if not all(isinstance(one, str) for one in texts):
        raise DataError(
            f"{where}: field {field!r} is no list of texts; give the sanitized problems"
        )
    return cast("list[str]", texts)


def _reference(code: str, *, tests: str, imports: str, where: str) -> CodeReference:
    try:
        with warnings.catch_warnings(action="ignore"):  # code of 2021: "\w" was no offence then
            body, test_tree = ast.parse(code).body, ast.parse(tests)
    except SyntaxError as error:
        raise DataError(f"{where}: code or tests are no Python: {error}") from error
    used = {node.id for node in ast.walk(test_tree) if isinstance(node, ast.Name)}
    defined = {one.name for one in body if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
    names = tuple(sorted(used & defined))
    if not names:
        raise DataError(f"{where}: the tests use nothing that the code defines")
    taken = [
        ast.unparse(one)
        for one in body
        if isinstance(one, (ast.Import, ast.ImportFrom))
        and used & {alias.asname or alias.name for alias in one.names}
    ]
    return CodeReference(prefix="", tests=tests, names=names, setup="\n".join([imports, *taken]))


TASK = TaskDefinition(
    name="mbpp",
    version="2",
    split="test",
    grader="tests",
    max_new_tokens=512,  # as HumanEval's own harness is mostly run; no reference is as long
    stop=(),
    load=load,
    takes_data=True,
)
