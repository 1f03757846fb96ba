"""What one trial's number is: the score that selects, and the accuracy of each task.

Absent is None. A score that is not finite is returned as it is: callers treat it as divergence.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loratune.records import Score, TrialResult
from loratune.study.methods import Option, descriptions

VALIDATION = "validation"


@dataclass(frozen=True, slots=True)
class Metric:
    """What a score is. `task` is None for the validation loss, else the column's task name."""

    name: str
    higher_is_better: bool
    task: str | None

    def better(self, first: float, second: float) -> bool:
        """Whether `first` is strictly better than `second`."""
        return first > second if self.higher_is_better else first < second


LOSS = Metric("validation_loss", higher_is_better=False, task=None)


def task_column(score: Score) -> str:
    """The name under which a score stands in a table: `validation`, or the test task's name."""
    return VALIDATION if score.split == "validation" else score.task


def accuracy_metric(task: str) -> Metric:
    """The accuracy of one task; `validation` is that of the held-out rows."""
    return Metric(f"{task}_accuracy", higher_is_better=True, task=task)


def test_tasks(results: Iterable[TrialResult]) -> tuple[str, ...]:
    """The test tasks that any trial was scored on, in order of first appearance."""
    seen = dict[str, None]()
    for result in results:
        for score in result.scores:
            if score.split == "test":
                seen.setdefault(score.task)
    return tuple(seen)


def selection_metric(results: Sequence[TrialResult]) -> Metric:
    """What selects in a study: its trials' `select_on`; for `test` the first test task."""
    select_on = results[0].select_on
    if select_on == "validation_loss":
        return LOSS
    if select_on == "validation_accuracy":
        return accuracy_metric(VALIDATION)
    return accuracy_metric((*test_tasks(results), "test")[0])


def find_score(result: TrialResult, task: str) -> Score | None:
    """The trial's score under that column name; None where no question was asked either."""
    for score in result.scores:
        if task_column(score) == task and score.total > 0:
            return score
    return None


def trial_score(result: TrialResult, metric: Metric) -> float | None:
    """The trial's number under a metric; None where it is absent or the trial did not finish.

    A trial that was stopped early has no number: its loss is that of another horizon (censored).
    """
    if result.status != "done" or result.outcome is None:
        return None
    if metric.task is None:
        return result.outcome.validation_loss
    score = find_score(result, metric.task)
    return None if score is None else score.accuracy


def diverged(result: TrialResult, metric: Metric) -> bool:
    """Whether training left for good, or ended in a number that is not finite."""
    score = trial_score(result, metric)
    return result.status == "diverged" or (score is not None and not math.isfinite(score))


def method_label(result: TrialResult) -> str:
    """The method's name with the options that are not its defaults: `loraplus(ratio=8)`."""
    method = result.trial.method
    known = descriptions().get(method.name)
    options = dict[str, Option]() if known is None else known.options
    changed = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in method.options
        if name not in options or options[name].default != value
    ]
    return f"{method.name}({', '.join(changed)})" if changed else method.name
