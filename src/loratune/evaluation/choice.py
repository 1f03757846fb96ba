"""Multiple choice by log-likelihood: ARC, BoolQ, OpenBookQA and PIQA.

A model is not asked to write: of each choice, put after the prompt, the log-likelihood counts. Rows
are in the format of the data sets on the hub, or in LLM-Adapters', which puts the choices into the
instruction ("Answer1: ... Answer2: ..."); there they are read out again, since an enumeration in
the prompt and its texts as continuations would be another task.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loratune.data.sources import read_rows, source_name
from loratune.errors import DataError, EvaluationError
from loratune.evaluation.questions import Question, TaskDefinition
from loratune.study.schema import GraderName, Source

# Of how a choice is put after its prompt (`tasks.ask`), a user's own tasks included. 2: white space
# at the end of a prompt goes to the choice.
VERSION = "2"

_ASKED = re.compile(
    r"^Please .*?(?:question|solution to the question|true or false, question): ?", re.S
)
_NUMBERED = re.compile(r"\b(?:Answer|Solution)([0-9]+): ")
_FORMAT = "Answer format:"


def load(
    source: Source | None, folder: Path, *, task: str, hub: Source, read: "_Reader"
) -> tuple[Question, ...]:
    """The questions in their order.

    Raises:
        EvaluationError: the data cannot be had, or a row is in neither format.
    """
    source = source or hub
    try:
        rows = read_rows(source, folder=folder)
    except DataError as error:
        raise EvaluationError(f"task {task}: {error}") from error
    questions = list[Question]()
    for number, row in enumerate(rows, start=1):
        try:
            made = _from_instruction(row) if "instruction" in row else read(row)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise EvaluationError(
                f"task {task}: {source_name(source)}, row {number}: not in the format of "
                f"{source_name(hub)} nor of LLM-Adapters ({error!r})"
            ) from error
        questions.append(made)
    return tuple(questions)


_Reader = Callable[[Mapping[str, Any]], Question]


def _labelled(row: Mapping[str, Any], *, stem: str) -> Question:
    """ARC's and OpenBookQA's rows: choices with labels, and the right one's label."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return Question(str(row[stem]), str(list(labels).index(row["answerKey"])), tuple(texts))


def _boolq(row: Mapping[str, Any]) -> Question:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer {row['answer']!r} is neither true nor false")
    return Question(f"{row['passage']}\n{row['question']}?", str(int(row["answer"])), ("no", "yes"))


def _piqa(row: Mapping[str, Any]) -> Question:
    label = int(row["label"])
    if label not in (0, 1):
        raise ValueError(f"label {label} of an unlabelled split")
    return Question(str(row["goal"]), str(label), (str(row["sol1"]), str(row["sol2"])))


def _from_instruction(row: Mapping[str, Any]) -> Question:
    text = str(row["instruction"]).partition(_FORMAT)[0].strip()
    text = _ASKED.sub("", text, count=1)
    answer = str(row["answer"]).strip()
    if answer in ("true", "false"):
        return Question(text, str(int(answer == "true")), ("false", "true"))
    parts = _NUMBERED.split(text)
    numbers, choices = parts[1::2], tuple(choice.strip() for choice in parts[2::2])
    if numbers != [str(number + 1) for number in range(len(choices))] or not choices:
        raise ValueError(f"choices numbered {numbers}")
    right = int(answer.removeprefix("answer").removeprefix("solution")) - 1
    if not 0 <= right < len(choices):
        raise ValueError(f"answer {answer!r} is none of {len(choices)} choices")
    return Question(parts[0].strip(), str(right), choices)


def _task(name: str, hub: Source, read: _Reader, grader: GraderName) -> TaskDefinition:
    return TaskDefinition(
        name=name,
        version=VERSION,
        split="test",
        grader=grader,
        max_new_tokens=None,
        stop=(),
        load=partial(load, task=name, hub=hub, read=read),
        takes_data=True,
    )


_ARC = "allenai/ai2_arc"
ARC_EASY = _task(
    "arc_easy",
    Source(id=_ARC, subset="ARC-Easy", split="test"),
    partial(_labelled, stem="question"),
    "normalised",
)
ARC_CHALLENGE = _task(
    "arc_challenge",
    Source(id=_ARC, subset="ARC-Challenge", split="test"),
    partial(_labelled, stem="question"),
    "normalised",
)
BOOLQ = _task("boolq", Source(id="google/boolq", split="validation"), _boolq, "plain")
OPENBOOKQA = _task(
    "openbookqa",
    Source(id="allenai/openbookqa", subset="main", split="test"),
    partial(_labelled, stem="question_stem"),
    "normalised",
)
# The authors' own copy is a program, which is not run; this is its data.
PIQA = _task("piqa", Source(id="baber/piqa", split="validation"), _piqa, "normalised")
