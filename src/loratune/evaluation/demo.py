"""The test split of the shipped task, `demo:task`: made from its seed, nothing to download."""

from pathlib import Path

from loratune.data.demo_task import DEFAULT_NUM_ROWS, DEFAULT_SEED, generate_rows
from loratune.errors import EvaluationError
from loratune.evaluation.graders import VERSION, strict_number
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import Source


def load(source: Source | None, folder: Path) -> tuple[Question, ...]:
    """The questions of the test split; no training row has the same one.

    Raises:
        EvaluationError: a source was given.
    """
    if source is not None:
        raise EvaluationError("task demo makes its own questions; remove its `data:`")
    rows = generate_rows(DEFAULT_NUM_ROWS["test"], seed=DEFAULT_SEED, split="test")
    return tuple(Question(row["question"], _reference(row["answer"])) for row in rows)


def _reference(answer: str) -> str:
    number = strict_number(answer)
    assert number is not None, answer
    return str(number)


TASK = TaskDefinition(
    name="demo",
    version=f"1.{VERSION}",
    split="test",
    grader="strict",
    max_new_tokens=64,  # the longest worked answer has about half as many
    stop=(),
    load=load,
    on_hub=False,
)
