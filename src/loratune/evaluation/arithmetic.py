"""Word problems with one number as their answer: SVAMP, MultiArith, AddSub and SingleEq.

Each takes any data in one of these formats, which its copies on the hub and in the repositories of
papers have: `Body` and `Question` with `Answer` (SVAMP's own); `question` with `final_ans`;
`instruction` with `answer` (LLM-Adapters'). AddSub and SingleEq have no data set on the hub that
could be named for good, so that a study says where its copy is.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loratune.data.sources import read_rows, source_name
from loratune.data.templates import value_of
from loratune.errors import DataError, EvaluationError
from loratune.evaluation.graders import VERSION, plain_number
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import Source

# Fields whose texts make the question, and the one that holds the answer.
_FORMATS = (
    (("Body", "Question"), "Answer"),
    (("question",), "final_ans"),
    (("instruction",), "answer"),
    (("question",), "answer"),
)


def load(
    source: Source | None, folder: Path, *, task: str, hub: Source | None
) -> tuple[Question, ...]:
    """The questions in their order.

    Raises:
        EvaluationError: the data cannot be had, or a row is in none of the formats.
    """
    source = source or hub
    if source is None:
        raise EvaluationError(
            f"task {task} has no data set of its own on the hub; name your copy: in a study "
            f"{{name: {task}, data: {task}.json}}, in a call --data {task}.json"
        )
    try:
        rows = read_rows(source, folder=folder)
        return tuple(
            _question(row, task=task, where=f"{source_name(source)}, row {number}")
            for number, row in enumerate(rows, start=1)
        )
    except DataError as error:
        raise EvaluationError(f"task {task}: {error}") from error


def _question(row: Mapping[str, Any], *, task: str, where: str) -> Question:
    for fields, answer in _FORMATS:
        if {*fields, answer} <= row.keys():
            parts = [value_of(row, field, where=where).strip() for field in fields]
            # SVAMP's Body ends without a full stop.
            text = parts[0] if len(parts) == 1 else f"{parts[0].rstrip('.')}. {parts[1]}"
            return Question(text, _number(row[answer], task=task, where=where))
    known = "; ".join(", ".join((*fields, answer)) for fields, answer in _FORMATS)
    raise EvaluationError(f"task {task}: {where}: has {', '.join(row)}; expected one of {known}")


def _number(value: Any, *, task: str, where: str) -> str:
    number = plain_number(str(value))
    if number is None:
        raise EvaluationError(f"task {task}: {where}: the answer {value!r} is no number")
    return str(number)


def _task(name: str, hub: Source | None) -> TaskDefinition:
    return TaskDefinition(
        name=name,
        version=f"1.{VERSION}",
        split="test",
        grader="strict",
        max_new_tokens=512,
        stop=(),
        load=partial(load, task=name, hub=hub),
        takes_data=True,
        on_hub=hub is not None,
    )


SVAMP = _task("svamp", Source(id="ChilleD/SVAMP", split="test"))
# All 600, as papers ask them; its parts are the copy's own.
MULTIARITH = _task("multiarith", Source(id="ChilleD/MultiArith", split="train+test"))
ADDSUB = _task("addsub", None)
SINGLEEQ = _task("singleeq", None)
