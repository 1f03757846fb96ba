"""The store: studies, trials, attempts, outcomes, scores. Everything that outlives a process.

It knows nothing of torch, of training or of what a score means; it keeps records and hands them
back exactly (NaN, infinities and every bit of a float included).

The contract
------------
Who may write what, when. `Store` keeps it, whatever the database and however many processes.

*Studies and trials.* Anyone may add a study at any time. Adding is idempotent: the same name, text
and trials again write nothing; a change appends a revision, and the newest revision is the study.
`add_trials` appends what the outcomes of a study call for to its newest revision, idempotent too.
A trial is known by its id alone. It is written once and shared by every study that has it, with its
attempts, outcomes, scores and artifacts. Provisional trials have no place here.

*Attempts.* Training a trial begins with `claim`, one compare-and-set statement that inserts an
attempt if the trial has no open attempt and no final outcome. At most one attempt of a trial is
open. Only the worker that claimed it may write to it: it beats at least every half minute or so
(`heartbeat`, one call for all that it holds), and ends it once, by `finish` or `release`. An open
attempt is dead when its last heartbeat is older than CLAIM_EXPIRY_SECONDS, or when its process ran
on this machine and is gone; the next claim then ends it as "lost" and takes over. A worker whose
attempt was lost learns so from the answer to its next call, which has written nothing; it should
drop the trial. Workers on several machines need clocks that agree to well under
CLAIM_EXPIRY_SECONDS.

*Outcomes.* `finish` writes the outcome and ends the attempt in one transaction. An outcome never
changes. Statuses in records.FINAL_STATUSES stand for ever: such a trial cannot be claimed again,
and a unique index makes a second final outcome impossible. After "failed" and "out_of_memory" a
trial can be claimed anew; the old row stays, the newest outcome is the trial's.

*Scores* are append-only, each with its raw predictions in the same transaction. Scoring again is a
new row; the newest row of a (task, version, grader, decoding, split) counts. Anyone may add one;
the store does not ask who. *Question sets* say what was asked; each is written once.

*Answers* are kept from when they are given until there is a score of them: `add_score` removes
those to its questions. The first answer to a question stays.

*Data summaries* are append-only, the newest of a fingerprint counts. *Artifacts* are the only rows
that are replaced and removed, since they say where a file is and not what a trial did.

Every method is one transaction: killed at any instant, it has happened or it has not. A method that
returned has happened, for good. On SQLite `results` is one consistent moment. Instants are UTC,
from the clock handed to `open_store`. A `Store` may be used by several threads, not across a fork.

Errors are StoreError: the database is missing, unwritable, locked too long, written by a newer
version or no database of loratune; a study or trial is not in it; a trial is provisional.

SQLite
------
The default is one SQLite file with SQLite's classic rollback journal, not WAL. Resuming elsewhere
must need one file: between two transactions the database file alone is whole, while under WAL the
latest commits, finished trials among them, stay in a second file until a checkpoint. The rollback
journal also works on network file systems, where WAL's shared memory does not. Its price, readers
waiting for the milliseconds of a commit, is nothing beside training. `synchronous=EXTRA` makes a
commit survive a power cut, and costs a few milliseconds for each. After a kill in the middle of a
commit a `-journal` file stands beside the database: the next opening rolls it back; until then the
two belong together. SQLite has one writer at a time; others wait up to a minute.

PostgreSQL is chosen by URL (`postgresql+psycopg://...`; the driver is installed apart). The test
suite of this contract runs over a server where the variable LORATUNE_TEST_POSTGRESQL names one, and
has passed on PostgreSQL 15. Not covered: two processes that *add* the same new study, or make the
schema, at the same moment; one of them then fails with a StoreError and can be started again.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Insert,
    Row,
    and_,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from loratune.errors import StoreError
from loratune.records import (
    FINAL_STATUSES,
    Answer,
    AttemptRecord,
    DataSummary,
    NoiseProbe,
    Outcome,
    Prediction,
    Provenance,
    Purpose,
    QuestionSet,
    Score,
    ScoreKey,
    ScoreRecord,
    StudyRecord,
    Trial,
    TrialResult,
    Verdicts,
)
from loratune.store import codec, tables
from loratune.store.connect import WRITES, check_file, locate, make_engine, translated
from loratune.store.tables import REVISIONS
from loratune.store.upgrade import check_known, check_writable, read_revision, upgrade
from loratune.store.workers import Worker, is_gone, this_worker

# Four missed heartbeats of half a minute: a guess at what swapping or a slow disk may delay.
CLAIM_EXPIRY_SECONDS = 120.0
# SQLite before 3.32 takes at most 999 bound values in a statement.
_IDS_PER_QUERY = 900

_T = TypeVar("_T")

SelectOn = Literal["validation_loss", "validation_accuracy", "test"]

_SHORT_OUTCOME = [
    column for column in tables.outcomes.columns if column.name not in ("losses", "grad_norms")
]


def utc_now() -> datetime:
    """The system's clock."""
    return datetime.now(UTC)


def open_store(
    url_or_path: str | Path,
    *,
    create: bool,
    clock: Callable[[], datetime] = utc_now,
    worker: Callable[[], Worker] = this_worker,
) -> "Store":
    """Open the database of a results folder, bringing an older schema up to date.

    Args:
        url_or_path: a file's path, or a URL: `sqlite:///file`, `sqlite://` (in memory, gone when
            closed) or `postgresql+psycopg://...`.
        create: make the database where there is none, and make sure that it can be written. False
            never makes one, and can read a database that is read-only.
        clock: the time now, with its zone.
        worker: the process that claims.

    Raises:
        StoreError: there is no database and `create` is False; it cannot be opened or written; it
            is not one of loratune, or was written by a newer version (nothing is then written).
    """
    location = locate(url_or_path)
    check_file(location, create=create)
    store = Store(make_engine(location), place=location.name, clock=clock, worker=worker)
    try:
        store.prepare(create=create or location.in_memory)
    except BaseException:
        store.close()
        raise
    return store


class Store:
    """An open database. Make one with `open_store`; the module's docstring is the contract."""

    def __init__(
        self,
        engine: Engine,
        *,
        place: str,
        clock: Callable[[], datetime],
        worker: Callable[[], Worker],
    ) -> None:
        self.place = place
        self._engine = engine
        # The same pool. A write begins with SQLite's lock, so that none fails half-way because
        # another writer came first.
        self._write_engine = engine.execution_options(**WRITES)
        self._clock = clock
        self._worker = worker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection. Open attempts stay open; `release` them first."""
        self._engine.dispose()

    def prepare(self, *, create: bool) -> None:
        """What `open_store` does with a new connection: look at the schema, make or upgrade it."""
        with self._reading() as connection:
            revision = read_revision(connection)
        if revision is None and not create:
            raise StoreError(
                f"{self.place} holds no results; `loratune run STUDY.yaml --out DIR` makes them"
            )
        if revision is not None:
            check_known(revision)
        if revision != REVISIONS[-1]:
            with translated(self.place):
                upgrade(self._write_engine)
        elif create:
            with self._writing() as connection:
                check_writable(connection)

    # Studies and trials

    def add_study(
        self,
        name: str,
        *,
        text: str,
        select_on: SelectOn,
        trials: Sequence[Trial],
        asks: Sequence[ScoreKey] | None = None,
        purpose: Purpose = "search",
    ) -> None:
        """Add a study with its trials in their order; the same again writes nothing.

        What `add_trials` has added to the same study since then stays.

        `asks` are the scores that the study wants, whatever else its trials were ever asked; left
        out, the newest score of each task is the study's.

        Raises:
            StoreError: a trial is provisional, or stands twice in the list.
        """
        _check_addable(name, trials)
        bodies = {trial.trial_id: codec.trial_to_json(trial) for trial in trials}
        asked = None if asks is None else json.dumps(sorted(map(list, asks)))
        with self._writing() as connection:
            newest = connection.execute(_newest_study(name)).one_or_none()
            if newest is not None:
                unchanged = (
                    newest.text == text and newest.select_on == select_on and newest.asks == asked
                )
                rows = connection.execute(_trial_bodies(newest.study_id, None)).all()
                planned = [(row.trial_id, row.body) for row in rows[: len(bodies)]]
                if unchanged and planned == list(bodies.items()):
                    return
            study_id = _inserted_id(
                connection,
                insert(tables.studies).values(
                    name=name,
                    revision=1 if newest is None else newest.revision + 1,
                    text=text,
                    select_on=select_on,
                    asks=asked,
                    created_at=self._clock(),
                ),
            )
            self._add_trials(connection, study_id, trials, first_position=0, purpose=purpose)

    def add_trials(self, study: str, trials: Sequence[Trial], *, purpose: Purpose) -> None:
        """Trials that a study's outcomes call for, after those that it has; known ones stay.

        Raises:
            StoreError: no such study, or a trial is provisional or stands twice in the list.
        """
        _check_addable(study, trials)
        with self._writing() as connection:
            study_id = self._study(connection, study).study_id
            rows = connection.execute(_trial_bodies(study_id, None)).all()
            known = {row.trial_id for row in rows}
            new = [trial for trial in trials if trial.trial_id not in known]
            self._add_trials(connection, study_id, new, first_position=len(rows), purpose=purpose)

    def studies(self) -> tuple[StudyRecord, ...]:
        """The newest revision of every study, in the order in which they were first added."""
        newest = select(func.max(tables.studies.c.study_id)).group_by(tables.studies.c.name)
        first = (
            select(tables.studies.c.name, func.min(tables.studies.c.study_id).label("first"))
            .group_by(tables.studies.c.name)
            .subquery()
        )
        query = (
            select(tables.studies)
            .join(first, first.c.name == tables.studies.c.name)
            .where(tables.studies.c.study_id.in_(newest))
            .order_by(first.c.first)
        )
        with self._reading() as connection:
            return tuple(
                StudyRecord(
                    name=row.name,
                    text=row.text,
                    select_on=row.select_on,
                    created_at=row.created_at.isoformat(),
                )
                for row in connection.execute(query)
            )

    def trials(self, study: str) -> tuple[Trial, ...]:
        """The study's trials in their order, as the study writes them.

        Raises:
            StoreError: no such study.
        """
        with self._reading() as connection:
            row = self._study(connection, study)
            found = connection.execute(_trial_bodies(row.study_id, None)).all()
        return tuple(codec.trial_from_json(trial.body) for trial in found)

    # Attempts and outcomes

    def newest_attempt(self) -> int:
        """The number of the newest attempt at any trial; 0 where there is none."""
        with self._reading() as connection:
            newest = select(func.coalesce(func.max(tables.attempts.c.attempt_id), 0))
            return connection.execute(newest).scalar_one()

    def num_ended(self, trial_ids: Collection[str], *, since: int | None = None) -> int:
        """How many of the trials have an outcome that stands; `since` as for `claim`."""
        ours, count = tables.outcomes.c, 0
        with self._reading() as connection:
            for some in _chunks(trial_ids):
                ended = select(func.count(ours.trial_id.distinct())).where(
                    ours.trial_id.in_(some), _stands(since)
                )
                count += connection.execute(ended).scalar_one()
        return count

    def claim(
        self, trial_id: str, *, provenance: Provenance, since: int | None = None
    ) -> int | None:
        """Take the trial to train it: the attempt's number, or None where it is not to be had.

        None says that a final outcome stands or that a live attempt holds the trial.

        Args:
            trial_id: the trial.
            provenance: how it is going to be trained.
            since: an attempt's number; an outcome of a later attempt counts as final, so that
                several processes of one sweep do not try one after another what has failed.

        Raises:
            StoreError: no such trial.
        """
        worker, now = self._worker(), self._clock()
        mine = tables.attempts.c.trial_id == trial_id
        is_open = tables.attempts.c.ended_at.is_(None)
        number = select(func.coalesce(func.max(tables.attempts.c.number), 0) + 1).where(mine)
        values: dict[str, Any] = {
            "trial_id": trial_id,
            "provenance": codec.provenance_to_json(provenance),
            "worker_host": worker.host,
            "worker_pid": worker.pid,
            "worker_started": worker.started,
            "started_at": now,
            "heartbeat_at": now,
        }
        # SQLAlchemy drops an INSERT's row count unless asked to keep it.
        compare_and_set = (
            insert(tables.attempts)
            .from_select(
                [*values, "number"],
                select(
                    *(
                        literal(value, tables.attempts.c[name].type)
                        for name, value in values.items()
                    ),
                    number.scalar_subquery(),
                ).where(
                    ~exists().where(mine, is_open),
                    ~exists().where(tables.outcomes.c.trial_id == trial_id, _stands(since)),
                ),
            )
            .execution_options(preserve_rowcount=True)
        )
        with self._writing() as connection:
            self._check_trial(connection, trial_id)
            holders = connection.execute(select(tables.attempts).where(mine, is_open)).all()
            dead = [holder.attempt_id for holder in holders if self._is_dead(holder, now=now)]
            if dead:
                connection.execute(
                    update(tables.attempts)
                    .where(tables.attempts.c.attempt_id.in_(dead), is_open)
                    .values(ended_at=now, end_kind="lost")
                )
            try:
                with connection.begin_nested():
                    if connection.execute(compare_and_set).rowcount != 1:
                        return None
            except IntegrityError:
                return None  # another process inserted its claim at the same moment
            return connection.execute(
                select(tables.attempts.c.attempt_id).where(mine, is_open)
            ).scalar_one()

    def heartbeat(self, attempts: Collection[int]) -> frozenset[int]:
        """Say that the attempts' worker lives. Those given back have ended: drop their trials."""
        ours, ended, now = tables.attempts.c, set[int](), self._clock()
        with self._writing() as connection:
            for some in _chunks(attempts):
                mine = ours.attempt_id.in_(some)
                connection.execute(
                    update(tables.attempts)
                    .where(mine, ours.ended_at.is_(None))
                    .values(heartbeat_at=now)
                )
                gone = select(ours.attempt_id).where(mine, ours.ended_at.is_not(None))
                ended.update(connection.execute(gone).scalars())
        return frozenset(ended)

    def release(self, attempt: int) -> bool:
        """Give the trial back without an outcome (interrupted). False: it had ended already."""
        with self._writing() as connection:
            return self._update_open(
                connection, attempt, ended_at=self._clock(), end_kind="interrupted"
            )

    def finish(self, attempt: int, outcome: Outcome) -> bool:
        """End the attempt with its outcome, in one transaction.

        False: the attempt had ended already (it was lost to another worker, or finished before),
        and nothing was written.

        Raises:
            StoreError: the outcome is of another trial.
        """
        with self._writing() as connection:
            trial_id = connection.execute(
                select(tables.attempts.c.trial_id).where(tables.attempts.c.attempt_id == attempt)
            ).scalar_one_or_none()
            if trial_id != outcome.trial_id:
                raise StoreError(
                    f"attempt {attempt} is of trial {trial_id}, the outcome of {outcome.trial_id}; "
                    "finish each attempt with its own trial's outcome"
                )
            if not self._update_open(
                connection, attempt, ended_at=self._clock(), end_kind="finished"
            ):
                return False
            values = {
                column.name: getattr(outcome, column.name)
                for column in tables.outcomes.columns
                if column.name != "attempt_id"
            }
            connection.execute(insert(tables.outcomes).values(attempt_id=attempt, **values))
            return True

    def outcome(self, trial_id: str) -> Outcome | None:
        """The trial's newest outcome with its losses, or None.

        Raises:
            StoreError: no such trial.
        """
        query = (
            select(tables.outcomes)
            .where(tables.outcomes.c.trial_id == trial_id)
            .order_by(tables.outcomes.c.attempt_id.desc())
            .limit(1)
        )
        with self._reading() as connection:
            self._check_trial(connection, trial_id)
            row = connection.execute(query).one_or_none()
        return None if row is None else _outcome(row, tables.outcomes.columns.keys())

    def attempts(self, trial_id: str) -> tuple[AttemptRecord, ...]:
        """Every try at the trial, oldest first.

        Raises:
            StoreError: no such trial.
        """
        query = (
            select(tables.attempts)
            .where(tables.attempts.c.trial_id == trial_id)
            .order_by(tables.attempts.c.number)
        )
        with self._reading() as connection:
            self._check_trial(connection, trial_id)
            return tuple(
                AttemptRecord(
                    attempt_id=row.attempt_id,
                    trial_id=row.trial_id,
                    number=row.number,
                    provenance=codec.provenance_from_json(row.provenance),
                    started_at=row.started_at,
                    heartbeat_at=row.heartbeat_at,
                    ended_at=row.ended_at,
                    end_kind=row.end_kind,
                )
                for row in connection.execute(query)
            )

    def provenances(self, study: str) -> tuple[Provenance, ...]:
        """How the study's trials were run: each distinct provenance once, in order of time.

        Raises:
            StoreError: no such study.
        """
        with self._reading() as connection:
            mine = tables.study_trials.c.study_id == self._study(connection, study).study_id
            rows = connection.execute(
                select(tables.attempts.c.provenance)
                .join(
                    tables.study_trials,
                    tables.study_trials.c.trial_id == tables.attempts.c.trial_id,
                )
                .where(mine)
                .group_by(tables.attempts.c.provenance)
                .order_by(func.min(tables.attempts.c.attempt_id))
            )
            return tuple(codec.provenance_from_json(row.provenance) for row in rows)

    def results(
        self,
        study: str,
        *,
        trial_ids: Collection[str] | None = None,
        with_losses: bool = True,
        every_score: bool = False,
    ) -> tuple[TrialResult, ...]:
        """Every trial of the study in its order, with all that is known of it at this moment.

        A trial is "running" while a live attempt holds it, has its newest outcome's status once it
        has one, and is "planned" otherwise. `scores` holds the newest score of each task that the
        study asks for, as it asks for it, sorted by name. `engine` is that of the attempt which
        gave the outcome, or runs.

        Args:
            study: its name.
            trial_ids: only those of the study's trials, without reading the others.
            with_losses: False leaves `losses` and `grad_norms` of the outcomes empty. They are a
                number for each update: millions, in a large study. Where a trial was stopped
                half-way they are there all the same: nothing else tells what it would have reached.
            every_score: True gives the newest score of each (task, split, task version, grader,
                decoding) instead: all that the trial was ever asked.

        Raises:
            StoreError: no such study.
        """
        columns = list(tables.outcomes.columns) if with_losses else _SHORT_OUTCOME
        now = self._clock()
        with self._reading() as connection:
            row = self._study(connection, study)
            select_on: SelectOn = row.select_on
            asked = _asked(row)
            bodies = list[Row[Any]]()
            holders = list[Row[Any]]()
            records = list[ScoreRecord]()
            chunks = [None] if trial_ids is None else list(_chunks(trial_ids))
            for some in chunks:
                bodies += connection.execute(_trial_bodies(row.study_id, some)).all()
                holders += connection.execute(_open_attempts(row.study_id, some)).all()
                records += _scores(connection, row.study_id, some)
            ended = _ended(connection, row.study_id, columns, chunks)
            if not with_losses and any(one.status == "stopped" for one in ended):
                columns = list(tables.outcomes.columns)
                ended = _ended(connection, row.study_id, columns, chunks)
        # Many attempts share one provenance.
        engines: dict[str, str] = {}
        for found in (*ended, *holders):
            if found.provenance not in engines:
                engines[found.provenance] = codec.provenance_from_json(found.provenance).engine
        running = {
            holder.trial_id: engines[holder.provenance]
            for holder in holders
            if not self._is_dead(holder, now=now)
        }
        names = [column.name for column in columns]
        finished = {row.trial_id: (_outcome(row, names), engines[row.provenance]) for row in ended}
        scored = _standing(records, asked, every_score=every_score)
        results: list[TrialResult] = []
        for planned in sorted(bodies, key=lambda body: body.position):
            trial_id: str = planned.trial_id
            outcome, engine = finished.get(trial_id, (None, None))
            if trial_id in running:
                outcome, engine = None, running[trial_id]
            status = "running" if trial_id in running else "planned"
            results.append(
                TrialResult(
                    study=study,
                    select_on=select_on,
                    trial=codec.trial_from_json(planned.body),
                    status=status if outcome is None else outcome.status,
                    outcome=outcome,
                    scores=tuple(
                        record.score for _, record in sorted(scored.get(trial_id, {}).items())
                    ),
                    engine=engine,
                    purpose=planned.purpose,
                )
            )
        return tuple(results)

    # Scores

    def add_answers(
        self, trial_id: str, questions: QuestionSet, answers: Mapping[int, Answer]
    ) -> None:
        """Keep answers, by question, of a trial that is being scored; known ones stay.

        Raises:
            StoreError: no such trial.
        """
        with self._writing() as connection:
            self._check_trial(connection, trial_id)
            set_id = _set_of(connection, questions)
            known = {row.question_index for row in _answers(connection, trial_id, set_id)}
            new = [
                {
                    "trial_id": trial_id,
                    "set_id": set_id,
                    "question_index": index,
                    "num_tokens": answer.num_tokens,
                    "finished": answer.finished,
                    "text": answer.text,
                }
                for index, answer in answers.items()
                if index not in known
            ]
            if new:
                connection.execute(insert(tables.answers), new)

    def answers(self, trial_id: str, questions: QuestionSet) -> Mapping[int, Answer]:
        """The answers, by question, that are kept until a score is made of them."""
        with self._reading() as connection:
            set_id = connection.execute(
                select(tables.question_sets.c.set_id).where(_is_set(questions))
            ).scalar_one_or_none()
            if set_id is None:
                return {}
            return {
                row.question_index: Answer(row.text, row.num_tokens, row.finished)
                for row in _answers(connection, trial_id, set_id)
            }

    def question_set(self, score: Score) -> QuestionSet | None:
        """What was asked for a score; None where it was added without its questions."""
        query = select(tables.question_sets.c.body).where(_is_set(score))
        with self._reading() as connection:
            body = connection.execute(query).scalar_one_or_none()
        return None if body is None else codec.questions_from_json(body)

    def add_score(
        self,
        trial_id: str,
        score: Score,
        predictions: Sequence[Prediction],
        *,
        questions: QuestionSet | None = None,
    ) -> int:
        """Append a score and the answers it counts (or none, where there are none): its id.

        With `questions`, what was asked, grading can be redone from the store alone; answers to
        them that were kept for this score are kept no longer.

        Raises:
            StoreError: no such trial, or the answers do not add up to the score.
        """
        _check_account(score, predictions)
        with self._writing() as connection:
            self._check_trial(connection, trial_id)
            if questions is not None:
                set_id = _set_of(connection, questions)
                kept = tables.answers.c
                connection.execute(
                    delete(tables.answers).where(kept.trial_id == trial_id, kept.set_id == set_id)
                )
            values = {name: getattr(score, name) for name in _SCORE_FIELDS}
            score_id = _inserted_id(
                connection,
                insert(tables.scores).values(trial_id=trial_id, created_at=self._clock(), **values),
            )
            if predictions:
                connection.execute(
                    insert(tables.predictions),
                    [
                        {
                            "score_id": score_id,
                            "question_index": prediction.question_index,
                            "num_tokens": prediction.num_tokens,
                            "verdict": prediction.verdict,
                            "text": prediction.text,
                            "finished": prediction.finished,
                            "reason": prediction.reason,
                        }
                        for prediction in predictions
                    ],
                )
            return score_id

    def all_scores(
        self, study: str, *, trial_ids: Collection[str] | None = None
    ) -> tuple[ScoreRecord, ...]:
        """Every score of the study's trials, superseded ones too, oldest first.

        Args:
            study: its name.
            trial_ids: only those of the study's trials, without reading the others.

        Raises:
            StoreError: no such study.
        """
        with self._reading() as connection:
            row = self._study(connection, study)
            found = list[ScoreRecord]()
            for some in [None] if trial_ids is None else _chunks(trial_ids):
                found += _scores(connection, row.study_id, some)
        return tuple(sorted(found, key=lambda one: one.score_id))

    def predictions(self, score_id: int) -> tuple[Prediction, ...]:
        """The answers that a score counts, by question; empty where none were stored."""
        query = (
            select(tables.predictions)
            .where(tables.predictions.c.score_id == score_id)
            .order_by(tables.predictions.c.question_index)
        )
        with self._reading() as connection:
            return tuple(
                Prediction(
                    question_index=row.question_index,
                    text=row.text,
                    num_tokens=row.num_tokens,
                    verdict=row.verdict,
                    finished=row.finished,
                    reason=row.reason,
                )
                for row in connection.execute(query)
            )

    def verdicts(
        self, study: str, *, trial_ids: Collection[str] | None = None
    ) -> tuple[Verdicts, ...]:
        """Which questions each trial answered right, for the scores that `results` gives.

        In order of the scores' ids; a score that was added without its answers is left out. One
        row is read for each answer: name the trials where a study has many.

        Raises:
            StoreError: no such study.
        """
        own = tables.predictions
        with self._reading() as connection:
            row = self._study(connection, study)
            records = list[ScoreRecord]()
            for some in [None] if trial_ids is None else _chunks(trial_ids):
                records += _scores(connection, row.study_id, some)
            standing = _standing(records, _asked(row), every_score=False)
            kept = {
                record.score_id: record for of_trial in standing.values()
                for record in of_trial.values()
            }  # fmt: skip
            answers: dict[int, list[tuple[int, bool]]] = {}
            for some in _chunks(kept):
                query = (
                    select(own.c.score_id, own.c.question_index, own.c.verdict == "correct")
                    .where(own.c.score_id.in_(some))
                    .order_by(own.c.score_id, own.c.question_index)
                )
                for score_id, question, correct in connection.execute(query):
                    answers.setdefault(score_id, []).append((question, bool(correct)))
        return tuple(
            Verdicts(
                trial_id=kept[score_id].trial_id,
                task=kept[score_id].score.task,
                split=kept[score_id].score.split,
                questions=tuple(question for question, _ in given),
                correct=tuple(correct for _, correct in given),
            )
            for score_id, given in sorted(answers.items())
        )

    # Artifacts and data summaries

    def add_artifact(self, trial_id: str, *, kind: str, path: str) -> None:
        """Say where a file or folder of the trial is, replacing what was said of this kind.

        Paths relative to the database's folder survive its move to another machine.

        Raises:
            StoreError: no such trial.
        """
        with self._writing() as connection:
            self._check_trial(connection, trial_id)
            connection.execute(delete(tables.artifacts).where(_is_artifact(trial_id, kind)))
            connection.execute(
                insert(tables.artifacts).values(
                    trial_id=trial_id, kind=kind, path=path, created_at=self._clock()
                )
            )

    def artifact(self, trial_id: str, *, kind: str) -> str | None:
        """Where the trial's file or folder of this kind is, or None."""
        query = select(tables.artifacts.c.path).where(_is_artifact(trial_id, kind))
        with self._reading() as connection:
            return connection.execute(query).scalar_one_or_none()

    def forget_stopped(self, trial_ids: Collection[str]) -> None:
        """Take back the outcomes of those that were stopped half-way: they can be trained again."""
        with self._writing() as connection:
            for some in _chunks(trial_ids):
                connection.execute(
                    delete(tables.outcomes).where(
                        tables.outcomes.c.trial_id.in_(some), tables.outcomes.c.status == "stopped"
                    )
                )

    def remove_artifact(self, trial_id: str, *, kind: str) -> None:
        """Forget the artifact; nothing happens where there is none. The file is the caller's."""
        with self._writing() as connection:
            connection.execute(delete(tables.artifacts).where(_is_artifact(trial_id, kind)))

    def add_noise_probes(self, attempt: int, probes: Sequence[NoiseProbe]) -> bool:
        """Keep probes of the open attempt's trial; False where it is lost, and nothing is written.

        A trial that was begun anew, or went on from a snapshot, looks at some updates again: what
        it found then replaces what was there.
        """
        with self._writing() as connection:
            if not self._update_open(connection, attempt, heartbeat_at=self._clock()):
                return False
            table = tables.noise_probes
            for probe in probes:
                connection.execute(
                    delete(table).where(
                        (table.c.trial_id == probe.trial_id)
                        & (table.c.split == probe.split)
                        & (table.c.at_update == probe.update)
                    )
                )
                connection.execute(
                    insert(table).values(
                        trial_id=probe.trial_id,
                        split=probe.split,
                        at_update=probe.update,
                        body=codec.probe_to_json(probe),
                    )
                )
            return True

    def noise_probes(self, study: str) -> tuple[NoiseProbe, ...]:
        """All probes of the study's trials: trials in their order, then by split and update.

        Raises:
            StoreError: no such study.
        """
        table, members = tables.noise_probes, tables.study_trials
        with self._reading() as connection:
            row = self._study(connection, study)
            bodies = connection.execute(
                select(table.c.body)
                .join(members, members.c.trial_id == table.c.trial_id)
                .where(members.c.study_id == row.study_id)
                .order_by(members.c.position, table.c.split, table.c.at_update)
            ).scalars()
            return tuple(codec.probe_from_json(body) for body in bodies)

    def add_data_summary(self, data_fingerprint: str, summary: DataSummary) -> None:
        """Keep what happened to the rows behind a fingerprint; the same again writes nothing."""
        body = codec.summary_to_json(summary)
        newest = (
            select(tables.data_summaries.c.body)
            .where(tables.data_summaries.c.data_fingerprint == data_fingerprint)
            .order_by(tables.data_summaries.c.summary_id.desc())
            .limit(1)
        )
        with self._writing() as connection:
            if connection.execute(newest).scalar_one_or_none() != body:
                connection.execute(
                    insert(tables.data_summaries).values(
                        data_fingerprint=data_fingerprint, body=body, created_at=self._clock()
                    )
                )

    def data_summaries(self, study: str) -> Mapping[str, DataSummary]:
        """The newest summary of each data fingerprint of the study's trials, in their order.

        Fingerprints without a summary are left out.

        Raises:
            StoreError: no such study.
        """
        with self._reading() as connection:
            row = self._study(connection, study)
            fingerprints = connection.execute(
                select(tables.trials.c.data_fingerprint)
                .join(
                    tables.study_trials, tables.study_trials.c.trial_id == tables.trials.c.trial_id
                )
                .where(tables.study_trials.c.study_id == row.study_id)
                .group_by(tables.trials.c.data_fingerprint)
                .order_by(func.min(tables.study_trials.c.position))
            ).scalars()
            found = {
                fingerprint: connection.execute(
                    select(tables.data_summaries.c.body)
                    .where(tables.data_summaries.c.data_fingerprint == fingerprint)
                    .order_by(tables.data_summaries.c.summary_id.desc())
                    .limit(1)
                ).scalar_one_or_none()
                for fingerprint in fingerprints.all()
            }
        return {
            fingerprint: codec.summary_from_json(body)
            for fingerprint, body in found.items()
            if body is not None
        }

    # Below: what the methods above share.

    @contextmanager
    def _reading(self) -> Generator[Connection]:
        with translated(self.place), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Generator[Connection]:
        with translated(self.place), self._write_engine.begin() as connection:
            yield connection

    def _study(self, connection: Connection, name: str) -> Row[Any]:
        row = connection.execute(_newest_study(name)).one_or_none()
        if row is None:
            names = connection.execute(select(tables.studies.c.name).distinct()).scalars().all()
            there = ", ".join(sorted(names)) or "none"
            raise StoreError(f"no study {name!r} in {self.place}; the studies there: {there}")
        return row

    def _add_trials(
        self,
        connection: Connection,
        study_id: int,
        trials: Sequence[Trial],
        *,
        first_position: int,
        purpose: Purpose,
    ) -> None:
        bodies = {trial.trial_id: codec.trial_to_json(trial) for trial in trials}
        known = _bodies_of(connection, list(bodies))
        new = [
            {
                "trial_id": trial.trial_id,
                "data_fingerprint": trial.data_fingerprint,
                "body": bodies[trial.trial_id],
            }
            for trial in trials
            if trial.trial_id not in known
        ]
        if new:
            connection.execute(insert(tables.trials), new)
        if bodies:
            connection.execute(
                insert(tables.study_trials),
                [
                    {
                        "study_id": study_id,
                        "position": position,
                        "trial_id": trial_id,
                        "body": None if known.get(trial_id, body) == body else body,
                        "purpose": purpose,
                    }
                    for position, (trial_id, body) in enumerate(bodies.items(), first_position)
                ],
            )

    def _check_trial(self, connection: Connection, trial_id: str) -> None:
        query = select(tables.trials.c.trial_id).where(tables.trials.c.trial_id == trial_id)
        if connection.execute(query).one_or_none() is None:
            raise StoreError(
                f"no trial {trial_id!r} in {self.place}; add a study that has it first"
            )

    def _is_dead(self, attempt: Row[Any], *, now: datetime) -> bool:
        if now - attempt.heartbeat_at > timedelta(seconds=CLAIM_EXPIRY_SECONDS):
            return True
        return is_gone(
            Worker(host=attempt.worker_host, pid=attempt.worker_pid, started=attempt.worker_started)
        )

    def _update_open(self, connection: Connection, attempt: int, **values: object) -> bool:
        is_open = and_(
            tables.attempts.c.attempt_id == attempt, tables.attempts.c.ended_at.is_(None)
        )
        return (
            connection.execute(update(tables.attempts).where(is_open).values(**values)).rowcount
            == 1
        )


_SCORE_FIELDS = tuple(field.name for field in fields(Score))


def _score_key(score: Score) -> tuple[str, ...]:
    return (score.task, score.split, score.task_version, score.grader, score.decoding)


def _newest_study(name: str) -> Executable:
    return (
        select(tables.studies)
        .where(tables.studies.c.name == name)
        .order_by(tables.studies.c.revision.desc())
        .limit(1)
    )


def _of_study(
    study_id: int, column: ColumnElement[str], trial_ids: Sequence[str] | None
) -> ColumnElement[bool]:
    """That a row joined to `study_trials` is of the study and, if given, one of these trials."""
    mine = tables.study_trials.c.study_id == study_id
    # Said of the table that is read: its index on trials then finds the rows.
    return mine if trial_ids is None else and_(mine, column.in_(trial_ids))


def _trial_bodies(study_id: int, trial_ids: Sequence[str] | None) -> Executable:
    """(position, purpose, trial id, canonical JSON) of trials in their order, as the study writes.

    A trial's JSON is the study's own where it writes the trial in its own way.
    """
    shared, own = tables.trials, tables.study_trials
    return (
        select(
            own.c.position,
            own.c.purpose,
            shared.c.trial_id,
            func.coalesce(own.c.body, shared.c.body).label("body"),
        )
        .join(own, own.c.trial_id == shared.c.trial_id)
        .where(_of_study(study_id, own.c.trial_id, trial_ids))
        .order_by(own.c.position)
    )


def _newest_outcomes(
    study_id: int, columns: Sequence[ColumnElement[Any]], trial_ids: Sequence[str] | None
) -> Executable:
    """The columns of each trial's newest outcome, and the provenance of its attempt."""
    ours, attempts, own = tables.outcomes, tables.attempts, tables.study_trials
    newest = select(func.max(ours.c.attempt_id)).group_by(ours.c.trial_id)
    if trial_ids is not None:
        newest = newest.where(ours.c.trial_id.in_(trial_ids))
    return (
        select(*columns, attempts.c.provenance)
        .join(attempts, attempts.c.attempt_id == ours.c.attempt_id)
        .join(own, own.c.trial_id == ours.c.trial_id)
        .where(own.c.study_id == study_id, ours.c.attempt_id.in_(newest))
    )


def _ended(
    connection: Connection,
    study_id: int,
    columns: Sequence[ColumnElement[Any]],
    chunks: Iterable[Sequence[str] | None],
) -> list[Row[Any]]:
    """`_newest_outcomes` of all the chunks of trial ids; None is every trial."""
    found = list[Row[Any]]()
    for some in chunks:
        found += connection.execute(_newest_outcomes(study_id, columns, some)).all()
    return found


def _open_attempts(study_id: int, trial_ids: Sequence[str] | None) -> Executable:
    ours, own = tables.attempts, tables.study_trials
    return (
        select(ours)
        .join(own, own.c.trial_id == ours.c.trial_id)
        .where(_of_study(study_id, ours.c.trial_id, trial_ids), ours.c.ended_at.is_(None))
    )


def _stands(since: int | None) -> ColumnElement[bool]:
    """That an outcome is final, or of an attempt later than `since`."""
    is_final = tables.outcomes.c.status.in_(FINAL_STATUSES)
    return is_final if since is None else or_(is_final, tables.outcomes.c.attempt_id > since)


def _inserted_id(connection: Connection, statement: Insert) -> int:
    """Insert one row; the integer key that the database gave it."""
    key = connection.execute(statement).inserted_primary_key
    assert key is not None
    return int(key[0])


def _bodies_of(connection: Connection, trial_ids: Sequence[str]) -> dict[str, str]:
    """The canonical JSON of those of the trials that are in the database."""
    bodies: dict[str, str] = {}
    for some in _chunks(trial_ids):
        query = select(tables.trials.c.trial_id, tables.trials.c.body).where(
            tables.trials.c.trial_id.in_(some)
        )
        bodies.update((row.trial_id, row.body) for row in connection.execute(query))
    return bodies


def _is_artifact(trial_id: str, kind: str) -> ColumnElement[bool]:
    return and_(tables.artifacts.c.trial_id == trial_id, tables.artifacts.c.kind == kind)


def _scores(
    connection: Connection, study_id: int, trial_ids: Sequence[str] | None
) -> tuple[ScoreRecord, ...]:
    """The scores of a study's trials, oldest first."""
    query = (
        select(tables.scores)
        .join(tables.study_trials, tables.study_trials.c.trial_id == tables.scores.c.trial_id)
        .where(_of_study(study_id, tables.scores.c.trial_id, trial_ids))
        .order_by(tables.scores.c.score_id)
    )
    return tuple(
        ScoreRecord(
            score_id=row.score_id,
            trial_id=row.trial_id,
            score=Score(**{name: getattr(row, name) for name in _SCORE_FIELDS}),
            created_at=row.created_at,
        )
        for row in connection.execute(query)
    )


def _is_set(asked: QuestionSet | Score) -> ColumnElement[bool]:
    own = tables.question_sets.c
    return and_(
        own.task == asked.task,
        own.task_version == asked.task_version,
        own.decoding == asked.decoding,
    )


def _set_of(connection: Connection, questions: QuestionSet) -> int:
    """The id of the question set, which is written where it is not there."""
    known = connection.execute(
        select(tables.question_sets.c.set_id).where(_is_set(questions))
    ).scalar_one_or_none()
    if known is not None:
        return known
    return _inserted_id(
        connection,
        insert(tables.question_sets).values(
            task=questions.task,
            task_version=questions.task_version,
            decoding=questions.decoding,
            body=codec.questions_to_json(questions),
        ),
    )


def _answers(connection: Connection, trial_id: str, set_id: int) -> Sequence[Row[Any]]:
    own = tables.answers
    query = (
        select(own)
        .where(own.c.trial_id == trial_id, own.c.set_id == set_id)
        .order_by(own.c.question_index)
    )
    return connection.execute(query).all()


def _asked(study: Row[Any]) -> set[ScoreKey] | None:
    """The scores that a study wants; None where the newest of each task is meant."""
    return None if study.asks is None else {ScoreKey(*key) for key in json.loads(study.asks)}


def _standing(
    records: Sequence[ScoreRecord], asked: set[ScoreKey] | None, *, every_score: bool
) -> dict[str, dict[tuple[str, ...], ScoreRecord]]:
    """For each trial the scores that count, by task or, with `every_score`, by all of their key."""
    found: dict[str, dict[tuple[str, ...], ScoreRecord]] = {}
    for record in records:  # oldest first: a newer one replaces an older
        if not every_score and asked is not None and record.score.key not in asked:
            continue  # Another study's question, or one that this study asked before.
        key = _score_key(record.score) if every_score else (record.score.task,)
        found.setdefault(record.trial_id, {})[key] = record
    return found


def _chunks(values: Collection[_T]) -> Iterator[list[_T]]:
    """The values, each once, in lists that one statement can take."""
    listed = list(dict.fromkeys(values))
    for start in range(0, len(listed), _IDS_PER_QUERY):
        yield listed[start : start + _IDS_PER_QUERY]


def _outcome(row: Row[Any], names: Sequence[str]) -> Outcome:
    """The outcome of a row that begins with the columns of these names."""
    # By position: looking 14 names up in each of 10,000 rows takes as long as reading them.
    values = dict(zip(names, row, strict=False))
    del values["attempt_id"]
    return Outcome(**values)


def _check_addable(name: str, trials: Sequence[Trial]) -> None:
    seen: set[str] = set()
    for trial in trials:
        if trial.provisional:
            raise StoreError(
                f"trial {trial.trial_id} of study {name!r} is provisional: its model or data were "
                "declared, not read; plan again where both can be reached"
            )
        if trial.trial_id in seen:
            raise StoreError(f"trial {trial.trial_id} stands twice in study {name!r}; give it once")
        seen.add(trial.trial_id)


def _check_account(score: Score, predictions: Sequence[Prediction]) -> None:
    if not predictions:
        return
    counted = Counter(prediction.verdict for prediction in predictions)
    given = (counted["correct"], counted["wrong"], counted["truncated"], counted["error"])
    expected = (score.correct, score.wrong, score.truncated, score.errors)
    if given != expected:
        raise StoreError(
            f"the score of {score.task} counts {expected} correct, wrong, truncated, errors; its "
            f"predictions {given}: give every prediction of the score once"
        )
    if len({prediction.question_index for prediction in predictions}) != len(predictions):
        raise StoreError(f"two predictions of {score.task} answer one question; give one for each")
