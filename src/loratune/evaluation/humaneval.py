"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions to write from their docstrings.

The hub's openai/openai_humaneval, 164 problems, or any data in its format: `prompt`, `entry_point`
and `test`, whose `check(candidate)` judges. The reference implementation in the data is not used.

The prompt's own code runs beside the tests, because tests call helpers that it defines: a program
that defines a helper anew does not change what it is judged with.
"""

import ast
import warnings
from pathlib import Path

from loratune.data.sources import read_rows, source_name
from loratune.data.templates import value_of
from loratune.errors import DataError, EvaluationError
from loratune.evaluation.code_answers import CodeReference
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import Source

HUB_SOURCE = Source(id="openai/openai_humaneval", split="test")


def load(source: Source | None, folder: Path) -> tuple[Question, ...]:
    """The questions in their order; a question's text is the prompt as it is.

    Raises:
        EvaluationError: the data cannot be had, or a row is not in HumanEval's format.
    """
    source = HUB_SOURCE if source is None else source
    questions: list[Question] = []
    try:
        for number, row in enumerate(read_rows(source, folder=folder), start=1):
            where = f"{source_name(source)}, row {number}"
            prompt, name, test = (
                value_of(row, field, where=where) for field in ("prompt", "entry_point", "test")
            )
            reference = CodeReference(
                prefix=prompt,
                tests=f"{test}\ncheck({name})\n",
                names=(name,),
                setup=_runnable(prompt),
            )
            questions.append(Question(prompt, reference.to_text()))
    except DataError as error:
        raise EvaluationError(f"task humaneval: {error}") from error
    return tuple(questions)


def _runnable(prompt: str) -> str:
    """The prompt as a whole program: a function without a docstring gets a body."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(prompt)
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"
    return prompt


TASK = TaskDefinition(
    name="humaneval",
    version="2",
    split="test",
    grader="tests",
    max_new_tokens=512,  # as HumanEval's own harness is mostly run; no reference is as long
    stop=(),
    load=load,
    takes_data=True,
)
