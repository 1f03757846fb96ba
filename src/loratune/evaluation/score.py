"""One adapter's account on one task: ask, generate, judge, count.

The base stays resident and is left as it was, bit for bit. What is written where is not known here.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from loratune.engine.decoding import ContinuationScore
from loratune.errors import EvaluationError
from loratune.evaluation.code_answers import grade_code
from loratune.evaluation.generate import generate_answers
from loratune.evaluation.graders import (
    CHOICE_GRADERS,
    Verdict,
    extracted,
    judge,
    judge_choice,
    judge_exact,
)
from loratune.evaluation.likelihood import Continuation, log_likelihoods
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.sandbox import choose_isolation
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.attach_files import attach_files
from loratune.models.load import Base
from loratune.records import NO_ANSWER, Answer, Prediction, Score

# Why an answer is an error where its question has nothing that could judge it.
NO_REFERENCE = "the question has no reference"
NOT_FINITE = (
    "the model's logits are not finite: a weight of it or of the adapter is NaN or too large"
)


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
        answers = answer_questions(base, questions, rows_per_batch=rows_per_batch)
    finally:
        if attached is not None:
            attached.detach()
    return grade(answers, questions, unsafe_exec=unsafe_exec)


def answer_questions(
    base: Base, questions: TaskQuestions, *, rows_per_batch: int = 16
) -> list[Answer]:
    """What the base, with whatever is attached to it, says to every question, in their order.

    Of a question with choices the text is the JSON list of their log-likelihoods.

    Raises:
        EvaluationError: a prompt and its answer are too long for the model.
    """
    if questions.choices:
        return _likelihoods(base, questions, rows_per_batch=rows_per_batch)
    return generate_answers(
        base,
        questions.prompt_ids,
        max_new_tokens=questions.max_new_tokens,
        stop=questions.stop,
        end_ids=questions.end_ids,
        rows_per_batch=rows_per_batch,
    )


def _likelihoods(base: Base, questions: TaskQuestions, *, rows_per_batch: int) -> list[Answer]:
    """Of each question the JSON list of its choices' log-likelihoods, as an answer."""
    asked = [
        Continuation(prompt, choice)
        for prompt, choices in zip(questions.prompt_ids, questions.choice_ids, strict=True)
        for choice in choices
    ]
    found = iter(log_likelihoods(base, asked, rows_per_batch=rows_per_batch))
    answers = list[Answer]()
    for choices in questions.choice_ids:
        of_one = [next(found) for _ in choices]
        answers.append(choices_answer(of_one))
    return answers


def choices_answer(scores: Sequence[ContinuationScore]) -> Answer:
    """The answer to a question with choices: the JSON list of their log-likelihoods."""
    return Answer(
        text=json.dumps([one.value for one in scores]),
        num_tokens=sum(one.num_tokens for one in scores),
        finished=True,
    )


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
    judged = _judged(answers, questions, unsafe_exec=unsafe_exec)
    for index, answer in enumerate(answers):
        if answer == NO_ANSWER:
            judged[index] = ("error", NOT_FINITE)
    predictions = tuple(
        Prediction(
            question_index=index,
            text=answer.text,
            num_tokens=answer.num_tokens,
            verdict=verdict,
            finished=answer.finished,
            reason=reason or None,
        )
        for index, (answer, (verdict, reason)) in enumerate(zip(answers, judged, strict=True))
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


def _judged(
    answers: Sequence[Answer], questions: TaskQuestions, *, unsafe_exec: bool
) -> list[tuple[Verdict, str]]:
    """Each answer's verdict, and why it is not correct where that is known."""
    if questions.grader == "tests":
        return grade_code(
            [answer.text for answer in answers],
            questions.references,
            finished=[answer.finished for answer in answers],
            isolation=choose_isolation(unsafe_exec=unsafe_exec),
        )
    if questions.grader in CHOICE_GRADERS:
        return [
            (
                judge_choice(values, choices, reference=reference, grader=questions.grader),
                NOT_FINITE if any(math.isnan(one) for one in values) else "",
            )
            for answer, choices, reference in zip(
                answers, questions.choices, questions.references, strict=True
            )
            for values in [json.loads(answer.text)]
        ]
    return [
        (_judge_text(answer, reference, questions), "" if reference is not None else NO_REFERENCE)
        for answer, reference in zip(answers, questions.references, strict=True)
    ]


def _judge_text(answer: Answer, reference: str | None, questions: TaskQuestions) -> Verdict:
    text = extracted(answer.text, questions.extract)
    if questions.grader == "exact":
        return judge_exact(text, reference=reference, finished=answer.finished)
    return judge(text or "", reference=reference, grader=questions.grader, finished=answer.finished)
