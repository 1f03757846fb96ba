"""What scoring says is written as it comes, and nothing that was answered is asked for again."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from loratune.records import Answer, NotScored, Prediction, QuestionSet, Said, Score, Scored
from loratune.scoring import ANSWERS_AT_ONCE, SECONDS_BETWEEN_WRITES, written
from loratune.store.database import Store, open_store
from store.samples import trial

ASKED = QuestionSet("gsm8k", "1", "greedy", "test", ("1",) * 200)
OF_TRIAL = [("trial-1", ASKED), ("trial-2", ASKED)]


@pytest.fixture
def store(tmp_path: Path) -> Generator[Store]:
    with open_store(tmp_path / "loratune.db", create=True) as opened:
        opened.add_study("study", text="", select_on="test", trials=[trial(1), trial(2)])
        yield opened


def said(index: int, number: int) -> Said:
    return Said(index, {number: Answer(str(number), 1, True)})


def answered(store: Store) -> list[int]:
    return [len(store.answers(trial_id, asked)) for trial_id, asked in OF_TRIAL]


def test_answers_are_written_many_at_once_and_a_score_takes_their_place(store: Store):
    number = ANSWERS_AT_ONCE + 6
    score = Score("gsm8k", "1", "strict", "greedy", "test", number, 0, 0, 0)
    predictions = tuple(Prediction(at, str(at), 1, "correct", True) for at in range(number))

    def told() -> Generator[Any]:
        for at in range(number):
            assert answered(store) == [at // ANSWERS_AT_ONCE * ANSWERS_AT_ONCE, 0]
            yield said(0, at)
        yield Scored(0, score, predictions)
        assert answered(store) == [0, 0]
        (one,) = store.all_scores("study")
        assert store.predictions(one.score_id) == predictions
        assert store.question_set(score) == ASKED
        yield said(1, 3)
        yield NotScored(1, "it broke")

    events = list(written(told(), OF_TRIAL, store=store, clock=lambda: 0.0))
    assert len(events) == number + 3
    # An adapter that broke keeps what it has answered.
    assert answered(store) == [0, 1]


def test_answers_that_come_slowly_are_written_by_the_clock(store: Store):
    now = [0.0]
    seen = list[list[int]]()
    events = (said(at % 2, at) for at in range(6))
    for _ in written(events, OF_TRIAL, store=store, clock=lambda: now[0]):
        seen.append(answered(store))
        now[0] += SECONDS_BETWEEN_WRITES / 2
    # At 0, 1 and 2 half-pauses: the third finds the pause over, and so does the fifth.
    assert seen == [[0, 0], [0, 0], [2, 1], [2, 1], [3, 2], [3, 2]]
    assert answered(store) == [3, 3]


@pytest.mark.parametrize("how", ["closed", "raises"])
def test_stopped_by_whatever_it_leaves_every_answer_and_ends_what_it_reads(store: Store, how: str):
    ended = list[bool]()

    def told() -> Generator[Said]:
        try:
            for at in range(9):
                yield said(0, at)
            raise KeyboardInterrupt
        finally:
            ended.append(True)

    events = written(told(), OF_TRIAL, store=store, clock=lambda: 0.0)
    if how == "closed":
        for _ in range(9):
            next(events)
        events.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            list(events)
    assert answered(store) == [9, 0]
    assert ended == [True]
