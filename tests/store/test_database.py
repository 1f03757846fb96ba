"""The contract of store/database.py, over a database in memory, in a file, and opened each time."""

import math
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError

from loratune.errors import StoreError
from loratune.records import Answer, Outcome, Prediction, QuestionSet
from loratune.store import database
from loratune.store.database import CLAIM_EXPIRY_SECONDS, Store, open_store
from loratune.store.workers import Worker, this_worker
from store.samples import (
    ELSEWHERE,
    PREDICTIONS,
    PROVENANCE,
    START,
    SUMMARY,
    Clock,
    outcome,
    score,
    trial,
)


class Reopened:
    """Opens the file anew for every single call, as if each came from another process."""

    def __init__(self, open_again: Callable[[], Store]) -> None:
        self._open_again = open_again

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._open_again() as store:
                return getattr(store, name)(*args, **kwargs)

        return call


@pytest.fixture
def clock() -> Clock:
    return Clock()


def empty_server(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()


# The suite runs over a PostgreSQL server too where this names one; its tables are dropped.
SERVER = os.environ.get("LORATUNE_TEST_POSTGRESQL")


@pytest.fixture(params=["memory", "file", "reopened", *(["server"] if SERVER else [])])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    if request.param == "server":
        assert SERVER is not None
        empty_server(SERVER)
        with open_store(SERVER, create=True, clock=clock) as opened:
            yield opened
        return
    if request.param == "memory":
        with open_store("sqlite://", create=True, clock=clock) as opened:
            yield opened
        return
    file = tmp_path / "loratune.db"
    with open_store(file, create=True, clock=clock) as opened:
        if request.param == "file":
            yield opened
    if request.param == "reopened":
        yield cast("Store", Reopened(lambda: open_store(file, create=False, clock=clock)))


def add(store: Store, *numbers: int, name: str = "study") -> None:
    store.add_study(
        name,
        text=f"study: {name}\n",
        select_on="validation_loss",
        trials=[trial(number) for number in numbers],
    )


def claim(store: Store, number: int) -> int:
    attempt = store.claim(f"trial-{number}", provenance=PROVENANCE)
    assert attempt is not None
    return attempt


def statuses(store: Store, study: str = "study") -> list[str]:
    return [result.status for result in store.results(study)]


# Studies and trials


def test_a_study_and_its_trials_come_back_as_they_were_added(store: Store) -> None:
    wanted = (trial(3), trial(1), trial(2))
    text = "study: s\n# \u6570\u5b66\r\n\ttail "
    store.add_study("s", text=text, select_on="test", trials=wanted)
    assert store.trials("s") == wanted
    (study,) = store.studies()
    assert (study.name, study.text, study.select_on) == ("s", text, "test")
    assert study.created_at == START.isoformat()


def test_adding_the_same_study_again_changes_nothing(store: Store, clock: Clock) -> None:
    add(store, 1, 2)
    before = store.studies()
    clock.advance(60)
    add(store, 1, 2)
    assert store.studies() == before


def test_a_changed_study_replaces_the_old_one_and_keeps_its_place(
    store: Store, clock: Clock
) -> None:
    add(store, 1, 2, name="first")
    add(store, 5, name="second")
    store.finish(claim(store, 1), outcome(1))
    clock.advance(60)
    store.add_study(
        "first", text="changed", select_on="validation_loss", trials=[trial(3), trial(1)]
    )
    assert [study.name for study in store.studies()] == ["first", "second"]
    assert store.studies()[0].text == "changed"
    assert statuses(store, "first") == ["planned", "done"]


def test_the_old_revision_comes_back_when_its_text_does(store: Store) -> None:
    add(store, 1, 2)
    add(store, 2)
    add(store, 1, 2)
    assert store.trials("study") == (trial(1), trial(2))


def test_two_studies_share_a_trial_and_its_outcome(store: Store) -> None:
    add(store, 1, 2, name="a")
    add(store, 2, 3, name="b")
    store.finish(claim(store, 2), outcome(2))
    assert statuses(store, "a") == ["planned", "done"]
    assert statuses(store, "b") == ["done", "planned"]
    assert store.claim("trial-2", provenance=PROVENANCE) is None


def test_a_shared_trial_keeps_the_words_of_each_study(store: Store) -> None:
    """The path of a model folder is not in the id, but each study has to find its own."""
    here, there = trial(1, model="/here/model"), trial(1, model="/there/model")
    store.add_study("a", text="", select_on="test", trials=[here])
    store.add_study("b", text="", select_on="test", trials=[there])
    assert store.trials("a") == (here,)
    assert store.trials("b") == (there,)
    assert store.results("b")[0].trial == there


def test_a_study_without_trials_has_no_results(store: Store) -> None:
    add(store)
    assert store.trials("study") == ()
    assert store.results("study") == ()


def test_a_provisional_trial_is_refused_and_nothing_is_written(store: Store) -> None:
    with pytest.raises(StoreError, match=r"trial-2 of study 's' is provisional"):
        store.add_study(
            "s", text="", select_on="test", trials=[trial(1), trial(2, provisional=True)]
        )
    assert store.studies() == ()


def test_a_trial_twice_in_a_study_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="trial-1 stands twice"):
        add(store, 1, 1)


def test_an_unknown_study_is_an_error_that_lists_those_there(store: Store) -> None:
    add(store, 1, name="fig1")
    add(store, 1, name="fig2")
    for ask in (store.trials, store.results, store.all_scores, store.data_summaries):
        with pytest.raises(StoreError, match=r"no study 'fig3' .* the studies there: fig1, fig2"):
            ask("fig3")


def test_an_unknown_trial_is_an_error(store: Store) -> None:
    for ask in (
        lambda: store.claim("nobody", provenance=PROVENANCE),
        lambda: store.outcome("nobody"),
        lambda: store.attempts("nobody"),
        lambda: store.add_score("nobody", score(), PREDICTIONS),
        lambda: store.add_artifact("nobody", kind="adapter", path="x"),
    ):
        with pytest.raises(StoreError, match="no trial 'nobody'"):
            ask()


# Attempts and outcomes


def test_status_goes_from_planned_over_running_to_the_outcomes(store: Store) -> None:
    add(store, 1)
    (planned,) = store.results("study")
    assert (planned.status, planned.outcome, planned.engine) == ("planned", None, None)
    attempt = claim(store, 1)
    (running,) = store.results("study")
    assert (running.status, running.outcome, running.engine) == ("running", None, "reference")
    assert store.finish(attempt, outcome(1))
    (done,) = store.results("study")
    assert (done.status, done.outcome, done.engine) == ("done", outcome(1), "reference")
    assert (done.study, done.select_on, done.scores) == ("study", "validation_loss", ())


def test_a_held_trial_cannot_be_claimed(store: Store) -> None:
    add(store, 1, 2)
    claim(store, 1)
    assert store.claim("trial-1", provenance=PROVENANCE) is None
    assert store.claim("trial-2", provenance=PROVENANCE) is not None


def test_a_released_trial_is_claimed_anew_as_a_new_attempt(store: Store) -> None:
    add(store, 1)
    first = claim(store, 1)
    assert store.release(first)
    assert statuses(store) == ["planned"]
    second = claim(store, 1)
    assert second != first
    assert [(one.number, one.end_kind) for one in store.attempts("trial-1")] == [
        (1, "interrupted"),
        (2, None),
    ]
    assert store.attempts("trial-1")[0].provenance == PROVENANCE


@pytest.mark.parametrize("status", ["done", "diverged", "stopped"])
def test_a_final_outcome_stands_for_ever(store: Store, status: Any, clock: Clock) -> None:
    add(store, 1)
    attempt = claim(store, 1)
    assert store.finish(attempt, outcome(1, status=status))
    clock.advance(10 * CLAIM_EXPIRY_SECONDS)
    assert store.claim("trial-1", provenance=PROVENANCE) is None
    assert not store.finish(attempt, outcome(1, validation_loss=9.0))
    assert store.heartbeat([attempt]) == {attempt}
    assert not store.release(attempt)
    assert store.outcome("trial-1") == outcome(1, status=status)


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_after_a_failure_the_trial_is_tried_anew_and_the_newest_outcome_counts(
    store: Store, status: Any
) -> None:
    add(store, 1)
    failed = replace(outcome(1, status=status), error="Traceback \ud800\x00", losses=())
    store.finish(claim(store, 1), failed)
    assert store.results("study")[0].outcome == failed
    attempt = claim(store, 1)
    (running,) = store.results("study")
    assert (running.status, running.outcome) == ("running", None)
    store.finish(attempt, outcome(1))
    assert store.outcome("trial-1") == outcome(1)
    assert store.results("study")[0].outcome == outcome(1)
    assert [one.end_kind for one in store.attempts("trial-1")] == ["finished", "finished"]


def test_a_failure_since_a_moment_is_not_tried_again_by_those_who_ask_since_then(
    store: Store,
) -> None:
    add(store, 1, 2)
    assert store.newest_attempt() == 0
    store.finish(claim(store, 1), outcome(1, status="failed"))
    moment = store.newest_attempt()
    # Failed before: it is tried again, once.
    again = store.claim("trial-1", provenance=PROVENANCE, since=moment)
    assert again is not None
    assert store.newest_attempt() == again > moment
    store.finish(again, outcome(1, status="failed"))
    assert store.claim("trial-1", provenance=PROVENANCE, since=moment) is None
    # Given back is not failed.
    released = store.claim("trial-2", provenance=PROVENANCE, since=moment)
    assert released is not None
    store.release(released)
    assert store.claim("trial-2", provenance=PROVENANCE, since=moment) is not None
    assert store.claim("trial-1", provenance=PROVENANCE) is not None


def test_the_trials_whose_outcome_stands_are_counted_as_they_are_claimed(store: Store) -> None:
    add(store, 1, 2, 3, 4)
    ids = [f"trial-{number}" for number in (1, 2, 3)]
    assert store.num_ended(ids) == 0
    store.finish(claim(store, 1), outcome(1, status="failed"))
    moment = store.newest_attempt()
    store.finish(claim(store, 2), outcome(2, status="diverged"))
    store.finish(claim(store, 4), outcome(4))
    assert store.num_ended(ids) == store.num_ended(ids, since=moment) == 1
    # It fails twice, and is one trial.
    for _ in range(2):
        store.finish(claim(store, 1), outcome(1, status="failed"))
    assert store.num_ended(ids, since=moment) == 2
    assert store.num_ended(ids) == 1


def test_an_outcome_of_another_trial_is_refused(store: Store) -> None:
    add(store, 1, 2)
    attempt = claim(store, 1)
    with pytest.raises(StoreError, match="is of trial trial-1, the outcome of trial-2"):
        store.finish(attempt, outcome(2))
    assert store.outcome("trial-2") is None
    assert store.finish(attempt, outcome(1))


def test_results_of_a_few_trials_are_those_of_all_and_of_no_other_study(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_IDS_PER_QUERY", 2)
    add(store, 5, 4, 3, 2, 1)
    add(store, 9, name="other")
    store.finish(claim(store, 4), replace(outcome(4), status="failed"))
    store.finish(claim(store, 4), outcome(4))
    store.finish(claim(store, 1), outcome(1))
    claim(store, 3)
    for number in (1, 4):
        store.add_score(f"trial-{number}", score(), PREDICTIONS)
    whole = store.results("study")
    few = store.results("study", trial_ids=["trial-1", "trial-3", "trial-9", "trial-4", "trial-1"])
    assert few == tuple(whole[index] for index in (1, 2, 4))
    assert few[0].scores
    assert store.results("study", trial_ids=[]) == ()


def test_an_attempt_expires_by_its_heartbeat(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "loratune.db"
    with (
        open_store(file, create=True, clock=clock, worker=lambda: ELSEWHERE) as far,
        open_store(file, create=True, clock=clock) as near,
    ):
        add(far, 1)
        attempt = claim(far, 1)
        clock.advance(CLAIM_EXPIRY_SECONDS)
        assert near.claim("trial-1", provenance=PROVENANCE) is None
        assert not far.heartbeat([attempt])
        clock.advance(CLAIM_EXPIRY_SECONDS)
        assert statuses(near) == ["running"]
        clock.advance(0.001)
        assert statuses(near) == ["planned"]
        taken = claim(near, 1)
        # The far worker was only slow. It learns that it lost, and writes nothing.
        assert far.heartbeat([attempt]) == {attempt}
        assert not far.finish(attempt, outcome(1, validation_loss=7.0))
        assert far.outcome("trial-1") is None
        assert near.finish(taken, outcome(1))
        assert [one.end_kind for one in near.attempts("trial-1")] == ["lost", "finished"]


def test_one_heartbeat_beats_for_every_attempt_and_names_those_that_were_lost(
    tmp_path: Path, clock: Clock
) -> None:
    file = tmp_path / "loratune.db"
    with (
        open_store(file, create=True, clock=clock, worker=lambda: ELSEWHERE) as far,
        open_store(file, create=True, clock=clock) as near,
    ):
        add(far, 1, 2, 3)
        attempts = [claim(far, number) for number in (1, 2, 3)]
        clock.advance(CLAIM_EXPIRY_SECONDS + 1)
        claim(near, 2)
        clock.advance(CLAIM_EXPIRY_SECONDS - 1)
        assert far.heartbeat(attempts) == {attempts[1]}
        assert far.heartbeat([]) == frozenset()
        clock.advance(CLAIM_EXPIRY_SECONDS - 1)
        assert statuses(far) == ["running", "planned", "running"]


def test_a_slow_worker_whose_trial_nobody_took_may_still_finish(store: Store, clock: Clock) -> None:
    add(store, 1)
    attempt = claim(store, 1)
    clock.advance(100 * CLAIM_EXPIRY_SECONDS)
    assert statuses(store) == ["planned"]
    assert store.finish(attempt, outcome(1))
    assert statuses(store) == ["done"]


def test_a_claim_of_a_process_that_is_gone_is_taken_over_at_once(
    tmp_path: Path, clock: Clock
) -> None:
    me = this_worker()
    file = tmp_path / "loratune.db"
    # The same pid that began at another time: pids are used again.
    gone = Worker(host=me.host, pid=me.pid, started=me.started - 1000)
    with open_store(file, create=True, clock=clock, worker=lambda: gone) as store:
        add(store, 1)
        claim(store, 1)
        assert statuses(store) == ["planned"]
    with open_store(file, create=False, clock=clock) as store:
        claim(store, 1)
        assert statuses(store) == ["running"]


def test_threads_that_claim_the_same_trials_get_each_once(store: Store) -> None:
    numbers = list(range(12))
    add(store, *numbers)
    claimed: list[int] = []

    def work() -> None:
        for number in numbers:
            if store.claim(f"trial-{number}", provenance=PROVENANCE) is not None:
                claimed.append(number)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == numbers


def test_a_second_final_outcome_is_impossible_in_the_database_itself(tmp_path: Path) -> None:
    file = tmp_path / "loratune.db"
    with open_store(file, create=True) as store:
        add(store, 1)
        store.finish(claim(store, 1), replace(outcome(1), status="failed"))
        store.finish(claim(store, 1), outcome(1))
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection, pytest.raises(IntegrityError, match="UNIQUE"):
        connection.exec_driver_sql("UPDATE outcomes SET status = 'done'")
    engine.dispose()


# Exactness


def bits(value: float | None) -> bytes | None:
    if value is None or math.isnan(value):
        return b"nan" if value is not None else None
    return struct.pack("<d", value)


def test_numbers_that_are_none_nan_or_infinite_come_back_as_they_were(store: Store) -> None:
    values = (None, math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2)
    add(store, *range(len(values)))
    for number, value in enumerate(values):
        numbers = () if value is None else (value, 1.0)
        store.finish(
            claim(store, number),
            replace(
                outcome(number, status="diverged", validation_loss=value),
                train_loss=value,
                losses=numbers,
                grad_norms=numbers,
            ),
        )
    for number, value in enumerate(values):
        for found in (store.outcome(f"trial-{number}"), store.results("study")[number].outcome):
            assert found is not None
            assert bits(found.validation_loss) == bits(found.train_loss) == bits(value)
            assert [bits(one) for one in found.losses] == (
                [] if value is None else [bits(value), bits(1.0)]
            )
            assert len(found.grad_norms) == len(found.losses)


texts = st.text(st.characters(codec=None, exclude_categories=()))
floats = st.floats(allow_nan=False)


@pytest.fixture(scope="module")
def one_store() -> Iterator[Store]:
    with open_store("sqlite://", create=True) as opened:
        yield opened


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numbers=st.lists(floats, max_size=5),
    loss=st.none() | floats,
    words=st.none() | texts,
    count=st.none() | st.integers(0, 2**62),
)
def test_any_outcome_comes_back_equal(
    one_store: Store,
    numbers: list[float],
    loss: float | None,
    words: str | None,
    count: int | None,
) -> None:
    store = one_store
    wanted = Outcome(
        trial_id="trial-1",
        status="failed",
        num_updates=3,
        train_loss=loss,
        validation_loss=loss,
        seconds=abs(loss or 0.0),
        num_tokens=count or 0,
        peak_memory_bytes=count,
        rows_per_microbatch=None,
        reason=words,
        error=words,
        losses=tuple(numbers),
        grad_norms=tuple(reversed(numbers)),
    )
    add(store, 1)
    store.finish(claim(store, 1), wanted)
    assert store.outcome("trial-1") == wanted


def test_results_without_losses_differ_in_nothing_else(store: Store) -> None:
    add(store, 1, 2)
    store.finish(claim(store, 2), outcome(2))
    short = store.results("study", with_losses=False)
    assert short[1].outcome == replace(outcome(2), losses=(), grad_norms=())
    assert replace(short[1], outcome=outcome(2)) == store.results("study")[1]


def test_where_a_trial_was_stopped_half_way_losses_are_there_and_it_can_be_taken_back(
    store: Store,
) -> None:
    add(store, 1, 2)
    store.finish(claim(store, 1), outcome(1))
    store.finish(claim(store, 2), outcome(2, status="stopped", validation_loss=None))
    assert store.results("study", with_losses=False) == store.results("study")
    assert store.results("study")[0].outcome == outcome(1)
    store.forget_stopped(["trial-1", "trial-2"])
    assert [one.status for one in store.results("study")] == ["done", "planned"]
    store.finish(claim(store, 2), outcome(2))
    assert store.results("study")[1].status == "done"


def test_each_way_of_running_is_told_once_in_order_of_time(store: Store) -> None:
    add(store, 1, 2, 3)
    elsewhere = replace(PROVENANCE, device="another device")
    for number, provenance in ((1, PROVENANCE), (2, elsewhere), (3, PROVENANCE)):
        assert store.claim(f"trial-{number}", provenance=provenance) is not None
    assert store.provenances("study") == (PROVENANCE, elsewhere)


# Scores


def test_the_newest_score_of_a_task_counts_and_all_are_kept(store: Store, clock: Clock) -> None:
    add(store, 1, 2)
    old, new = score(correct=1), score(correct=50)
    other = score(grader="pissa")
    ids = [store.add_score("trial-1", one, ()) for one in (old, other)]
    clock.advance(5)
    ids.append(store.add_score("trial-1", new, ()))
    store.add_score("trial-2", score(task="humaneval"), ())
    first, second = store.results("study")
    assert first.scores == (new,)
    every, _ = store.results("study", every_score=True)
    assert every.scores == (other, new)
    assert [one.task for one in second.scores] == ["humaneval"]
    every = store.all_scores("study")
    assert [one.score for one in every] == [old, other, new, score(task="humaneval")]
    assert [one.score_id for one in every[:3]] == ids == sorted(ids)
    assert (every[2].trial_id, every[2].created_at) == ("trial-1", clock.now)
    assert store.all_scores("study", trial_ids=["trial-1"]) == every[:3]
    assert store.all_scores("study", trial_ids=["trial-2", "trial-1"]) == every


def test_predictions_come_back_by_question_whatever_their_text(store: Store) -> None:
    add(store, 1)
    score_id = store.add_score("trial-1", score(), tuple(reversed(PREDICTIONS)))
    assert store.predictions(score_id) == PREDICTIONS
    assert store.predictions(score_id + 1) == ()


def test_verdicts_are_those_of_the_scores_that_count(store: Store) -> None:
    add(store, 1, 2)
    store.add_score("trial-1", score(correct=0, wrong=2), ())
    store.add_score("trial-1", score(), tuple(reversed(PREDICTIONS)))
    store.add_score("trial-2", score(grader="pissa"), PREDICTIONS)
    store.add_score("trial-2", score(task="other"), ())
    first, second = store.verdicts("study")
    assert (first.trial_id, first.task, first.split) == ("trial-1", "gsm8k", "test")
    assert (first.questions, first.correct) == ((0, 1, 2, 5), (True, False, False, False))
    assert second.trial_id == "trial-2"
    assert store.verdicts("study", trial_ids=["trial-2"]) == (second,)

    # A newer score without its answers replaces the older one, whose answers count no more.
    store.add_score("trial-1", score(correct=0, wrong=2), ())
    assert store.verdicts("study") == (second,)


def test_what_was_asked_comes_back_with_a_score_and_is_written_once(store: Store) -> None:
    add(store, 1)
    made = score()
    asked = QuestionSet(
        made.task,
        made.task_version,
        made.decoding,
        "test",
        ("4", None, "\ud800"),
        r"(\d)",
        (("a",),),
    )
    store.add_score("trial-1", made, PREDICTIONS)
    assert store.question_set(made) is None
    store.add_score("trial-1", made, PREDICTIONS, questions=asked)
    store.add_score("trial-1", made, PREDICTIONS, questions=replace(asked, references=("5",)))
    assert store.question_set(made) == asked
    assert store.question_set(replace(made, grader="pissa")) == asked
    assert store.question_set(replace(made, decoding="other")) is None


def test_answers_are_kept_until_there_is_a_score_of_their_questions(store: Store) -> None:
    add(store, 1, 2)
    made = score()
    asked = QuestionSet(made.task, made.task_version, made.decoding, "test", ("4",) * 6)
    other = replace(asked, decoding="other")
    first = {5: Answer("\ud800 \x00", 3, True), 0: Answer("", 256, False)}
    assert store.answers("trial-1", asked) == {}
    store.add_answers("trial-1", asked, first)
    store.add_answers("trial-1", asked, {0: Answer("later", 1, True), 2: Answer("2", 1, True)})
    store.add_answers("trial-1", other, {0: Answer("of other questions", 4, True)})
    store.add_answers("trial-2", asked, {0: Answer("of another trial", 4, True)})
    assert store.answers("trial-1", asked) == {**first, 2: Answer("2", 1, True)}
    store.add_score("trial-1", made, PREDICTIONS)  # Nobody says of which questions.
    assert len(store.answers("trial-1", asked)) == 3
    store.add_score("trial-1", made, PREDICTIONS, questions=asked)
    assert store.answers("trial-1", asked) == {}
    assert len(store.answers("trial-1", other)) == len(store.answers("trial-2", asked)) == 1
    with pytest.raises(StoreError, match="trial-9"):
        store.add_answers("trial-9", asked, first)


def test_predictions_that_do_not_add_up_are_refused(store: Store) -> None:
    add(store, 1)
    with pytest.raises(StoreError, match=r"counts \(2, 1, 1, 1\) .* predictions \(1, 1, 1, 1\)"):
        store.add_score("trial-1", score(correct=2), PREDICTIONS)
    twice = (Prediction(0, "a", 1, "correct"), Prediction(0, "b", 1, "wrong"))
    with pytest.raises(StoreError, match="answer one question"):
        store.add_score("trial-1", score(truncated=0, errors=0), twice)
    assert store.all_scores("study") == ()


# Artifacts and summaries


def test_an_artifact_is_replaced_and_removed(store: Store) -> None:
    add(store, 1, 2)
    assert store.artifact("trial-1", kind="adapter") is None
    store.add_artifact("trial-1", kind="adapter", path="adapters/old")
    store.add_artifact("trial-1", kind="snapshot", path="snapshots/1")
    store.add_artifact("trial-1", kind="adapter", path="adapters/\u65b0")
    assert store.artifact("trial-1", kind="adapter") == "adapters/\u65b0"
    store.remove_artifact("trial-1", kind="adapter")
    store.remove_artifact("trial-2", kind="adapter")
    assert store.artifact("trial-1", kind="adapter") is None
    assert store.artifact("trial-1", kind="snapshot") == "snapshots/1"


def test_the_newest_data_summary_of_each_fingerprint_counts(store: Store) -> None:
    store.add_study(
        "study",
        text="",
        select_on="test",
        trials=[
            trial(1, data_fingerprint="data-b"),
            trial(2, data_fingerprint="data-a"),
            trial(3, data_fingerprint="data-b"),
            trial(4, data_fingerprint="unseen"),
        ],
    )
    changed = replace(SUMMARY, num_in_test=(("gsm8k", 1), ("humaneval", 0)))
    store.add_data_summary("data-a", SUMMARY)
    store.add_data_summary("data-b", SUMMARY)
    store.add_data_summary("data-b", changed)
    store.add_data_summary("of another study", SUMMARY)
    assert list(store.data_summaries("study").items()) == [
        ("data-b", changed),
        ("data-a", SUMMARY),
    ]
