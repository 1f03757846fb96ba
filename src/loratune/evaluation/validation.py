"""Accuracy on the study's own held-out rows, for `select_on: validation_accuracy`.

The rows' responses are the references. A grader reads them as it reads an answer: a response in
which it finds no number could never be answered rightly, so its question counts as an error.
(MetaMathQA has such rows: its answers to MATH problems are often LaTeX.)
"""

from collections.abc import Sequence

from loratune.errors import EvaluationError
from loratune.evaluation.graders import VERSION, read_number
from loratune.evaluation.questions import TaskDefinition

TASK = TaskDefinition(
    name="validation",
    version=f"1.{VERSION}",
    split="validation",
    grader="strict",
    max_new_tokens=None,
    stop=(),
    load=None,
)


def references(responses: Sequence[str], *, grader: str) -> tuple[str | None, ...]:
    """The number that `grader` reads in each response; None where it reads none.

    Raises:
        EvaluationError: there are no responses, or it reads none in any of them.
    """
    if not responses:
        raise EvaluationError(
            "task validation needs held-out rows; add data.validation, such as {rows: 512}"
        )
    numbers = [read_number(response, grader=grader) for response in responses]
    if all(number is None for number in numbers):
        raise EvaluationError(
            f"task validation: grader {grader!r} reads no number in any of the {len(numbers)} "
            f"held-out responses (the first ends {responses[0][-40:]!r}); choose another grader, "
            "or select on validation_loss"
        )
    return tuple(None if number is None else str(number) for number in numbers)


def room_for(response_lengths: Sequence[int]) -> int:
    """A token limit for answers to questions whose references have these lengths in tokens.

    Half as much again as the longest reference with its EOS: an answer that needs more has gone
    astray. (A choice, not a measurement.)
    """
    return max(response_lengths) * 3 // 2 + 1
