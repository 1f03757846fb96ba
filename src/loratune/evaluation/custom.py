"""A task of the user's own: one YAML file, named by its path in a study's `evaluate.tasks`.

    task: colours                      # its name in tables
    data: colours.jsonl                # as a study's `train:`; relative to this file
    prompt: "Question: {question}\\nAnswer:"   # fields of a row in braces; the complete prompt
    reference: "{answer}"              # likewise
    grader: exact                      # exact | number | strict | pissa | plain | normalised
    extract: "Answer: (.*)"            # optional: its first group is what is judged
    choices: options                   # a field that lists them; graders plain and normalised
    stop: ["\\n"]                      # optional
    max_new_tokens: 64

For choices `reference` is the right one's text, or its number from 0. The version that goes into
every score is the file's own content together with that of the graders, so that a changed task's
scores are others.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from loratune.data.sources import read_rows, source_name
from loratune.data.templates import fill, value_of
from loratune.errors import DataError, EvaluationError
from loratune.evaluation import choice, graders
from loratune.evaluation.graders import CHOICE_GRADERS, NUMBER_GRADERS, plain_number, read_number
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import GraderName, Section, Source, StopString, source_of

SUFFIXES = (".yaml", ".yml")


def _tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else (value,)


class CustomTask(Section):
    """The file of a task."""

    task: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    data: Annotated[Source, BeforeValidator(source_of)]
    prompt: str
    reference: str
    grader: GraderName
    extract: str | None = None
    choices: str | None = None
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_tuple)] = ()
    max_new_tokens: int = Field(default=256, gt=0)


def is_custom(name: str) -> bool:
    """Whether a study names a file by this, not a task."""
    return name.endswith(SUFFIXES)


def read_task(path: Path) -> TaskDefinition:
    """The task of a file.

    Raises:
        EvaluationError: no such file, or it is no task.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content: object = YAML(typ="safe", pure=True).load(text)  # pyright: ignore[reportUnknownMemberType]
        read = CustomTask.model_validate(content)
    except OSError as error:
        raise EvaluationError(f"task file {path} cannot be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        said = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise EvaluationError(f"task file {path}: {' '.join(said.split())}") from error
    _check(read, path)
    file_hash = f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return TaskDefinition(
        name=read.task,
        version=version_of(file_hash, is_choice=read.choices is not None),
        split="test",
        grader=read.grader,
        max_new_tokens=None if read.choices else read.max_new_tokens,
        stop=read.stop,
        load=partial(_load, read, path),
        on_hub=read.data.id is not None,
        extract=read.extract,
        prompt="{prompt}",  # The file's own prompt is complete.
    )


def version_of(file_hash: str, *, is_choice: bool = False) -> str:
    """The version of a task: its file, and how its answers are judged or its choices put."""
    how = f"choices={choice.VERSION}" if is_choice else f"graders={graders.VERSION}"
    return f"{file_hash};{how}"


def file_hash_of(version: str) -> str:
    """What a version says of the file alone; older versions are nothing else."""
    return version.partition(";")[0]


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    if not problem["loc"]:
        required = [name for name, one in CustomTask.model_fields.items() if one.is_required()]
        return f"holds no `key: value` lines; expected at least {', '.join(required)}"
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _check(read: CustomTask, path: Path) -> None:
    if read.grader == "tests":
        raise EvaluationError(f"task file {path}: grader tests is for humaneval and mbpp alone")
    if (read.grader in CHOICE_GRADERS) != (read.choices is not None):
        raise EvaluationError(
            f"task file {path}: grader {read.grader} and choices {read.choices}; graders "
            f"{' and '.join(CHOICE_GRADERS)} need `choices:`, the others have none"
        )
    if read.extract is not None:
        try:
            groups = re.compile(read.extract).groups
        except re.error as error:
            raise EvaluationError(f"task file {path}: extract: {error}") from error
        if groups < 1:
            raise EvaluationError(
                f"task file {path}: extract {read.extract!r} has no group in parentheses; its "
                "first one is what is judged"
            )


def _load(
    read: CustomTask, path: Path, source: Source | None, folder: Path
) -> tuple[Question, ...]:
    """The questions in their order; data is relative to the task's file."""
    del folder
    try:
        rows = read_rows(source or read.data, folder=path.parent)
        questions = tuple(
            _question(read, row, where=f"{source_name(read.data)}, row {number}")
            for number, row in enumerate(rows, start=1)
        )
    except DataError as error:
        raise EvaluationError(f"task {read.task}: {error}") from error
    if questions and all(one.reference is None for one in questions):
        raise EvaluationError(
            f"task {read.task}: grader {read.grader} finds no number in any of {len(questions)} "
            f"references ({read.reference!r} of {source_name(source or read.data)}); name the "
            "field that holds the answer, or take grader exact"
        )
    return questions


def _question(read: CustomTask, row: Mapping[str, Any], *, where: str) -> Question:
    prompt, reference = (_filled(text, row, where) for text in (read.prompt, read.reference))
    if read.choices is not None:
        listed = row.get(read.choices)
        if not isinstance(listed, list) or not listed:
            raise DataError(f"{where}: {read.choices} is {listed!r}; expected a list of choices")
        choices = tuple(str(one) for one in cast("list[Any]", listed))
        right = choices.index(reference) if reference in choices else _index(reference, choices)
        if right is None:
            raise DataError(f"{where}: the reference {reference!r} is none of {list(choices)}")
        return Question(prompt, str(right), choices)
    if read.grader in NUMBER_GRADERS:
        # The reference may be the number itself, or an answer in which the grader reads it.
        number = plain_number(reference)
        if number is None:
            number = read_number(reference, grader=read.grader)
        return Question(prompt, None if number is None else str(number))
    return Question(prompt, reference)


def _index(text: str, choices: tuple[str, ...]) -> int | None:
    return int(text) if text.isdecimal() and int(text) < len(choices) else None


def _filled(text: str, row: Mapping[str, Any], where: str) -> str:
    """A template in braces filled, or the field of that name."""
    return fill(text, row, where=where) if "{" in text else value_of(row, text, where=where)
