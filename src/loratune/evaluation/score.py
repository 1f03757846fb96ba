"""One adapter's account on one task: ask, generate, judge, count.

The base stays resident and is left as it was, bit for bit. What is written where is not known here.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from loratune.errors import EvaluationError
from loratune.evaluation.code_answers import grade_code
from loratune.evaluation.generate import Answer, generate_answers
from loratune.evaluation.graders import Verdict, judge
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.sandbox import choose_isolation
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.attach_files import attach_files
from loratune.models.load import Base
from loratune.records import Prediction, Score


def score_task(
    base: Base,
    adapter: AdapterFiles | Path | None,
    questions: TaskQuestions,
    *,
    rows_per_batch: int = 16,
    unsafe_exec: bool = False,
) -> tuple[Score, tuple[Prediction, ...]]:
    """Ask one adapter every question; the predictions are in the order of the questions.

    Args:
        base: the base that the adapter was trained on, carrying no adapter.
        adapter: in memory, a folder in PEFT's format, or None for the plain base.
        questions: see `tasks.ask` and `tasks.ask_validation`.
        rows_per_batch: questions answered at once; for speed and memory alone.
        unsafe_exec: see `grade`.

    Raises:
        EvaluationError: as `grade` says, no questions, or a prompt and its answer are too long for
            the model.
        ModelError: the adapter cannot be read or does not fit the base, or the base carries one
            already.
    """
    if not questions.prompts:
        raise EvaluationError(f"task {questions.task} has no questions; give at least one")
    # The base is adapted in place, so that it answers with the adapter until that is detached.
    attached = None if adapter is None else attach_files(base.model, adapter)
    try:
        answers = generate_answers(
            base,
            questions.prompt_ids,
            max_new_tokens=questions.max_new_tokens,
            stop=questions.stop,
            end_ids=questions.end_ids,
            rows_per_batch=rows_per_batch,
        )
    finally:
        if attached is not None:
            attached.detach()
    return grade(answers, questions, unsafe_exec=unsafe_exec)


def grade(
    answers: Sequence[Answer], questions: TaskQuestions, *, unsafe_exec: bool = False
) -> tuple[Score, tuple[Prediction, ...]]:
    """Judge answers, one for each question in its order, and count the verdicts.

    An answer that the token limit cut off is `truncated` only where no number can be read in it; of
    a program, see `grade_code`.

    Args:
        answers: what was generated.
        questions: what was asked.
        unsafe_exec: where generated code is run, see `sandbox.choose_isolation`.

    Raises:
        EvaluationError: generated code has to be run and cannot be isolated here.
    """
    if questions.grader == "tests":
        graded = grade_code(
            [answer.text for answer in answers],
            questions.references,
            finished=[answer.finished for answer in answers],
            isolation=choose_isolation(unsafe_exec=unsafe_exec),
        )
        verdicts: list[Verdict] = [verdict for verdict, _ in graded]
    else:
        verdicts = [
            judge(
                answer.text,
                reference=reference,
                grader=questions.grader,
                finished=answer.finished,
            )
            for answer, reference in zip(answers, questions.references, strict=True)
        ]
    predictions = tuple(
        Prediction(
            question_index=index, text=answer.text, num_tokens=answer.num_tokens, verdict=verdict
        )
        for index, (answer, verdict) in enumerate(zip(answers, verdicts, strict=True))
    )
    counts = Counter(prediction.verdict for prediction in predictions)
    score = Score(
        task=questions.task,
        task_version=questions.version,
        grader=questions.grader,
        decoding=questions.decoding,
        split=questions.split,
        correct=counts["correct"],
        wrong=counts["wrong"],
        truncated=counts["truncated"],
        errors=counts["error"],
    )
    return score, predictions
