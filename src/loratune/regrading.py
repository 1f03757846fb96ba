"""Kept answers graded anew: no model, no GPU. What was scored before stays; scores are added.

Answers and what was asked are in the store, of a user's own task too, so that no file is needed.
Scores of older versions came without their questions: those are read from the tasks' own data
again, and checked to be the ones that were asked.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.data.templates import prompt_for
from loratune.errors import EvaluationError
from loratune.evaluation.custom import file_hash_of, is_custom, version_of
from loratune.evaluation.graders import CHOICE_GRADERS
from loratune.evaluation.questions import Question, TaskQuestions
from loratune.evaluation.score import grade
from loratune.evaluation.tasks import alike, can_score, load_questions, task
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

    What it judged in an older version, or could not judge (the sandbox failed), is judged anew; a
    score is added where a verdict or the version is another one.

    Args:
        store: where scores and answers are, and where scores are added.
        study: the newest revision of the study.
        folder: what relative paths of the study start at.
        grader: how to judge.
        tasks: only these, by the names that tables have; None: all that this grader can judge.
        data: the questions of tasks by name, where the store does not have them (scores of older
            versions) and the study's own path leads nowhere from here.
        unsafe_exec: see `sandbox.choose_isolation`.

    Raises:
        EvaluationError: no answers to such a task, a grader that cannot judge them, no sandbox for
            what has to be run, or questions that cannot be had or are not those that were asked.
    """
    records = store.all_scores(study.study)
    scored = dict[str, str]()  # The newest grader of each task.
    for record in records:
        scored[record.score.task] = record.score.grader
    for name in sorted((tasks or frozenset()) | (data or {}).keys()):
        if name not in scored:
            raise EvaluationError(_no_answers(name, study, list(scored)))
    if not scored:
        raise EvaluationError(
            f"study {study.study} keeps no answers yet; name tasks in its evaluate section and run "
            "it, or use `loratune evaluate DIR --task ...`"
        )
    wanted = [name for name in scored if tasks is None or name in tasks]
    judgeable = [name for name in wanted if grader in alike(scored[name])]
    if len(judgeable) < len(wanted) and (tasks is not None or not judgeable):
        refused = [name for name in wanted if name not in judgeable]
        raise EvaluationError(
            f"grader {grader} judges none of the answers to {', '.join(refused)}; choose "
            + ", ".join(f"{' or '.join(alike(scored[name]))} for {name}" for name in refused)
        )
    made = list[Regraded]()
    for name in judgeable:
        of_task = [record for record in records if record.score.task == name]
        given = _given(study, name, data=data, grader=grader)
        made += _of_task(store, study, given, of_task, folder=folder, unsafe_exec=unsafe_exec)
    return tuple(made)


def _no_answers(name: str, study: Study, scored: Sequence[str]) -> str:
    others = f"there are answers to {', '.join(scored)}" if scored else "there are no answers yet"
    if any(given.name == name for given in study.evaluate.tasks):
        if is_custom(name):
            return f"task {name}: give the name that its file says, as in the tables; {others}"
        return f"task {name} has not been scored; {others}"
    return f"task {name!r} is none of the study's test tasks; {others}"


def _given(
    study: Study, name: str, *, data: Mapping[str, Source] | None, grader: GraderName
) -> Task:
    """The study's settings of a task; the task as it comes where it is asked besides the study."""
    named = [given for given in study.evaluate.tasks if given.name == name]
    given = named[0] if named else Task(name=name)
    moved = {} if not data or name not in data else {"data": data[name]}
    return given.model_copy(update={"grader": grader, **moved})


def _of_task(
    store: Store,
    study: Study,
    given: Task,
    records: Sequence[ScoreRecord],
    *,
    folder: Path,
    unsafe_exec: bool,
) -> list[Regraded]:
    """All scores of one task; `records` are its scores so far, oldest first."""
    assert given.grader is not None
    # By the answers: those of a choice depend on how its version put it to the model.
    standing = dict[tuple[str, str, str], ScoreRecord]()
    newest = dict[tuple[str, str, str], ScoreRecord]()
    for record in records:
        version = _version_now(record.score)
        key = (record.trial_id, version, record.score.decoding)
        if record.score.grader == given.grader and record.score.task_version == version:
            standing[key] = record
        newest[key] = record
    questions: tuple[Question, ...] | None = None
    made = list[Regraded]()
    without_answers = 0
    for key, record in newest.items():
        known = standing.get(key)
        if known is not None and (given.grader != "tests" or known.score.errors == 0):
            continue
        answers = store.predictions(record.score_id)
        if not answers:
            without_answers += 1
            continue
        question_set = store.question_set(record.score)
        if question_set is not None:
            asked = _of_set(question_set, version=key[1], grader=given.grader)
        else:
            if questions is None:
                questions = load_questions(given, folder=folder)
            asked = _asked(study, given, questions, record.score)
        score, predictions = grade(
            [_answer(one, record.score) for one in answers], asked, unsafe_exec=unsafe_exec
        )
        score = replace(score, decoding=record.score.decoding)
        if known is not None and [one.verdict for one in predictions] == [
            one.verdict for one in store.predictions(known.score_id)
        ]:
            continue
        kept = replace(asked.question_set(), decoding=record.score.decoding)
        store.add_score(record.trial_id, score, predictions, questions=kept)
        made.append(Regraded(record.trial_id, record.score, score))
    if without_answers and not made and not standing:
        raise EvaluationError(
            f"task {given.name}: none of its {without_answers} scores was stored with its answers, "
            "so that nothing can be judged anew; score the adapters again"
        )
    return made


def _version_now(score: Score) -> str:
    """The version that a score of the same answers has if they are judged today.

    Of a user's own task it begins with its file's hash, so that the file is not needed.
    """
    if score.grader in CHOICE_GRADERS:
        return score.task_version
    if can_score(score.task):
        return task(score.task).version
    return version_of(file_hash_of(score.task_version))


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
