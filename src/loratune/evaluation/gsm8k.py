"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with whole numbers.

The test split of the hub's openai/gsm8k, 1,319 questions, or any data in its format: a `question`,
and an `answer` that ends with `#### n`.
"""

from pathlib import Path

from loratune.data.sources import read_rows, source_name
from loratune.data.templates import value_of
from loratune.errors import DataError, EvaluationError
from loratune.evaluation.graders import VERSION, plain_number
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import Source

HUB_SOURCE = Source(id="openai/gsm8k", subset="main", split="test")


def load(source: Source | None, folder: Path) -> tuple[Question, ...]:
    """The questions in their order.

    Raises:
        EvaluationError: the data cannot be had, or a row is not in GSM8K's format.
    """
    source = HUB_SOURCE if source is None else source
    try:
        rows = read_rows(source, folder=folder)
        questions: list[Question] = []
        for number, row in enumerate(rows, start=1):
            where = f"{source_name(source)}, row {number}"
            text = value_of(row, "question", where=where)
            answer = value_of(row, "answer", where=where)
            questions.append(Question(text, _reference(answer, where=where)))
    except DataError as error:
        raise EvaluationError(f"task gsm8k: {error}") from error
    return tuple(questions)


def _reference(answer: str, *, where: str) -> str:
    """The number behind the last `####`, commas dropped."""
    _, marker, tail = answer.rpartition("####")
    number = plain_number(tail) if marker else None
    if number is None:
        raise EvaluationError(
            f"task gsm8k: {where}: the answer ends {answer[-40:]!r}; expected '#### ' and a number"
        )
    return str(number)


TASK = TaskDefinition(
    name="gsm8k",
    version=f"1.{VERSION}",
    split="test",
    grader="strict",
    max_new_tokens=512,  # no worked answer of the data set is as long, in any tokenizer
    stop=(),
    load=load,
    takes_data=True,
)
