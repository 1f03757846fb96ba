"""What scoring says, written as it comes: killed at any instant, few answers are asked for again.

Answers go into the store before there is a score of them, many in one transaction; the score then
takes their place. `known_answers` finds them in both, so that another grader asks nothing. No
torch.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from loratune.records import (
    Answer,
    NotScored,
    Prediction,
    QuestionSet,
    Said,
    Score,
    Scored,
)
from loratune.store.database import Store

# What a kill may cost, whichever comes first.
ANSWERS_AT_ONCE = 64
SECONDS_BETWEEN_WRITES = 2.0


def written(
    events: Generator[Said | Scored | NotScored],
    asked: Sequence[tuple[str, QuestionSet]],
    *,
    store: Store,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Said | Scored | NotScored]:
    """Each event again; scores are in the store by then, answers soon.

    Closed or ended by whatever is raised, it leaves every answer so far in the store.

    Args:
        events: what scoring says.
        asked: the trial's id and the questions, at the indices that the events name.
        store: where it goes.
        clock: seconds; a difference of two readings counts.

    Raises:
        StoreError: an answer or a score can't be written.
    """
    waiting = dict[int, dict[int, Answer]]()
    last_write = clock()

    def write() -> None:
        while waiting:
            index, answers = waiting.popitem()
            trial_id, questions = asked[index]
            store.add_answers(trial_id, questions, answers)

    try:
        with closing(events):
            for event in events:
                if isinstance(event, Said):
                    waiting.setdefault(event.asked, {}).update(event.answers)
                elif isinstance(event, Scored):
                    waiting.pop(event.asked, None)
                    trial_id, questions = asked[event.asked]
                    store.add_score(trial_id, event.score, event.predictions, questions=questions)
                is_full = sum(map(len, waiting.values())) >= ANSWERS_AT_ONCE
                if is_full or clock() - last_write >= SECONDS_BETWEEN_WRITES:
                    write()
                    last_write = clock()
                yield event
    finally:
        write()


def known_answers(
    store: Store, study: str, asked: Sequence[tuple[str, QuestionSet]]
) -> list[dict[int, Answer]]:
    """By question, what trials of a study have answered already, whatever judged it.

    Args:
        store: where the answers are: those kept for a score to come, and those of the newest score
            of the same questions.
        study: its name.
        asked: each trial's id and the questions.

    Raises:
        StoreError: no such study.
    """
    scores = store.all_scores(study, trial_ids={trial_id for trial_id, _ in asked})
    judged = {_same_answers(one.trial_id, one.score): one.score_id for one in scores}
    found = list[dict[int, Answer]]()
    for trial_id, questions in asked:
        earlier = judged.get(_same_answers(trial_id, questions))
        known = {} if earlier is None else _answers_of(store.predictions(earlier))
        found.append({**known, **store.answers(trial_id, questions)})
    return found


def _same_answers(trial_id: str, asked: QuestionSet | Score) -> tuple[str, ...]:
    """What answers depend on: all but the grader."""
    return trial_id, asked.task, asked.task_version, asked.decoding


def _answers_of(predictions: Sequence[Prediction]) -> dict[int, Answer]:
    """By question. Older versions did not say whether an answer had ended: those are asked anew."""
    return {
        one.question_index: Answer(one.text, one.num_tokens, one.finished)
        for one in predictions
        if one.finished is not None
    }
