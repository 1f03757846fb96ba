"""Kept answers graded anew: no model, no GPU. What was scored before stays; scores are added.

Answers and what was asked are in the store. Scores of older versions came without their questions:
those are read from the tasks' own data again, and checked to be the ones that were asked.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.data.templates import prompt_for
from loratune.errors import EvaluationError
from loratune.evaluation.questions import Question, TaskQuestions
from loratune.evaluation.score import grade
from loratune.evaluation.tasks import check_tasks, load_questions, task
from loratune.records import Answer, Prediction, QuestionSet, Score, ScoreRecord
from loratune.store.database import Store
from loratune.study.schema import GraderName, Source, Study, Task

_LIMIT = re.compile(r"max_new_tokens=(\d+);")


@dataclass(frozen=True, slots=True)
class Regraded:
    """A score that was made of answers which another grader had judged."""

    trial_id: str
    before: Score
    after: Score


@dataclass(frozen=True, slots=True)
class Account:
    """A score with why its answers were not right: how many for each (verdict, reason).

    Reasons come the most frequent first; the first line of each, without what a program printed
    behind a colon. Answers of which no reason is known are in the score's counts alone.
    """

    trial_id: str
    score: Score
    reasons: tuple[tuple[str, str, int], ...]


def accounts(store: Store, study: str) -> tuple[Account, ...]:
    """The account of every score of a study, oldest first.

    Raises:
        StoreError: no such study.
    """
    found = list[Account]()
    for record in store.all_scores(study):
        counted = Counter(
            (one.verdict, _kind_of(one.reason))
            for one in store.predictions(record.score_id)
            if one.reason
        )
        reasons = tuple((*key, count) for key, count in counted.most_common())
        found.append(Account(record.trial_id, record.score, reasons))
    return tuple(found)


def _kind_of(reason: str) -> str:
    return reason.splitlines()[0].partition(":")[0].strip()


def regrade(
    store: Store,
    study: Study,
    *,
    folder: Path,
    grader: GraderName,
    tasks: frozenset[str] | None = None,
    data: Mapping[str, Source] | None = None,
    unsafe_exec: bool = False,
) -> tuple[Regraded, ...]:
    """Grade every kept set of answers of a study that this grader has not judged yet.

    Args:
        store: where scores and answers are, and where scores are added.
        study: the newest revision of the study.
        folder: what relative paths of the study start at.
        grader: how to judge.
        tasks: only these; None: every task of the study that this grader can judge.
        data: the questions of tasks by name, where the study's own path leads nowhere from here.
        unsafe_exec: see `sandbox.choose_isolation`.

    Raises:
        EvaluationError: no such task in the study, a grader that cannot judge its answers, or
            questions that cannot be had or are not those that were asked.
    """
    named = {given.name: given for given in study.evaluate.tasks}
    unknown = sorted((tasks or frozenset()) - named.keys())
    if unknown:
        raise EvaluationError(
            f"task {unknown[0]!r} is none of the study's test tasks; it has "
            f"{', '.join(named) or 'none'}"
        )
    made = list[Regraded]()
    records = store.all_scores(study.study)
    for name, given in named.items():
        if tasks is not None and name not in tasks:
            continue
        given = given.model_copy(update={"grader": grader})
        if data and name in data:
            given = given.model_copy(update={"data": data[name]})
        try:
            check_tasks([given], folder=folder, unsafe_exec=unsafe_exec)
        except EvaluationError:
            if tasks is None:
                continue  # Other tasks of the study may be of a kind that this grader judges.
            raise
        made += _of_task(store, study, given, records, folder=folder, unsafe_exec=unsafe_exec)
    return tuple(made)


def _of_task(
    store: Store,
    study: Study,
    given: Task,
    records: tuple[ScoreRecord, ...],
    *,
    folder: Path,
    unsafe_exec: bool,
) -> list[Regraded]:
    definition = task(given.name, folder=folder)
    assert given.grader is not None
    judged = {
        (one.trial_id, one.score.decoding)
        for one in records
        if one.score.task == definition.name and one.score.grader == given.grader
    }
    questions: tuple[Question, ...] | None = None
    made = list[Regraded]()
    for record in reversed(records):  # Of two scores of the same answers the newest counts.
        key = (record.trial_id, record.score.decoding)
        if record.score.task != definition.name or key in judged:
            continue
        answers = store.predictions(record.score_id)
        if not answers:
            continue
        known = store.question_set(record.score)
        if known is not None:
            asked = _of_set(known, version=definition.version, grader=given.grader)
        else:
            if questions is None:
                questions = load_questions(given, folder=folder)
            asked = _asked(study, given, questions, record.score)
        score, predictions = grade(
            [_answer(one, record.score) for one in answers], asked, unsafe_exec=unsafe_exec
        )
        score = replace(score, decoding=record.score.decoding)
        kept = replace(asked.question_set(), decoding=record.score.decoding)
        store.add_score(record.trial_id, score, predictions, questions=kept)
        judged.add(key)
        made.append(Regraded(record.trial_id, record.score, score))
    return made[::-1]


def _of_set(known: QuestionSet, *, version: str, grader: GraderName) -> TaskQuestions:
    """The questions behind a score as the store has them."""
    return TaskQuestions(
        task=known.task,
        version=version,
        split=known.split,
        grader=grader,
        prompts=("",) * len(known.references),
        prompt_ids=(),
        references=known.references,
        max_new_tokens=1,
        stop=(),
        extract=known.extract,
        choices=known.choices,
    )


def _asked(
    study: Study, given: Task, questions: tuple[Question, ...], score: Score
) -> TaskQuestions:
    """The questions behind a score, as far as grading needs them.

    Raises:
        EvaluationError: they are others, by their number or by the hash of their prompts.
    """
    definition = task(given.name)
    assert given.grader is not None
    prompt = given.prompt or definition.prompt
    # A chat's template is the tokenizer's own: its prompts cannot be made again without it.
    is_chat = study.data.template in ("chat", "chatml") and prompt is None
    prompts = (
        tuple("" for _ in questions)
        if is_chat
        else tuple(
            prompt_for(one.text, study.data, tokenizer=None, template=prompt) for one in questions
        )
    )
    asked = TaskQuestions(
        task=definition.name,
        version=definition.version,
        split=definition.split,
        grader=given.grader,
        prompts=prompts,
        prompt_ids=(),
        references=tuple(one.reference for one in questions),
        max_new_tokens=1,
        stop=(),
        extract=definition.extract,
        choices=tuple(one.choices for one in questions) if questions[0].choices else (),
    )
    same = (
        f"questions={len(questions)};" in score.decoding
        if is_chat
        else asked.decoding.rpartition("prompt=")[2] == score.decoding.rpartition("prompt=")[2]
    )
    if not same:
        raise EvaluationError(
            f"task {given.name}: the questions that were read are not those that were asked "
            f"({score.decoding}); give the data that was used then"
        )
    return asked


def _answer(one: Prediction, score: Score) -> Answer:
    """An answer as it was generated; one that does not say whether it ended did if it is short."""
    finished = one.finished
    if finished is None:
        limit = _LIMIT.search(score.decoding)
        finished = limit is None or one.num_tokens < int(limit[1])
    return Answer(text=one.text, num_tokens=one.num_tokens, finished=finished)
